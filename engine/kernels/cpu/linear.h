// Products of activations and packed weights. A functor `finish` processes each part of a result while it is in the caches.
#pragma once

#include "grouped.h"
#include "next_blocks.h"
#include "team.h"

// out = in x weights + bias. `panels` have the layout of formats.h, padded with zeros to whole panels. `scales`, bfloat16
// [panels, groups, SCALES, 16], are those of quantized weights. `bias` may be null.
struct Linear {
    const uint32_t* panels;
    const uint16_t* scales;
    const float* bias;
    int32_t outputs;
    int32_t inputs;
};

constexpr int SLAB = 240;  // rows that are multiplied with a pair of panels; up to 1,536 inputs fit a core's own cache

// Part of a result: `rows` from `first` on, columns from `column` on; rows are WIDTH elements apart.
struct Tile {
    long first;
    int rows;
    long column;
    int columns;
    float* at;
};

// Formats that use AMX tiles if there are any, always: the sums of a tile have their own order. Quantized formats have the
// same bits on tiles and vectors.
template <class T> constexpr bool TILED = false;
#if defined(TILES)
template <> inline constexpr bool TILED<BF16> = true;
#endif

template <class T> constexpr int max_rows() {
    if constexpr (T::QUANTIZED) return MAX_GROUPED_ROWS;
    return TILED<T> ? 2 * TILE : MAX_ROWS;
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
    if constexpr (T::QUANTIZED) {
        const long groups = x.groups * T::SCALES * LANES;
        const uint16_t* scales[PANELS] = {w.scales + panel * groups, w.scales + (panel + 1) * groups};
        multiply_grouped<T>(rows, count, x, b, scales, out);
    } else if constexpr (TILED<T>) {
        tiles.shape(rows);
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

#if defined(TILES)

// As `multiply_pair`, on tiles.
template <class T, class Finish>
INLINE void multiply_unpacked(
    Tiles& tiles, const Linear& w, const Activations& x, long slab, long height, long pair, long later, const Finish& finish
) {
    alignas(64) float buffer[2 * TILE * WIDTH];
    const long panel = pair * PANELS, words = panel_words<T>(w), unpacked = w.inputs / T::PER_UNIT * LANES;
    const int width = ceil_div(w.outputs, LANES) - panel < PANELS ? 1 : PANELS;
    uint32_t* panels = unpacked_panels.take(PANELS * unpacked);
    unpack<T>(w.panels + panel * words, width * words, panels);
    const long scales = x.groups * T::SCALES * LANES, blocks = ceil_div(height, 2 * TILE);
    const long parts = width * (height > TILE ? 2 * blocks : 1) * x.groups;
    Ahead ahead{w.panels + later * PANELS * words, round_up(ceil_div(PANELS * words, parts), LANES)};
    for (long block = 0; block < blocks; block++) {
        const long first = slab + height * block / blocks, end = slab + height * (block + 1) / blocks;
        const Tile tile{first, int(end - first), panel * LANES, width * LANES, buffer};
        tiles.shape(tile.rows, GROUP_UNITS<T>);
        multiply_groups_tiled<T>(
            tile.rows, width, x.from(first), panels, unpacked, w.scales + panel * scales, scales, ahead, buffer
        );
        if (w.bias) add_bias(w.bias, tile);
        finish(tile);
    }
}

#endif

// Multiplies rows `slab` .. `slab` + `height` with a pair of panels, `later` being the pair that this thread probably takes
// next.
template <class T, class Finish>
INLINE void multiply_pair(
    Tiles& tiles, const Linear& w, const Activations& x, long slab, long height, long pair, long later,
    const NextBlocks& cache, const Finish& finish
) {
#if defined(TILES)
    if constexpr (T::QUANTIZED)
        if (height >= MIN_TILED_ROWS) return multiply_unpacked<T>(tiles, w, x, slab, height, pair, later, finish);
#endif
    constexpr int most = max_rows<T>();
    alignas(64) float buffer[most * WIDTH];
    const long panels = ceil_div(w.outputs, LANES), panel = pair * PANELS, blocks = ceil_div(height, most);
    const int width = panels - panel < PANELS ? 1 : PANELS;
    const long cached = std::min(cache.count, blocks / 2), rest = blocks - cached, steps = w.inputs / T::PER_WORD;
    for (long block = 0; block < blocks; block++) {
        const long first = slab + height * block / blocks, end = slab + height * (block + 1) / blocks;
        const Tile tile{first, int(end - first), panel * LANES, width * LANES, buffer};
        Panels b = panels_of<T>(w, panel, later * PANELS);
        // With each block of rows a part of the next panels, then blocks of the cache. The current panels are in the caches.
        if (block >= rest) {
            cache.prefetch(block - rest, steps, b);
        } else if (blocks > 1) {
            const long pace = ceil_div(LANES, rest), words = steps * LANES;
            const uint32_t* next = w.panels + later * PANELS * words + block * steps * pace;
            b.prefetch_from(next, next + words, pace);
        }
        product<T>(tiles, w, b, x.from(first), tile.rows, panel, width, buffer);
        if (w.bias) add_bias(w.bias, tile);
        finish(tile);
    }
}

// An op: all threads of the team call it. `finish` gets each part of the result once. cache: what to prefetch meanwhile.
template <class T, class Finish>
void linear(
    Team& team, const Linear& w, const Activations& x, long count, const Finish& finish, const NextBlocks& cache = {}
) {
    const Division division(w.outputs, panel_words<T>(w) * 4, count, team.size());
    long done = 0;
    {
        Tiles tiles;  // released before the thread waits for the others
        for (long task; (task = team.next(division.tasks)) < division.tasks; done++) {
            const long slab = task / division.bands * SLAB, height = count - slab < SLAB ? count - slab : SLAB;
            const long first = task % division.bands * division.some;
            const long end = first + division.some < division.pairs ? first + division.some : division.pairs;
            const NextBlocks own = cache.part(task, division.tasks);
            for (long pair = first; pair < end; pair++) {
                const long later = pair + 1 < end ? pair + 1 : (task + team.size()) % division.bands * division.some;
                multiply_pair<T>(tiles, w, x, slab, height, pair, later, own, finish);
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

#if defined(TILES) && defined(__AVX512F__)
// On processors with tiles a division takes 16 cycles a vector, an estimate of 14 bits and a Newton step about 4. The
// relative error is below 2e-7. On a Zen 4 the division is as fast.
INLINE f32x16 silu(f32x16 x) {
    const f32x16 power = x * -1.44269504f, most = splat(126.0f);  // a larger divisor has no estimate
    const f32x16 divisor = 1.0f + exp2_of(select(power > most, most, power));
    const f32x16 estimate = (f32x16)_mm512_rcp14_ps((__m512)divisor);
    return x * (estimate * (2.0f - divisor * estimate));
}
#else
INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp2_of(x * -1.44269504f)); }
#endif

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
