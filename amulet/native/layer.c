/* A decoder layer for a few new tokens, whole: what `amulet/layers.py` does for many, operation by
   operation, in one call. A call from Python takes some microseconds, and the steps of a small
   model would make a thousand of them. */

#include "attention.h"
#include "products.h"
#include "rowwise.h"

/* All parts of these three have 8 bytes, as `layers.py` writes them. */
struct linear {
    long kind, out, in;
    const void *weight, *scale, *bias;
};

struct layer {
    long half, plus_one, gelu, heads, key_heads, dim;
    double epsilon, scaling;
    /* The weights of the norms, null where there are none: of what goes into attention and MLP, of
       heads, and of what comes out of both. */
    const void *before, *between, *query_norm, *key_norm, *attended, *fed;
    struct linear query, key, value, out, gate, up, down;
};

struct pass {
    long rows, width, columns;
    const void *cosine, *sine; /* [angles][dim] */
    long angles;               /* one for each token, or those of one row */
    const uint8_t *mask;
    long mask_row, mask_token;
    const int64_t *places; /* the columns of the new tokens, [rows][width] */
    char *keys, *values;   /* of the cache */
    long key_row, key_head, key_column, value_row, value_head, value_column;
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

/* Return 0, or 1 where memory is short. `hidden` and `out` are [rows][width][hidden size]. */
int amulet_layer(const struct layer *of, const struct pass *in, const char *hidden, char *out)
{
    const struct linear *q = &of->query, *k = &of->key, *v = &of->value, *up = &of->up;
    int half = (int)of->half;
    long tokens = in->rows * in->width, size = half ? 2 : 4, wide = q->in;
    long widest = up->out > q->out ? up->out : q->out;
    /* Normed and then attended or down; the queries and then the gate; the keys, values, or up. */
    long others = k->out + v->out > up->out ? k->out + v->out : up->out;
    long normed = wide > q->out ? wide : q->out;
    char *first = malloc(tokens * (normed + widest + others) * size);
    if (!first)
        return 1;
    char *second = first + tokens * normed * size, *third = second + tokens * widest * size;
    char *value = third + tokens * k->out * size;

    norm(of, hidden, of->before, first, tokens, wide);
    int short_of = multiply(q, first, second, tokens) || multiply(k, first, third, tokens)
                   || multiply(v, first, value, tokens);
    norm(of, second, of->query_norm, second, tokens * of->heads, of->dim);
    norm(of, third, of->key_norm, third, tokens * of->key_heads, of->dim);
    amulet_rotate(half, second, in->cosine, in->sine, tokens, of->heads, of->dim, in->angles);
    amulet_rotate(half, third, in->cosine, in->sine, tokens, of->key_heads, of->dim, in->angles);
    struct written keys = {third, in->keys, in->places, of->key_heads, in->width, of->dim * size,
                           in->key_row * size, in->key_head * size, in->key_column * size};
    struct written values = {value, in->values, in->places, of->key_heads, in->width,
                             of->dim * size, in->value_row * size, in->value_head * size,
                             in->value_column * size};
    amulet_write(&keys, in->rows);
    amulet_write(&values, in->rows);
    struct attention at = {
        in->rows, of->key_heads, of->heads / of->key_heads, in->width, in->columns, of->dim,
        in->width * q->out, of->dim, q->out,
        in->key_row, in->key_head, in->key_column, in->value_row, in->value_head, in->value_column,
        in->mask_row, in->mask_token};
    short_of = short_of || amulet_attend(&at, half, second, in->keys, in->values, in->mask,
                                         of->scaling, first)
               || multiply(&of->out, first, out, tokens);
    norm(of, out, of->attended, out, tokens, wide);
    amulet_add(half, out, hidden, tokens * wide);

    norm(of, out, of->between, first, tokens, wide);
    short_of = short_of || multiply(&of->gate, first, second, tokens)
               || multiply(up, first, third, tokens);
    amulet_gate(half, (int)of->gelu, second, third, tokens * up->out);
    short_of = short_of || multiply(&of->down, second, first, tokens);
    norm(of, first, of->fed, first, tokens, wide);
    amulet_add(half, out, first, tokens * wide);
    free(first);
    return short_of;
}
