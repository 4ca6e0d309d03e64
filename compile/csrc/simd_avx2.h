// The operations of simd_plain.h with AVX2, FMA and F16C; simd_avx512.h builds on them.
#pragma once

#include <immintrin.h>

#include "layout.h"
#include "masks.h"

namespace isa::ISA {

using F8 = __m256;
using B32 = __m256i;

INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

INLINE F8 zero() { return _mm256_setzero_ps(); }
INLINE F8 set1(float x) { return _mm256_set1_ps(x); }
INLINE F8 load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, F8 x) { _mm256_storeu_ps(p, x); }
INLINE F8 add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
INLINE F8 mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
INLINE F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F8 divide(F8 a, F8 b) { return _mm256_div_ps(a, b); }
INLINE F8 greatest(F8 a, F8 b) { return _mm256_max_ps(a, b); }
INLINE F8 least(F8 a, F8 b) { return _mm256_min_ps(a, b); }
INLINE F8 load_half(const std::uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
INLINE F8 load_bfloat(const std::uint16_t *p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE F8 load_int8(const std::int8_t *p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
INLINE void store_half(std::uint16_t *p, F8 x) {
    const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), halves);
}
INLINE float sum(F8 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE void transpose(F8 (&x)[8]) {
    F8 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}
INLINE F8 fold_halves(F8 x) { return add(x, _mm256_permute2f128_ps(x, x, 1)); }
INLINE F8 broadcast4(const float *p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p));
}
INLINE F8 spread2(const float *a, const float *b) {
    const __m256 low = _mm256_castps128_ps256(_mm_broadcast_ss(a));
    return _mm256_insertf128_ps(low, _mm_broadcast_ss(b), 1);
}
INLINE F8 pick4(F8 x, B32 index) { return _mm256_permutevar_ps(x, index); }
INLINE F8 pick16(F8 low, F8 high, B32 index) {
#if SIMD_NUMBER(ISA) == SIMD_avx512
    return _mm256_permutex2var_ps(low, index, high);
#else
    const F8 a = _mm256_permutevar8x32_ps(low, index);
    const F8 b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#endif
}
INLINE F8 gather(const float *base, const std::uint16_t *index) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i *>(index));
    return _mm256_i32gather_ps(base, _mm256_cvtepu16_epi32(narrow), 4);
}

INLINE B32 load(const std::uint8_t *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}
INLINE void store(std::uint8_t *p, B32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x);
}
INLINE B32 zero_bytes() { return _mm256_setzero_si256(); }
INLINE B32 set1_byte(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
INLINE B32 pair_base() { return _mm256_set1_epi32(0x04040000); }
template <int Bits> INLINE B32 shift_right32(B32 x) { return _mm256_srli_epi32(x, Bits); }
template <int Bits> INLINE B32 shift_left32(B32 x) { return _mm256_slli_epi32(x, Bits); }
INLINE F8 as_float(B32 x) { return _mm256_castsi256_ps(x); }
INLINE B32 as_bytes(F8 x) { return _mm256_castps_si256(x); }
INLINE B32 both(B32 a, B32 b) { return _mm256_and_si256(a, b); }
INLINE B32 either(B32 a, B32 b) { return _mm256_or_si256(a, b); }
INLINE B32 equal32(B32 a, int b) { return _mm256_cmpeq_epi32(a, _mm256_set1_epi32(b)); }
INLINE F8 where(B32 mask, F8 x) { return _mm256_and_ps(_mm256_castsi256_ps(mask), x); }

INLINE B32 repeat4(const std::int8_t *p) {
    std::int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return _mm256_set1_epi32(bits);
}
INLINE B32 repeat8(const std::int8_t *p) {
    long long bits;
    std::memcpy(&bits, p, sizeof bits);
    return _mm256_set1_epi64x(bits);
}
INLINE B32 repeat16(const std::int8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
INLINE B32 pick_bytes(B32 x, B32 index) { return _mm256_shuffle_epi8(x, index); }
INLINE B32 dot2(B32 a, B32 b) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
}
INLINE B32 dot2_unsigned(B32 a, B32 b) { return _mm256_maddubs_epi16(a, b); }
INLINE B32 add16(B32 a, B32 b) { return _mm256_add_epi16(a, b); }
INLINE B32 add32(B32 a, B32 b) { return _mm256_add_epi32(a, b); }
// The compiler would first make all products, more than registers hold, and copy the sums.
INLINE void accumulate16(B32 &sum, B32 x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
INLINE void accumulate32(B32 &sum, B32 x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
INLINE B32 add8(B32 a, B32 b) { return _mm256_add_epi8(a, b); }
INLINE B32 magnitude8(B32 x) { return _mm256_abs_epi8(x); }
INLINE B32 subtract32(B32 a, B32 b) { return _mm256_sub_epi32(a, b); }
INLINE B32 set1_32(std::int32_t x) { return _mm256_set1_epi32(x); }
INLINE B32 sum_pairs16(B32 x, int factor) {
    return _mm256_madd_epi16(x, _mm256_set1_epi16(static_cast<short>(factor)));
}
INLINE B32 dot2_16(B32 a, B32 b) { return _mm256_madd_epi16(a, b); }
INLINE B32 low_pair16(B32 x) {
    const B32 places = _mm256_set_epi32(0x0d800c80, 0x09800880, 0x05800480, 0x01800080, 0x0d800c80,
                                        0x09800880, 0x05800480, 0x01800080);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(x, places), 8);
}
INLINE B32 high_pair16(B32 x) { return low_pair16(_mm256_srli_epi32(x, 16)); }
INLINE F8 to_float(B32 x) { return _mm256_cvtepi32_ps(x); }
template <int Byte> INLINE F8 byte_to_float(B32 x) {
    return to_float(_mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * Byte), 24));
}
// first + i of the bits i that are set in the mask, then anything: 8 are written.
INLINE void store_places(std::uint16_t *to, std::uint64_t mask, int first) {
    const auto *kept = reinterpret_cast<const __m128i *>(kKept.v[mask]);
    const __m128i places = _mm_cvtepu8_epi16(_mm_loadl_epi64(kept));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                     _mm_add_epi16(places, _mm_set1_epi16(static_cast<short>(first))));
}
#if SIMD_NUMBER(ISA) != SIMD_avx512  // which takes more at once
// The eight bytes at p whose bits are set in the mask side by side at `to`, zeros behind them.
INLINE void compress_bytes(const std::int8_t *p, std::uint64_t mask, std::int8_t *to) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kKept.v[mask]));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_shuffle_epi8(bytes, places));
}
#endif
// Lane i: the next of the values at p if bit i of the mask is set, else +0.
template <Type V> INLINE F8 expand_masked(const std::uint8_t *p, std::uint64_t mask) {
    if constexpr (V == Type::bf16) {
        const B32 bytes = repeat16(reinterpret_cast<const std::int8_t *>(p));
        return as_float(_mm256_shuffle_epi8(bytes, load(kBfloatPlaces.v[mask])));
    } else if constexpr (V == Type::fp16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        const auto *places = reinterpret_cast<const __m128i *>(kHalfPlaces.v[mask]);
        return _mm256_cvtph_ps(_mm_shuffle_epi8(bytes, _mm_loadu_si128(places)));
    } else {
        const auto *ranks = reinterpret_cast<const __m128i *>(kRanks.v[mask]);
        const __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(ranks));
        const F8 spread = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float *>(p)), index);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), spread);
    }
}

}  // namespace isa::ISA
