// The online softmax of attention, as in FlashAttention: scores arrive in spans, and no score is kept.
#pragma once

#include <cstring>

#include "micro.h"

constexpr int MAX_HEAD_DIM = 256;  // elements per head
constexpr float MASKED = -3e38f, NO_SCORE = -1e30f;

// For each row: highest score, sum of weights relative to it, weighted sum of values.
struct Accumulator {
    float top[MAX_ROWS];
    float weight[MAX_ROWS];
    alignas(64) float out[MAX_ROWS][MAX_HEAD_DIM];

    void clear(int rows, int dim) {
        for (int r = 0; r < rows; r++) {
            top[r] = NO_SCORE;
            weight[r] = 0;
            std::memset(out[r], 0, dim * sizeof(float));
        }
    }

    // Adds another part of the same rows' tokens.
    void merge(const Accumulator& part, int rows, int dim) {
        for (int r = 0; r < rows; r++) {
            const float highest = max_of(top[r], part.top[r]);
            const f32x16 old = exp2_of(splat(top[r] - highest)), fresh = exp2_of(splat(part.top[r] - highest));
            top[r] = highest;
            weight[r] = weight[r] * old[0] + part.weight[r] * fresh[0];
            for (int d = 0; d < dim; d += LANES)
                store(&out[r][d], load<f32x16>(&out[r][d]) * old + load<f32x16>(&part.out[r][d]) * fresh);
        }
    }
};
