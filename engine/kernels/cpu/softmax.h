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
    const Layer& layer, const Queries& tile, const QueryRows& queries, int span, int tokens, const Scores& scores,
    float* probs, Accumulator& acc
) const {
    const float factor = shape_.scaling * 1.44269504f;  // weights are powers of two
    for (int r = 0; r < queries.rows; r++) {
        const int position = tile.position + r / queries.group;
        const int oldest = layer.window ? position - layer.window : -1;
        f32x16 score[SPAN / LANES], top = splat(NO_SCORE);
        for (int t = 0; t < tokens; t += LANES) {
            f32x16 s = load<f32x16>(&scores[r][t]) * factor;
            const int first = span + t;
            if (first + LANES - 1 > position) s = select(lane_numbers() > position - first, splat(MASKED), s);
            if (first <= oldest) s = select(lane_numbers() <= oldest - first, splat(MASKED), s);
            score[t / LANES] = s;
            top = max_of(top, s);
        }
        const float before = acc.top[r], now = max_of(before, reduce_max(top));
        f32x16 weight{};
        for (int t = 0; t < tokens; t += LANES) {
            const f32x16 prob = exp2_of(score[t / LANES] - now);
            weight += prob;
            store(probs + r * SPAN + t, prob);
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
