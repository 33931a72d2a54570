// LoRA adapters: for tokens that have one, up (down x) is added to the output of a linear.
//
// `down` (LoRA's A, not an MLP's down projection) projects x to `rank` numbers before the product. `up` (B) is added to
// each part of the product's result, after the bias. The order of a token's sums does not depend on other tokens.
#pragma once

#include "linear.h"

enum AdaptedLinear { AT_QKV, AT_OUTPUT, AT_GATE_UP, AT_DOWN, ADAPTED };

// The part of an adapter for one linear. Linears that are packed side by side share one, with zeros in `up` where a rank
// belongs to another linear.
struct LowRank {
    const float* down;  // [rank, inputs]
    const float* up;    // [panels, rank, 16]
    int32_t rank;       // 0: no adapter
};

// The adapters of a step; `table` is null if no token has one.
struct Adapters {
    const LowRank* const* table;  // [adapters], each [layers, ADAPTED]
    const int32_t* of_token;            // [tokens]; -1: none
    int32_t max_rank;

    const LowRank* find(long token, int layer, AdaptedLinear place) const {
        if (of_token[token] < 0) return nullptr;
        const LowRank* found = table[of_token[token]] + layer * ADAPTED + place;
        return found->rank ? found : nullptr;
    }
};

// 16 activations.
template <class F> INLINE f32x16 load_activations(const Activations& x, long row, long at) {
    const auto from = reinterpret_cast<const typename F::Element*>(x.units + row * x.stride) + at;
    if constexpr (F::QUANTIZED) {
        const i32x16 whole = convert<i32x16>(load<i8x16>(from));
        return convert<f32x16>(whole) * x.scales[row * x.groups + at / F::GROUP];
    } else {
        return F::widen(from);
    }
}

// COUNT of the sums of `project_down`.
template <class F, int COUNT>
INLINE void project_some_down(const float* down, const Activations& x, long row, int inputs, float* out) {
    f32x16 total[COUNT] = {};
    for (int i = 0; i < inputs; i += LANES) {
        const f32x16 x16 = load_activations<F>(x, row, i);
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) total[k] += x16 * load<f32x16>(down + long(k) * inputs + i);
    }
    for (int k = 0; k < COUNT; k++) out[k] = sum(total[k]);
}

// out[rank] = down x.
template <class F>
INLINE void project_down(const LowRank& adapter, const Activations& x, long row, int inputs, float* out) {
    int k = 0;
    for (; k + 4 <= adapter.rank; k += 4) project_some_down<F, 4>(adapter.down + long(k) * inputs, x, row, inputs, out + k);
    for (; k < adapter.rank; k++) project_some_down<F, 1>(adapter.down + long(k) * inputs, x, row, inputs, out + k);
}

// The `finish` of a linear with adapters: adds up (down x), then calls the plain `finish` through a pointer, so that
// `linear` is compiled once for all of them.
struct AddUp {
    const Adapters& adapters;
    int layer;
    AdaptedLinear place;
    const float* projected;  // [tokens, max_rank]
    const void* finish;
    void (*call)(const void* finish, const Tile& tile);

    void operator()(const Tile& t) const {
        for (int r = 0; r < t.rows; r++) {
            const LowRank* adapter = adapters.find(t.first + r, layer, place);
            if (!adapter) continue;
            const float* low = projected + (t.first + r) * adapters.max_rank;
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
