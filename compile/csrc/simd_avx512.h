// AVX-512 as Ice Lake and Zen 4 have it: F, BW, DQ, VL, VNNI, VBMI and VBMI2. What works on eight rows is
// that of AVX2; products with many tokens take sixteen rows at once.
#pragma once

#include "simd_avx2.h"

namespace isa::ISA {

struct Widest {
    using V = __m512;
    static constexpr int lanes = 16;
    static INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
    static INLINE V set1(float x) { return _mm512_set1_ps(x); }
};
INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
INLINE void store(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
INLINE __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

constexpr int kCompressed = 32;  // of the smallest group
INLINE void compress_bytes(const std::int8_t *p, std::uint64_t mask, std::int8_t *to) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to),
                        _mm256_maskz_compress_epi8(static_cast<__mmask32>(mask), bytes));
}
INLINE B32 dot4_unsigned(B32 sum, B32 a, B32 b) { return _mm256_dpbusd_epi32(sum, a, b); }
INLINE B32 dot4(B32 sum, B32 a, B32 b) {
    return dot4_unsigned(sum, _mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
}

// Steps of the kept columns of a block of sixteen rows, see int_vector.
template <Type V>
INLINE void sixteen_rows(const std::uint8_t *p, const std::int8_t *kept, Index count,
                         const std::uint16_t *group, const float *factors, float *out) {
    constexpr int kStep = V == Type::int4 ? 8 : 4;
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), none = _mm512_setzero_si512();
    const auto inputs = [&](Index k) {
        std::int32_t four;
        std::memcpy(&four, kept + k, 4);
        return _mm512_set1_epi32(four);
    };
    const auto step = [&](Index k, __m512 sum) {
        const std::uint8_t *at = p + k / kStep * 64;
        prefetch(at + 2048);
        const __m512i weights = _mm512_loadu_si512(at), x = inputs(k);
        __m512i whole;
        if constexpr (V == Type::int8) {
            const __m512i turned = _mm512_mask_sub_epi8(weights, _mm512_movepi8_mask(x), none, weights);
            whole = _mm512_dpbusd_epi32(none, _mm512_abs_epi8(x), turned);
        } else {
            const __m512i next = inputs(k + 4), high = _mm512_and_si512(_mm512_srli_epi16(weights, 4), low);
            const __m512i excess = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, eight, x), eight, next);
            whole = _mm512_dpbusd_epi32(none, _mm512_and_si512(weights, low), x);
            whole = _mm512_sub_epi32(_mm512_dpbusd_epi32(whole, high, next), excess);
        }
        const float *factor = factors + Index(group[k / kStep]) * 16;
        return fma(_mm512_cvtepi32_ps(whole), _mm512_loadu_ps(factor), sum);
    };
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    Index k = 0;
    for (; k + 2 * kStep <= count; k += 2 * kStep) {
        sums[0] = step(k, sums[0]);
        sums[1] = step(k + kStep, sums[1]);
    }
    if (k < count) sums[0] = step(k, sums[0]);
    store(out, add(sums[0], sums[1]));
}

}  // namespace isa::ISA
