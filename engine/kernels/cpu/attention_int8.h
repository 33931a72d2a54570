// Attention on an int8 cache: what attention.h declares and does not define.
#pragma once

#include "attention.h"

template <class T>
inline void Attention<T>::dequantize_scores(const QueryRows& queries, const float* scales, float* scores) {
    const f32x16 scale = load<f32x16>(scales);
    for (int r = 0; r < queries.rows; r++) {
        const i32x16 integers = load<i32x16>(scores + r * SPAN) + queries.offsets[r];
        store(scores + r * SPAN, convert<f32x16>(integers) * (scale * queries.scales[r]));
    }
}

template <class T>
inline void Attention<T>::accumulate_int8(
    int rows, int tokens, const Span& span, const Span& next, const float* probs, Accumulator& acc
) {
    alignas(64) uint8_t integers[ROWS * SPAN];
    alignas(64) int32_t products[ROWS][OUT_STRIDE];
    float steps[ROWS];
    f32x16 scales[SPAN / LANES];
    for (int p = 0; p < SPAN / LANES; p++) {
        // Beyond the row's end there may be leftovers of another row.
        const int known = tokens - p * LANES;
        scales[p] = p < span.panels ? load<f32x16>(span.value_scales[p]) : f32x16{};
        if (known < LANES) scales[p] = select(lane_numbers() < known, scales[p], f32x16{});
    }
    for (int r = 0; r < rows; r++) {
        f32x16 top{};
        for (int p = 0; p < SPAN / LANES; p++)
            top = max_of(top, load<f32x16>(probs + r * SPAN + p * LANES) * scales[p]);
        const float largest = reduce_max(top), factor = largest > 0 ? 255.0f / largest : 0.0f;
        steps[r] = largest / 255.0f;
        for (int p = 0; p < SPAN / LANES; p++) {
            const f32x16 prob = load<f32x16>(probs + r * SPAN + p * LANES) * scales[p] * factor;
            const u32x16 rounded = (u32x16)(prob + 12582912.0f) & 255u;  // see exp2_of
            store(integers + r * SPAN + p * LANES, convert<u8x16>(rounded));
        }
    }
    multiply_values(rows, integers, span, next, products[0]);
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < shape_.head_dim; d += LANES) {
            float* to = &acc.out[r][d];
            const f32x16 more = convert<f32x16>(load<i32x16>(&products[r][d]));
            store(to, load<f32x16>(to) + more * steps[r]);
        }
}
