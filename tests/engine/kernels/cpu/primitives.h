// Vector operations against scalar code.
#pragma once

#include "linear.h"
#include "portable.h"
#include "rowwise.h"

inline float random_float(Random& random, int exponents) {  // magnitudes from 2^-exponents to 2^exponents
    return std::ldexp(1.0f + std::fabs(random.number()), random.below(2 * exponents) - exponents) *
           (random.below(2) ? 1.0f : -1.0f);
}

template <class V, class E> V vector_of(const E* from) {  // at an address that is aligned to its elements only
    E moved[LANES + 1];
    std::memcpy(moved + 1, from, LANES * sizeof(E));
    return load<V>(moved + 1);
}

inline void test_lanes() {
    Random random(1);
    float x[LANES], y[LANES];
    for (int i = 0; i < LANES; i++) x[i] = random.number(), y[i] = i % 3 ? random.number() : x[i];
    const f32x16 a = vector_of<f32x16>(x), b = vector_of<f32x16>(y);
    const i32x16 less = a < b, most = a <= b, more = a > b, equal = a == b, other = a != b;
    const f32x16 chosen = select(less, a, b), quotient = a / b;
    const u32x16 bits = lane_bits();
    for (int i = 0; i < LANES; i++) {
        check(less[i] == -(x[i] < y[i]) && most[i] == -(x[i] <= y[i]) && more[i] == -(x[i] > y[i]), "comparison", i);
        check(equal[i] == -(x[i] == y[i]) && other[i] == -(x[i] != y[i]), "equality", i);
        check(chosen[i] == (x[i] < y[i] ? x[i] : y[i]), "select", i);
        check(std::fabs(quotient[i] - x[i] / y[i]) <= 1e-6f * std::fabs(x[i] / y[i]), "quotient", i);
        check(lane_numbers()[i] == i && bits[i] == 1u << i, "lane numbers", i);
        check(lanes_of(0x5A21)[i] == -(0x5A21 >> i & 1), "lanes of bits", i);
    }
}

inline void test_conversions() {
    Random random(2);
    for (int round = 0; round < 50; round++) {
        int32_t whole[LANES];
        int8_t bytes[LANES];
        uint16_t halves[LANES];
        for (int i = 0; i < LANES; i++) {
            whole[i] = int32_t(random.word()) >> random.below(32);
            bytes[i] = int8_t(random.word());
            halves[i] = uint16_t(random.word());
        }
        const i32x16 v = vector_of<i32x16>(whole);
        const f32x16 floats = convert<f32x16>(v);
        const i8x16 low = convert<i8x16>(v);
        const u8x16 unsigned_low = convert<u8x16>((u32x16)v);
        const u16x16 half = convert<u16x16>((u32x16)v);
        const i32x16 wide = convert<i32x16>(vector_of<i8x16>(bytes));
        const u32x16 wide_half = convert<u32x16>(vector_of<u16x16>(halves));
        for (int i = 0; i < LANES; i++) {
            check(floats[i] == float(whole[i]), "integer to float", whole[i]);
            check(low[i] == int8_t(whole[i]) && unsigned_low[i] == uint8_t(whole[i]), "integer to byte", whole[i]);
            check(half[i] == uint16_t(whole[i]), "integer to 16 bits", whole[i]);
            check(wide[i] == bytes[i] && wide_half[i] == halves[i], "to a wider integer", i);
        }
    }
}

inline void test_reductions() {
    Random random(3);
    for (int round = 0; round < 200; round++) {
        float x[LANES], sums[LANES];
        for (float& one : x) one = random_float(random, 8);
        if (round % 5 == 0) x[random.below(LANES)] = random.below(2) ? INFINITY : -INFINITY;
        float top = x[0];
        for (float one : x) top = max_of(top, one);
        std::memcpy(sums, x, sizeof x);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) sums[i] += sums[i + half];
        const f32x16 v = vector_of<f32x16>(x);
        check(sum(v) == sums[0], "sum, in its order", sum(v) - sums[0]);
        check(reduce_max(v) == top, "maximum", top);
        check(max_of(v, splat(0))[5] == max_of(x[5], 0.0f), "maximum of two", x[5]);
    }
}

inline void test_exp2() {
    for (float first = -126; first < 127; first += 0.37f) {
        float x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = std::fmin(first + float(i) / 40, 127.0f);
        const f32x16 found = exp2_of(vector_of<f32x16>(x)), rough = exp2_of<4>(vector_of<f32x16>(x));
        for (int i = 0; i < LANES; i++) {
            const double right = std::exp2(double(x[i]));
            check(std::fabs(found[i] - right) <= 2.5e-7 * right, "exp2", x[i]);
            check(std::fabs(rough[i] - right) <= 4.5e-6 * right, "rough exp2", x[i]);
        }
    }
    for (float low : {-126.01f, -1000.0f, -3e38f, -INFINITY}) check(exp2_of(splat(low))[3] == 0, "exp2 of small numbers", low);
}

inline void test_bfloat16() {
    Random random(4);
    for (int round = 0; round < 2000; round++) {
        float x[LANES];
        for (int i = 0; i < LANES; i++) {
            uint32_t bits = random.word();
            if (random.below(3) == 0) bits = (bits & 0xFFFF0000u) | 0x8000u;  // a tie
            if (std::fabs(as_float(bits)) < 1e-37f) bits |= 0x40000000u;      // some machines have no denormal numbers
            x[i] = as_float(bits);
        }
        if (round % 7 == 0) x[round % LANES] = round % 2 ? INFINITY : -INFINITY;
        if (round % 11 == 0) x[round % LANES] = as_float(0x7F800001u);  // its upper half alone would be infinity
        const u16x16 narrow = to_bf16(vector_of<f32x16>(x));
        const f32x16 wide = from_bf16(narrow);
        for (int i = 0; i < LANES; i++) {
            check(x[i] == x[i] ? narrow[i] == to_bf16(x[i]) : wide[i] != wide[i], "to bfloat16", x[i]);
            check(as_bits(wide[i]) == uint32_t(narrow[i]) << 16, "from bfloat16", x[i]);
        }
    }
}

inline void test_dot_pairs() {
    Random random(5);
    for (int round = 0; round < 500; round++) {
        float sums[LANES];
        uint32_t columns[LANES];
        const auto half = [&] { return uint32_t(to_bf16(random_float(random, 6))); };
        for (int i = 0; i < LANES; i++) sums[i] = random_float(random, 8), columns[i] = half() | half() << 16;
        const uint32_t row = half() | half() << 16;
        const f32x16 found = dot_pairs(vector_of<f32x16>(sums), vector_of<u32x16>(columns), row);
        for (int i = 0; i < LANES; i++) {
            const double low = double(as_float(row << 16)) * as_float(columns[i] << 16);
            const double high = double(as_float(row & 0xFFFF0000u)) * as_float(columns[i] & 0xFFFF0000u);
            const double most = std::fabs(low) + std::fabs(high) + std::fabs(sums[i]);
            check(std::fabs(found[i] - (low + high + sums[i])) <= most * std::ldexp(1, -22), "product of pairs", i);
        }
    }
    volatile uint32_t one = 0x3F80;  // GCC 12 takes a constant bfloat16 for a float16 on ARM
    const uint32_t infinity = 0x7F80, nan = 0x7FC0;
    const u32x16 ones = u32x16{} + one * 0x10001u;
    check(dot_pairs(splat(1), ones, infinity)[9] == INFINITY, "product with infinity");
    check(dot_pairs(splat(1), ones, infinity << 16)[9] == INFINITY, "product with infinity");
    check(std::isnan(dot_pairs(splat(1), ones, nan)[9]), "product with NaN");
    check(std::isnan(dot_pairs(splat(-INFINITY), ones, infinity)[9]), "sum of infinities");
    check(std::isnan(dot_pairs(splat(1), u32x16{}, infinity)[9]), "infinity by zero");
}

inline void test_dots_of_bytes() {
    Random random(6);
    for (int round = 0; round < 2000; round++) {
        uint32_t columns[LANES];
        int32_t sums[LANES];
        const auto word = [&] {
            static constexpr uint32_t EXTREMES[] = {0, 0xFFFFFFFFu, 0x80808080u, 0x7F7F7F7Fu};
            return random.below(4) ? random.word() : EXTREMES[random.below(4)];
        };
        const uint32_t row = word();
        for (int i = 0; i < LANES; i++) columns[i] = word(), sums[i] = int32_t(random.word()) / 4;
        const i32x16 acc = vector_of<i32x16>(sums);
        const u32x16 b = vector_of<u32x16>(columns);
        const i32x16 signed_row = dot_quads(acc, b, row), unsigned_row = dot_quads_unsigned(acc, b, row);
        const i32x16 small = dot_small_quads(acc, b & 0x0F0F0F0Fu, row);
        for (int i = 0; i < LANES; i++) {
            int32_t right = sums[i], right_unsigned = sums[i], right_small = sums[i];
            for (int bit = 0; bit < 32; bit += 8) {
                const int a = row >> bit & 255, c = columns[i] >> bit & 255;
                right += c * int8_t(a);
                right_unsigned += int8_t(c) * a;
                right_small += (c & 15) * int8_t(a);
            }
            check(signed_row[i] == right, "bytes by a signed row", right);
            check(unsigned_row[i] == right_unsigned, "bytes by an unsigned row", right_unsigned);
            check(small[i] == right_small, "small bytes by a signed row", right_small);
        }
    }
}

inline void test_quantize() {
    Random random(7);
    float x[64];
    int8_t out[64];
    for (int round = 0; round < 100; round++) {
        for (float& one : x) one = random_float(random, 5);
        float scale = 0;
        const int32_t found = quantize(x, 64, out, &scale);
        int32_t all = 0, largest = 0;
        for (int i = 0; i < 64; i++) {
            all += out[i];
            largest = std::abs(out[i]) > largest ? std::abs(out[i]) : largest;
            check(std::fabs(x[i] - float(out[i]) * scale) <= 0.501f * scale, "quantized number", x[i]);
        }
        check(found == all && largest == 127, "sum of quantized numbers", found);
    }
}

inline void test_primitives() {
    test_lanes();
    test_conversions();
    test_reductions();
    test_exp2();
    test_bfloat16();
    test_dot_pairs();
    test_dots_of_bytes();
    test_quantize();
}
