// Products of activations and packed weights, and what is done with a piece of the result while it is in the caches.
#pragma once

#include "micro.h"
#include "team.h"

// out = in x weights + bias. As the caller fills it; the layout of `panels` is that of formats.h, padded with zeros to
// whole panels. `scales` (one an output) belong to quantised weights, `bias` may be null.
struct Linear {
    const uint32_t* panels;
    const float* scales;
    const float* bias;
    int32_t outputs;
    int32_t inputs;
};

// Activations, row by row in units. `scales` and `sums` (of a row's numbers) belong to int8.
struct Rows {
    const uint32_t* units;
    long stride;
    const float* scales;
    const int32_t* sums;

    Rows from(long row) const { return {units + row * stride, stride, scales + row, sums + row}; }
};

constexpr int SLAB = 240;  // rows that meet one pair of panels: of at most 1,536 inputs they lie in a core's own cache

// Part of a result: `rows` from `first` on, columns from `column` on, with WIDTH numbers between rows.
struct Tile {
    long first;
    int rows;
    long column;
    int columns;
    float* at;
};

// Sums of int8 products to the numbers they stand for.
INLINE void scale(const Linear& w, const Rows& x, const Tile& tile) {
    for (int r = 0; r < tile.rows; r++) {
        float* row = tile.at + r * WIDTH;
        for (int c = 0; c < tile.columns; c += LANES) {
            // The weights' bytes are 128 too high.
            i32x16 whole = load<i32x16>(row + c) - 128 * x.sums[r];
            store(row + c, __builtin_convertvector(whole, f32x16) * load<f32x16>(w.scales + tile.column + c) * x.scales[r]);
        }
    }
}

INLINE void add_bias(const float* bias, const Tile& tile) {
    for (int r = 0; r < tile.rows; r++)
        for (int c = 0; c < tile.columns; c += LANES) {
            float* at = tile.at + r * WIDTH + c;
            store(at, load<f32x16>(at) + load<f32x16>(bias + tile.column + c));
        }
}

// One op: all threads of the team call it; `finish` gets each part of the result once.
template <class T, class Finish> void linear(Team& team, const Linear& w, const Rows& x, long count, const Finish& finish) {
    alignas(64) float buffer[MOST_ROWS * WIDTH];
    const long units = w.inputs / T::PER_UNIT, panels = ceil_div(w.outputs, LANES), pairs = ceil_div(panels, PANELS);
    const long tasks = pairs * ceil_div(count, SLAB);
    for (long task; (task = team.next()) < tasks;) {
        const long slab = task / pairs * SLAB, panel = task % pairs * PANELS;
        const int width = panels - panel < PANELS ? 1 : PANELS;
        const uint32_t* b[PANELS] = {w.panels + panel * units * LANES, w.panels + (panel + 1) * units * LANES};
        const long height = count - slab < SLAB ? count - slab : SLAB, blocks = ceil_div(height, MOST_ROWS);
        for (long block = 0; block < blocks; block++) {
            const long first = slab + height * block / blocks, end = slab + height * (block + 1) / blocks;
            const Tile tile{first, int(end - first), panel * LANES, width * LANES, buffer};
            const Rows rows = x.from(first);
            multiply<T>(tile.rows, width, rows.units, rows.stride, b, units, buffer);
            if constexpr (T::PER_UNIT == 4) scale(w, rows, tile);
            if (w.bias) add_bias(w.bias, tile);
            finish(tile);
        }
    }
}

struct Store {
    float* out;
    long stride;
    void operator()(const Tile& t) const {
        for (int r = 0; r < t.rows; r++)
            for (int c = 0; c < t.columns; c += LANES)
                store(out + (t.first + r) * stride + t.column + c, load<f32x16>(t.at + r * WIDTH + c));
    }
};

// As Store, where the last panel may stick out of the row.
struct StoreClipped {
    float* out;
    long stride;
    void operator()(const Tile& t) const {
        const long columns = stride - t.column < t.columns ? stride - t.column : t.columns;
        for (int r = 0; r < t.rows; r++)
            std::memcpy(out + (t.first + r) * stride + t.column, t.at + r * WIDTH, columns * sizeof(float));
    }
};

struct Add {
    float* out;
    long stride;
    void operator()(const Tile& t) const {
        for (int r = 0; r < t.rows; r++)
            for (int c = 0; c < t.columns; c += LANES) {
                float* at = out + (t.first + r) * stride + t.column + c;
                store(at, load<f32x16>(at) + load<f32x16>(t.at + r * WIDTH + c));
            }
    }
};

INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp2_of(x * -1.44269504f)); }

// silu(gate) * up, where panels of gate and up take turns.
template <class T> struct SwiGLU {
    typename T::Element* out;
    long stride;
    void operator()(const Tile& t) const {
        for (int r = 0; r < t.rows; r++) {
            const float* row = t.at + r * WIDTH;
            T::narrow(out + (t.first + r) * stride + t.column / 2, silu(load<f32x16>(row)) * load<f32x16>(row + LANES));
        }
    }
};

// The highest of each pair of panels and its column, the first one where several are.
struct Best {
    float* value;  // [pairs, rows]
    int32_t* column;
    long rows;
    long outputs;
    void operator()(const Tile& t) const {
        const int columns = int(outputs - t.column < t.columns ? outputs - t.column : t.columns);
        const long at = t.column / WIDTH * rows + t.first;
        for (int r = 0; r < t.rows; r++) {
            const float* row = t.at + r * WIDTH;
            int best = 0;
            for (int c = 1; c < columns; c++)
                if (row[c] > row[best]) best = c;
            value[at + r] = row[best];
            column[at + r] = int32_t(t.column) + best;
        }
    }
};
