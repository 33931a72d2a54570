// The inner loop of all matrix products. The sums of a block of rows by columns stay in registers: with AVX-512 up to 12
// rows by 32 columns, or 6 by 64; otherwise up to 6 rows by 16 columns, 3 by 32 (NEON: 2) or 1 by 64.
//
//     out[r][c] (+)= sum over units u, in their order, of a[r][u] * panel[c / 16][u][c % 16]
//
// The order of the sum does not depend on how many rows or columns are computed together, so a row's result has the same
// bits alone and in a batch.
#pragma once

#include <climits>
#include <utility>

#include "formats.h"

constexpr int PANELS = 2;
constexpr int WIDTH = PANELS * LANES;
constexpr int QUAD = 4;
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;  // 24 sums of 16 lanes in 32 registers
constexpr int PAIR_ROWS = 12;
constexpr int QUAD_ROWS = 6;   // few rows take four panels: the sums of two would wait for each other
#elif NEON
constexpr int MAX_ROWS = 6;  // 24 sums of 4 lanes in 32 registers
constexpr int PAIR_ROWS = 2;
constexpr int QUAD_ROWS = 1;
#else
constexpr int MAX_ROWS = 6;  // 12 sums of 8 lanes in 16 registers
constexpr int PAIR_ROWS = 3;
constexpr int QUAD_ROWS = 1;
#endif

// The panels to multiply, and what is prefetched meanwhile, at the same pace: `next`, and for linears from step `turn` on
// `then`. A step is a unit, or a group of quantized weights. The hardware prefetcher stops at the end of a page, and
// neither blocks of the cache nor the panels of a thread follow each other in memory. Prefetches go to the core's second
// cache: those to the first one wait for its few fill buffers, which halves the bandwidth of a core (measured on Zen 4: 11
// and 21 GB/s).
struct Panels {
    const uint32_t* at[QUAD];
    const uint32_t* next[QUAD];
    const uint32_t* then[QUAD];
    long turn = LONG_MAX;
    long prefetch_words = LANES;  // per unit

    Panels() {}
    Panels(const uint32_t* first, long apart) : at{first, first + apart} {}

    // Prefetches from two places at another pace.
    void prefetch_from(const uint32_t* first, const uint32_t* second, long words) {
        next[0] = first, next[1] = second;
        turn = LONG_MAX;
        prefetch_words = words;
    }

    // Prefetches what follows in `most` words: the rest of these panels, of `steps` steps, then the panels from `later` on.
    void prefetch_ahead(const uint32_t* later, long apart, long steps, long most) {
        const long words = apart / steps, distance = most < apart ? most / words : steps;
        turn = steps - distance;
        for (int p = 0; p < PANELS; p++) {
            next[p] = at[p] + distance * words;
            then[p] = later + p * apart - turn * words;
        }
    }

    // What is left from step `turn` on, a unit each.
    Panels rest() const {
        Panels b = *this;
        for (int p = 0; p < PANELS; p++) b.at[p] += turn * LANES, b.next[p] = then[p] + turn * prefetch_words;
        b.turn = LONG_MAX;
        return b;
    }
};

// a: rows of `stride` units; b: one, two or four panels; out: rows of `apart` elements.
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
    const long prefetch_words = b.prefetch_words;
    for (long u = 0; u < units; u++) {
        u32x16 column[COUNT];
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) {
            column[p] = load<u32x16>(panel[p] + u * LANES);
            __builtin_prefetch(next[p] + u * prefetch_words, 0, 2);
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

// The inner loops for 1 to sizeof...(ROWS) rows.
template <class T, int COUNT, bool ADD, int... ROWS>
INLINE Micro<T> micro_for(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr Micro<T> table[] = {micro<T, ROWS + 1, COUNT, ADD>...};
    return table[rows - 1];
}

template <class T, int COUNT, bool ADD> INLINE Micro<T> micro_for(int rows) {
    constexpr int most = COUNT == QUAD ? QUAD_ROWS : COUNT == PANELS ? PAIR_ROWS : MAX_ROWS;
    return micro_for<T, COUNT, ADD>(rows, std::make_integer_sequence<int, most>());
}

// How many of the remaining `left` panels are multiplied with `rows` rows at a time.
INLINE int panels_at_once(int rows, int left) { return rows <= QUAD_ROWS && left >= QUAD ? QUAD : left >= 2 ? 2 : 1; }

// `rows` at most MAX_ROWS; `count` panels: 1, 2, or 4 with at most QUAD_ROWS rows. ADD: add to `out`.
template <class T, bool ADD = false>
INLINE void multiply(int rows, int count, const uint32_t* a, long stride, const Panels& b, long units, void* out, long apart) {
    if (count == QUAD) return micro_for<T, QUAD, ADD>(rows)(a, stride, b, units, out, apart);
    if (count == PANELS && rows <= PAIR_ROWS) return micro_for<T, PANELS, ADD>(rows)(a, stride, b, units, out, apart);
    for (int p = 0; p < count; p++) {
        Panels one = b;
        one.at[0] = b.at[p], one.next[0] = b.next[p], one.then[0] = b.then[p];
        micro_for<T, 1, ADD>(rows)(a, stride, one, units, static_cast<uint32_t*>(out) + p * LANES, apart);
    }
}
