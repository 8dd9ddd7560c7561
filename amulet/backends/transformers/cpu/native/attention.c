/* Attention of a few new tokens over many columns: out[q] = sum of softmax(q . key) * value.

   A task is one key head of one row, with all queries that attend to it, QUERIES at a time. So keys
   and values are read once per QUERIES, and only up to the row's last visible column. Scores,
   weights and sums are float32. */

#include "attention.h"

enum { QUERIES = AT_ONCE };

/* Scores of `queries` queries for the columns up to `end`. A word is one float32 or two bfloat16. */
INLINE void scores_of(int queries, int half, const uint32_t *const query[QUERIES],
                      const uint32_t *key, long column_words, long dim_words, long end, float scale,
                      float *scores, long stride)
{
    for (long c = 0; c < end; c++, key += column_words) {
        lanes sum[QUERIES];
        for (int q = 0; q < queries; q++)
            sum[q] = (lanes){0};
        for (long w = 0; w < dim_words; w += LANES)
            for (int q = 0; q < queries; q++)
                sum[q] = add_product(half, sum[q], *(const words *)(key + w),
                                     *(const words *)(query[q] + w));
        for (int q = 0; q < queries; q++)
            scores[q * stride + c] = total(sum[q]) * scale;
    }
}

INLINE void weighted_values(int queries, int half, const float *weights, long stride,
                            const uint32_t *value, long column_words, long dim_words, long end,
                            float *const out[QUERIES])
{
    for (long w = 0; w < dim_words; w += LANES) {
        lanes first[QUERIES], second[QUERIES];
        for (int q = 0; q < queries; q++)
            first[q] = second[q] = (lanes){0};
        for (long c = 0; c < end; c++) {
            words line = *(const words *)(value + c * column_words + w);
            for (int q = 0; q < queries; q++) {
                float weight = weights[q * stride + c];
                first[q] += (half ? even(line) : (lanes)line) * weight;
                if (half)
                    second[q] += odd(line) * weight;
            }
        }
        for (int q = 0; q < queries; q++)
            for (int i = 0; i < LANES; i++) {
                out[q][half ? 2 * (w + i) : w + i] = first[q][i];
                if (half)
                    out[q][2 * (w + i) + 1] = second[q][i];
            }
    }
}

/* Mask the columns that a query doesn't see, and convert scores to weights that sum to 1. */
static void weigh(float *scores, const uint8_t *mask, long seen, long end, long padded)
{
    float most = -INFINITY, sum = 0;
    for (long c = 0; c < end; c++)
        if (mask ? !mask[c] : c >= seen)
            scores[c] = -INFINITY;
    for (long c = 0; c < end; c++)
        most = scores[c] > most ? scores[c] : most;
    for (long c = end; c < padded; c++)
        scores[c] = -INFINITY;
    if (most == -INFINITY)
        most = 0; /* nothing is visible: weights of 0 */
    lanes sums = {0};
    for (long c = 0; c < padded; c += LANES) {
        lanes weights = exponential(*(lanes *)(scores + c) - most);
        *(lanes *)(scores + c) = weights;
        sums += weights;
    }
    sum = total(sums);
    for (long c = 0; c < end; c++)
        scores[c] *= sum > 0 ? 1 / sum : 0;
}

static long last_seen(const struct attention *at, const uint8_t *mask)
{
    for (long end = at->columns; end > 0; end--)
        for (long t = 0; t < at->width; t++)
            if (mask[t * at->mask_token + end - 1])
                return end;
    return 0;
}

static void attend_head(const struct attention *at, int half, const char *query, const char *key,
                        const char *value, const uint8_t *mask, float scale, char *out, long row,
                        long head, float *scores, float *sums)
{
    long size = half ? 2 : 4, per_word = half ? 2 : 1;
    long dim_words = at->dim / per_word, padded = (at->columns + LANES - 1) / LANES * LANES;
    const uint32_t *keys = (const uint32_t *)
        (key + (row * at->key_row + head * at->key_head) * size);
    const uint32_t *values = (const uint32_t *)
        (value + (row * at->value_row + head * at->value_head) * size);
    long key_words = at->key_column / per_word, value_words = at->value_column / per_word;
    if (mask)
        mask += row * at->mask_row;
    long end = mask ? last_seen(at, mask) : at->columns, count = at->groups * at->width;
    for (long begin = 0, queries; begin < count; begin += queries) {
        const uint32_t *query_of[QUERIES];
        float *sums_of[QUERIES];
        queries = count - begin < QUERIES ? count - begin : QUERIES;
        for (long q = 0; q < queries; q++) {
            long group = (begin + q) / at->width, token = (begin + q) % at->width;
            query_of[q] = (const uint32_t *)(query + size * (row * at->query_row
                + (head * at->groups + group) * at->query_head + token * at->query_token));
            sums_of[q] = sums + q * at->dim;
        }
        if (half) {
            WITH_CONSTANT(queries, scores_of, 1, query_of, keys, key_words, dim_words, end, scale, scores,
                        padded)
        } else {
            WITH_CONSTANT(queries, scores_of, 0, query_of, keys, key_words, dim_words, end, scale, scores,
                        padded)
        }
        for (long q = 0; q < queries; q++) {
            long token = (begin + q) % at->width;
            weigh(scores + q * padded, mask ? mask + token * at->mask_token : NULL,
                  at->columns - at->width + token + 1, end, (end + LANES - 1) / LANES * LANES);
        }
        if (half) {
            WITH_CONSTANT(queries, weighted_values, 1, scores, padded, values, value_words, dim_words, end,
                        sums_of)
        } else {
            WITH_CONSTANT(queries, weighted_values, 0, scores, padded, values, value_words, dim_words, end,
                        sums_of)
        }
        for (long q = 0; q < queries; q++) {
            long group = (begin + q) / at->width, token = (begin + q) % at->width;
            long place = ((row * at->width + token) * at->key_heads * at->groups
                          + head * at->groups + group) * at->dim;
            if (!half)
                memcpy(out + place * size, sums_of[q], at->dim * sizeof(float));
            else
                for (long i = 0; i < at->dim; i++)
                    ((uint16_t *)out)[place + i] = to_bfloat16(sums_of[q][i]);
        }
    }
}

struct few {
    const struct attention *at;
    int half;
    const char *query, *key, *value;
    const uint8_t *mask;
    float scale, *memory;
    char *out;
    long padded;
};

static void attend_one(void *argument, long task, int worker)
{
    const struct few *of = argument;
    float *scores = of->memory + worker * QUERIES * (of->padded + of->at->dim);
    attend_head(of->at, of->half, of->query, of->key, of->value, of->mask, of->scale, of->out,
                task / of->at->key_heads, task % of->at->key_heads, scores,
                scores + QUERIES * of->padded);
}

/* Return 0, or 1 if out of memory. `out` is [rows][width][heads][dim]. A mask has a byte for
   each [row][token][column], 0 if hidden; without a mask, a token sees the columns up to its own,
   and the new tokens are the last columns. */
int amulet_attend(const struct attention *at, int half, const char *query, const char *key,
                  const char *value, const uint8_t *mask, float scale, char *out)
{
    long padded = (at->columns + LANES - 1) / LANES * LANES;
    float *memory = malloc(most_workers() * QUERIES * (padded + at->dim) * sizeof *memory);
    struct few whole = {at, half, query, key, value, mask, scale, memory, out, padded};
    if (!memory)
        return 1;
    run_tasks(at->rows * at->key_heads, attend_one, &whole);
    free(memory);
    return 0;
}
