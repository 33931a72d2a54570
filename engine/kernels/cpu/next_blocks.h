// The keys and values that the next attention reads, prefetched while a linear computes many rows.
//
// Linears of many rows are limited by arithmetic, attention of many rows by memory. What is prefetched goes to the core's
// second cache, and from there to the third one, where the next attention finds it.
#pragma once

#include <algorithm>
#include <vector>

#include "batch.h"
#include "micro.h"

// Some blocks of a layer's cache: numbers first .. first + count of `blocks`.
struct NextBlocks {
    const int32_t* blocks = nullptr;
    long first = 0;
    long count = 0;
    const uint32_t* keys = nullptr;
    const uint32_t* values = nullptr;
    long words = 0;  // of a block's keys, or values

    // Fewer rows leave no bandwidth over: their linears wait for weights.
    static constexpr int MIN_ROWS = 32;
    // Of keys and values: of more, the first ones would be evicted before they are read. Measured on a Zen 4 with 32 MB of
    // third cache, shared with other machines: 12 MB was better than 6.
    static constexpr long MAX_WORDS = 12 << 18;

    // Part `number` of `parts`.
    NextBlocks part(long number, long parts) const {
        NextBlocks some = *this;
        some.first = first + count * number / parts;
        some.count = first + count * (number + 1) / parts - some.first;
        return some;
    }

    // Whether `steps` steps, each of which can prefetch a cache line of keys and one of values, reach for a block.
    bool fit(long steps) const { return words <= steps * LANES; }

    // Prefetches the keys and values of a block in `steps` steps.
    void prefetch(long number, long steps, Panels& b) const {
        const long at = blocks[first + number] * words;
        b.prefetch_from(keys + at, values + at, ceil_div(words, steps));
    }
};

// The blocks of a batch that a layer reads, row by row. window: see first_seen.
inline void list_blocks(const Ragged& batch, int block_size, int window, std::vector<int32_t>& out) {
    out.clear();
    for (int i = 0; i < batch.rows; i++) {
        const int begin = first_seen(batch.computed[i], window);
        const int32_t* table = batch.tables + long(i) * batch.table_width;
        const long end = ceil_div(batch.computed[i] + batch.counts[i], block_size);
        out.insert(out.end(), table + begin / block_size, table + end);
    }
}
