/* Products of a few rows with a weight: out[r][n] = sum over k of x[r][k] * weight[n][k] + bias[n].

   A decode step has few rows, so reading the weights from memory takes its time. Each thread reads
   the weights of its own outputs once, in memory order, and multiplies each line by all rows (ROWS
   at a time, as many sums as there are registers). In a long pass a task takes TASK_ROWS of the
   rows, so that the weights of a block stay in the processor's cache. Sums are float32, and those of
   a row are added in one order, whatever the other rows and the number of threads. */

#include <stdlib.h>

#include "common.h"
#include "products.h"
#include "threads.h"

enum { BLOCK = 64, VECTORS = BLOCK / LANES, ROWS = AT_ONCE };
enum { TASK_ROWS = 8 * ROWS }; /* per task; balances few blocks of many rows */
enum { FLOAT32, BFLOAT16, INT8, INT4 }; /* of the weight; x is bfloat16 for the last three */

#define FOR_ROWS(TILE, VECTORS_) WITH_CONSTANT(rows, TILE, VECTORS_)
#define FOR_ROWS_AND_VECTORS(TILE) \
    if (vectors == 4) { FOR_ROWS(TILE, 4) } \
    else if (vectors == 2) { FOR_ROWS(TILE, 2) } \
    else { FOR_ROWS(TILE, 1) }

/* Sums of `rows` rows with `vectors` times LANES outputs. A word of x is one float32 or two
   successive bfloat16; `steps` is the number of words of a row. */
typedef void tiles(int rows, int vectors, const void *weight, const uint32_t *x, long steps,
                   const float *group_sums, float out[ROWS][BLOCK]);

/* --- float32 and bfloat16 in oneDNN's layout: weight[n / BLOCK][k][n % BLOCK]; in bfloat16,
   two successive k of one n share a word */

INLINE void dense_tile(int half, int rows, int vectors, const words *weight, const uint32_t *x,
                       long steps, float out[ROWS][BLOCK])
{
    lanes sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = (lanes){0};
    for (long k = 0; k < steps; k++)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] = add_product(half, sum[r][v], weight[k * VECTORS + v],
                                        (words)_mm512_set1_epi32((int)x[r * steps + k]));
    for (int r = 0; r < rows; r++)
        memcpy(out[r], sum[r], vectors * sizeof(lanes));
}

#define FLOAT32_TILE(ROWS_, VECTORS_) dense_tile(0, ROWS_, VECTORS_, weight, x, steps, out)
#define BFLOAT16_TILE(ROWS_, VECTORS_) dense_tile(1, ROWS_, VECTORS_, weight, x, steps, out)

static void float32_tiles(int rows, int vectors, const void *weight, const uint32_t *x, long steps,
                          const float *group_sums, float out[ROWS][BLOCK])
{
    (void)group_sums;
    FOR_ROWS_AND_VECTORS(FLOAT32_TILE)
}

static void bfloat16_tiles(int rows, int vectors, const void *weight, const uint32_t *x,
                           long steps, const float *group_sums, float out[ROWS][BLOCK])
{
    (void)group_sums;
    FOR_ROWS_AND_VECTORS(BFLOAT16_TILE)
}

enum { GROUP = 32 };  /* 4-bit weights that share a scale and a minimum */
enum { INT4_LINES = 4, INT4_GROUP_BYTES = (1 + INT4_LINES) * 64 };

#ifdef __AVX512BF16__

/* --- int8 in the same layout as bfloat16, half as wide */

enum { INT8_LINE = 2 * LANES };

INLINE __m512 widened(const int8_t *line)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)line)));
}

INLINE void int8_tile(int rows, int vectors, const int8_t *weight, const uint32_t *x, long steps,
                      float out[ROWS][BLOCK])
{
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = _mm512_setzero_ps();
    for (long k = 0; k < steps; k++)
        for (int v = 0; v < vectors; v++) {
            const int8_t *line = weight + (k * VECTORS + v) * INT8_LINE;
            __m512bh values = _mm512_cvtne2ps_pbh(widened(line + LANES), widened(line));
            for (int r = 0; r < rows; r++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], values,
                                             (__m512bh)_mm512_set1_epi32((int)x[r * steps + k]));
        }
    for (int r = 0; r < rows; r++)
        memcpy(out[r], sum[r], vectors * sizeof(lanes));
}

#define INT8_TILE(ROWS_, VECTORS_) int8_tile(ROWS_, VECTORS_, weight, x, steps, out)

static void int8_tiles(int rows, int vectors, const void *weight, const uint32_t *x, long steps,
                       const float *group_sums, float out[ROWS][BLOCK])
{
    (void)group_sums;
    FOR_ROWS_AND_VECTORS(INT8_TILE)
}

/* --- int4 in groups: weight[n / LANES][k / GROUP] is a line of (scale, least) of LANES
   outputs in bfloat16, then four lines of levels: nibble j of the 16 bits at [line][n][odd] is the
   level of k = 8 * line + 2 * j + odd. A weight is scale * level + least. */

INLINE void int4_tile(int rows, int vectors, const uint8_t *weight, const uint32_t *x, long steps,
                      const float *group_sums, float out[ROWS][BLOCK])
{
    /* Levels as bfloat16, from their low five bits; the fifth belongs to the next level and is ignored. */
    static const uint16_t NUMBERS[2 * LANES] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i numbers = _mm512_loadu_si512(NUMBERS);
    long groups = 2 * steps / GROUP;
    __m512 total[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            total[r][v] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512 sum[ROWS][2];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_setzero_ps();
        for (int step = 0; step < GROUP / 2; step++)
            for (int v = 0; v < vectors; v++) {
                const uint8_t *line = weight + (v * groups + g) * INT4_GROUP_BYTES;
                __m512i levels = _mm512_loadu_si512(line + (1 + step / 4) * 64);
                levels = _mm512_srli_epi16(levels, 4 * (step % 4));
                __m512bh values = (__m512bh)_mm512_permutexvar_epi16(levels, numbers);
                for (int r = 0; r < rows; r++) {
                    int pair = (int)x[r * steps + g * (GROUP / 2) + step];
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], values,
                                                 (__m512bh)_mm512_set1_epi32(pair));
                }
            }
        for (int v = 0; v < vectors; v++) {
            __m512i both = _mm512_loadu_si512(weight + (v * groups + g) * INT4_GROUP_BYTES);
            __m512 scale = (__m512)_mm512_slli_epi32(both, 16);
            __m512 least = (__m512)_mm512_and_epi32(both, _mm512_set1_epi32((int)0xffff0000u));
            for (int r = 0; r < rows; r++) {
                __m512 sum_of_x = _mm512_set1_ps(group_sums[r * groups + g]);
                total[r][v] = _mm512_fmadd_ps(scale, sum[r][v], total[r][v]);
                total[r][v] = _mm512_fmadd_ps(least, sum_of_x, total[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        memcpy(out[r], total[r], vectors * sizeof(lanes));
}

#define INT4_TILE(ROWS_, VECTORS_) int4_tile(ROWS_, VECTORS_, weight, x, steps, group_sums, out)

static void int4_tiles(int rows, int vectors, const void *weight, const uint32_t *x, long steps,
                       const float *group_sums, float out[ROWS][BLOCK])
{
    if (vectors == 2) { FOR_ROWS(INT4_TILE, 2) } else { FOR_ROWS(INT4_TILE, 1) }
}

static void sum_groups(const uint16_t *x, long count, float *sums)
{
    for (long g = 0; g < count; g++) {
        words pairs = *(const words *)(x + g * GROUP);
        sums[g] = total(even(pairs) + odd(pairs));
    }
}

/* --- rounded weights made dense again, for long passes by other kernels: out[n][k], bfloat16 */

static void unpack_int8(const int8_t *weight, const uint16_t *scale, uint16_t *out, long n, long k)
{
#pragma omp parallel for schedule(static)
    for (long part = 0; part < (n + LANES - 1) / LANES; part++) {
        uint32_t lane_scales[LANES] = {0}, pairs[LANES];
        long width = n - part * LANES < LANES ? n - part * LANES : LANES;
        for (long i = 0; i < width; i++)
            lane_scales[i] = (uint32_t)scale[part * LANES + i] << 16;
        __m512 scales = (__m512)_mm512_loadu_si512(lane_scales);
        __m512 low = _mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1,
                                                            1, 0, 0), scales);
        __m512 high = _mm512_permutexvar_ps(_mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11,
                                                             10, 10, 9, 9, 8, 8), scales);
        const int8_t *line = weight + part / VECTORS * BLOCK * k + part % VECTORS * INT8_LINE;
        for (long i = 0; i < k; i += 2, line += VECTORS * INT8_LINE) {
            _mm512_storeu_si512(pairs, (__m512i)_mm512_cvtne2ps_pbh(widened(line + LANES) * high,
                                                                    widened(line) * low));
            for (long lane = 0; lane < width; lane++)
                memcpy(out + (part * LANES + lane) * k + i, pairs + lane, sizeof *pairs);
        }
    }
}

static void unpack_int4(const uint8_t *weight, uint16_t *out, long n, long k)
{
#pragma omp parallel for schedule(static)
    for (long row = 0; row < n; row++)
        for (long g = 0; g < k / GROUP; g++) {
            const uint8_t *group = weight + (row / LANES * (k / GROUP) + g) * INT4_GROUP_BYTES;
            uint16_t pair[2], bits[2];
            memcpy(pair, group + row % LANES * sizeof pair, sizeof pair);
            float scale = from_bfloat16(pair[0]), least = from_bfloat16(pair[1]);
            for (int line = 0; line < INT4_LINES; line++) {
                memcpy(bits, group + (1 + line) * 64 + row % LANES * sizeof bits, sizeof bits);
                for (int i = 0; i < 8; i++)
                    out[row * k + g * GROUP + line * 8 + i] =
                        to_bfloat16(scale * (bits[i % 2] >> i / 2 * 4 & 15) + least);
            }
        }
}

#endif

/* --- all kinds */

INLINE int next_rows(long left) /* of even sizes, because four and three take less time than six and one */
{
    long groups = (left + ROWS - 1) / ROWS;
    return (int)((left + groups - 1) / groups);
}

int amulet_serves(int kind)
{
#ifdef __AVX512BF16__
    return kind <= INT4;
#else
    return kind <= BFLOAT16;
#endif
}

/* Write sums of one row, times scale and plus bias, from a column on. Separate loops, so that the
   compiler vectorises each. */
static void store(int kind, float *restrict sums, const uint16_t *scale, const void *bias,
                  long column, void *restrict out, long width)
{
    if (scale)
        for (long c = 0; c < width; c++)
            sums[c] *= from_bfloat16(scale[c]);
    if (kind == FLOAT32) {
        if (bias)
            for (long c = 0; c < width; c++)
                sums[c] += ((const float *)bias)[column + c];
        memcpy(out, sums, width * sizeof *sums);
        return;
    }
    if (bias)
        for (long c = 0; c < width; c++)
            sums[c] += from_bfloat16(((const uint16_t *)bias)[column + c]);
    for (long c = 0; c < width; c++)
        ((uint16_t *)out)[c] = to_bfloat16(sums[c]);
}

struct product {
    int kind;
    const void *x, *weight;
    const uint16_t *scale;
    const void *bias;
    void *out;
    long rows, n, k;
    const float *group_sums;
    tiles *sums_of;
    long part_bytes, block_bytes; /* a part is LANES outputs */
    long row_parts;               /* tasks per block */
};

static void multiply_block(void *argument, long task, int worker)
{
    const struct product *of = argument;
    long n = of->n, k = of->k, most = of->kind == INT4 ? 2 : VECTORS;
    long steps = of->kind != FLOAT32 ? k / 2 : k, size = of->kind != FLOAT32 ? 2 : 4;
    long last = (n + LANES - 1) / LANES, block = task / of->row_parts;
    long begin = task % of->row_parts * TASK_ROWS;
    long end = of->rows - begin < TASK_ROWS ? of->rows : begin + TASK_ROWS;
    last = last < (block + 1) * VECTORS ? last : (block + 1) * VECTORS;
    (void)worker;
    for (long part = block * VECTORS, vectors; part < last; part += vectors) {
        long left = last - part;
        vectors = left >= most ? most : left >= 2 ? 2 : 1;
        const char *lines = (const char *)of->weight + part / VECTORS * of->block_bytes
                            + part % VECTORS * of->part_bytes;
        long column = part * LANES, width = vectors * LANES;
        if (column + width > n)
            width = n - column;
        for (long r = begin, now; r < end; r += now) {
            float sums[ROWS][BLOCK];
            now = next_rows(end - r);
            of->sums_of((int)now, (int)vectors, lines, (const uint32_t *)of->x + r * steps, steps,
                        of->group_sums ? of->group_sums + r * (k / GROUP) : NULL, sums);
            for (long i = 0; i < now; i++)
                store(of->kind, sums[i], of->scale ? of->scale + column : NULL, of->bias, column,
                      (char *)of->out + ((r + i) * n + column) * size, width);
        }
    }
}

/* Return 0, or 1 if out of memory or the kind is not supported. `scale[n]`, bfloat16, is only for
   int8; `bias` has the type of x, or is null. */
int amulet_product(int kind, const void *x, const void *weight, const uint16_t *scale,
                   const void *bias, void *out, long rows, long n, long k)
{
    int half = kind != FLOAT32;
    long steps = half ? k / 2 : k;
    long part_bytes = 64, block_bytes = VECTORS * steps * 64;
    float *group_sums = NULL;
    tiles *sums_of = kind == FLOAT32 ? float32_tiles : kind == BFLOAT16 ? bfloat16_tiles : NULL;
#ifdef __AVX512BF16__
    if (kind == INT8) {
        sums_of = int8_tiles;
        part_bytes = INT8_LINE;
        block_bytes = VECTORS * steps * INT8_LINE;
    } else if (kind == INT4) {
        sums_of = int4_tiles;
        part_bytes = k / GROUP * INT4_GROUP_BYTES;
        block_bytes = VECTORS * part_bytes;
        group_sums = malloc((rows * (k / GROUP) + 1) * sizeof *group_sums);
        if (!group_sums)
            return 1;
        sum_groups(x, rows * (k / GROUP), group_sums);
    }
#endif
    if (!sums_of)
        return 1;
    struct product whole = {kind, x, weight, scale, bias, out, rows, n, k, group_sums, sums_of,
                            part_bytes, block_bytes, (rows + TASK_ROWS - 1) / TASK_ROWS};
    run_tasks((n + BLOCK - 1) / BLOCK * whole.row_parts, multiply_block, &whole);
    free(group_sums);
    return 0;
}

/* Write int8 or int4 weights as bfloat16, out[n][k]. */
void amulet_unpack(int kind, const void *weight, const uint16_t *scale, uint16_t *out, long n,
                   long k)
{
#ifdef __AVX512BF16__
    if (kind == INT8)
        unpack_int8(weight, scale, out, n, k);
    else
        unpack_int4(weight, out, n, k);
#endif
}
