// The linear layers of a decoder over T rows: units of work over a product (gemm.h), and what becomes of its sums.
#pragma once

#include "gemm.h"
#include "team.h"

namespace dense {

using namespace simd;
using gemm::BLOCK;
using gemm::Packed;
using gemm::PANEL;

enum After : int {
    STORE = 0,   // y = sums + bias, in the element type of x
    ADD = 1,     // y += sums + bias: the residual stream
    GATED = 2,   // y = act(first section) * second section
    FLOATS = 3,  // y = cap(sums) in float32: logits
    BEST = 4,    // the largest sum of each row, the first of equals
};
enum Activation : int { SILU = 0, GELU_TANH = 1 };

struct Best {  // per panel and row
    float value;
    int32_t index;
};

struct Layer {
    Packed weights;
    const char* bias;  // [outputs] in the element type, or null
    int after;
    int activation;
    float softcap;
};

struct Call {
    const Layer& layer;
    int64_t rows;
    const char* x;
    int64_t x_stride;  // bytes
    char* y;           // BEST: Best[panels][rows]
    int64_t y_stride;  // bytes
    int columns;       // vectors of a panel that make a unit
};


// To nearest even; NaN stays NaN.
inline vh narrow(vf v) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector(v == v ? rounded : quiet, vh);
}

// As the element type would hold it: an operation of its own rounds its result.
inline vf rounded(vf v, bool bf16) { return bf16 ? widen(narrow(v)) : v; }

// `count` elements of at most W. A whole vector is the usual case, and a copy of unknown size a call.
template <class V> inline void store_part(char* at, V v, int count) {
    if (count == W) store(at, v);
    else std::memcpy(at, &v, count * sizeof(v) / W);
}
inline void put(char* at, int64_t i, vf v, int count, bool bf16) {
    if (bf16) store_part(at + i * 2, narrow(v), count);
    else store_part(at + i * 4, v, count);
}

template <class V> inline V load_some(const char* at, int count) {  // then zeros
    return count == W ? load<V>(at) : load_part<V>(at, count * (int)sizeof(V) / W);
}
inline vf part_of(const char* at, int64_t i, int count, bool bf16) {
    return bf16 ? widen(load_some<vh>(at + i * 2, count)) : load_some<vf>(at + i * 4, count);
}

inline vf scaled(const Packed& w, vf sum, int64_t output, int count) {
    return w.scales ? sum * load_some<vf>((const char*)(w.scales + output), count) : sum;
}

inline vf exp(vf x) { return exp2(x * 1.4426950408889634f); }
inline vf reciprocal_of_one_plus_exp(vf x) {  // of a large x zero
    const vf most = splat(88.0f);
    return 1.0f / (1.0f + exp(x > most ? most : x));
}
inline vf activated(vf x, int kind) {
    if (kind == SILU) return x * reciprocal_of_one_plus_exp(-x);
    const vf inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // x (1 + tanh(z)) / 2 = x / (1 + e^-2z)
    return x * reciprocal_of_one_plus_exp(-inner);
}

inline float capped(float x, float cap) { return cap > 0 ? cap * __builtin_tanhf(x / cap) : x; }

// The sums of rows row..row + rows of a unit, to where they belong.
inline void finish(const Call& c, int64_t panel, int column, int64_t row, int64_t rows, const float* sums) {
    const Packed& w = c.layer.weights;
    const int64_t first = w.first(panel) + column * W, last = std::min(w.last(panel), first + c.columns * W);
    for (int64_t r = 0; r < rows; r++) {
        const float* from = sums + r * PANEL + column * W;
        char* y = c.y + (row + r) * c.y_stride;
        for (int64_t o = first; o < last; o += W, from += W) {
            const int count = (int)std::min<int64_t>(W, last - o);
            vf v = scaled(w, load<vf>(from), o, count);
            if (c.layer.bias) v = v + part_of(c.layer.bias, o, count, w.bf16);
            if (c.layer.after == FLOATS) {
                if (c.layer.softcap > 0)
                    for (int i = 0; i < count; i++) v[i] = capped(v[i], c.layer.softcap);
                store_part(y + o * 4, v, count);
            } else if (c.layer.after == ADD) {
                put(y, o, part_of(y, o, count, w.bf16) + rounded(v, w.bf16), count, w.bf16);
            } else {
                put(y, o, v, count, w.bf16);
            }
        }
    }
}

inline void finish_gated(const Call& c, int64_t panel, int64_t row, int64_t rows, const float* gates, const float* ups) {
    const bool bf16 = c.layer.weights.bf16;
    const int64_t size = c.layer.weights.section(), first = panel * PANEL, last = std::min(size, first + PANEL);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = first; o < last; o += W) {
            const int count = (int)std::min<int64_t>(W, last - o);
            vf gate = scaled(c.layer.weights, load<vf>(gates + r * PANEL + o - first), o, count);
            vf up = scaled(c.layer.weights, load<vf>(ups + r * PANEL + o - first), size + o, count);
            if (c.layer.bias) {
                gate = gate + part_of(c.layer.bias, o, count, bf16);
                up = up + part_of(c.layer.bias, size + o, count, bf16);
            }
            const vf act = rounded(activated(rounded(gate, bf16), c.layer.activation), bf16);
            put(c.y + (row + r) * c.y_stride, o, act * rounded(up, bf16), count, bf16);
        }
}

inline void finish_best(const Call& c, int64_t panel, int64_t row, int64_t rows, const float* sums) {
    const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, c.layer.weights.outputs - first);
    for (int64_t r = 0; r < rows; r++) {
        const float* scales = c.layer.weights.scales;
        Best best{0, -1};
        for (int64_t i = 0; i < count; i++) {
            const float value = sums[r * PANEL + i] * (scales ? scales[first + i] : 1.0f);
            if (best.index < 0 || value > best.value || (value != value && best.value == best.value))
                best = {value, (int32_t)(first + i)};
        }
        ((Best*)c.y)[panel * c.rows + row + r] = best;
    }
}

// Units of a call: panels, or parts of them where there are few; a panel of each section for GATED.
inline int64_t units(Call& c, int threads) {
    const int64_t panels = c.layer.weights.panels;
    c.columns = gemm::COLUMNS;
    if (c.layer.after == GATED) return panels / 2;
    if (c.layer.after != BEST)
        while (c.columns > 1 && panels * (gemm::COLUMNS / c.columns) < 4 * threads) c.columns /= 2;
    return panels * (gemm::COLUMNS / c.columns);
}

// Rows row..row + rows of one unit; they fit into `sums`.
inline void run_block(const Call& c, int64_t unit, int64_t row, int64_t rows, float* sums) {
    const Packed& w = c.layer.weights;
    const int64_t per = gemm::COLUMNS / c.columns;
    const char* x = c.x + row * c.x_stride;
    if (c.layer.after == GATED) {
        gemm::product(w, unit, 0, c.columns, rows, x, c.x_stride, sums);
        gemm::product(w, w.panels / 2 + unit, 0, c.columns, rows, x, c.x_stride, sums + BLOCK * PANEL);
        finish_gated(c, unit, row, rows, sums, sums + BLOCK * PANEL);
        return;
    }
    const int column = (int)(unit % per) * c.columns;
    gemm::product(w, unit / per, column, c.columns, rows, x, c.x_stride, sums);
    if (c.layer.after == BEST) finish_best(c, unit, row, rows, sums);
    else finish(c, unit / per, column, row, rows, sums);
}

// One unit. sums: room for 2 * BLOCK * PANEL floats.
inline void run(const Call& c, int64_t unit, float* sums) {
    const int64_t blocks = (c.rows + BLOCK - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; b++)
        run_block(c, unit, c.rows * b / blocks, c.rows * (b + 1) / blocks - c.rows * b / blocks, sums);
}

}  // namespace dense
