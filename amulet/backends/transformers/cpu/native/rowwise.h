/* The operations of `rowwise.c`, which documents the arguments. */

#include <stdint.h>

struct written {
    const char *from;
    char *to;
    const int64_t *columns; /* [rows][width] */
    long begin;             /* index of the first token of `from` */
    long heads, width, bytes;        /* bytes: of one head of one token */
    long to_row, to_head, to_column; /* strides in bytes */
};

void amulet_norm(int half, int plus_one, const void *x, const void *weight, void *out, long rows,
                 long size, float epsilon);
void amulet_rotate(int half, void *states, const void *cosine, const void *sine, long begin,
                   long tokens, long heads, long dim, long angles);
void amulet_gate(int half, int gelu, void *states, const void *up, long count);
void amulet_write(const struct written *of, long tokens);
void amulet_add(int half, void *states, const void *more, long count);
