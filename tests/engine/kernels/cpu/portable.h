// What the C++ tests of the kernels share: random numbers that are the same on every machine, and checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

inline void check(bool holds, const char* what, double detail = 0) {
    if (holds) return;
    std::printf("FAILED %s (%g)\n", what, detail);
    std::exit(1);
}

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t bits() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }

    uint32_t word() { return uint32_t(bits() >> 32); }
    int below(int end) { return int(bits() >> 33) % end; }

    // Uniform in [-1, 1), a multiple of 2^-23: exact in float32, so equal on every machine.
    float number() { return float(int32_t(word() >> 8) - (1 << 23)) / float(1 << 23); }

  private:
    uint64_t state_;
};
