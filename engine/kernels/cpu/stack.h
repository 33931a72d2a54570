// A whole Llama-like decoder (Llama, Mistral, Qwen2, Qwen3, SmolLM): embedding, layers, head.
#pragma once

#include <chrono>

#include "head.h"
#include "rowwise.h"
#include "spec.h"

// W, H, T: formats of the layers' weights, of the head's weights, and of queries, keys and values.
template <class W, class H, class T> class Stack : public AnyStack {
  public:
    Stack(const Spec& spec, int threads, const int32_t* cores)
        : spec_(spec), layers_(spec.layer, spec.layer + spec.layers), team_(threads, cores),
          shape_{spec.heads, spec.kv_heads, spec.head_dim, spec.block_size, spec.scaling}, head_(spec.head) {}

    void run(const Step& step, int first, int last) override {
        step_ = &step;
        first_ = first;
        last_ = last;
        if (first == 0) begin();
        team_.run([](void* self, Team&, int thread) { static_cast<Stack*>(self)->parts(thread); }, this);
    }

    void logits(const int32_t* which, int count, float* out) override {
        requested_.take(count, spec_.hidden);
        for (int i = 0; i < count; i++) requested_.copy(chosen_, which[i], i, spec_.hidden);
        samples_ = count;
        logits_ = out;
        team_.run([](void* self, Team&, int thread) { static_cast<Stack*>(self)->all_logits(thread); }, this);
    }

    void choose(
        int count, const float* temperatures, const double* uniforms, const Masks* masks, int32_t* out
    ) override {
        head_.begin(chosen_.rows(spec_.hidden), count, temperatures, uniforms, masks);
        tokens_ = out;
        team_.run([](void* self, Team&, int thread) { static_cast<Stack*>(self)->all_tokens(thread); }, this);
    }

    void greedy(
        int count, const float* temperatures, const Masks* masks, float* top, int32_t* token, double* weight
    ) override {
        head_.begin(chosen_.rows(spec_.hidden), count, temperatures, nullptr, masks);
        greedy_ = {top, token, weight};
        team_.run([](void* self, Team&, int thread) { static_cast<Stack*>(self)->all_greedy(thread); }, this);
    }

    void draw(const double* uniforms, int32_t* out) override {
        head_.take(uniforms);
        tokens_ = out;
        team_.run([](void* self, Team&, int thread) { static_cast<Stack*>(self)->all_draws(thread); }, this);
    }

    float* partial() override { return partial_.get(); }

    float* hidden() override { return x_.get(); }

  private:
    typedef typename T::Element Element;

    // The activations of a product.
    template <class F> struct Operand {
        Buffer<typename F::Element> units;
        Buffer<float> scales;
        Buffer<uint32_t> offsets;

        void take(size_t rows, long width) {
            units.take(rows * width);
            const size_t read = (rows + TILE - 1) * groups(width);  // see Activations
            scales.take(read);
            offsets.take(read);
        }

        static long groups(long width) {
            if constexpr (F::QUANTIZED) return width / F::GROUP;
            return 0;
        }

        void set(long row, const float* from, int width) {
            const long at = row * groups(width);
            encode<F>(from, width, units.get() + row * width, scales.get() + at, offsets.get() + at);
        }

        void copy(const Operand& from, long row, long to, int width) {
            const long count = groups(width);
            std::memcpy(units.get() + to * width, from.units.get() + row * width, width * sizeof *units.get());
            if constexpr (F::QUANTIZED) {
                std::memcpy(scales.get() + to * count, from.scales.get() + row * count, count * sizeof(float));
                std::memcpy(offsets.get() + to * count, from.offsets.get() + row * count, count * sizeof(uint32_t));
            }
        }

        Activations rows(long width) const {
            return {reinterpret_cast<const uint32_t*>(units.get()), width / F::PER_UNIT, scales.get(), offsets.get(),
                    groups(width)};
        }
    };

    void begin() {
        const size_t tokens = step_->batch.tokens;
        const long widest = spec_.intermediate > query_width() ? spec_.intermediate : query_width();
        x_.take(tokens * spec_.hidden);
        left_.take(tokens, widest > spec_.hidden ? widest : spec_.hidden);
        wide_.take(tokens * (qkv_width() > widest ? qkv_width() : widest));
        query_.take(tokens * query_width());
        query_scale_.take(tokens * spec_.heads);
        query_offset_.take(tokens * spec_.heads);
        cosine_.take(tokens * spec_.head_dim / 2);
        sine_.take(tokens * spec_.head_dim / 2);
        chosen_.take(step_->samples, spec_.hidden);
        if (spec_.partial) partial_.take(tokens * spec_.hidden);
        if (step_->adapters.table) projected_.take(tokens * step_->adapters.max_rank);
        Attention<T>::plan(shape_, step_->batch, team_.size(), plan_);
        list_all_blocks();
    }

    void list_all_blocks() {
        for (auto& blocks : blocks_) blocks.clear();
        if (tokens() < NextBlocks::MIN_ROWS) return;
        for (const Layer& layer : layers_) {
            if (size_t(layer.group) >= blocks_.size()) blocks_.resize(layer.group + 1);
            std::vector<int32_t>& blocks = blocks_[layer.group];
            if (blocks.empty()) list_blocks(step_->batch.of(layer.group), spec_.block_size, layer.window, blocks);
        }
    }

    void parts(int thread) {
        for (int part = first_; part <= last_; part++) {
            mark(thread);
            if (part == 0)
                embed(thread);
            else if (part > 2 * spec_.layers)
                choose(thread);
            else if (part % 2)
                attend(part / 2, thread);
            else
                mlp(part / 2 - 1, thread);
        }
    }

    void attend(int number, int thread) {
        const Layer& layer = layers_[number];
        normalize_all(layer.input_norm, thread);
        adapted(layer.qkv, number, AT_QKV, left_.rows(spec_.hidden), Store{wide_.get(), qkv_width()});
        done(QKV, thread);
        const Ragged batch = step_->batch.of(layer.group);
        write_cache(layer, batch);
        done(ROTARY, thread);
        Attention<T>(shape_, batch)
            .run(team_,
                 {query_.get(), query_scale_.get(), query_offset_.get(), wide_.get(), layer.keys, layer.values,
                  layer.window},
                 plan_);
        done(ATTENTION, thread);
        encode_all(query_width(), thread);
        add_linear(layer.output, number, AT_OUTPUT, left_.rows(query_width()));
        done(OUTPUT, thread);
    }

    void mlp(int number, int thread) {
        const Layer& layer = layers_[number];
        normalize_all(layer.post_norm, thread);
        const Activations x = left_.rows(spec_.hidden);
        Activations middle = left_.rows(spec_.intermediate);
        if constexpr (W::QUANTIZED) {
            adapted(layer.gate_up, number, AT_GATE_UP, x, SwiGLU<F32>{wide_.get(), spec_.intermediate});
            done(GATE_UP, thread);
            encode_all(spec_.intermediate, thread);
        } else {
            // Not in place: other threads still read the input.
            auto out = reinterpret_cast<typename W::Element*>(wide_.get());
            adapted(layer.gate_up, number, AT_GATE_UP, x, SwiGLU<W>{out, spec_.intermediate});
            done(GATE_UP, thread);
            middle.units = reinterpret_cast<const uint32_t*>(out);
        }
        add_linear(layer.down, number, AT_DOWN, middle);
        done(DOWN, thread);
    }

    // A linear with the adapters of the tokens.
    template <class Finish>
    void adapted(const Linear& w, int layer, AdaptedLinear place, const Activations& x, const Finish& finish) {
        const Adapters& adapters = step_->adapters;
        const NextBlocks cache = next_blocks(layer, place);
        if (!adapters.table) return linear<W>(team_, w, x, tokens(), finish, cache);
        team_.each(tokens(), [&](long t) {
            if (const LowRank* adapter = adapters.find(t, layer, place))
                project_down<W>(*adapter, x, t, w.inputs, projected_.get() + t * adapters.max_rank);
        });
        const auto call = [](const void* self, const Tile& tile) { (*static_cast<const Finish*>(self))(tile); };
        linear<W>(team_, w, x, tokens(), AddUp{adapters, layer, place, projected_.get(), &finish, call}, cache);
    }

    // A linear's share of the blocks that the next attention reads: by its pairs of panels.
    NextBlocks next_blocks(int number, AdaptedLinear place) const {
        static constexpr AdaptedLinear order[] = {AT_OUTPUT, AT_GATE_UP, AT_DOWN, AT_QKV};  // from attention to attention
        const int reader = place == AT_QKV ? number : number + 1;
        if (reader == spec_.layers || tokens() < NextBlocks::MIN_ROWS) return {};
        const Layer& layer = layers_[reader];
        const Linear* linears[] = {&layer.qkv, &layer.output, &layer.gate_up, &layer.down};
        long before = 0, own = 0, all = 0;
        for (AdaptedLinear one : order) {
            if (one == place) before = all, own = linears[one]->outputs;
            all += linears[one]->outputs;
        }
        const std::vector<int32_t>& blocks = blocks_[layer.group];
        const long words = spec_.kv_heads * shape_.block_words(T::PER_UNIT);
        const long count = std::min(long(blocks.size()), NextBlocks::MAX_WORDS / (2 * words)), first = count * before / all;
        const NextBlocks share{blocks.data(), first, count * (before + own) / all - first, layer.keys, layer.values, words};
        return share.fit(linears[place]->inputs / W::PER_WORD) ? share : NextBlocks{};
    }

    void embed(int thread) {
        team_.each(tokens(), [&](long t) {
            float* x = x_.get() + t * spec_.hidden;
            if (spec_.partial) {
                std::memset(x, 0, spec_.hidden * sizeof(float));
                x = partial_.get() + t * spec_.hidden;
            }
            const long id = long(step_->ids[t]) - spec_.first_token;
            if (id >= 0 && id < spec_.embedded)
                embed_one(id, x);
            else  // another rank's token
                std::memset(x, 0, spec_.hidden * sizeof(float));
            const int half = spec_.head_dim / 2;
            const int32_t* rotary = step_->rotary + t;
            for (int i = 0; i < half; i++) {
                const float angle = float(rotary[spec_.axes[i] * tokens()]) * spec_.frequencies[i];
                cosine_.get()[t * half + i] = std::cos(angle) * spec_.rotary_scaling;
                sine_.get()[t * half + i] = std::sin(angle) * spec_.rotary_scaling;
            }
        });
        done(EMBED, thread);
    }

    void embed_one(long id, float* out) const {
        typedef typename T::Plain Plain;
        if (spec_.embedding) {
            const auto row = static_cast<const typename Plain::Element*>(spec_.embedding) + id * spec_.hidden;
            for (int i = 0; i < spec_.hidden; i += LANES) store(out + i, Plain::widen(row + i));
        } else if constexpr (!H::QUANTIZED) {
            const long units = spec_.hidden / H::PER_UNIT;
            const uint32_t* column = spec_.head.panels + id / LANES * units * LANES + id % LANES;
            for (long u = 0; u < units; u++) {
                const auto unit = reinterpret_cast<const typename H::Element*>(column + u * LANES);
                for (int i = 0; i < H::PER_UNIT; i++) out[u * H::PER_UNIT + i] = H::widen(unit[i]);
            }
        }
    }

    void normalize_all(const float* weight, int thread) {
        const int size = spec_.hidden;
        team_.each(tokens(), [&](long t) {
            float* row = x_.get() + t * size;
            if (spec_.partial)
                for (int i = 0; i < size; i += LANES)
                    store(row + i, load<f32x16>(row + i) + load<f32x16>(partial_.get() + t * size + i));
            normalize_row(row, weight, left_, t);
        });
        done(NORM, thread);
    }

    template <class F> void normalize_row(const float* row, const float* weight, Operand<F>& out, long at) {
        alignas(64) float normal[MAX_HIDDEN];
        rms_norm(row, weight, spec_.hidden, spec_.epsilon, normal);
        out.set(at, normal, spec_.hidden);
    }

    // Query and key norms, rotary positions, and the write of keys and values to the cache.
    void write_cache(const Layer& layer, const Ragged& batch) {
        const int dim = spec_.head_dim, half = dim / 2;
        team_.each(tokens(), [&](long t) {
            float* head = wide_.get() + t * qkv_width();
            const float *cosine = cosine_.get() + t * half, *sine = sine_.get() + t * half;
            const int position = step_->positions[t];
            const long row = step_->row_of[t];
            const CachePosition at{batch.tables[row * batch.table_width + position / spec_.block_size],
                                   position % spec_.block_size};
            for (int h = 0; h < spec_.heads + spec_.kv_heads; h++, head += dim) {
                const bool query = h < spec_.heads;
                if (layer.query_norm)
                    rms_norm(head, query ? layer.query_norm : layer.key_norm, dim, spec_.epsilon, head);
                if (layer.rotary) rotate(head, dim, cosine, sine);
                if (query)
                    put_query(head, t, h);
                else
                    write_key<T>(head, shape_, h - spec_.heads, at, layer.keys);
            }
            const long left = batch.computed[row] + batch.counts[row] - position;  // tokens of the row in this step
            for (int h = 0; h < spec_.kv_heads; h++, head += dim) {
                write_value<T>(head, shape_, h, at, layer.values);
                clear_values<T>(shape_, h, at, left, layer.values);
            }
        });
    }

    void put_query(const float* head, long token, int number) {
        const long at = token * spec_.heads + number;
        Element* out = query_.get() + at * spec_.head_dim;
        if constexpr (T::QUANTIZED)
            query_offset_.get()[at] = -T::OFFSET * quantize(head, spec_.head_dim, out, query_scale_.get() + at);
        else
            narrow<T>(head, spec_.head_dim, out);
    }

    // Encodes `wide`, [tokens, size], as activations.
    void encode_all(int size, int thread) {
        team_.each(tokens(), [&](long t) { left_.set(t, wide_.get() + t * size, size); });
        done(ENCODE, thread);
    }

    void add_linear(const Linear& w, int layer, AdaptedLinear place, const Activations& x) {
        if (spec_.partial)
            adapted(w, layer, place, x, Store{partial_.get(), spec_.hidden});
        else
            adapted(w, layer, place, x, Add{x_.get(), spec_.hidden});
    }

    void choose(int thread) {
        const int size = spec_.hidden;
        team_.all(step_->samples, [&](long s) {
            const long t = step_->sampled[s];
            alignas(64) float row[MAX_HIDDEN];
            std::memcpy(row, x_.get() + t * size, size * sizeof(float));
            if (spec_.partial)
                for (int i = 0; i < size; i++) row[i] += partial_.get()[t * size + i];
            normalize_row(row, spec_.final_norm, chosen_, s);
        });
        done(HEAD, thread);
    }

    void all_logits(int thread) {
        mark(thread);
        linear<H>(team_, spec_.head, requested_.rows(spec_.hidden), samples_, StoreClipped{logits_, spec_.vocabulary});
        done(HEAD, thread);
    }

    void all_greedy(int thread) {
        mark(thread);
        head_.weigh(team_);
        head_.greedy(team_, greedy_);
        done(HEAD, thread);
    }

    void all_draws(int thread) {
        mark(thread);
        head_.pick(team_, tokens_);
        done(HEAD, thread);
    }

    void all_tokens(int thread) {
        mark(thread);
        head_.weigh(team_);
        head_.pick(team_, tokens_);
        done(HEAD, thread);
    }

    long tokens() const { return step_->batch.tokens; }
    int query_width() const { return spec_.heads * spec_.head_dim; }
    int qkv_width() const { return (spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim; }

    typedef std::chrono::steady_clock Time;

    void mark(int thread) {
        if (thread == 0) begun_ = Time::now();
    }

    // Adds the time since the last call or `mark` to an op's.
    void done(Op op, int thread) {
        if (thread != 0) return;
        const auto now = Time::now();
        seconds[op] += std::chrono::duration<double>(now - begun_).count();
        begun_ = now;
    }

    static constexpr int MAX_HIDDEN = 16384;

    const Spec spec_;
    const std::vector<Layer> layers_;
    Team team_;
    const Shape shape_;
    const Step* step_ = nullptr;
    int first_ = 0, last_ = 0;
    long samples_ = 0;  // whose logits are computed
    float* logits_ = nullptr;
    int32_t* tokens_ = nullptr;
    typename Attention<T>::Plan plan_;
    std::vector<std::vector<int32_t>> blocks_;  // of the cache that the batch reads, by KV group
    Buffer<float> x_, wide_, cosine_, sine_, partial_, projected_, query_scale_;
    Buffer<int32_t> query_offset_;
    Operand<W> left_;
    Operand<H> chosen_, requested_;
    Head<H> head_;
    Greedy greedy_{};
    Buffer<Element> query_;
    Time::time_point begun_;
};
