// Products of activations and packed weights. A functor `finish` processes each part of a result while it is in the caches.
#pragma once

#include "team.h"
#include "tile.h"

// out = in x weights + bias. `panels` have the layout of formats.h, padded with zeros to whole panels. `scales`, bfloat16
// [panels, groups, SCALES, 16], are those of quantized weights. `bias` may be null.
struct Linear {
    const uint32_t* panels;
    const uint16_t* scales;
    const float* bias;
    int32_t outputs;
    int32_t inputs;
};

// The left side of a product, row by row in units. int8 has a scale for each group of a row, and -OFFSET times its sum.
struct Activations {
    const uint32_t* units;
    long stride;
    const float* scales;
    const int32_t* offsets;
    long groups;

    Activations from(long row) const {
        return {units + row * stride, stride, scales + row * groups, offsets + row * groups, groups};
    }
};

constexpr int SLAB = 240;  // rows that are multiplied with a pair of panels; up to 1,536 inputs fit a core's own cache

// Formats that use AMX tiles if there are any, always: the sums of a tile have their own order.
#if defined(TILES)
template <class T> constexpr bool TILED = false;
template <> inline constexpr bool TILED<BF16> = true;
template <> inline constexpr bool TILED<I8> = true;
#else
template <class T> constexpr bool TILED = false;
#endif

// Part of a result: `rows` from `first` on, columns from `column` on; rows are WIDTH elements apart.
struct Tile {
    long first;
    int rows;
    long column;
    int columns;
    float* at;
};

// Calls `step` with each number from 0 to `steps` and where to prefetch from.
template <int COUNT, class Step> INLINE void each_step(const Panels& b, long steps, const Step& step) {
    const uint32_t* next[COUNT];
    for (int p = 0; p < COUNT; p++) next[p] = b.next[p];
    long i = 0;
    for (long end = b.turn < steps ? b.turn : steps;; end = steps) {
        for (; i < end; i++) step(i, next);
        if (i >= steps) return;
        for (int p = 0; p < COUNT; p++) next[p] = b.then[p];
    }
}

// As `multiply`, for quantized operands: integer sums within a group, float sums over groups.
template <class T, int ROWS, int COUNT>
void micro_grouped(const Activations& x, const Panels& b, const uint16_t* const* scales, float* out) {
    constexpr int WORDS = T::GROUP / T::PER_WORD;
    const long prefetch_words = b.prefetch_words, next_scales = PANELS * x.groups * T::SCALES * LANES;
    f32x16 total[ROWS][COUNT] = {};
    each_step<COUNT>(b, x.groups, [&](long g, const uint32_t* const* next) {
        i32x16 acc[ROWS][COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int p = 0; p < COUNT; p++) acc[r][p] = i32x16{} + (T::SCALES == 1 ? x.offsets[r * x.groups + g] : 0);
        const uint32_t* units = x.units + g * (T::GROUP / T::PER_UNIT);
        for (int w = 0; w < WORDS; w++) {
            u32x16 word[COUNT];
#pragma GCC unroll 2
            for (int p = 0; p < COUNT; p++) {
                word[p] = load<u32x16>(b.at[p] + (g * WORDS + w) * LANES);
                __builtin_prefetch(next[p] + (g * WORDS + w) * prefetch_words, 0, 2);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int p = 0; p < COUNT; p++) {
                    const uint32_t* row = units + r * x.stride;
                    if constexpr (T::PER_WORD == 8) {
                        acc[r][p] = dot_small_quads(acc[r][p], word[p] & 0x0F0F0F0Fu, row[2 * w]);
                        acc[r][p] = dot_small_quads(acc[r][p], word[p] >> 4 & 0x0F0F0F0Fu, row[2 * w + 1]);
                    } else {
                        acc[r][p] = dot_quads(acc[r][p], word[p], row[w]);
                    }
                }
        }
#pragma GCC unroll 2
        for (int p = 0; p < COUNT; p++) {
            const uint16_t* of_group = scales[p] + g * T::SCALES * LANES;
            __builtin_prefetch(of_group + next_scales, 0, 2);
            const f32x16 scale = from_bf16(load<u16x16>(of_group));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                total[r][p] += convert<f32x16>(acc[r][p]) * (scale * x.scales[r * x.groups + g]);
            if constexpr (T::SCALES == 2) {
                const f32x16 lowest = from_bf16(load<u16x16>(of_group + LANES));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    total[r][p] += lowest * (x.scales[r * x.groups + g] * float(x.offsets[r * x.groups + g]));
            }
        }
    });
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < COUNT; p++) store(out + r * WIDTH + p * LANES, total[r][p]);
}

#if defined(__AVX512F__)
constexpr int MAX_GROUPED_ROWS = 6;  // two sums for each of 12 vectors
constexpr int PAIR_GROUPED_ROWS = 6;
#else
constexpr int MAX_GROUPED_ROWS = 3;  // two sums for each of 6 vectors of 8 lanes
constexpr int PAIR_GROUPED_ROWS = 1;
#endif

using GroupedMicro = void (*)(const Activations&, const Panels&, const uint16_t* const*, float*);

template <class T, int COUNT, int... ROWS>
INLINE GroupedMicro grouped_for(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr GroupedMicro table[] = {micro_grouped<T, ROWS + 1, COUNT>...};
    return table[rows - 1];
}

template <class T>
INLINE void multiply_grouped(
    int rows, int count, const Activations& x, const Panels& b, const uint16_t* const* scales, float* out
) {
    if (count == PANELS && rows <= PAIR_GROUPED_ROWS) {
        constexpr auto pair_rows = std::make_integer_sequence<int, PAIR_GROUPED_ROWS>();
        return grouped_for<T, PANELS>(rows, pair_rows)(x, b, scales, out);
    }
    for (int p = 0; p < count; p++) {
        constexpr auto all_rows = std::make_integer_sequence<int, MAX_GROUPED_ROWS>();
        Panels one = b;
        one.at[0] = b.at[p], one.next[0] = b.next[p], one.then[0] = b.then[p];
        grouped_for<T, 1>(rows, all_rows)(x, one, scales + p, out + p * LANES);
    }
}

// As `multiply_grouped`, for up to 32 rows, with bit-identical results.
INLINE void multiply_grouped_tiled(
    int rows, int count, const Activations& x, const Panels& b, const uint16_t* const* scales, float* out
) {
    alignas(64) int32_t whole[2 * TILE * WIDTH];
    for (int r = 0; r < rows * WIDTH; r += LANES) store(out + r, f32x16{});
    for (long g = 0; g < x.groups; g++) {
        multiply_tiled(rows, count, x.units, x.stride, b, g * TILE, whole);
        for (int p = 0; p < count; p++) {
            const f32x16 scale = from_bf16(load<u16x16>(scales[p] + g * LANES));
            for (int r = 0; r < rows; r++) {
                const i32x16 acc = load<i32x16>(whole + r * WIDTH + p * LANES) + x.offsets[r * x.groups + g];
                float* to = out + r * WIDTH + p * LANES;
                const f32x16 more = convert<f32x16>(acc) * (scale * x.scales[r * x.groups + g]);
                store(to, load<f32x16>(to) + more);
            }
        }
    }
}

template <class T> constexpr int max_rows() {
    if constexpr (TILED<T>) return 2 * TILE;
    return T::QUANTIZED ? MAX_GROUPED_ROWS : MAX_ROWS;
}

// Steps of a panel, see Panels.
template <class T> INLINE long panel_steps(const Linear& w) {
    if constexpr (T::QUANTIZED) return w.inputs / T::GROUP;
    return w.inputs / T::PER_UNIT;
}

// Words to prefetch ahead, as measured on a Zen 4: other distances read 5 to 20 % less per second.
template <class T> constexpr int DISTANCE = T::PER_WORD == 8 ? 768 : 512;

// Words of a panel.
template <class T> INLINE long panel_words(const Linear& w) { return w.inputs / T::PER_WORD * LANES; }

// Panel `panel` and the one that follows; `later` is multiplied next.
template <class T> INLINE Panels panels_of(const Linear& w, long panel, long later) {
    const long apart = panel_words<T>(w);
    Panels b(w.panels + panel * apart, apart);
    b.prefetch_ahead(w.panels + later * apart, apart, panel_steps<T>(w), DISTANCE<T>);
    return b;
}

// Multiplies rows with `count` panels `b`, of which `panel` is the first.
template <class T>
INLINE void product(
    Tiles& tiles, const Linear& w, const Panels& b, const Activations& x, int rows, long panel, int count, float* out
) {
    const long words = w.inputs / T::PER_WORD;
    if constexpr (TILED<T>) tiles.shape(rows);
    if constexpr (T::QUANTIZED) {
        const long groups = x.groups * T::SCALES * LANES;
        const uint16_t* scales[PANELS] = {w.scales + panel * groups, w.scales + (panel + 1) * groups};
        if constexpr (TILED<T>)
            multiply_grouped_tiled(rows, count, x, b, scales, out);
        else
            multiply_grouped<T>(rows, count, x, b, scales, out);
    } else if constexpr (TILED<T>) {
        multiply_tiled(rows, count, x.units, x.stride, b, words, out);
    } else {
        const long first = b.turn < words ? b.turn : words;
        multiply<T>(rows, count, x.units, x.stride, b, first, out, WIDTH);
        if (first < words)
            multiply<T, true>(rows, count, x.units + first, x.stride, b.rest(), words - first, out, WIDTH);
    }
}

INLINE void add_bias(const float* bias, const Tile& tile) {
    for (int r = 0; r < tile.rows; r++)
        for (int c = 0; c < tile.columns; c += LANES) {
            float* at = tile.at + r * WIDTH + c;
            store(at, load<f32x16>(at) + load<f32x16>(bias + tile.column + c));
        }
}

// How a product is divided into tasks. Rows are multiplied with a pair of panels up to SLAB at a time. Where these are so
// few that memory limits them, a task takes several pairs: a hand-out costs a transfer between cores.
struct Division {
    long pairs;  // of panels
    long bands;  // of `some` pairs each
    long some;
    long tasks;

    Division(long outputs, long panel_bytes, long rows, int threads)
        : pairs(ceil_div(ceil_div(outputs, LANES), PANELS)) {
        const long most = BAND_BYTES / (PANELS * panel_bytes), fair = pairs / (BANDS * threads);
        some = rows > FEW || most < 2 || fair < 2 ? 1 : most < fair ? most : fair;
        bands = ceil_div(pairs, some);
        tasks = bands * ceil_div(rows, SLAB);
    }

    static constexpr long BAND_BYTES = 128 << 10, FEW = 12;
    static constexpr int BANDS = 8;  // per thread
};

// Multiplies rows `slab` .. `slab` + `height` with a pair of panels, `later` being the pair that this thread probably takes
// next.
template <class T, class Finish>
INLINE void multiply_pair(
    Tiles& tiles, const Linear& w, const Activations& x, long slab, long height, long pair, long later, const Finish& finish
) {
    constexpr int most = max_rows<T>();
    alignas(64) float buffer[most * WIDTH];
    const long panels = ceil_div(w.outputs, LANES), panel = pair * PANELS, blocks = ceil_div(height, most);
    const int width = panels - panel < PANELS ? 1 : PANELS;
    for (long block = 0; block < blocks; block++) {
        const long first = slab + height * block / blocks, end = slab + height * (block + 1) / blocks;
        const Tile tile{first, int(end - first), panel * LANES, width * LANES, buffer};
        Panels b = panels_of<T>(w, panel, later * PANELS);
        if (blocks > 1) {
            // A part of the next panels with each block of rows. The current ones are in the caches.
            const long pace = ceil_div(LANES, blocks), words = w.inputs / T::PER_WORD;
            b.prefetch_from(w.panels + later * PANELS * words * LANES + block * words * pace, words * LANES, pace);
        }
        product<T>(tiles, w, b, x.from(first), tile.rows, panel, width, buffer);
        if (w.bias) add_bias(w.bias, tile);
        finish(tile);
    }
}

// An op: all threads of the team call it. `finish` gets each part of the result once.
template <class T, class Finish>
void linear(Team& team, const Linear& w, const Activations& x, long count, const Finish& finish) {
    const Division division(w.outputs, panel_words<T>(w) * 4, count, team.size());
    long done = 0;
    {
        Tiles tiles;  // released before the thread waits for the others
        for (long task; (task = team.next(division.tasks)) < division.tasks; done++) {
            const long slab = task / division.bands * SLAB, height = count - slab < SLAB ? count - slab : SLAB;
            const long first = task % division.bands * division.some;
            const long end = first + division.some < division.pairs ? first + division.some : division.pairs;
            for (long pair = first; pair < end; pair++) {
                const long later = pair + 1 < end ? pair + 1 : (task + team.size()) % division.bands * division.some;
                multiply_pair<T>(tiles, w, x, slab, height, pair, later, finish);
            }
        }
    }
    team.finish(division.tasks, done);
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

// As Store, for a last panel that is wider than the row.
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

// silu(gate) * up; panels of gate and up alternate.
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
