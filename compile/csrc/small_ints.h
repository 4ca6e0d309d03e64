// Products of integers with few tokens: the activations are int8, too, in groups.
#pragma once

#include <type_traits>

#include "small_floats.h"

namespace isa::ISA {

template <int T> struct Quads {  // the quantised inputs of T tokens
    const std::int8_t *q[T];
};

#if SIMD_NUMBER(ISA) == SIMD_avx512

// Sums of `quads` quads of a group, each with the next four inputs. The weights are made uint8, and so
// too large by kExcess; two chains of sums, as one waits for itself.
template <Type V> constexpr int kExcess = V == Type::int8 ? 128 : 8;
template <Type V, int T>
INLINE const std::uint8_t *dense_group(const std::uint8_t *p, Index quads, const Quads<T> &in, B32 *acc) {
    B32 odd[T];
    for (int t = 0; t < T; ++t) acc[t] = odd[t] = zero_bytes();
    for (Index k = 0; k < quads; k += 2) {
        prefetch(p + kAheadInt);
        const B32 bytes = load(p);
        B32 first, second;
        if constexpr (V == Type::int8) {
            first = _mm256_xor_si256(bytes, set1_byte(-128));
            second = _mm256_xor_si256(load(p + 32), set1_byte(-128));
            p += 64;
        } else {
            first = low_nibbles(bytes);
            second = high_nibbles(bytes);
            p += 32;
        }
        for (int t = 0; t < T; ++t) {
            acc[t] = dot4_unsigned(acc[t], first, repeat4(in.q[t] + 4 * k));
            odd[t] = dot4_unsigned(odd[t], second, repeat4(in.q[t] + 4 * k + 4));
        }
    }
    for (int t = 0; t < T; ++t) acc[t] = add32(acc[t], odd[t]);
    return p;
}

#else

// Sums of `quads` quads of a group, each with the next four inputs. int4: the weights are too large by 8,
// and eight quads stay below 2^15 = 32768: each adds two products of at most 15 * 127, 30480 in all.
template <Type V> constexpr int kExcess = V == Type::int8 ? 0 : 8;
template <Type V, int T>
INLINE const std::uint8_t *dense_group(const std::uint8_t *p, Index quads, const Quads<T> &in, B32 *acc) {
    for (int t = 0; t < T; ++t) acc[t] = zero_bytes();
    if constexpr (V == Type::int8) {
        for (Index k = 0; k < quads; ++k) {
            prefetch(p + kAheadInt);
            const B32 weights = load(p);
            p += 32;
            for (int t = 0; t < T; ++t) acc[t] = dot4(acc[t], weights, repeat4(in.q[t] + 4 * k));
        }
        return p;
    }
    for (Index from = 0; from < quads; from += 8) {
        B32 sums[T];
        for (int t = 0; t < T; ++t) sums[t] = zero_bytes();
        for (Index k = from; k < from + 8; k += 2) {
            prefetch(p + kAheadInt);
            const B32 weights = load(p), low = low_nibbles(weights), high = high_nibbles(weights);
            p += 32;
            for (int t = 0; t < T; ++t) {
                const B32 a = dot2_unsigned(low, repeat4(in.q[t] + 4 * k));
                const B32 b = dot2_unsigned(high, repeat4(in.q[t] + 4 * k + 4));
                sums[t] = add16(sums[t], add16(a, b));
            }
        }
        for (int t = 0; t < T; ++t) acc[t] = add32(acc[t], sum_pairs16(sums[t], 1));
    }
    return p;
}

#endif

// One quad that picks its inputs, and what its weights are too large by.
template <Type V> struct Picked {
    B32 sum = zero_bytes();     // int8: int32; int4: int16
    B32 excess = zero_bytes();  // int4: int16, the sum of the inputs

    INLINE void add(B32 weights, B32 inputs) {
        if constexpr (V == Type::int8) {
            sum = dot4(sum, weights, inputs);
        } else {
#if SIMD_NUMBER(ISA) == SIMD_avx512
            sum = dot4_unsigned(sum, weights, inputs);
            excess = dot4_unsigned(excess, set1_byte(8), inputs);
#else
            accumulate16(sum, dot2_unsigned(weights, inputs));
            accumulate16(excess, dot2_unsigned(set1_byte(1), inputs));
#endif
        }
    }
    INLINE B32 total() const {
        if constexpr (V == Type::int8) return sum;
#if SIMD_NUMBER(ISA) == SIMD_avx512
        else return subtract32(sum, excess);
#else
        else return subtract32(sum_pairs16(sum, 1), sum_pairs16(excess, 8));
#endif
    }
};

// A group of 2:4. int4: 8 quads of a group of 64 stay below 2^15, as above.
template <Type V, int T>
INLINE const std::uint8_t *picked24(const std::uint8_t *p, Index columns, const Quads<T> &in,
                                    B32 *acc) {
    Picked<V> sums[T];
    const B32 base = pair_base(), two_bits = set1_byte(3);
    for (Index k = 0; k < columns; k += 32) {
        B32 index = load(p);
        p += 32;
        B32 weights = index;  // of int4: the byte of two quads
        for (int quad = 0; quad < 4; ++quad) {
            B32 own;
            if (V == Type::int8 || quad % 2 == 0) {
                prefetch(p + kAheadInt);
                weights = load(p);
                p += 32;
                own = V == Type::int8 ? weights : low_nibbles(weights);
            } else {
                own = high_nibbles(weights);
            }
            const B32 places = either(both(index, two_bits), base);
            index = shift_right32<2>(index);
            for (int t = 0; t < T; ++t)
                sums[t].add(own, pick_bytes(repeat8(in.q[t] + k + 8 * quad), places));
        }
    }
    for (int t = 0; t < T; ++t) acc[t] = sums[t].total();
    return p;
}

// A group of N:16.
template <Type V, int T, int Keep>
INLINE const std::uint8_t *picked16(const std::uint8_t *p, Index columns, const Quads<T> &in,
                                    B32 *acc) {
    Picked<V> sums[T];
    constexpr int kColumns = 128 / Keep;  // of one vector of indices, 2 quads
    for (Index k = 0; k < columns; k += kColumns) {
        const B32 index = load(p);
        prefetch(p + kAheadInt);
        p += 32;
        const B32 first = load(p);
        prefetch(p + kAheadInt);
        p += 32;
        B32 second = first;
        if constexpr (V == Type::int8) {
            second = load(p);
            prefetch(p + kAheadInt);
            p += 32;
        }
        const B32 low = V == Type::int8 ? first : low_nibbles(first);
        const B32 high = V == Type::int8 ? second : high_nibbles(second);
        for (int t = 0; t < T; ++t) {
            const B32 window = repeat16(in.q[t] + k);
            sums[t].add(low, pick_bytes(window, low_nibbles(index)));
            const B32 next = Keep == 8 ? window : repeat16(in.q[t] + k + 16);
            sums[t].add(high, pick_bytes(next, high_nibbles(index)));
        }
    }
    for (int t = 0; t < T; ++t) acc[t] = sums[t].total();
    return p;
}

// What a block row needs of one token: the inputs of its kept columns, of each group filled up with
// zeros to `Step`; and of each Step of them the number of the group. Returns how many there are.
template <int G, int Step>
INLINE Index compress(const std::uint8_t *bits, Index groups, const std::int8_t *q, std::int8_t *out,
                      std::uint16_t *group_of, const std::uint8_t *ahead) {
    const std::int8_t *begin = out;
    for (Index g = 0; g < groups; ++g) {
        std::int8_t *to = out;
        for (int i = 0; i < G / kCompressed; ++i, bits += kCompressed / 8, q += kCompressed) {
            std::uint64_t own = 0;
            std::memcpy(&own, bits, kCompressed / 8);
            for (int j = 0; j < kCompressed / 8; ++j, ahead += 64) prefetch(ahead);  // the weights that come next
            compress_bytes(q, own, to);
            to += __builtin_popcountll(own);
        }
        std::memset(to, 0, 16);
        const Index steps = (to - out + Step - 1) / Step;
        for (int i = 0; i < G / Step; ++i) group_of[i] = std::uint16_t(g);
        out += steps * Step;
        group_of += steps;
    }
    return out - begin;
}

// The inputs of one vector of weights.
template <int Height> INLINE B32 inputs_of(const std::int8_t *q) {
    static constexpr std::uint8_t kSplit[32] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,
                                                4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7};
    if constexpr (Height == 4) return pick_bytes(repeat8(q), load(kSplit));
    else return repeat4(q);
}

#if SIMD_NUMBER(ISA) == SIMD_avx512
// The steps of int_vector, sixteen rows at once.
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
        prefetch(at + kAheadInt);
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
#endif

// Kept columns of block rows. Every step has its own factor, so that no loop ends with a group:
// groups keep unequal numbers, and a processor cannot guess where each ends.
template <Type V, int Height, int G>
APART void int_vector(const View &m, Index panel, const Inputs &in, float *y, std::uint8_t *scratch) {
    constexpr int kHalves = Height == 16 ? 2 : 1, kWidth = Height == 4 ? 8 : 4;
    constexpr int kStep = V == Type::int4 ? 2 * kWidth : kWidth;
    const Index groups = m.padded / G;
    float *factors = reinterpret_cast<float *>(scratch);  // [groups, 8 * kHalves]
    auto *group_of = reinterpret_cast<std::uint16_t *>(scratch + groups * kHalves * 32);
    auto *kept = reinterpret_cast<std::int8_t *>(group_of + m.padded / 4 + groups + 16);
    const std::uint8_t *bits = m.data + m.starts[panel];
    const std::uint8_t *scales = bits + round_up(m.padded / 8, 32);
    const std::uint8_t *p = scales + groups * kHalves * 16;
    const Index count = compress<G, kStep>(bits, groups, in.q, kept, group_of, p);
    for (Index i = 0; i < groups * kHalves; ++i)
        store(factors + 8 * i,
              mul(load_half(reinterpret_cast<const std::uint16_t *>(scales) + 8 * i),
                  set1(in.scale[i / kHalves])));
    const std::uint16_t *group = group_of;
    float *out = y + panel * Height;
#if SIMD_NUMBER(ISA) == SIMD_avx512
    if constexpr (Height == 16) return sixteen_rows<V>(p, kept, count, group, factors, out);
#endif
    F8 sums[kHalves];
    for (int h = 0; h < kHalves; ++h) sums[h] = zero();
    for (Index k = 0; k < count; k += kStep, ++group) {
        const float *factor = factors + Index(*group) * 8 * kHalves;
        const B32 x = inputs_of<Height>(kept + k);
        B32 next = x, excess = x;
        if constexpr (V == Type::int4) {
            next = inputs_of<Height>(kept + k + kWidth);
            const B32 one = set1_byte(1);
            excess = add16(dot2_unsigned(one, x), dot2_unsigned(one, next));
            excess = sum_pairs16(excess, 8);
        }
        for (int h = 0; h < kHalves; ++h) {
            prefetch(p + kAheadInt);
            const B32 weights = load(p);
            p += 32;
            B32 whole;
            if constexpr (V == Type::int8) {
                whole = dot4(zero_bytes(), x, weights);  // |x| is found once for all rows
            } else {
                const B32 a = dot2_unsigned(low_nibbles(weights), x);
                const B32 b = dot2_unsigned(high_nibbles(weights), next);
                whole = subtract32(sum_pairs16(add16(a, b), 1), excess);
            }
            sums[h] = fma(to_float(whole), load(factor + 8 * h), sums[h]);
        }
    }
    if constexpr (Height == 4) write(out, fold_halves(sums[0]), 4);
    else
        for (int h = 0; h < kHalves; ++h) store(out + 8 * h, sums[h]);
}

enum class Form { dense, two_of_four, four_of_16, eight_of_16 };

template <Type V, int T, int G, Form F>
APART void int_panels(const View &m, Index first, Index last, const Inputs &in, float *y, Index stride) {
    const Index groups = m.padded / G;
    for (Index panel = first; panel < last; ++panel) {
        const std::uint8_t *p = m.data + m.starts[panel];
        F8 sums[T];
        Quads<T> quads;
        for (int t = 0; t < T; ++t) {
            sums[t] = zero();
            quads.q[t] = in.q + t * in.padded;
        }
        for (Index g = 0; g < groups; ++g) {
            const F8 scale = load_half(reinterpret_cast<const std::uint16_t *>(p));
            p += 16;
            B32 acc[T];
            if constexpr (F == Form::dense) p = dense_group<V, T>(p, G / 4, quads, acc);
            else if constexpr (F == Form::two_of_four) p = picked24<V, T>(p, G, quads, acc);
            else if constexpr (F == Form::four_of_16) p = picked16<V, T, 4>(p, G, quads, acc);
            else p = picked16<V, T, 8>(p, G, quads, acc);
            for (int t = 0; t < T; ++t) {
                if constexpr (F == Form::dense && kExcess<V> > 0)
                    acc[t] = subtract32(acc[t], set1_32(kExcess<V> * in.total[t * in.groups + g]));
                const F8 factor = mul(scale, set1(in.scale[t * in.groups + g]));
                sums[t] = fma(to_float(acc[t]), factor, sums[t]);
                quads.q[t] += G;
            }
        }
        const Index row = panel * 8;
        for (int t = 0; t < T; ++t) {
            if (m.rest_starts) sums[t] = add_rest(m, panel, in.x + t * in.stride, sums[t]);
            write(y + t * stride + row, sums[t], m.rows - row);
        }
    }
}

template <Type V, int T, int G>
void small_ints(const View &m, Index first, Index last, const Inputs &in, float *y, Index stride,
                float *scratch) {
    if (m.kind == Kind::vector) {
        auto *room = reinterpret_cast<std::uint8_t *>(scratch);
        for (Index panel = first; panel < last; ++panel)  // each is in the cache after one token
            for (int t = 0; t < T; ++t) {
                Inputs one = in;
                one.q += t * in.padded;
                one.scale += t * in.groups;
                float *out = y + t * stride;
                if (m.height == 16) int_vector<V, 16, G>(m, panel, one, out, room);
                else if (m.height == 8) int_vector<V, 8, G>(m, panel, one, out, room);
                else int_vector<V, 4, G>(m, panel, one, out, room);
            }
    } else if (m.kind == Kind::dense) {
        int_panels<V, T, G, Form::dense>(m, first, last, in, y, stride);
    } else if (m.window == 4) {
        int_panels<V, T, G, Form::two_of_four>(m, first, last, in, y, stride);
    } else if (m.keep == 4) {
        int_panels<V, T, G, Form::four_of_16>(m, first, last, in, y, stride);
    } else {
        int_panels<V, T, G, Form::eight_of_16>(m, first, last, in, y, stride);
    }
}

// A group with an infinite or NaN input gets the scale NaN, and with it every output of the token.
void quantize(const float *x, Index columns, Index padded, int group, std::int8_t *q, float *scale,
              std::int32_t *total) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    for (Index g = 0; g * group < padded; ++g) {
        const Index from = g * group, here = columns - from < group ? columns - from : group;
        std::int32_t largest = 0, sum = 0;
        for (Index i = 0; i < here; ++i) {
            std::int32_t bits;
            std::memcpy(&bits, x + from + i, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        float peak;
        std::memcpy(&peak, &largest, 4);
        const bool finite = largest < 0x7f800000, tiny = peak < 0x1p-100f;
        const float factor = finite && !tiny ? 127.0f / peak : 0.0f;
        std::int8_t *out = q + from;
        if (factor == 0.0f) {
            std::memset(out, 0, std::size_t(group));
        } else {
            for (Index i = 0; i < here; ++i)
                out[i] = std::int8_t(int((x[from + i] * factor + kRound) - kRound));
            for (Index i = here; i < group; ++i) out[i] = 0;
            for (Index i = 0; i < group; ++i) sum += out[i];
        }
        scale[g] = !finite ? std::nanf("") : tiny ? 0.0f : peak / 127.0f;
        total[g] = sum;
    }
}

// Call f(type, group, keep) with what the matrix has, all of them known to the compiler; keep is 0
// if it is dense.
template <Type V, int G, typename Function> INLINE void with_keep(const View &m, const Function &f) {
    constexpr std::integral_constant<Type, V> type;
    constexpr std::integral_constant<int, G> group;
    if (m.kind == Kind::dense) f(type, group, std::integral_constant<int, 0>());
    else if (m.window == 4) f(type, group, std::integral_constant<int, 2>());
    else if (m.keep == 4) f(type, group, std::integral_constant<int, 4>());
    else f(type, group, std::integral_constant<int, 8>());
}
template <typename Function> INLINE void with_known(const View &m, const Function &f) {
    if (m.type == Type::int8)
        m.group == 64 ? with_keep<Type::int8, 64>(m, f) : with_keep<Type::int8, 32>(m, f);
    else
        m.group == 64 ? with_keep<Type::int4, 64>(m, f) : with_keep<Type::int4, 32>(m, f);
}

}  // namespace isa::ISA
