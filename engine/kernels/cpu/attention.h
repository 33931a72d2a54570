// Paged attention over a ragged batch: tiles of queries against a row's blocks of keys and values.
//
// A block of one kv head holds (see formats.h; E elements a unit, B tokens a block, D numbers a head)
//
//     keys:    panels of 16 tokens, D/E units each        values:  panels of 16 numbers, B/E units of tokens each
//
// so that scores and mixtures are products like any other. All query heads of a kv head are computed together: its keys
// and values are read once. The sum over a row's keys is cut at multiples of PART tokens, and parts are added in their
// order: a token's result has the same bits whether it is computed alone, in a batch or in a chunk.
#pragma once

#include "micro.h"
#include "team.h"

constexpr int PART = 512;  // tokens
constexpr int SPAN = 64;   // tokens scored at a time
constexpr float HIDDEN = -3e38f, NOTHING = -1e30f;

struct Shape {
    int heads;
    int kv_heads;
    int head_dim;
    int block_size;
    float scaling;

    int group() const { return heads / kv_heads; }
};

// Rows laid end to end: row i computes `counts[i]` tokens after `computed[i]`, from token `starts[i]` of the batch.
struct Ragged {
    int32_t rows;
    int32_t tokens;
    const int32_t* starts;
    const int32_t* counts;
    const int32_t* computed;
    const int32_t* tables;  // [rows, table_width]
    int32_t table_width;
};

// Some tokens of a row whose queries are computed together, all query heads of a kv head.
struct Queries {
    int32_t row;
    int32_t first;     // in the batch
    int32_t count;     // tokens
    int32_t position;  // of the first
};

template <class T> class Attention {
  public:
    typedef typename T::Element Element;

    // query, out: [tokens, heads * D]; keys, values: a layer's cache. window: tokens that a query sees, 0 for all.
    struct Layer {
        const Element* query;
        float* mixed;  // [tokens, heads * D]
        const uint32_t* keys;
        const uint32_t* values;
        int window;
    };

    Attention(const Shape& shape, const Ragged& batch) : shape_(shape), batch_(batch) {}

    // The tiles of a batch, those with the longest contexts of a row first.
    static void tile(const Shape& shape, const Ragged& batch, std::vector<Queries>& tiles) {
        const int most = MOST_ROWS / shape.group() > 0 ? MOST_ROWS / shape.group() : 1;
        tiles.clear();
        for (int i = 0; i < batch.rows; i++)
            for (int done = batch.counts[i]; done > 0;) {
                const int count = done % most ? done % most : most;
                done -= count;
                tiles.push_back({i, batch.starts[i] + done, count, batch.computed[i] + done});
            }
    }

    // One op: all threads of the team call it.
    void run(Team& team, const Layer& layer, const std::vector<Queries>& tiles) const {
        const long tasks = long(tiles.size()) * shape_.kv_heads;
        for (long task; (task = team.next()) < tasks;)
            for (int from = 0; from < shape_.group(); from += MOST_ROWS)  // more heads than fit: a few at a time
                one(layer, tiles[task / shape_.kv_heads], int(task % shape_.kv_heads), from);
    }

  private:
    static constexpr int MOST_DIM = 256;

    // What is known of a tile's rows (tokens x heads of the group) after some keys.
    struct Sums {
        float top[MOST_ROWS];
        float weight[MOST_ROWS];
        alignas(64) float mixed[MOST_DIM / WIDTH][MOST_ROWS * WIDTH];
    };

    void one(const Layer& layer, const Queries& tile, int head, int from) const {
        const int group = shape_.group() - from < MOST_ROWS ? shape_.group() - from : MOST_ROWS;
        const int rows = tile.count * group, dim = shape_.head_dim;
        alignas(64) Element query[MOST_ROWS * MOST_DIM];
        for (int t = 0; t < tile.count; t++)
            std::memcpy(query + t * group * dim, at(layer.query, tile, t, head, from), group * dim * sizeof(Element));
        const int end = tile.position + tile.count;
        const int begin = layer.window && tile.position >= layer.window ? tile.position - layer.window + 1 : 0;
        Sums sums, part;
        for (int start = begin / PART * PART; start < end; start += PART) {
            Sums& now = start == begin / PART * PART ? sums : part;
            clear(now, rows);
            const int stop = end < start + PART ? end : start + PART;
            for (int span = (begin > start ? begin : start) / SPAN * SPAN; span < stop; span += SPAN)
                attend(layer, tile, head, group, query, span, stop, now);
            if (&now == &part) merge(sums, part, rows);
        }
        for (int r = 0; r < rows; r++) {
            float* out = const_cast<float*>(at(layer.mixed, tile, r / group, head, from)) + r % group * dim;
            const f32x16 share = splat(1.0f / sums.weight[r]);
            for (int d = 0; d < dim; d += LANES)
                store(out + d, load<f32x16>(&sums.mixed[d / WIDTH][r * WIDTH + d % WIDTH]) * share);
        }
    }

    template <class E> const E* at(const E* rows, const Queries& tile, int t, int head, int from) const {
        return rows + (long(tile.first + t) * shape_.heads + head * shape_.group() + from) * shape_.head_dim;
    }

    void clear(Sums& sums, int rows) const {
        for (int r = 0; r < rows; r++) sums.top[r] = NOTHING, sums.weight[r] = 0;
        for (int d = 0; d < shape_.head_dim; d += WIDTH) std::memset(sums.mixed[d / WIDTH], 0, rows * WIDTH * sizeof(float));
    }

    // The tokens span .. min(span + SPAN, stop) of the row.
    void attend(
        const Layer& layer, const Queries& tile, int head, int group, const Element* query, int span, int stop, Sums& sums
    ) const {
        const int rows = tile.count * group, dim = shape_.head_dim, block_size = shape_.block_size;
        const int run = block_size < SPAN ? block_size : SPAN;  // tokens of one block
        const long units = dim / T::PER_UNIT, block_units = long(block_size) * units;
        alignas(64) float scores[SPAN / WIDTH][MOST_ROWS * WIDTH];
        alignas(64) Element shares[MOST_ROWS * SPAN];
        const int32_t* table = batch_.tables + long(tile.row) * batch_.table_width;
        const int tokens = int(round_up(stop - span < SPAN ? stop - span : SPAN, LANES));
        auto block = [&](const uint32_t* cache, int token) {
            return cache + (long(table[token / block_size]) * shape_.kv_heads + head) * block_units;
        };
        for (int t = 0; t < tokens; t += WIDTH) {
            const uint32_t* b[PANELS];
            const int panels = tokens - t < WIDTH ? 1 : PANELS;
            for (int p = 0; p < panels; p++) {
                const int token = span + t + p * LANES;
                b[p] = block(layer.keys, token) + token % block_size * units;
            }
            multiply<T>(rows, panels, reinterpret_cast<const uint32_t*>(query), units, b, units, scores[t / WIDTH]);
        }
        weigh(layer, tile, group, span, tokens, scores, shares, sums);
        for (int t = 0; t < tokens; t += run) {
            const int length = tokens - t < run ? tokens - t : run;
            const uint32_t* values = block(layer.values, span + t) + (span + t) % block_size / T::PER_UNIT * LANES;
            for (int d = 0; d < dim; d += WIDTH) {
                const long panel = long(block_size) / T::PER_UNIT * LANES;
                const uint32_t* b[PANELS] = {values + d / LANES * panel, values + (d / LANES + 1) * panel};
                multiply<T, true>(
                    rows, dim - d < WIDTH ? 1 : PANELS, reinterpret_cast<const uint32_t*>(shares + t), SPAN / T::PER_UNIT, b,
                    length / T::PER_UNIT, sums.mixed[d / WIDTH]
                );
            }
        }
    }

    // Scores to shares, not yet divided by their sum; what was summed before is scaled to the new highest score.
    void weigh(
        const Layer& layer, const Queries& tile, int group, int span, int tokens,
        float (&scores)[SPAN / WIDTH][MOST_ROWS * WIDTH], Element* shares, Sums& sums
    ) const {
        const float factor = shape_.scaling * 1.44269504f;  // shares are powers of two
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int r = 0; r < tile.count * group; r++) {
            const int position = tile.position + r / group;
            const int oldest = layer.window ? position - layer.window : -1;
            f32x16 score[SPAN / LANES], top = splat(NOTHING);
            for (int t = 0; t < tokens; t += LANES) {
                f32x16 s = load<f32x16>(&scores[t / WIDTH][r * WIDTH + t % WIDTH]) * factor;
                const int first = span + t;
                if (first + LANES - 1 > position) s = lane > position - first ? splat(HIDDEN) : s;
                if (first <= oldest) s = lane <= oldest - first ? splat(HIDDEN) : s;
                score[t / LANES] = s;
                top = max_of(top, s);
            }
            const float before = sums.top[r], now = max_of(before, highest(top));
            f32x16 weight{};
            for (int t = 0; t < tokens; t += LANES) {
                const f32x16 share = exp2_of(score[t / LANES] - now);
                weight += share;
                T::narrow(shares + r * SPAN + t, share);
            }
            if (now > before) {
                const f32x16 fade = exp2_of(splat(before - now));
                sums.top[r] = now;
                sums.weight[r] *= fade[0];
                for (int d = 0; d < shape_.head_dim; d += LANES) {
                    float* mixed = &sums.mixed[d / WIDTH][r * WIDTH + d % WIDTH];
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
                const int at = r * WIDTH + d % WIDTH;
                float* mixed = &sums.mixed[d / WIDTH][at];
                store(mixed, load<f32x16>(mixed) * old + load<f32x16>(&part.mixed[d / WIDTH][at]) * fresh);
            }
        }
    }

    const Shape shape_;
    const Ragged batch_;
};
