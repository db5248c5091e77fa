// The native library: its C interface for the linear layers, the norm and the whole forward. The attention's own
// interface is in attention.cpp. Nothing here knows torch: pointers in, numbers out.
#include "attention.cpp"
#include "forward.h"

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

int steeple_head(const forward::Model* model, const char* hidden, int64_t rows, float* logits, int64_t* best,
                 int64_t threads, team::Run run, team::Size size) {
    try {
        forward::head(*model, hidden, rows, logits, best, threads, run, size);
        return attention::OK;
    } catch (const std::bad_alloc&) {
        return attention::NO_MEMORY;
    }
}
}
