// The one inner loop of everything that multiplies: up to 12 rows by up to 32 columns, in registers.
//
//     out[r][c] (+)= sum over units u, in their order, of a[r][u] * panel[c / 16][u][c % 16]
//
// The order of the sum doesn't depend on how many rows or columns are computed together: a row's result is the same bits
// alone as in a batch.
#pragma once

#include "formats.h"

constexpr int PANELS = 2;
constexpr int WIDTH = PANELS * LANES;
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12;  // 24 sums of 16 lanes in 32 registers
#else
constexpr int MOST_ROWS = 4;
#endif

// Where the panels are that are multiplied next. They are asked for at the pace at which the present ones are used: the
// processor's own guesses end with a page of memory, and blocks of the cache are pages apart.
struct Panels {
    const uint32_t* at[PANELS];
    const uint32_t* next[PANELS];

    Panels() {}
    Panels(const uint32_t* first, long apart) : at{first, first + apart}, next{first + FURTHER, first + apart + FURTHER} {}

    static constexpr int FURTHER = 512;  // words: where they lie in a row, half a page on
};

// a: rows of `stride` units; b: one or two panels; out: rows of WIDTH numbers.
template <class T> using Micro = void (*)(const uint32_t* a, long stride, const Panels& b, long units, void* out);

template <class T, int ROWS, int COUNT, bool ADD>
void micro(const uint32_t* a, long stride, const Panels& b, long units, void* out) {
    typedef typename T::Acc Acc;
    Acc acc[ROWS][COUNT];
    char* to = static_cast<char*>(out);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < COUNT; p++) acc[r][p] = ADD ? load<Acc>(to + (r * PANELS + p) * sizeof(Acc)) : Acc{};
    const uint32_t *panel[COUNT], *next[COUNT];
    for (int p = 0; p < COUNT; p++) panel[p] = b.at[p], next[p] = b.next[p];
    for (long u = 0; u < units; u++) {
        u32x16 column[COUNT];
#pragma GCC unroll 2
        for (int p = 0; p < COUNT; p++) {
            column[p] = load<u32x16>(panel[p] + u * LANES);
            __builtin_prefetch(next[p] + u * LANES, 0, 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            uint32_t row = a[r * stride + u];
#pragma GCC unroll 2
            for (int p = 0; p < COUNT; p++) acc[r][p] = T::dot(acc[r][p], column[p], row);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < COUNT; p++) store(to + (r * PANELS + p) * sizeof(Acc), acc[r][p]);
}

template <class T, int COUNT, bool ADD> INLINE Micro<T> micro_for(int rows) {
    static constexpr Micro<T> table[12] = {
        micro<T, 1, COUNT, ADD>, micro<T, 2, COUNT, ADD>,  micro<T, 3, COUNT, ADD>,  micro<T, 4, COUNT, ADD>,
#if defined(__AVX512F__)
        micro<T, 5, COUNT, ADD>, micro<T, 6, COUNT, ADD>,  micro<T, 7, COUNT, ADD>,  micro<T, 8, COUNT, ADD>,
        micro<T, 9, COUNT, ADD>, micro<T, 10, COUNT, ADD>, micro<T, 11, COUNT, ADD>, micro<T, 12, COUNT, ADD>,
#endif
    };
    return table[rows - 1];
}

// `rows` at most MOST_ROWS, `count` panels (1 or 2); ADD: onto what `out` holds.
template <class T, bool ADD = false>
INLINE void multiply(int rows, int count, const uint32_t* a, long stride, const Panels& b, long units, void* out) {
    (count == 2 ? micro_for<T, 2, ADD>(rows) : micro_for<T, 1, ADD>(rows))(a, stride, b, units, out);
}
