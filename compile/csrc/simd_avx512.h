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
INLINE void store(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
INLINE __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

}  // namespace isa::ISA
