/* The product of `products.c`, which documents the arguments. */

#include <stdint.h>

int amulet_product(int kind, const void *x, const void *weight, const uint16_t *scale,
                   const void *bias, void *out, long rows, long n, long k);
