// Products of activations with quantized weights: integer sums within a group of inputs, float sums over groups.
//
// Vectors multiply the integers as they are packed. Where there are tiles, they multiply MIN_TILED_ROWS rows or more, with
// the same bits: a pair of panels is first unpacked to signed bytes, which all rows share. Then 16 rows of a panel are
// computed at a time. Their float sums stay in registers, and the tile of a group's integer sums goes through a buffer in
// the first cache while the next group is multiplied.
#pragma once

#include "buffer.h"
#include "tile.h"

// The left side of a product, row by row in units. For quantized weights each group of a row has a scale and an offset: for
// int8 -OFFSET times the sum of its integers, for int4 the float sum of the numbers that they stand for. Tiles read scales
// and offsets of TILE - 1 rows behind the last one, and don't use them.
struct Activations {
    const uint32_t* units;
    long stride;
    const float* scales;
    const uint32_t* offsets;
    long groups;

    Activations from(long row) const {
        return {units + row * stride, stride, scales + row * groups, offsets + row * groups, groups};
    }
};

// total + a group's integer sums in float. `scales` are the weights' of the group, `at` is the row's group in x.
template <class T>
INLINE f32x16 add_group(f32x16 total, i32x16 sums, const uint16_t* scales, const Activations& x, long at) {
    total += convert<f32x16>(sums) * (from_bf16(load<u16x16>(scales)) * x.scales[at]);
    if constexpr (T::SCALES == 2) total += from_bf16(load<u16x16>(scales + LANES)) * as_float(x.offsets[at]);
    return total;
}

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
            for (int p = 0; p < COUNT; p++) acc[r][p] = i32x16{} + (T::OFFSET ? int32_t(x.offsets[r * x.groups + g]) : 0);
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
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                total[r][p] = add_group<T>(total[r][p], acc[r][p], of_group, x, r * x.groups + g);
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

#if defined(TILES)

constexpr int MIN_TILED_ROWS = 9;

template <class T> constexpr int GROUP_UNITS = T::GROUP / T::PER_UNIT;  // of a tile: at most TILE

// Unpacks panels to signed bytes, unit by unit: a right-hand tile of dot_signed.
template <class T> INLINE void unpack(const uint32_t* words, long count, uint32_t* out) {
    constexpr uint32_t FLIP = T::OFFSET ? 0x80808080u : 0;  // subtracts OFFSET from each byte
    for (long i = 0; i < count; i += LANES, out += T::PER_WORD / T::PER_UNIT * LANES) {
        const u32x16 word = load<u32x16>(words + i);
        if constexpr (T::PER_WORD == 8) {
            store(out, word & 0x0F0F0F0Fu);
            store(out + LANES, word >> 4 & 0x0F0F0F0Fu);
        } else {
            store(out, word ^ FLIP);
        }
    }
    TILE_FENCE();
}

// Memory that is prefetched in equal parts, one with each group.
struct Ahead {
    const uint32_t* at;
    long words;

    void step() {
        prefetch(at, words);
        at += words;
    }
};

// Two panels of the calling thread.
inline thread_local Buffer<uint32_t> unpacked_panels;

// The integer sums of a group, [16, 16]. LOWER: in the tiles of rows 16 .. 31.
template <bool LOWER> INLINE void dot_group(const uint32_t* left, long stride, const uint32_t* right, int32_t* sums) {
    if constexpr (LOWER) {
        TILE_ZERO(2);
        TILE_LOAD(5, left, stride * 4);
        TILE_LOAD(6, right, TILE_BYTES);
        TILE_DOT_SIGNED(2, 5, 6);
        TILE_STORE(2, sums, TILE_BYTES);
    } else {
        TILE_ZERO(0);
        TILE_LOAD(4, left, stride * 4);
        TILE_LOAD(6, right, TILE_BYTES);
        TILE_DOT_SIGNED(0, 4, 6);
        TILE_STORE(0, sums, TILE_BYTES);
    }
}

// Up to 16 rows by a panel that is unpacked.
template <class T, bool LOWER>
void tiled_groups(int rows, const Activations& x, const uint32_t* panel, const uint16_t* scales, Ahead& ahead, float* out) {
    constexpr long UNITS = GROUP_UNITS<T>;
    alignas(64) int32_t sums[2][TILE * LANES];
    f32x16 total[TILE] = {};
    const auto multiply = [&](long g) {
        dot_group<LOWER>(x.units + g * UNITS, x.stride, panel + g * UNITS * LANES, sums[g % 2]);
    };
    multiply(0);
    for (long g = 0; g < x.groups; g++) {
        if (g + 1 < x.groups) multiply(g + 1);
        ahead.step();
        const int32_t* whole = sums[g % 2];
        const uint16_t* of_group = scales + g * T::SCALES * LANES;
#pragma GCC unroll 16
        for (int r = 0; r < TILE; r++) {
            const i32x16 acc = load<i32x16>(whole + r * LANES);
            total[r] = add_group<T>(total[r], acc, of_group, x, r * x.groups + g);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < TILE; r++)
        if (r < rows) store(out + r * WIDTH, total[r]);
}

// Up to 32 rows by `count` panels that are unpacked, `words` apart; `scales` of panels are `apart` from each other.
template <class T>
INLINE void multiply_groups_tiled(
    int rows, int count, const Activations& x, const uint32_t* panels, long words, const uint16_t* scales, long apart,
    Ahead& ahead, float* out
) {
    const int upper = rows < TILE ? rows : TILE;
    for (int p = 0; p < count; p++) {
        const uint32_t* panel = panels + p * words;
        const uint16_t* own = scales + p * apart;
        tiled_groups<T, false>(upper, x, panel, own, ahead, out + p * LANES);
        if (rows > upper)
            tiled_groups<T, true>(rows - upper, x.from(TILE), panel, own, ahead, out + TILE * WIDTH + p * LANES);
    }
}

#endif
