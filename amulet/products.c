/* Products of a few rows with a weight: out[r][n] = sum over k of x[r][k] * weight[n][k] + bias[n].

   A decode step has few rows, so its time is the weights' way through memory. Each thread reads
   its own columns once, in the order in which they lie, and multiplies each line by all rows
   (by ROWS of them at a time: as many sums as there are registers). Sums are float32. */

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, BLOCK = 64, VECTORS = BLOCK / LANES, ROWS = 6 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t to_bfloat16(float value)  /* to nearest, ties to even; no number stays none */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE void store(int half, void *out, const void *bias, long place, long column, float value)
{
    if (half) {
        if (bias)
            value += as_float((uint32_t)((const uint16_t *)bias)[column] << 16);
        ((uint16_t *)out)[place] = to_bfloat16(value);
    } else {
        ((float *)out)[place] = bias ? value + ((const float *)bias)[column] : value;
    }
}

/* --- oneDNN's layout: weight[n / BLOCK][k][n % BLOCK] in float32; in bfloat16, `half`, two
   successive k of one n lie side by side, so that a word holds a pair of them */

INLINE lanes add_product(int half, lanes sum, words weight, uint32_t x)
{
    if (!half)
        return sum + (lanes)weight * as_float(x);
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight,
                                   (__m512bh)_mm512_set1_epi32((int)x));
#else
    sum += (lanes)(weight << 16) * as_float(x << 16);
    return sum + (lanes)(weight & 0xffff0000u) * as_float(x & 0xffff0000u);
#endif
}

INLINE void blocked_tile(int half, int rows, int vectors, const words *weight, const uint32_t *x,
                         long steps, float out[ROWS][BLOCK])
{
    lanes sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = (lanes){0};
    for (long k = 0; k < steps; k++)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] = add_product(half, sum[r][v], weight[k * VECTORS + v], x[r * steps + k]);
    for (int r = 0; r < rows; r++)
        memcpy(out[r], sum[r], vectors * sizeof(lanes));
}

/* The compiler keeps sums in registers only where it knows how many there are. */
#define WITH_CONSTANT_ROWS(TILE, ...) \
    switch (rows) { \
    case 1: TILE(1, __VA_ARGS__); break; \
    case 2: TILE(2, __VA_ARGS__); break; \
    case 3: TILE(3, __VA_ARGS__); break; \
    case 4: TILE(4, __VA_ARGS__); break; \
    case 5: TILE(5, __VA_ARGS__); break; \
    default: TILE(6, __VA_ARGS__); \
    }
#define BLOCKED(ROWS_, HALF, VECTORS_) blocked_tile(HALF, ROWS_, VECTORS_, weight, x, steps, out)

#define BLOCKED_TILES(NAME, HALF) \
    static void NAME(int rows, int vectors, const words *weight, const uint32_t *x, long steps, \
                     float out[ROWS][BLOCK]) \
    { \
        if (vectors == 4) { WITH_CONSTANT_ROWS(BLOCKED, HALF, 4) } \
        else if (vectors == 2) { WITH_CONSTANT_ROWS(BLOCKED, HALF, 2) } \
        else { WITH_CONSTANT_ROWS(BLOCKED, HALF, 1) } \
    }
BLOCKED_TILES(bfloat16_tiles, 1)
BLOCKED_TILES(float32_tiles, 0)

INLINE int next_rows(long left)  /* groups of even size: six and one would read twice for one */
{
    long groups = (left + ROWS - 1) / ROWS;
    return (int)((left + groups - 1) / groups);
}

void amulet_blocked(int half, const void *x, const void *weight, const void *bias, void *out,
                    long rows, long n, long k)
{
    long steps = half ? k / 2 : k, parts = (n + LANES - 1) / LANES;
#pragma omp parallel
    {
        long threads = omp_get_num_threads(), thread = omp_get_thread_num();
        long last = parts * (thread + 1) / threads;
        for (long part = parts * thread / threads, vectors; part < last; part += vectors) {
            long whole = part % VECTORS == 0 && part + VECTORS <= last;
            vectors = whole ? VECTORS : part % 2 == 0 && part + 2 <= last ? 2 : 1;
            const words *lines = (const words *)weight
                                 + part / VECTORS * steps * VECTORS + part % VECTORS;
            long column = part * LANES, width = vectors * LANES;
            if (column + width > n)
                width = n - column;
            for (long r = 0, now; r < rows; r += now) {
                float sums[ROWS][BLOCK];
                now = next_rows(rows - r);
                (half ? bfloat16_tiles : float32_tiles)(
                    (int)now, (int)vectors, lines, (const uint32_t *)x + r * steps, steps, sums);
                for (long i = 0; i < now; i++)
                    for (long c = 0; c < width; c++)
                        store(half, out, bias, (r + i) * n + column + c, column + c, sums[i][c]);
            }
        }
    }
}
