// The two products of attention, queries by keys and weights by values, over up to SPAN tokens of a row.
//
// They differ from those of linear layers (micro.h): the right side is scattered over blocks of the cache, while strides are
// known when the kernels are compiled. As there, the order of a sum depends on nothing but its units.
#pragma once

#include "micro.h"

constexpr int SPAN = 128;  // tokens whose scores are computed at a time
constexpr int MAX_HEAD_DIM = 256;  // elements per head

// Up to four panels of the right side, in runs of units: keys have one run, values one for each block. Meanwhile `next` is
// prefetched, at the same pace (see Panels).
struct Runs {
    static constexpr int MAX = SPAN / LANES;
    int count = 1;
    long units[MAX];
    const uint32_t* at[MAX][QUAD];
    const uint32_t* next[MAX][QUAD];
};

// The format of the operands, whether to add to `out`, the words between rows of the left side, the elements between rows of
// `out`.
template <class D, bool ADDS, long LEFT, long OUT> struct Product {
    typedef D Dot;
    static constexpr bool ADD = ADDS;
    static constexpr long STRIDE = LEFT, APART = OUT;
};

// Panels first .. first + COUNT of `b`.
template <class P, int COUNT, int ROWS> void micro_runs(const uint32_t* a, const Runs& b, int first, uint32_t* out) {
    typedef typename P::Dot::Acc Acc;
    Acc acc[ROWS][COUNT];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) acc[r][p] = P::ADD ? load<Acc>(out + r * P::APART + p * LANES) : Acc{};
    for (int run = 0; run < b.count; run++) {
        const uint32_t *panel[COUNT], *next[COUNT];
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) panel[p] = b.at[run][first + p], next[p] = b.next[run][first + p];
        const uint32_t* end = a + b.units[run];
        for (long at = 0; a < end; a++, at += LANES) {
            u32x16 column[COUNT];
#pragma GCC unroll 4
            for (int p = 0; p < COUNT; p++) __builtin_prefetch(next[p] + at, 0, 2);
            // Loads that miss the first cache would hold up prefetches behind them: on Zen 4 that cost a quarter of the
            // bandwidth.
            __asm__ volatile("" ::: "memory");
#pragma GCC unroll 4
            for (int p = 0; p < COUNT; p++) column[p] = load<u32x16>(panel[p] + at);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int p = 0; p < COUNT; p++) acc[r][p] = P::Dot::dot(acc[r][p], column[p], a[r * P::STRIDE]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < COUNT; p++) store(out + r * P::APART + p * LANES, acc[r][p]);
}

using RunsMicro = void (*)(const uint32_t* a, const Runs& b, int first, uint32_t* out);

template <class P, int COUNT, int... ROWS> INLINE RunsMicro runs_micro_for(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr RunsMicro table[] = {micro_runs<P, COUNT, ROWS + 1>...};
    return table[rows - 1];
}

// Products in vector registers.
class VectorProducts {
  public:
    static constexpr int ROWS = MAX_ROWS;  // of the left side

    // `units`: of a query; `run_units`: of a block's tokens, within a span.
    VectorProducts(long, long) {}

    // The rows of the next products.
    void begin(int) {}

    // Units of a run that a product can end at: the weights behind the last token are 0.
    static long whole(long units) { return units; }

    static int panels_at_once(int rows, int left) { return ::panels_at_once(rows, left); }

    // `count` as panels_at_once gives it.
    template <class P> static void multiply(int rows, int count, const uint32_t* a, const Runs& b, void* out) {
        const auto to = static_cast<uint32_t*>(out);
        if (count == QUAD) return runs_micro_for<P, QUAD>(rows, UpTo<QUAD_ROWS>())(a, b, 0, to);
        if (count == PANELS && rows <= PAIR_ROWS) return runs_micro_for<P, PANELS>(rows, UpTo<PAIR_ROWS>())(a, b, 0, to);
        for (int p = 0; p < count; p++) runs_micro_for<P, 1>(rows, UpTo<MAX_ROWS>())(a, b, p, to + p * LANES);
    }

  private:
    template <int COUNT> using UpTo = std::make_integer_sequence<int, COUNT>;
};

// How the products of a format of the cache are computed, and their operations.
template <class T> struct ProductsOf {
    typedef VectorProducts Type;
};

template <class T> struct DotsOf {
    typedef T Keys;
    typedef T Values;
};

template <> struct DotsOf<C8> {
    typedef C8::Keys Keys;
    typedef C8::Values Values;
};
