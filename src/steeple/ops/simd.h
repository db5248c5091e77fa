// Vectors of the machine this is compiled for, as GCC/Clang vector extensions: 16, 8 or 4 lanes of 32 bits. Intrinsics
// only where compilers miss the instruction. The library is built where it runs, so the compiler's -march=native
// chooses the instruction set and nothing is dispatched.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// A compiler that has inlined much already stops before the innermost steps.
#define HOT [[gnu::always_inline]]

namespace simd {

#if defined(__AVX512F__)
constexpr int W = 16, MAX_ROWS = 6, MAX_GROUPS = 4, MAX_COLUMNS = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8, MAX_ROWS = 4, MAX_GROUPS = 2, MAX_COLUMNS = 2;  // 8 of 16
#elif defined(__aarch64__)
constexpr int W = 4, MAX_ROWS = 4, MAX_GROUPS = 4, MAX_COLUMNS = 4;  // 16 of 32
#else
constexpr int W = 4, MAX_ROWS = 4, MAX_GROUPS = 2, MAX_COLUMNS = 2;  // 8 of 16
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool HAS_DOT = true;
#else
constexpr bool HAS_DOT = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

template <class V> HOT inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <class V> inline V load_part(const void* from, int bytes) {  // zeros after the first `bytes`
    V v = {};
    std::memcpy(&v, from, bytes);
    return v;
}
template <class V> HOT inline void store(void* to, V v) { std::memcpy(to, &v, sizeof(V)); }

HOT inline vf splat(float x) { return x - vf{}; }
HOT inline vi splat(int32_t x) { return x - vi{}; }
inline vu widen_bits(vh h) {
#if defined(__AVX512F__)
    return (vu)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, (__m256i)h);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, vu);
#endif
}
inline vf widen(vh h) { return (vf)(widen_bits(h) << 16); }                         // bfloat16 -> float32
inline vi zip(vh a, vh b) { return (vi)(widen_bits(a) | (widen_bits(b) << 16)); }  // pairs (a_i, b_i)
inline vf low_half(vi pair) { return (vf)(pair << 16); }                            // first of two bfloat16
inline vf high_half(vi pair) { return (vf)(pair & splat((int32_t)0xffff0000)); }  // second
HOT inline vf larger(vf a, vf b) { return a > b ? a : b; }

inline vi lane_numbers() {
    vi lane = {};
    for (int i = 0; i < W; i++) lane[i] = i;
    return lane;
}

inline float widen1(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t narrow1(float f) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__clang__)
template <int... I> inline vi pick(vi a, vi b) { return __builtin_shufflevector(a, b, I...); }
#else
template <int... I> inline vi pick(vi a, vi b) { return __builtin_shuffle(a, b, vi{I...}); }
#endif

template <int... I> struct Lanes {};
template <int N, int... I> struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I> struct MakeLanes<0, I...> { typedef Lanes<I...> type; };
typedef MakeLanes<W>::type AllLanes;

// 16 bytes from each of W / 4 places, as the quarters of one vector.
inline vi gather_quarters(const char* base, const int64_t* offsets, int64_t stride) {
#if defined(__AVX512F__)
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(base + offsets[0])));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(base + offsets[stride])), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(base + offsets[2 * stride])), 2);
    return (vi)_mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(base + offsets[3 * stride])), 3);
#elif defined(__AVX2__)
    const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(base + offsets[0])));
    return (vi)_mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(base + offsets[stride])), 1);
#else
    (void)stride;
    return load<vi>(base + offsets[0]);
#endif
}

// Within every quarter: interleave the low or high words, or pairs of words, of a and b.
template <int HIGH, int... L> inline vi words_of(vi a, vi b, Lanes<L...>) {
    return pick<((L & ~3) + 2 * HIGH + (L & 3) / 2 + (L & 1) * W)...>(a, b);
}
template <int HIGH, int... L> inline vi pairs_of(vi a, vi b, Lanes<L...>) {
    return pick<((L & ~3) + 2 * HIGH + (L & 1) + (L & 3) / 2 * W)...>(a, b);
}
inline void transpose_quarters(vi (&r)[4]) {  // 4 x 4 words within every quarter
    const vi a = words_of<0>(r[0], r[1], AllLanes{}), b = words_of<1>(r[0], r[1], AllLanes{});
    const vi c = words_of<0>(r[2], r[3], AllLanes{}), d = words_of<1>(r[2], r[3], AllLanes{});
    r[0] = pairs_of<0>(a, c, AllLanes{}), r[1] = pairs_of<1>(a, c, AllLanes{});
    r[2] = pairs_of<0>(b, d, AllLanes{}), r[3] = pairs_of<1>(b, d, AllLanes{});
}

template <int D, int... L> inline vi fold_by(vi v, Lanes<L...>) { return pick<(L ^ D)...>(v, v); }
template <int D> inline vi swapped(vi v) { return fold_by<D>(v, AllLanes{}); }
HOT inline float largest(vf v) {
    if constexpr (W > 8) v = larger(v, (vf)swapped<8 % W>((vi)v));
    if constexpr (W > 4) v = larger(v, (vf)swapped<4 % W>((vi)v));
    v = larger(v, (vf)swapped<2>((vi)v));
    return larger(v, (vf)swapped<1>((vi)v))[0];
}
inline float total(vf v) {
    if constexpr (W > 8) v = v + (vf)swapped<8 % W>((vi)v);
    if constexpr (W > 4) v = v + (vf)swapped<4 % W>((vi)v);
    v = v + (vf)swapped<2>((vi)v);
    return (v + (vf)swapped<1>((vi)v))[0];
}

// 2^f to 2 ulp for -0.5 <= f <= 0.5; exactly 1 at 0.
HOT inline vf exp2_fraction(vf f) {
    vf p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    return p * f + 1.0f;
}

// 2^x to 2 ulp for x <= 127; exactly 1 at 0 and exactly 0 below -126.
HOT inline vf exp2(vf x) {
#if defined(__AVX512F__)
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 whole = _mm512_maskz_roundscale_ps((__mmask16)-1, (__m512)x, NEAREST);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)exp2_fraction(x - (vf)whole), whole);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const vf low = splat(-126.0f), zero = {};
    const vf y = larger(x, low), shifted = y + magic;
    const vi exponent = ((vi)shifted - (vi)magic) << 23;
    return x < low ? zero : (vf)((vi)exp2_fraction(y - (shifted - magic)) + exponent);
#endif
}

// acc + products of two pairs of bfloat16 per lane, and the narrowing to them. Only where HAS_DOT.
#if defined(__AVX512BF16__) && defined(__AVX512F__)
HOT inline vf dot(vf acc, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
HOT inline vi narrow_pairs(vf first, vf second) {  // bfloat16, elements of first and then of second
    return (vi)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#else
inline vf dot(vf acc, vi, vi) { return acc; }
inline vi narrow_pairs(vf first, vf) { return (vi)first; }
#endif

// acc + q * k for one 32-bit word of a key per lane: one float32 or two bfloat16.
enum Kind { F32 = 0, BF16 = 1, BF16_DOT = 2 };
template <int KIND> HOT inline vf step(vf acc, const float* q, vi k) {
    if constexpr (KIND == F32) return acc + splat(q[0]) * (vf)k;
    if constexpr (KIND == BF16) return (acc + splat(q[0]) * low_half(k)) + splat(q[1]) * high_half(k);
    return dot(acc, splat(load<int32_t>(q)), k);
}
constexpr int q_words(int kind) { return kind == BF16 ? 2 : 1; }  // words of a query per word of a key

}  // namespace simd
