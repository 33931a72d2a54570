// What NEON has its own instructions for, register by register: reductions, rounding to bfloat16, packed products.
//
// Where the instructions for packed products are missing, they are made of others. Products of bytes are exact everywhere.
// BFDOT differs from products in float32: it adds both products of a word before it adds the sum, rounds these sums to
// odd, and takes denormal numbers for zero.
#pragma once

#include <arm_neon.h>

#include "vectors.h"

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

// A word of a row. Instructions that multiply by one of its lanes need no copies of it in the others.
INLINE uint32x2_t row_of(uint32_t word) { return vcreate_u32(word); }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

INLINE u16x16 to_bf16(f32x16 x) {
    u16x16 out;
    for (int p = 0; p < PARTS; p++)
        out.part[p] = (u16x16::Part)vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x.part[p]));
    return out;
}

INLINE float32x4_t dot_pairs(float32x4_t acc, uint32x4_t b, uint32x2_t row) {
    return vbfdotq_lane_f32(acc, vreinterpretq_bf16_u32(b), vreinterpret_bf16_u32(row), 0);
}

#else

INLINE float32x4_t dot_pairs(float32x4_t acc, uint32x4_t b, uint32x2_t row) {
    const uint32_t upper = 0xFFFF0000u;
    const float32x2_t low = vreinterpret_f32_u32(vshl_n_u32(row, 16));
    const float32x2_t high = vreinterpret_f32_u32(vand_u32(row, vdup_n_u32(upper)));
    acc = vfmaq_lane_f32(acc, vreinterpretq_f32_u32(vshlq_n_u32(b, 16)), low, 0);
    return vfmaq_lane_f32(acc, vreinterpretq_f32_u32(vandq_u32(b, vdupq_n_u32(upper))), high, 0);
}

#endif

// Of bytes: the sum of four products for each word. Where signed bytes can be multiplied with signed ones only,
// u * s = (u - 128) * s + 128 * s.
INLINE int8x16_t lowered(uint8x16_t u) { return vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(128))); }

#if defined(__ARM_FEATURE_DOTPROD)

INLINE int32x4_t dot_small(int32x4_t acc, int8x16_t b, uint32x2_t row) {
    return vdotq_lane_s32(acc, b, vreinterpret_s8_u32(row), 0);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

INLINE int32x4_t dot_signed_row(int32x4_t acc, uint8x16_t b, uint32x2_t row) {
    return vusdotq_lane_s32(acc, b, vreinterpret_s8_u32(row), 0);
}

INLINE int32x4_t dot_unsigned_row(int32x4_t acc, int8x16_t b, uint32x2_t row) {
    return vsudotq_lane_s32(acc, b, vreinterpret_u8_u32(row), 0);
}

#else

INLINE int32x4_t dot_signed_row(int32x4_t acc, uint8x16_t b, uint32x2_t row) {
    const int8x8_t s = vreinterpret_s8_u32(row);
    const int32x4_t less = vdotq_lane_s32(vdupq_n_s32(0), vdupq_n_s8(-128), s, 0);
    return vdotq_lane_s32(vsubq_s32(acc, less), lowered(b), s, 0);
}

INLINE int32x4_t dot_unsigned_row(int32x4_t acc, int8x16_t b, uint32x2_t row) {
    const int8x8_t s = vreinterpret_s8_u32(veor_u32(row, vdup_n_u32(0x80808080u)));
    const int32x4_t less = vdotq_s32(vdupq_n_s32(0), b, vdupq_n_s8(-128));
    return vdotq_lane_s32(vsubq_s32(acc, less), b, s, 0);
}

#endif

#else

INLINE int32x4_t dot_small(int32x4_t acc, int8x16_t b, uint32x2_t row) {  // two products of bytes fit 16 bits
    const int8x8_t s = vreinterpret_s8_u32(vdup_lane_u32(row, 0));
    return vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(b), s), vmull_s8(vget_high_s8(b), s)));
}

INLINE int32x4_t dot_bytes(int32x4_t acc, uint8x16_t u, int8x16_t s) {
    const int8x16_t l = lowered(u);
    const int16x8_t low = vmlal_s8(vshll_n_s8(vget_low_s8(s), 7), vget_low_s8(l), vget_low_s8(s));
    const int16x8_t high = vmlal_high_s8(vshll_high_n_s8(s, 7), l, s);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}

INLINE int32x4_t dot_signed_row(int32x4_t acc, uint8x16_t b, uint32x2_t row) {
    return dot_bytes(acc, b, vreinterpretq_s8_u32(vdupq_lane_u32(row, 0)));
}

INLINE int32x4_t dot_unsigned_row(int32x4_t acc, int8x16_t b, uint32x2_t row) {
    return dot_bytes(acc, vreinterpretq_u8_u32(vdupq_lane_u32(row, 0)), b);
}

#endif
