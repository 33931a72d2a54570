// Vectors of 16 lanes on every ISA.
//
// With AVX-512 a vector of 16 words is one register, by GCC's vector extension. With smaller registers GCC would keep such
// vectors in memory. There a vector is a structure of parts that each fit a register, and operations work part by part:
//
//     AVX2, f32x16:  part 0: lanes 0..7 | part 1: lanes 8..15        u16x16:  two parts of 8 lanes, 16 bytes each
//     NEON, f32x16:  four parts of 4 lanes                           u16x16:  four parts of 4 lanes, 8 bytes each
//
// Kernels use only the types and functions below, and are written once.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX2__) && !defined(__AVX512F__)
#define AVX2_ONLY 1
#elif defined(__aarch64__)
#define NEON 1
#endif

constexpr int LANES = 16;

#if defined(__AVX512F__)

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

template <class V> INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class V> INLINE void store(void* to, V v) { std::memcpy(to, &v, sizeof(V)); }

// The same values in another type; integers that do not fit lose their upper bits.
template <class To, class From> INLINE To convert(From v) { return __builtin_convertvector(v, To); }

// a where the mask is set, otherwise b.
template <class V> INLINE V select(i32x16 mask, V a, V b) { return mask ? a : b; }

INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// A bit for each lane, the first in the lowest one.
INLINE u32x16 lane_bits() {
    return u32x16{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
}

#else

#if defined(__AVX2__)
constexpr int PART_LANES = 8;
#else
constexpr int PART_LANES = 4;
#endif
constexpr int PARTS = LANES / PART_LANES;

template <class E> struct Parts {
    typedef E Part __attribute__((vector_size(PART_LANES * sizeof(E))));
    Part part[PARTS];

    Parts() = default;

    // The same bits as another element type.
    template <class F> explicit Parts(const Parts<F>& other) {
        for (int p = 0; p < PARTS; p++) part[p] = (Part)other.part[p];
    }

    E operator[](int lane) const { return part[lane / PART_LANES][lane % PART_LANES]; }
};

typedef Parts<float> f32x16;
typedef Parts<int32_t> i32x16;
typedef Parts<uint32_t> u32x16;
typedef Parts<uint16_t> u16x16;
typedef Parts<int8_t> i8x16;
typedef Parts<uint8_t> u8x16;

template <class V> INLINE V load(const void* from) {
    if constexpr (std::is_class_v<V>) {
        V v;
        for (int p = 0; p < PARTS; p++) {
            typename V::Part part;
            std::memcpy(&part, static_cast<const char*>(from) + p * sizeof part, sizeof part);
            v.part[p] = part;
        }
        return v;
    } else {
        V v;
        std::memcpy(&v, from, sizeof(V));
        return v;
    }
}

template <class E> INLINE void store(void* to, Parts<E> v) {
    for (int p = 0; p < PARTS; p++) {
        const typename Parts<E>::Part part = v.part[p];
        std::memcpy(static_cast<char*>(to) + p * sizeof part, &part, sizeof part);
    }
}

#define EACH_PART(E, value)                              \
    {                                                    \
        Parts<E> out;                                    \
        for (int p = 0; p < PARTS; p++) out.part[p] = value; \
        return out;                                      \
    }

#define ARITHMETIC(op)                                                                                              \
    template <class E> INLINE Parts<E> operator op(Parts<E> a, Parts<E> b) EACH_PART(E, a.part[p] op b.part[p])     \
    template <class E> INLINE Parts<E> operator op(Parts<E> a, std::type_identity_t<E> b) EACH_PART(E, a.part[p] op b) \
    template <class E> INLINE Parts<E> operator op(std::type_identity_t<E> a, Parts<E> b) EACH_PART(E, a op b.part[p]) \
    template <class E, class B> INLINE Parts<E>& operator op##=(Parts<E>& a, const B& b) { return a = a op b; }

#define COMPARISON(op)                                                                                                  \
    template <class E> INLINE i32x16 operator op(Parts<E> a, Parts<E> b) EACH_PART(int32_t, a.part[p] op b.part[p])     \
    template <class E> INLINE i32x16 operator op(Parts<E> a, std::type_identity_t<E> b) EACH_PART(int32_t, a.part[p] op b)

ARITHMETIC(+) ARITHMETIC(-) ARITHMETIC(*) ARITHMETIC(/) ARITHMETIC(&) ARITHMETIC(|)
COMPARISON(<) COMPARISON(<=) COMPARISON(>) COMPARISON(==) COMPARISON(!=)
template <class E> INLINE Parts<E> operator-(Parts<E> a) EACH_PART(E, -a.part[p])
template <class E> INLINE Parts<E> operator<<(Parts<E> a, int bits) EACH_PART(E, a.part[p] << bits)
template <class E> INLINE Parts<E> operator>>(Parts<E> a, int bits) EACH_PART(E, a.part[p] >> bits)

template <class E> INLINE Parts<E> select(i32x16 mask, Parts<E> a, Parts<E> b)
    EACH_PART(E, mask.part[p] ? a.part[p] : b.part[p])

#undef ARITHMETIC
#undef COMPARISON
#undef EACH_PART

#if defined(__AVX2__)
// The lowest byte of each word.
typedef __m256i Words;

INLINE uint64_t lowest_bytes(Words words) {
    const __m256i picked = _mm256_shuffle_epi8(words, _mm256_set1_epi32(0x0C080400));
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
    return uint64_t(_mm_cvtsi128_si64(both));
}
#elif NEON
typedef uint32x4_t Words;

INLINE uint32_t lowest_bytes(Words words) {
    const uint16x4_t halves = vmovn_u32(words);
    return vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
}
#endif

template <class To, class E> INLINE To convert(Parts<E> v) {
    To out;
    for (int p = 0; p < PARTS; p++) {
#if AVX2_ONLY || NEON
        if constexpr (sizeof(typename To::Part) == PART_LANES) {  // GCC 12 would move byte by byte
            out.part[p] = (typename To::Part)lowest_bytes((Words)v.part[p]);
            continue;
        }
#endif
        out.part[p] = __builtin_convertvector(v.part[p], typename To::Part);
    }
    return out;
}

INLINE i32x16 lane_numbers() {
    i32x16 out;
    for (int i = 0; i < LANES; i++) out.part[i / PART_LANES][i % PART_LANES] = i;
    return out;
}

INLINE u32x16 lane_bits() {
    u32x16 out;
    for (int i = 0; i < LANES; i++) out.part[i / PART_LANES][i % PART_LANES] = 1u << i;
    return out;
}

#endif
