// Vector operations beyond arithmetic: reductions, powers of two, bfloat16, packed products.
#pragma once

#include "vectors.h"
#if NEON
#include "neon.h"
#endif

// Prefetch memory. Blocks of the cache are pages apart, so the hardware prefetcher does not find the next one.
INLINE void prefetch(const void* from, long words) {
    for (long i = 0; i < words; i += 16) __builtin_prefetch(static_cast<const uint32_t*>(from) + i, 0, 2);
}

INLINE f32x16 splat(float x) { return f32x16{} + x; }

// The lanes whose bits are set in the lowest 16 bits of a word.
INLINE i32x16 lanes_of(uint32_t bits) { return (lane_bits() & bits) != 0u; }

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
INLINE f32x16 max_of(f32x16 a, f32x16 b) { return select(a > b, a, b); }

// Both reductions have the same order on every ISA: upper half onto lower half.
#if defined(__AVX512F__)
INLINE float sum(f32x16 v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float reduce_max(f32x16 v) { return _mm512_reduce_max_ps((__m512)v); }
#elif defined(__AVX2__)
INLINE float sum(f32x16 v) {
    const __m256 eight = (__m256)(v.part[0] + v.part[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float reduce_max(f32x16 v) {
    const __m256 eight = _mm256_max_ps((__m256)v.part[0], (__m256)v.part[1]);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#elif !NEON
template <class Combine> INLINE float reduce(f32x16 v, const Combine& combine) {
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = combine(x[i], x[i + half]);
    return x[0];
}

INLINE float sum(f32x16 v) { return reduce(v, [](float a, float b) { return a + b; }); }
INLINE float reduce_max(f32x16 v) { return reduce(v, [](float a, float b) { return max_of(a, b); }); }
#endif

// 2^x; 0 below 2^-126. The relative error is below 2e-7 with DEGREE 6 (Taylor polynomial on [-0.5, 0.5]), below 4e-6 with 4
// (interpolation at Chebyshev nodes), which is enough for what is rounded to bfloat16.
template <int DEGREE = 6> INLINE f32x16 exp2_of(f32x16 x) {
    static_assert(DEGREE == 6 || DEGREE == 4);
#if defined(__AVX512F__)
    const f32x16 whole = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const f32x16 f = x - whole;
#else
    const f32x16 lowest = splat(-126.0f);
    const i32x16 gone = x < lowest;
    x = max_of(x, lowest);
    x = select(x > splat(127.0f), splat(127.0f), x);
    const f32x16 shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are x rounded to an integer
    const i32x16 whole = (i32x16)shifted - 0x4B400000;
    const f32x16 f = x - (shifted - 12582912.0f);
#endif
    f32x16 p;
    if constexpr (DEGREE == 6) {
        p = splat(1.5403530e-4f);
        p = p * f + 1.3333558e-3f;
        p = p * f + 9.6181291e-3f;
        p = p * f + 5.5504109e-2f;
        p = p * f + 2.4022651e-1f;
        p = p * f + 6.9314718e-1f;
    } else {
        p = splat(9.6663685e-3f);
        p = p * f + 5.5921976e-2f;
        p = p * f + 2.4022349e-1f;
        p = p * f + 6.9312105e-1f;
    }
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return (f32x16)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)whole);
#else
    const f32x16 result = (f32x16)((i32x16)p + (whole << 23));
    return select(gone, f32x16{}, result);
#endif
}

// ------------------------------------------------------------------------------------------------------------ bfloat16

INLINE float from_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }

INLINE uint16_t to_bf16(float x) {  // rounds to nearest, ties to even; NaN stays NaN
    uint32_t bits = as_bits(x);
    if (x != x) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

INLINE f32x16 from_bf16(u16x16 x) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);  // GCC 12 would convert it half by half
#else
    return (f32x16)(convert<u32x16>(x) << 16);
#endif
}

#if !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
INLINE u16x16 to_bf16(f32x16 x) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    rounded = select(x != x, bits >> 16 | 64, rounded);
    return convert<u16x16>(rounded);
#endif
}
#endif

#if AVX2_ONLY
// A word in all lanes of a part; a broadcast load if it comes from memory.
INLINE u32x16::Part broadcast(uint32_t word) { return (u32x16::Part)_mm256_set1_epi32(int(word)); }
#endif

// acc[lane] += a.low * b[lane].low + a.high * b[lane].high; each 32-bit word holds two bfloat16.
INLINE f32x16 dot_pairs(f32x16 acc, u32x16 b, uint32_t a) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(a)));
#elif AVX2_ONLY
    const u32x16::Part low = broadcast(a) << 16, high = broadcast(a) & 0xFFFF0000u;
    for (int p = 0; p < PARTS; p++) {
        acc.part[p] += (f32x16::Part)(b.part[p] << 16) * (f32x16::Part)low;
        acc.part[p] += (f32x16::Part)(b.part[p] & 0xFFFF0000u) * (f32x16::Part)high;
    }
    return acc;
#elif NEON
    for (int p = 0; p < PARTS; p++)
        acc.part[p] = (f32x16::Part)dot_pairs((float32x4_t)acc.part[p], (uint32x4_t)b.part[p], row_of(a));
    return acc;
#else
    acc += (f32x16)(b << 16) * as_float(a << 16);
    acc += (f32x16)(b & 0xFFFF0000u) * as_float(a & 0xFFFF0000u);
    return acc;
#endif
}

// Writes element `at` of each of 16 words, and no other byte of them.
template <class E> INLINE void store_in_words(const E* from, int at, void* words) {
#if defined(__AVX512F__)
    if constexpr (sizeof(E) == 2) {
        const __m512i whole = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const __m512i moved = _mm512_sll_epi32(whole, _mm_cvtsi32_si128(16 * at));
        return _mm512_mask_storeu_epi16(words, 0x55555555u << at, moved);
    }
    if constexpr (sizeof(E) == 1) {
        const __m512i whole = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m512i moved = _mm512_sll_epi32(whole, _mm_cvtsi32_si128(8 * at));
        return _mm512_mask_storeu_epi8(words, 0x1111111111111111u << at, moved);
    }
#endif
    for (int i = 0; i < LANES; i++) static_cast<E*>(words)[i * (4 / sizeof(E)) + at] = from[i];
}

// ---------------------------------------------------------------------------------------------------------------- int8

#if AVX2_ONLY

// Bytes 0 and 2 of each word as 16-bit integers; and bytes 1 and 3.
template <bool SIGNED> INLINE __m256i even_bytes(__m256i v) {
    return SIGNED ? _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
}
template <bool SIGNED> INLINE __m256i odd_bytes(__m256i v) {
    return SIGNED ? _mm256_srai_epi16(v, 8) : _mm256_srli_epi16(v, 8);
}

// acc[lane] += the sum of four products of bytes; b is signed and a unsigned, or vice versa. Bytes are widened to 16 bits,
// since the sum of two products of bytes does not fit 16 bits.
template <bool B_SIGNED> INLINE i32x16 dot_bytes(i32x16 acc, u32x16 b, uint32_t a) {
    const __m256i row = (__m256i)broadcast(a), even = even_bytes<!B_SIGNED>(row), odd = odd_bytes<!B_SIGNED>(row);
    for (int p = 0; p < PARTS; p++) {
        const __m256i column = (__m256i)b.part[p];
        acc.part[p] += (i32x16::Part)_mm256_madd_epi16(even, even_bytes<B_SIGNED>(column));
        acc.part[p] += (i32x16::Part)_mm256_madd_epi16(odd, odd_bytes<B_SIGNED>(column));
    }
    return acc;
}

#endif

// acc[lane] += the sum of four products of unsigned bytes in b and signed bytes in a.
INLINE i32x16 dot_quads(i32x16 acc, u32x16 b, uint32_t a) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, _mm512_set1_epi32(int(a)));
#elif AVX2_ONLY
    return dot_bytes<false>(acc, b, a);
#elif NEON
    for (int p = 0; p < PARTS; p++)
        acc.part[p] = (i32x16::Part)dot_signed_row((int32x4_t)acc.part[p], (uint8x16_t)b.part[p], row_of(a));
    return acc;
#else
    for (int i = 0; i < 4; i++) acc += (i32x16)(b >> 8 * i & 255) * int32_t(int8_t(a >> 8 * i));
    return acc;
#endif
}

// As `dot_quads`, for bytes in b of at most 15.
INLINE i32x16 dot_small_quads(i32x16 acc, u32x16 b, uint32_t a) {
#if AVX2_ONLY
    const __m256i row = (__m256i)broadcast(a), ones = _mm256_set1_epi16(1);
    for (int p = 0; p < PARTS; p++)
        acc.part[p] += (i32x16::Part)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)b.part[p], row), ones);
    return acc;
#elif NEON
    for (int p = 0; p < PARTS; p++)
        acc.part[p] = (i32x16::Part)dot_small((int32x4_t)acc.part[p], (int8x16_t)b.part[p], row_of(a));
    return acc;
#else
    return dot_quads(acc, b, a);
#endif
}

// As `dot_quads`, with signed bytes in b and unsigned bytes in a.
INLINE i32x16 dot_quads_unsigned(i32x16 acc, u32x16 b, uint32_t a) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(int(a)), (__m512i)b);
#elif AVX2_ONLY
    return dot_bytes<true>(acc, b, a);
#elif NEON
    for (int p = 0; p < PARTS; p++)
        acc.part[p] = (i32x16::Part)dot_unsigned_row((int32x4_t)acc.part[p], (int8x16_t)b.part[p], row_of(a));
    return acc;
#else
    for (int i = 0; i < 4; i++) acc += ((i32x16)(b << (24 - 8 * i)) >> 24) * int32_t(a >> 8 * i & 255);
    return acc;
#endif
}
