/* Attention of many new tokens, which are the last columns and see all columns up to their own.

   A task is TOKENS tokens of one head. They process COLUMNS columns at a time, with a running
   maximum and sum per token, so that few scores are in memory ("flash attention"). Keys and values
   are first rearranged so that both products add a vector of outputs times one number. A token's
   sums are added in the order of its columns, whichever other tokens are new: passes of any width
   give the same result, to the last bit. */

#include "attention.h"

enum { TILE = 4, SIDE = TILE * LANES, COLUMNS = 4 * SIDE, TOKENS = 8 * AT_ONCE };
enum { TASKS = 8, LAID_OUT = 1 << 18 }; /* tasks per worker, and words, that suffice */

/* Keys and values of one head in words of one float32 or two bfloat16: per SIDE columns, keys as
   [dim words][SIDE] and values as [words of columns][dim]. */
struct laid_out {
    uint32_t *keys, *values;
    long dim_words;
};

/* Rearrange SIDE columns from `begin` on; columns after the last one are 0. */
static void lay_out(const struct attention *at, int half, const char *key, const char *value,
                    const struct laid_out *to, long begin)
{
    long dim = at->dim, pair = half ? 2 : 1, size = half ? 2 : 4;
    long count = at->columns - begin < SIDE ? at->columns - begin : SIDE;
    uint32_t *keys = to->keys + begin * to->dim_words, *values = to->values + begin / pair * dim;
    if (count < SIDE) {
        memset(keys, 0, SIDE * to->dim_words * sizeof *keys);
        memset(values, 0, SIDE / pair * dim * sizeof *values);
    }
    for (long c = 0; c < count; c++) {
        const uint32_t *from = (const uint32_t *)(key + (begin + c) * at->key_column * size);
        for (long w = 0; w < to->dim_words; w++)
            keys[w * SIDE + c] = from[w];
    }
    for (long c = 0; c < count; c += pair, values += dim) {
        const char *from = value + (begin + c) * at->value_column * size;
        const uint16_t *first = (const uint16_t *)from, *second = first + at->value_column;
        if (!half)
            memcpy(values, from, dim * size);
        else if (c + 1 < count)
            for (long d = 0; d < dim; d++)
                values[d] = first[d] | (uint32_t)second[d] << 16;
        else
            for (long d = 0; d < dim; d++)
                values[d] = first[d];
    }
}

/* sums[q] = factor[q] * sums[q] + left[q] * right, with `depth` words of left[q] and SIDE sums. */
INLINE void add_tile(int queries, int half, const uint32_t *left, long left_stride,
                     const uint32_t *right, long right_stride, long depth, float *sums,
                     long sums_stride, const float *factor)
{
    lanes sum[AT_ONCE][TILE];
    for (int q = 0; q < queries; q++)
        for (int t = 0; t < TILE; t++)
            sum[q][t] = factor ? *(lanes *)(sums + q * sums_stride + t * LANES) * factor[q]
                               : (lanes){0};
    for (long w = 0; w < depth; w++, right += right_stride)
        for (int q = 0; q < queries; q++)
            for (int t = 0; t < TILE; t++)
                sum[q][t] = add_product(half, sum[q][t], *(const words *)(right + t * LANES),
                                        (words){0} + left[q * left_stride + w]);
    for (int q = 0; q < queries; q++)
        for (int t = 0; t < TILE; t++)
            *(lanes *)(sums + q * sums_stride + t * LANES) = sum[q][t];
}

/* Convert the scores of a token's `seen` visible columns in a block of `count` to weights, in place,
   as bfloat16 if `half`; return the factor for the token's sums so far. */
INLINE float weigh(int half, float *scores, long seen, long count, float scale, float *most,
                   float *sum)
{
    lanes largest = (lanes){0} + *most, sums = {0};
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

/* Tokens `begin` to `end` of one head; `out` points to that head of the first token. */
INLINE void attend_block(int half, const struct attention *at, const char *query,
                         const struct laid_out *in, float scale, char *out, long begin, long end,
                         float *sums)
{
    long size = half ? 2 : 4, pair = half ? 2 : 1, dim = at->dim;
    long before = at->columns - at->width, query_words = at->query_token / pair;
    float scores[AT_ONCE * COLUMNS], most[TOKENS], sum[TOKENS], factor[AT_ONCE];
    for (long q = 0; q < end - begin; q++)
        most[q] = -INFINITY, sum[q] = 0;
    memset(sums, 0, (end - begin) * dim * sizeof *sums);
    for (long c = 0; c < before + end; c += COLUMNS)
        for (long q = begin, queries; q < end; q += queries) {
            queries = end - q < AT_ONCE ? end - q : AT_ONCE;
            long seen = before + q - c; /* by the first of them, without its own */
            long count = seen + queries < COLUMNS ? (seen + queries + LANES - 1) / LANES * LANES
                                                  : COLUMNS;
            for (long s = 0; s < count; s += SIDE)
                WITH_CONSTANT(queries, add_tile, half,
                              (const uint32_t *)query + q * query_words, query_words,
                              in->keys + (c + s) * in->dim_words, SIDE, in->dim_words, scores + s,
                              COLUMNS, NULL)
            for (long i = 0; i < queries; i++)
                factor[i] = weigh(half, scores + i * COLUMNS, seen + i + 1, count, scale,
                                  most + q - begin + i, sum + q - begin + i);
            for (long d = 0; d < dim && count > 0; d += SIDE)
                WITH_CONSTANT(queries, add_tile, half, (const uint32_t *)scores, COLUMNS,
                              in->values + c / pair * dim + d, dim, count / pair,
                              sums + (q - begin) * dim + d, dim, factor)
        }
    for (long q = begin; q < end; q++)
        for (long d = 0; d < dim; d += LANES) {
            lanes whole = *(lanes *)(sums + (q - begin) * dim + d) / sum[q - begin];
            char *place = out + (q * at->key_heads * at->groups * dim + d) * size;
            if (half)
                store_bfloat16((uint16_t *)place, whole);
            else
                *(lanes *)place = whole;
        }
}

struct many {
    const struct attention *at;
    int half;
    const char *query, *key, *value;
    float scale, *memory;
    char *out;
    uint32_t *keys, *values;
    long dim_words, sides, blocks; /* the number of SIDE columns and of TOKENS tokens */
    long head_words;               /* of one key head's rearranged keys, or values */
    long begin, heads;             /* the key heads, over all rows, being computed */
};

static struct laid_out laid_out_of(const struct many *of, long number)
{
    long words = number * of->head_words;
    return (struct laid_out){of->keys + words, of->values + words, of->dim_words};
}

static void lay_out_side(void *argument, long task, int worker)
{
    const struct many *of = argument;
    const struct attention *at = of->at;
    long number = task / of->sides, pair = of->begin + number;
    long row = pair / at->key_heads, head = pair % at->key_heads, size = of->half ? 2 : 4;
    struct laid_out to = laid_out_of(of, number);
    (void)worker;
    lay_out(at, of->half, of->key + (row * at->key_row + head * at->key_head) * size,
            of->value + (row * at->value_row + head * at->value_head) * size, &to,
            task % of->sides * SIDE);
}

static void attend_tokens(void *argument, long task, int worker)
{
    const struct many *of = argument;
    const struct attention *at = of->at;
    long heads = at->key_heads * at->groups, size = of->half ? 2 : 4;
    long queries = of->heads * at->groups, number = task % queries / at->groups;
    long pair = of->begin + number, row = pair / at->key_heads;
    long head = pair % at->key_heads * at->groups + task % at->groups;
    /* The last tokens first, because they have the most columns. */
    long begin = (of->blocks - 1 - task / queries) * TOKENS;
    long end = begin + TOKENS < at->width ? begin + TOKENS : at->width;
    struct laid_out in = laid_out_of(of, number);
    const char *query = of->query + (row * at->query_row + head * at->query_head) * size;
    char *out = of->out + (row * at->width * heads + head) * at->dim * size;
    float *sums = of->memory + worker * TOKENS * at->dim;
    if (of->half)
        attend_block(1, at, query, &in, of->scale, out, begin, end, sums);
    else
        attend_block(0, at, query, &in, of->scale, out, begin, end, sums);
}

/* Return 0, or 1 if out of memory. `out` is [rows][width][heads][dim] and may be the queries' memory
   if they have this layout; dim is a multiple of SIDE, and the scale is positive. */
int amulet_prefill(const struct attention *at, int half, const char *query, const char *key,
                   const char *value, float scale, char *out)
{
    long pairs = at->rows * at->key_heads, dim_words = at->dim / (half ? 2 : 1);
    long sides = (at->columns + SIDE - 1) / SIDE, blocks = (at->width + TOKENS - 1) / TOKENS;
    /* As few key heads at once as keep all workers busy, because rearranged ones take memory. */
    long head_words = sides * SIDE * dim_words, cheap = LAID_OUT / (2 * head_words);
    long heads = (TASKS * most_workers() - 1) / (at->groups * blocks) + 1;
    heads = heads > cheap ? heads : cheap;
    heads = heads < pairs ? heads : pairs;
    long words = heads * head_words;
    float *memory = malloc(most_workers() * TOKENS * at->dim * sizeof *memory);
    uint32_t *keys = malloc(2 * words * sizeof *keys);
    struct many whole = {at, half, query, key, value, scale, memory, out, keys, keys + words,
                         dim_words, sides, blocks, head_words, 0, heads};
    int failed = !memory || !keys;
    for (; !failed && whole.begin < pairs; whole.begin += heads) {
        whole.heads = pairs - whole.begin < heads ? pairs - whole.begin : heads;
        run_tasks(whole.heads * sides, lay_out_side, &whole);
        run_tasks(whole.heads * at->groups * blocks, attend_tokens, &whole);
    }
    free(keys);
    free(memory);
    return failed;
}
