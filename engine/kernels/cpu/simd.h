// Vectors of 16 lanes, and what the kernels need of them beyond plain arithmetic.
//
// GCC's vector extension splits them where the machine's registers are smaller, so that every kernel is written once.
// Only the products of packed pairs and quads ask for special instructions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

constexpr int LANES = 16;

template <class V> INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class V> INLINE void store(void* to, V v) { std::memcpy(to, &v, sizeof(V)); }

// Ask for memory that is needed soon. Blocks of the cache are pages apart: the processor doesn't guess the next one.
INLINE void prefetch(const uint32_t* from, long words) {
    for (long i = 0; i < words; i += 16) __builtin_prefetch(from + i, 0, 2);
}

INLINE f32x16 splat(float x) { return f32x16{} + x; }
INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

INLINE float max_of(float a, float b) { return a > b ? a : b; }
INLINE f32x16 max_of(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Both reductions have one order, whatever the machine: halves onto halves.
INLINE float sum(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

INLINE float highest(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = max_of(x[i], x[i + half]);
    return x[0];
#endif
}

// 2^x; 0 below 2^-126. Relative error below 2e-7 (polynomial of the sixth degree on [-0.5, 0.5], Taylor's).
INLINE f32x16 exp2_of(f32x16 x) {
#if defined(__AVX512F__)
    const f32x16 whole = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const f32x16 f = x - whole;
#else
    const f32x16 lowest = splat(-126.0f);
    const i32x16 gone = x < lowest;
    x = max_of(x, lowest);
    x = x > splat(127.0f) ? splat(127.0f) : x;
    const f32x16 shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are x rounded
    const i32x16 whole = (i32x16)shifted - 0x4B400000;
    const f32x16 f = x - (shifted - 12582912.0f);
#endif
    f32x16 p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return (f32x16)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)whole);
#else
    const f32x16 result = (f32x16)((i32x16)p + (whole << 23));
    return gone ? f32x16{} : result;
#endif
}

// ------------------------------------------------------------------------------------------------------------ bfloat16

INLINE float from_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }

INLINE uint16_t to_bf16(float x) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits = as_bits(x);
    if (x != x) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

INLINE f32x16 from_bf16(u16x16 x) { return (f32x16)(__builtin_convertvector(x, u32x16) << 16); }

INLINE u16x16 to_bf16(f32x16 x) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    rounded = x != x ? (bits >> 16 | 64) : rounded;
    return __builtin_convertvector(rounded, u16x16);
#endif
}

// acc[lane] += a.low * b[lane].low + a.high * b[lane].high, where each 32-bit word holds two bfloat16.
INLINE f32x16 dot_pairs(f32x16 acc, u32x16 b, uint32_t a) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(a)));
#else
    acc += (f32x16)(b << 16) * as_float(a << 16);
    acc += (f32x16)(b & 0xFFFF0000u) * as_float(a & 0xFFFF0000u);
    return acc;
#endif
}

// ---------------------------------------------------------------------------------------------------------------- int8

// acc[lane] += the sum of four products; b holds unsigned bytes, a signed ones, or the other way round.
INLINE i32x16 dot_quads(i32x16 acc, u32x16 b, uint32_t a) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, _mm512_set1_epi32(int(a)));
#else
    for (int i = 0; i < 4; i++) acc += (i32x16)(b >> 8 * i & 255) * int32_t(int8_t(a >> 8 * i));
    return acc;
#endif
}

INLINE i32x16 dot_quads_unsigned(i32x16 acc, u32x16 b, uint32_t a) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(int(a)), (__m512i)b);
#else
    for (int i = 0; i < 4; i++) acc += ((i32x16)(b << (24 - 8 * i)) >> 24) * int32_t(a >> 8 * i & 255);
    return acc;
#endif
}
