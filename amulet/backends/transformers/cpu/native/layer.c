/* A whole decoder layer in one call, which `cpu/layers.py` otherwise computes operation by operation.
   A call from Python takes a few microseconds, and a step of a small model would make a thousand of
   them. */

#include "attention.h"
#include "products.h"
#include "rowwise.h"

/* All fields of these structures have 8 bytes, as in `layers.py`. */
struct linear {
    long kind, out, in;
    const void *weight, *scale, *bias;
};

struct layer {
    long half, plus_one, gelu, heads, key_heads, dim;
    double epsilon, scaling;
    /* Weights of the norms before attention and MLP, of heads, and after both; null if absent. */
    const void *before, *between, *query_norm, *key_norm, *attended, *fed;
    struct linear query, key, value, out, gate, up, down;
};

struct pass {
    long rows, width;
    long part; /* tokens computed at once; 0: all, with `amulet_attend_pages` */
    const void *cosine, *sine; /* [angles][dim] */
    long angles;               /* one per token, or those of one row */
    const struct pages *pages;
    long layer, window; /* window: columns that a token sees at most, or 0 */
};

static int multiply(const struct linear *by, const void *x, void *out, long tokens)
{
    return amulet_product((int)by->kind, x, by->weight, by->scale, by->bias, out, tokens, by->out,
                          by->in);
}

static void norm(const struct layer *of, const void *x, const void *weight, void *out, long rows,
                 long size)
{
    if (weight)
        amulet_norm((int)of->half, (int)of->plus_one, x, weight, out, rows, size, of->epsilon);
}

static void rotate(const struct layer *of, const struct pass *in, void *states, long heads,
                   long begin, long tokens)
{
    amulet_rotate((int)of->half, states, in->cosine, in->sine, begin, tokens, heads, of->dim,
                  in->angles);
}

enum { OUTSIDE = -1 };

/* Tells whether the rows have all pages that the pass reads and writes. */
static int is_inside(const struct pass *in)
{
    const struct pages *pages = in->pages;
    int inside = in->rows > 0 && in->width > 0 && in->angles > 0 && in->layer >= 0
                 && in->layer < pages->layers;
    for (long i = 0; inside && i < in->rows * in->width; i++) {
        long place = pages->places[i], row = i / in->width, first = pages->places[row * in->width];
        long unseen = in->window && first >= in->window ? first + 1 - in->window : 0;
        long least = unseen / (PAGES_AT_ONCE * PAGE) * PAGES_AT_ONCE;
        inside = place >= 0 && place / PAGE < pages->most && place / (PAGES_AT_ONCE * PAGE) < pages->blocks;
        for (long p = place / PAGE; inside && p >= least && i % in->width == in->width - 1; p--)
            inside = pages->table[row * pages->most + p] != NULL;
    }
    return inside;
}

/* Write new keys and values, [tokens][key heads][dim], from the pass's token `begin` on. */
static void keep(const struct layer *of, const struct pass *in, const char *key, const char *value,
                 long begin, long tokens)
{
    struct written keys = {key, in->pages, begin, of->key_heads, in->width, of->dim, (int)of->half, 0,
                           in->layer};
    struct written values = keys;
    values.from = value, values.are_values = 1, values.layer += in->pages->layers;
    amulet_write(&keys, tokens);
    amulet_write(&values, tokens);
}

static int attend(const struct layer *of, const struct pass *in, const char *queries, char *out)
{
    long size = of->heads * of->dim;
    struct attention at = {in->rows, of->key_heads, of->heads / of->key_heads, in->width, 0, of->dim,
                           in->width * size, of->dim, size, 0, 0, 0, 0, 0, 0, 0, 0};
    return (in->part ? amulet_prefill_pages : amulet_attend_pages)(
        &at, (int)of->half, queries, in->pages, in->layer, in->window, of->scaling, out);
}

/* The attention of a layer alone: write the pass's keys and values, and attend. All are
   [rows][width][heads][dim]. Return 0, 1 if out of memory, or OUTSIDE, with nothing written. */
int amulet_layer_attention(const struct layer *of, const struct pass *in, const char *queries,
                           const char *keys, const char *values, char *out)
{
    if (!is_inside(in))
        return OUTSIDE;
    keep(of, in, keys, values, 0, in->rows * in->width);
    return attend(of, in, queries, out);
}

/* Return 0, 1 if out of memory, or OUTSIDE, with nothing written. `hidden` and `out` are
   [rows][width][hidden size]. Everything but attention runs on one part of a long pass at a time, so
   that results between two products stay in the processor's cache and take little memory. */
int amulet_layer(const struct layer *of, const struct pass *in, const char *hidden, char *out)
{
    const struct linear *q = &of->query, *k = &of->key, *v = &of->value, *up = &of->up;
    if (!is_inside(in))
        return OUTSIDE;
    int half = (int)of->half;
    long tokens = in->rows * in->width, size = half ? 2 : 4, wide = q->in;
    long parts = in->part ? (tokens + in->part - 1) / in->part : 1;
    long most = (tokens + parts - 1) / parts; /* parts of equal size */
    /* Buffers of a part: normed, attended or down; the gate; keys and values, or up. */
    long normed = wide > q->out ? wide : q->out;
    long others = k->out + v->out > up->out ? k->out + v->out : up->out;
    char *queries = malloc((tokens * q->out + most * (normed + up->out + others)) * size);
    if (!queries)
        return 1;
    char *first = queries + tokens * q->out * size, *second = first + most * normed * size;
    char *third = second + most * up->out * size;
    int short_of = 0;

    for (long begin = 0, now; begin < tokens; begin += now) {
        now = tokens - begin < most ? tokens - begin : most;
        char *query = queries + begin * q->out * size, *value = third + now * k->out * size;
        norm(of, hidden + begin * wide * size, of->before, first, now, wide);
        short_of |= multiply(q, first, query, now) || multiply(k, first, third, now)
                    || multiply(v, first, value, now);
        norm(of, query, of->query_norm, query, now * of->heads, of->dim);
        norm(of, third, of->key_norm, third, now * of->key_heads, of->dim);
        rotate(of, in, query, of->heads, begin, now);
        rotate(of, in, third, of->key_heads, begin, now);
        keep(of, in, third, value, begin, now);
    }
    char *attended = in->part ? queries : first;
    short_of |= attend(of, in, queries, attended);
    for (long begin = 0, now; begin < tokens; begin += now) {
        now = tokens - begin < most ? tokens - begin : most;
        char *whole = out + begin * wide * size;
        short_of |= multiply(&of->out, attended + begin * q->out * size, whole, now);
        norm(of, whole, of->attended, whole, now, wide);
        amulet_add(half, whole, hidden + begin * wide * size, now * wide);
        norm(of, whole, of->between, first, now, wide);
        short_of |= multiply(&of->gate, first, second, now) || multiply(up, first, third, now);
        amulet_gate(half, (int)of->gelu, second, third, now * up->out);
        short_of |= multiply(&of->down, second, first, now);
        norm(of, first, of->fed, first, now, wide);
        amulet_add(half, whole, first, now * wide);
    }
    free(queries);
    return short_of;
}
