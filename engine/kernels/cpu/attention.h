// Paged attention over a ragged batch: tiles of queries against a row's blocks of keys and values.
//
// A block of one kv head holds (see formats.h; E elements per unit, B tokens per block, D elements per head)
//
//     keys:    panels of 16 tokens, D/E units each        values:  panels of 16 elements, B/E units of tokens each
//
// and in int8 the scales of its tokens. So scores and weighted sums of values are products like any other, computed in
// vectors (attention_products.h) or on AMX tiles (attention_tiles.h). All query heads of a kv head are computed together, so
// its keys and values are read once.
//
// Softmax is computed online (as in FlashAttention), SPAN tokens at a time. The sum over a row's keys is split at multiples
// of PART tokens, and parts are merged in order, so a token's result has the same bits alone, in a batch or in a chunk.
//
// While a span is computed, the next one is prefetched, which may be the first one of the thread's next task. The tiles of
// a row follow each other head by head: one head's keys and values of a long context fit a core's own cache.
//
// Example: 9 query heads, 3 kv heads, 12 rows at a time. A chunk of 6 tokens at positions 600..605 becomes two tiles of at
// most 12 / 3 = 4 tokens: 604..605 and 600..603. The second one has 4 tokens * 3 heads = 12 rows per kv head and sees keys
// 0..603: part 0 (0..511, 4 spans) and part 1 (512..603, 1 span). Each part has its own highest score, sum of weights and
// weighted sum of values; merge() rescales them to the common highest score and adds them.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_products.h"
#include "attention_tiles.h"
#include "batch.h"
#include "buffer.h"
#include "team.h"

constexpr int PART = 512;  // tokens
constexpr float MASKED = -3e38f, NO_SCORE = -1e30f;

template <class T> class Attention {
  public:
    typedef typename T::Element Element;
    typedef typename ProductsOf<T>::Type Products;
    static constexpr int ROWS = Products::ROWS;  // queries of a tile: its tokens times the heads of a group

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

    // Rows of tiles are a cache line more than a multiple of 1 KB apart: otherwise they would share a few cache sets.
    static constexpr long OUT_STRIDE = MAX_HEAD_DIM + LANES;  // elements
    static constexpr long QUERY_STRIDE = MAX_HEAD_DIM / T::PER_UNIT + LANES;  // units

    // The online softmax of a tile's rows: highest score, sum of weights relative to it, weighted sum of values.
    struct Accumulator {
        float top[ROWS];
        float weight[ROWS];
        alignas(64) float out[ROWS][OUT_STRIDE];
    };

    struct Task {
        Queries tile;
        int head;  // the kv head
    };

    // The work of a step. If there are few tasks with long contexts, threads share the parts of a context.
    struct Plan {
        std::vector<Task> tasks;
        int parts = 1;      // of the longest context that threads share; 1: each task is computed by one thread
        Buffer<Accumulator> acc;  // [tasks, folds, parts], if parts > 1
    };

    Attention(const Shape& shape, const Ragged& batch)
        : shape_(shape), batch_(batch), products_(units(), std::min(shape.block_size, SPAN) / T::PER_UNIT) {}

    // Makes the tasks of a batch; of a row and head those with the longest contexts come first.
    static void plan(const Shape& shape, const Ragged& batch, int threads, Plan& plan) {
        const int max_tokens = std::max(ROWS / shape.group(), 1);
        int longest = 0;
        plan.tasks.clear();
        for (int i = 0; i < batch.rows; i++) {
            for (int head = 0; head < shape.kv_heads; head++)
                for (int done = batch.counts[i]; done > 0;) {
                    const int count = done % max_tokens ? done % max_tokens : max_tokens;
                    done -= count;
                    plan.tasks.push_back({{i, batch.starts[i] + done, count, batch.computed[i] + done}, head});
                }
            longest = std::max(longest, batch.computed[i] + batch.counts[i]);
        }
        const long work = long(plan.tasks.size()) * folds(shape);
        plan.parts = threads > 1 && work < 4 * threads ? int(ceil_div(longest, PART)) : 1;
        if (plan.parts > 1) plan.acc.take(work * plan.parts);
    }

    // All threads of the team call it, each on an object of its own.
    void run(Team& team, const Layer& layer, Plan& plan) {
        if (plan.parts > 1) return run_parts(team, layer, plan);
        const std::vector<Task>& tasks = plan.tasks;
        const long count = long(tasks.size());
        // With few tasks, a thread that takes its next one ahead leaves another thread idle.
        const bool ahead = count >= 8 * team.size();
        long done = 0;
        for (long task = team.next(count), after; task < count; task = after, done++) {
            Span first;  // of the next task
            const Span* next = nullptr;
            if (ahead && (after = team.next(count)) < count) {
                locate(layer, tasks[after], begin(layer, tasks[after].tile) / SPAN * SPAN, first);
                next = &first;
            }
            for (int fold = 0; fold < folds(shape_); fold++) attend_whole(layer, work_of(tasks[task], fold), next);
            if (!ahead) after = team.next(count);
        }
        team.finish(count, done);
    }

  private:
    typedef float Scores[ROWS][SPAN];
    // Before they are quantized, if they are.
    typedef std::conditional_t<T::QUANTIZED, float, Element> Weight;
    typedef Product<typename DotsOf<T>::Keys, false, QUERY_STRIDE, SPAN> KeysProduct;
    typedef Product<typename DotsOf<T>::Values, !T::QUANTIZED, SPAN / T::PER_UNIT, OUT_STRIDE> ValuesProduct;

    // The queries of a tile: one row per token and head of the group.
    struct QueryRows {
        alignas(64) uint32_t units[ROWS][QUERY_STRIDE];
        float scales[ROWS];
        int32_t offsets[ROWS];
        int rows;
        int group;
    };

    // The queries of a tile for one kv head: `group` query heads from `first_head` on, at most ROWS.
    struct Work {
        const Task& task;
        int first_head;
        int group;

        const Queries& tile() const { return task.tile; }
        int rows() const { return tile().count * group; }
        int end() const { return tile().position + tile().count; }
    };

    // Where the keys and values of a span lie.
    struct Span {
        int panels;  // of 16 keys
        int runs;  // of tokens in a block
        const uint32_t* keys[SPAN / LANES];  // [panels]
        const uint32_t* values[Runs::MAX];  // [runs], the first panel; the others follow at the size of a block's panel
        long units[Runs::MAX];  // [runs], of the values
        const float* key_scales[SPAN / LANES];  // [panels], int8 only
        const float* value_scales[SPAN / LANES];
    };

    static int folds(const Shape& shape) { return int(ceil_div(shape.group(), ROWS)); }

    Work work_of(const Task& task, int fold) const {
        const int from = fold * ROWS;
        return {task, task.head * shape_.group() + from, std::min(shape_.group() - from, ROWS)};
    }

    long units() const { return shape_.head_dim / T::PER_UNIT; }

    // The first token that the first query of a tile can see.
    static int begin(const Layer& layer, const Queries& tile) {
        return first_seen(tile.position, layer.window);
    }

    // Finds the span that begins with token `first`, as far as the row reaches.
    void locate(const Layer& layer, const Task& task, int first, Span& span) const {
        const int32_t* table = batch_.tables + long(task.tile.row) * batch_.table_width;
        const int block = shape_.block_size;
        const int tokens = int(round_up(std::min(task.tile.position + task.tile.count - first, SPAN), LANES));
        span.panels = span.runs = 0;
        for (int t = 0, length; t < tokens; t += length) {
            const int offset = (first + t) % block;
            const long at = shape_.block_at(table[(first + t) / block], task.head, T::PER_UNIT);
            length = std::min(block - offset, tokens - t);
            span.units[span.runs] = length / T::PER_UNIT;
            span.values[span.runs++] = layer.values + at + offset / T::PER_UNIT * LANES;
            for (int k = 0; k < length; k += LANES, span.panels++) {
                span.keys[span.panels] = layer.keys + at + (offset + k) * units();
                if constexpr (T::QUANTIZED) {
                    span.key_scales[span.panels] = shape_.scales(layer.keys + at) + offset + k;
                    span.value_scales[span.panels] = shape_.scales(layer.values + at) + offset + k;
                }
            }
        }
    }

    void run_parts(Team& team, const Layer& layer, Plan& plan) {
        const long count = long(plan.tasks.size()) * folds(shape_);
        team.all(count * plan.parts, [&](long number) {
            const Work work = work_of(plan, number / plan.parts);
            const int part = int(number % plan.parts);
            if (part < begin(layer, work.tile()) / PART || part * PART >= work.end()) return;
            QueryRows queries;
            load_queries(layer, work, queries);
            attend_part(layer, work, queries, part, std::min(work.end(), (part + 1) * PART), nullptr,
                        plan.acc.get()[number]);
        });
        team.all(count, [&](long number) {
            const Work work = work_of(plan, number);
            const int first = begin(layer, work.tile()) / PART;
            Accumulator& acc = plan.acc.get()[number * plan.parts + first];
            for (int part = first + 1; part * PART < work.end(); part++)
                merge(acc, plan.acc.get()[number * plan.parts + part], work.rows());
            write(layer, work, acc);
        });
    }

    Work work_of(const Plan& plan, long number) const {
        return work_of(plan.tasks[number / folds(shape_)], int(number % folds(shape_)));
    }

    // after: what to prefetch at the end; may be null.
    void attend_whole(const Layer& layer, const Work& work, const Span* after) {
        QueryRows queries;
        load_queries(layer, work, queries);
        Accumulator acc, next;
        const int first = begin(layer, work.tile()) / PART;
        attend_part(layer, work, queries, first, work.end(), after, acc);
        for (int part = first + 1; part * PART < work.end(); part++) {
            attend_part(layer, work, queries, part, work.end(), after, next);
            merge(acc, next, queries.rows);
        }
        write(layer, work, acc);
    }

    void load_queries(const Layer& layer, const Work& work, QueryRows& queries) {
        const int dim = shape_.head_dim;
        queries.group = work.group;
        queries.rows = work.rows();
        for (int r = 0; r < queries.rows; r++) {
            const long from = (long(work.tile().first) + r / work.group) * shape_.heads + work.first_head + r % work.group;
            std::memcpy(queries.units[r], layer.query + from * dim, dim * sizeof(Element));
            if constexpr (T::QUANTIZED) queries.scales[r] = layer.scales[from], queries.offsets[r] = layer.offsets[from];
        }
        products_.begin(queries.rows);
    }

    // The tokens of one part that the tile can see. Its spans up to token `end` follow on this thread, then `after`.
    void attend_part(
        const Layer& layer, const Work& work, const QueryRows& queries, int part, int end, const Span* after,
        Accumulator& acc
    ) {
        clear(acc, queries.rows);
        const int start = std::max(begin(layer, work.tile()), part * PART) / SPAN * SPAN;
        Span spans[2], *span = &spans[0], *spare = &spans[1];
        locate(layer, work.task, start, *span);
        for (int first = start; first < std::min(work.end(), (part + 1) * PART); first += SPAN) {
            const Span* next = after ? after : span;
            if (first + SPAN < end) {
                locate(layer, work.task, first + SPAN, *spare);
                // A short last span is computed too fast to prefetch a whole one meanwhile.
                if (after && spare->panels <= SPAN / LANES / 2)
                    prefetch_keys(*spare, 0), prefetch_values(*spare, 0);
                else
                    next = spare;
            }
            attend(layer, work, queries, first, *span, *next, acc);
            std::swap(span, spare);
        }
    }

    void write(const Layer& layer, const Work& work, const Accumulator& acc) const {
        for (int r = 0; r < work.rows(); r++) {
            const long first = (long(work.tile().first) + r / work.group) * shape_.heads + work.first_head;
            float* out = layer.out + (first + r % work.group) * shape_.head_dim;
            const f32x16 normalizer = splat(1.0f / acc.weight[r]);
            for (int d = 0; d < shape_.head_dim; d += LANES)
                store(out + d, load<f32x16>(&acc.out[r][d]) * normalizer);
        }
    }

    void clear(Accumulator& acc, int rows) const;

    // The tokens of a span, from `first` on.
    void attend(
        const Layer& layer, const Work& work, const QueryRows& queries, int first, const Span& span, const Span& next,
        Accumulator& acc
    ) {
        alignas(64) Scores scores;
        alignas(64) Weight weights[ROWS * SPAN];
        score(queries, span, next, scores);
        weigh(layer, work, queries, first, scores, weights, acc);
        if constexpr (T::QUANTIZED)
            accumulate_int8(queries.rows, work.end() - first, span, next, weights, acc);
        else
            multiply_values(queries.rows, weights, span, next, acc.out[0]);
    }

    void score(const QueryRows& queries, const Span& span, const Span& next, Scores& scores) {
        Runs b;
        b.units[0] = units();
        for (int p = 0, count; p < span.panels; p += count) {
            count = Products::panels_at_once(queries.rows, span.panels - p);
            for (int i = 0; i < count; i++) {
                b.at[0][i] = span.keys[p + i];
                b.next[0][i] = next.keys[std::min(p + i, next.panels - 1)];
            }
            products_.template multiply<KeysProduct>(queries.rows, count, queries.units[0], b, &scores[0][p * LANES]);
            if constexpr (T::QUANTIZED)
                for (int i = p; i < p + count; i++) dequantize_scores(queries, span.key_scales[i], &scores[0][i * LANES]);
        }
        prefetch_keys(next, span.panels);
    }

    // Panels from `first` on, and all scales.
    void prefetch_keys(const Span& span, int first) const {
        for (int p = first; p < span.panels; p++) prefetch(span.keys[p], LANES * units());
        if constexpr (T::QUANTIZED)
            for (int p = 0; p < span.panels; p++)
                prefetch(span.key_scales[p], 1), prefetch(span.value_scales[p], 1);
    }

    // Runs from `first` on.
    void prefetch_values(const Span& span, int first) const {
        for (int run = first; run < span.runs; run++)
            for (int d = 0; d < shape_.head_dim / LANES; d++)
                prefetch(span.values[run] + d * value_panel(), span.units[run] * LANES);
    }

    // Words between two panels of a block's values.
    long value_panel() const { return long(shape_.block_size) / T::PER_UNIT * LANES; }

    // Integer sums for 16 keys to scores.
    static void dequantize_scores(const QueryRows& queries, const float* scales, float* scores);

    // Products of weights and values; sums of floats are added to `out`.
    void multiply_values(int rows, const void* weights, const Span& span, const Span& next, void* out) {
        const long panel = value_panel();
        const int panels = shape_.head_dim / LANES;
        Runs b;
        b.count = span.runs;
        for (int run = 0; run < span.runs; run++) b.units[run] = span.units[run];
        b.units[span.runs - 1] = products_.whole(span.units[span.runs - 1]);
        for (int d = 0, count; d < panels; d += count) {
            count = Products::panels_at_once(rows, panels - d);
            for (int run = 0; run < span.runs; run++)
                for (int i = 0; i < count; i++) {
                    b.at[run][i] = span.values[run] + (d + i) * panel;
                    b.next[run][i] = next.values[std::min(run, next.runs - 1)] + (d + i) * panel;
                }
            products_.template multiply<ValuesProduct>(rows, count, static_cast<const uint32_t*>(weights), b,
                                                       static_cast<uint32_t*>(out) + d * LANES);
        }
        prefetch_values(next, span.runs);
    }

    // Adds the values of `tokens` tokens, or of the whole span, weighted by `probs`, to the accumulator. Weights are
    // quantized to 8 bits: the largest of each row is 255.
    void accumulate_int8(
        int rows, int tokens, const Span& span, const Span& next, const float* probs, Accumulator& acc
    );

    // Scores of the tokens from `first` on to weights, not yet normalized, 0 for tokens that a query does not see. What was
    // accumulated before is rescaled to the new highest score.
    void weigh(
        const Layer& layer, const Work& work, const QueryRows& queries, int first, Scores& scores, Weight* weights,
        Accumulator& acc
    ) const;

    void merge(Accumulator& acc, const Accumulator& part, int rows) const;

    const Shape shape_;
    const Ragged batch_;
    Products products_;
};

#include "attention_int8.h"
#include "softmax.h"
