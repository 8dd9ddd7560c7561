/* Operations between a step's products, row by row: norms, rotary positions, gated activations, and
   writing new keys and values to the cache.

   PyTorch composes each of up to nine operations. Where those round to bfloat16 in between, so does
   this code: the numbers are the same except for the order of a norm's sum and the last bits of an
   exponential. Sizes and strides are in elements unless bytes are named. */

#include <math.h>

#include "common.h"
#include "rowwise.h"
#include "threads.h"

enum { PART = 1 << 14 }; /* numbers per task; less than two tasks are not worth splitting */

/* Computes some rows of an operation; `of` is the operation's own structure. */
typedef void rows_of(const void *of, long begin, long end);

struct parts {
    rows_of *compute;
    const void *of;
    long rows, rows_per_part;
};

static void compute_part(void *argument, long task, int worker)
{
    const struct parts *parts = argument;
    long begin = task * parts->rows_per_part, end = begin + parts->rows_per_part;
    (void)worker;
    parts->compute(parts->of, begin, end < parts->rows ? end : parts->rows);
}

static void compute_rows(rows_of *compute, const void *of, long rows, long size)
{
    struct parts parts = {compute, of, rows, size < PART ? PART / size : 1};
    long count = (rows + parts.rows_per_part - 1) / parts.rows_per_part;
    if (count < 2)
        compute(of, 0, rows);
    else
        run_tasks(count, compute_part, &parts);
}

INLINE lanes load(int half, const void *from, long i)
{
    if (!half)
        return *(const lanes *)((const float *)from + i);
    __m256i bits;
    memcpy(&bits, (const uint16_t *)from + i, sizeof bits);
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

INLINE void store(int half, void *to, long i, lanes from)
{
    if (half)
        store_bfloat16((uint16_t *)to + i, from);
    else
        *(lanes *)((float *)to + i) = from;
}

/* The number as PyTorch stores it between two operations. */
INLINE lanes rounded(int half, lanes value)
{
    if (half) {
        uint16_t bits[LANES];
        store_bfloat16(bits, value);
        return load(1, bits, 0);
    }
    __asm__("" : "+v"(value)); /* otherwise the compiler fuses a product and a sum */
    return value;
}

INLINE const void *at(int half, const void *start, long i)
{
    return (const char *)start + i * (half ? 2 : 4);
}

/* --- x / root(mean(x * x) + epsilon), rounded, times a weight; or, for Gemma, unrounded times
   one plus the weight. A row is `size` numbers. */

struct norm {
    int half, plus_one;
    const void *x, *weight;
    void *out;
    long size;
    float epsilon;
};

INLINE void norm_rows(int half, const struct norm *of, long begin, long end)
{
    for (long row = begin; row < end; row++) {
        const void *x = at(half, of->x, row * of->size);
        lanes sum = {0};
        for (long i = 0; i < of->size; i += LANES)
            sum += load(half, x, i) * load(half, x, i);
        float factor = 1 / sqrtf(total(sum) / of->size + of->epsilon);
        for (long i = 0; i < of->size; i += LANES) {
            lanes value = load(half, x, i) * factor, weight = load(half, of->weight, i);
            value = of->plus_one ? value * (1 + weight) : rounded(half, value) * weight;
            store(half, of->out, row * of->size + i, value);
        }
    }
}

static void norm(const void *argument, long begin, long end)
{
    const struct norm *of = argument;
    if (of->half)
        norm_rows(1, of, begin, end);
    else
        norm_rows(0, of, begin, end);
}

void amulet_norm(int half, int plus_one, const void *x, const void *weight, void *out, long rows,
                 long size, float epsilon)
{
    struct norm of = {half, plus_one, x, weight, out, size, epsilon};
    compute_rows(norm, &of, rows, size);
}

/* --- rotary positions: the halves (a, b) of a head become (a cos - b sin, b cos + a sin) */

struct rotation {
    int half;
    void *states;             /* [tokens][heads][dim] */
    const void *cosine, *sine; /* [rows][width][dim], or one row for all */
    long begin;               /* index of the first of these tokens in the pass */
    long heads, dim, angles;  /* angles: the number of tokens with own angles */
};

INLINE void rotate_tokens(int half, const struct rotation *of, long begin, long end)
{
    long dim = of->dim, side = dim / 2;
    for (long head = begin * of->heads; head < end * of->heads; head++)
        for (long i = 0; i < side; i += LANES) {
            long angle = (of->begin + head / of->heads) % of->angles * dim + i;
            long place = head * dim + i;
            lanes first = load(half, of->states, place);
            lanes second = load(half, of->states, place + side);
            store(half, of->states, place,
                  rounded(half, first * load(half, of->cosine, angle))
                  - rounded(half, second * load(half, of->sine, angle)));
            store(half, of->states, place + side,
                  rounded(half, second * load(half, of->cosine, angle + side))
                  + rounded(half, first * load(half, of->sine, angle + side)));
        }
}

static void rotate(const void *argument, long begin, long end)
{
    const struct rotation *of = argument;
    if (of->half)
        rotate_tokens(1, of, begin, end);
    else
        rotate_tokens(0, of, begin, end);
}

void amulet_rotate(int half, void *states, const void *cosine, const void *sine, long begin,
                   long tokens, long heads, long dim, long angles)
{
    struct rotation of = {half, states, cosine, sine, begin, heads, dim, angles};
    compute_rows(rotate, &of, tokens, heads * dim);
}

/* --- gate becomes gate / (1 + e^-z) * up, where z is gate (SiLU), or the argument for GELU by
   tanh; a row is LANES numbers */

struct gated {
    int half, gelu;
    void *gate;
    const void *up;
};

INLINE void gate_rows(int half, const struct gated *of, long begin, long end)
{
    for (long i = begin * LANES; i < end * LANES; i += LANES) {
        lanes gate = load(half, of->gate, i);
        lanes cubic = 1.5957691216f * (gate + 0.044715f * gate * gate * gate); /* 2 root(2 / pi) */
        lanes z = of->gelu ? cubic : gate;
        lanes power = exponential((lanes)((words)z | 0x80000000u)); /* of minus its absolute value */
        lanes above = gate / (1 + power), below = gate * power / (1 + power);
        lanes active = (lanes)(((z < 0) & (integers)below) | (~(z < 0) & (integers)above));
        store(half, of->gate, i, rounded(half, active) * load(half, of->up, i));
    }
}

static void gate(const void *argument, long begin, long end)
{
    const struct gated *of = argument;
    if (of->half)
        gate_rows(1, of, begin, end);
    else
        gate_rows(0, of, begin, end);
}

void amulet_gate(int half, int gelu, void *states, const void *up, long count)
{
    struct gated of = {half, gelu, states, up};
    compute_rows(gate, &of, count / LANES, LANES);
}

/* --- write new keys or values, [tokens][heads][dim], to their pages, in the layout of `tiles.h` */

static void write_keys(const uint32_t *from, uint32_t *to, long column, long words)
{
    for (long w = 0; w < words; w++)
        to[w * PAGE + column] = from[w];
}

static void write_values(int half, const char *from, char *to, long column, long dim)
{
    uint16_t *pairs = (uint16_t *)to + column / 2 * 2 * dim + column % 2;
    if (!half)
        memcpy(to + column * dim * sizeof(float), from, dim * sizeof(float));
    else
        for (long d = 0; d < dim; d++)
            pairs[2 * d] = ((const uint16_t *)from)[d];
}

static void write_columns(const void *argument, long begin, long end)
{
    const struct written *of = argument;
    long bytes = of->dim * (of->half ? 2 : 4);
    for (long token = begin; token < end; token++) {
        long place = of->begin + token, row = place / of->width, column = of->to->places[place];
        const char *from = of->from + token * of->heads * bytes;
        char *to = (char *)of->to->table[row * of->to->most + column / PAGE]
                   + of->layer * of->heads * PAGE * bytes;
        for (long head = 0; head < of->heads; head++, from += bytes, to += PAGE * bytes)
            if (of->are_values)
                write_values(of->half, from, to, column % PAGE, of->dim);
            else
                write_keys((const uint32_t *)from, (uint32_t *)to, column % PAGE, bytes / 4);
    }
}

void amulet_write(const struct written *of, long tokens)
{
    compute_rows(write_columns, of, tokens, of->heads * of->dim * (of->half ? 2 : 4));
}

/* --- states become states + more, rounded; a row is LANES numbers */

struct added {
    int half;
    void *states;
    const void *more;
};

static void add(const void *argument, long begin, long end)
{
    const struct added *of = argument;
    for (long i = begin * LANES; i < end * LANES; i += LANES)
        if (of->half)
            store(1, of->states, i, load(1, of->states, i) + load(1, of->more, i));
        else
            store(0, of->states, i, load(0, of->states, i) + load(0, of->more, i));
}

void amulet_add(int half, void *states, const void *more, long count)
{
    struct added of = {half, states, more};
    compute_rows(add, &of, count / LANES, LANES);
}
