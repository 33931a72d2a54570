// Paged attention over a ragged batch: tiles of queries against a row's blocks of keys and values.
//
// A block of one kv head holds (see formats.h; E elements a unit, B tokens a block, D numbers a head)
//
//     keys:    panels of 16 tokens, D/E units each        values:  panels of 16 numbers, B/E units of tokens each
//
// and in int8 the scales of its tokens, so that scores and mixtures are products like any other. All query heads of a kv
// head are computed together: its keys and values are read once. The sum over a row's keys is cut at multiples of PART
// tokens, and parts are added in their order: a token's result has the same bits whether it is computed alone, in a
// batch or in a chunk.
#pragma once

#include <algorithm>

#include "batch.h"
#include "buffer.h"
#include "micro.h"
#include "team.h"

constexpr int PART = 512;  // tokens
constexpr int SPAN = 64;   // tokens scored at a time
constexpr int MOST_DIM = 256;  // numbers a head
constexpr float HIDDEN = -3e38f, NOTHING = -1e30f;

template <class T> class Attention {
  public:
    typedef typename T::Element Element;

    // query, mixed: [tokens, heads * D]; keys, values: a layer's cache. window: tokens that a query sees, 0 for all.
    // scales, offsets: [tokens, heads], of queries in int8 (offset: -OFFSET times the sum of the query).
    struct Layer {
        const Element* query;
        const float* scales;
        const int32_t* offsets;
        float* mixed;
        const uint32_t* keys;
        const uint32_t* values;
        int window;
    };

    // What is known of a tile's rows after some keys.
    struct Sums {
        float top[MOST_ROWS];
        float weight[MOST_ROWS];
        alignas(64) float mixed[MOST_ROWS][MOST_DIM];
    };

    // What is to be done in a step. Where that is little, but reaches far back, threads take parts of a context each.
    struct Plan {
        std::vector<Queries> tiles;
        int parts = 1;      // that the longest context is shared out in
        Buffer<Sums> sums;  // [work, parts], where there are several
    };

    Attention(const Shape& shape, const Ragged& batch) : shape_(shape), batch_(batch) {}

    // The tiles of a batch, those with the longest contexts of a row first.
    static void plan(const Shape& shape, const Ragged& batch, int threads, Plan& plan) {
        const int most = MOST_ROWS / shape.group() > 0 ? MOST_ROWS / shape.group() : 1;
        int longest = 0;
        plan.tiles.clear();
        for (int i = 0; i < batch.rows; i++)
            for (int done = batch.counts[i]; done > 0;) {
                const int count = done % most ? done % most : most;
                done -= count;
                plan.tiles.push_back({i, batch.starts[i] + done, count, batch.computed[i] + done});
                longest = std::max(longest, batch.computed[i] + done + count);
            }
        const long work = long(plan.tiles.size()) * shape.kv_heads * folds(shape);
        plan.parts = threads > 1 && work < 4 * threads ? int(ceil_div(longest, PART)) : 1;
        if (plan.parts > 1) plan.sums.take(work * plan.parts);
    }

    // One op: all threads of the team call it.
    void run(Team& team, const Layer& layer, Plan& plan) const {
        if (plan.parts > 1) return run_parts(team, layer, plan);
        const std::vector<Queries>& tiles = plan.tiles;
        const long tasks = long(tiles.size()) * shape_.kv_heads;
        // Where tasks are few, a thread that takes its next one early leaves another without.
        const bool early = tasks >= 8 * team.size();
        for (long task = team.next(), after; task < tasks; task = after) {
            if (early && (after = team.next()) < tasks)
                ask_for_first(layer, tiles[after / shape_.kv_heads], int(after % shape_.kv_heads));
            for (int fold = 0; fold < folds(shape_); fold++) whole(layer, work_of(tiles, task * folds(shape_) + fold));
            if (!early) after = team.next();
        }
    }

  private:
    typedef float Scores[MOST_ROWS][SPAN];

    // The queries of a tile, a row for each token and head of the group.
    struct Left {
        alignas(64) Element units[MOST_ROWS * MOST_DIM];
        float scales[MOST_ROWS];
        int32_t offsets[MOST_ROWS];
        int rows;
        int group;
    };

    // The queries of a tile that meet a kv head, or as many of them as fit: `group` query heads from `first_head` on.
    struct Work {
        const Queries& tile;
        int head;
        int first_head;
        int group;

        int rows() const { return tile.count * group; }
        int end() const { return tile.position + tile.count; }
    };

    static int folds(const Shape& shape) { return int(ceil_div(shape.group(), MOST_ROWS)); }

    Work work_of(const std::vector<Queries>& tiles, long number) const {
        const int fold = int(number % folds(shape_)), from = fold * MOST_ROWS;
        const long task = number / folds(shape_);
        const int head = int(task % shape_.kv_heads);
        return {tiles[task / shape_.kv_heads], head, head * shape_.group() + from, std::min(shape_.group() - from, MOST_ROWS)};
    }

    long units() const { return shape_.head_dim / T::PER_UNIT; }

    // The first token that the first query of a tile sees.
    static int begin(const Layer& layer, const Queries& tile) {
        return layer.window && tile.position >= layer.window ? tile.position - layer.window + 1 : 0;
    }

    const uint32_t* block(const uint32_t* cache, const Queries& tile, int head, int token) const {
        const int32_t* table = batch_.tables + long(tile.row) * batch_.table_width;
        return cache + shape_.block_at(table[token / shape_.block_size], head, T::PER_UNIT);
    }

    // The panel of 16 tokens that begins with `token`.
    const uint32_t* keys(const Layer& layer, const Queries& tile, int head, int token) const {
        return block(layer.keys, tile, head, token) + token % shape_.block_size * units();
    }

    // The first panel of numbers, from `token` on; the next ones follow at a distance of a block's 16 columns.
    const uint32_t* values(const Layer& layer, const Queries& tile, int head, int token) const {
        return block(layer.values, tile, head, token) + token % shape_.block_size / T::PER_UNIT * LANES;
    }

    // The first span's keys and values.
    void ask_for_first(const Layer& layer, const Queries& tile, int head) const {
        const int start = begin(layer, tile) / SPAN * SPAN, end = std::min(start + SPAN, tile.position + tile.count);
        const int run = std::min(shape_.block_size, SPAN);
        const long panel = long(shape_.block_size) / T::PER_UNIT * LANES;
        for (int t = start; t < end; t += LANES) prefetch(keys(layer, tile, head, t), LANES * units());
        for (int t = start; t < end; t += run)
            for (int d = 0; d < shape_.head_dim / LANES; d++)
                prefetch(values(layer, tile, head, t) + d * panel, run / T::PER_UNIT * LANES);
    }

    void run_parts(Team& team, const Layer& layer, Plan& plan) const {
        const long count = long(plan.tiles.size()) * shape_.kv_heads * folds(shape_);
        for (long task; (task = team.next()) < count * plan.parts;) {
            const Work work = work_of(plan.tiles, task / plan.parts);
            const int part = int(task % plan.parts);
            if (part < begin(layer, work.tile) / PART || part * PART >= work.end()) continue;
            Left left;
            gather(layer, work, left);
            sum_up(layer, work, left, part, plan.sums.get()[task]);
        }
        team.barrier();
        for (long number; (number = team.next()) < count;) {
            const Work work = work_of(plan.tiles, number);
            const int first = begin(layer, work.tile) / PART;
            Sums& sums = plan.sums.get()[number * plan.parts + first];
            for (int part = first + 1; part * PART < work.end(); part++)
                merge(sums, plan.sums.get()[number * plan.parts + part], work.rows());
            write(layer, work, sums);
        }
    }

    void whole(const Layer& layer, const Work& work) const {
        Left left;
        gather(layer, work, left);
        Sums sums, next;
        const int first = begin(layer, work.tile) / PART;
        sum_up(layer, work, left, first, sums);
        for (int part = first + 1; part * PART < work.end(); part++) {
            sum_up(layer, work, left, part, next);
            merge(sums, next, left.rows);
        }
        write(layer, work, sums);
    }

    void gather(const Layer& layer, const Work& work, Left& left) const {
        const int dim = shape_.head_dim;
        left.group = work.group;
        left.rows = work.rows();
        for (int t = 0; t < work.tile.count; t++) {
            const long first = (long(work.tile.first) + t) * shape_.heads + work.first_head;
            std::memcpy(left.units + t * left.group * dim, layer.query + first * dim, left.group * dim * sizeof(Element));
            for (int h = 0; T::QUANTISED && h < left.group; h++) {
                left.scales[t * left.group + h] = layer.scales[first + h];
                left.offsets[t * left.group + h] = layer.offsets[first + h];
            }
        }
    }

    // Of the PART tokens of that number those that the tile sees.
    void sum_up(const Layer& layer, const Work& work, const Left& left, int part, Sums& sums) const {
        clear(sums, left.rows);
        const int start = std::max(begin(layer, work.tile), part * PART), end = std::min(work.end(), (part + 1) * PART);
        for (int span = start / SPAN * SPAN; span < end; span += SPAN) attend(layer, work.tile, work.head, left, span, sums);
    }

    void write(const Layer& layer, const Work& work, const Sums& sums) const {
        for (int r = 0; r < work.rows(); r++) {
            const long first = (long(work.tile.first) + r / work.group) * shape_.heads + work.first_head;
            float* out = layer.mixed + (first + r % work.group) * shape_.head_dim;
            const f32x16 share = splat(1.0f / sums.weight[r]);
            for (int d = 0; d < shape_.head_dim; d += LANES)
                store(out + d, load<f32x16>(&sums.mixed[r][d]) * share);
        }
    }

    void clear(Sums& sums, int rows) const {
        for (int r = 0; r < rows; r++) {
            sums.top[r] = NOTHING;
            sums.weight[r] = 0;
            std::memset(sums.mixed[r], 0, shape_.head_dim * sizeof(float));
        }
    }

    // The tokens span .. span + SPAN of the row, as far as there are so many.
    void attend(const Layer& layer, const Queries& tile, int head, const Left& left, int span, Sums& sums) const {
        const int end = tile.position + tile.count, tokens = int(round_up(end - span < SPAN ? end - span : SPAN, LANES));
        alignas(64) Scores scores;
        alignas(64) float shares[MOST_ROWS * SPAN];
        for (int t = 0, panels; t < tokens; t += panels * LANES) {
            Panels b;
            panels = panels_at_once(left.rows, (tokens - t) / LANES);
            for (int p = 0; p < panels; p++) {
                const int token = span + t + p * LANES;
                b.at[p] = keys(layer, tile, head, token);
                b.next[p] = token + SPAN < end ? keys(layer, tile, head, token + SPAN) : b.at[p];
            }
            const auto query = reinterpret_cast<const uint32_t*>(left.units);
            if constexpr (T::QUANTISED) {
                multiply<C8::Keys>(left.rows, panels, query, units(), b, units(), &scores[0][t], SPAN);
                for (int p = 0; p < panels; p++)
                    unscale(left, block(layer.keys, tile, head, span + t + p * LANES), span + t + p * LANES,
                            &scores[0][t + p * LANES]);
            } else {
                multiply<T>(left.rows, panels, query, units(), b, units(), &scores[0][t], SPAN);
            }
        }
        weigh(layer, tile, left, span, tokens, scores, shares, sums);
        if constexpr (T::QUANTISED)
            mix_whole(layer, tile, head, left, span, tokens, shares, sums);
        else
            mix(layer, tile, head, left, span, tokens, shares, sums);
    }

    // Sums of whole numbers of 16 keys to the scores that they stand for.
    void unscale(const Left& left, const uint32_t* block, int token, float* scores) const {
        const f32x16 scale = load<f32x16>(shape_.scales(block) + token % shape_.block_size);
        for (int r = 0; r < left.rows; r++) {
            const i32x16 whole = load<i32x16>(scores + r * SPAN) + left.offsets[r];
            store(scores + r * SPAN, convert<f32x16>(whole) * (scale * left.scales[r]));
        }
    }

    // Add what the tokens' values have to say to the sums.
    void mix(
        const Layer& layer, const Queries& tile, int head, const Left& left, int span, int tokens, const float* shares,
        Sums& sums
    ) const {
        alignas(64) Element narrow[MOST_ROWS * SPAN];
        for (int r = 0; r < left.rows; r++)
            for (int t = 0; t < tokens; t += LANES) T::narrow(narrow + r * SPAN + t, load<f32x16>(shares + r * SPAN + t));
        each_run(layer, tile, head, left.rows, span, tokens, [&](int t, int length, int d, int panels, const Panels& b) {
            const auto a = reinterpret_cast<const uint32_t*>(narrow + t);
            multiply<T, true>(left.rows, panels, a, SPAN / T::PER_UNIT, b, length / T::PER_UNIT, &sums.mixed[0][d], MOST_DIM);
        });
    }

    // As `mix`, with shares that are whole numbers too: each row's largest is 255.
    void mix_whole(
        const Layer& layer, const Queries& tile, int head, const Left& left, int span, int tokens, const float* shares,
        Sums& sums
    ) const {
        alignas(64) uint8_t whole[MOST_ROWS * SPAN];
        alignas(64) int32_t mixed[MOST_ROWS][MOST_DIM];
        float steps[MOST_ROWS];
        f32x16 scales[SPAN / LANES];
        for (int t = 0; t < tokens; t += LANES) {
            const float* scale = shape_.scales(block(layer.values, tile, head, span + t));
            scales[t / LANES] = load<f32x16>(scale + (span + t) % shape_.block_size);
            // Behind the row's end may be what another row left.
            const int known = tile.position + tile.count - span - t;
            if (known < LANES) scales[t / LANES] = select(lane_numbers() < known, scales[t / LANES], f32x16{});
        }
        for (int r = 0; r < left.rows; r++) {
            f32x16 top{};
            for (int t = 0; t < tokens; t += LANES) top = max_of(top, load<f32x16>(shares + r * SPAN + t) * scales[t / LANES]);
            const float largest = highest(top), factor = largest > 0 ? 255.0f / largest : 0.0f;
            steps[r] = largest / 255.0f;
            for (int t = 0; t < tokens; t += LANES) {
                const f32x16 share = load<f32x16>(shares + r * SPAN + t) * scales[t / LANES] * factor;
                const u32x16 rounded = (u32x16)(share + 12582912.0f) & 255u;  // see exp2_of
                store(whole + r * SPAN + t, convert<u8x16>(rounded));
            }
        }
        each_run(layer, tile, head, left.rows, span, tokens, [&](int t, int length, int d, int panels, const Panels& b) {
            const auto a = reinterpret_cast<const uint32_t*>(whole + t);
            if (t == 0)
                multiply<C8::Values>(left.rows, panels, a, SPAN / 4, b, length / 4, &mixed[0][d], MOST_DIM);
            else
                multiply<C8::Values, true>(left.rows, panels, a, SPAN / 4, b, length / 4, &mixed[0][d], MOST_DIM);
        });
        for (int r = 0; r < left.rows; r++)
            for (int d = 0; d < shape_.head_dim; d += LANES) {
                float* to = &sums.mixed[r][d];
                const f32x16 more = convert<f32x16>(load<i32x16>(&mixed[r][d]));
                store(to, load<f32x16>(to) + more * steps[r]);
            }
    }

    // The panels of values of a span: for each run of tokens within a block (from `t` on, `length`), for as many panels as
    // `rows` meet at a time (from number `d` on).
    template <class Call>
    void each_run(
        const Layer& layer, const Queries& tile, int head, int rows, int span, int tokens, const Call& call
    ) const {
        const int dim = shape_.head_dim, run = shape_.block_size < SPAN ? shape_.block_size : SPAN;
        const long panel = long(shape_.block_size) / T::PER_UNIT * LANES;
        for (int t = 0; t < tokens; t += run) {
            const int length = tokens - t < run ? tokens - t : run, later = span + t + SPAN;
            const uint32_t* from = values(layer, tile, head, span + t);
            const uint32_t* next = later < tile.position + tile.count ? values(layer, tile, head, later) : from;
            for (int d = 0, panels; d < dim; d += panels * LANES) {
                Panels b;
                panels = panels_at_once(rows, (dim - d) / LANES);
                for (int p = 0; p < panels; p++) {
                    b.at[p] = from + (d / LANES + p) * panel;
                    b.next[p] = next + (d / LANES + p) * panel;
                }
                call(t, length, d, panels, b);
            }
        }
    }

    // Scores to shares, not yet divided by their sum; what was summed before is scaled to the new highest score.
    void weigh(
        const Layer& layer, const Queries& tile, const Left& left, int span, int tokens, const Scores& scores, float* shares,
        Sums& sums
    ) const {
        const float factor = shape_.scaling * 1.44269504f;  // shares are powers of two
        for (int r = 0; r < left.rows; r++) {
            const int position = tile.position + r / left.group;
            const int oldest = layer.window ? position - layer.window : -1;
            f32x16 score[SPAN / LANES], top = splat(NOTHING);
            for (int t = 0; t < tokens; t += LANES) {
                f32x16 s = load<f32x16>(&scores[r][t]) * factor;
                const int first = span + t;
                if (first + LANES - 1 > position) s = select(lane_numbers() > position - first, splat(HIDDEN), s);
                if (first <= oldest) s = select(lane_numbers() <= oldest - first, splat(HIDDEN), s);
                score[t / LANES] = s;
                top = max_of(top, s);
            }
            const float before = sums.top[r], now = max_of(before, highest(top));
            f32x16 weight{};
            for (int t = 0; t < tokens; t += LANES) {
                const f32x16 share = exp2_of(score[t / LANES] - now);
                weight += share;
                store(shares + r * SPAN + t, share);
            }
            if (now > before) {
                const f32x16 fade = exp2_of(splat(before - now));
                sums.top[r] = now;
                sums.weight[r] *= fade[0];
                for (int d = 0; d < shape_.head_dim; d += LANES) {
                    float* mixed = &sums.mixed[r][d];
                    store(mixed, load<f32x16>(mixed) * fade);
                }
            }
            sums.weight[r] += sum(weight);
        }
    }

    void merge(Sums& sums, const Sums& part, int rows) const {
        for (int r = 0; r < rows; r++) {
            const float top = max_of(sums.top[r], part.top[r]);
            const f32x16 old = exp2_of(splat(sums.top[r] - top)), fresh = exp2_of(splat(part.top[r] - top));
            sums.top[r] = top;
            sums.weight[r] = sums.weight[r] * old[0] + part.weight[r] * fresh[0];
            for (int d = 0; d < shape_.head_dim; d += LANES) {
                float* mixed = &sums.mixed[r][d];
                store(mixed, load<f32x16>(mixed) * old + load<f32x16>(&part.mixed[r][d]) * fresh);
            }
        }
    }

    const Shape shape_;
    const Ragged batch_;
};
