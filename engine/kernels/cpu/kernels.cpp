// The functions that Python calls.

#include "stack.h"

enum Format { FLOAT32, BFLOAT16, INT8, INT4 };

// A library that is compiled for one pair of formats has the stack of that pair only: each takes seconds to compile.
#ifdef REDLINE_STACK
constexpr int ONLY[2] = {REDLINE_STACK};
constexpr bool compiled(int weights, int cache) { return weights == ONLY[0] && cache == ONLY[1]; }
#else
constexpr bool compiled(int, int) { return true; }
#endif

struct Wanted {
    int weights, cache;
    const Spec& spec;
    int threads;
    const int32_t* cores;

    // The stack of these formats, or null if another one is wanted.
    template <int WEIGHTS, int CACHE, class... Formats> AnyStack* make() const {
        if constexpr (compiled(WEIGHTS, CACHE)) {
            if (weights == WEIGHTS && cache == CACHE) return new Stack<Formats...>(spec, threads, cores);
        }
        return nullptr;
    }
};

static AnyStack* make(const Wanted& wanted) {
    if (auto made = wanted.make<FLOAT32, FLOAT32, F32, F32, F32>()) return made;
    if (auto made = wanted.make<BFLOAT16, BFLOAT16, BF16, BF16, BF16>()) return made;
    if (auto made = wanted.make<BFLOAT16, INT8, BF16, BF16, C8>()) return made;
    if (auto made = wanted.make<INT8, INT8, I8, I8, C8>()) return made;
    if (auto made = wanted.make<INT4, INT8, I4, I8, C8>()) return made;
    if (auto made = wanted.make<INT8, BFLOAT16, I8, I8, BF16>()) return made;
    return wanted.make<INT4, BFLOAT16, I4, I8, BF16>();
}

extern "C" {

// Null if there is no such stack, or no memory or threads for it.
AnyStack* redline_stack(const Spec* spec, int weights, int cache, int threads, const int32_t* cores) {
    try {
        return make({weights, cache, *spec, threads, cores});
    } catch (const std::exception&) {
        return nullptr;
    }
}

void redline_run(AnyStack* stack, const Step* step, int first, int last) { stack->run(*step, first, last); }

void redline_logits(AnyStack* stack, const int32_t* which, int count, float* out) { stack->logits(which, count, out); }

void redline_choose(
    AnyStack* stack, int count, const float* temperatures, const double* uniforms, const Masks* masks, int32_t* out
) {
    stack->choose(count, temperatures, uniforms, masks, out);
}

void redline_greedy(
    AnyStack* stack, int count, const float* temperatures, const Masks* masks, float* top, int32_t* token, double* weight
) {
    stack->greedy(count, temperatures, masks, top, token, weight);
}

void redline_draw(AnyStack* stack, const double* uniforms, int32_t* out) { stack->draw(uniforms, out); }

float* redline_partial(AnyStack* stack) { return stack->partial(); }

float* redline_hidden(AnyStack* stack) { return stack->hidden(); }

// Seconds of each op since the last call: out[OPS].
void redline_seconds(AnyStack* stack, double* out) {
    for (int op = 0; op < OPS; op++) {
        out[op] = stack->seconds[op];
        stack->seconds[op] = 0;
    }
}

void redline_free(AnyStack* stack) { delete stack; }
}
