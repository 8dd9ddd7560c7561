/* What both kinds of attention take, and their exponential. */

#include <math.h>
#include <stdlib.h>

#include "common.h"
#include "threads.h"

/* Sizes are in elements; the last dimension of each tensor is contiguous. */
struct attention {
    long rows, key_heads, groups, width, columns, dim;
    long query_row, query_head, query_token;
    long key_row, key_head, key_column;
    long value_row, value_head, value_column;
    long mask_row, mask_token; /* bytes; a mask has one head */
};

/* e to the power of x <= 0: 2 to the whole part by the exponent's bits, to the rest by a
   polynomial (Taylor's; its error is about float32's). */
INLINE lanes exponential(lanes x)
{
    lanes power = x * 1.44269504f;
    integers whole = __builtin_convertvector(power - 0.5f, integers);
    lanes rest = (power - __builtin_convertvector(whole, lanes)) * 0.693147181f;
    lanes value = 1 + rest * (1 + rest * (1 / 2.f + rest * (1 / 6.f + rest * (1 / 24.f
                  + rest * (1 / 120.f + rest * (1 / 720.f))))));
    lanes scaled = value * (lanes)((whole + 127) << 23);
    return (lanes)((integers)scaled & ~(x <= -87.f)); /* what would underflow is 0; NaN stays */
}
