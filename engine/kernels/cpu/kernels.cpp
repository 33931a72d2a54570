// The functions that Python calls.

#include "stack.h"

enum Format { FLOAT32, BFLOAT16, INT8, INT4 };

static AnyStack* make(const Spec* spec, int weights, int cache, int threads, const int32_t* cores) {
    if (weights == FLOAT32 && cache == FLOAT32) return new Stack<F32, F32, F32>(*spec, threads, cores);
    if (weights == BFLOAT16 && cache == BFLOAT16) return new Stack<BF16, BF16, BF16>(*spec, threads, cores);
    if (weights == BFLOAT16 && cache == INT8) return new Stack<BF16, BF16, C8>(*spec, threads, cores);
    if (weights == INT8 && cache == INT8) return new Stack<I8, I8, C8>(*spec, threads, cores);
    if (weights == INT4 && cache == INT8) return new Stack<I4, I8, C8>(*spec, threads, cores);
    if (weights == INT8 && cache == BFLOAT16) return new Stack<I8, I8, BF16>(*spec, threads, cores);
    if (weights == INT4 && cache == BFLOAT16) return new Stack<I4, I8, BF16>(*spec, threads, cores);
    return nullptr;
}

extern "C" {

// Null if there is no such stack, or no memory or threads for it.
AnyStack* redline_stack(const Spec* spec, int weights, int cache, int threads, const int32_t* cores) {
    try {
        return make(spec, weights, cache, threads, cores);
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
