// y = x w^T for any number of rows, out of weights packed once in the order in which they are used.
//
// A panel holds PANEL outputs. It runs along the input, one 32-bit word after the other (one float32 or two bfloat16 of
// the input), PANEL outputs side by side: so a weight vector is a direct operand, a word of x is broadcast, sums never
// leave their lane, and memory is read as one stream.
//
// Each output is one sum along the input in the order of the input, whatever the number of rows, the tile or the thread:
// a pass over k + 1 tokens gives bit for bit what k + 1 passes give.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace gemm {

using namespace simd;

#if defined(__AVX512F__)
constexpr int COLUMNS = 4, ROWS = 6;  // a tile: ROWS x COLUMNS sums of 32 registers
#elif defined(__AVX2__)
constexpr int COLUMNS = 4, ROWS = 2;  // 8 of 16
#elif defined(__aarch64__)
constexpr int COLUMNS = 4, ROWS = 4;
#else
constexpr int COLUMNS = 4, ROWS = 2;
#endif
constexpr int PANEL = COLUMNS * W;
constexpr int64_t DEPTH = 64;   // words of a panel that are used for all rows before the next: they stay in the L1 cache
constexpr int64_t NEXT = 32;   // words ahead of use that few rows fetch
constexpr int64_t BLOCK = 96;    // rows of a block: their sums wait in the L2 cache between two depths

// Weights of `outputs` x `inputs`, packed. Where there are scales, an element is one byte, and output o is scales[o]
// times the sum.
struct Packed {
    const char* data;
    const float* scales;
    int64_t outputs, words;  // words: 32-bit words of an input row
    int64_t panels, sections;  // sections: equal parts of the outputs that begin with a panel of their own
    bool bf16;

    int64_t section() const { return outputs / sections; }
    // First output of panel p, and the end of its section.
    int64_t first(int64_t p) const { return p / (panels / sections) * section() + p % (panels / sections) * PANEL; }
    int64_t last(int64_t p) const { return (p / (panels / sections) + 1) * section(); }
    int64_t word_bytes() const { return !scales ? 4 : bf16 ? 2 : 1; }
    const char* panel(int64_t p) const { return data + p * words * PANEL * word_bytes(); }
};

template <int KIND> inline vf multiply_add(vf acc, int32_t x, vi w) {
    if constexpr (KIND == F32) {
        float value;
        std::memcpy(&value, &x, 4);
        return acc + splat(value) * (vf)w;
    }
    if constexpr (KIND == BF16_DOT) return dot(acc, splat(x), w);
    const vi pair = splat(x);
    return (acc + low_half(pair) * low_half(w)) + high_half(pair) * high_half(w);
}

template <int C> constexpr int LINES_OF = C * W * 4 / 64 > 0 ? C * W * 4 / 64 : 1;  // cache lines of a word

// sums[R][C * W] (+)= x[R, from..to words] times columns of a panel.
template <int KIND, int R, int C, int LINES>
inline void tile(const char* x, int64_t x_stride, const char* weights, int64_t from, int64_t to, const char* ahead,
                 float* sums) {
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = from ? load<vf>(sums + r * PANEL + c * W) : vf{};
    }
    const char* at = weights + from * PANEL * 4;
    for (int64_t word = from; word < to; word++, at += PANEL * 4) {
        vi w[C];
#pragma GCC unroll 8
        for (int i = 0; i < LINES; i++) __builtin_prefetch(ahead + i * 64, 0, 3);
        if constexpr (LINES > 0) ahead += PANEL * 4;
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) w[c] = load<vi>(at + c * W * 4);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int32_t value = load<int32_t>(x + r * x_stride + word * 4);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] = multiply_add<KIND>(acc[r][c], value, w[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(sums + r * PANEL + c * W, acc[r][c]);
    }
}

template <int KIND, int C, int LINES, int R = ROWS>
inline void some_rows(int64_t rows, const char* x, int64_t x_stride, const char* weights, int64_t from, int64_t to,
                      const char* ahead, float* sums) {
    if (rows == R) tile<KIND, R, C, LINES>(x, x_stride, weights, from, to, ahead, sums);
    else if constexpr (R > 1) some_rows<KIND, C, LINES, R - 1>(rows, x, x_stride, weights, from, to, ahead, sums);
}

// All tiles over words from..to, which lie at `weights`; `distance` bytes behind them lies what is fetched ahead.
template <int KIND, int C>
void tiles(int64_t rows, const char* x, int64_t x_stride, const char* weights, int64_t from, int64_t to,
           int64_t distance, float* sums) {
    constexpr int STEP = LINES_OF<C>;
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    const char *base = weights - from * PANEL * 4, *ahead = weights + distance;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t row = rows * part / parts, n = rows * (part + 1) / parts - row;
        const char* xs = x + row * x_stride;
        float* to_sums = sums + row * PANEL;
        if (parts == 1 && distance) some_rows<KIND, C, STEP>(n, xs, x_stride, base, from, to, ahead, to_sums);
        else if (parts == 2 && STEP > 1 && distance)
            some_rows<KIND, C, STEP / 2>(n, xs, x_stride, base, from, to, ahead + part * STEP / 2 * 64, to_sums);
        else if (part < STEP && distance)
            some_rows<KIND, C, 1>(n, xs, x_stride, base, from, to, ahead + part * 64, to_sums);
        else some_rows<KIND, C, 0>(n, xs, x_stride, base, from, to, ahead, to_sums);
    }
}

// sums[rows][PANEL], C columns of it, of rows of x. For many rows a panel is walked in depths that stay in the L1 cache,
// and the tiles share out the fetching of the next depth.
template <int KIND, int C>
void block(int64_t rows, const char* x, int64_t x_stride, const char* weights, int64_t words, float* sums) {
    const int64_t depth = rows <= ROWS ? words : DEPTH, ahead = rows <= ROWS ? NEXT : DEPTH;
    for (int64_t from = 0; from < words; from += depth)
        tiles<KIND, C>(rows, x, x_stride, weights + from * PANEL * 4, from, std::min(words, from + depth),
                       ahead * PANEL * 4, sums);
}

// W words of KIND out of as many words of bytes.
template <int KIND> inline vi widen_bytes(const char* from) {
    if constexpr (KIND == F32) {
        typedef int8_t bytes __attribute__((vector_size(W)));
        return (vi)__builtin_convertvector(load<bytes>(from), vf);
    } else {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        const __m512i first = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
        const __m512i second = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16)));
        return narrow_pairs((vf)_mm512_cvtepi32_ps(first), (vf)_mm512_cvtepi32_ps(second));
#else
        vi out;
        for (int i = 0; i < 2 * W; i++) {
            const uint16_t half = narrow1((float)((const int8_t*)from)[i]);
            std::memcpy((char*)&out + 2 * i, &half, 2);
        }
        return out;
#endif
    }
}

// The same of weights of one byte: a depth is widened into the L1 cache and used for all rows.
template <int KIND, int C>
void block_of_bytes(int64_t rows, const char* x, int64_t x_stride, const char* weights, int64_t words, float* sums) {
    constexpr int64_t BYTES = KIND == F32 ? 1 : 2, SHORT = 32;
    alignas(64) char wide[DEPTH * PANEL * 4];
    const int64_t depth = rows <= ROWS ? SHORT : DEPTH;
    for (int64_t from = 0; from < words; from += depth) {
        const int64_t to = std::min(words, from + depth);
        for (int64_t word = from; word < to; word++) {
            const char* at = weights + word * PANEL * BYTES;
            __builtin_prefetch(at + 8192, 0, 3);
            if constexpr (PANEL * BYTES > 64) __builtin_prefetch(at + 8192 + 64, 0, 3);
            for (int c = 0; c < C; c++)
                store(wide + ((word - from) * PANEL + c * W) * 4, widen_bytes<KIND>(at + c * W * BYTES));
        }
        tiles<KIND, C>(rows, x, x_stride, wide, from, to, 0, sums);
    }
}

// sums[rows][PANEL], `columns` vectors of it from vector `column` on, of panel p.
template <int KIND, int C>
inline void columns_of(const Packed& w, int64_t p, int column, int64_t rows, const char* x, int64_t x_stride,
                       float* sums) {
    const char* weights = w.panel(p) + column * W * w.word_bytes();
    if (w.scales) block_of_bytes<KIND, C>(rows, x, x_stride, weights, w.words, sums + column * W);
    else block<KIND, C>(rows, x, x_stride, weights, w.words, sums + column * W);
}

template <int KIND>
inline void product_of(const Packed& w, int64_t p, int column, int columns, int64_t rows, const char* x,
                       int64_t x_stride, float* sums) {
    if (columns == 4) columns_of<KIND, 4>(w, p, column, rows, x, x_stride, sums);
    else if (columns == 2) columns_of<KIND, 2>(w, p, column, rows, x, x_stride, sums);
    else columns_of<KIND, 1>(w, p, column, rows, x, x_stride, sums);
}

inline void product(const Packed& w, int64_t p, int column, int columns, int64_t rows, const char* x, int64_t x_stride,
                    float* sums) {
    if (!w.bf16) product_of<F32>(w, p, column, columns, rows, x, x_stride, sums);
    else if (HAS_DOT) product_of<BF16_DOT>(w, p, column, columns, rows, x, x_stride, sums);
    else product_of<BF16>(w, p, column, columns, rows, x, x_stride, sums);
}

}  // namespace gemm
