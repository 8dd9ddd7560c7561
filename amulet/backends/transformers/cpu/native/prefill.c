/* Attention of many new tokens, which are the last columns and see all columns up to their own.

   A task is TOKENS tokens of one head. They process COLUMNS columns at a time, with a running
   maximum and sum per token, so that few scores are in memory ("flash attention"). Keys and values
   in pages are read in place, others are rearranged first. A token's sums are added in the order of
   its columns, whichever other tokens are new: passes of any width give the same result, to the last
   bit. */

#include "tiles.h"

enum { TOKENS = 8 * AT_ONCE };
enum { TASKS = 8, LAID_OUT = 1 << 18 }; /* tasks per worker, and words, that suffice */

/* Keys and values of one head, in the layout of `tiles.h`: in one piece, or in pages. */
struct laid_out {
    uint32_t *keys, *values; /* in pages: what to add to a page's address */
    long dim_words;
    const char *const *pages;
};

INLINE const uint32_t *side_of(const struct laid_out *in, const uint32_t *first, long begin)
{
    if (in->pages)
        return (const uint32_t *)(in->pages[begin / SIDE] + (uintptr_t)first);
    return first + begin * in->dim_words;
}

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

/* Tokens `begin` to `end` of one head, after `before` columns; a token sees the last `window`
   columns, or all if 0. `out` points to that head of the first token. */
INLINE void attend_block(int half, const struct attention *at, const char *query,
                         const struct laid_out *in, long before, long window, float scale, char *out,
                         long begin, long end, float *sums)
{
    long size = half ? 2 : 4, pair = half ? 2 : 1, dim = at->dim;
    long query_words = at->query_token / pair, first = 0;
    float scores[AT_ONCE * COLUMNS], most[TOKENS], sum[TOKENS], factor[AT_ONCE], ones[AT_ONCE];
    for (long i = 0; i < AT_ONCE; i++)
        ones[i] = 1;
    for (long q = 0; q < end - begin; q++)
        most[q] = -INFINITY, sum[q] = 0;
    memset(sums, 0, (end - begin) * dim * sizeof *sums);
    if (window && before + begin >= window)
        first = (before + begin + 1 - window) / COLUMNS * COLUMNS;
    for (long c = first; c < before + end; c += COLUMNS)
        for (long q = begin, queries; q < end; q += queries) {
            queries = end - q < AT_ONCE ? end - q : AT_ONCE;
            long seen = before + q - c; /* by the first of them, without its own */
            long count = seen + queries < COLUMNS ? (seen + queries + LANES - 1) / LANES * LANES
                                                  : COLUMNS;
            const uint32_t *query_of = (const uint32_t *)query + q * query_words;
            for (long s = 0; s < count; s += SIDE)
                score_side(queries, half, query_of, query_words, side_of(in, in->keys, c + s),
                           in->dim_words, scores + s);
            for (long i = 0; i < queries; i++)
                factor[i] = weigh(half, scores + i * COLUMNS, window ? seen + i + 1 - window : 0,
                                  seen + i + 1, count, scale, most + q - begin + i,
                                  sum + q - begin + i);
            for (long s = 0; s < count; s += SIDE)
                add_values(queries, half, scores + s / pair, side_of(in, in->values, c + s),
                           (count - s < SIDE ? count - s : SIDE) / pair, dim,
                           sums + (q - begin) * dim, s ? ones : factor);
        }
    for (long q = begin; q < end; q++)
        store_sums(half, sums + (q - begin) * dim, sum[q - begin], dim,
                   out + q * at->key_heads * at->groups * dim * size);
}

struct many {
    const struct attention *at;
    int half;
    const char *query, *key, *value;
    float scale, *memory;
    char *out;
    const struct pages *pages;
    long layer, window;
    uint32_t *keys, *values;
    long dim_words, sides, blocks; /* the number of SIDE columns and of TOKENS tokens */
    long head_words;               /* of one key head's keys, or values */
    long begin, heads;             /* the key heads, over all rows, being computed */
};

static struct laid_out laid_out_of(const struct many *of, long number)
{
    long words = number * of->head_words;
    return (struct laid_out){of->keys + words, of->values + words, of->dim_words, NULL};
}

static struct laid_out in_pages(const struct many *of, long row, long head)
{
    const struct pages *in = of->pages;
    long bytes = PAGE * of->at->dim * (of->half ? 2 : 4), heads = of->at->key_heads;
    return (struct laid_out){(uint32_t *)((of->layer * heads + head) * bytes),
                             (uint32_t *)(((in->layers + of->layer) * heads + head) * bytes),
                             of->dim_words, in->table + row * in->most};
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
    struct laid_out in = of->pages ? in_pages(of, row, pair % at->key_heads)
                                   : laid_out_of(of, number);
    long before = of->pages ? of->pages->places[row * at->width] : at->columns - at->width;
    const char *query = of->query + (row * at->query_row + head * at->query_head) * size;
    char *out = of->out + (row * at->width * heads + head) * at->dim * size;
    float *sums = of->memory + worker * TOKENS * at->dim;
    if (of->half)
        attend_block(1, at, query, &in, before, of->window, of->scale, out, begin, end, sums);
    else
        attend_block(0, at, query, &in, before, of->window, of->scale, out, begin, end, sums);
}

/* Return 0, or 1 if out of memory. `out` is [rows][width][heads][dim] and may be the queries' memory
   if they have this layout; the scale is positive. */
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
    struct many whole = {at, half, query, key, value, scale, memory, out, NULL, 0, 0, keys,
                         keys + words, dim_words, sides, blocks, head_words, 0, heads};
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

/* The same over pages, where the new tokens of a row are consecutive, from its first place on, and
   see at most `window` columns, or all if 0. */
int amulet_prefill_pages(const struct attention *at, int half, const char *query,
                         const struct pages *in, long layer, long window, float scale, char *out)
{
    long pairs = at->rows * at->key_heads, blocks = (at->width + TOKENS - 1) / TOKENS;
    float *memory = malloc(most_workers() * TOKENS * at->dim * sizeof *memory);
    struct many whole = {at, half, query, NULL, NULL, scale, memory, out, in, layer, window, NULL, NULL,
                         at->dim / (half ? 2 : 1), 0, blocks, 0, 0, pairs};
    if (!memory)
        return 1;
    run_tasks(pairs * at->groups * blocks, attend_tokens, &whole);
    free(memory);
    return 0;
}
