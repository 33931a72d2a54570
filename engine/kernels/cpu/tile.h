// Products on AMX tiles, registers of 16 rows by 64 bytes: up to 32 rows of activations by two panels at a time.
//
// A panel of weights (see formats.h) has the layout of a right-hand tile, a unit of 16 columns per row. Activations, row by
// row in units, have that of a left-hand tile:
//
//     0: rows  0..15, panel 0    1: rows  0..15, panel 1    4: left, rows  0..15    6: right, panel 0
//     2: rows 16..31, panel 0    3: rows 16..31, panel 1    5: left, rows 16..31    7: right, panel 1
//
// TILES_IN_SOFTWARE computes the same in plain C++, to test the code above tiles on machines without AMX.
#pragma once

#include "micro.h"

constexpr int TILE = 16;  // rows, and units per row, of a tile
constexpr long TILE_BYTES = 64;  // of a row

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int count, int units = TILE) {
        bytes[tile] = uint16_t(count ? units * 4 : 0);
        rows[tile] = uint8_t(count);
    }
};

static_assert(sizeof(TileShapes) == 64);

#if defined(TILES_IN_SOFTWARE)

struct SoftwareTiles {
    TileShapes shapes;
    uint32_t at[8][TILE][TILE];

    void load(int tile, const void* from, long apart) {
        for (int r = 0; r < shapes.rows[tile]; r++)
            std::memcpy(at[tile][r], static_cast<const char*>(from) + r * apart, shapes.bytes[tile]);
    }

    void put(int tile, void* to, long apart) {
        for (int r = 0; r < shapes.rows[tile]; r++) std::memcpy(static_cast<char*>(to) + r * apart, at[tile][r], 64);
    }

    void dot_bf16(int sum, int left, int right) {
        for (int r = 0; r < shapes.rows[left]; r++)
            for (int u = 0; u < shapes.rows[right]; u++)
                for (int c = 0; c < TILE; c++) {
                    const uint32_t a = at[left][r][u], b = at[right][u][c];
                    float total = as_float(at[sum][r][c]) + as_float(a << 16) * as_float(b << 16);
                    at[sum][r][c] = as_bits(total + as_float(a & 0xFFFF0000u) * as_float(b & 0xFFFF0000u));
                }
    }

    template <class L, class R> void dot_bytes(int sum, int left, int right) {
        for (int r = 0; r < shapes.rows[left]; r++)
            for (int u = 0; u < shapes.rows[right]; u++)
                for (int c = 0; c < TILE; c++)
                    for (int i = 0; i < 32; i += 8)
                        at[sum][r][c] += int32_t(L(at[left][r][u] >> i)) * int32_t(R(at[right][u][c] >> i));
    }
};

inline thread_local SoftwareTiles software_tiles;

#define TILES
#define TILE_SHAPE(shapes) software_tiles.shapes = shapes
#define TILE_RELEASE()
#define TILE_FENCE()
#define TILE_ZERO(tile) std::memset(software_tiles.at[tile], 0, sizeof software_tiles.at[tile])
#define TILE_LOAD(tile, from, apart) software_tiles.load(tile, from, apart)
#define TILE_STORE(tile, to, apart) software_tiles.put(tile, to, apart)
#define TILE_DOT_BF16(sum, left, right) software_tiles.dot_bf16(sum, left, right)
#define TILE_DOT_SIGNED(sum, left, right) (software_tiles.dot_bytes<int8_t, int8_t>(sum, left, right))
#define TILE_DOT_SIGNED_UNSIGNED(sum, left, right) (software_tiles.dot_bytes<int8_t, uint8_t>(sum, left, right))
#define TILE_DOT_UNSIGNED_SIGNED(sum, left, right) (software_tiles.dot_bytes<uint8_t, int8_t>(sum, left, right))

#elif defined(__AMX_BF16__) && defined(__AMX_INT8__)

#define TILES
// Not _tile_loadconfig: some compilers assume that it reads 8 bytes only, and never store the others.
#define TILE_SHAPE(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory")
#define TILE_RELEASE() _tile_release()
// Between stores and the loads of a tile from there: to some compilers these are no reads of memory.
#define TILE_FENCE() __asm__ volatile("" ::: "memory")
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, apart) _tile_loadd(tile, from, apart)
#define TILE_STORE(tile, to, apart) _tile_stored(tile, to, apart)
#define TILE_DOT_BF16(sum, left, right) _tile_dpbf16ps(sum, left, right)
#define TILE_DOT_SIGNED(sum, left, right) _tile_dpbssd(sum, left, right)
#define TILE_DOT_SIGNED_UNSIGNED(sum, left, right) _tile_dpbsud(sum, left, right)
#define TILE_DOT_UNSIGNED_SIGNED(sum, left, right) _tile_dpbusd(sum, left, right)

#endif

#if defined(TILES)

// Configures the tiles of this thread during an op.
class Tiles {
  public:
    ~Tiles() {
        if (rows_) TILE_RELEASE();
    }

    // For 1 to 32 rows of activations, and so many units of both sides at a time.
    void shape(int rows, int units = TILE) {
        if (rows == rows_) return;
        rows_ = rows;
        const int upper = rows < TILE ? rows : TILE;
        TileShapes shapes;
        for (int tile : {0, 1}) shapes.set(tile, upper);
        for (int tile : {2, 3}) shapes.set(tile, rows - upper);
        shapes.set(4, upper, units);
        shapes.set(5, rows - upper, units);
        for (int tile : {6, 7}) shapes.set(tile, units);
        TILE_SHAPE(shapes);
    }

  private:
    int rows_ = 0;
};

template <int COUNT, bool TALL> INLINE void zero_sums() {
    TILE_ZERO(0);
    if constexpr (COUNT == 2) TILE_ZERO(1);
    if constexpr (TALL) TILE_ZERO(2);
    if constexpr (TALL && COUNT == 2) TILE_ZERO(3);
}

template <int COUNT, bool TALL> INLINE void store_sums(void* out) {
    const auto at = static_cast<uint32_t*>(out);
    constexpr long apart = WIDTH * 4;
    TILE_STORE(0, at, apart);
    if constexpr (COUNT == 2) TILE_STORE(1, at + LANES, apart);
    if constexpr (TALL) TILE_STORE(2, at + TILE * WIDTH, apart);
    if constexpr (TALL && COUNT == 2) TILE_STORE(3, at + TILE * WIDTH + LANES, apart);
}

// Loads 16 units of both sides, from `unit` on, and prefetches the next panels.
template <int COUNT, bool TALL> INLINE void load_sides(const uint32_t* a, long stride, const Panels& b, long unit) {
    TILE_LOAD(4, a + unit, stride * 4);
    if constexpr (TALL) TILE_LOAD(5, a + TILE * stride + unit, stride * 4);
    TILE_LOAD(6, b.at[0] + unit * LANES, TILE_BYTES);
    if constexpr (COUNT == 2) TILE_LOAD(7, b.at[1] + unit * LANES, TILE_BYTES);
    const uint32_t* const* next = unit < b.turn ? b.next : b.then;
    for (int p = 0; p < COUNT; p++) prefetch(next[p] + unit * b.prefetch_words, TILE * b.prefetch_words);
}

// As `multiply`, for a multiple of TILE units.
template <int COUNT, bool TALL> void tiled_bf16(const uint32_t* a, long stride, const Panels& b, long units, float* out) {
    zero_sums<COUNT, TALL>();
    for (long u = 0; u < units; u += TILE) {
        load_sides<COUNT, TALL>(a, stride, b, u);
        TILE_DOT_BF16(0, 4, 6);
        if constexpr (COUNT == 2) TILE_DOT_BF16(1, 4, 7);
        if constexpr (TALL) TILE_DOT_BF16(2, 5, 6);
        if constexpr (TALL && COUNT == 2) TILE_DOT_BF16(3, 5, 7);
    }
    store_sums<COUNT, TALL>(out);
}

INLINE void multiply_tiled(int rows, int count, const uint32_t* a, long stride, const Panels& b, long units, float* out) {
    const long whole = units / TILE * TILE;
    if (rows > TILE)
        (count == 2 ? tiled_bf16<2, true> : tiled_bf16<1, true>)(a, stride, b, whole, out);
    else
        (count == 2 ? tiled_bf16<2, false> : tiled_bf16<1, false>)(a, stride, b, whole, out);
    if (whole == units) return;
    Panels rest = b;
    for (int p = 0; p < count; p++) rest.at[p] += whole * LANES, rest.next[p] += whole * b.prefetch_words;
    for (int r = 0; r < rows; r += MAX_ROWS) {
        const int some = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
        multiply<BF16, true>(some, count, a + r * stride + whole, stride, rest, units - whole, out + r * WIDTH, WIDTH);
    }
}

#else

// Declared for code that is never called without tiles.
struct Tiles {
    void shape(int) {}
};

void multiply_tiled(int rows, int count, const uint32_t* a, long stride, const Panels& b, long units, float* out);

#endif
