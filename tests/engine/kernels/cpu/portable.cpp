// The kernels without Python, for instruction sets that are emulated: vector operations against scalar code, then a small
// model with random weights in each form. Prints the logits of each form; they differ between instruction sets in
// rounding only. FEW_FORMS leaves out those of which every part is in another one, ONLY_BYTES those without int8 products.

#include <algorithm>
#include <list>
#include <vector>

#include "primitives.h"
#include "stack.h"

enum Format { FLOAT32, BFLOAT16, INT8, INT4 };

struct Form {
    const char* name;
    Format weights, head, cache;
    int tokens;  // of the prompt
    AnyStack* (*make)(const Spec& spec, int threads, const int32_t* cores);
};

template <class W, class H, class T> AnyStack* make(const Spec& spec, int threads, const int32_t* cores) {
    return new Stack<W, H, T>(spec, threads, cores);
}

constexpr int SHORT = 70, LONG = PART + 20;  // one part of keys, and two
constexpr Form FORMS[] = {
    {"int8-int8", INT8, INT8, INT8, LONG, make<I8, I8, C8>},
    {"int4-int8", INT4, INT8, INT8, SHORT, make<I4, I8, C8>},
#if !defined(ONLY_BYTES)
    {"float32", FLOAT32, FLOAT32, FLOAT32, SHORT, make<F32, F32, F32>},
    {"bfloat16", BFLOAT16, BFLOAT16, BFLOAT16, SHORT, make<BF16, BF16, BF16>},
#if !defined(FEW_FORMS)
    {"bfloat16-int8", BFLOAT16, BFLOAT16, INT8, SHORT, make<BF16, BF16, C8>},
    {"int8-bfloat16", INT8, INT8, BFLOAT16, SHORT, make<I8, I8, BF16>},
    {"int4-bfloat16", INT4, INT8, BFLOAT16, SHORT, make<I4, I8, BF16>},
#endif
#endif
};

constexpr int HIDDEN = 64, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 32, MIDDLE = 64, LAYERS = 2, VOCABULARY = 112, BLOCK = 32;
constexpr int WINDOW = 70, BLOCKS = 4 * (LONG / BLOCK + 2), TABLE = LONG / BLOCK + 2, THREADS = 2;

int units_per_word(Format format) { return format == FLOAT32 ? 1 : format == BFLOAT16 ? 2 : format == INT8 ? 4 : 8; }

class Model {
  public:
    explicit Model(const Form& form) {
        for (int i = 0; i < HEAD_DIM / 2; i++) frequencies_[i] = std::pow(10000.0f, -2.0f * i / HEAD_DIM);
        for (float& one : norm_) one = 1 + random_.number() / 4;
        embedding_.resize(VOCABULARY * HIDDEN);
        for (int i = 0; i < VOCABULARY * HIDDEN; i++)
            if (form.cache == FLOAT32)
                embedding_[i] = as_bits(random_.number());
            else
                reinterpret_cast<uint16_t*>(embedding_.data())[i] = to_bf16(random_.number());
        const int per_unit = form.cache == FLOAT32 ? 1 : form.cache == BFLOAT16 ? 2 : 4;
        const Shape shape{HEADS, KV_HEADS, HEAD_DIM, BLOCK, 0};
        const long words = BLOCKS * KV_HEADS * shape.block_words(per_unit);
        for (Layer& layer : layers_) {
            layer = {linear(form.weights, HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, true),
                     linear(form.weights, HEADS * HEAD_DIM, HIDDEN, false), linear(form.weights, HIDDEN, 2 * MIDDLE, false),
                     linear(form.weights, MIDDLE, HIDDEN, false), norm_, norm_, nullptr, nullptr, used(words), used(words),
                     &layer == layers_ ? 0 : WINDOW, 0, 1};
            if (&layer != layers_) layer.query_norm = layer.key_norm = norm_;
        }
        spec_ = {HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MIDDLE, LAYERS, VOCABULARY, BLOCK, 0, 0, VOCABULARY, 1e-5f,
                 1 / std::sqrt(float(HEAD_DIM)), 1, frequencies_, axes_, embedding_.data(), norm_, layers_,
                 linear(form.head, HIDDEN, VOCABULARY, false)};
        stack_.reset(form.make(spec_, THREADS, nullptr));
    }

    // Some tokens of a prompt, after those before them. Prompts of different numbers have blocks of their own.
    struct Row {
        int prompt, begin, end;
    };

    // The logits of each row's last token.
    std::vector<float> run(const std::vector<Row>& rows) {
        std::vector<int32_t> starts, counts, computed, ids, positions, row_of, sampled;
        std::vector<int32_t> tables;
        for (const Row& row : rows) {
            starts.push_back(int32_t(ids.size()));
            counts.push_back(row.end - row.begin);
            computed.push_back(row.begin);
            for (int i = 0; i < TABLE; i++) tables.push_back((row.prompt * TABLE + i) * 37 % BLOCKS);
            for (int position = row.begin; position < row.end; position++) {
                ids.push_back((position * 7919 + position / 5 + row.prompt % 2) % VOCABULARY);
                positions.push_back(position);
                row_of.push_back(int32_t(starts.size()) - 1);
            }
            sampled.push_back(int32_t(ids.size()) - 1);
        }
        const int count = int(rows.size());
        const Ragged batch{count, int32_t(ids.size()), starts.data(), counts.data(), computed.data(), tables.data(), TABLE};
        const Step step{batch, ids.data(), positions.data(), positions.data(), row_of.data(), sampled.data(), count, {}};
        stack_->run(step, 0, 2 * LAYERS + 1);
        std::vector<float> out(size_t(count) * VOCABULARY);
        std::vector<int32_t> which, greedy(count);
        for (int i = 0; i < count; i++) which.push_back(i);
        stack_->logits(which.data(), count, out.data());
        const std::vector<float> temperatures(count, 0.0f);
        const std::vector<double> numbers(count, 0.0);
        stack_->choose(count, temperatures.data(), numbers.data(), nullptr, greedy.data());
        for (int i = 0; i < count; i++) {
            const float* logits = out.data() + i * VOCABULARY;
            check(greedy[i] == std::max_element(logits, logits + VOCABULARY) - logits, "the greedy token", greedy[i]);
        }
        return out;
    }

  private:
    Linear linear(Format format, int inputs, int outputs, bool biased) {
        const float size = 2 / std::sqrt(float(inputs));
        const long panels = outputs / LANES, words = panels * inputs / units_per_word(format) * LANES;
        std::vector<uint32_t>& weights = keep(words);
        for (uint32_t& word : weights)
            word = format == FLOAT32 ? as_bits(random_.number() * size) : random_.word();
        if (format == BFLOAT16)
            for (uint32_t& word : weights) word = pair(float(int16_t(word)) * size / 32768, float(int32_t(word)) * size / 2147483648);
        const uint16_t* scales = nullptr;
        if (format == INT8 || format == INT4) {
            const int group = format == INT8 ? I8::GROUP : I4::GROUP;
            std::vector<uint32_t>& pairs = keep(panels * (inputs / group) * LANES / (format == INT8 ? 2 : 1));
            for (size_t i = 0; i < pairs.size(); i++) {
                const float scale = size * (1 + random_.number() / 8) / (format == INT8 ? 128 : 8);
                const bool lowest = format == INT4 && i / (LANES / 2) % 2;  // 16 scales, 16 minimums, and so on
                pairs[i] = lowest ? pair(-7.5f * scale, -8 * scale) : pair(scale, scale);
            }
            scales = reinterpret_cast<const uint16_t*>(pairs.data());
        }
        const float* bias = nullptr;
        if (biased) {
            std::vector<uint32_t>& bits = keep(outputs);
            for (uint32_t& word : bits) word = as_bits(random_.number() / 8);
            bias = reinterpret_cast<const float*>(bits.data());
        }
        return {weights.data(), scales, bias, outputs, inputs};
    }

    static uint32_t pair(float low, float high) { return to_bf16(low) | uint32_t(to_bf16(high)) << 16; }

    std::vector<uint32_t>& keep(long words) { return kept_.emplace_back(words); }

    // A cache in which other rows left the worst: infinity in bfloat16, NaN in float32.
    uint32_t* used(long words) {
        std::vector<uint32_t>& cache = keep(words);
        std::fill(cache.begin(), cache.end(), 0x7F807F80u);
        return cache.data();
    }

    Random random_{11};
    float frequencies_[HEAD_DIM / 2], norm_[HIDDEN];
    int32_t axes_[HEAD_DIM / 2] = {};
    std::vector<uint32_t> embedding_;
    std::list<std::vector<uint32_t>> kept_;
    Layer layers_[LAYERS];
    Spec spec_;
    std::unique_ptr<AnyStack> stack_;
};

void test_form(const Form& form) {
    Model model(form);
    const int end = form.tokens;
    const auto same = [&](const std::vector<float>& found, int row, const std::vector<float>& alone) {
        return std::memcmp(found.data() + row * VOCABULARY, alone.data(), VOCABULARY * sizeof(float)) == 0;
    };
    const std::vector<float> alone = model.run({{0, 0, end}});
    if (end == SHORT)  // a machine that is emulated takes seconds for long ones
        check(same(model.run({{1, 0, 9}, {2, 0, end}, {3, 0, 40}}), 1, alone), "the same bits in a batch");
    model.run({{2, 0, 33}});
    model.run({{1, 0, 5}, {2, 33, end - 3}});
    model.run({{2, end - 3, end - 2}, {3, 0, 1}});
    model.run({{3, 1, 2}, {2, end - 2, end - 1}, {1, 5, 6}});
    check(same(model.run({{2, end - 1, end}}), 0, alone), "the same bits in chunks and decode steps");
    std::printf("%s", form.name);
    for (float logit : alone) std::printf(" %.9g", logit);
    std::printf("\n");
}

int main() {
    test_primitives();
    for (const Form& form : FORMS) test_form(form);
}
