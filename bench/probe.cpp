// What this machine can do at most: bytes read per second, and multiply-adds of the attention's own kind per second.
#include <chrono>

#include "simd.h"
#include "team.h"

namespace {

using namespace simd;

constexpr int SUMS = MAX_ROWS * MAX_GROUPS;
constexpr int UNROLL = 8, AHEAD = 4096;
volatile float sink;

// On the team that the kernels use: another thread of its own would find the cores busy with those that wait.
template <class Work> double seconds(int threads, team::Run run, team::Size size, Work work) {
    const auto start = std::chrono::steady_clock::now();
    team::parallel([&](int number, int) { work(number); }, threads, run, size);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <int KIND> void multiply(int64_t rounds) {
    vf sums[SUMS];
    float q[2] = {1e-3f, 1e-3f};
    vi k = (vi)splat(1e-3f);
    asm volatile("" : : "r"(q), "r"(&k) : "memory");
    for (int s = 0; s < SUMS; s++) sums[s] = splat(s * q[0]);  // no two alike, or the compiler keeps only one
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 32
        for (int s = 0; s < SUMS; s++) sums[s] = step<KIND>(sums[s], q, k);
    }
    for (int s = 0; s < SUMS; s++) sink = sink + sums[s][0];
}

}  // namespace

extern "C" {

// Bytes per second of `threads` that each read their part of `data` in order.
double probe_read(const char* data, int64_t bytes, int threads, team::Run run, team::Size size) {
    const int64_t block = UNROLL * W * 4, part = bytes / threads / block * block;
    return part * threads / seconds(threads, run, size, [=](int t) {
        vi sums[UNROLL] = {};
        for (const char *at = data + t * part, *end = at + part; at < end; at += block)
#pragma GCC unroll 8
            for (int i = 0; i < UNROLL; i++) {
                __builtin_prefetch(at + i * W * 4 + AHEAD);
                sums[i] ^= load<vi>(at + i * W * 4);
            }
        for (int i = 0; i < UNROLL; i++) sink = sink + (float)sums[i][0];
    });
}

// Floating-point operations per second of `threads`, from registers: bfloat16 pairs, or float32.
double probe_flops(int64_t rounds, int bf16, int threads, team::Run run, team::Size size) {
    const bool pairs = bf16 && HAS_DOT;
    const double each = (double)rounds * SUMS * W * (pairs || bf16 ? 4 : 2);
    return each * threads / seconds(threads, run, size, [=](int) {
        if (pairs) multiply<BF16_DOT>(rounds);
        else if (bf16) multiply<BF16>(rounds);
        else multiply<F32>(rounds);
    });
}
}
