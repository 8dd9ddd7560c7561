/* Vectors of LANES numbers, bfloat16, and the exponential. */

#include <stdint.h>
#include <string.h>
#ifndef __AVX512F__
#error "Amulet's C code requires a processor with AVX-512; on others it is slower than PyTorch's"
#endif
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, AT_ONCE = 6 }; /* rows, or queries, whose sums are kept in registers */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float from_bfloat16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

INLINE uint16_t to_bfloat16(float value) /* to nearest, ties to even; NaN stays NaN */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

/* The numbers of a vector as bfloat16, in order. */
INLINE void store_bfloat16(uint16_t *to, lanes from)
{
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)from);
    memcpy(to, &rounded, sizeof rounded);
#else
    for (int i = 0; i < LANES; i++)
        to[i] = to_bfloat16(from[i]);
#endif
}

/* The first and the second bfloat16 of each word. */
INLINE lanes even(words pair) { return (lanes)(pair << 16); }
INLINE lanes odd(words pair) { return (lanes)(pair & 0xffff0000u); }

INLINE float total(lanes sum) { return _mm512_reduce_add_ps((__m512)sum); }

/* Add the products of two float32, or of both pairs of bfloat16 of two words. */
INLINE lanes add_product(int half, lanes sum, words a, words b)
{
    if (!half)
        return sum + (lanes)a * (lanes)b;
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + even(a) * even(b) + odd(a) * odd(b);
#endif
}

/* e to the power of x <= 0: 2 to the integer part through the exponent bits, to the fraction by a
   Taylor polynomial, whose error is about that of float32. */
INLINE lanes exponential(lanes x)
{
    lanes power = x * 1.44269504f;
    integers whole = __builtin_convertvector(power - 0.5f, integers);
    lanes rest = (power - __builtin_convertvector(whole, lanes)) * 0.693147181f;
    lanes value = 1 + rest * (1 + rest * (1 / 2.f + rest * (1 / 6.f + rest * (1 / 24.f
                  + rest * (1 / 120.f + rest * (1 / 720.f))))));
    lanes scaled = value * (lanes)((whole + 127) << 23);
    return (lanes)((integers)scaled & ~(x <= -87.f)); /* 0 instead of underflow; NaN stays NaN */
}

/* Call with a constant, because the compiler keeps sums in registers only if it knows their number. */
#define WITH_CONSTANT(COUNT, CALL, ...) \
    switch (COUNT) { \
    case 1: CALL(1, __VA_ARGS__); break; \
    case 2: CALL(2, __VA_ARGS__); break; \
    case 3: CALL(3, __VA_ARGS__); break; \
    case 4: CALL(4, __VA_ARGS__); break; \
    case 5: CALL(5, __VA_ARGS__); break; \
    default: CALL(AT_ONCE, __VA_ARGS__); \
    }
