// Paged attention over a ragged batch: tiles of queries against a row's blocks of keys and values.
//
// A block of one kv head holds (see formats.h; E elements per unit, B tokens per block, D elements per head)
//
//     keys:    panels of 16 tokens, D/E units each        values:  panels of 16 elements, B/E units of tokens each
//
// and in int8 the scales of its tokens. So scores and weighted sums of values are products like any other. All query heads
// of a kv head are computed together, so its keys and values are read once.
//
// Softmax is computed online (as in FlashAttention), SPAN tokens at a time. The sum over a row's keys is split at multiples
// of PART tokens, and parts are merged in order, so a token's result has the same bits alone, in a batch or in a chunk.
//
// Example: 9 query heads, 3 kv heads, MAX_ROWS 12. A chunk of 6 tokens at positions 600..605 becomes two tiles of at most
// 12 / 3 = 4 tokens: 604..605 and 600..603. The second one has 4 tokens * 3 heads = 12 rows per kv head and sees keys
// 0..603: part 0 (0..511, 8 spans) and part 1 (512..603, 2 spans). Each part has its own highest score, sum of weights and
// weighted sum of values; merge() rescales them to the common highest score and adds them.
#pragma once

#include <algorithm>

#include "batch.h"
#include "buffer.h"
#include "micro.h"
#include "team.h"

constexpr int PART = 512;  // tokens
constexpr int SPAN = 64;   // tokens whose scores are computed at a time
constexpr int MAX_HEAD_DIM = 256;  // elements per head
constexpr float MASKED = -3e38f, NO_SCORE = -1e30f;

template <class T> class Attention {
  public:
    typedef typename T::Element Element;

    // query, out: [tokens, heads * D]; keys, values: a layer's cache. window: tokens that a query sees, 0 for all.
    // scales, offsets: [tokens, heads], of queries in int8 (offset: -OFFSET times the sum of the query).
    struct Layer {
        const Element* query;
        const float* scales;
        const int32_t* offsets;
        float* out;
        const uint32_t* keys;
        const uint32_t* values;
        int window;
    };

    // The online softmax of a tile's rows: highest score, sum of weights relative to it, weighted sum of values.
    struct Accumulator {
        float top[MAX_ROWS];
        float weight[MAX_ROWS];
        alignas(64) float out[MAX_ROWS][MAX_HEAD_DIM];
    };

    // The work of a step. If there are few tiles with long contexts, threads share the parts of a context.
    struct Plan {
        std::vector<Queries> tiles;
        int parts = 1;      // of the longest context that threads share; 1: each tile is computed by one thread
        Buffer<Accumulator> acc;  // [work, parts], if parts > 1
    };

    Attention(const Shape& shape, const Ragged& batch) : shape_(shape), batch_(batch) {}

    // Makes the tiles of a batch; within a row those with the longest contexts come first.
    static void plan(const Shape& shape, const Ragged& batch, int threads, Plan& plan) {
        const int max_tokens = MAX_ROWS / shape.group() > 0 ? MAX_ROWS / shape.group() : 1;
        int longest = 0;
        plan.tiles.clear();
        for (int i = 0; i < batch.rows; i++)
            for (int done = batch.counts[i]; done > 0;) {
                const int count = done % max_tokens ? done % max_tokens : max_tokens;
                done -= count;
                plan.tiles.push_back({i, batch.starts[i] + done, count, batch.computed[i] + done});
                longest = std::max(longest, batch.computed[i] + done + count);
            }
        const long work = long(plan.tiles.size()) * shape.kv_heads * folds(shape);
        plan.parts = threads > 1 && work < 4 * threads ? int(ceil_div(longest, PART)) : 1;
        if (plan.parts > 1) plan.acc.take(work * plan.parts);
    }

    // All threads of the team call it.
    void run(Team& team, const Layer& layer, Plan& plan) const {
        if (plan.parts > 1) return run_parts(team, layer, plan);
        const std::vector<Queries>& tiles = plan.tiles;
        const long tasks = long(tiles.size()) * shape_.kv_heads;
        // With few tasks, a thread that takes its next one ahead leaves another thread idle.
        const bool ahead = tasks >= 8 * team.size();
        long done = 0;
        for (long task = team.next(tasks), after; task < tasks; task = after, done++) {
            if (ahead && (after = team.next(tasks)) < tasks)
                prefetch_first(layer, tiles[after / shape_.kv_heads], int(after % shape_.kv_heads));
            for (int fold = 0; fold < folds(shape_); fold++)
                attend_whole(layer, work_of(tiles, task * folds(shape_) + fold));
            if (!ahead) after = team.next(tasks);
        }
        team.finish(tasks, done);
    }

  private:
    typedef float Scores[MAX_ROWS][SPAN];

    // The queries of a tile: one row per token and head of the group.
    struct QueryRows {
        alignas(64) Element units[MAX_ROWS * MAX_HEAD_DIM];
        float scales[MAX_ROWS];
        int32_t offsets[MAX_ROWS];
        int rows;
        int group;
    };

    // The queries of a tile for one kv head: `group` query heads from `first_head` on, at most MAX_ROWS.
    struct Work {
        const Queries& tile;
        int head;
        int first_head;
        int group;

        int rows() const { return tile.count * group; }
        int end() const { return tile.position + tile.count; }
    };

    static int folds(const Shape& shape) { return int(ceil_div(shape.group(), MAX_ROWS)); }

    Work work_of(const std::vector<Queries>& tiles, long number) const {
        const int fold = int(number % folds(shape_)), from = fold * MAX_ROWS;
        const long task = number / folds(shape_);
        const int head = int(task % shape_.kv_heads);
        return {tiles[task / shape_.kv_heads], head, head * shape_.group() + from,
                std::min(shape_.group() - from, MAX_ROWS)};
    }

    long units() const { return shape_.head_dim / T::PER_UNIT; }

    // The first token that the first query of a tile can see.
    static int begin(const Layer& layer, const Queries& tile) {
        return layer.window && tile.position >= layer.window ? tile.position - layer.window + 1 : 0;
    }

    const uint32_t* block(const uint32_t* cache, const Queries& tile, int head, int token) const {
        const int32_t* table = batch_.tables + long(tile.row) * batch_.table_width;
        return cache + shape_.block_at(table[token / shape_.block_size], head, T::PER_UNIT);
    }

    // The panel of 16 keys that begins with `token`.
    const uint32_t* keys(const Layer& layer, const Queries& tile, int head, int token) const {
        return block(layer.keys, tile, head, token) + token % shape_.block_size * units();
    }

    // The first panel of values, from `token` on. The next panels follow at the size of a panel of the block.
    const uint32_t* values(const Layer& layer, const Queries& tile, int head, int token) const {
        return block(layer.values, tile, head, token) + token % shape_.block_size / T::PER_UNIT * LANES;
    }

    // Prefetches the keys and values of the first span.
    void prefetch_first(const Layer& layer, const Queries& tile, int head) const {
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
        team.all(count * plan.parts, [&](long task) {
            const Work work = work_of(plan.tiles, task / plan.parts);
            const int part = int(task % plan.parts);
            if (part < begin(layer, work.tile) / PART || part * PART >= work.end()) return;
            QueryRows queries;
            load_queries(layer, work, queries);
            attend_part(layer, work, queries, part, plan.acc.get()[task]);
        });
        team.all(count, [&](long number) {
            const Work work = work_of(plan.tiles, number);
            const int first = begin(layer, work.tile) / PART;
            Accumulator& acc = plan.acc.get()[number * plan.parts + first];
            for (int part = first + 1; part * PART < work.end(); part++)
                merge(acc, plan.acc.get()[number * plan.parts + part], work.rows());
            write(layer, work, acc);
        });
    }

    void attend_whole(const Layer& layer, const Work& work) const {
        QueryRows queries;
        load_queries(layer, work, queries);
        Accumulator acc, next;
        const int first = begin(layer, work.tile) / PART;
        attend_part(layer, work, queries, first, acc);
        for (int part = first + 1; part * PART < work.end(); part++) {
            attend_part(layer, work, queries, part, next);
            merge(acc, next, queries.rows);
        }
        write(layer, work, acc);
    }

    void load_queries(const Layer& layer, const Work& work, QueryRows& queries) const {
        const int dim = shape_.head_dim;
        queries.group = work.group;
        queries.rows = work.rows();
        for (int t = 0; t < work.tile.count; t++) {
            const long first = (long(work.tile.first) + t) * shape_.heads + work.first_head;
            std::memcpy(queries.units + t * queries.group * dim, layer.query + first * dim,
                        queries.group * dim * sizeof(Element));
            for (int h = 0; T::QUANTIZED && h < queries.group; h++) {
                queries.scales[t * queries.group + h] = layer.scales[first + h];
                queries.offsets[t * queries.group + h] = layer.offsets[first + h];
            }
        }
    }

    // The tokens of one part that the tile can see.
    void attend_part(const Layer& layer, const Work& work, const QueryRows& queries, int part, Accumulator& acc) const {
        clear(acc, queries.rows);
        const int start = std::max(begin(layer, work.tile), part * PART), end = std::min(work.end(), (part + 1) * PART);
        for (int span = start / SPAN * SPAN; span < end; span += SPAN)
            attend(layer, work.tile, work.head, queries, span, acc);
    }

    void write(const Layer& layer, const Work& work, const Accumulator& acc) const {
        for (int r = 0; r < work.rows(); r++) {
            const long first = (long(work.tile.first) + r / work.group) * shape_.heads + work.first_head;
            float* out = layer.out + (first + r % work.group) * shape_.head_dim;
            const f32x16 normalizer = splat(1.0f / acc.weight[r]);
            for (int d = 0; d < shape_.head_dim; d += LANES)
                store(out + d, load<f32x16>(&acc.out[r][d]) * normalizer);
        }
    }

    void clear(Accumulator& acc, int rows) const;

    // Tokens span .. span + SPAN of the row, as far as they exist.
    void attend(
        const Layer& layer, const Queries& tile, int head, const QueryRows& queries, int span, Accumulator& acc
    ) const {
        const int end = tile.position + tile.count, tokens = int(round_up(end - span < SPAN ? end - span : SPAN, LANES));
        alignas(64) Scores scores;
        alignas(64) float probs[MAX_ROWS * SPAN];
        for (int t = 0, panels; t < tokens; t += panels * LANES) {
            Panels b;
            panels = panels_at_once(queries.rows, (tokens - t) / LANES);
            for (int p = 0; p < panels; p++) {
                const int token = span + t + p * LANES;
                b.at[p] = keys(layer, tile, head, token);
                b.next[p] = token + SPAN < end ? keys(layer, tile, head, token + SPAN) : b.at[p];
            }
            const auto query = reinterpret_cast<const uint32_t*>(queries.units);
            if constexpr (T::QUANTIZED) {
                multiply<C8::Keys>(queries.rows, panels, query, units(), b, units(), &scores[0][t], SPAN);
                for (int p = 0; p < panels; p++)
                    dequantize_scores(queries, block(layer.keys, tile, head, span + t + p * LANES), span + t + p * LANES,
                                      &scores[0][t + p * LANES]);
            } else {
                multiply<T>(queries.rows, panels, query, units(), b, units(), &scores[0][t], SPAN);
            }
        }
        weigh(layer, tile, queries, span, tokens, scores, probs, acc);
        if constexpr (T::QUANTIZED)
            accumulate_int8(layer, tile, head, queries, span, tokens, probs, acc);
        else
            accumulate(layer, tile, head, queries, span, tokens, probs, acc);
    }

    // Integer sums for 16 keys to scores.
    void dequantize_scores(const QueryRows& queries, const uint32_t* block, int token, float* scores) const {
        const f32x16 scale = load<f32x16>(shape_.scales(block) + token % shape_.block_size);
        for (int r = 0; r < queries.rows; r++) {
            const i32x16 integers = load<i32x16>(scores + r * SPAN) + queries.offsets[r];
            store(scores + r * SPAN, convert<f32x16>(integers) * (scale * queries.scales[r]));
        }
    }

    // Adds the tokens' values, weighted by `probs`, to the accumulator.
    void accumulate(
        const Layer& layer, const Queries& tile, int head, const QueryRows& queries, int span, int tokens,
        const float* probs, Accumulator& acc
    ) const {
        alignas(64) Element narrow[MAX_ROWS * SPAN];
        for (int r = 0; r < queries.rows; r++)
            for (int t = 0; t < tokens; t += LANES) T::narrow(narrow + r * SPAN + t, load<f32x16>(probs + r * SPAN + t));
        each_run(layer, tile, head, queries.rows, span, tokens, [&](int t, int length, int d, int panels, const Panels& b) {
            const auto a = reinterpret_cast<const uint32_t*>(narrow + t);
            multiply<T, true>(queries.rows, panels, a, SPAN / T::PER_UNIT, b, length / T::PER_UNIT, &acc.out[0][d],
                              MAX_HEAD_DIM);
        });
    }

    // As `accumulate`, with weights quantized to 8 bits: the largest of each row is 255.
    void accumulate_int8(
        const Layer& layer, const Queries& tile, int head, const QueryRows& queries, int span, int tokens,
        const float* probs, Accumulator& acc
    ) const {
        alignas(64) uint8_t integers[MAX_ROWS * SPAN];
        alignas(64) int32_t products[MAX_ROWS][MAX_HEAD_DIM];
        float steps[MAX_ROWS];
        f32x16 scales[SPAN / LANES];
        for (int t = 0; t < tokens; t += LANES) {
            const float* scale = shape_.scales(block(layer.values, tile, head, span + t));
            scales[t / LANES] = load<f32x16>(scale + (span + t) % shape_.block_size);
            // Beyond the row's end there may be leftovers of another row.
            const int known = tile.position + tile.count - span - t;
            if (known < LANES) scales[t / LANES] = select(lane_numbers() < known, scales[t / LANES], f32x16{});
        }
        for (int r = 0; r < queries.rows; r++) {
            f32x16 top{};
            for (int t = 0; t < tokens; t += LANES)
                top = max_of(top, load<f32x16>(probs + r * SPAN + t) * scales[t / LANES]);
            const float largest = reduce_max(top), factor = largest > 0 ? 255.0f / largest : 0.0f;
            steps[r] = largest / 255.0f;
            for (int t = 0; t < tokens; t += LANES) {
                const f32x16 prob = load<f32x16>(probs + r * SPAN + t) * scales[t / LANES] * factor;
                const u32x16 rounded = (u32x16)(prob + 12582912.0f) & 255u;  // see exp2_of
                store(integers + r * SPAN + t, convert<u8x16>(rounded));
            }
        }
        each_run(layer, tile, head, queries.rows, span, tokens, [&](int t, int length, int d, int panels, const Panels& b) {
            const auto a = reinterpret_cast<const uint32_t*>(integers + t);
            if (t == 0)
                multiply<C8::Values>(queries.rows, panels, a, SPAN / 4, b, length / 4, &products[0][d], MAX_HEAD_DIM);
            else
                multiply<C8::Values, true>(queries.rows, panels, a, SPAN / 4, b, length / 4, &products[0][d], MAX_HEAD_DIM);
        });
        for (int r = 0; r < queries.rows; r++)
            for (int d = 0; d < shape_.head_dim; d += LANES) {
                float* to = &acc.out[r][d];
                const f32x16 more = convert<f32x16>(load<i32x16>(&products[r][d]));
                store(to, load<f32x16>(to) + more * steps[r]);
            }
    }

    // Calls `call` for the values of a span: for each run of tokens within a block (`length` tokens from `t` on), and for
    // as many panels as are multiplied at a time (from element `d` on).
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

    // Scores to weights, not yet normalized. What was accumulated before is rescaled to the new highest score.
    void weigh(
        const Layer& layer, const Queries& tile, const QueryRows& queries, int span, int tokens, const Scores& scores,
        float* probs, Accumulator& acc
    ) const;

    void merge(Accumulator& acc, const Accumulator& part, int rows) const;

    const Shape shape_;
    const Ragged batch_;
};

#include "softmax.h"
