// Operations on single tokens: quantization, norms, rotary positions, writes to the cache.
#pragma once

#include <cmath>

#include "attention.h"
#include "linear.h"

// Quantizes `size` numbers (a multiple of 16) to int8; the scale is the largest magnitude / 127. Returns the integers' sum.
INLINE int32_t quantize(const float* from, int size, int8_t* out, float* scale) {
    f32x16 top{};
    for (int i = 0; i < size; i += LANES) {
        const f32x16 x = load<f32x16>(from + i);
        top = max_of(top, max_of(x, -x));
    }
    const float largest = reduce_max(top), factor = largest > 0 ? 127.0f / largest : 0.0f;
    i32x16 counted{};
    for (int i = 0; i < size; i += LANES) {
        // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
        const i32x16 whole = (i32x16)(load<f32x16>(from + i) * factor + 12582912.0f) - 0x4B400000;
        counted += whole;
        store(out + i, convert<i8x16>(whole));
    }
    int32_t each[LANES], all = 0;
    store(each, counted);
    for (int32_t lane : each) all += lane;
    *scale = largest / 127.0f;
    return all;
}

template <class T> INLINE void narrow(const float* from, int size, typename T::Element* out) {
    for (int i = 0; i < size; i += LANES) T::narrow(out + i, load<f32x16>(from + i));
}

// Writes a row of `size` floats as activations of a product.
template <class T>
INLINE void encode(const float* row, int size, typename T::Element* out, float* scales, uint32_t* offsets) {
    if constexpr (T::QUANTIZED)
        for (int i = 0; i < size; i += T::GROUP, scales++) {
            const int32_t sum = quantize(row + i, T::GROUP, out + i, scales);
            *offsets++ = T::OFFSET ? uint32_t(-T::OFFSET * sum) : as_bits(*scales * float(sum));
        }
    else
        narrow<T>(row, size, out);
}

INLINE float root_mean_square(const float* row, int size, float epsilon) {
    f32x16 squares{};
    for (int i = 0; i < size; i += LANES) {
        const f32x16 x = load<f32x16>(row + i);
        squares += x * x;
    }
    return 1.0f / std::sqrt(sum(squares) / float(size) + epsilon);
}

// out may be row.
INLINE void rms_norm(const float* row, const float* weight, int size, float epsilon, float* out) {
    const float factor = root_mean_square(row, size, epsilon);
    for (int i = 0; i < size; i += LANES) store(out + i, load<f32x16>(row + i) * factor * load<f32x16>(weight + i));
}

// The position of a token in a layer's cache.
struct CachePosition {
    long block;
    int offset;
};

// Rotary positions as in Llama: element i is rotated with element i + D/2. cosine, sine: [D/2], of the token's position.
INLINE void rotate(float* head, int dim, const float* cosine, const float* sine) {
    const int half = dim / 2;
    if (half % LANES == 0) {
        for (int i = 0; i < half; i += LANES) {
            const f32x16 a = load<f32x16>(head + i), b = load<f32x16>(head + half + i);
            const f32x16 c = load<f32x16>(cosine + i), s = load<f32x16>(sine + i);
            store(head + i, a * c - b * s);
            store(head + half + i, b * c + a * s);
        }
        return;
    }
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = b * cosine[i] + a * sine[i];
    }
}

// For the layouts see attention.h.

// Element 0 of a token's value; for the others add value_offset.
template <class T>
INLINE typename T::Element* value_of(const Shape& shape, int kv_head, long block, int offset, uint32_t* cache) {
    uint32_t* words = cache + shape.block_at(block, kv_head, T::PER_UNIT);
    const int first = offset / T::PER_UNIT * T::PER_UNIT * LANES + offset % T::PER_UNIT;
    return reinterpret_cast<typename T::Element*>(words) + first;
}

// The distance of element d of a value from element 0.
template <class T> INLINE long value_offset(const Shape& shape, int d) {
    return d / LANES * (long(shape.block_size) * LANES) + d % LANES * T::PER_UNIT;
}

template <class T>
INLINE void write_key(const float* head, const Shape& shape, int kv_head, CachePosition at, uint32_t* cache) {
    typename T::Element row[MAX_HEAD_DIM];
    const long units = shape.head_dim / T::PER_UNIT;
    uint32_t* block = cache + shape.block_at(at.block, kv_head, T::PER_UNIT);
    uint32_t* panel = block + at.offset / LANES * LANES * units + at.offset % LANES;
    uint32_t flip = 0;
    if constexpr (T::QUANTIZED) {
        quantize(head, shape.head_dim, row, shape.scales(block) + at.offset);
        flip = 0x80808080u;  // adds OFFSET to each byte
    } else {
        narrow<T>(head, shape.head_dim, row);
    }
    for (long u = 0; u < units; u++) panel[u * LANES] = load<uint32_t>(row + u * T::PER_UNIT) ^ flip;
}

// Values beyond a row's end are multiplied by a weight of zero, so leftovers of another row must not be infinite or NaN. The
// token that begins a run of CLEARED tokens of a block clears those that the step does not write.
constexpr int CLEARED = 32;  // a multiple of what attention multiplies at a time

// tokens: of the row in this step, from this one on.
template <class T>
INLINE void clear_values(const Shape& shape, int kv_head, CachePosition at, long tokens, uint32_t* cache) {
    if constexpr (T::QUANTIZED) return;
    if (at.offset % CLEARED) return;
    const int end = at.offset + CLEARED < shape.block_size ? at.offset + CLEARED : shape.block_size;
    for (long offset = at.offset + tokens; offset < end;) {
        auto value = value_of<T>(shape, kv_head, at.block, int(offset), cache);
        if (offset % T::PER_UNIT) {  // the rest of a unit
            for (int d = 0; d < shape.head_dim; d++) value[value_offset<T>(shape, d)] = 0;
            offset++;
        } else {
            for (int d = 0; d < shape.head_dim; d += LANES) store(value + value_offset<T>(shape, d), u32x16{});
            offset += T::PER_UNIT;
        }
    }
}

template <class T>
INLINE void write_value(const float* head, const Shape& shape, int kv_head, CachePosition at, uint32_t* cache) {
    typename T::Element row[MAX_HEAD_DIM];
    if constexpr (T::QUANTIZED) {
        uint32_t* block = cache + shape.block_at(at.block, kv_head, T::PER_UNIT);
        quantize(head, shape.head_dim, row, shape.scales(block) + at.offset);
    } else {
        narrow<T>(head, shape.head_dim, row);
    }
    auto value = value_of<T>(shape, kv_head, at.block, at.offset - at.offset % T::PER_UNIT, cache);
    for (int d = 0; d < shape.head_dim; d += LANES)
        store_in_words(row + d, at.offset % T::PER_UNIT, value + value_offset<T>(shape, d));
}
