// The native library: its C interface for the linear layers, the norm and the whole forward. The attention's own
// interface is in attention.cpp. Nothing here knows torch: pointers in, numbers out.
#include "attention.cpp"
#include "forward.h"
#include "rounds.h"
#include "sampling.h"

extern "C" {

// Outputs that a panel of packed weights holds: the order of packing depends on the processor.
int64_t steeple_panel() { return gemm::PANEL; }

// y [rows, outputs] = x [rows, words] w^T + bias; rows x_stride and y_stride bytes apart. float32: y is float32.
void steeple_linear(const forward::Matrix* w, int bf16, const char* x, int64_t rows, int64_t x_stride, char* y,
                    int64_t y_stride, int floats, int64_t threads, team::Run run, team::Size size) {
    const dense::Layer layer{w->packed(bf16), w->bias, floats ? dense::FLOATS : dense::STORE, 0, 0};
    dense::Call call{layer, rows, x, x_stride, y, y_stride, 0};
    const int64_t bytes = w->panels * w->words * gemm::PANEL * 4;
    threads = std::max<int64_t>(1, std::min<int64_t>(threads, bytes * std::max<int64_t>(1, rows / 8) >> 16));
    const int64_t count = dense::units(call, (int)threads);
    team::Share share((int)threads);
    for (int t = 0; t < threads; t++) share.refill(t, count);
    team::parallel(
        [&](int number, int) {
            std::unique_ptr<float[]> sums(new float[2 * gemm::BLOCK * gemm::PANEL]);
            for (int64_t unit; (unit = share.next(number)) >= 0;) dense::run(call, unit, sums.get());
        },
        threads, run, size);
}

// x, y [rows, size] without gaps, weight [size]; all float32 or all bfloat16.
void steeple_rms_norm(const char* x, const char* weight, char* y, int64_t rows, int64_t size, float eps, int bf16) {
    const int64_t bytes = size * (bf16 ? 2 : 4);
    for (int64_t row = 0; row < rows; row++) norm::row(x + row * bytes, weight, y + row * bytes, size, eps, bf16 != 0);
}

// Bytes of Step::room.
int64_t steeple_room(const forward::Model* model, int64_t rows) { return forward::room_of(*model, rows); }

int steeple_forward(const forward::Model* model, const forward::Step* step) {
    try {
        return forward::run(*model, *step);
    } catch (const std::bad_alloc&) {
        return attention::NO_MEMORY;
    }
}

// Rows worth a thread of their own: a row of some thousand entries takes microseconds.
static int64_t samplers(int64_t rows, int64_t vocab, int64_t threads) {
    return std::max<int64_t>(1, std::min<int64_t>(threads, rows * vocab >> 15));
}

// tokens [rows]: drawn with uniform [rows] from softmax(logits / temperature), float32 [rows, vocab], left in `laws`.
void steeple_draw(const float* logits, int64_t rows, int64_t vocab, const float* temperature, const double* uniform,
                  float* laws, int64_t* tokens, int64_t threads, team::Run run, team::Size size) {
    threads = samplers(rows, vocab, threads);
    std::atomic<int64_t> next{0};
    team::parallel(
        [&](int, int) {
            for (int64_t r; (r = next.fetch_add(1)) < rows;)
                tokens[r] = sampling::draw(logits + r * vocab, vocab, temperature[r], uniform[r], laws + r * vocab);
        },
        threads, run, size);
}

// See sampling::Chains. kept, final [requests].
void steeple_judge(const float* logits, const int64_t* cu, const int64_t* tokens, const int64_t* rows, const float* laws,
                   const float* temperature, const double* accept, const double* last, int64_t requests, int64_t vocab,
                   int64_t* kept, int64_t* final, int64_t threads, team::Run run, team::Size size) {
    const sampling::Chains chains{logits, cu, tokens, rows, laws, temperature, accept, last, requests, vocab};
    threads = samplers(cu[requests] + requests, vocab, threads);
    std::atomic<int64_t> next{0};
    team::parallel(
        [&](int, int) {
            std::unique_ptr<float[]> room(new float[vocab]);
            for (int64_t b; (b = next.fetch_add(1)) < requests;) sampling::judge(chains, b, kept, final, room.get());
        },
        threads, run, size);
}

int steeple_head(const forward::Model* model, const char* hidden, int64_t rows, float* logits, int64_t* best,
                 int64_t threads, team::Run run, team::Size size) {
    try {
        forward::head(*model, hidden, rows, logits, best, threads, run, size);
        return attention::OK;
    } catch (const std::bad_alloc&) {
        return attention::NO_MEMORY;
    }
}

// See forward::Round. `first`: what no pass changes. The same calls as pass by pass, so the same numbers.
int steeple_round(const forward::Model* model, const forward::Step* first, const forward::Round* round) {
    const forward::Model& m = *model;
    const forward::Round& r = *round;
    const int64_t B = first->rows, V = m.vocab, row = m.hidden * m.element();
    for (int64_t pass = 0; pass < r.depth; pass++) {
        const char* const before = pass ? r.hidden : r.state;
        if (r.carry.data)
            steeple_linear(&r.carry, (int)m.bf16, before, B, row, r.added, row, 0, first->threads, first->run, first->size);
        const forward::Step step = forward::pass_of(r, *first, pass);
        int outcome = steeple_forward(model, &step);
        int64_t* const chosen = r.tokens + (pass + 1) * B;
        if (!outcome)
            outcome = steeple_head(model, r.hidden, B, r.laws ? r.logits : nullptr, r.laws ? nullptr : chosen,
                                   first->threads, first->run, first->size);
        if (outcome) return outcome;
        if (r.laws)
            steeple_draw(r.logits, B, V, r.temperature, r.uniform + pass * B, r.laws + pass * B * V, chosen,
                         first->threads, first->run, first->size);
    }
    return attention::OK;
}
}
