// The arithmetic of a chunk of 64 positions for one key/value head: scores, online softmax, mixing of values.
//
// A vector of keys is one word (one float32 or two bfloat16) of W keys, a vector of values one word of W dims: so they
// lie in the cache, and nothing is shuffled. Every vector is read once for a register tile of queries. The order of
// additions is the same for every size of register tile.
#pragma once

#include "attention_call.h"

namespace attention {

constexpr float NOTHING = -1e30f;  // maximum of no scores
constexpr float MASKED = -3e38f;   // score of an unseen key, far below any maximum
constexpr float LOG2E = 1.4426950408889634f;

struct Sums {  // of a set of queries over a set of keys: largest score, sum of weights, weighted values
    float *most, *mass, *acc;
};

// One head's keys and values of a chunk: a vector of keys every key_stride bytes, rows of values one after the other.
struct View {
    const char *keys[GROUPS], *values[GROUPS];
    int64_t key_stride;
    int count;  // positions
};

// What is wanted next: runs of memory, keys and then values. They are fetched a few lines at each step of the
// arithmetic on something else, so that memory is busy all the time. A run is fetched from its begin to its end: the
// processor's own prefetchers join in.
class Ahead {
public:
    Ahead() = default;
    // The groups of `v`: `words` vectors of keys, and then `lines` of values each.
    Ahead(const View& v, int groups, int64_t words, int64_t lines, int64_t steps)
        : left_(groups * (words + lines)), per_step_((int)((left_ + steps - 1) / std::max<int64_t>(1, steps))), v_(&v),
          keys_(groups), words_(words), lines_(lines) {
        turn(0);
    }
    HOT inline void step() {
        for (int i = 0; i < per_step_ && left_; i++) {
            __builtin_prefetch(at_, 0, 3);
            at_ += stride_;
            left_--;
            if (--run_ == 0) turn(group_ + 1);
        }
    }

private:
    void turn(int group) {
        group_ = group;
        const bool keys = group < keys_;
        run_ = keys ? words_ : lines_;
        stride_ = keys ? v_->key_stride : 64;
        if (left_) at_ = keys ? v_->keys[group] : v_->values[group - keys_];
    }
    int64_t left_ = 0;
    int per_step_ = 0;
    const View* v_ = nullptr;
    int keys_ = 0, group_ = 0;
    int64_t words_ = 0, lines_ = 0, run_ = 0, stride_ = 0;
    const char* at_ = nullptr;
};

// Rows of a register tile: `queries` in equal parts of at most MAX_ROWS.
inline int tile_rows(int64_t queries, int64_t done) {
    const int64_t left = queries - done, parts = (left + MAX_ROWS - 1) / MAX_ROWS;
    return (int)((left + parts - 1) / parts);
}

template <int KIND, int ROWS, int VECTORS>
void score(const float* q, const View& v, int g, int64_t words, float* scores, Ahead& ahead) {
    vf acc[ROWS][VECTORS] = {};
    const char* keys[VECTORS];
    for (int i = 0; i < VECTORS; i++) keys[i] = v.keys[g + i];
    for (int64_t word = 0; word < words; word++) {
        vi k[VECTORS];
        ahead.step();
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) k[i] = load<vi>(keys[i] + word * v.key_stride);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) acc[m][i] = step<KIND>(acc[m][i], q + m * q_words(KIND), k[i]);
        }
        q += ROWS * q_words(KIND);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) store(scores + m * CHUNK + (g + i) * W, acc[m][i]);
    }
}

template <int KIND, int ROWS = MAX_ROWS>
void score_rows(int rows, const float* q, const View& v, int64_t words, float* scores, Ahead& ahead) {
    if (rows == ROWS) {
        for (int g = 0; g < GROUPS && g * W < v.count; g += MAX_GROUPS)
            score<KIND, ROWS, MAX_GROUPS>(q, v, g, words, scores, ahead);
    } else if constexpr (ROWS > 1) score_rows<KIND, ROWS - 1>(rows, q, v, words, scores, ahead);
}

// scores[queries, CHUNK] of packed queries (see pack_queries).
template <int KIND>
void score_all(const float* packed, int64_t queries, const View& v, int64_t words, float* scores, Ahead& ahead) {
    for (int64_t m = 0; m < queries;) {
        const int n = tile_rows(queries, m);
        score_rows<KIND>(n, packed + m * words * q_words(KIND), v, words, scores + m * CHUNK, ahead);
        m += n;
    }
}

// Scaled and capped, in powers of two.
HOT inline vf finished(const Call& c, vf s) {
    if (c.softcap == 0.0f) return s * (c.scale * LOG2E);
    const vf x = s * (c.scale / c.softcap) * (2.0f * LOG2E);
    return (1.0f - 2.0f / (exp2(x < 40.0f ? x : splat(40.0f)) + 1.0f)) * (c.softcap * LOG2E);
}

// Scores of one query -> weights relative to the running maximum; rescales the sums to it. PEAKS: peaks[CHUNK] take in
// the scores of what is seen.
template <int KIND, bool PEAKS>
HOT inline void softmax(const Call& c, float* scores, uint64_t mask, float* most, float* lanes, float* acc,
                        float* peaks) {
    if (!mask) {
        std::memset(scores, 0, CHUNK * sizeof(float));
        return;
    }
    vf s[GROUPS], largest_of = splat(NOTHING);
#pragma GCC unroll 16
    for (int g = 0; g < GROUPS; g++) s[g] = finished(c, load<vf>(scores + g * W));
    if (mask != ~0ull) {
        const vi bits = splat(1) << lane_numbers(), none = {};
        for (int g = 0; g < GROUPS; g++)
            s[g] = ((splat((int32_t)(mask >> (g * W))) & bits) != none) ? s[g] : splat(MASKED);
    }
#pragma GCC unroll 16
    for (int g = 0; g < GROUPS; g++) largest_of = larger(largest_of, s[g]);
    if constexpr (PEAKS) for (int g = 0; g < GROUPS; g++)
        store(peaks + g * W, larger(load<vf>(peaks + g * W), s[g]));
    const float here = largest(largest_of);
    vf sum = load<vf>(lanes);
    if (here > *most) {
        const vf shrink = exp2(splat(*most - here));
        for (int64_t h = 0; h < c.width(); h += W) store(acc + h, load<vf>(acc + h) * shrink);
        sum = sum * shrink;
        *most = here;
    }
    const vf top = splat(*most);
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; g += 2) {
        const vf a = exp2(s[g] - top), b = exp2(s[g + 1] - top);
        sum = sum + a;
        sum = sum + b;
        if constexpr (KIND == BF16_DOT) store(scores + g * W / 2, narrow_pairs(a, b));
        else store(scores + g * W, a), store(scores + (g + 1) * W, b);
    }
    store(lanes, sum);
}

// sum += weights of one query x a row of values.
template <int KIND> HOT inline vf mix_step(vf sum, const float* weights, unsigned row, vi v) {
    if constexpr (KIND == BF16_DOT) return dot(sum, splat(load<int32_t>(weights + row)), v);
    if constexpr (KIND == BF16) return (sum + splat(weights[2 * row]) * low_half(v)) +
                                       splat(weights[2 * row + 1]) * high_half(v);
    return sum + splat(weights[row]) * (vf)v;
}

struct Range {  // rows of values, of a chunk
    int begin, end;
    int size() const { return end - begin; }
};

// acc[ROWS, COLUMNS of W] += weights[ROWS, rows] x values[rows, COLUMNS] from dim h on; `left`: words up to the end.
template <int KIND, int ROWS, int COLUMNS>
void mix(const Call& c, const View& v, Range rows, const float* weights, float* acc, int64_t h, Ahead& ahead) {
    constexpr unsigned PER_GROUP = KIND == F32 ? W : W / 2;
    const int64_t width = c.width(), row_bytes = c.row_bytes(), left = c.head_dim - h;
    vf sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
        for (int i = 0; i < COLUMNS; i++) sum[m][i] = load<vf>(acc + m * width + h + i * W);
    }
    for (unsigned r = (unsigned)rows.begin; r < (unsigned)rows.end; r++) {  // one loop: the sums stay where they are
        const char* from = v.values[r / PER_GROUP] + r % PER_GROUP * row_bytes + h * 4;
        vi values[COLUMNS];
        ahead.step();
#pragma GCC unroll 8
        for (int i = 0; i < COLUMNS; i++)
            values[i] = COLUMNS > 1 || left >= W ? load<vi>(from + i * W * 4) : load_part<vi>(from, (int)left * 4);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
            for (int i = 0; i < COLUMNS; i++) sum[m][i] = mix_step<KIND>(sum[m][i], weights + m * CHUNK, r, values[i]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 8
        for (int i = 0; i < COLUMNS; i++) store(acc + m * width + h + i * W, sum[m][i]);
    }
}

constexpr int most_columns(int rows) { return W == 16 && rows <= MAX_ROWS / 2 ? 2 * MAX_COLUMNS : MAX_COLUMNS; }

template <int KIND, int ROWS = MAX_ROWS>
void mix_rows(int n, const Call& c, const View& v, Range rows, const float* weights, float* acc, Ahead& ahead) {
    if constexpr (ROWS > 1)
        if (n < ROWS) return mix_rows<KIND, ROWS - 1>(n, c, v, rows, weights, acc, ahead);
    constexpr int MOST = most_columns(ROWS);
    int64_t h = 0;
    for (; h + MOST * W <= c.head_dim; h += MOST * W) mix<KIND, ROWS, MOST>(c, v, rows, weights, acc, h, ahead);
    for (; h + MAX_COLUMNS * W <= c.head_dim; h += MAX_COLUMNS * W)
        mix<KIND, ROWS, MAX_COLUMNS>(c, v, rows, weights, acc, h, ahead);
    for (; h < c.head_dim; h += W) mix<KIND, ROWS, 1>(c, v, rows, weights, acc, h, ahead);
}

// acc[queries] += weights[queries, CHUNK] x those rows of values.
template <int KIND>
void mix_all(const Call& c, int64_t queries, const View& v, Range rows, const float* weights, float* acc,
             Ahead& ahead) {
    for (int64_t m = 0; m < queries && rows.size() > 0;) {
        const int n = tile_rows(queries, m);
        mix_rows<KIND>(n, c, v, rows, weights + m * CHUNK, acc + m * c.width(), ahead);
        m += n;
    }
}

inline void clear(const Sums& s, int64_t queries, int64_t width) {
    std::fill_n(s.most, queries, NOTHING);
    std::fill_n(s.mass, queries, 0.0f);
    std::fill_n(s.acc, queries * width, 0.0f);
}

inline void add(const Sums& to, const Sums& from, int64_t queries, int64_t width) {
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

}  // namespace attention
