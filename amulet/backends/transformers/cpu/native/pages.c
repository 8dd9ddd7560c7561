/* Attention of a few new tokens over pages, each of which is read once for all rows that share it.

   A task is a block of COLUMNS columns of one key head, with all queries of all rows whose pages there
   are the same. Its parts of a token's output, with their maxima and sums, are joined at the end. A
   block's part is computed alike whoever shares it: a row's result is the same alone as with others,
   to the last bit. */

#include "tiles.h"

struct few {
    const struct attention *at;
    int half;
    const char *query;
    const struct pages *in;
    long layer, window; /* window: columns that a token sees at most, or 0 */
    float scale, *parts; /* [rows][width][heads][blocks][PART_EXTRA + dim] */
    char *out;
};

enum { PART_EXTRA = LANES }; /* a part's maximum and its sum of weights come before its values */

static float *part_of(const struct few *of, long row, long token, long head, long block)
{
    const struct attention *at = of->at;
    long number = (row * at->width + token) * at->key_heads * at->groups + head;
    return of->parts + (number * of->in->blocks + block) * (PART_EXTRA + at->dim);
}

/* A token's first and last block. */
static long first_block(const struct few *of, long place)
{
    return of->window && place >= of->window ? (place + 1 - of->window) / COLUMNS : 0;
}

static long last_block(long place) { return place / COLUMNS; }

struct batch {
    long count, end; /* end: how many of the block's columns one of the queries sees */
    long from[AT_ONCE], seen[AT_ONCE];
    float *part[AT_ONCE];
};

/* Attend with the queries of a batch, which are copied next to each other. */
INLINE void attend_batch(int half, const struct few *of, const char *const *pages, long head,
                         const uint32_t *queries, const struct batch *now)
{
    long dim = of->at->dim, pair = half ? 2 : 1, heads = of->at->key_heads;
    long bytes = PAGE * dim * (half ? 2 : 4), dim_words = dim / pair;
    long keys = (of->layer * heads + head) * bytes, values = keys + of->in->layers * heads * bytes;
    long count = (now->end + LANES - 1) / LANES * LANES;
    float scores[AT_ONCE * COLUMNS], sums[AT_ONCE * 256], ones[AT_ONCE];
    for (long s = 0; s < count; s += SIDE)
        score_side(now->count, half, queries, dim_words, (const uint32_t *)(pages[s / PAGE] + keys),
                   dim_words, scores + s);
    for (long i = 0; i < now->count; i++) {
        float *most = now->part[i], *sum = most + 1;
        *most = -INFINITY, *sum = 0, ones[i] = 1;
        weigh(half, scores + i * COLUMNS, now->from[i], now->seen[i], count, of->scale, most, sum);
    }
    for (long s = 0; s < count; s += SIDE)
        add_values(now->count, half, scores + s / pair, (const uint32_t *)(pages[s / PAGE] + values),
                   (count - s < SIDE ? count - s : SIDE) / pair, dim, sums, s ? ones : NULL);
    for (long i = 0; i < now->count; i++)
        memcpy(now->part[i] + PART_EXTRA, sums + i * dim, dim * sizeof *sums);
}

INLINE void attend_rows(int half, const struct few *of, long block, long row, long head)
{
    const struct attention *at = of->at;
    const struct pages *in = of->in;
    long begin = block * COLUMNS, size = half ? 2 : 4;
    const char *const *pages = in->table + row * in->most + begin / PAGE;
    uint32_t queries[AT_ONCE * 256];
    struct batch now = {0};
    for (; row >= 0; row = in->next[block * at->rows + row])
        for (long token = 0; token < at->width; token++) {
            long place = in->places[row * at->width + token], seen = place + 1 - begin;
            long within = seen < COLUMNS ? seen : COLUMNS;
            if (block < first_block(of, place) || block > last_block(place))
                continue;
            for (long group = 0; group < at->groups; group++) {
                long number = head * at->groups + group;
                memcpy((char *)queries + now.count * at->dim * size,
                       of->query + (row * at->query_row + number * at->query_head
                                    + token * at->query_token) * size, at->dim * size);
                now.from[now.count] = of->window ? seen - of->window : 0;
                now.seen[now.count] = seen;
                now.part[now.count++] = part_of(of, row, token, number, block);
                now.end = within > now.end ? within : now.end;
                if (now.count == AT_ONCE) {
                    attend_batch(half, of, pages, head, queries, &now);
                    now.count = now.end = 0;
                }
            }
        }
    if (now.count)
        attend_batch(half, of, pages, head, queries, &now);
}

static void attend_shared(void *argument, long task, int worker)
{
    const struct few *of = argument;
    const int32_t *which = of->in->tasks + 2 * (task / of->at->key_heads);
    long head = task % of->at->key_heads;
    (void)worker;
    if (of->half)
        attend_rows(1, of, which[0], which[1], head);
    else
        attend_rows(0, of, which[0], which[1], head);
}

/* Join the parts of one token's heads. */
static void join(void *argument, long task, int worker)
{
    const struct few *of = argument;
    const struct attention *at = of->at;
    long row = task / at->width, token = task % at->width, place = of->in->places[task];
    long heads = at->key_heads * at->groups, stride = PART_EXTRA + at->dim;
    long first = first_block(of, place), last = last_block(place);
    (void)worker;
    for (long head = 0; head < heads; head++) {
        float *part = part_of(of, row, token, head, first), most = -INFINITY, sum = 0;
        float *sums = part + PART_EXTRA;
        for (long b = 0; b <= last - first; b++)
            most = part[b * stride] > most ? part[b * stride] : most;
        for (long b = 0; b <= last - first; b++) {
            const float *other = part + b * stride;
            float factor = exponential((lanes){0} + (other[0] - most))[0];
            sum += factor * other[1];
            for (long d = 0; d < at->dim; d += LANES) {
                lanes more = *(lanes *)(other + PART_EXTRA + d) * factor;
                *(lanes *)(sums + d) = b ? *(lanes *)(sums + d) + more : more;
            }
        }
        char *to = of->out + (task * heads + head) * at->dim * (of->half ? 2 : 4);
        store_sums(of->half, sums, sum, at->dim, to);
    }
}

/* Return 0, or 1 if out of memory. `out` is [rows][width][heads][dim]; dim is at most 256. */
int amulet_attend_pages(const struct attention *at, int half, const char *query,
                        const struct pages *in, long layer, long window, float scale, char *out)
{
    long parts = at->rows * at->width * at->key_heads * at->groups * in->blocks;
    float *memory = malloc(parts * (PART_EXTRA + at->dim) * sizeof *memory);
    struct few whole = {at, half, query, in, layer, window, scale, memory, out};
    if (!memory)
        return 1;
    run_tasks(in->count * at->key_heads, attend_shared, &whole);
    run_tasks(at->rows * at->width, join, &whole);
    free(memory);
    return 0;
}
