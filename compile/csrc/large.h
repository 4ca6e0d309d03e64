// Products with many tokens: a piece of the weights becomes floats in the cache, and every tile of
// tokens runs over it.
#pragma once

#include <algorithm>
#include <utility>

#include "small_floats.h"

namespace isa::ISA {

// Tokens of a tile: as many sums as registers hold beside what they are made of.
constexpr int kTile = Widest::lanes == 16 ? 12 : 6;

// How far behind what a panel holds lies that of the next kTileRows rows, which is read after it.
INLINE Index ahead_of(const View &m, Index panel) {
    return m.starts[std::min(panel + kTileRows / m.height, m.panels)] - m.starts[panel];
}

template <Type V>
void expand_of(const View &m, Index panel, Index from, Index to, float *out) {
    constexpr Index S = kTileRows;
    const std::uint8_t *p = m.data + m.starts[panel];
    const Index ahead = ahead_of(m, panel);
    if (m.kind == Kind::dense) {
        p += from / 2 * kChunk<V>;
        for (Index k = from; k < to; k += 2, p += kChunk<V>, out += 2 * S) {
            F8 first, second;
            fetch(p + ahead);
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
                fetch(p + ahead);
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
                fetch(p + ahead);
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

// Call emit(slot, column, lane, values) for the slots of columns [from, to), whole windows or groups,
// of a block row, counted from 0: eight of its rows from row `lane` on are the values; of four, those
// from lane `lane` on. Weights 0 that fill up a window are slots, too. Returns how many there were.
template <Type V, int Height, typename Emit>
INLINE Index each_float_slot(const View &m, Index panel, Index from, Index to, const Emit &emit) {
    const std::uint8_t *p = m.data + m.starts[panel];
    const Index windows = (m.columns + 255) / 256;
    const auto *counts = reinterpret_cast<const std::uint16_t *>(p);
    const std::uint8_t *offset = p + 2 * windows;
    Index slots = 0, before = 0, slot = 0;
    for (Index w = 0; w < windows; ++w) {
        if (w * 256 < from) before += counts[w];
        slots += counts[w];
    }
    const Index ahead = ahead_of(m, panel);
    p += round_up(2 * windows + slots, 32) + before * Height / 16 * kChunk<V>;
    offset += before;
    for (Index w = from / 256; w < windows && w * 256 < to; ++w)
        for (const std::uint8_t *end = offset + counts[w]; offset < end;) {
            for (int row = 0; row < Height; row += 8, p += kChunk<V>) {
                F8 first, second;
                fetch(p + ahead);
                load_chunk<V>(p, first, second);
                emit(slot, w * 256 + offset[0], row, first);
                emit(slot + 1, w * 256 + offset[1], Height == 4 ? 4 : row, Height == 4 ? first : second);
                if constexpr (Height == 4) {
                    emit(slot + 2, w * 256 + offset[2], 0, second);
                    emit(slot + 3, w * 256 + offset[3], 4, second);
                }
            }
            offset += Height == 4 ? 4 : 2;
            slot += Height == 4 ? 4 : 2;
        }
    return slot;
}

template <Type V, int Height, typename Emit>
INLINE Index each_int_slot(const View &m, Index panel, Index from, Index to, const Emit &emit) {
    constexpr int kHalves = Height == 16 ? 2 : 1, kLanes = Height == 4 ? 2 : 1;
    constexpr int kQuads = V == Type::int4 ? 2 : 1, kStep = 4 * kLanes * kQuads;
    const std::uint8_t *bits = m.data + m.starts[panel];
    const auto *scales = reinterpret_cast<const std::uint16_t *>(bits + round_up(m.padded / 8, 32));
    const auto *p = reinterpret_cast<const std::uint8_t *>(scales + m.padded / m.group * kHalves * 8);
    Index slot = 0;
    for (Index k = 0; k < to; k += m.group, bits += m.group / 8, scales += kHalves * 8) {
        std::uint8_t columns[64];
        int count = 0;
        if (k < from) {
            for (int i = 0; i < m.group / 8; ++i) count += __builtin_popcount(bits[i]);
            p += (count + kStep - 1) / kStep * kHalves * 32;
            continue;
        }
        for (int i = 0; i < m.group / 8; ++i)
            for (unsigned own = bits[i]; own; own &= own - 1)
                columns[count++] = std::uint8_t(i * 8 + __builtin_ctz(own));
        for (int n = 0; n < count; n += kStep)
            for (int row = 0; row < 8 * kHalves; row += 8, p += 32) {
                const F8 scale = load_half(scales + row);
                const B32 bytes = load(p);
                for (int quad = 0; quad < kQuads; ++quad) {
                    B32 own = bytes;
                    if constexpr (V == Type::int4)
                        own = add8(quad ? high_nibbles(bytes) : low_nibbles(bytes), set1_byte(-8));
                    const F8 values[4] = {byte_to_float<0>(own), byte_to_float<1>(own),
                                          byte_to_float<2>(own), byte_to_float<3>(own)};
                    for (int i = 0; i < 4 * kLanes; ++i) {
                        const int at = n + 4 * kLanes * quad + i;
                        if (at < count)
                            emit(slot + at, k + columns[at], row + i / 4 * 4, mul(values[i % 4], scale));
                    }
                }
            }
        slot += count;
    }
    return slot;
}

template <int Height, typename Emit>
INLINE Index each_slot(const View &m, Index panel, Index from, Index to, const Emit &emit) {
    switch (m.type) {
    case Type::fp32: return each_float_slot<Type::fp32, Height>(m, panel, from, to, emit);
    case Type::bf16: return each_float_slot<Type::bf16, Height>(m, panel, from, to, emit);
    case Type::fp16: return each_float_slot<Type::fp16, Height>(m, panel, from, to, emit);
    case Type::int8: return each_int_slot<Type::int8, Height>(m, panel, from, to, emit);
    case Type::int4: return each_int_slot<Type::int4, Height>(m, panel, from, to, emit);
    }
    return 0;
}

void expand(const View &m, Index panel, Index from, Index to, float *out) {
    switch (m.type) {
    case Type::fp32: return expand_of<Type::fp32>(m, panel, from, to, out);
    case Type::bf16: return expand_of<Type::bf16>(m, panel, from, to, out);
    default: return expand_of<Type::fp16>(m, panel, from, to, out);
    }
}

template <int Height>
Index slots_of(const View &m, Index panel, Index from, Index to, Index wide, float *w, std::int32_t *places) {
    return each_slot<Height>(m, panel, from, to, [&](Index slot, Index column, int lane, F8 values) {
        if constexpr (Height == 4) {
            float eight[8];
            store(eight, values);
            std::memcpy(w + slot * 4, eight + lane, 16);
        } else {
            store(w + slot * Height + lane, values);
        }
        places[slot] = std::int32_t((column - from) * wide);
    });
}

Index slots(const View &m, Index panel, Index from, Index to, Index wide, float *w, std::int32_t *places) {
    const auto own = m.height == 16 ? slots_of<16> : m.height == 8 ? slots_of<8> : slots_of<4>;
    return own(m, panel, from, to, wide, w, places);
}

// ---------------------------------------------------------------------------------------- tiles

// A strip has rows times vectors of tokens as sums, as many as registers hold beside what they are made
// of: what is loaded of the activations is used for all of the rows, and a weight for all of the vectors.
constexpr int kStripVectors = 3;
constexpr int kStripRows = Widest::lanes == 16 ? 8 : 4;

Index strip_width(Index tokens) {
    const Index vectors = (tokens + Widest::lanes - 1) / Widest::lanes;
    const Index strips = (vectors + kStripVectors - 1) / kStripVectors;
    return (vectors + strips - 1) / strips * Widest::lanes;
}

template <int Rows, int Vectors, bool Placed>
APART void strip_of(const float *w, int height, const std::int32_t *place, const float *x, Index wide,
                    Index count, float *y) {
    Widest::V acc[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vectors; ++v) acc[r][v] = Widest::load(y + r * wide + Widest::lanes * v);
    for (Index n = 0; n < count; ++n, w += height) {
        const float *inputs = x + (Placed ? place[n] : n * wide);
        Widest::V in[Vectors];
        for (int v = 0; v < Vectors; ++v) in[v] = Widest::load(inputs + Widest::lanes * v);
        for (int r = 0; r < Rows; ++r) {
            const Widest::V weight = Widest::set1(w[r]);
            for (int v = 0; v < Vectors; ++v) acc[r][v] = fma(weight, in[v], acc[r][v]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vectors; ++v) store(y + r * wide + Widest::lanes * v, acc[r][v]);
}

template <int Rows, int Vectors>
void strip_rows(const float *w, int height, const std::int32_t *place, const float *x, Index wide,
                Index count, float *y) {
    const auto own = place ? strip_of<Rows, Vectors, true> : strip_of<Rows, Vectors, false>;
    for (int r = 0; r < height; r += Rows) own(w + r, height, place, x, wide, count, y + r * wide);
}

void strip(const float *w, int height, const std::int32_t *place, const float *x, Index wide, Index count,
           int tokens, float *y) {
    constexpr int kLanes = Widest::lanes;
    const auto own = height == 4           ? (tokens > 2 * kLanes ? strip_rows<4, 3> : tokens > kLanes ? strip_rows<4, 2> : strip_rows<4, 1>)
                     : tokens > 2 * kLanes ? strip_rows<kStripRows, 3>
                     : tokens > kLanes     ? strip_rows<kStripRows, 2>
                                           : strip_rows<8, 1>;
    own(w, height, place, x, wide, count, y);
}

void turn(const float *from, Index wide, Index rows, Index tokens, const float *bias, float *y, Index stride) {
    Index r = 0;
    for (; r + 8 <= rows; r += 8) {
        const F8 added = bias ? load(bias + r) : zero();
        F8 x[8];
        for (int i = 0; i < 8; ++i) x[i] = load(from + (r + i) * wide);
        transpose(x);
        for (Index t = 0; t < tokens; ++t) store(y + t * stride + r, add(x[t], added));
    }
    for (; r < rows; ++r)
        for (Index t = 0; t < tokens; ++t)
            y[t * stride + r] = from[r * wide + t] + (bias ? bias[r] : 0.0f);
}

template <int T>
APART void tile_of(const float *w, const float *x, Index count, float *y) {
    constexpr int kParts = kTileRows / Widest::lanes;
    Widest::V acc[T][kParts];
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < kParts; ++i) acc[t][i] = Widest::load(y + t * kTileRows + Widest::lanes * i);
    for (Index n = 0; n < count; ++n, x += kTile) {
        Widest::V weights[kParts];
        for (int i = 0; i < kParts; ++i, w += Widest::lanes) weights[i] = Widest::load(w);
        for (int t = 0; t < T; ++t) {
            const Widest::V input = Widest::set1(x[t]);
            for (int i = 0; i < kParts; ++i) acc[t][i] = fma(weights[i], input, acc[t][i]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < kParts; ++i) store(y + t * kTileRows + Widest::lanes * i, acc[t][i]);
}

template <int... Before>
void tile_with(std::integer_sequence<int, Before...>, const float *w, const float *x, Index count,
               int tokens, float *y) {
    static constexpr decltype(&tile_of<1>) kOf[] = {tile_of<Before + 1>...};
    kOf[tokens - 1](w, x, count, y);
}

using Widths = std::make_integer_sequence<int, kTile>;

void tile(const float *w, const float *x, Index count, int tokens, float *y) {
    tile_with(Widths(), w, x, count, tokens, y);
}

// ---------------------------------------------------------------------------------- skipped zeros

template <Type V>
void list_of(const View &m, Index panel, Index from, Index to, Index listed, float *weights,
             std::uint16_t *places, std::int32_t *counts, Index *read) {
    constexpr Index kWidth = V == Type::fp32 ? 4 : 2;
    constexpr std::uint64_t kOnes = 0x0101010101010101;  // times this: byte r sums bytes 0 to r
    const std::uint8_t *bits = m.data + m.starts[panel], *value = bits + m.padded + *read;
    for (Index k = from; k < to; k += 8) {
        std::uint64_t masks;  // of eight rows
        std::memcpy(&masks, bits + k, 8);
        fetch(value + 2048);
        fetch(value + 2112);
        std::uint64_t sizes = masks - (masks >> 1 & kOnes * 0x55);
        sizes = (sizes & kOnes * 0x33) + (sizes >> 2 & kOnes * 0x33);
        sizes = (sizes + (sizes >> 4)) & kOnes * 0x0f;
        const std::uint64_t ends = sizes * kOnes, starts = ends << 8;
        for (int r = 0; r < 8; ++r) {
            // All eight are written, and the next ones over those that were too many.
            const std::uint8_t *own = value + (starts >> 8 * r & 255) * kWidth;
            const auto *halves = reinterpret_cast<const std::uint16_t *>(own);
            const Index to_row = r * listed + counts[r];
            if constexpr (V == Type::fp32)
                store(weights + to_row, load(reinterpret_cast<const float *>(own)));
            else store(weights + to_row, V == Type::fp16 ? load_half(halves) : load_bfloat(halves));
            store_places(places + to_row, masks >> 8 * r & 255, int(k - from));
            counts[r] += std::int32_t(sizes >> 8 * r & 255);
        }
        value += (ends >> 56) * kWidth;
    }
    *read = value - bits - m.padded;
}

void list_rest(const View &m, Index panel, Index from, Index to, Index listed, float *weights,
               std::uint16_t *places, std::int32_t *counts, Index *) {
    for (Index s = m.rest_starts[panel]; s < m.rest_starts[panel + 1]; ++s) {
        const auto *words = reinterpret_cast<const std::uint16_t *>(m.rest + s * 32);
        float eight[8];
        store(eight, load_half(words + 8));
        for (int r = 0; r < 8; ++r) {
            if (words[r] < from || words[r] >= to || eight[r] == 0) continue;
            weights[r * listed + counts[r]] = eight[r];
            places[r * listed + counts[r]++] = std::uint16_t(words[r] - from);
        }
    }
}

void list(const View &m, Index panel, Index from, Index to, Index listed, float *weights,
          std::uint16_t *places, std::int32_t *counts, Index *read) {
    for (int r = 0; r < 8; ++r) counts[r] = 0;
    const auto own = m.kind != Kind::bitmask ? list_rest
                     : m.type == Type::fp32  ? list_of<Type::fp32>
                     : m.type == Type::bf16  ? list_of<Type::bf16>
                                             : list_of<Type::fp16>;
    own(m, panel, from, to, listed, weights, places, counts, read);
}

template <int Vectors>
APART void skip_of(const float *w, const std::uint16_t *place, Index listed,
                    const std::int32_t *counts, const float *x, Index wide, float *y, Index stride) {
    for (int r = 0; r < 8; ++r, w += listed, place += listed, y += stride) {
        Widest::V acc[Vectors];
        for (int v = 0; v < Vectors; ++v) acc[v] = Widest::load(y + Widest::lanes * v);
        for (std::int32_t n = 0; n < counts[r]; ++n) {
            const Widest::V weight = Widest::set1(w[n]);
            const float *inputs = x + place[n] * wide;
            for (int v = 0; v < Vectors; ++v)
                acc[v] = fma(weight, Widest::load(inputs + Widest::lanes * v), acc[v]);
        }
        for (int v = 0; v < Vectors; ++v) store(y + Widest::lanes * v, acc[v]);
    }
}

template <int... Before>
void skip_with(std::integer_sequence<int, Before...>, const float *w, const std::uint16_t *place,
               Index listed, const std::int32_t *counts, const float *x, Index wide, int vectors,
               float *y, Index stride) {
    static constexpr decltype(&skip_of<1>) kOf[] = {skip_of<Before + 1>...};
    kOf[(vectors * 8 - 1) / Widest::lanes](w, place, listed, counts, x, wide, y, stride);
}

void skip(const float *w, const std::uint16_t *place, Index listed, const std::int32_t *counts,
          const float *x, Index wide, int vectors, float *y, Index stride) {
    skip_with(std::make_integer_sequence<int, 64 / Widest::lanes>(), w, place, listed, counts, x, wide,
              vectors, y, stride);
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
