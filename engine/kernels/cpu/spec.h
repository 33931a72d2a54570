// What Python passes to the kernels, as bindings.py mirrors it, and the interface of a stack of any format.
#pragma once

#include "batch.h"
#include "lora.h"

struct Layer {
    Linear qkv;
    Linear output;
    Linear gate_up;  // panels of gate and up alternate
    Linear down;
    const float* input_norm;
    const float* post_norm;
    const float* query_norm;  // per head; may be null
    const float* key_norm;
    uint32_t* keys;
    uint32_t* values;
    int32_t window;  // 0: all
    int32_t group;   // the KV group, for the block table
    int32_t rotary;  // 0: no rotary positions in this layer
};

struct Spec {
    int32_t hidden;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t intermediate;
    int32_t layers;
    int32_t vocabulary;
    int32_t block_size;
    int32_t partial;  // 1: one rank of several, see Stack::run
    int32_t first_token;  // of the rank's `vocabulary` tokens
    int32_t embedded;  // tokens with an embedding, from the first one on; some models have none of their logits
    float epsilon;
    float scaling;         // of the scores
    float rotary_scaling;  // of cosines and sines
    const float* frequencies;  // [head_dim / 2]
    const int32_t* axes;       // [head_dim / 2], the row of Step::rotary that each frequency rotates by
    // [embedded, hidden] in the cache's format, bfloat16 for int8; null: tied to the head, which is not quantized.
    const void* embedding;
    const float* final_norm;
    const Layer* layer;
    Linear head;
};

struct Step {
    Ragged batch;
    const int32_t* ids;        // [tokens]
    const int32_t* positions;  // [tokens], in the KV cache
    const int32_t* rotary;     // [axes, tokens], where keys and queries are rotated to
    const int32_t* row_of;     // [tokens]
    const int32_t* sampled;    // [samples], tokens of the batch whose logits are needed
    int32_t samples;
    Adapters adapters;
};

// The tokens that samples may choose: bit i of word w of a mask stands for token 32 * w + i of the rank's tokens.
struct Masks {
    const uint32_t* words;  // [masks, stride]
    const int32_t* of;      // [samples], the mask of each; -1: all tokens
    int32_t stride;
};

enum Op { EMBED, NORM, QKV, ROTARY, ATTENTION, ENCODE, OUTPUT, GATE_UP, DOWN, HEAD, OPS };

class AnyStack {
  public:
    virtual ~AnyStack() = default;
    // Runs parts first .. last of a step: 0 is the embedding, 1 + 2i the attention of layer i, 2 + 2i its MLP, and the last
    // one the final norm of the sampled tokens. With spec.partial, each part but the last leaves this rank's share of a sum
    // in `partial`, [tokens, hidden]; before the next part the caller sums it over ranks, in place.
    virtual void run(const Step& step, int first, int last) = 0;
    // The logits of some samples, [count, vocabulary].
    virtual void logits(const int32_t* which, int count, float* out) = 0;
    // One token for each of the first `count` samples: greedy at temperature 0, otherwise drawn by a number in [0, 1).
    // `masks` may be null.
    virtual void choose(
        int count, const float* temperatures, const double* uniforms, const Masks* masks, int32_t* out
    ) = 0;
    // For each of the first `count` samples, over this rank's tokens: the highest logit, its token, and the sum of weights
    // relative to it. `masks` may be null; `draw` reads them too. It draws one of this rank's tokens for each of these
    // samples, by numbers in [0, 1).
    virtual void greedy(
        int count, const float* temperatures, const Masks* masks, float* top, int32_t* token, double* weight
    ) = 0;
    virtual void draw(const double* uniforms, int32_t* out) = 0;
    virtual float* partial() = 0;
    // The hidden states between two parts, [tokens, hidden]; with spec.partial without what is still to be summed.
    virtual float* hidden() = 0;
    double seconds[OPS] = {};
};
