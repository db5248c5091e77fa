// Drawing from the laws of rows of logits, and speculative sampling of chains: the fast twins of steeple.ops.law.draw
// and steeple.verify.chains.reject_chains where a law is the softmax of logits / temperature, nothing cut off.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace sampling {

using namespace simd;

constexpr int64_t RUN = 64;  // entries whose sum is kept in float before it is added up in double
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

inline vf some(const float* x, int64_t count) {  // what is missing has no weight
    if (count >= W) return load<vf>(x);
    vf v = splat(NOTHING);
    std::memcpy(&v, x, count * 4);
    return v;
}

inline float most_of(const float* x, int64_t vocab) {
    vf most = splat(NOTHING);
    for (int64_t i = 0; i < vocab; i += W) most = larger(most, some(x + i, vocab - i));
    return largest(most);
}

// Weights exp((x - most) / temperature) of a row, if `to` is given, and their sum.
inline double weigh(const float* x, int64_t vocab, float most, float by, float* to) {
    double mass = 0;
    for (int64_t run = 0; run < vocab; run += RUN) {
        vf sum = {};
        for (int64_t i = run; i < std::min(vocab, run + RUN); i += W) {
            const vf w = exp2((some(x + i, vocab - i) - most) * by);
            sum += w;
            if (to) std::memcpy(to + i, &w, std::min<int64_t>(W, vocab - i) * 4);
        }
        mass += total(sum);
    }
    return mass;
}

// The first entry at which the sum of weights passes `share` of their `mass`; never one without weight.
inline int64_t find(const float* weights, int64_t vocab, double share, double mass) {
    const double wanted = share * mass;
    double before = 0;
    int64_t last = 0;
    for (int64_t run = 0; run < vocab; run += RUN) {
        const int64_t end = std::min(vocab, run + RUN);
        vf sum = {};
        for (int64_t i = run; i < end; i += W) {
            vf w = {};
            std::memcpy(&w, weights + i, std::min<int64_t>(W, vocab - i) * 4);
            sum += w;
        }
        const double after = before + total(sum);
        if (after > wanted) {
            double passed = before;
            for (int64_t i = run; i < end; i++) {
                passed += weights[i];
                if (weights[i] > 0) last = i;
                if (passed > wanted && weights[i] > 0) return i;
            }
            return last;  // two ways of adding up differ in their last bits
        }
        if (after > before)
            for (int64_t i = run; i < end; i++)
                if (weights[i] > 0) last = i;
        before = after;
    }
    return last;
}

inline float scale_of(float temperature) { return 1.44269504f / temperature; }

// One draw: the token, and the law in `law` [vocab].
inline int64_t draw(const float* logits, int64_t vocab, float temperature, double share, float* law) {
    const double mass = weigh(logits, vocab, most_of(logits, vocab), scale_of(temperature), law);
    const int64_t token = find(law, vocab, share, mass);
    const float by = (float)(1 / mass);
    for (int64_t i = 0; i < vocab; i++) law[i] *= by;
    return token;
}

struct Chains {
    const float* logits;      // [N + B, vocab]: of each request the root, then its nodes
    const int64_t *cu, *tokens, *rows;  // nodes of request b: cu[b]..; row of `laws` each was drawn from, or -1
    const float* laws;
    const float* temperature;  // [B]
    const double *accept, *last;  // [N], [B] uniform numbers
    int64_t requests, vocab;
};

// max(p - q, 0) in place of the law's weights, or the law without a chosen token; its sum.
inline double take_off(float* weights, int64_t vocab, double mass, const float* law, int64_t token) {
    if (!law) {
        const double left = mass - weights[token];
        weights[token] = 0;
        double sum = 0;  // not the difference: it may be rounding alone
        if (left < 1e-3 * mass)
            for (int64_t i = 0; i < vocab; i++) sum += weights[i];
        else sum = left;
        return sum;
    }
    const float by = (float)(1 / mass);
    double sum = 0;
    for (int64_t run = 0; run < vocab; run += RUN) {
        float part = 0;
        for (int64_t i = run; i < std::min(vocab, run + RUN); i++) {
            const float left = weights[i] * by - law[i];
            weights[i] = left > 0 ? left : 0;
            part += weights[i];
        }
        sum += part;
    }
    return sum;
}

// kept[b]: how many nodes are kept; final[b]: the recovered or bonus token. `room`: [vocab].
inline void judge(const Chains& c, int64_t b, int64_t* kept, int64_t* final, float* room) {
    const int64_t count = c.cu[b + 1] - c.cu[b];
    const float* logits = c.logits + (c.cu[b] + b) * c.vocab;
    const float by = scale_of(c.temperature[b]);
    int64_t j = 0;
    double mass = 0;
    for (;; j++, logits += c.vocab) {
        const float most = most_of(logits, c.vocab);
        mass = weigh(logits, c.vocab, most, by, room);
        if (j == count) break;
        const int64_t node = c.cu[b] + j, token = c.tokens[node];
        const float p = (float)(room[token] / mass);
        const float q = c.rows[node] < 0 ? 1.0f : c.laws[c.rows[node] * c.vocab + token];
        if (!(c.accept[node] * q < p)) break;
    }
    kept[b] = j;
    if (j < count) {
        const int64_t node = c.cu[b] + j;
        const float* law = c.rows[node] < 0 ? nullptr : c.laws + c.rows[node] * c.vocab;
        const double left = take_off(room, c.vocab, mass, law, c.tokens[node]);
        // Rounding alone can leave nothing (p equals q): then p itself is what remains.
        mass = left > 0 ? left : weigh(logits, c.vocab, most_of(logits, c.vocab), by, room);
    }
    final[b] = find(room, c.vocab, c.last[b], mass);
}

}  // namespace sampling
