/* Arguments of both kinds of attention. */

#pragma once

#include <math.h>
#include <stdlib.h>

#include "common.h"
#include "pages.h"
#include "threads.h"

/* Sizes are in elements; the last dimension of each tensor is contiguous. */
struct attention {
    long rows, key_heads, groups, width, columns, dim;
    long query_row, query_head, query_token;
    long key_row, key_head, key_column;
    long value_row, value_head, value_column;
    long mask_row, mask_token; /* bytes; a mask has one head */
};

int amulet_attend(const struct attention *at, int half, const char *query, const char *key,
                  const char *value, const uint8_t *mask, float scale, char *out);
int amulet_prefill(const struct attention *at, int half, const char *query, const char *key,
                   const char *value, float scale, char *out);
int amulet_prefill_pages(const struct attention *at, int half, const char *query,
                         const struct pages *in, long layer, long window, float scale, char *out);
int amulet_attend_pages(const struct attention *at, int half, const char *query,
                        const struct pages *in, long layer, long window, float scale, char *out);
