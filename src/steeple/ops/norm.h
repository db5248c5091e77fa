// Root-mean-square norm of rows.
#pragma once

#include "dense.h"

namespace norm {

using namespace simd;

// One row of a root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, sums in float32.
template <bool BF16_IN> inline void row_of(const char* x, const char* weight, char* y, int64_t size, float eps) {
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
        if constexpr (BF16_IN) store(y + i * 2, dense::narrow(value));
        else store(y + i * 4, value);
    }
    for (int64_t i = whole; i < size; i++) {
        const float value = one(x, i) * scale * one(weight, i);
        if constexpr (BF16_IN) ((uint16_t*)y)[i] = narrow1(value);
        else ((float*)y)[i] = value;
    }
}

inline void row(const char* x, const char* weight, char* y, int64_t size, float eps, bool bf16) {
    if (bf16) row_of<true>(x, weight, y, size, eps);
    else row_of<false>(x, weight, y, size, eps);
}

}  // namespace norm
