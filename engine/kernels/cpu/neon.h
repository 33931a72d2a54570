// What NEON has its own instructions for, register by register: reductions, rounding to bfloat16, packed products.
//
// Where the instructions for packed products are missing, they are made of others. Products of bytes are exact everywhere.
// BFDOT differs from products in float32: it adds both products of a word before it adds the sum, rounds these sums to
// odd, and takes denormal numbers for zero.
#pragma once

#include <arm_neon.h>

#include "vectors.h"

// A word in all lanes; a broadcast load if it comes from memory.
INLINE u32x16::Part broadcast(uint32_t word) { return (u32x16::Part)vdupq_n_u32(word); }

INLINE float sum(f32x16 v) {
    const float32x4_t four = (float32x4_t)((v.part[0] + v.part[2]) + (v.part[1] + v.part[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

INLINE float reduce_max(f32x16 v) {
    const float32x4_t even = vmaxnmq_f32((float32x4_t)v.part[0], (float32x4_t)v.part[2]);
    const float32x4_t odd = vmaxnmq_f32((float32x4_t)v.part[1], (float32x4_t)v.part[3]);
    return vmaxnmvq_f32(vmaxnmq_f32(even, odd));
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
INLINE uint16x4_t to_bf16(float32x4_t x) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }
#endif

// acc[lane] += the products of the lower and of the upper bfloat16 in a word.
INLINE float32x4_t dot_pairs(float32x4_t acc, uint32x4_t b, uint32x4_t a) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vbfdotq_f32(acc, vreinterpretq_bf16_u32(b), vreinterpretq_bf16_u32(a));
#else
    const uint32x4_t upper = vdupq_n_u32(0xFFFF0000u);
    acc = vfmaq_f32(acc, vreinterpretq_f32_u32(vshlq_n_u32(b, 16)), vreinterpretq_f32_u32(vshlq_n_u32(a, 16)));
    return vfmaq_f32(acc, vreinterpretq_f32_u32(vandq_u32(b, upper)), vreinterpretq_f32_u32(vandq_u32(a, upper)));
#endif
}

// acc[lane] += the sum of four products of unsigned bytes in u and signed bytes in s.
INLINE int32x4_t dot_bytes(int32x4_t acc, uint8x16_t u, int8x16_t s) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(acc, u, s);
#else
    // Signed bytes can be multiplied with signed bytes only: u * s = (u - 128) * s + 128 * s.
    const int8x16_t lowered = vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(128)));
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vsubq_s32(acc, vdotq_s32(vdupq_n_s32(0), s, vdupq_n_s8(-128))), lowered, s);
#else
    const int16x8_t low = vmlal_s8(vshll_n_s8(vget_low_s8(s), 7), vget_low_s8(lowered), vget_low_s8(s));
    const int16x8_t high = vmlal_high_s8(vshll_high_n_s8(s, 7), lowered, s);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
#endif
}

// As `dot_bytes`, for bytes in u of at most 15.
INLINE int32x4_t dot_small_bytes(int32x4_t acc, uint8x16_t u, int8x16_t s) {
    const int8x16_t small = vreinterpretq_s8_u8(u);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, small, s);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(small), vget_low_s8(s)), high = vmull_high_s8(small, s);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}
