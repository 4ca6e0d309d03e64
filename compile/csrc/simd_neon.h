// The operations of simd_plain.h with the NEON of every 64-bit ARM (ARMv8.0), 16 bytes at a time.
#pragma once

#include <arm_neon.h>

#include <utility>

#include "layout.h"
#include "masks.h"

namespace isa::neon {

struct F8 {
    float32x4_t low, high;
};
struct B32 {
    uint8x16_t low, high;
};

// Views of the same bytes as other integers, and back.
INLINE uint32x4_t u32(uint8x16_t x) { return vreinterpretq_u32_u8(x); }
INLINE int32x4_t s32(uint8x16_t x) { return vreinterpretq_s32_u8(x); }
INLINE int16x8_t s16(uint8x16_t x) { return vreinterpretq_s16_u8(x); }
INLINE int8x16_t s8(uint8x16_t x) { return vreinterpretq_s8_u8(x); }
INLINE uint8x16_t u8(uint32x4_t x) { return vreinterpretq_u8_u32(x); }
INLINE uint8x16_t u8(int32x4_t x) { return vreinterpretq_u8_s32(x); }
INLINE uint8x16_t u8(int16x8_t x) { return vreinterpretq_u8_s16(x); }
INLINE B32 twice(uint8x16_t x) { return {x, x}; }

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

// Floats.
INLINE F8 set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE F8 zero() { return set1(0.0f); }
INLINE F8 load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE void store(float *p, F8 x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
}
INLINE F8 add(F8 a, F8 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
INLINE F8 mul(F8 a, F8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
INLINE F8 fma(F8 a, F8 b, F8 c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
INLINE void transpose4(float32x4_t &a, float32x4_t &b, float32x4_t &c, float32x4_t &d) {
    const float64x2_t low = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), high = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t low2 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), high2 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vtrn1q_f64(low, low2));
    b = vreinterpretq_f32_f64(vtrn1q_f64(high, high2));
    c = vreinterpretq_f32_f64(vtrn2q_f64(low, low2));
    d = vreinterpretq_f32_f64(vtrn2q_f64(high, high2));
}
INLINE void transpose(F8 (&x)[8]) {
    for (int i = 0; i < 8; i += 4) {
        transpose4(x[i].low, x[i + 1].low, x[i + 2].low, x[i + 3].low);
        transpose4(x[i].high, x[i + 1].high, x[i + 2].high, x[i + 3].high);
    }
    for (int i = 0; i < 4; ++i) std::swap(x[i].high, x[i + 4].low);
}
INLINE F8 divide(F8 a, F8 b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
INLINE F8 greatest(F8 a, F8 b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
INLINE F8 least(F8 a, F8 b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
INLINE F8 halves(uint16x8_t bits) {
    const float16x8_t x = vreinterpretq_f16_u16(bits);
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
}
INLINE F8 load_half(const std::uint16_t *p) { return halves(vld1q_u16(p)); }
INLINE F8 load_bfloat(const std::uint16_t *p) {
    const uint16x8_t bits = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}
INLINE F8 load_int8(const std::int8_t *p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}
INLINE void store_half(std::uint16_t *p, F8 x) {
    const float16x8_t both = vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high);
    vst1q_u16(p, vreinterpretq_u16_f16(both));
}
INLINE float sum(F8 x) {
    const float32x4_t four = vaddq_f32(x.low, x.high);
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
INLINE F8 fold_halves(F8 x) {
    const float32x4_t four = vaddq_f32(x.low, x.high);
    return {four, four};
}
INLINE F8 broadcast4(const float *p) { return {vld1q_f32(p), vld1q_f32(p)}; }
INLINE F8 spread2(const float *a, const float *b) { return {vdupq_n_f32(*a), vdupq_n_f32(*b)}; }

// For a byte lookup: the four bytes of the element that each int32 says.
INLINE uint8x16_t places_of(uint32x4_t element) {
    return u8(vaddq_u32(vmulq_n_u32(element, 0x04040404), vdupq_n_u32(0x03020100)));
}
INLINE F8 pick4(F8 x, B32 index) {
    const auto pick = [](float32x4_t from, uint8x16_t at) {
        const uint8x16_t places = places_of(vandq_u32(u32(at), vdupq_n_u32(3)));
        return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(from), places));
    };
    return {pick(x.low, index.low), pick(x.high, index.high)};
}
INLINE F8 pick16(F8 low, F8 high, B32 index) {
    const uint8x16x4_t all{{vreinterpretq_u8_f32(low.low), vreinterpretq_u8_f32(low.high),
                            vreinterpretq_u8_f32(high.low), vreinterpretq_u8_f32(high.high)}};
    const auto pick = [&](uint8x16_t at) {
        const uint8x16_t places = places_of(vandq_u32(u32(at), vdupq_n_u32(15)));
        return vreinterpretq_f32_u8(vqtbl4q_u8(all, places));
    };
    return {pick(index.low), pick(index.high)};
}
INLINE F8 gather(const float *base, const std::uint16_t *index) {
    const float found[8] = {base[index[0]], base[index[1]], base[index[2]], base[index[3]],
                            base[index[4]], base[index[5]], base[index[6]], base[index[7]]};
    return load(found);
}

// Bytes.
INLINE B32 load(const std::uint8_t *p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
INLINE void store(std::uint8_t *p, B32 x) {
    vst1q_u8(p, x.low);
    vst1q_u8(p + 16, x.high);
}
INLINE B32 set1_byte(int x) { return twice(vdupq_n_u8(static_cast<std::uint8_t>(x))); }
INLINE B32 zero_bytes() { return set1_byte(0); }
INLINE B32 set1_32(std::int32_t x) { return twice(u8(vdupq_n_s32(x))); }
INLINE B32 pair_base() { return set1_32(0x04040000); }
template <int Bits> INLINE B32 shift_right32(B32 x) {
    return {u8(vshrq_n_u32(u32(x.low), Bits)), u8(vshrq_n_u32(u32(x.high), Bits))};
}
template <int Bits> INLINE B32 shift_left32(B32 x) {
    return {u8(vshlq_n_u32(u32(x.low), Bits)), u8(vshlq_n_u32(u32(x.high), Bits))};
}
INLINE F8 as_float(B32 x) {
    return {vreinterpretq_f32_u8(x.low), vreinterpretq_f32_u8(x.high)};
}
INLINE B32 as_bytes(F8 x) { return {vreinterpretq_u8_f32(x.low), vreinterpretq_u8_f32(x.high)}; }
INLINE B32 both(B32 a, B32 b) { return {vandq_u8(a.low, b.low), vandq_u8(a.high, b.high)}; }
INLINE B32 either(B32 a, B32 b) { return {vorrq_u8(a.low, b.low), vorrq_u8(a.high, b.high)}; }
INLINE B32 equal32(B32 a, int b) {
    return {u8(vceqq_s32(s32(a.low), vdupq_n_s32(b))), u8(vceqq_s32(s32(a.high), vdupq_n_s32(b)))};
}
INLINE F8 where(B32 mask, F8 x) {
    return as_float(both(mask, {vreinterpretq_u8_f32(x.low), vreinterpretq_u8_f32(x.high)}));
}
INLINE B32 repeat4(const std::int8_t *p) {
    std::uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return twice(u8(vdupq_n_u32(bits)));
}
INLINE B32 repeat8(const std::int8_t *p) {
    const uint8x8_t eight = vreinterpret_u8_s8(vld1_s8(p));
    return twice(vcombine_u8(eight, eight));
}
INLINE B32 repeat16(const std::int8_t *p) { return twice(vreinterpretq_u8_s8(vld1q_s8(p))); }
INLINE B32 pick_bytes(B32 x, B32 index) {
    return {vqtbl1q_u8(x.low, index.low), vqtbl1q_u8(x.high, index.high)};
}
INLINE uint8x16_t dot2(uint8x16_t a, uint8x16_t b) {
    const int16x8_t first = vmull_s8(vget_low_s8(s8(a)), vget_low_s8(s8(b)));
    return u8(vpaddq_s16(first, vmull_high_s8(s8(a), s8(b))));
}
INLINE B32 dot2(B32 a, B32 b) { return {dot2(a.low, b.low), dot2(a.high, b.high)}; }
INLINE B32 dot2_unsigned(B32 a, B32 b) { return dot2(a, b); }  // at most 127: the same as int8
INLINE B32 add16(B32 a, B32 b) {
    return {u8(vaddq_s16(s16(a.low), s16(b.low))), u8(vaddq_s16(s16(a.high), s16(b.high)))};
}
INLINE B32 add32(B32 a, B32 b) {
    return {u8(vaddq_s32(s32(a.low), s32(b.low))), u8(vaddq_s32(s32(a.high), s32(b.high)))};
}
INLINE void accumulate16(B32 &sum, B32 x) { sum = add16(sum, x); }
INLINE void accumulate32(B32 &sum, B32 x) { sum = add32(sum, x); }
INLINE B32 add8(B32 a, B32 b) { return {vaddq_u8(a.low, b.low), vaddq_u8(a.high, b.high)}; }
INLINE B32 magnitude8(B32 x) {
    return {vreinterpretq_u8_s8(vabsq_s8(s8(x.low))), vreinterpretq_u8_s8(vabsq_s8(s8(x.high)))};
}
INLINE B32 subtract32(B32 a, B32 b) {
    return {u8(vsubq_s32(s32(a.low), s32(b.low))), u8(vsubq_s32(s32(a.high), s32(b.high)))};
}
INLINE B32 sum_pairs16(B32 x, int factor) {
    return {u8(vmulq_n_s32(vpaddlq_s16(s16(x.low)), factor)),
            u8(vmulq_n_s32(vpaddlq_s16(s16(x.high)), factor))};
}
INLINE uint8x16_t dot2_16(uint8x16_t a, uint8x16_t b) {
    const int32x4_t first = vmull_s16(vget_low_s16(s16(a)), vget_low_s16(s16(b)));
    return u8(vpaddq_s32(first, vmull_high_s16(s16(a), s16(b))));
}
INLINE B32 dot2_16(B32 a, B32 b) { return {dot2_16(a.low, b.low), dot2_16(a.high, b.high)}; }
INLINE uint8x16_t low_pair16(uint8x16_t x) {  // of four int16, the first two of eight
    const int16x8_t first = vmovl_s8(vget_low_s8(s8(x))), second = vmovl_high_s8(s8(x));
    return vreinterpretq_u8_s32(vuzp1q_s32(vreinterpretq_s32_s16(first), vreinterpretq_s32_s16(second)));
}
INLINE B32 low_pair16(B32 x) { return {low_pair16(x.low), low_pair16(x.high)}; }
INLINE B32 high_pair16(B32 x) { return low_pair16(shift_right32<16>(x)); }
template <int Byte> INLINE F8 byte_to_float(B32 x) {
    const auto one = [](uint8x16_t lanes) {
        return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(s32(lanes), 24 - 8 * Byte), 24));
    };
    return {one(x.low), one(x.high)};
}
INLINE F8 to_float(B32 x) { return {vcvtq_f32_s32(s32(x.low)), vcvtq_f32_s32(s32(x.high))}; }

// first + i of the bits i that are set in the mask, then anything: 8 are written.
INLINE void store_places(std::uint16_t *to, std::uint64_t mask, int first) {
    const uint16x8_t places = vmovl_u8(vld1_u8(kKept.v[mask]));
    vst1q_u16(to, vaddq_u16(places, vdupq_n_u16(static_cast<std::uint16_t>(first))));
}
// The eight bytes at p whose bits are set in the mask side by side at `to`, zeros behind them.
INLINE void compress_bytes(const std::int8_t *p, std::uint64_t mask, std::int8_t *to) {
    vst1_s8(to, vtbl1_s8(vld1_s8(p), vreinterpret_s8_u8(vld1_u8(kKept.v[mask]))));
}
// Lane i: the next of the values at p if bit i of the mask is set, else +0.
template <Type V> INLINE F8 expand_masked(const std::uint8_t *p, std::uint64_t mask) {
    if constexpr (V == Type::bf16) {
        const uint8x16_t bytes = vld1q_u8(p);
        const B32 places = load(kBfloatPlaces.v[mask]);
        return as_float({vqtbl1q_u8(bytes, places.low), vqtbl1q_u8(bytes, places.high)});
    } else if constexpr (V == Type::fp16) {
        return halves(vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(kHalfPlaces.v[mask]))));
    } else {
        const uint8x16x2_t all{{vld1q_u8(p), vld1q_u8(p + 16)}};
        const uint16x8_t ranks = vmovl_u8(vld1_u8(kRanks.v[mask]));
        const auto pick = [&](uint32x4_t rank) {
            const uint32x4_t kept = vcltq_u32(rank, vdupq_n_u32(8));
            return vandq_u8(u8(kept), vqtbl2q_u8(all, places_of(vandq_u32(rank, kept))));
        };
        return as_float({pick(vmovl_u16(vget_low_u16(ranks))), pick(vmovl_high_u16(ranks))});
    }
}

}  // namespace isa::neon
