/* Attention in tiles, over keys and values that are arranged so that both of its products add a vector
   of outputs times one number.

   Per SIDE columns, the keys of a head are [dim words][SIDE] and its values [words of columns][dim],
   in words of one float32 or two bfloat16. */

#include "attention.h"

enum { TILE = 4, SIDE = TILE * LANES, COLUMNS = PAGES_AT_ONCE * PAGE };
_Static_assert(SIDE == PAGE, "a page is what is multiplied at once");

/* sums[q] = factor[q] * sums[q] + left[q] * right, with `depth` words of left[q] and `vectors` vectors
   of sums; without factors, sums were 0. */
INLINE void add_tile(int queries, int vectors, int half, const uint32_t *left, long left_stride,
                     const uint32_t *right, long right_stride, long depth, float *sums,
                     long sums_stride, const float *factor)
{
    lanes sum[AT_ONCE][TILE];
    for (int q = 0; q < queries; q++)
        for (int t = 0; t < vectors; t++)
            sum[q][t] = factor ? *(lanes *)(sums + q * sums_stride + t * LANES) * factor[q]
                               : (lanes){0};
    for (long w = 0; w < depth; w++, right += right_stride)
        for (int q = 0; q < queries; q++)
            for (int t = 0; t < vectors; t++)
                sum[q][t] = add_product(half, sum[q][t], *(const words *)(right + t * LANES),
                                        (words){0} + left[q * left_stride + w]);
    for (int q = 0; q < queries; q++)
        for (int t = 0; t < vectors; t++)
            *(lanes *)(sums + q * sums_stride + t * LANES) = sum[q][t];
}

/* Scores of `queries` queries for SIDE columns. */
INLINE void score_side(long queries, int half, const uint32_t *query, long query_stride,
                       const uint32_t *keys, long dim_words, float *scores)
{
    WITH_CONSTANT(queries, add_tile, TILE, half, query, query_stride, keys, SIDE, dim_words, scores,
                  COLUMNS, NULL)
}

/* Add `words` words of columns' values, each times its weight, to sums `[queries][dim]`. */
INLINE void add_values(long queries, int half, const float *weights, const uint32_t *values,
                       long words, long dim, float *sums, const float *factor)
{
    const uint32_t *left = (const uint32_t *)weights;
    long d = 0;
    for (; d + SIDE <= dim; d += SIDE)
        WITH_CONSTANT(queries, add_tile, TILE, half, left, COLUMNS, values + d, dim, words,
                      sums + d, dim, factor)
    for (; d < dim; d += 2 * LANES) /* a head's size is a multiple of this */
        WITH_CONSTANT(queries, add_tile, 2, half, left, COLUMNS, values + d, dim, words, sums + d,
                      dim, factor)
}

/* Convert the scores of a token for a block of `count` columns, of which it sees those from `from` to
   before `seen`, to weights, in place, as bfloat16 if `half`; return the factor for its sums so far. */
INLINE float weigh(int half, float *scores, long from, long seen, long count, float scale,
                   float *most, float *sum)
{
    lanes largest = (lanes){0} + *most, sums = {0};
    for (long c = 0; c < from && c < count; c++)
        scores[c] = -INFINITY;
    for (long c = seen < 0 ? 0 : seen; c < count; c++)
        scores[c] = -INFINITY;
    for (long c = 0; c < count; c += LANES) {
        lanes scaled = *(lanes *)(scores + c) * scale;
        *(lanes *)(scores + c) = scaled;
        largest = (lanes)_mm512_max_ps((__m512)largest, (__m512)scaled);
    }
    float now = _mm512_reduce_max_ps((__m512)largest);
    float base = now == -INFINITY ? 0 : now;
    float factor = exponential((lanes){0} + (*most - base))[0];
    for (long c = 0; c < count; c += LANES) {
        lanes weights = exponential(*(lanes *)(scores + c) - base);
        sums += weights;
        if (half)
            store_bfloat16((uint16_t *)scores + c, weights);
        else
            *(lanes *)(scores + c) = weights;
    }
    *sum = *sum * factor + total(sums);
    *most = now;
    return factor;
}

/* Write a token's sums of weighted values, divided by its sum of weights. */
INLINE void store_sums(int half, const float *sums, float weights, long dim, char *place)
{
    for (long d = 0; d < dim; d += LANES) {
        lanes whole = *(lanes *)(sums + d) / weights;
        if (half)
            store_bfloat16((uint16_t *)place + d, whole);
        else
            *(lanes *)((float *)place + d) = whole;
    }
}
