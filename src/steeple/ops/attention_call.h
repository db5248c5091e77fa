// What a call of the native attention is given, which positions its rows see and where their keys lie.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

using namespace simd;

constexpr int CHUNK = 64;           // positions per pass, one bit each in a row's mask
constexpr int SPLIT = 512;          // positions whose sums are kept apart, so that threads can share a request
constexpr float NOTHING = -1e30f;   // maximum of no scores
constexpr float MASKED = -3e38f;    // score of an unseen key, far below any maximum
constexpr float LOG2E = 1.4426950408889634f;

struct Call {
    const char *q, *keys, *values;
    char* out;
    const int32_t *cu_rows, *blocks, *cu_blocks, *prefix, *text_len, *positions;
    const int64_t* ancestors;
    int64_t q_stride, requests, num_blocks, block_size, heads, kv_heads, head_dim, window;
    float scale, softcap;
    bool q_bf16, kv_bf16;
    int kind;

    int64_t group() const { return heads / kv_heads; }
    int64_t words() const { return kv_bf16 ? head_dim / 2 : head_dim; }
    int64_t width() const { return (head_dim + W - 1) / W * W; }  // floats of one accumulator
    int kv_bytes() const { return kv_bf16 ? 2 : 4; }
};

struct Row {
    int64_t first, last;  // text positions it sees
    uint64_t nodes;       // draft nodes it sees
};

struct Tile {
    int64_t request, row, rows;
    int64_t first, last;  // union of the positions that its rows see
    int64_t splits() const { return (last + SPLIT - 1) / SPLIT - first / SPLIT; }
};

uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

Row row_of(const Call& c, int64_t row) {
    Row r{0, c.prefix[row], (uint64_t)c.ancestors[row]};
    if (c.window) {
        r.first = std::max<int64_t>(0, c.positions[row] - c.window + 1);
        uint64_t kept = 0, left = r.nodes;  // depth grows by one along a path: a window holds its deepest nodes
        for (int64_t i = 0; i < c.window && left; i++) {
            const uint64_t top = 1ull << (63 - __builtin_clzll(left));
            kept |= top;
            left ^= top;
        }
        r.nodes = kept;
    }
    return r;
}

uint64_t seen(const Row& r, int64_t text_len, int64_t start) {  // bit i: the row sees position start + i
    const int64_t shift = text_len - start;
    uint64_t nodes = 0;
    if (shift >= 0 && shift < 64) nodes = r.nodes << shift;
    if (shift < 0 && shift > -64) nodes = r.nodes >> -shift;
    return (below(r.last - start) & ~below(r.first - start)) | nodes;
}

// Byte offsets of positions start..; false if the block table does not hold them.
bool locate(const Call& c, const Tile& t, int64_t head, int64_t start, int64_t* offsets, int& count) {
    count = (int)std::max<int64_t>(0, std::min<int64_t>(CHUNK, t.last - start));
    const int32_t* table = c.blocks + c.cu_blocks[t.request];
    const int64_t entries = c.cu_blocks[t.request + 1] - c.cu_blocks[t.request];
    const int64_t row = c.head_dim * c.kv_bytes();
    for (int i = 0; i < count;) {
        const int64_t index = (start + i) / c.block_size, offset = (start + i) % c.block_size;
        if (index >= entries || table[index] < 0 || table[index] >= c.num_blocks) return false;
        const int64_t base = ((int64_t)table[index] * c.kv_heads + head) * c.block_size;
        const int n = (int)std::min<int64_t>(count - i, c.block_size - offset);
        for (int j = 0; j < n; j++) offsets[i + j] = (base + offset + j) * row;
        i += n;
    }
    for (int i = count; i < CHUNK && count; i++) offsets[i] = offsets[count - 1];  // readable; masked later
    return true;
}

}  // namespace
