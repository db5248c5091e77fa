// A whole forward of a decoder in one call: T flat rows through all layers over the paged cache, by one team of threads.
//
// The Python twin is steeple.model.decoder. A phase is a loop over units of work that the threads share; between two
// phases all threads meet. In bfloat16 a phase rounds where the twin's operations round.
#pragma once

#include <chrono>
#include <vector>

#include "attention.h"
#include "norm.h"

namespace forward {

using namespace simd;

struct Matrix {  // packed weights, see steeple.ops.linear
    const char *data, *bias;
    const float* scales;
    int64_t outputs, words, panels, sections;

    gemm::Packed packed(bool bf16) const { return {data, scales, outputs, words, panels, sections, bf16}; }
};

struct Layer {
    const char *attention_norm, *q_norm, *k_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;
    Matrix qkv, o, gate_up, down;
    char *keys, *values;  // of this layer in the cache
    int64_t window;
};

struct Model {
    const Layer* layers;
    const char *embed, *norm;  // embed: [V, D]
    const float *cos, *sin;    // [max_context, rotated]
    Matrix head;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, rotated, vocab, max_context;
    int64_t num_blocks, block_size, activation, bf16;
    double eps, embed_scale, scale, softcap, logit_softcap;

    int64_t element() const { return bf16 ? 2 : 4; }
    int64_t qkv_heads() const { return heads + 2 * kv_heads; }
};

enum Part { ROWS_PART = 0, LINEAR_PART = 1, CACHE_PART = 2, ATTENTION_PART = 3, PARTS = 4 };

struct Step {  // one forward: see steeple.types.Batch
    const int64_t *tokens, *positions, *slots;
    const int32_t *cu_rows, *blocks, *cu_blocks, *prefix;
    const int64_t* ancestors;
    const int32_t *text_len, *row_positions;
    int64_t rows, requests, entries, layer_stride, head_stride;  // entries: of the block tables of all layers and heads
    const char* added;    // [T, D]: to the embeddings, or null
    char* hidden;         // [T, D]: after the last norm
    char* const* keep;    // per layer: [T, D] for its output, or null
    float* scores;        // [L, K, entries of a table]: of the pages, or null
    double* parts;        // seconds of each part are added here, or null
    char* room;           // room_of(model, rows) bytes, for what lies between two phases
    int64_t threads;
    team::Run run;
    team::Size size;
};

enum Outcome { OUTSIDE_VOCABULARY = 10, OUTSIDE_CONTEXT = 11 };

// Bytes of `width` elements for each row, from a cache line on.
inline int64_t width_bytes(const Model& m, int64_t rows, int64_t width) {
    return (rows * width * m.element() + 127) / 64 * 64;
}
inline int64_t room_of(const Model& m, int64_t rows) {
    return 3 * width_bytes(m, rows, m.hidden) + width_bytes(m, rows, m.qkv_heads() * m.head_dim) +
           width_bytes(m, rows, m.heads * m.head_dim) + width_bytes(m, rows, m.intermediate);
}

struct Forward {
    Forward(const Model& model, const Step& step) : m(model), s(step) {
        char* free = s.room;
        auto take = [&](int64_t width) {
            char* const at = free;
            free += width_bytes(m, s.rows, width);
            return at;
        };
        x = take(m.hidden), h = take(m.hidden), tmp = take(m.hidden);
        qkv = take(m.qkv_heads() * m.head_dim), seen = take(m.heads * m.head_dim), wide = take(m.intermediate);
    }

    const Model& m;
    const Step& s;
    char *x, *h, *tmp, *qkv, *seen, *wide;
    std::vector<std::unique_ptr<attention::Job>> jobs;  // one per window
    std::vector<int> job_of;                            // layer -> job

    int64_t row_bytes() const { return m.hidden * m.element(); }
    char* row(char* of, int64_t t) const { return of + t * row_bytes(); }
};

// What every thread of the team has for itself.
struct Thread {
    Thread(Forward& forward, team::Barrier& barrier, team::Share& share, int number, int threads)
        : f(forward), m(forward.m), s(forward.s), barrier(barrier), share(share), number(number), threads(threads),
          sums(new float[2 * gemm::BLOCK * gemm::PANEL]) {}

    Forward& f;
    const Model& m;
    const Step& s;
    team::Barrier& barrier;
    team::Share& share;
    const int number, threads;
    std::unique_ptr<float[]> sums;
    std::chrono::steady_clock::time_point last;

    // Ends a phase; `part` is what it is booked under.
    void meet(Part part) {
        barrier.wait();
        if (number || !s.parts) return;
        const auto now = std::chrono::steady_clock::now();
        s.parts[part] += std::chrono::duration<double>(now - last).count();
        last = now;
    }
    void start() { last = std::chrono::steady_clock::now(); }

    void linear(const Matrix& w, int after, const char* x, int64_t x_width, char* y, int64_t y_width) {
        const dense::Layer layer{w.packed(m.bf16), w.bias, after, (int)m.activation, 0};
        dense::Call call{layer, s.rows, x, x_width * m.element(), y, y_width * m.element(), 0};
        share.refill(number, dense::units(call, threads));
        for (int64_t unit; (unit = share.next(number)) >= 0;) dense::run(call, unit, sums.get());
        meet(LINEAR_PART);
    }

    // Rows of this thread.
    int64_t begin() const { return s.rows * number / threads; }
    int64_t end() const { return s.rows * (number + 1) / threads; }

    void normed(const char* from, const char* weight, char* to) const {
        norm::row(from, weight, to, m.hidden, (float)m.eps, m.bf16);
    }
    void add_row(char* x, const char* y) const {
        for (int64_t i = 0; i < m.hidden; i += W) {
            const int n = (int)std::min<int64_t>(W, m.hidden - i);
            dense::put(x, i, dense::part_of(x, i, n, m.bf16) + dense::part_of(y, i, n, m.bf16), n, m.bf16);
        }
    }

    void embed_rows() {
        for (int64_t t = begin(); t < end(); t++) {
            char* x = f.row(f.x, t);
            std::memcpy(x, m.embed + s.tokens[t] * f.row_bytes(), f.row_bytes());
            if (m.embed_scale != 1.0) scale_row(x, m.bf16 ? widen1(narrow1((float)m.embed_scale)) : m.embed_scale);
            if (s.added) add_row(x, s.added + t * f.row_bytes());
            normed(x, m.layers[0].attention_norm, f.row(f.h, t));
        }
        meet(ROWS_PART);
    }
    void scale_row(char* x, float by) const {
        for (int64_t i = 0; i < m.hidden; i += W) {
            const int n = (int)std::min<int64_t>(W, m.hidden - i);
            dense::put(x, i, dense::part_of(x, i, n, m.bf16) * by, n, m.bf16);
        }
    }

    // The residual stream after a block of layer `l`, and the norm that the next block reads.
    void close_block(const char* post_norm, const char* next_norm, bool last, char* keep) {
        for (int64_t t = begin(); t < end(); t++) {
            char* x = f.row(f.x, t);
            if (post_norm) {
                normed(f.row(f.tmp, t), post_norm, f.row(f.h, t));
                add_row(x, f.row(f.h, t));
            }
            if (keep) std::memcpy(keep + t * f.row_bytes(), x, f.row_bytes());
            normed(x, next_norm, last ? s.hidden + t * f.row_bytes() : f.row(f.h, t));
        }
        meet(ROWS_PART);
    }

    void rotate(char* head, int64_t position) const {
        const int64_t R = m.rotated;
        const float *cos = m.cos + position * R, *sin = m.sin + position * R;
        char* second = head + R * m.element();
        for (int64_t i = 0; i < R; i += W) {
            const int n = (int)std::min<int64_t>(W, R - i);
            const vf a = dense::part_of(head, i, n, m.bf16), b = dense::part_of(second, i, n, m.bf16);
            const vf c = dense::load_some<vf>((const char*)(cos + i), n), d = dense::load_some<vf>((const char*)(sin + i), n);
            dense::put(head, i, a * c - b * d, n, m.bf16);
            dense::put(second, i, b * c + a * d, n, m.bf16);
        }
    }

    attention::Store store(const Layer& layer) const {
        return {layer.keys, layer.values, m.kv_heads, m.block_size, m.head_dim, m.bf16 != 0};
    }

    // Few rows are shared out by heads, so that threads do not write to the same lines of the cache; many by rows.
    bool by_heads() const { return s.rows < 16 * threads; }

    void rotate_head(const Layer& layer, char* row, int64_t head, int64_t position) const {
        const int64_t H = m.head_dim * m.element();
        const char* weight = head < m.heads ? layer.q_norm : layer.k_norm;
        if (weight) norm::row(row + head * H, weight, row + head * H, m.head_dim, (float)m.eps, m.bf16);
        rotate(row + head * H, position);
    }

    void rotate_and_store(int64_t l) {
        const Layer& layer = m.layers[l];
        if (number == 0)
            attention::restart(*f.jobs[f.job_of[l]], f.qkv, layer.keys, layer.values, f.seen, s.blocks + l * s.layer_stride,
                               s.scores ? s.scores + l * m.kv_heads * s.cu_blocks[s.requests] : nullptr);
        const attention::Store to = store(layer);
        const int64_t N = m.heads, K = m.kv_heads, H = m.head_dim * m.element(), row_bytes = m.qkv_heads() * H;
        const int64_t first = by_heads() ? 0 : begin(), last = by_heads() ? s.rows : end();
        for (int64_t head = by_heads() ? number : 0; head < N + K; head += by_heads() ? threads : 1)
            for (int64_t t = first; t < last; t++) {
                char* row = f.qkv + t * row_bytes;
                rotate_head(layer, row, head, s.positions[t]);
                if (head >= N) attention::put(to, s.slots[t], head - N, row + head * H, row + (head + K) * H);
            }
        meet(CACHE_PART);
    }

    // The lines that rotate_and_store will write are scattered, and nobody has read them lately: fetch them while the
    // projection before it reads its weights.
    void fetch_places(int64_t l) const {
        if (!by_heads()) return;
        const attention::Store to = store(m.layers[l]);
        const int64_t word = to.dims() * to.bytes() * to.block_size, size = m.head_dim * to.bytes();
        for (int64_t head = 0; head < m.kv_heads; head++) {
            if ((m.heads + head) % threads != number) continue;
            for (int64_t t = 0; t < s.rows; t++) {
                const int64_t at = to.head_of(s.slots[t], head), offset = s.slots[t] % to.block_size;
                if (t && s.slots[t] / to.block_size == s.slots[t - 1] / to.block_size) continue;
                for (int64_t i = 0; i < to.head_bytes(); i += std::max<int64_t>(64, word))
                    __builtin_prefetch(to.keys + at + i + offset * word / to.block_size, 1, 2);
                for (int64_t i = 0; i < size * to.pair(); i += 64)
                    __builtin_prefetch(to.values + at + offset / to.pair() * size * to.pair() + i, 1, 2);
            }
        }
    }

    void attend(int64_t l) {
        attention::run(*f.jobs[f.job_of[l]]);
        meet(ATTENTION_PART);
    }

    void layer(int64_t l) {
        const Layer& layer = m.layers[l];
        const int64_t D = m.hidden, wide = m.heads * m.head_dim;
        const bool last = l + 1 == m.num_layers;
        fetch_places(l);
        linear(layer.qkv, dense::STORE, f.h, D, f.qkv, m.qkv_heads() * m.head_dim);
        rotate_and_store(l);
        attend(l);
        const bool post = layer.attention_post_norm;
        linear(layer.o, post ? dense::STORE : dense::ADD, f.seen, wide, post ? f.tmp : f.x, D);
        close_block(layer.attention_post_norm, layer.mlp_norm, false, nullptr);
        linear(layer.gate_up, dense::GATED, f.h, D, f.wide, m.intermediate);
        const bool after = layer.mlp_post_norm;
        linear(layer.down, after ? dense::STORE : dense::ADD, f.wide, m.intermediate,
               after ? f.tmp : f.x, D);
        close_block(layer.mlp_post_norm, last ? m.norm : m.layers[l + 1].attention_norm, last, s.keep ? s.keep[l] : nullptr);
    }

    void all() {
        start();
        embed_rows();
        for (int64_t l = 0; l < m.num_layers; l++) layer(l);
    }
};

inline int check(const Model& m, const Step& s) {
    for (int64_t t = 0; t < s.rows; t++) {
        if (s.tokens[t] < 0 || s.tokens[t] >= m.vocab) return OUTSIDE_VOCABULARY;
        if (s.positions[t] < 0 || s.positions[t] >= m.max_context) return OUTSIDE_CONTEXT;
        if (s.slots[t] < 0 || s.slots[t] >= m.num_blocks * m.block_size) return attention::OUTSIDE_CACHE;
    }
    return attention::OK;
}

// Threads that pay for: a thread of its own wants some ten microseconds of weights to read in every layer.
inline int64_t worth(const Model& m, const Step& s) {
    const Layer& l = m.layers[0];
    const int64_t words = l.qkv.panels * l.qkv.words + l.o.panels * l.o.words + l.gate_up.panels * l.gate_up.words +
                          l.down.panels * l.down.words;
    const int64_t work = words * gemm::PANEL * 4 * std::max<int64_t>(1, s.rows / 8);
    return std::max<int64_t>(1, std::min<int64_t>(s.threads, work >> 17));
}

inline int run(const Model& m, const Step& s) {
    if (const int bad = check(m, s)) return bad;
    Forward f(m, s);
    const int64_t threads = worth(m, s);
    std::vector<int64_t> windows;
    for (int64_t l = 0; l < m.num_layers; l++) {
        const Layer& layer = m.layers[l];
        const auto known = std::find(windows.begin(), windows.end(), layer.window);
        f.job_of.push_back((int)(known - windows.begin()));
        if (known != windows.end()) continue;
        windows.push_back(layer.window);
        const attention::Call call{f.qkv, layer.keys, layer.values, f.seen, s.scores, s.cu_rows, s.blocks,
                                   s.cu_blocks, s.prefix, s.text_len, s.row_positions, s.ancestors,
                                   m.qkv_heads() * m.head_dim, s.requests, m.num_blocks, m.block_size, m.heads,
                                   m.kv_heads, m.head_dim, layer.window, s.head_stride, (float)m.scale,
                                   (float)m.softcap, m.bf16 != 0, m.bf16 != 0};
        const int64_t entries = s.entries - (m.num_layers - 1) * s.layer_stride;  // from the last layer's tables on
        if (s.layer_stride < 0 || !attention::valid(call, s.rows, entries)) return attention::BAD_OFFSETS;
        f.jobs.emplace_back(new attention::Job(call));
        attention::plan(*f.jobs.back(), threads);
    }
    std::unique_ptr<team::Barrier> barrier;
    std::unique_ptr<team::Share> share;
    std::atomic<int> ready{0};
    team::parallel(
        [&](int number, int size) {
            if (number == 0) {
                barrier.reset(new team::Barrier(size));
                share.reset(new team::Share(size));
                ready.store(1, std::memory_order_release);
            }
            while (!ready.load(std::memory_order_acquire)) team::relax();
            Thread(f, *barrier, *share, number, size).all();
        },
        threads, s.run, s.size);
    for (const auto& job : f.jobs)
        if (job->outcome) return job->outcome;
    return attention::OK;
}

// Logits [R, V] float32 of hidden rows, or, with `best`, the index of each row's largest.
inline void head(const Model& m, const char* hidden, int64_t rows, float* logits, int64_t* best, int64_t threads,
                 team::Run run, team::Size size) {
    const dense::Layer layer{m.head.packed(m.bf16), m.head.bias, best ? dense::BEST : dense::FLOATS, 0,
                             (float)m.logit_softcap};
    std::vector<dense::Best> found(best ? m.head.panels * rows : 0);
    dense::Call call{layer, rows, hidden, m.hidden * m.element(), best ? (char*)found.data() : (char*)logits,
                     m.vocab * 4, 0};
    const int64_t count = dense::units(call, (int)threads);
    team::Share share((int)threads);
    for (int t = 0; t < threads; t++) share.refill(t, count);
    team::parallel(
        [&](int number, int) {
            std::unique_ptr<float[]> sums(new float[2 * gemm::BLOCK * gemm::PANEL]);
            for (int64_t unit; (unit = share.next(number)) >= 0;) dense::run(call, unit, sums.get());
        },
        threads, run, size);
    for (int64_t r = 0; best && r < rows; r++) {
        dense::Best most = found[r];
        for (int64_t p = 1; p < m.head.panels; p++) {
            const dense::Best& b = found[p * rows + r];
            if (b.value > most.value || (b.value != b.value && most.value == most.value)) most = b;
        }
        best[r] = most.index;
    }
}

}  // namespace forward
