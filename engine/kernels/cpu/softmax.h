// The online softmax of Attention: what attention.h declares and does not define.
#pragma once

#include <cstring>

#include "attention.h"

template <class T>
inline void Attention<T>::clear(Accumulator& acc, int rows) const {
    for (int r = 0; r < rows; r++) {
        acc.top[r] = NO_SCORE;
        acc.weight[r] = 0;
        std::memset(acc.out[r], 0, shape_.head_dim * sizeof(float));
    }
}

template <class T>
inline void Attention<T>::weigh(
    const Layer& layer, const Work& work, const QueryRows& queries, int first, Scores& scores, Weight* weights,
    Accumulator& acc
) const {
    constexpr int DEGREE = std::is_same_v<T, F32> ? 6 : 4;
    const float factor = shape_.scaling * 1.44269504f;  // weights are powers of two
    float tops[ROWS];
    // Rows in two passes: a row's weights need its highest score, which takes a chain of shuffles.
    for (int r = 0; r < queries.rows; r++) {
        const int position = work.tile().position + r / queries.group - first;  // within the span
        const int oldest = layer.window ? position - layer.window : -1;
        f32x16 top = splat(NO_SCORE);
#pragma GCC unroll 8
        for (int t = 0; t < SPAN; t += LANES) {
            f32x16 s = load<f32x16>(&scores[r][t]);
            if (t + LANES - 1 > position) store(&scores[r][t], s = select(lane_numbers() > position - t, splat(MASKED), s));
            if (t <= oldest) store(&scores[r][t], s = select(lane_numbers() <= oldest - t, splat(MASKED), s));
            top = max_of(top, s);
        }
        tops[r] = max_of(acc.top[r], reduce_max(top) * factor);
    }
    for (int r = 0; r < queries.rows; r++) {
        const float before = acc.top[r], now = tops[r];
        f32x16 weight{};
#pragma GCC unroll 8
        for (int t = 0; t < SPAN; t += LANES) {
            const f32x16 prob = exp2_of<DEGREE>(load<f32x16>(&scores[r][t]) * factor - now);
            weight += prob;
            if constexpr (T::QUANTIZED)
                store(weights + r * SPAN + t, prob);
            else
                T::narrow(weights + r * SPAN + t, prob);
        }
        if (now > before) {
            const f32x16 rescale = exp2_of(splat(before - now));
            acc.top[r] = now;
            acc.weight[r] *= rescale[0];
            for (int d = 0; d < shape_.head_dim; d += LANES) {
                float* out = &acc.out[r][d];
                store(out, load<f32x16>(out) * rescale);
            }
        }
        acc.weight[r] += sum(weight);
    }
}

template <class T>
inline void Attention<T>::merge(Accumulator& acc, const Accumulator& part, int rows) const {
    for (int r = 0; r < rows; r++) {
        const float top = max_of(acc.top[r], part.top[r]);
        const f32x16 old = exp2_of(splat(acc.top[r] - top)), fresh = exp2_of(splat(part.top[r] - top));
        acc.top[r] = top;
        acc.weight[r] = acc.weight[r] * old[0] + part.weight[r] * fresh[0];
        for (int d = 0; d < shape_.head_dim; d += LANES) {
            float* out = &acc.out[r][d];
            store(out, load<f32x16>(out) * old + load<f32x16>(&part.out[r][d]) * fresh);
        }
    }
}
