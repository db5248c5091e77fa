// What the attention is given: a cache in the kernel's own order, and which positions of it each row sees.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace attention {

using namespace simd;

constexpr int CHUNK = 64;          // positions per pass, one bit each in a row's mask
constexpr int GROUPS = CHUNK / W;  // vectors of keys in a chunk
constexpr int64_t TILE = 64;       // queries (rows x heads that share a key) of a tile
constexpr int SPLIT = 512;         // positions whose sums are kept apart, so that threads can share a request

// One layer of the cache. A key is written once and read a thousand times, so keys and values lie as the kernel wants
// them: keys [blocks, kv_heads, head_dim / dims, block_size, dims], values [blocks, kv_heads, block_size / pair,
// head_dim, pair], where dims and pair are 2 for bfloat16 (a 32-bit word holds two dims of a key, or one dim of the
// values of two positions) and 1 for float32 or where the size is odd.
struct Store {
    char *keys, *values;
    int64_t kv_heads, block_size, head_dim;
    bool bf16;

    int64_t dims() const { return bf16 && head_dim % 2 == 0 ? 2 : 1; }
    int64_t pair() const { return bf16 && block_size % 2 == 0 ? 2 : 1; }
    int64_t bytes() const { return bf16 ? 2 : 4; }
    int64_t head_bytes() const { return block_size * head_dim * bytes(); }
    int64_t head_of(int64_t slot, int64_t head) const { return (slot / block_size * kv_heads + head) * head_bytes(); }
};

// f(to, from, bytes) for each run of bytes of one key and value of `head` at `slot`: in the cache, and in rows k and v
// of head_dim elements.
template <class F> inline void each_run(const Store& s, int64_t slot, int64_t head, char* k, char* v, F f) {
    const int64_t offset = slot % s.block_size, size = s.bytes(), word = s.dims() * size, pair = s.pair();
    char* keys = s.keys + s.head_of(slot, head) + offset * word;
    char* values = s.values + s.head_of(slot, head) + (offset / pair * s.head_dim * pair + offset % pair) * size;
    if (word == 4) for (int64_t i = 0; i < s.head_dim * size; i += 4) f(keys + i * s.block_size, k + i, 4);
    else for (int64_t i = 0; i < s.head_dim * size; i += 2) f(keys + i * s.block_size, k + i, 2);
    if (pair == 2) for (int64_t i = 0; i < s.head_dim * 2; i += 2) f(values + i * 2, v + i, 2);
    else f(values, v, s.head_dim * size);
}

// Writes one key and value, head_dim elements each in the cache's dtype, to its slot (block * block_size + offset).
inline void put(const Store& s, int64_t slot, int64_t head, const char* k, const char* v) {
    each_run(s, slot, head, (char*)k, (char*)v, [](char* at, char* row, int64_t n) { std::memcpy(at, row, n); });
}

// The reverse.
inline void take(const Store& s, int64_t slot, int64_t head, char* k, char* v) {
    each_run(s, slot, head, k, v, [](char* at, char* row, int64_t n) { std::memcpy(row, at, n); });
}

// The table of request b for head h begins at blocks[h * head_stride + cu_blocks[b]].
struct Call {
    const char *q, *keys, *values;
    char* out;
    float* scores;  // [kv_heads, entries of a table]: takes the largest score of each page; or null
    const int32_t *cu_rows, *blocks, *cu_blocks, *prefix, *text_len, *positions;
    const int64_t* ancestors;
    int64_t q_stride, requests, num_blocks, block_size, heads, kv_heads, head_dim, window;  // q_stride: elements
    int64_t head_stride;
    float scale, softcap;
    bool q_bf16, kv_bf16;

    Store store() const { return {(char*)keys, (char*)values, kv_heads, block_size, head_dim, kv_bf16}; }
    int kind() const { return !kv_bf16 ? F32 : HAS_DOT && q_bf16 ? BF16_DOT : BF16; }
    int64_t group() const { return heads / kv_heads; }
    int64_t most_rows() const { return std::max<int64_t>(1, TILE / group()); }    // of a tile
    int64_t words() const { return kv_bf16 ? head_dim / 2 : head_dim; }           // of a key
    int64_t width() const { return (head_dim + W - 1) / W * W; }                  // floats of one accumulator
    int64_t head_bytes() const { return block_size * head_dim * (kv_bf16 ? 2 : 4); }
    int64_t row_bytes() const { return head_dim * 4; }  // of a row of values: one position, or a pair in bfloat16
    int per_row() const { return kv_bf16 ? 2 : 1; }     // its positions
    bool whole_groups() const { return block_size % W == 0; }  // else keys and values are gathered
};

// A node of a tree stands, for the rows that see it, at the position it would have as text: text_len + its depth. There
// it has its place in the order of additions; so a path of a tree rounds as the same text does. Where it is stored,
// text_len + its number, matters for reading only.
struct Row {
    int64_t first, last;  // text positions it sees
    uint64_t path;        // its nodes
    int nodes, hidden;    // how many; of which a window hides the first so many

    bool chain() const { return path == (nodes ? ~0ull >> (64 - nodes) : 0); }
};

struct Tile {
    int64_t request, row, rows;
    int64_t first, last;   // union of the positions that its rows see
    int64_t stored;        // where the stored nodes that they see end
    bool tree;             // some row sees nodes that do not stand where they are stored
    int64_t splits() const { return (last + SPLIT - 1) / SPLIT - first / SPLIT; }
    int64_t begin(int64_t split) const { return std::max(split * SPLIT, first / CHUNK * CHUNK); }
};

inline uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }
inline uint64_t shifted(uint64_t bits, int64_t by) {
    return by <= -64 || by >= 64 ? 0 : by >= 0 ? bits << by : bits >> -by;
}

inline Row row_of(const Call& c, int64_t row) {
    Row r{0, c.prefix[row], (uint64_t)c.ancestors[row], 0, 0};
    r.nodes = __builtin_popcountll(r.path);
    if (c.window) {  // depth grows by one along a path: a window holds its deepest nodes
        r.first = std::max<int64_t>(0, c.positions[row] - c.window + 1);
        r.hidden = (int)std::max<int64_t>(0, r.nodes - c.window);
    }
    return r;
}

inline uint64_t seen(const Row& r, int64_t text_len, int64_t start) {  // bit i: the row sees position start + i
    const uint64_t nodes = below(r.nodes) & ~below(r.hidden);
    return (below(r.last - start) & ~below(r.first - start)) | shifted(nodes, text_len - start);
}

inline Tile tile_of(const Call& c, int64_t request, int64_t row, int64_t rows) {
    Tile t{request, row, rows, INT64_MAX, 0, 0, false};
    const int64_t text_len = c.text_len[request];
    for (int64_t i = row; i < row + rows; i++) {
        const Row r = row_of(c, i);
        t.last = std::max({t.last, r.last, r.nodes ? text_len + r.nodes : 0});
        if (r.last > r.first) t.first = std::min(t.first, r.first);
        if (!r.nodes) continue;
        t.first = std::min<int64_t>(t.first, text_len + r.hidden);
        t.stored = std::max<int64_t>(t.stored, text_len + 64 - __builtin_clzll(r.path));
        t.tree |= !r.chain();
    }
    t.first = std::min(t.first, t.last);
    return t;
}

// Where the keys and values of a chunk lie: byte offsets of head 0, for each group of W positions.
struct Chunk {
    int64_t keys[GROUPS], values[GROUPS];
    int count;  // positions
};

// The block of a request's position for a head; -1 if its table does not hold it.
inline int64_t block_of(const Call& c, int64_t request, int64_t head, int64_t position) {
    const int64_t index = c.cu_blocks[request] + position / c.block_size;
    if (index >= c.cu_blocks[request + 1]) return -1;
    const int32_t block = c.blocks[head * c.head_stride + index];
    return block < c.num_blocks ? block : -1;
}

// Positions start.. up to `end` in the table of a head; false if it does not hold them.
inline bool locate(const Call& c, int64_t request, int64_t head, int64_t start, int64_t end, Chunk& chunk) {
    chunk.count = (int)std::max<int64_t>(0, std::min<int64_t>(CHUNK, end - start));
    const int64_t step = c.whole_groups() ? W : 1;
    for (int64_t i = 0; i < chunk.count; i += step) {
        const int64_t block = block_of(c, request, head, start + i), offset = (start + i) % c.block_size;
        if (block < 0) return false;
        if (step < W) continue;
        const int64_t base = block * c.kv_heads * c.head_bytes();
        chunk.keys[i / W] = base + offset * 4;
        chunk.values[i / W] = base + offset * c.head_dim * (c.kv_bf16 ? 2 : 4);
    }
    for (int g = (chunk.count + W - 1) / W; g < GROUPS && g; g++)  // readable; masked later
        chunk.keys[g] = chunk.keys[g - 1], chunk.values[g] = chunk.values[g - 1];
    return true;
}

}  // namespace attention
