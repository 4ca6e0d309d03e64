// Products with many tokens: a piece of the weights becomes floats in the cache, and every tile of
// tokens runs over it.
#pragma once

#include "small.h"

namespace isa::ISA {

template <Type V>
void expand_of(const View &m, Index panel, Index from, Index to, float *out) {
    constexpr Index S = kTileRows;
    const std::uint8_t *p = m.data + m.starts[panel];
    if (m.kind == Kind::dense) {
        p += from / 2 * kChunk<V>;
        for (Index k = from; k < to; k += 2, p += kChunk<V>, out += 2 * S) {
            F8 first, second;
            load_chunk<V>(p, first, second);
            store(out, first);
            store(out + S, second);
        }
        return;
    }
    if (m.window == 4) {
        p += from / 32 * (32 + 8 * kChunk<V>);
        for (Index k = from; k < to; k += 32) {
            B32 index = load(p);
            p += 32;
            for (int w = 0; w < 8; ++w, p += kChunk<V>, out += 4 * S) {
                F8 first, second;
                load_chunk<V>(p, first, second);
                const B32 a = both(index, set1_32(3)), b = both(shift_right32<2>(index), set1_32(3));
                for (int c = 0; c < 4; ++c)
                    store(out + c * S,
                          add(where(equal32(a, c), first), where(equal32(b, c), second)));
                index = shift_right32<4>(index);
            }
        }
        return;
    }
    const int windows = 8 / m.keep;
    p += from / (16 * windows) * (32 + 4 * kChunk<V>);
    for (Index k = from; k < to; k += 16 * windows) {
        B32 index = load(p);
        p += 32;
        for (int w = 0; w < windows; ++w, out += 16 * S) {
            for (int c = 0; c < 16; ++c) store(out + c * S, zero());
            for (int pair = 0; pair < m.keep / 2; ++pair, p += kChunk<V>) {
                F8 first, second;
                load_chunk<V>(p, first, second);
                const B32 a = both(index, set1_32(15));
                const B32 b = both(shift_right32<4>(index), set1_32(15));
                for (int c = 0; c < 16; ++c)
                    store(out + c * S,
                          add(load(out + c * S),
                              add(where(equal32(a, c), first), where(equal32(b, c), second))));
                index = shift_right32<8>(index);
            }
        }
    }
}

void expand(const View &m, Index panel, Index from, Index to, float *out) {
    switch (m.type) {
    case Type::fp32: return expand_of<Type::fp32>(m, panel, from, to, out);
    case Type::bf16: return expand_of<Type::bf16>(m, panel, from, to, out);
    default: return expand_of<Type::fp16>(m, panel, from, to, out);
    }
}

template <Type V>
void slots_of(const View &m, Index panel, float *w, std::int32_t *places) {
    const std::uint8_t *p = m.data + m.starts[panel];
    const Index windows = (m.columns + 255) / 256;
    const auto *counts = reinterpret_cast<const std::uint16_t *>(p);
    const std::uint8_t *offset = p + 2 * windows;
    std::int32_t *place = places + windows + 1;
    std::int32_t n = 0;
    for (Index i = 0; i < windows; ++i) {
        places[i] = n;
        for (const std::int32_t end = n + counts[i]; n < end; ++n)
            place[n] = std::int32_t(i * 256 + *offset++) * kTile;
    }
    places[windows] = n;
    p += round_up(2 * windows + n, 32);
    for (Index slot = 0; slot < n; slot += 2, w += 2 * kTileRows)
        for (int h = 0; h < 2; ++h, p += kChunk<V>) {
            F8 first, second;
            load_chunk<V>(p, first, second);
            store(w + 8 * h, first);
            store(w + kTileRows + 8 * h, second);
        }
}

void slots(const View &m, Index panel, float *w, std::int32_t *places) {
    switch (m.type) {
    case Type::fp32: return slots_of<Type::fp32>(m, panel, w, places);
    case Type::bf16: return slots_of<Type::bf16>(m, panel, w, places);
    default: return slots_of<Type::fp16>(m, panel, w, places);
    }
}

template <int T, bool Placed>
INLINE void tile_of(const float *w, const std::int32_t *place, const float *x, Index count,
                    float *y) {
    F8 acc[T][2];
    for (int t = 0; t < T; ++t) {
        acc[t][0] = load(y + t * kTileRows);
        acc[t][1] = load(y + t * kTileRows + 8);
    }
    for (Index n = 0; n < count; ++n) {
        const F8 low = load(w), high = load(w + 8);
        w += kTileRows;
        const float *inputs = Placed ? x + place[n] : x + n * kTile;
        for (int t = 0; t < T; ++t) {
            const F8 input = set1(inputs[t]);
            acc[t][0] = fma(low, input, acc[t][0]);
            acc[t][1] = fma(high, input, acc[t][1]);
        }
    }
    for (int t = 0; t < T; ++t) {
        store(y + t * kTileRows, acc[t][0]);
        store(y + t * kTileRows + 8, acc[t][1]);
    }
}

template <bool Placed>
void tile_with(const float *w, const std::int32_t *place, const float *x, Index count, int tokens,
               float *y) {
    switch (tokens) {
    case 1: return tile_of<1, Placed>(w, place, x, count, y);
    case 2: return tile_of<2, Placed>(w, place, x, count, y);
    case 3: return tile_of<3, Placed>(w, place, x, count, y);
    case 4: return tile_of<4, Placed>(w, place, x, count, y);
    case 5: return tile_of<5, Placed>(w, place, x, count, y);
    default: return tile_of<6, Placed>(w, place, x, count, y);
    }
}

void tile(const float *w, const std::int32_t *place, const float *x, Index count, int tokens,
          float *y) {
    if (place) tile_with<true>(w, place, x, count, tokens, y);
    else tile_with<false>(w, place, x, count, tokens, y);
}

// ---------------------------------------------------------------------------------- skipped zeros

template <Type V>
void list_of(const View &m, Index panel, Index from, Index to, std::int32_t step, float *weights,
             std::int32_t *places, std::int32_t *counts) {
    const std::uint8_t *bits = m.data + m.starts[panel], *value = bits + m.padded;
    Index before = 0;
    for (Index k = 0; k < from; k += 8) {
        std::uint64_t word;
        std::memcpy(&word, bits + k, 8);
        before += __builtin_popcountll(word);
    }
    value += before * (V == Type::fp32 ? 4 : 2);
    for (int r = 0; r < 8; ++r) counts[r] = r * kListed;
    for (Index k = from; k < to; k += 8)
        for (int r = 0; r < 8; ++r) {
            // All eight are written, and the next ones over those that were too many.
            const std::uint64_t own = bits[k + r];
            if constexpr (V == Type::fp32)
                store(weights + counts[r], load(reinterpret_cast<const float *>(value)));
            else if constexpr (V == Type::fp16)
                store(weights + counts[r], load_half(reinterpret_cast<const std::uint16_t *>(value)));
            else
                store(weights + counts[r], load_bfloat(reinterpret_cast<const std::uint16_t *>(value)));
            store_places(places + counts[r], own, std::int32_t(k - from), step);
            counts[r] += int(__builtin_popcountll(own));
            value += std::uint64_t(__builtin_popcountll(own)) * (V == Type::fp32 ? 4 : 2);
        }
    for (int r = 0; r < 8; ++r) counts[r] -= r * kListed;
}

void list(const View &m, Index panel, Index from, Index to, std::int32_t step, float *weights,
          std::int32_t *places, std::int32_t *counts) {
    switch (m.type) {
    case Type::fp32: return list_of<Type::fp32>(m, panel, from, to, step, weights, places, counts);
    case Type::bf16: return list_of<Type::bf16>(m, panel, from, to, step, weights, places, counts);
    default: return list_of<Type::fp16>(m, panel, from, to, step, weights, places, counts);
    }
}

template <int Vectors>
INLINE void skip_of(const float *w, const std::int32_t *place, Index count, const float *x, float *y) {
    F8 acc[Vectors];
    for (int v = 0; v < Vectors; ++v) acc[v] = load(y + 8 * v);
    for (Index n = 0; n < count; ++n) {
        const F8 weight = set1(w[n]);
        const float *inputs = x + place[n];
        for (int v = 0; v < Vectors; ++v) acc[v] = fma(weight, load(inputs + 8 * v), acc[v]);
    }
    for (int v = 0; v < Vectors; ++v) store(y + 8 * v, acc[v]);
}

void skip(const float *w, const std::int32_t *place, Index count, const float *x, int vectors,
          float *y) {
    switch (vectors) {
    case 1: return skip_of<1>(w, place, count, x, y);
    case 2: return skip_of<2>(w, place, count, x, y);
    case 3: return skip_of<3>(w, place, count, x, y);
    case 4: return skip_of<4>(w, place, count, x, y);
    case 5: return skip_of<5>(w, place, count, x, y);
    case 6: return skip_of<6>(w, place, count, x, y);
    case 7: return skip_of<7>(w, place, count, x, y);
    default: return skip_of<8>(w, place, count, x, y);
    }
}

// ---------------------------------------------------------------------------------- integers

// Four bytes of a row become two steps of two int16.
INLINE void store_wide(std::uint8_t *out, B32 quad) {
    store(out, low_pair16(quad));
    store(out + 64, high_pair16(quad));
}

// The dense quad of a window: byte c is the kept one whose index is c, else `none`.
INLINE B32 spread_window(B32 values, B32 index, B32 first, B32 second, B32 none) {
    const B32 columns = set1_32(0x03020100);
    const B32 a = equal8(pick_bytes(index, first), columns);
    const B32 b = but_not(equal8(pick_bytes(index, second), columns), a);  // a slot to fill up is 0
    const B32 kept = either(both(a, pick_bytes(values, first)), both(b, pick_bytes(values, second)));
    return either(kept, but_not(none, either(a, b)));
}

template <Type V, int G>
void expand_ints_of(const View &m, Index panel, Index first, Index groups, std::uint8_t *out,
                    float *scales) {
    constexpr Index kQuad = V == Type::int8 ? 128 : 64;  // bytes of a quad of 16 rows
    const bool dense = m.kind == Kind::dense;
    const Index whole = dense ? 16 + G * 8 / (V == Type::int8 ? 1 : 2)
                              : 16 + G + G * 4 / (V == Type::int8 ? 1 : 2);
    const std::uint8_t *p = m.data + m.starts[panel] + first * whole;
    const B32 none = set1_byte(V == Type::int8 ? 0 : 8), two_bits = set1_byte(3);
    const B32 place[4] = {lane_byte(0), lane_byte(1), lane_byte(2), lane_byte(3)};
    const auto put = [&](B32 quad) {
        if constexpr (V == Type::int8) store_wide(out, quad);
        else store(out, quad);
        out += kQuad;
    };
    for (Index g = 0; g < groups; ++g) {
        store(scales + g * kTileRows, load_half(reinterpret_cast<const std::uint16_t *>(p)));
        p += 16;
        if (dense) {
            for (int k = 0; k < G / 4; k += V == Type::int8 ? 1 : 2, p += 32) {
                const B32 weights = load(p);
                put(V == Type::int8 ? weights : low_nibbles(weights));
                if (V == Type::int4) put(high_nibbles(weights));
            }
            continue;
        }
        for (int block = 0; block < G / 32; ++block) {
            B32 index = load(p), weights = index;
            p += 32;
            for (int quad = 0; quad < 4; ++quad) {
                if (V == Type::int8 || quad % 2 == 0) {
                    weights = load(p);
                    p += 32;
                }
                const B32 own = V == Type::int8 ? weights
                                : quad % 2 == 0 ? low_nibbles(weights)
                                                : high_nibbles(weights);
                const B32 now = both(index, two_bits);
                index = shift_right32<2>(index);
                put(spread_window(own, now, place[0], place[1], none));
                put(spread_window(own, now, place[2], place[3], none));
            }
        }
    }
}

void expand_ints(const View &m, Index panel, Index first, Index groups, std::uint8_t *out,
                 float *scales) {
    if (m.type == Type::int8)
        m.group == 64 ? expand_ints_of<Type::int8, 64>(m, panel, first, groups, out, scales)
                      : expand_ints_of<Type::int8, 32>(m, panel, first, groups, out, scales);
    else
        m.group == 64 ? expand_ints_of<Type::int4, 64>(m, panel, first, groups, out, scales)
                      : expand_ints_of<Type::int4, 32>(m, panel, first, groups, out, scales);
}

template <Type V, int G, int T>
INLINE void tile_ints_of(const std::uint8_t *w, const float *scales, const std::uint8_t *x,
                         const float *factors, Index groups, float *y) {
    // int4: eight steps of sums in int16, see dense4.
    constexpr int kSteps = V == Type::int8 ? G / 2 : 8, kParts = V == Type::int8 ? 1 : G / 32;
    for (Index g = 0; g < groups; ++g) {
        B32 whole[T][2];
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
                        acc[t][h] = V == Type::int8
                                        ? add32(acc[t][h], dot2_16(weights, inputs))
                                        : add16(acc[t][h], dot2_unsigned(weights, inputs));
                        settle(acc[t][h]);
                    }
                }
            }
            for (int t = 0; t < T; ++t)
                for (int h = 0; h < 2; ++h) {
                    if constexpr (V == Type::int8) whole[t][h] = acc[t][h];
                    else if (part == 0) whole[t][h] = sum_pairs16(acc[t][h], 1);
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

template <Type V, int G>
void tile_ints_with(const std::uint8_t *w, const float *scales, const std::uint8_t *x,
                    const float *factors, Index groups, int tokens, float *y) {
    // Tiles are filled up with tokens of 0, so two widths are enough.
    if (tokens <= 3) tile_ints_of<V, G, 3>(w, scales, x, factors, groups, y);
    else tile_ints_of<V, G, 6>(w, scales, x, factors, groups, y);
}

void tile_ints(Type type, int group, const std::uint8_t *w, const float *scales,
               const std::uint8_t *x, const float *factors, Index groups, int tokens, float *y) {
    if (type == Type::int8)
        group == 64 ? tile_ints_with<Type::int8, 64>(w, scales, x, factors, groups, tokens, y)
                    : tile_ints_with<Type::int8, 32>(w, scales, x, factors, groups, tokens, y);
    else
        group == 64 ? tile_ints_with<Type::int4, 64>(w, scales, x, factors, groups, tokens, y)
                    : tile_ints_with<Type::int4, 32>(w, scales, x, factors, groups, tokens, y);
}

std::uint64_t checksum(const std::uint64_t *words, Index count) {
    const auto *p = reinterpret_cast<const std::uint8_t *>(words);
    B32 sums[4] = {zero_bytes(), zero_bytes(), zero_bytes(), zero_bytes()};
    Index i = 0;
    for (; i + 16 <= count; i += 16, p += 128) {
        prefetch(p + 2048);
        prefetch(p + 2112);
        for (int j = 0; j < 4; ++j) sums[j] = add32(sums[j], load(p + 32 * j));
    }
    std::uint8_t bytes[32];
    store(bytes, add32(add32(sums[0], sums[1]), add32(sums[2], sums[3])));
    std::uint64_t total = 0, word;
    for (int j = 0; j < 4; ++j) {
        std::memcpy(&word, bytes + 8 * j, 8);
        total += word;
    }
    for (; i < count; ++i) total += words[i];
    return total;
}

}  // namespace isa::ISA
