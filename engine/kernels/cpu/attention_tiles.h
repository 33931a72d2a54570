// The products of attention on AMX tiles, for caches in bfloat16 and int8.
//
// A panel of keys or values has the layout of right-hand tiles (see tile.h), so a right-hand tile is `depth` units of a
// panel, and a left-hand one `depth` units of up to 16 rows. Tiles 4 and 5 are left, 6 and 7 right, 0 to 3 sums:
//
//     up to 16 rows, four panels:  0 1 2 3: rows by panels 0 1 2 3, left 4, the right ones in turn
//     up to 32 rows, two panels:   0 1: rows 0..15 by panels 0 1, left 4      2 3: rows 16.. by panels 0 1, left 5
//
// `depth` is 16 if a query has a multiple of 16 units and a block has 16 units of tokens within a span, or else the largest
// power of two that divides both: 32 tokens of bfloat16 or 64 of int8 fill a tile.
#pragma once

#include <algorithm>

#include "attention_products.h"
#include "tile.h"

#if defined(TILES)

#define TILE_DOT(sum, left, right)                                         \
    {                                                                      \
        if constexpr (std::is_same_v<typename P::Dot, BF16>)               \
            TILE_DOT_BF16(sum, left, right);                               \
        else if constexpr (std::is_same_v<typename P::Dot, C8::Keys>)      \
            TILE_DOT_SIGNED_UNSIGNED(sum, left, right);                    \
        else                                                               \
            TILE_DOT_UNSIGNED_SIGNED(sum, left, right);                    \
    }

#define TILE_BEGIN(sum, from)                   \
    {                                           \
        if constexpr (P::ADD)                   \
            TILE_LOAD(sum, from, P::APART * 4); \
        else                                    \
            TILE_ZERO(sum);                     \
    }

class TileProducts {
  public:
    static constexpr int ROWS = 2 * TILE;

    TileProducts(long units, long run_units) : depth_(TILE) {
        while (units % depth_ || run_units % depth_) depth_ /= 2;
    }

    ~TileProducts() {
        if (rows_) TILE_RELEASE();
    }

    void begin(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        const int upper = rows < TILE ? rows : TILE, lower = rows - upper;
        TileShapes shapes;
        for (int sum : {0, 1}) shapes.set(sum, upper);
        for (int sum : {2, 3}) shapes.set(sum, lower ? lower : upper);
        shapes.set(4, upper, depth_);
        shapes.set(5, lower, depth_);
        for (int right : {6, 7}) shapes.set(right, depth_);
        TILE_SHAPE(shapes);
    }

    long whole(long units) const { return round_up(units, depth_); }

    static int panels_at_once(int rows, int left) { return std::min(left, rows > TILE ? PANELS : QUAD); }

    template <class P> void multiply(int, int count, const uint32_t* a, const Runs& b, void* out) const {
        TILE_FENCE();
        const auto to = static_cast<uint32_t*>(out);
        if (rows_ > TILE) return (count == 2 ? tall<P, 2> : tall<P, 1>)(a, b, depth_, to);
        static constexpr decltype(&flat<P, 1>) kernels[] = {flat<P, 1>, flat<P, 2>, flat<P, 3>, flat<P, 4>};
        kernels[count - 1](a, b, depth_, to);
    }

  private:
    template <class P, int COUNT> static void flat(const uint32_t* a, const Runs& b, int depth, uint32_t* out) {
        TILE_BEGIN(0, out);
        if constexpr (COUNT > 1) TILE_BEGIN(1, out + LANES);
        if constexpr (COUNT > 2) TILE_BEGIN(2, out + 2 * LANES);
        if constexpr (COUNT > 3) TILE_BEGIN(3, out + 3 * LANES);
        for (int run = 0; run < b.count; run++) {
            const auto& at = b.at[run];
            for (long u = 0; u < b.units[run]; u += depth, a += depth) {
                for (int p = 0; p < COUNT; p++) prefetch(b.next[run][p] + u * LANES, depth * LANES);
                TILE_LOAD(4, a, P::STRIDE * 4);
                TILE_LOAD(6, at[0] + u * LANES, TILE_BYTES);
                TILE_DOT(0, 4, 6);
                if constexpr (COUNT > 1) {
                    TILE_LOAD(7, at[1] + u * LANES, TILE_BYTES);
                    TILE_DOT(1, 4, 7);
                }
                if constexpr (COUNT > 2) {
                    TILE_LOAD(6, at[2] + u * LANES, TILE_BYTES);
                    TILE_DOT(2, 4, 6);
                }
                if constexpr (COUNT > 3) {
                    TILE_LOAD(7, at[3] + u * LANES, TILE_BYTES);
                    TILE_DOT(3, 4, 7);
                }
            }
        }
        TILE_STORE(0, out, P::APART * 4);
        if constexpr (COUNT > 1) TILE_STORE(1, out + LANES, P::APART * 4);
        if constexpr (COUNT > 2) TILE_STORE(2, out + 2 * LANES, P::APART * 4);
        if constexpr (COUNT > 3) TILE_STORE(3, out + 3 * LANES, P::APART * 4);
    }

    template <class P, int COUNT> static void tall(const uint32_t* a, const Runs& b, int depth, uint32_t* out) {
        uint32_t* lower = out + TILE * P::APART;
        TILE_BEGIN(0, out);
        TILE_BEGIN(2, lower);
        if constexpr (COUNT > 1) {
            TILE_BEGIN(1, out + LANES);
            TILE_BEGIN(3, lower + LANES);
        }
        for (int run = 0; run < b.count; run++) {
            const auto& at = b.at[run];
            for (long u = 0; u < b.units[run]; u += depth, a += depth) {
                for (int p = 0; p < COUNT; p++) prefetch(b.next[run][p] + u * LANES, depth * LANES);
                TILE_LOAD(4, a, P::STRIDE * 4);
                TILE_LOAD(5, a + TILE * P::STRIDE, P::STRIDE * 4);
                TILE_LOAD(6, at[0] + u * LANES, TILE_BYTES);
                TILE_DOT(0, 4, 6);
                TILE_DOT(2, 5, 6);
                if constexpr (COUNT > 1) {
                    TILE_LOAD(7, at[1] + u * LANES, TILE_BYTES);
                    TILE_DOT(1, 4, 7);
                    TILE_DOT(3, 5, 7);
                }
            }
        }
        TILE_STORE(0, out, P::APART * 4);
        TILE_STORE(2, lower, P::APART * 4);
        if constexpr (COUNT > 1) {
            TILE_STORE(1, out + LANES, P::APART * 4);
            TILE_STORE(3, lower + LANES, P::APART * 4);
        }
    }

    int depth_;
    int rows_ = 0;
};

#undef TILE_DOT
#undef TILE_BEGIN

template <> struct ProductsOf<BF16> {
    typedef TileProducts Type;
};

template <> struct ProductsOf<C8> {
    typedef TileProducts Type;
};

#endif
