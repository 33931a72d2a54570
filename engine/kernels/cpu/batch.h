// The shape of attention heads, and the ragged batch of a step.
#pragma once

#include <cstdint>

struct Shape {
    int heads;
    int kv_heads;
    int head_dim;
    int block_size;
    float scaling;

    int group() const { return heads / kv_heads; }

    // Words of one head's keys, or values, with `per_unit` elements per word; int8 includes the scales.
    long block_words(int per_unit) const { return long(block_size) * (head_dim / per_unit + (per_unit == 4)); }

    // The first word of a head's keys, or values, of a block.
    long block_at(long block, int kv_head, int per_unit) const {
        return (block * kv_heads + kv_head) * block_words(per_unit);
    }

    // int8 only: the scales of a block's tokens.
    float* scales(uint32_t* block) const { return reinterpret_cast<float*>(block + long(block_size) * head_dim / 4); }
    const float* scales(const uint32_t* block) const {
        return reinterpret_cast<const float*>(block + long(block_size) * head_dim / 4);
    }
};

// Rows laid end to end: row i computes `counts[i]` tokens after `computed[i]`, from token `starts[i]` of the batch.
struct Ragged {
    int32_t rows;
    int32_t tokens;
    const int32_t* starts;
    const int32_t* counts;
    const int32_t* computed;
    const int32_t* tables;  // [KV groups, rows, table_width]
    int32_t table_width;

    // The same batch with the block tables of one KV group.
    Ragged of(int group) const {
        Ragged one = *this;
        one.tables += long(group) * rows * table_width;
        return one;
    }
};

// The first token that the query at a position sees. window: tokens that it sees, 0 for all.
inline int first_seen(int position, int window) { return window && position >= window ? position - window + 1 : 0; }

// Consecutive tokens of a row whose queries are computed together.
struct Queries {
    int32_t row;
    int32_t first;     // token of the batch
    int32_t count;
    int32_t position;  // of the first token
};
