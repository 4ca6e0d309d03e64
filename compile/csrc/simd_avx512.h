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

}  // namespace isa::ISA
