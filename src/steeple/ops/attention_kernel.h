// Attention of one tile of query rows to a range of positions, for one key/value head of a paged cache.
//
// The positions are walked in chunks of 64: transpose the keys so that a vector holds one word (one float32 or two
// bfloat16) of W keys, scores, online softmax, mix values. Every key is read once for all rows and all query heads
// that share it.
//
// Chunks and splits begin at absolute positions, whatever the batch, the tile and the number of threads; a key that a
// row does not see adds an exact zero; and the order of additions is the same for every size of register tile. So the
// result of a row depends on its own keys alone, to the last bit.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_call.h"

namespace {

using namespace simd;

struct Sums {  // of a set of queries over a set of keys: largest score, sum of weights, weighted values
    float *most, *mass, *acc;
};

struct Work {  // one thread's room for one tile and head
    Work(const Call& call, int64_t most_rows)
        : c(call), rows(most_rows), masks(most_rows), packed(most_rows * call.group() * call.head_dim),
          turned(CHUNK * call.words()), scores(most_rows * call.group() * CHUNK), lanes(most_rows * call.group() * W) {}

    const Call& c;
    Tile tile;
    int64_t head, queries;
    std::vector<Row> rows;
    std::vector<uint64_t> masks;       // of the chunk, per row
    std::vector<float> packed, turned;  // queries by register tile; keys of a chunk, transposed
    std::vector<float> scores;         // [queries, CHUNK], then weights
    std::vector<float> lanes;          // sums of weights of the split [queries, W]
    Sums part;                         // of the split
    int64_t here[CHUNK], next[CHUNK];  // byte offsets of the keys of this chunk and the next
    int count, next_count;
};

// Rows of a register tile: `queries` in equal parts of at most MAX_ROWS.
int rows_of(int64_t queries, int64_t done) {
    const int64_t left = queries - done, parts = (left + MAX_ROWS - 1) / MAX_ROWS;
    return (int)((left + parts - 1) / parts);
}

float element(const char* from, int64_t index, bool half) {
    return half ? widen1(((const uint16_t*)from)[index]) : ((const float*)from)[index];
}

// packed[register tile][word of a key][query of the tile], a word as step() wants it.
void pack_queries(Work& w) {
    const Call& c = w.c;
    const int64_t G = c.group(), H = c.head_dim, words = c.words(), per = q_words(c.kind);
    float* to = w.packed.data();
    for (int64_t m0 = 0; m0 < w.queries;) {
        const int n = rows_of(w.queries, m0);
        for (int i = 0; i < n; i++) {
            const int64_t m = m0 + i, first = (w.tile.row + m / G) * c.q_stride + (w.head * G + m % G) * H;
            const char* q = c.q + first * (c.q_bf16 ? 2 : 4);
            for (int64_t word = 0; word < words; word++) {
                float* at = to + (word * n + i) * per;
                if (c.kind == BF16_DOT) std::memcpy(at, q + word * 4, 4);
                else
                    for (int64_t j = 0; j < per; j++) at[j] = element(q, word * per + j, c.q_bf16);
            }
        }
        to += words * per * n;
        m0 += n;
    }
}

void open_tile(Work& w, const Tile& tile, int64_t head) {
    w.tile = tile;
    w.head = head;
    w.queries = tile.rows * w.c.group();
    for (int64_t r = 0; r < tile.rows; r++) w.rows[r] = row_of(w.c, tile.row + r);
    pack_queries(w);
}

// Fetches the rows of the next chunk into the cache, a few at each step of the arithmetic on this one, in the order in
// which they lie in memory: then the processor's own prefetcher joins in, and memory is busy all the time.
struct Ahead {
    const char* base;
    const int64_t *at, *end;
    int64_t rows_per_step, row_bytes;

    Ahead(const char* base, const Work& w, int64_t steps)
        : base(base), at(w.next), end(w.next + w.next_count), rows_per_step((w.next_count + steps - 1) / steps),
          row_bytes(w.c.head_dim * w.c.kv_bytes()) {}
    void step() {
        for (int64_t i = 0; i < rows_per_step && at < end; i++, at++)
            for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(base + *at + byte, 0, 3);
    }
};

// 4 words of W keys -> 4 vectors of one word each.
void turn_words(const char* keys, const int64_t* offsets, int64_t left, float* to) {
    vi r[4];
    if (left >= 4) {
        for (int i = 0; i < 4; i++) r[i] = gather_quarters(keys, offsets + i, 4);
        transpose_quarters(r);
        for (int i = 0; i < 4; i++) store(to + i * W, r[i]);
    } else
        for (int i = 0; i < left; i++)
            for (int key = 0; key < W; key++) std::memcpy(to + i * W + key, keys + offsets[key] + i * 4, 4);
}

void turn_keys(Work& w) {  // turned[group of W keys][word][key]
    const Call& c = w.c;
    const int64_t words = c.words();
    Ahead ahead(c.keys, w, std::max<int64_t>(1, words / 4 * (CHUNK / W)));
    for (int g = 0; g * W < w.count; g++)
        for (int64_t word = 0; word < words; word += 4) {
            turn_words(c.keys + word * 4, w.here + g * W, words - word, &w.turned[(g * words + word) * W]);
            ahead.step();
        }
}

template <int KIND, int ROWS, int GROUPS>
void score(const float* q, const float* turned, int64_t words, float* scores) {
    vf acc[ROWS][GROUPS] = {};
    for (int64_t word = 0; word < words; word++) {
        vi k[GROUPS];
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) k[g] = load<vi>(turned + (g * words + word) * W);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
            for (int g = 0; g < GROUPS; g++) acc[m][g] = step<KIND>(acc[m][g], q + m * q_words(KIND), k[g]);
        }
        q += ROWS * q_words(KIND);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) store(scores + m * CHUNK + g * W, acc[m][g]);
    }
}

template <int KIND, int ROWS> void score_groups(const Work& w, const float* q, float* scores) {
    const int64_t words = w.c.words();
    int g = 0;
    for (; (g + MAX_GROUPS) * W <= CHUNK && g * W < w.count; g += MAX_GROUPS)
        score<KIND, ROWS, MAX_GROUPS>(q, &w.turned[g * words * W], words, scores + g * W);
}

template <int KIND, int ROWS = MAX_ROWS> void score_rows(const Work& w, int rows, const float* q, float* scores) {
    if (rows == ROWS) score_groups<KIND, ROWS>(w, q, scores);
    else if constexpr (ROWS > 1) score_rows<KIND, ROWS - 1>(w, rows, q, scores);
}

void score_chunk(Work& w) {
    const float* q = w.packed.data();
    for (int64_t m = 0; m < w.queries;) {
        const int n = rows_of(w.queries, m);
        if (w.c.kind == F32) score_rows<F32>(w, n, q, &w.scores[m * CHUNK]);
        else if (w.c.kind == BF16) score_rows<BF16>(w, n, q, &w.scores[m * CHUNK]);
        else score_rows<BF16_DOT>(w, n, q, &w.scores[m * CHUNK]);
        q += w.c.words() * q_words(w.c.kind) * n;
        m += n;
    }
}

// Scale, cap and mask the scores of one query in place; the largest.
float finish_scores(const Call& c, float* scores, uint64_t mask) {
    const float scale = c.scale * LOG2E;
    vf most = splat(NOTHING);
    const vi bits = splat(1) << lane_numbers(), none = {};
    for (int g = 0; g < CHUNK / W; g++) {
        vf s = load<vf>(scores + g * W);
        if (c.softcap == 0.0f) s = s * scale;
        else {
            const vf x = s * (c.scale / c.softcap) * (2.0f * LOG2E);
            s = (1.0f - 2.0f / (exp2(x < 40.0f ? x : splat(40.0f)) + 1.0f)) * (c.softcap * LOG2E);
        }
        if (mask != ~0ull) s = ((splat((int32_t)(mask >> (g * W))) & bits) != none) ? s : splat(MASKED);
        store(scores + g * W, s);
        most = larger(most, s);
    }
    return largest(most);
}

void softmax_chunk(Work& w) {  // scores -> weights relative to the running maximum; rescales the sums to it
    const int64_t G = w.c.group(), width = w.c.width();
    for (int64_t m = 0; m < w.queries; m++) {
        float* scores = &w.scores[m * CHUNK];
        const uint64_t mask = w.masks[m / G];
        if (!mask) {
            std::memset(scores, 0, CHUNK * sizeof(float));
            continue;
        }
        const float most = finish_scores(w.c, scores, mask);
        float* lanes = &w.lanes[m * W];
        vf sum = load<vf>(lanes);
        if (most > w.part.most[m]) {
            const vf shrink = exp2(splat(w.part.most[m] - most));
            float* acc = w.part.acc + m * width;
            for (int64_t h = 0; h < width; h += W) store(acc + h, load<vf>(acc + h) * shrink);
            sum = sum * shrink;
            w.part.most[m] = most;
        }
        const vf top = splat(w.part.most[m]);
        for (int g = 0; g < CHUNK / W; g += 2) {
            const vf a = exp2(load<vf>(scores + g * W) - top), b = exp2(load<vf>(scores + (g + 1) * W) - top);
            sum = sum + a;
            sum = sum + b;
            if (w.c.kind == BF16_DOT) store(scores + g * W / 2, narrow_pairs(a, b));
            else store(scores + g * W, a), store(scores + (g + 1) * W, b);
        }
        store(lanes, sum);
    }
}

constexpr int bytes_of(int kind) { return kind == F32 ? 4 : 2; }

template <class V> inline V load_some(const char* at, int elements) {
    return elements >= W ? load<V>(at) : load_part<V>(at, elements * (int)sizeof(V) / W);
}

// sum += weights of one row x values of one key (two for BF16_DOT), `left` elements of W.
template <int KIND> inline vf mix_step(vf sum, const float* weights, int s, vi v) {
    if constexpr (KIND == BF16_DOT) return dot(sum, splat(load<int32_t>(weights + s / 2)), v);
    else return sum + splat(weights[s]) * (vf)v;
}
template <int KIND> inline vi load_values(const char* values, const int64_t* offsets, int left) {
    if constexpr (KIND == F32) return (vi)load_some<vf>(values + offsets[0], left);
    else {
        const vh first = load_some<vh>(values + offsets[0], left);
        if constexpr (KIND == BF16) return (vi)widen(first);
        else return zip(first, load_some<vh>(values + offsets[1], left));
    }
}

// acc[ROWS, COLUMNS of W] += weights[ROWS, count] x values[count, COLUMNS]; `left`: elements up to the head's end.
template <int KIND, int ROWS, int COLUMNS>
void mix(const Work& w, const char* values, const float* weights, float* acc, int left, Ahead& ahead) {
    const int64_t width = w.c.width();
    vf sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
        for (int h = 0; h < COLUMNS; h++) sum[m][h] = load<vf>(acc + m * width + h * W);
    }
    for (int s = 0; s < w.count; s += KIND == BF16_DOT ? 2 : 1) {
        vi v[COLUMNS];
        ahead.step();
#pragma GCC unroll 8
        for (int h = 0; h < COLUMNS; h++)
            v[h] = load_values<KIND>(values + h * W * bytes_of(KIND), w.here + s, COLUMNS == 1 ? left : W);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
            for (int h = 0; h < COLUMNS; h++) sum[m][h] = mix_step<KIND>(sum[m][h], weights + m * CHUNK, s, v[h]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
        for (int h = 0; h < COLUMNS; h++) store(acc + m * width + h * W, sum[m][h]);
    }
}

template <int KIND, int ROWS> void mix_columns(const Work& w, const float* weights, float* acc, Ahead& ahead) {
    const int H = (int)w.c.head_dim;
    for (int h = 0; h < H;) {
        const char* values = w.c.values + h * bytes_of(KIND);
        if (h + MAX_COLUMNS * W <= H) {
            mix<KIND, ROWS, MAX_COLUMNS>(w, values, weights, acc + h, W, ahead);
            h += MAX_COLUMNS * W;
        } else {
            mix<KIND, ROWS, 1>(w, values, weights, acc + h, H - h, ahead);
            h += W;
        }
    }
}

template <int KIND, int ROWS = MAX_ROWS>
void mix_rows(const Work& w, int rows, const float* weights, float* acc, Ahead& ahead) {
    if (rows == ROWS) mix_columns<KIND, ROWS>(w, weights, acc, ahead);
    else if constexpr (ROWS > 1) mix_rows<KIND, ROWS - 1>(w, rows, weights, acc, ahead);
}

void mix_chunk(Work& w) {
    const int64_t passes = std::max<int64_t>(1, w.c.head_dim / (MAX_COLUMNS * W));
    Ahead ahead(w.c.values, w, passes * CHUNK / (w.c.kind == BF16_DOT ? 2 : 1));
    for (int64_t m = 0; m < w.queries;) {
        const int n = rows_of(w.queries, m);
        float *weights = &w.scores[m * CHUNK], *acc = w.part.acc + m * w.c.width();
        if (w.c.kind == F32) mix_rows<F32>(w, n, weights, acc, ahead);
        else if (w.c.kind == BF16) mix_rows<BF16>(w, n, weights, acc, ahead);
        else mix_rows<BF16_DOT>(w, n, weights, acc, ahead);
        m += n;
    }
}

void clear(const Sums& s, int64_t queries, int64_t width) {
    std::fill_n(s.most, queries, NOTHING);
    std::fill_n(s.mass, queries, 0.0f);
    std::fill_n(s.acc, queries * width, 0.0f);
}

void add(const Sums& to, const Sums& from, int64_t queries, int64_t width) {
    for (int64_t m = 0; m < queries; m++) {
        const float most = std::max(to.most[m], from.most[m]);
        const vf old = exp2(splat(to.most[m] - most)), fresh = exp2(splat(from.most[m] - most));
        float* acc = to.acc + m * width;
        for (int64_t h = 0; h < width; h += W)
            store(acc + h, load<vf>(acc + h) * old + load<vf>(from.acc + m * width + h) * fresh);
        to.mass[m] = to.mass[m] * old[0] + from.mass[m] * fresh[0];
        to.most[m] = most;
    }
}

// Sums of one split into w.part.
bool run_split(Work& w, int64_t split) {
    const Call& c = w.c;
    const int64_t text_len = c.text_len[w.tile.request], stop = std::min(w.tile.last, (split + 1) * SPLIT);
    const int64_t begin = std::max(split * SPLIT, w.tile.first / CHUNK * CHUNK);
    clear(w.part, w.queries, c.width());
    std::fill(w.lanes.begin(), w.lanes.end(), 0.0f);
    for (int64_t start = begin; start < stop; start += CHUNK) {
        if (!locate(c, w.tile, w.head, start, w.here, w.count)) return false;
        if (!locate(c, w.tile, w.head, start + CHUNK, w.next, w.next_count)) return false;
        uint64_t any = 0;
        for (int64_t r = 0; r < w.tile.rows; r++) any |= w.masks[r] = seen(w.rows[r], text_len, start);
        if (!any) continue;
        turn_keys(w);
        score_chunk(w);
        softmax_chunk(w);
        mix_chunk(w);
    }
    for (int64_t m = 0; m < w.queries; m++) w.part.mass[m] = total(load<vf>(&w.lanes[m * W]));
    return true;
}

void write_out(const Call& c, const Tile& t, int64_t head, const Sums& sums) {
    const int64_t G = c.group(), H = c.head_dim;
    for (int64_t m = 0; m < t.rows * G; m++) {
        const float inverse = sums.mass[m] > 0.0f ? 1.0f / sums.mass[m] : 0.0f;
        const float* acc = sums.acc + m * c.width();
        const int64_t element = ((t.row + m / G) * c.heads + head * G + m % G) * H;
        for (int64_t h = 0; h < H; h++) {
            if (c.q_bf16) ((uint16_t*)c.out)[element + h] = narrow1(acc[h] * inverse);
            else ((float*)c.out)[element + h] = acc[h] * inverse;
        }
    }
}

}  // namespace
