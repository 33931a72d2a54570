// What attention is computed on: the shape of its heads, and the rows of a step.
#pragma once

#include <cstdint>

struct Shape {
    int heads;
    int kv_heads;
    int head_dim;
    int block_size;
    float scaling;

    int group() const { return heads / kv_heads; }

    // Of one head's keys, or values, with `per_unit` numbers in a word; in int8 with scales.
    long block_words(int per_unit) const { return long(block_size) * (head_dim / per_unit + (per_unit == 4)); }

    // Where a head's keys, or values, of a block begin, in words.
    long block_at(long block, int kv_head, int per_unit) const {
        return (block * kv_heads + kv_head) * block_words(per_unit);
    }

    // In int8: the scales of a block's tokens.
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

    // With the tables of one KV group.
    Ragged of(int group) const {
        Ragged one = *this;
        one.tables += long(group) * rows * table_width;
        return one;
    }
};

// Some tokens of a row whose queries are computed together, all query heads of a kv head.
struct Queries {
    int32_t row;
    int32_t first;     // in the batch
    int32_t count;     // tokens
    int32_t position;  // of the first
};
