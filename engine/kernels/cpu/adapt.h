// Adapters: for tokens that have one, up (down x) is added to what a linear makes of x.
//
// `down` (LoRA's A, nothing to do with an MLP's) brings x to a few numbers, before the product; `up` (B) is added to each
// piece of the product's result after the bias. A token's sums have one order, whoever its neighbours are.
#pragma once

#include "linear.h"

enum Place { AT_QKV, AT_OUTPUT, AT_GATE_UP, AT_DOWN, PLACES };

// Of one linear. Where linears lie side by side, so do their ranks, with zeros in `up` where they don't meet.
struct LowRank {
    const float* down;  // [rank, inputs]
    const float* up;    // [panels, rank, 16]
    int32_t rank;       // 0: nothing is added
};

// Of a step; `table` is null where no token has one.
struct Adapters {
    const LowRank* const* table;  // [adapters], of which each is [layers, PLACES]
    const int32_t* of;            // [tokens], -1: none
    int32_t most_rank;

    const LowRank* find(long token, int layer, Place place) const {
        if (of[token] < 0) return nullptr;
        const LowRank* found = table[of[token]] + layer * PLACES + place;
        return found->rank ? found : nullptr;
    }
};

// 16 numbers of a left side.
template <class F> INLINE f32x16 numbers(const Rows& x, long row, long at) {
    const auto from = reinterpret_cast<const typename F::Element*>(x.units + row * x.stride) + at;
    if constexpr (F::QUANTISED) {
        const i32x16 whole = convert<i32x16>(load<i8x16>(from));
        return convert<f32x16>(whole) * x.scales[row * x.groups + at / F::GROUP];
    } else {
        return F::widen(from);
    }
}

// COUNT of the sums of `bring_down`.
template <class F, int COUNT>
INLINE void bring_some_down(const float* down, const Rows& x, long row, int inputs, float* out) {
    f32x16 total[COUNT] = {};
    for (int i = 0; i < inputs; i += LANES) {
        const f32x16 number = numbers<F>(x, row, i);
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) total[k] += number * load<f32x16>(down + long(k) * inputs + i);
    }
    for (int k = 0; k < COUNT; k++) out[k] = sum(total[k]);
}

// out, [rank] = down x.
template <class F> INLINE void bring_down(const LowRank& adapter, const Rows& x, long row, int inputs, float* out) {
    int k = 0;
    for (; k + 4 <= adapter.rank; k += 4) bring_some_down<F, 4>(adapter.down + long(k) * inputs, x, row, inputs, out + k);
    for (; k < adapter.rank; k++) bring_some_down<F, 1>(adapter.down + long(k) * inputs, x, row, inputs, out + k);
}

// What a linear with adapters does with a piece of its result: adds to it, then calls what it would have called (by a
// pointer, so that `linear` is compiled once for all of these).
struct BringUp {
    const Adapters& adapters;
    int layer;
    Place place;
    const float* lowered;  // [tokens, most_rank]
    const void* finish;
    void (*call)(const void* finish, const Tile& tile);

    void operator()(const Tile& t) const {
        for (int r = 0; r < t.rows; r++) {
            const LowRank* adapter = adapters.find(t.first + r, layer, place);
            if (!adapter) continue;
            const float* low = lowered + (t.first + r) * adapters.most_rank;
            for (int c = 0; c < t.columns; c += LANES) {
                const float* up = adapter->up + (t.column + c) / LANES * adapter->rank * LANES;
                f32x16 total{};
                for (int k = 0; k < adapter->rank; k++) total += load<f32x16>(up + k * LANES) * low[k];
                float* at = t.at + r * WIDTH + c;
                store(at, load<f32x16>(at) + total);
            }
        }
        call(finish, t);
    }
};
