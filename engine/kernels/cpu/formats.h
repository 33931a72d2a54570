// How numbers lie in memory: in 32-bit units along the dimension that a product sums over.
//
// A unit holds one float32, two bfloat16 or four int8. An operand with many columns (weights, cached keys and values) is
// cut into panels of 16 columns, unit by unit:
//
//     panel 0:  unit 0 of columns 0..15 | unit 1 of columns 0..15 | …      panel 1: columns 16..31 …
//
// so that one vector load brings a unit of 16 columns, and one broadcast the unit of a row to multiply it with.
#pragma once

#include "simd.h"

struct F32 {
    static constexpr int PER_UNIT = 1;
    typedef float Element;
    typedef f32x16 Acc;
    INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return acc + (f32x16)b * as_float(a); }
    INLINE Element narrow(float x) { return x; }
    INLINE float widen(Element x) { return x; }
    INLINE void narrow(Element* to, f32x16 x) { store(to, x); }
    INLINE f32x16 widen(const Element* from) { return load<f32x16>(from); }
};

struct BF16 {
    static constexpr int PER_UNIT = 2;
    typedef uint16_t Element;
    typedef f32x16 Acc;
    INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return dot_pairs(acc, b, a); }
    INLINE Element narrow(float x) { return to_bf16(x); }
    INLINE float widen(Element x) { return from_bf16(x); }
    INLINE void narrow(Element* to, f32x16 x) { store(to, to_bf16(x)); }
    INLINE f32x16 widen(const Element* from) { return from_bf16(load<u16x16>(from)); }
};

// Weights as unsigned bytes (value + 128), activations as signed ones.
struct I8 {
    static constexpr int PER_UNIT = 4;
    typedef int8_t Element;
    typedef i32x16 Acc;
    INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return dot_quads(acc, b, a); }
};

INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE long round_up(long a, long b) { return ceil_div(a, b) * b; }
