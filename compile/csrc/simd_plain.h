// The operations that the kernels are written in, in plain C++: what the others must equal.
#pragma once

#include <utility>

#include "layout.h"

namespace isa::plain {

struct F8 {
    float v[8];
};
struct B32 {
    std::uint8_t v[32];
};

// Views of the same bytes as other integers.
template <typename T> struct Lanes {
    T v[32 / sizeof(T)];
};
template <typename T> INLINE Lanes<T> as(B32 x) {
    Lanes<T> lanes;
    std::memcpy(lanes.v, x.v, 32);
    return lanes;
}
template <typename T> INLINE B32 bytes(const Lanes<T> &lanes) {
    B32 x;
    std::memcpy(x.v, lanes.v, 32);
    return x;
}
template <typename T, typename Function> INLINE B32 each(const Function &f) {
    Lanes<T> lanes;
    for (int i = 0; i < int(32 / sizeof(T)); ++i) lanes.v[i] = T(f(i));
    return bytes(lanes);
}
template <typename Function> INLINE F8 each_float(const Function &f) {
    F8 x;
    for (int i = 0; i < 8; ++i) x.v[i] = f(i);
    return x;
}
INLINE float float_of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
INLINE float float_of_half(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000) << 16, body = half & 0x7fff;
    if (body >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
    // Exact: scaling by 2^112 moves the exponent, and makes normal what was subnormal.
    const float magnitude = float_of_bits(body << 13) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

INLINE void prefetch(const void *) {}

// Floats.
INLINE F8 set1(float x) { return each_float([&](int) { return x; }); }
INLINE F8 zero() { return set1(0.0f); }
INLINE F8 load(const float *p) { return each_float([&](int i) { return p[i]; }); }
INLINE void store(float *p, F8 x) { std::memcpy(p, x.v, 32); }
INLINE F8 add(F8 a, F8 b) { return each_float([&](int i) { return a.v[i] + b.v[i]; }); }
INLINE void transpose(F8 (&x)[8]) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
}
INLINE F8 mul(F8 a, F8 b) { return each_float([&](int i) { return a.v[i] * b.v[i]; }); }
INLINE F8 fma(F8 a, F8 b, F8 c) {
    return each_float([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
INLINE F8 divide(F8 a, F8 b) { return each_float([&](int i) { return a.v[i] / b.v[i]; }); }
// The larger and the smaller one; NaN if b is.
INLINE F8 greatest(F8 a, F8 b) {
    return each_float([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
INLINE F8 least(F8 a, F8 b) {
    return each_float([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
INLINE F8 load_half(const std::uint16_t *p) {
    return each_float([&](int i) { return float_of_half(p[i]); });
}
INLINE F8 load_bfloat(const std::uint16_t *p) {
    return each_float([&](int i) { return float_of_bits(std::uint32_t(p[i]) << 16); });
}
INLINE F8 load_int8(const std::int8_t *p) {
    return each_float([&](int i) { return float(p[i]); });
}
// The nearest halves; ties to even.
INLINE std::uint16_t half_of_float(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return std::uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000) return std::uint16_t(sign | 0x7c00);
    if (bits >= 0x38800000) return std::uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
    const float magnitude = float_of_bits(bits) + 0.5f;  // subnormal: the addition rounds
    std::memcpy(&bits, &magnitude, 4);
    return std::uint16_t(sign | (bits - 0x3f000000));
}
INLINE void store_half(std::uint16_t *p, F8 x) {
    for (int i = 0; i < 8; ++i) p[i] = half_of_float(x.v[i]);
}
INLINE float sum(F8 x) {
    return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
}
// Lane i and lane i + 4 added, in both of them.
INLINE F8 fold_halves(F8 x) {
    return each_float([&](int i) { return x.v[i] + x.v[i ^ 4]; });
}
// p[0..3] twice.
INLINE F8 broadcast4(const float *p) { return each_float([&](int i) { return p[i % 4]; }); }
// *a four times, *b four times.
INLINE F8 spread2(const float *a, const float *b) {
    return each_float([&](int i) { return i < 4 ? *a : *b; });
}
// Lane i of the result: that of x within the same half that the 2 low bits of int32 i say.
INLINE F8 pick4(F8 x, B32 index) {
    const auto lanes = as<std::uint32_t>(index);
    return each_float([&](int i) { return x.v[i / 4 * 4 + (lanes.v[i] & 3)]; });
}
// Lane i: element (4 low bits of int32 i) of the 16 in low, high.
INLINE F8 pick16(F8 low, F8 high, B32 index) {
    const auto lanes = as<std::uint32_t>(index);
    return each_float([&](int i) {
        const int k = lanes.v[i] & 15;
        return k < 8 ? low.v[k] : high.v[k - 8];
    });
}
INLINE F8 gather(const float *base, const std::uint16_t *index) {
    return each_float([&](int i) { return base[index[i]]; });
}

// Bytes.
INLINE B32 load(const std::uint8_t *p) {
    B32 x;
    std::memcpy(x.v, p, 32);
    return x;
}
INLINE void store(std::uint8_t *p, B32 x) { std::memcpy(p, x.v, 32); }
INLINE B32 set1_byte(int x) { return each<std::int8_t>([&](int) { return x; }); }
INLINE B32 zero_bytes() { return set1_byte(0); }
// The bytes 0, 0, 4, 4 of each int32.
INLINE B32 pair_base() {
    return each<std::int8_t>([](int i) { return i % 4 / 2 * 4; });
}
template <int Bits> INLINE B32 shift_right32(B32 x) {
    const auto lanes = as<std::uint32_t>(x);
    return each<std::uint32_t>([&](int i) { return lanes.v[i] >> Bits; });
}
template <int Bits> INLINE B32 shift_left32(B32 x) {
    const auto lanes = as<std::uint32_t>(x);
    return each<std::uint32_t>([&](int i) { return lanes.v[i] << Bits; });
}
// The same bits as floats, and back.
INLINE F8 as_float(B32 x) {
    F8 y;
    std::memcpy(y.v, x.v, 32);
    return y;
}
INLINE B32 as_bytes(F8 x) {
    B32 y;
    std::memcpy(y.v, x.v, 32);
    return y;
}
INLINE B32 both(B32 a, B32 b) {
    return each<std::uint8_t>([&](int i) { return a.v[i] & b.v[i]; });
}
INLINE B32 either(B32 a, B32 b) {
    return each<std::uint8_t>([&](int i) { return a.v[i] | b.v[i]; });
}
// All bits of int32 i set where it equals b.
INLINE B32 equal32(B32 a, int b) {
    const auto lanes = as<std::int32_t>(a);
    return each<std::int32_t>([&](int i) { return lanes.v[i] == b ? -1 : 0; });
}
// x where all bits of the mask are set, else +0.
INLINE F8 where(B32 mask, F8 x) {
    const auto lanes = as<std::int32_t>(mask);
    return each_float([&](int i) { return lanes.v[i] ? x.v[i] : 0.0f; });
}
// 4, 8 or 16 bytes, over and over.
INLINE B32 repeat4(const std::int8_t *p) {
    return each<std::int8_t>([&](int i) { return p[i % 4]; });
}
INLINE B32 repeat8(const std::int8_t *p) {
    return each<std::int8_t>([&](int i) { return p[i % 8]; });
}
INLINE B32 repeat16(const std::int8_t *p) {
    return each<std::int8_t>([&](int i) { return p[i % 16]; });
}
// Byte i: that of x within the same 16 that index byte i (0 to 15) says.
INLINE B32 pick_bytes(B32 x, B32 index) {
    return each<std::uint8_t>([&](int i) { return x.v[i / 16 * 16 + (index.v[i] & 15)]; });
}
// int16 i: a_2i b_2i + a_2i+1 b_2i+1 of int8, none of which is -128.
INLINE B32 dot2(B32 a, B32 b) {
    const auto x = as<std::int8_t>(a), y = as<std::int8_t>(b);
    return each<std::int16_t>(
        [&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}
// The same for uint8 a, at most 127.
INLINE B32 dot2_unsigned(B32 a, B32 b) {
    const auto y = as<std::int8_t>(b);
    return each<std::int16_t>(
        [&](int i) { return a.v[2 * i] * y.v[2 * i] + a.v[2 * i + 1] * y.v[2 * i + 1]; });
}
INLINE B32 add16(B32 a, B32 b) {
    const auto x = as<std::int16_t>(a), y = as<std::int16_t>(b);
    return each<std::int16_t>([&](int i) { return x.v[i] + y.v[i]; });
}
INLINE B32 add32(B32 a, B32 b) {
    const auto x = as<std::int32_t>(a), y = as<std::int32_t>(b);
    return each<std::int32_t>([&](int i) { return x.v[i] + y.v[i]; });
}
// sum += x, in the register that holds the sum.
INLINE void accumulate16(B32 &sum, B32 x) { sum = add16(sum, x); }
INLINE void accumulate32(B32 &sum, B32 x) { sum = add32(sum, x); }
INLINE B32 add8(B32 a, B32 b) {
    return each<std::uint8_t>([&](int i) { return a.v[i] + b.v[i]; });
}
// Magnitudes of int8, none of which is -128.
INLINE B32 magnitude8(B32 a) {
    const auto x = as<std::int8_t>(a);
    return each<std::int8_t>([&](int i) { return x.v[i] < 0 ? -x.v[i] : x.v[i]; });
}
INLINE B32 subtract32(B32 a, B32 b) {
    const auto x = as<std::int32_t>(a), y = as<std::int32_t>(b);
    return each<std::int32_t>([&](int i) { return x.v[i] - y.v[i]; });
}
INLINE B32 set1_32(std::int32_t x) {
    return each<std::int32_t>([&](int) { return x; });
}
// int32 i: the sum of int16 2i and 2i + 1, times a factor.
INLINE B32 sum_pairs16(B32 a, int factor) {
    const auto x = as<std::int16_t>(a);
    return each<std::int32_t>([&](int i) { return (x.v[2 * i] + x.v[2 * i + 1]) * factor; });
}
// int32 i: a_2i b_2i + a_2i+1 b_2i+1 of int16.
INLINE B32 dot2_16(B32 a, B32 b) {
    const auto x = as<std::int16_t>(a), y = as<std::int16_t>(b);
    return each<std::int32_t>(
        [&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}
// The two low or the two high int8 of each int32 as two int16.
INLINE B32 low_pair16(B32 x) {
    const auto lanes = as<std::int8_t>(x);
    return each<std::int16_t>([&](int i) { return lanes.v[i / 2 * 4 + i % 2]; });
}
INLINE B32 high_pair16(B32 x) { return low_pair16(shift_right32<16>(x)); }
// Lane i: the int8 that is byte Byte of int32 i.
template <int Byte> INLINE F8 byte_to_float(B32 x) {
    const auto lanes = as<std::int8_t>(x);
    return each_float([&](int i) { return float(lanes.v[4 * i + Byte]); });
}
INLINE F8 to_float(B32 x) {
    const auto lanes = as<std::int32_t>(x);
    return each_float([&](int i) { return float(lanes.v[i]); });
}

// first + i of the bits i that are set in the mask, then anything: 8 may be written.
INLINE void store_places(std::uint16_t *to, std::uint64_t mask, int first) {
    for (int i = 0; i < 8; ++i)
        if (mask >> i & 1) *to++ = std::uint16_t(first + i);
}
// Those of the eight bytes at p whose bits are set in the mask, side by side at `to`; it writes 8.
INLINE void compress_bytes(const std::int8_t *p, std::uint64_t mask, std::int8_t *to) {
    std::int8_t kept[8] = {};
    int n = 0;
    for (int i = 0; i < 8; ++i)
        if (mask >> i & 1) kept[n++] = p[i];
    std::memcpy(to, kept, 8);
}
// Lane i: the next of the values at p if bit i of the mask is set, else +0.
template <Type V> INLINE F8 expand_masked(const std::uint8_t *p, std::uint64_t mask) {
    return each_float([&](int i) {
        if (!(mask >> i & 1)) return 0.0f;
        if constexpr (V == Type::fp32) {
            float x;
            std::memcpy(&x, p, 4);
            p += 4;
            return x;
        } else {
            std::uint16_t bits;
            std::memcpy(&bits, p, 2);
            p += 2;
            return V == Type::fp16 ? float_of_half(bits) : float_of_bits(std::uint32_t(bits) << 16);
        }
    });
}

}  // namespace isa::plain
