/* A cache in pages of PAGE columns, in the layout of `tiles.h`. */

#pragma once

#include <stdint.h>

enum { PAGE = 64, PAGES_AT_ONCE = 4 };

/* A page is [2: keys, values][layers][heads][PAGE * dim]. */
struct pages {
    long layers;
    long most;          /* pages of the longest row */
    long count, blocks; /* of tasks; of PAGES_AT_ONCE pages each */
    const char *const *table; /* the rows' pages, [rows][most]; null where a row has fewer */
    const int64_t *places;    /* columns of the new tokens, [rows][width] */
    const int32_t *tasks;     /* [count][2]: a block, and the first row with its pages */
    const int32_t *next;      /* [blocks][rows]: the next row with the same pages there, or -1 */
};
