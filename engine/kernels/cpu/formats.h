// Number formats and the memory layout of operands: 32-bit units along the dimension that a product sums over.
//
// A unit holds one float32, two bfloat16 or four int8. An operand with many columns (weights, cached keys and values) is
// stored in panels of 16 columns, unit by unit:
//
//     panel 0:  unit 0 of columns 0..15 | unit 1 of columns 0..15 | …      panel 1: columns 16..31 …
//
// so that one vector load gets a unit of 16 columns, and one broadcast the unit of a row to multiply them with.
//
// Example, bfloat16: a linear of 64 inputs and 40 outputs has 3 panels (48 columns, the last 8 zero) of 32 units, 512 words
// each. Weight [output 21, input 7] is in panel 21 / 16 = 1, unit 7 / 2 = 3, column 21 % 16 = 5: the upper half of word
// 1 * 512 + 3 * 16 + 5.
#pragma once

#include "simd.h"

struct F32 {
    typedef F32 Plain;
    static constexpr int PER_UNIT = 1, PER_WORD = 1;
    static constexpr bool QUANTIZED = false;
    typedef float Element;
    typedef f32x16 Acc;
    INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return acc + (f32x16)b * as_float(a); }
    INLINE Element narrow(float x) { return x; }
    INLINE float widen(Element x) { return x; }
    INLINE void narrow(Element* to, f32x16 x) { store(to, x); }
    INLINE f32x16 widen(const Element* from) { return load<f32x16>(from); }
};

struct BF16 {
    typedef BF16 Plain;
    static constexpr int PER_UNIT = 2, PER_WORD = 2;
    static constexpr bool QUANTIZED = false;
    typedef uint16_t Element;
    typedef f32x16 Acc;
    INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return dot_pairs(acc, b, a); }
    INLINE Element narrow(float x) { return to_bf16(x); }
    INLINE float widen(Element x) { return from_bf16(x); }
    INLINE void narrow(Element* to, f32x16 x) { store(to, to_bf16(x)); }
    INLINE f32x16 widen(const Element* from) { return from_bf16(load<u16x16>(from)); }
};

// Quantized weights: unsigned integers in groups of inputs, with SCALES bfloat16 numbers per group and column. Activations
// are int8 in the same groups, with a scale for each group of a row.
//
// int8: weight = (integer - OFFSET) * scale; OFFSET is multiplied by the sum of the group's activations. A word of a panel is
//       a unit.
// int4: weight = integer * scale + minimum; the minimum is multiplied by the sum of the group's activations. A word is two
//       units, the first one in the lower halves of its bytes.
struct I8 {
    static constexpr int PER_UNIT = 4, PER_WORD = 4, GROUP = 64, SCALES = 1, OFFSET = 128;
    static constexpr bool QUANTIZED = true;
    typedef int8_t Element;
};

struct I4 {
    static constexpr int PER_UNIT = 4, PER_WORD = 8, GROUP = 32, SCALES = 2, OFFSET = 0;
    static constexpr bool QUANTIZED = true;
    typedef int8_t Element;
};

// An int8 cache: each key and value of a head has a scale. The float32 scales of a block's tokens follow its panels. Keys
// are stored as unsigned integers, OFFSET higher, and multiplied with int8 queries. Values are multiplied with unsigned
// 8-bit weights.
struct C8 {
    typedef BF16 Plain;
    static constexpr int PER_UNIT = 4, OFFSET = 128;
    static constexpr bool QUANTIZED = true;
    typedef int8_t Element;

    struct Keys {
        typedef i32x16 Acc;
        INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return dot_quads(acc, b, a); }
    };

    struct Values {
        typedef i32x16 Acc;
        INLINE Acc dot(Acc acc, u32x16 b, uint32_t a) { return dot_quads_unsigned(acc, b, a); }
    };
};

INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE long round_up(long a, long b) { return ceil_div(a, b) * b; }
