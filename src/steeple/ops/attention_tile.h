// Attention of one tile of query rows to one chunk of positions, head by head: which keys, in which order, who sees it.
//
// Chunks and splits begin at absolute positions, whatever the batch, the tile and the number of threads; a key that a
// row does not see adds an exact zero. So the result of a row depends on its own keys alone, to the last bit. A zero
// weight does not silence a value that is infinite or NaN: where some row must not see such a value, every row is given
// values of its own, without those it does not see.
#pragma once

#include "attention_kernel.h"

namespace attention {

struct Most {  // of all tiles and pieces of a job
    int64_t rows, queries, states;  // states: queries x heads of a piece
};

struct Work {  // one thread's room
    Work(const Call& call, const Most& most)
        : c(call), rows(most.rows), masks(most.rows), packed(most.states * c.head_dim),
          scores(most.queries * CHUNK), stored(2 * most.queries * CHUNK), lanes(most.states * W),
          sums(2 * most.states * (c.width() + 2)), keys(2 * CHUNK * c.words()), values(2 * CHUNK * c.head_dim),
          own_values(CHUNK * c.head_dim), row(2 * c.head_dim), peaks(CHUNK) {}

    const Call& c;
    Tile tile;
    int64_t first_head, heads, queries;
    std::vector<Row> rows;
    std::vector<uint64_t> masks;       // of the chunk, per row
    uint64_t any, all;                 // of them
    std::vector<float> packed;         // queries by head and register tile
    std::vector<float> scores, stored;  // [queries, CHUNK], then weights; and of two chunks as they are stored
    std::vector<float> lanes;          // sums of weights of the split [states, W]
    std::vector<float> sums;           // whole and part
    std::vector<float> keys, values;   // two chunks that had to be gathered
    std::vector<float> own_values;     // of a chunk, as one row sees it
    std::vector<float> row;            // one key and value
    std::vector<float> peaks;          // largest score of each position of the chunk, of all rows of a scored tile
    bool scored;                       // the tile gives the scores of its request's pages
    Sums part;                         // of the split
    Chunk here, there, next;           // for the head at work, for the one after it, and after the last
    int64_t next_head;
};

inline float element(const char* from, int64_t index, bool half) {
    return half ? widen1(((const uint16_t*)from)[index]) : ((const float*)from)[index];
}

// [head][register tile][word of a key][query of the tile], a word as step() wants it.
inline void pack_queries(Work& w) {
    const Call& c = w.c;
    const int kind = c.kind();
    const int64_t G = c.group(), H = c.head_dim, words = c.words(), per = q_words(kind);
    float* to = w.packed.data();
    for (int64_t head = w.first_head; head < w.first_head + w.heads; head++)
        for (int64_t m0 = 0; m0 < w.queries;) {
            const int n = tile_rows(w.queries, m0);
            for (int i = 0; i < n; i++) {
                const int64_t m = m0 + i, first = (w.tile.row + m / G) * c.q_stride + (head * G + m % G) * H;
                const char* q = c.q + first * (c.q_bf16 ? 2 : 4);
                for (int64_t word = 0; word < words; word++) {
                    float* at = to + (word * n + i) * per;
                    if (kind == BF16_DOT) std::memcpy(at, q + word * 4, 4);
                    else for (int64_t j = 0; j < per; j++) at[j] = element(q, word * per + j, c.q_bf16);
                }
            }
            to += words * per * n;
            m0 += n;
        }
}

inline void open_tile(Work& w, const Tile& tile, int64_t first_head, int64_t heads) {
    w.tile = tile;
    w.first_head = first_head;
    w.heads = heads;
    w.queries = tile.rows * w.c.group();
    w.scored = w.c.scores && tile.row + tile.rows == w.c.cu_rows[tile.request + 1];
    for (int64_t r = 0; r < tile.rows; r++) w.rows[r] = row_of(w.c, tile.row + r);
    pack_queries(w);
}

// A head of a chunk in the cache, which holds whole groups.
inline View view_in_cache(const Call& c, const Chunk& chunk, int64_t head) {
    View v;
    for (int g = 0; g < GROUPS; g++) {
        v.keys[g] = c.keys + chunk.keys[g] + head * c.head_bytes();
        v.values[g] = c.values + chunk.values[g] + head * c.head_bytes();
    }
    v.key_stride = c.block_size * 4;
    v.count = chunk.count;
    return v;
}

// The same, copied position by position into scratch `index`, for blocks that do not hold whole groups.
inline View gathered(Work& w, int index, int64_t start, int count, int64_t head) {
    const Call& c = w.c;
    const Store store = c.store();
    const int64_t words = c.words(), H = c.head_dim, per_row = c.per_row();
    float* keys = &w.keys[index * CHUNK * words];
    float* values = &w.values[index * CHUNK * H];
    char *k = (char*)w.row.data(), *v = k + H * 4;
    for (int i = 0; i < count; i++) {
        const int64_t at = start + i, block = block_of(c, w.tile.request, head, at);
        take(store, block * c.block_size + at % c.block_size, head, k, v);
        for (int64_t word = 0; word < words; word++)
            std::memcpy(&keys[(i / W * words + word) * W + i % W], k + word * 4, 4);
        float* row = values + i / per_row * H;
        if (per_row == 1) std::memcpy(row, v, H * 4);
        else for (int64_t h = 0; h < H; h++) {
            if (i % 2 == 0) row[h] = 0;
            std::memcpy((char*)(row + h) + i % 2 * 2, v + h * 2, 2);
        }
    }
    View view;
    for (int g = 0; g < GROUPS; g++) {
        view.keys[g] = (char*)(keys + g * W * words);
        view.values[g] = (char*)(values + g * W / per_row * H);
    }
    view.key_stride = W * 4;
    view.count = count;
    return view;
}

inline View view_of(Work& w, int index, const Chunk& chunk, int64_t start, int64_t head) {
    return w.c.whole_groups() ? view_in_cache(w.c, chunk, head) : gathered(w, index, start, chunk.count, head);
}

// What of the cache is read for one head of a chunk: the chunk itself, or where it holds nodes of a tree, the one or
// two chunks in which they are stored.
struct Held {
    int64_t base;  // position that it begins at
    int count;     // views
    View views[2];

    const char* row_of(const Call& c, int64_t position, int& half) const {  // of values, and which half of its words
        const int64_t i = position - base, row = i % CHUNK / c.per_row(), per_group = W / c.per_row();
        half = (int)(i % c.per_row());
        return views[i / CHUNK].values[row / per_group] + row % per_group * c.row_bytes();
    }
};

inline bool finite(const Call& c, const char* row) {
    const vi high = splat((int32_t)0x7f800000), low = splat((int32_t)0x7f80), none = {};
    const vi exponents = c.kv_bf16 ? high | low : high;
    vi bad = {};
    for (int64_t h = 0; h < c.head_dim; h += W) {
        const int64_t left = c.head_dim - h;
        const vi word = (left >= W ? load<vi>(row + h * 4) : load_part<vi>(row + h * 4, (int)left * 4)) & exponents;
        bad |= (word & high) == high;
        if (c.kv_bf16) bad |= (word & low) == low;
    }
    bad = bad != none;
    for (int i = 0; i < W; i++)
        if (bad[i]) return false;
    return true;
}

// Whether all rows may share these rows of values: what only some of them see is finite.
inline bool shareable(const Work& w, const View& v, Range rows) {
    const int per_row = w.c.per_row(), per_group = W / per_row;
    const uint64_t whole = below(per_row);
    for (int r = rows.begin; r < rows.end; r++)
        if ((w.all >> (r * per_row) & whole) != whole &&
            !finite(w.c, v.values[r / per_group] + r % per_group * w.c.row_bytes()))
            return false;
    return true;
}

// Rows of values of the chunk at `start` as one query row sees them: its nodes by depth, and zeros for what is unseen.
inline View own_view(Work& w, const Held& held, int64_t r, int64_t start, Range rows) {
    const Call& c = w.c;
    const Row& row = w.rows[r];
    const int64_t text_len = c.text_len[w.tile.request], H = c.head_dim;
    int64_t numbers[64], nodes = 0;
    for (uint64_t left = row.path; left; left &= left - 1) numbers[nodes++] = __builtin_ctzll(left);
    View v;
    for (int g = 0; g < GROUPS; g++) v.values[g] = (char*)&w.own_values[g * W / c.per_row() * H];
    std::fill_n(&w.own_values[rows.begin * H], rows.size() * H, 0.0f);
    for (int i = rows.begin * c.per_row(); i < rows.end * c.per_row(); i++) {
        if (!(w.masks[r] >> i & 1)) continue;
        const int64_t depth = start + i - text_len;
        int half;
        const char* from = held.row_of(c, depth >= 0 && depth < nodes ? text_len + numbers[depth] : start + i, half);
        char* to = (char*)&w.own_values[i / c.per_row() * H] + i % c.per_row() * 2;
        if (!c.kv_bf16) std::memcpy(to, from, H * 4);
        else for (int64_t h = 0; h < H; h++) std::memcpy(to + h * 4, from + h * 4 + half * 2, 2);
    }
    return v;
}

// Scores as stored -> scores in the order of the rows' positions.
inline void sort_scores(Work& w, const Held& held, int64_t start) {
    const int64_t text_len = w.c.text_len[w.tile.request], G = w.c.group();
    for (int64_t m = 0; m < w.queries; m++) {
        float* scores = &w.scores[m * CHUNK];
        if (start == held.base) std::memcpy(scores, &w.stored[m * CHUNK], CHUNK * sizeof(float));
        int64_t position = text_len - start;
        for (uint64_t left = w.rows[m / G].path; left; left &= left - 1, position++) {
            const int64_t at = text_len - held.base + __builtin_ctzll(left);
            if (position >= 0 && position < CHUNK)
                scores[position] = w.stored[(at / CHUNK * w.queries + m) * CHUNK + at % CHUNK];
        }
    }
}

inline bool holds_tree(const Work& w, int64_t start) {
    return w.tile.tree && start + CHUNK > w.c.text_len[w.tile.request];
}

// Views of what is read for the chunk at `start`; false if the block table does not hold it.
inline bool hold(Work& w, int64_t start, int64_t head, Held& held) {
    if (!holds_tree(w, start)) {
        held.base = start;
        held.count = 1;
        held.views[0] = view_of(w, 0, w.here, start, head);
        return true;
    }
    held.base = w.c.text_len[w.tile.request] / CHUNK * CHUNK;
    held.count = w.tile.stored > held.base + CHUNK ? 2 : 1;
    for (int i = 0; i < held.count; i++) {
        Chunk chunk;
        const int64_t at = held.base + i * CHUNK;
        if (!locate(w.c, w.tile.request, head, at, w.tile.stored, chunk)) return false;
        held.views[i] = view_of(w, i, chunk, at, head);
    }
    return true;
}

// Steps of the arithmetic on a chunk.
inline int64_t steps_of(const Call& c, int64_t queries) {
    int64_t steps = queries;
    for (int64_t m = 0; m < queries;) {
        const int n = tile_rows(queries, m);
        const int64_t columns = std::max<int64_t>(1, c.head_dim / W / most_columns(n));
        steps += c.words() * GROUPS / MAX_GROUPS + CHUNK / c.per_row() * columns;
        m += n;
    }
    return steps;
}

template <int KIND> void mix_chunk(Work& w, const Held& held, int64_t start, float* acc, Ahead& ahead) {
    const Call& c = w.c;
    const int per_row = c.per_row();
    const int64_t G = c.group(), text = c.text_len[w.tile.request] - start;
    const int end = (64 - __builtin_clzll(w.any) + per_row - 1) / per_row;
    Range shared{0, holds_tree(w, start) ? (int)std::max<int64_t>(0, text / per_row) : end};
    if (!shareable(w, held.views[0], shared)) shared.end = 0;
    mix_all<KIND>(c, w.queries, held.views[0], shared, w.scores.data(), acc, ahead);
    for (int64_t r = 0; r < w.tile.rows && shared.end < end; r++) {
        if (!w.masks[r]) continue;
        const Range own{shared.end, (64 - __builtin_clzll(w.masks[r]) + per_row - 1) / per_row};
        const View v = own_view(w, held, r, start, own);
        mix_all<KIND>(c, G, v, own, &w.scores[r * G * CHUNK], acc + r * G * c.width(), ahead);
    }
}

// The scores of one head of the chunk -> weights.
template <int KIND, bool PEAKS> void weigh(Work& w, int64_t state, Ahead& ahead) {
    const Call& c = w.c;
    for (int64_t m = 0; m < w.queries; m++) {
        ahead.step();
        softmax<KIND, PEAKS>(c, &w.scores[m * CHUNK], w.masks[m / c.group()], w.part.most + state + m,
                             &w.lanes[(state + m) * W], w.part.acc + (state + m) * c.width(), w.peaks.data());
    }
}

// The peaks of the chunk's positions -> the scores of its pages, which no other piece writes (see cut_of).
inline void keep_peaks(const Work& w, int64_t start, int64_t head) {
    const Call& c = w.c;
    float* pages = c.scores + head * c.cu_blocks[c.requests] + c.cu_blocks[w.tile.request];
    const int64_t step = c.whole_groups() ? W : 1;
    for (int64_t i = 0; i < CHUNK; i += step) {
        const float peak = step == W ? largest(load<vf>(&w.peaks[i])) : w.peaks[i];
        if (!(peak > NOTHING)) continue;  // nobody sees it: it may lie behind the table
        float& page = pages[(start + i) / c.block_size];
        page = std::max(page, peak / LOG2E);
    }
}

// One head of the chunk at w.here, whose masks are set.
template <int KIND> bool attend(Work& w, int64_t start, int64_t head, const View& next) {
    const Call& c = w.c;
    const int64_t words = c.words();
    const int64_t state = (head - w.first_head) * w.queries, groups = c.whole_groups() ? (next.count + W - 1) / W : 0;
    Held held;
    if (!hold(w, start, head, held)) return false;
    Ahead ahead(next, (int)groups, words, W / c.per_row() * c.row_bytes() / 64, steps_of(c, w.queries));
    const bool tree = holds_tree(w, start);
    for (int i = 0; i < held.count; i++)
        score_all<KIND>(&w.packed[state * words * q_words(KIND)], w.queries, held.views[i], words,
                        tree ? &w.stored[i * w.queries * CHUNK] : w.scores.data(), ahead);
    if (tree) sort_scores(w, held, start);
    if (w.scored) {
        std::fill(w.peaks.begin(), w.peaks.end(), MASKED);
        weigh<KIND, true>(w, state, ahead);
        keep_peaks(w, start, head);
    } else weigh<KIND, false>(w, state, ahead);
    mix_chunk<KIND>(w, held, start, w.part.acc + state * c.width(), ahead);
    return true;
}

inline void write_out(const Call& c, const Work& w, const Sums& sums) {
    const int64_t G = c.group(), H = c.head_dim;
    for (int64_t state = 0; state < w.heads * w.queries; state++) {
        const int64_t head = w.first_head + state / w.queries, m = state % w.queries;
        const float inverse = sums.mass[state] > 0.0f ? 1.0f / sums.mass[state] : 0.0f;
        const float* acc = sums.acc + state * c.width();
        const int64_t element = ((w.tile.row + m / G) * c.heads + head * G + m % G) * H;
        for (int64_t h = 0; h < H; h++) {
            if (c.q_bf16) ((uint16_t*)c.out)[element + h] = narrow1(acc[h] * inverse);
            else ((float*)c.out)[element + h] = acc[h] * inverse;
        }
    }
}

}  // namespace attention
