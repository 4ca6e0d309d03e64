// Products of integers with many tokens: a piece of the weights is brought into the order of the
// activations' steps, and every tile of tokens runs over it.
#pragma once

#include <algorithm>

#include "large.h"
#include "small_ints.h"

namespace isa::ISA {

// Steps::pairs and quads: four bytes of a row, as two steps of two int16 or as they are.
template <Type V, int G>
void expand_dense(const View &m, Index panel, int half, Index first, Index groups,
                  std::uint8_t *out, float *scales) {
    constexpr Index kBytes = V == Type::int8 ? G * 8 : G * 4;
    const std::uint8_t *p = m.data + m.starts[panel] + first * (16 + kBytes);
    const Index ahead = ahead_of(m, panel);
    out += 32 * half;
    for (Index g = 0; g < groups; ++g, scales += kTileRows) {
        store(scales + 8 * half, load_half(reinterpret_cast<const std::uint16_t *>(p)));
        p += 16;
        for (const std::uint8_t *end = p + kBytes; p < end; p += 32, out += 128) {
            const B32 bytes = load(p);
            fetch(p + ahead);
            store(out, V == Type::int8 ? low_pair16(bytes) : low_nibbles(bytes));
            store(out + 64, V == Type::int8 ? high_pair16(bytes) : high_nibbles(bytes));
        }
    }
}

// Steps::signs and windows: of each quad the weights, and which byte of its step each one meets.
template <Type V, int G, int Keep>
void expand_picked(const View &m, Index panel, int half, Index first, Index groups,
                   std::uint8_t *out, float *scales) {
    constexpr int kServed = Keep == 2 ? 4 : 2;  // quads of a vector of indices
    constexpr int kSlots = Keep == 2 ? G / 2 : G / 16 * Keep, kBlocks = kSlots / 4 / kServed;
    constexpr Index kBytes = kBlocks * 32 + kSlots * (V == Type::int8 ? 8 : 4);
    const std::uint8_t *p = m.data + m.starts[panel] + first * (16 + kBytes);
    const Index ahead = ahead_of(m, panel);
    out += kSlots * 16 * half;
    for (Index g = 0; g < groups; ++g, scales += kTileRows, out += kSlots * 16) {
        store(scales + 8 * half, load_half(reinterpret_cast<const std::uint16_t *>(p)));
        p += 16;
        for (int block = 0; block < kBlocks; ++block) {
            B32 index = load(p), bytes = index;
            p += 32;
            for (int quad = 0; quad < kServed; ++quad, out += 64) {
                if (V == Type::int8 || quad % 2 == 0) {
                    bytes = load(p);
                    fetch(p + ahead);
                    p += 32;
                }
                B32 weights = bytes, places = low_nibbles(index);
                if constexpr (V == Type::int4)
                    weights = add8(quad % 2 ? high_nibbles(bytes) : low_nibbles(bytes), set1_byte(-8));
                if constexpr (Keep == 2) {
                    const B32 negative = both(shift_right32<4>(weights), set1_byte(8));
                    places = either(both(places, set1_byte(3)), either(pair_base(), negative));
                    weights = magnitude8(weights);
                }
                index = shift_right32<Keep == 2 ? 2 : 4>(index);
                store(out, weights);
                store(out + 32, places);
            }
        }
    }
}

template <Type V, int G, int T>
APART void tile_dense(const std::uint8_t *w, const float *scales, const std::uint8_t *x,
                      const float *factors, const std::int32_t *begin, Index groups, float *y) {
    // int4: eight steps of sums in int16, see dense_group.
    constexpr int kSteps = V == Type::int8 ? G / 2 : 8, kParts = V == Type::int8 ? 1 : G / 32;
    for (Index g = 0; g < groups; ++g) {
        B32 whole[T][2];
        for (int t = 0; t < T; ++t) {
            const bool uneven = V == Type::int4;
            whole[t][0] = whole[t][1] = uneven ? set1_32(begin[g * kTile + t]) : zero_bytes();
        }
        for (int part = 0; part < kParts; ++part) {
            B32 acc[T][2];
            for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = zero_bytes();
#pragma GCC unroll 4
            for (int k = 0; k < kSteps; ++k, w += 64, x += 4 * kTile) {
                const B32 low = load(w), high = load(w + 32);
                for (int t = 0; t < T; ++t) {
                    const B32 inputs = repeat4(reinterpret_cast<const std::int8_t *>(x + 4 * t));
                    for (int h = 0; h < 2; ++h) {
                        const B32 weights = h ? high : low;
                        if constexpr (V == Type::int8)
                            accumulate32(acc[t][h], dot2_16(weights, inputs));
                        else accumulate16(acc[t][h], dot2_unsigned(weights, inputs));
                    }
                }
            }
            for (int t = 0; t < T; ++t)
                for (int h = 0; h < 2; ++h) {
                    if constexpr (V == Type::int8) whole[t][h] = acc[t][h];
                    else whole[t][h] = add32(whole[t][h], sum_pairs16(acc[t][h], 1));
                }
        }
        const F8 scale[2] = {load(scales + g * kTileRows), load(scales + g * kTileRows + 8)};
        for (int t = 0; t < T; ++t) {
            const F8 factor = set1(factors[g * kTile + t]);
            for (int h = 0; h < 2; ++h) {
                float *out = y + t * kTileRows + 8 * h;
                store(out, fma(mul(to_float(whole[t][h]), scale[h]), factor, load(out)));
            }
        }
    }
}

// A step holds eight activations and their negatives (weights are magnitudes then), or sixteen.
template <Type V, int G, int T, int Keep>
APART void tile_picked(const std::uint8_t *w, const float *scales, const std::uint8_t *x,
                        const float *factors, Index groups, float *y) {
    constexpr int kQuads = Keep == 2 ? G / 8 : G * Keep / 64;
    constexpr int kShared = Keep == 8 ? 2 : 1;  // quads of a step
    for (int half = 0; half < 2; ++half) {
        F8 sums[T];
        for (int t = 0; t < T; ++t) sums[t] = load(y + t * kTileRows + 8 * half);
        const std::uint8_t *in = x;
        for (Index g = 0; g < groups; ++g) {
            const std::uint8_t *p = w + (2 * g + half) * kQuads * 64;
            B32 acc[T];
            for (int t = 0; t < T; ++t) acc[t] = zero_bytes();
#pragma GCC unroll 2
            for (int quad = 0; quad < kQuads; ++quad, p += 64) {
                const B32 weights = load(p), places = load(p + 32);
                for (int t = 0; t < T; ++t) {
                    const auto *step = reinterpret_cast<const std::int8_t *>(in + 16 * t);
                    const B32 picked = pick_bytes(repeat16(step), places);
                    const B32 products =
                        Keep == 2 ? dot2_unsigned(weights, picked) : dot2(weights, picked);
                    // int4: a group's 16 products of at most 7 * 127 fit into int16.
                    if constexpr (V == Type::int8) accumulate32(acc[t], sum_pairs16(products, 1));
                    else accumulate16(acc[t], products);
                }
                if (quad % kShared == kShared - 1) in += 16 * kTile;
            }
            const F8 scale = load(scales + g * kTileRows + 8 * half);
            for (int t = 0; t < T; ++t) {
                const B32 whole = V == Type::int8 ? acc[t] : sum_pairs16(acc[t], 1);
                const F8 factor = set1(factors[g * kTile + t]);
                sums[t] = fma(mul(to_float(whole), scale), factor, sums[t]);
            }
        }
        for (int t = 0; t < T; ++t) store(y + t * kTileRows + 8 * half, sums[t]);
    }
}

Steps steps(const View &m) {
    if (m.kind == Kind::dense) return m.type == Type::int8 ? Steps::pairs : Steps::quads;
    return m.window == 4 ? Steps::signs : Steps::windows;
}

void expand_ints(const View &m, Index unit, Index first, Index groups, std::uint8_t *out, float *scales) {
    for (int half = 0; half < 2; ++half) {
        const Index panel = std::min(unit * 2 + half, m.panels - 1);
        with_known(m, [&](auto type, auto group, auto keep) {
            if constexpr (keep.value == 0)
                expand_dense<type.value, group.value>(m, panel, half, first, groups, out, scales);
            else
                expand_picked<type.value, group.value, keep.value>(m, panel, half, first, groups, out, scales);
        });
    }
}

template <int T>
void tile_ints_of(const View &m, const std::uint8_t *w, const float *scales, const std::uint8_t *x,
                  const float *factors, const std::int32_t *begin, Index groups, float *y) {
    with_known(m, [&](auto type, auto group, auto keep) {
        if constexpr (keep.value == 0)
            tile_dense<type.value, group.value, T>(w, scales, x, factors, begin, groups, y);
        else
            tile_picked<type.value, group.value, T, keep.value>(w, scales, x, factors, groups, y);
    });
}

void tile_ints(const View &m, const std::uint8_t *w, const float *scales, const std::uint8_t *x,
               const float *factors, const std::int32_t *begin, Index groups, int tokens, float *y) {
    // Tiles are filled up with tokens of 0, so two widths are enough.
    if (tokens <= kTile / 2) tile_ints_of<kTile / 2>(m, w, scales, x, factors, begin, groups, y);
    else tile_ints_of<kTile>(m, w, scales, x, factors, begin, groups, y);
}

// Blocks multiply in floats.
constexpr decltype(Kernels::quads) quads = nullptr;
constexpr decltype(Kernels::strip_ints) strip_ints = nullptr;

}  // namespace isa::ISA
