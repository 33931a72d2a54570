// Chooses tokens in one pass over the vocabulary, pair of panels by pair, without storing logits.
//
// For each pair a sample keeps the highest logit and the sum of its tokens' weights exp((logit - highest) / temperature). A
// token is drawn by inverse CDF over the ids: first the pair, whose logits are computed again, then the token in it.
//
// Example: 64 tokens are two pairs of 32. Temperature 1; highest logits 5 (token 7) and 4 (token 40), sums of weights 1.5
// and 2. Relative to the highest logit of all, 5, the pairs weigh 1.5 and 2 * exp(4 - 5) = 0.74. The greedy token is 7. The
// number 0.8 has its target at 0.8 * 2.24 = 1.79: beyond the first pair, so the second one's logits are computed again, and
// its tokens' weights are added from 1.5 on until they exceed 1.79.
#pragma once

#include <cmath>
#include <vector>

#include "buffer.h"
#include "linear.h"

constexpr float MIN_TEMPERATURE = 1e-6f;  // below it float32 gives all weight to the greedy token

// Per pair of panels and row: the highest logit, its column (the first of equals), and the sum of weights.
struct Weigh {
    float* value;  // [pairs, rows]
    int32_t* column;
    float* weight;
    const float* scale;  // [rows], log2(e) / temperature; 0: greedy
    long rows;
    long outputs;

    void operator()(const Tile& t) const {
        const int columns = int(outputs - t.column < t.columns ? outputs - t.column : t.columns);
        const long at = t.column / WIDTH * rows + t.first;
        for (int r = 0; r < t.rows; r++) {
            const float* row = t.at + r * WIDTH;
            const f32x16 low = valid(row, columns), high = valid(row + LANES, columns - LANES);
            const float top = reduce_max(max_of(low, high));
            i32x16 where = select(high == splat(top), lane_numbers() + LANES, i32x16{} + (columns - 1));
            where = select(low == splat(top), lane_numbers(), where);
            value[at + r] = top;
            column[at + r] = int32_t(t.column) - int32_t(reduce_max(-convert<f32x16>(where)));
            const float row_scale = scale[t.first + r];
            if (row_scale == 0) continue;
            f32x16 sums{};
            for (int c = 0; c < columns; c += LANES) sums += weights(row + c, columns - c, top, row_scale);
            weight[at + r] = sum(sums);
        }
    }

    // The first `count` of 16 logits; the others are -inf.
    static f32x16 valid(const float* logits, int count) {
        const f32x16 all = load<f32x16>(logits);
        return count < LANES ? select(lane_numbers() < count, all, splat(-INFINITY)) : all;
    }

    // Weights of up to 16 logits relative to `top`, which weighs 1.
    static f32x16 weights(const float* logits, int count, float top, float scale) {
        const f32x16 weight = exp2_of((load<f32x16>(logits) - top) * scale);
        return count < LANES ? select(lane_numbers() < count, weight, f32x16{}) : weight;
    }
};

// Over all pairs, for each sample; see AnyStack::greedy.
struct Greedy {
    float* top;
    int32_t* token;
    double* weight;
};

template <class H> class Head {
  public:
    explicit Head(const Linear& w) : w_(w), pairs_(ceil_div(ceil_div(w.outputs, LANES), PANELS)) {}

    // x: hidden states, one row per sample; temperatures, uniforms: see AnyStack::choose.
    void begin(const Activations& x, long samples, const float* temperatures, const double* uniforms) {
        x_ = x;
        samples_ = samples;
        uniforms_ = uniforms;
        value_.take(pairs_ * samples);
        column_.take(pairs_ * samples);
        weight_.take(pairs_ * samples);
        scale_.take(samples);
        for (long s = 0; s < samples; s++) {
            const float temperature = temperatures[s];
            const float clamped = temperature < MIN_TEMPERATURE ? MIN_TEMPERATURE : temperature;
            scale_.get()[s] = temperature > 0 ? 1.44269504f / clamped : 0.0f;
        }
    }

    void take(const double* uniforms) { uniforms_ = uniforms; }

    // Ops: all threads of the team call each one, with a barrier in between.
    void weigh(Team& team) const {
        const Weigh weigh{value_.get(), column_.get(), weight_.get(), scale_.get(), samples_, w_.outputs};
        linear<H>(team, w_, x_, samples_, weigh);
    }

    void pick(Team& team, int32_t* out) const {
        std::vector<float> weights(pairs_);
        for (long s; (s = team.next()) < samples_;) {
            const long greedy = greedy_pair(s);
            out[s] = scale_.get()[s] > 0 ? draw(s, value_.get()[greedy], weights.data()) : column_.get()[greedy];
        }
    }

    void greedy(Team& team, const Greedy& out) const {
        std::vector<float> weights(pairs_);
        for (long s; (s = team.next()) < samples_;) {
            const long at = greedy_pair(s);
            out.top[s] = value_.get()[at];
            out.token[s] = column_.get()[at];
            out.weight[s] = scale_.get()[s] > 0 ? pair_weights(s, out.top[s], weights.data()) : 0;
        }
    }

  private:
    // The index of the pair with a sample's highest logit.
    long greedy_pair(long s) const {
        long greedy = s;
        for (long at = s; at < pairs_ * samples_; at += samples_)
            if (value_.get()[at] > value_.get()[greedy]) greedy = at;
        return greedy;
    }

    // The weight of each pair relative to `top`; returns their sum.
    double pair_weights(long s, float top, float* weights) const {
        const float scale = scale_.get()[s];
        double total = 0;
        for (long p = 0; p < pairs_; p += LANES) {
            const int count = int(pairs_ - p < LANES ? pairs_ - p : LANES);
            float value[LANES] = {}, weight[LANES] = {};
            for (int i = 0; i < count; i++) {
                value[i] = value_.get()[(p + i) * samples_ + s];
                weight[i] = weight_.get()[(p + i) * samples_ + s];
            }
            const f32x16 share = load<f32x16>(weight) * exp2_of((load<f32x16>(value) - top) * scale);
            for (int i = 0; i < count; i++) total += weights[p + i] = share[i];
        }
        return total;
    }

    int32_t draw(long s, float top, float* weights) const {
        const double target = uniforms_[s] * pair_weights(s, top, weights);
        double before = 0, start = 0;
        long pair = 0;
        for (long p = 0; p < pairs_; p++) {  // rounding must not lead past the last pair with a weight
            if (weights[p] == 0) continue;
            pair = p;
            start = before;
            before += weights[p];
            if (before > target) break;
        }
        return draw_in_pair(s, pair, target - start, top);
    }

    int32_t draw_in_pair(long s, long pair, double target, float top) const {
        const long panel = pair * PANELS, column = panel * LANES;
        const int columns = int(w_.outputs - column < WIDTH ? w_.outputs - column : WIDTH);
        alignas(64) float logits[WIDTH] = {};
        Tiles tiles;
        product<H>(tiles, w_, panels_of<H>(w_, panel), x_.from(s), 1, panel, int(ceil_div(columns, LANES)), logits);
        if (w_.bias) add_bias(w_.bias, {s, 1, column, int(round_up(columns, LANES)), logits});
        double before = 0;
        int32_t last = column_.get()[pair * samples_ + s];
        for (int c = 0; c < columns; c += LANES) {
            const f32x16 weight = Weigh::weights(logits + c, columns - c, top, scale_.get()[s]);
            for (int i = 0; i < LANES; i++) {
                if (weight[i] == 0) continue;
                last = int32_t(column) + c + i;
                before += weight[i];
                if (before > target) return last;
            }
        }
        return last;
    }

    const Linear w_;
    const long pairs_;
    Activations x_{};
    long samples_ = 0;
    const double* uniforms_ = nullptr;
    Buffer<float> value_, weight_, scale_;
    Buffer<int32_t> column_;
};
