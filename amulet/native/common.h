/* Vectors of LANES numbers, and bfloat16. */

#include <stdint.h>
#include <string.h>
#ifndef __AVX512F__
#error "Amulet's C code is for processors with AVX-512; for others it would be slower than PyTorch's"
#endif
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };

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

INLINE uint16_t to_bfloat16(float value) /* to nearest, ties to even; no number stays none */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

/* The first and the second bfloat16 of each word. */
INLINE lanes even(words pair) { return (lanes)(pair << 16); }
INLINE lanes odd(words pair) { return (lanes)(pair & 0xffff0000u); }

INLINE float total(lanes sum) { return _mm512_reduce_add_ps((__m512)sum); }
