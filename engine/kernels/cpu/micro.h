// The one inner loop of everything that multiplies: with AVX-512 up to 12 rows by 32 columns, or 6 by 64, in registers,
// otherwise up to 6 rows by 16 columns, 3 by 32 or 1 by 64.
//
//     out[r][c] (+)= sum over units u, in their order, of a[r][u] * panel[c / 16][u][c % 16]
//
// The order of the sum doesn't depend on how many rows or columns are computed together: a row's result is the same bits
// alone as in a batch.
#pragma once

#include <utility>

#include "formats.h"

constexpr int PANELS = 2;
constexpr int WIDTH = PANELS * LANES;
constexpr int QUAD = 4;
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12;  // 24 sums of 16 lanes in 32 registers
constexpr int PAIR_ROWS = 12;
constexpr int QUAD_ROWS = 6;   // few rows meet four panels: sums of two would wait for each other
#else
constexpr int MOST_ROWS = 6;  // 12 sums of 8 lanes in 16 registers
constexpr int PAIR_ROWS = 3;
constexpr int QUAD_ROWS = 1;
#endif

// Where the panels are that are multiplied next. They are asked for at the pace at which the present ones are used: the
// processor's own guesses end with a page of memory, and blocks of the cache are pages apart.
struct Panels {
    const uint32_t* at[QUAD];
    const uint32_t* next[QUAD];
    long pace = LANES;  // words asked for with each unit

    Panels() {}
    Panels(const uint32_t* first, long apart) : at{first, first + apart}, next{first + FURTHER, first + apart + FURTHER} {}

    void look_at(const uint32_t* first, long apart, long words_a_unit) {
        for (int p = 0; p < PANELS; p++) next[p] = first + p * apart;
        pace = words_a_unit;
    }

    static constexpr int FURTHER = 512;  // words: where they lie in a row, half a page on
};

// a: rows of `stride` units; b: one, two or four panels; out: rows that lie `apart` numbers from each other.
template <class T> using Micro = void (*)(const uint32_t* a, long stride, const Panels& b, long units, void* out, long apart);

template <class T, int ROWS, int COUNT, bool ADD>
void micro(const uint32_t* a, long stride, const Panels& b, long units, void* out, long apart) {
    typedef typename T::Acc Acc;
    Acc acc[ROWS][COUNT];
    uint32_t* to = static_cast<uint32_t*>(out);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) acc[r][p] = ADD ? load<Acc>(to + r * apart + p * LANES) : Acc{};
    const uint32_t *panel[COUNT], *next[COUNT];
    for (int p = 0; p < COUNT; p++) panel[p] = b.at[p], next[p] = b.next[p];
    const long pace = b.pace;
    for (long u = 0; u < units; u++) {
        u32x16 column[COUNT];
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) {
            column[p] = load<u32x16>(panel[p] + u * LANES);
            __builtin_prefetch(next[p] + u * pace, 0, 3);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            uint32_t row = a[r * stride + u];
#pragma GCC unroll 4
            for (int p = 0; p < COUNT; p++) acc[r][p] = T::dot(acc[r][p], column[p], row);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) store(to + r * apart + p * LANES, acc[r][p]);
}

// The loops for 1 to sizeof...(ROWS) rows.
template <class T, int COUNT, bool ADD, int... ROWS>
INLINE Micro<T> micro_for(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr Micro<T> table[] = {micro<T, ROWS + 1, COUNT, ADD>...};
    return table[rows - 1];
}

template <class T, int COUNT, bool ADD> INLINE Micro<T> micro_for(int rows) {
    constexpr int most = COUNT == QUAD ? QUAD_ROWS : COUNT == PANELS ? PAIR_ROWS : MOST_ROWS;
    return micro_for<T, COUNT, ADD>(rows, std::make_integer_sequence<int, most>());
}

// How many of `left` panels `rows` meet at a time where there may be four.
INLINE int panels_at_once(int rows, int left) { return rows <= QUAD_ROWS && left >= QUAD ? QUAD : left >= 2 ? 2 : 1; }

// `rows` at most MOST_ROWS, `count` panels (1, 2, or 4 for QUAD_ROWS); ADD: onto what `out` holds.
template <class T, bool ADD = false>
INLINE void multiply(int rows, int count, const uint32_t* a, long stride, const Panels& b, long units, void* out, long apart) {
    if (count == QUAD) return micro_for<T, QUAD, ADD>(rows)(a, stride, b, units, out, apart);
    if (count == PANELS && rows <= PAIR_ROWS) return micro_for<T, PANELS, ADD>(rows)(a, stride, b, units, out, apart);
    for (int p = 0; p < count; p++) {
        Panels one = b;
        one.at[0] = b.at[p], one.next[0] = b.next[p];
        micro_for<T, 1, ADD>(rows)(a, stride, one, units, static_cast<uint32_t*>(out) + p * LANES, apart);
    }
}
