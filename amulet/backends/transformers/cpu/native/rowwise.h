/* The operations of `rowwise.c`, which documents the arguments. */

#include "pages.h"

struct written {
    const char *from;
    const struct pages *to;
    long begin; /* index of the first token of `from` */
    long heads, width, dim;
    int half, are_values;
    long layer; /* of values: after the keys of all layers */
};

void amulet_norm(int half, int plus_one, const void *x, const void *weight, void *out, long rows,
                 long size, float epsilon);
void amulet_rotate(int half, void *states, const void *cosine, const void *sine, long begin,
                   long tokens, long heads, long dim, long angles);
void amulet_gate(int half, int gelu, void *states, const void *up, long count);
void amulet_write(const struct written *of, long tokens);
void amulet_add(int half, void *states, const void *more, long count);
