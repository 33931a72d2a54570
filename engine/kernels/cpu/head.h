// The choice of tokens: the vocabulary is gone through once, one pair of panels after the other, and no logits are written.
//
// Of each pair a sample keeps its highest logit and the sum of what its tokens weigh against that. A draw goes by inverse
// CDF over the ids: first to the pair, whose logits are computed once more, then to the token.
#pragma once

#include <cmath>
#include <vector>

#include "buffer.h"
#include "linear.h"

constexpr float LEAST_TEMPERATURE = 1e-6f;  // below it float32 can't tell the likeliest token from greedy

// Of each pair of panels the highest logit, its column (the first one where several are), and the weight of all.
struct Weigh {
    float* value;  // [pairs, rows]
    int32_t* column;
    float* weight;
    const float* rate;  // [rows], log2(e) / temperature; 0: the likeliest token is taken
    long rows;
    long outputs;

    void operator()(const Tile& t) const {
        const int columns = int(outputs - t.column < t.columns ? outputs - t.column : t.columns);
        const long at = t.column / WIDTH * rows + t.first;
        for (int r = 0; r < t.rows; r++) {
            const float* row = t.at + r * WIDTH;
            const f32x16 low = known(row, columns), high = known(row + LANES, columns - LANES);
            const float top = highest(max_of(low, high));
            i32x16 where = select(high == splat(top), lane_numbers() + LANES, i32x16{} + (columns - 1));
            where = select(low == splat(top), lane_numbers(), where);
            value[at + r] = top;
            column[at + r] = int32_t(t.column) - int32_t(highest(-convert<f32x16>(where)));
            const float speed = rate[t.first + r];
            if (speed == 0) continue;
            f32x16 sums{};
            for (int c = 0; c < columns; c += LANES) sums += weights(row + c, columns - c, top, speed);
            weight[at + r] = sum(sums);
        }
    }

    // The first `count` of 16 logits, nothing behind them.
    static f32x16 known(const float* logits, int count) {
        const f32x16 all = load<f32x16>(logits);
        return count < LANES ? select(lane_numbers() < count, all, splat(-INFINITY)) : all;
    }

    // Of up to 16 logits: what they weigh against `top`, which weighs 1.
    static f32x16 weights(const float* logits, int count, float top, float speed) {
        const f32x16 weight = exp2_of((load<f32x16>(logits) - top) * speed);
        return count < LANES ? select(lane_numbers() < count, weight, f32x16{}) : weight;
    }
};

// Of all pairs, for each sample; see AnyStack::best.
struct Best {
    float* top;
    int32_t* token;
    double* weight;
};

template <class H> class Head {
  public:
    explicit Head(const Linear& w) : w_(w), pairs_(ceil_div(ceil_div(w.outputs, LANES), PANELS)) {}

    // x: hidden states, a row a sample; temperatures, numbers: see Stack::choose.
    void begin(const Rows& x, long samples, const float* temperatures, const double* numbers) {
        x_ = x;
        samples_ = samples;
        numbers_ = numbers;
        value_.take(pairs_ * samples);
        column_.take(pairs_ * samples);
        weight_.take(pairs_ * samples);
        rate_.take(samples);
        for (long s = 0; s < samples; s++) {
            const float temperature = temperatures[s];
            const float least = temperature < LEAST_TEMPERATURE ? LEAST_TEMPERATURE : temperature;
            rate_.get()[s] = temperature > 0 ? 1.44269504f / least : 0.0f;
        }
    }

    void take(const double* numbers) { numbers_ = numbers; }

    // Ops: all threads of the team call each, with a barrier between them.
    void weigh(Team& team) const {
        const Weigh weigh{value_.get(), column_.get(), weight_.get(), rate_.get(), samples_, w_.outputs};
        linear<H>(team, w_, x_, samples_, weigh);
    }

    void pick(Team& team, int32_t* out) const {
        std::vector<float> shares(pairs_);
        for (long s; (s = team.next()) < samples_;) {
            const long best = likeliest(s);
            out[s] = rate_.get()[s] > 0 ? draw(s, value_.get()[best], shares.data()) : column_.get()[best];
        }
    }

    void best(Team& team, const Best& out) const {
        std::vector<float> shares(pairs_);
        for (long s; (s = team.next()) < samples_;) {
            const long at = likeliest(s);
            out.top[s] = value_.get()[at];
            out.token[s] = column_.get()[at];
            out.weight[s] = rate_.get()[s] > 0 ? share_out(s, out.top[s], shares.data()) : 0;
        }
    }

  private:
    // Where the highest logit of a sample is.
    long likeliest(long s) const {
        long best = s;
        for (long at = s; at < pairs_ * samples_; at += samples_)
            if (value_.get()[at] > value_.get()[best]) best = at;
        return best;
    }

    // What the tokens of each pair weigh; returns what all do.
    double share_out(long s, float top, float* shares) const {
        const float speed = rate_.get()[s];
        double total = 0;
        for (long p = 0; p < pairs_; p += LANES) {
            const int count = int(pairs_ - p < LANES ? pairs_ - p : LANES);
            float value[LANES] = {}, weight[LANES] = {};
            for (int i = 0; i < count; i++) {
                value[i] = value_.get()[(p + i) * samples_ + s];
                weight[i] = weight_.get()[(p + i) * samples_ + s];
            }
            const f32x16 share = load<f32x16>(weight) * exp2_of((load<f32x16>(value) - top) * speed);
            for (int i = 0; i < count; i++) total += shares[p + i] = share[i];
        }
        return total;
    }

    int32_t draw(long s, float top, float* shares) const {
        const double target = numbers_[s] * share_out(s, top, shares);
        double before = 0, start = 0;
        long pair = 0;
        for (long p = 0; p < pairs_; p++) {  // rounding must not lead past the last one that can be drawn
            if (shares[p] == 0) continue;
            pair = p;
            start = before;
            before += shares[p];
            if (before > target) break;
        }
        return in_pair(s, pair, target - start, top);
    }

    int32_t in_pair(long s, long pair, double target, float top) const {
        const long panel = pair * PANELS, column = panel * LANES;
        const int columns = int(w_.outputs - column < WIDTH ? w_.outputs - column : WIDTH);
        alignas(64) float logits[WIDTH] = {};
        Tiles tiles;
        product<H>(tiles, w_, panels_of<H>(w_, panel), x_.from(s), 1, panel, int(ceil_div(columns, LANES)), logits);
        if (w_.bias) add_bias(w_.bias, {s, 1, column, int(round_up(columns, LANES)), logits});
        double before = 0;
        int32_t last = column_.get()[pair * samples_ + s];
        for (int c = 0; c < columns; c += LANES) {
            const f32x16 weight = Weigh::weights(logits + c, columns - c, top, rate_.get()[s]);
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
    Rows x_{};
    long samples_ = 0;
    const double* numbers_ = nullptr;
    Buffer<float> value_, weight_, rate_;
    Buffer<int32_t> column_;
};
