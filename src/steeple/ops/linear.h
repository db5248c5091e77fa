// y = x w^T + bias for few rows: every weight is read from memory once for all rows.
//
// Each output is one sum along the input in an order that depends on nothing but the input's length: neither on the
// number of rows nor on the number of threads. So a pass over k + 1 tokens gives bit for bit what k + 1 passes give.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "simd.h"

namespace linear {

using namespace simd;

constexpr int OUTPUTS = 4;  // a tile: OUTPUTS x ROWS sums stay in registers
constexpr int ROWS = W == 16 ? 6 : 2;
constexpr int64_t CHUNK = 64;              // outputs that a thread takes at a time
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // bytes of weights below which another thread does not pay

struct Call {
    const char *x, *w, *bias;
    char* y;
    int64_t rows, words, tail, outputs, x_stride, y_stride;  // words: whole vectors' 32-bit words of a row
    bool bf16;
    std::atomic<int64_t> next{0};

    int64_t row_bytes() const { return words * 4 + tail; }
};

template <int KIND> inline vf multiply_add(vf acc, vi x, vi w) {
    if constexpr (KIND == F32) return acc + (vf)x * (vf)w;
    if constexpr (KIND == BF16_DOT) return dot(acc, x, w);
    return (acc + low_half(x) * low_half(w)) + high_half(x) * high_half(w);
}

// The sums of four vectors, in the first four lanes: each vector is folded in the same order.
inline vf totals(vf a, vf b, vf c, vf d) {
    const AllLanes lanes;
    const vf ab = (vf)words_of<0>((vi)a, (vi)b, lanes) + (vf)words_of<1>((vi)a, (vi)b, lanes);
    const vf cd = (vf)words_of<0>((vi)c, (vi)d, lanes) + (vf)words_of<1>((vi)c, (vi)d, lanes);
    vf all = (vf)pairs_of<0>((vi)ab, (vi)cd, lanes) + (vf)pairs_of<1>((vi)ab, (vi)cd, lanes);
    if constexpr (W > 4) all = all + (vf)swapped<4 % W>((vi)all);
    if constexpr (W > 8) all = all + (vf)swapped<8 % W>((vi)all);
    return all;
}

// Round to bfloat16 in the low half of each lane, to nearest even; NaN stays NaN.
inline vu narrow(vf v) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    return v == v ? rounded : quiet;
}

template <int N> inline void put(const Call& c, int64_t row, int64_t output, vf sums) {
    char* to = c.y + row * c.y_stride;
    if (c.bias)
        for (int n = 0; n < N; n++)
            sums[n] += c.bf16 ? widen1(((const uint16_t*)c.bias)[output + n]) : ((const float*)c.bias)[output + n];
    if (c.bf16) {
        const vu half = narrow(sums);
        uint16_t out[N];
        for (int n = 0; n < N; n++) out[n] = (uint16_t)half[n];
        std::memcpy(to + output * 2, out, sizeof out);
    } else {
        std::memcpy(to + output * 4, &sums, N * 4);
    }
}

template <int KIND, int N, int R> void tile(const Call& c, int64_t output, int64_t row) {
    vf acc[N][R] = {};
    const char *x[R], *w[N];
    for (int n = 0; n < N; n++) w[n] = c.w + (output + n) * c.row_bytes();
    for (int r = 0; r < R; r++) x[r] = c.x + (row + r) * c.x_stride;
    for (int64_t at = 0; at < c.words * 4; at += W * 4) {
        vi weights[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) weights[n] = load<vi>(w[n] + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vi value = load<vi>(x[r] + at);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[n][r] = multiply_add<KIND>(acc[n][r], value, weights[n]);
        }
    }
    if (c.tail)
        for (int r = 0; r < R; r++) {
            const vi value = load_part<vi>(x[r] + c.words * 4, (int)c.tail);
            for (int n = 0; n < N; n++)
                acc[n][r] = multiply_add<KIND>(acc[n][r], value, load_part<vi>(w[n] + c.words * 4, (int)c.tail));
        }
    const vf none = {};
    for (int r = 0; r < R; r++) {
        const vf sums = N == OUTPUTS ? totals(acc[0][r], acc[1 % N][r], acc[2 % N][r], acc[3 % N][r])
                                     : totals(acc[0][r], none, none, none);
        put<N>(c, row + r, output, sums);
    }
}

template <int KIND, int N, int R> void rows_of(const Call& c, int64_t output, int64_t row, int64_t rows) {
    if constexpr (R > 0) {
        if (rows == R) tile<KIND, N, R>(c, output, row);
        else rows_of<KIND, N, R - 1>(c, output, row, rows);
    }
}

template <int KIND, int N> void all_rows(const Call& c, int64_t output) {
    for (int64_t row = 0; row < c.rows; row += ROWS)
        rows_of<KIND, N, ROWS>(c, output, row, std::min<int64_t>(ROWS, c.rows - row));
}

template <int KIND> void run(Call& c) {
    for (int64_t from; (from = c.next.fetch_add(CHUNK)) < c.outputs;) {
        const int64_t to = from + CHUNK < c.outputs ? from + CHUNK : c.outputs;
        int64_t output = from;
        for (; output + OUTPUTS <= to; output += OUTPUTS) all_rows<KIND, OUTPUTS>(c, output);
        for (; output < to; output++) all_rows<KIND, 1>(c, output);
    }
}

inline void work(void* data) {
    Call& c = *(Call*)data;
    if (!c.bf16) run<F32>(c);
    else if (HAS_DOT) run<BF16_DOT>(c);
    else run<BF16>(c);
}

// One row of a root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, sums in float32.
template <bool BF16_IN> void norm_row(const char* x, const char* weight, char* y, int64_t size, float eps) {
    const int64_t whole = size / W * W;
    vf sum = {};
    float rest = 0;
    auto at = [&](const char* p, int64_t i) {
        if constexpr (BF16_IN) return widen(load<vh>(p + i * 2));
        else return load<vf>(p + i * 4);
    };
    auto one = [&](const char* p, int64_t i) {
        if constexpr (BF16_IN) return widen1(((const uint16_t*)p)[i]);
        else return ((const float*)p)[i];
    };
    for (int64_t i = 0; i < whole; i += W) sum = sum + at(x, i) * at(x, i);
    for (int64_t i = whole; i < size; i++) rest += one(x, i) * one(x, i);
    const float scale = 1.0f / __builtin_sqrtf((total(sum) + rest) / (float)size + eps);
    for (int64_t i = 0; i < whole; i += W) {
        const vf value = at(x, i) * splat(scale) * at(weight, i);
        if constexpr (BF16_IN) store(y + i * 2, __builtin_convertvector(narrow(value), vh));
        else store(y + i * 4, value);
    }
    for (int64_t i = whole; i < size; i++) {
        const float value = one(x, i) * scale * one(weight, i);
        if constexpr (BF16_IN) ((uint16_t*)y)[i] = narrow1(value);
        else ((float*)y)[i] = value;
    }
}

}  // namespace linear

// x, y [rows, size] without gaps, weight [size]; all float32 or all bfloat16.
extern "C" void steeple_rms_norm(const char* x, const char* weight, char* y, int64_t rows, int64_t size, float eps,
                                 int bf16) {
    const int64_t bytes = size * (bf16 ? 2 : 4);
    for (int64_t row = 0; row < rows; row++)
        if (bf16) linear::norm_row<true>(x + row * bytes, weight, y + row * bytes, size, eps);
        else linear::norm_row<false>(x + row * bytes, weight, y + row * bytes, size, eps);
}

// x [rows, inputs] with rows x_stride bytes apart, w [outputs, inputs], y [rows, outputs], both without gaps; all
// float32 or all bfloat16; bias [outputs] or null; bfloat16 needs an even number of inputs.
extern "C" void steeple_linear(const char* x, const char* w, const char* bias, char* y, int64_t rows, int64_t inputs,
                               int64_t outputs, int64_t x_stride, int bf16, int64_t threads, Team team) {
    const int64_t size = bf16 ? 2 : 4, bytes = inputs * size, vectors = bytes / (simd::W * 4);
    linear::Call c{x, w, bias, y, rows, vectors * simd::W, bytes - vectors * simd::W * 4, outputs, x_stride,
                   outputs * size, bf16 != 0};
    threads = std::max<int64_t>(1, std::min<int64_t>(threads, outputs * bytes / linear::WORTH_A_THREAD));
    if (threads <= 1) linear::work(&c);
    else (team ? team : own_threads)(linear::work, &c, (unsigned)threads, 0);
}
