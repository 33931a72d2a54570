// Chooses tokens in one pass over the vocabulary, pair of panels by pair, without storing logits.
//
// For each pair a sample keeps the highest logit and the sum of its tokens' weights exp((logit - highest) / temperature). A
// token is drawn by inverse CDF over the ids: first the pair, whose logits are computed again, then the token in it.
//
// Example: 64 tokens are two pairs of 32. Temperature 1; highest logits 5 (token 7) and 4 (token 40), sums of weights 1.5
// and 2. Relative to the highest logit of all, 5, the pairs weigh 1.5 and 2 * exp(4 - 5) = 0.74. The greedy token is 7. The
// number 0.8 has its target at 0.8 * 2.24 = 1.79: beyond the first pair, so the second one's logits are computed again, and
// its tokens' weights are added from 1.5 on until they exceed 1.79.
//
// A pair has as many tokens as a word has bits, so the tokens that a sample may choose are a word for each pair. Every
// sample has such words, those without a mask all the same one: nothing is decided in the loop over tokens.
#pragma once

#include <cmath>
#include <vector>

#include "buffer.h"
#include "linear.h"
#include "spec.h"

static_assert(WIDTH == 32);

constexpr uint32_t ALL_TOKENS = ~0u;
constexpr float MIN_TEMPERATURE = 1e-6f;  // below it float32 gives all weight to the greedy token

// The tokens that a sample may choose.
struct Allowed {
    const uint32_t* words;
    long step;  // 0: one word for all pairs

    uint32_t of(long pair) const { return words[pair * step]; }
};

// A bit for each of a pair's tokens, from token `column` on, that is in the vocabulary.
INLINE uint32_t existing(long outputs, long column) {
    return outputs - column < WIDTH ? (1u << (outputs - column)) - 1 : ALL_TOKENS;
}

// Per pair of panels and row, over the tokens that the row may choose: the highest logit, its column (the first of equals),
// and the sum of weights.
struct Weigh {
    float* value;  // [pairs, rows]
    int32_t* column;
    float* weight;
    const float* scale;  // [rows], log2(e) / temperature; 0: greedy
    const Allowed* allowed;  // [rows]
    long rows;
    long outputs;

    void operator()(const Tile& t) const {
        const long pair = t.column / WIDTH, at = pair * rows + t.first;
        const int last = int(outputs - t.column < WIDTH ? outputs - t.column : WIDTH) - 1;
        const uint32_t inside = existing(outputs, t.column);
        for (int r = 0; r < t.rows; r++) {
            const float* row = t.at + r * WIDTH;
            const uint32_t bits = allowed[t.first + r].of(pair) & inside;
            const f32x16 low = among(bits, row), high = among(bits >> LANES, row + LANES);
            const float top = reduce_max(max_of(low, high));
            i32x16 where = select(high == splat(top), lane_numbers() + LANES, i32x16{} + last);
            where = select(low == splat(top), lane_numbers(), where);
            value[at + r] = top;
            column[at + r] = int32_t(t.column) - int32_t(reduce_max(-convert<f32x16>(where)));
            const float row_scale = scale[t.first + r];
            if (row_scale == 0) continue;
            weight[at + r] = sum(weights(bits, row, top, row_scale) + weights(bits >> LANES, row + LANES, top, row_scale));
        }
    }

    // The logits of the tokens whose bits are set; the others are -inf.
    static f32x16 among(uint32_t bits, const float* logits) {
        return select(lanes_of(bits), load<f32x16>(logits), splat(-INFINITY));
    }

    // Weights of the tokens whose bits are set, relative to a logit `top`, which weighs 1; the others weigh 0.
    static f32x16 weights(uint32_t bits, const float* logits, float top, float scale) {
        return select(lanes_of(bits), exp2_of((load<f32x16>(logits) - top) * scale), f32x16{});
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

    // x: hidden states, one row per sample; temperatures, uniforms, masks: see AnyStack::choose. All ops read the masks.
    void begin(
        const Activations& x, long samples, const float* temperatures, const double* uniforms, const Masks* masks
    ) {
        x_ = x;
        samples_ = samples;
        uniforms_ = uniforms;
        value_.take(pairs_ * samples);
        column_.take(pairs_ * samples);
        weight_.take(pairs_ * samples);
        scale_.take(samples);
        allowed_.take(samples);
        for (long s = 0; s < samples; s++) {
            const float temperature = temperatures[s];
            const float clamped = temperature < MIN_TEMPERATURE ? MIN_TEMPERATURE : temperature;
            scale_.get()[s] = temperature > 0 ? 1.44269504f / clamped : 0.0f;
            allowed_.get()[s] = {&ALL_TOKENS, 0};
            if (masks && masks->of[s] >= 0) allowed_.get()[s] = {masks->words + long(masks->of[s]) * masks->stride, 1};
        }
    }

    void take(const double* uniforms) { uniforms_ = uniforms; }

    // Ops: all threads of the team call each one.
    void weigh(Team& team) const {
        const Weigh weigh{value_.get(), column_.get(), weight_.get(), scale_.get(), allowed_.get(), samples_, w_.outputs};
        linear<H>(team, w_, x_, samples_, weigh);
    }

    void pick(Team& team, int32_t* out) const {
        std::vector<float> weights(pairs_);
        team.all(samples_, [&](long s) {
            const long greedy = greedy_pair(s);
            out[s] = scale_.get()[s] > 0 ? draw(s, value_.get()[greedy], weights.data()) : column_.get()[greedy];
        });
    }

    void greedy(Team& team, const Greedy& out) const {
        std::vector<float> weights(pairs_);
        team.all(samples_, [&](long s) {
            const long at = greedy_pair(s);
            out.top[s] = value_.get()[at];
            out.token[s] = column_.get()[at];
            out.weight[s] = scale_.get()[s] > 0 ? pair_weights(s, out.top[s], weights.data()) : 0;
        });
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
        product<H>(tiles, w_, panels_of<H>(w_, panel, panel), x_.from(s), 1, panel, int(ceil_div(columns, LANES)), logits);
        if (w_.bias) add_bias(w_.bias, {s, 1, column, int(round_up(columns, LANES)), logits});
        double before = 0;
        int32_t last = column_.get()[pair * samples_ + s];
        const uint32_t bits = allowed_.get()[s].of(pair) & existing(w_.outputs, column);
        for (int c = 0; c < columns; c += LANES) {
            const f32x16 weight = Weigh::weights(bits >> c, logits + c, top, scale_.get()[s]);
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
    Buffer<Allowed> allowed_;
};
