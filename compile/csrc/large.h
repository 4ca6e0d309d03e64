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
void list_of(const View &m, Index panel, Index from, Index to, std::int32_t step, Index listed,
             float *weights, std::int32_t *places, std::int32_t *counts) {
    const std::uint8_t *bits = m.data + m.starts[panel], *value = bits + m.padded;
    Index before = 0;
    for (Index k = 0; k < from; k += 8) {
        std::uint64_t word;
        std::memcpy(&word, bits + k, 8);
        before += __builtin_popcountll(word);
    }
    value += before * (V == Type::fp32 ? 4 : 2);
    for (int r = 0; r < 8; ++r) counts[r] = std::int32_t(r * listed);
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
    for (int r = 0; r < 8; ++r) counts[r] -= std::int32_t(r * listed);
}

void list_rest(const View &m, Index panel, Index from, Index to, std::int32_t step, Index listed,
               float *weights, std::int32_t *places, std::int32_t *counts) {
    for (int r = 0; r < 8; ++r) counts[r] = 0;
    for (Index s = m.rest_starts[panel]; s < m.rest_starts[panel + 1]; ++s) {
        const auto *words = reinterpret_cast<const std::uint16_t *>(m.rest + s * 32);
        float eight[8];
        store(eight, load_half(words + 8));
        for (int r = 0; r < 8; ++r) {
            if (words[r] < from || words[r] >= to || eight[r] == 0) continue;
            weights[r * listed + counts[r]] = eight[r];
            places[r * listed + counts[r]++] = std::int32_t(words[r] - from) * step;
        }
    }
}

void list(const View &m, Index panel, Index from, Index to, std::int32_t step, Index listed,
          float *weights, std::int32_t *places, std::int32_t *counts) {
    const auto own = m.kind != Kind::bitmask  ? list_rest
                     : m.type == Type::fp32 ? list_of<Type::fp32>
                     : m.type == Type::bf16 ? list_of<Type::bf16>
                                            : list_of<Type::fp16>;
    own(m, panel, from, to, step, listed, weights, places, counts);
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
