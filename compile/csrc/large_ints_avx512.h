// Products of integers with many tokens, with AVX-512, where one instruction multiplies four bytes in each of
// sixteen lanes. The lanes are rows, and every piece of the weights becomes dense bytes in the cache; or, of
// blocks, they are tokens, whose activations are gathered for four kept columns at a time.
#pragma once

#include <algorithm>

#include "large.h"
#include "small_ints.h"

namespace isa::ISA {

Steps steps(const View &) { return Steps::bytes; }

// uint8, too large by 128.
INLINE __m512i raised(__m512i x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
template <Type V> INLINE B32 signed_quad(B32 bytes, int quad) {
    if constexpr (V == Type::int8) return bytes;
    else return add8(quad % 2 ? high_nibbles(bytes) : low_nibbles(bytes), set1_byte(-8));
}
template <Type V> INLINE __m512i signed_quad(__m512i bytes, int quad) {
    if constexpr (V == Type::int8) return bytes;
    if (quad % 2) bytes = _mm512_srli_epi16(bytes, 4);
    return _mm512_sub_epi8(_mm512_and_si512(bytes, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
}

// Two panels of eight rows, which are read side by side; those of the next unit lie `ahead`.
struct Panels {
    const std::uint8_t *low, *high;
    Index ahead;

    INLINE __m512i next() {
        fetch(low + ahead);
        fetch(high + ahead);
        const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(load(low)), load(high), 1);
        low += 32;
        high += 32;
        return bytes;
    }
    INLINE void next_scales(float *to) {
        store(to, load_half(reinterpret_cast<const std::uint16_t *>(low)));
        store(to + 8, load_half(reinterpret_cast<const std::uint16_t *>(high)));
        low += 16;
        high += 16;
    }
    INLINE void skip(Index bytes) {
        low += bytes;
        high += bytes;
    }
};

template <Type V, int G>
void expand_dense(Panels p, Index first, Index groups, std::uint8_t *out, float *scales) {
    p.skip(first * (16 + (V == Type::int8 ? G * 8 : G * 4)));
    for (Index g = 0; g < groups; ++g, scales += kTileRows) {
        p.next_scales(scales);
        __m512i bytes = _mm512_setzero_si512();
        for (int quad = 0; quad < G / 4; ++quad, out += 64) {
            if (V == Type::int8 || quad % 2 == 0) bytes = p.next();
            _mm512_storeu_si512(out, raised(signed_quad<V>(bytes, quad)));
        }
    }
}

// For a byte shuffle: slot `slot` of each row's quad in all four bytes of the row.
INLINE __m512i slot_places(int slot) {
    const __m128i rows = _mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm512_add_epi8(_mm512_broadcast_i32x4(rows), _mm512_set1_epi8(static_cast<char>(slot)));
}

// Of N:M: every quad of slots in its steps. A window is one step (2:4, two slots) or four (N:16).
template <Type V, int G, int Keep>
void expand_picked(Panels p, Index first, Index groups, std::uint8_t *out, float *scales) {
    constexpr int kServed = Keep == 2 ? 4 : 2;  // quads of a vector of indices
    constexpr int kSlots = Keep == 2 ? G / 2 : G / 16 * Keep, kBlocks = kSlots / 4 / kServed;
    constexpr int kSteps = Keep == 2 ? 1 : 4;   // of a window
    constexpr int kPicked = Keep == 2 ? 2 : 4;  // slots of a quad that belong to one window
    p.skip(first * (16 + kBlocks * 32 + kSlots * (V == Type::int8 ? 8 : 4)));
    for (Index g = 0; g < groups; ++g, scales += kTileRows) {
        p.next_scales(scales);
        __m512i sums[kSteps], bytes = _mm512_setzero_si512();
        for (int block = 0; block < kBlocks; ++block) {
            __m512i index = p.next();
            for (int quad = 0; quad < kServed; ++quad) {
                if (V == Type::int8 || quad % 2 == 0) bytes = p.next();
                const __m512i weights = signed_quad<V>(bytes, quad);
                const __m512i places = _mm512_and_si512(index, _mm512_set1_epi8(Keep == 2 ? 3 : 15));
                index = _mm512_srli_epi16(index, Keep == 2 ? 2 : 4);
                for (int from = 0; from < 4; from += kPicked) {
                    if (Keep != 8 || quad % 2 == 0)
                        for (int s = 0; s < kSteps; ++s) sums[s] = _mm512_setzero_si512();
                    for (int slot = from; slot < from + kPicked; ++slot) {
                        const __m512i weight = _mm512_shuffle_epi8(weights, slot_places(slot));
                        const __m512i place = _mm512_shuffle_epi8(places, slot_places(slot));
                        for (int s = 0; s < kSteps; ++s) {
                            const __m512i own = _mm512_set1_epi32(0x03020100 + s * 0x04040404);
                            const __mmask64 here = _mm512_cmpeq_epi8_mask(place, own);
                            sums[s] = _mm512_or_si512(sums[s], _mm512_maskz_mov_epi8(here, weight));
                        }
                    }
                    if (Keep == 8 && quad % 2 == 0) continue;
                    for (int s = 0; s < kSteps; ++s, out += 64) _mm512_storeu_si512(out, raised(sums[s]));
                }
            }
        }
    }
}

// What is left over of a panel of eight rows, as the integers that it was made of.
void add_left_over(const View &m, Index panel, int lane, Index first, Index groups, std::uint8_t *out,
                   const float *scales) {
    const Index from = first * m.group, to = from + groups * m.group;
    for (Index s = m.rest_starts[panel]; s < m.rest_starts[panel + 1]; ++s) {
        const auto *words = reinterpret_cast<const std::uint16_t *>(m.rest + s * 32);
        float weights[8];
        store(weights, load_half(words + 8));
        for (int r = 0; r < 8; ++r) {
            if (words[r] < from || words[r] >= to || weights[r] == 0) continue;
            const Index column = words[r] - from;
            const float scale = scales[column / m.group * kTileRows + lane + r];
            const float whole = std::rint(weights[r] / scale);
            if (std::fabs(whole) <= 127)  // not if the scale is NaN
                out[column / 4 * 64 + (lane + r) * 4 + column % 4] += std::uint8_t(int(whole));
        }
    }
}

void expand_ints(const View &m, Index unit, Index first, Index groups, std::uint8_t *out, float *scales) {
    const Index last = m.panels - 1;  // which may be the first of a unit
    const Index low = unit * 2, high = std::min(unit * 2 + 1, last);
    const Panels both{m.data + m.starts[low], m.data + m.starts[high], ahead_of(m, low)};
    with_known(m, [&](auto type, auto group, auto keep) {
        if constexpr (keep.value == 0) expand_dense<type.value, group.value>(both, first, groups, out, scales);
        else expand_picked<type.value, group.value, keep.value>(both, first, groups, out, scales);
    });
    if (!m.rest_starts) return;
    add_left_over(m, low, 0, first, groups, out, scales);
    add_left_over(m, high, 8, first, groups, out, scales);
}

// Every int32 of the sum: plus four uint8 of the weights times the four int8 at x. The compiler would copy the
// sums from register to register.
INLINE void add_quads(__m512i &sum, __m512i weights, const std::uint8_t *x) {
    using Quad = const std::uint8_t (*)[4];
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<Quad>(x)));
}

template <int G, int T>
APART void tile_bytes(const std::uint8_t *w, const float *scales, const std::uint8_t *x,
                      const float *factors, const std::int32_t *begin, Index groups, float *y) {
    __m512 sums[T];
    for (int t = 0; t < T; ++t) sums[t] = Widest::load(y + t * kTileRows);
    for (Index g = 0; g < groups; ++g, scales += kTileRows, factors += kTile, begin += kTile) {
        __m512i acc[T];
        for (int t = 0; t < T; ++t) acc[t] = _mm512_set1_epi32(begin[t]);
#pragma GCC unroll 4
        for (int k = 0; k < G / 4; ++k, w += 64, x += 4 * kTile) {
            const __m512i weights = _mm512_loadu_si512(w);
            for (int t = 0; t < T; ++t) add_quads(acc[t], weights, x + 4 * t);
        }
        const __m512 scale = Widest::load(scales);
        for (int t = 0; t < T; ++t)
            sums[t] = fma(_mm512_cvtepi32_ps(acc[t]), mul(scale, Widest::set1(factors[t])), sums[t]);
    }
    for (int t = 0; t < T; ++t) store(y + t * kTileRows, sums[t]);
}

template <int... Before>
void tile_ints_with(std::integer_sequence<int, Before...>, int group, const std::uint8_t *w,
                    const float *scales, const std::uint8_t *x, const float *factors,
                    const std::int32_t *begin, Index groups, int tokens, float *y) {
    static constexpr decltype(&tile_bytes<64, 1>) kOf[2][kTile] = {{tile_bytes<32, Before + 1>...},
                                                                   {tile_bytes<64, Before + 1>...}};
    kOf[group == 64][tokens - 1](w, scales, x, factors, begin, groups, y);
}

void tile_ints(const View &m, const std::uint8_t *w, const float *scales, const std::uint8_t *x,
               const float *factors, const std::int32_t *begin, Index groups, int tokens, float *y) {
    tile_ints_with(Widths(), m.group, w, scales, x, factors, begin, groups, tokens, y);
}

// ------------------------------------------------------------------------------------------ strips

struct AllColumns {
    alignas(64) std::uint8_t v[64];
};
constexpr AllColumns find_all_columns() {
    AllColumns all{};
    for (int i = 0; i < 64; ++i) all.v[i] = std::uint8_t(i);
    return all;
}
inline constexpr AllColumns kAllColumns = find_all_columns();

// The sums of a strip: every int32 of it plus four int8 of the weights times the four uint8 at x.
INLINE void add_quads(__m512i &sum, __m512i x, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
}

template <Type V, int Height>
void quads_of(const View &m, Index panel, Index first, Index groups, std::int8_t *room, float *scales,
              KeptQuads &out) {
    constexpr int kHalves = Height == 16 ? 2 : 1, kQuads = V == Type::int4 ? 2 : 1;
    constexpr int kStep = (Height == 4 ? 8 : 4) * kQuads;  // slots of a vector
    const std::uint8_t *bits = m.data + m.starts[panel];
    const auto *factors = reinterpret_cast<const std::uint16_t *>(bits + round_up(m.padded / 8, 32));
    const auto *p = reinterpret_cast<const std::uint8_t *>(factors + m.padded / m.group * kHalves * 8);
    const auto word = [&](Index g) {
        std::uint64_t kept = 0;
        std::memcpy(&kept, bits + g * m.group / 8, std::size_t(m.group / 8));
        return kept;
    };
    const auto size = [](int kept) { return Index(kept + kStep - 1) / kStep * kHalves * 32; };
    // The weights of a quad, of rows 8 h on; of four rows in the lower half.
    const auto quad_at = [&](int quad, int h) {
        if constexpr (Height == 4) {
            const std::uint8_t *at = p + quad / (2 * kQuads) * 32 + quad % 2 * 16;
            const B32 bytes = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
            return signed_quad<V>(bytes, quad / 2);
        } else {
            return signed_quad<V>(load(p + (quad / kQuads * kHalves + h) * 32), quad);
        }
    };
    for (Index g = 0; g < first; ++g) p += size(__builtin_popcountll(word(g)));
    constexpr bool kCopied = V == Type::int4 || Height == 4;  // between groups of four rows there may be a gap
    out.weights = kCopied ? room : reinterpret_cast<const std::int8_t *>(p);
    out.scales = scales;
    const __m512i all = _mm512_load_si512(kAllColumns.v);
    std::uint16_t *columns = out.columns;
    for (Index g = 0; g < groups; ++g) {
        const std::uint64_t kept = word(first + g);
        const int count = __builtin_popcountll(kept), quads = (count + 3) / 4;
        const __m512i own = _mm512_maskz_compress_epi8(kept, all), from = _mm512_set1_epi16(short(g * m.group));
        const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(own));
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(own, 1));
        _mm512_storeu_si512(columns, _mm512_add_epi16(from, low));
        _mm512_storeu_si512(columns + 32, _mm512_add_epi16(from, high));
        columns += quads * 4;
        out.counts[g] = quads;
        B32 sums[kHalves];
        for (int h = 0; h < kHalves; ++h) sums[h] = zero_bytes();
        for (int quad = 0; quad < quads; ++quad)
            for (int h = 0; h < kHalves; ++h) {
                const B32 weights = quad_at(quad, h);
                sums[h] = _mm256_dpbusd_epi32(sums[h], set1_byte(-128), weights);
                if constexpr (kCopied) {
                    store(reinterpret_cast<std::uint8_t *>(room), weights);
                    room += Height == 4 ? 16 : 32;
                }
            }
        p += size(count);
        for (int h = 0; h < kHalves; ++h) {
            const F8 own_scales = load_half(factors + ((first + g) * kHalves + h) * 8);
            const B32 begin = _mm256_sub_epi32(zero_bytes(), sums[h]);
            const Index at = g * Height + 8 * h;
            if constexpr (Height == 4) {
                _mm_storeu_ps(scales + at, _mm256_castps256_ps128(own_scales));
                _mm_storeu_si128(reinterpret_cast<__m128i *>(out.begin + at), _mm256_castsi256_si128(begin));
            } else {
                store(scales + at, own_scales);
                store(reinterpret_cast<std::uint8_t *>(out.begin + at), begin);
            }
        }
    }
}

void quads(const View &m, Index panel, Index first, Index groups, std::int8_t *weights, float *scales,
           KeptQuads &out) {
    const auto own = m.type == Type::int8 ? (m.height == 16  ? quads_of<Type::int8, 16>
                                             : m.height == 8 ? quads_of<Type::int8, 8>
                                                             : quads_of<Type::int8, 4>)
                                          : (m.height == 16  ? quads_of<Type::int4, 16>
                                             : m.height == 8 ? quads_of<Type::int4, 8>
                                                             : quads_of<Type::int4, 4>);
    own(m, panel, first, groups, weights, scales, out);
}

// The activations of a quad's columns, column by column, to its four bytes of every token.
template <int Vectors>
INLINE void gather_quad(const std::uint8_t *x, const std::uint16_t *columns, std::uint8_t *out) {
    __m512i own[4];
    for (int i = 0; i < 4; ++i) own[i] = _mm512_loadu_si512(x + Index(columns[i]) * kStripTokens);
    const __m512i a = _mm512_unpacklo_epi8(own[0], own[1]), b = _mm512_unpacklo_epi8(own[2], own[3]);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
    if constexpr (Vectors > 1) _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi16(a, b));
    if constexpr (Vectors > 2) {
        const __m512i c = _mm512_unpackhi_epi8(own[0], own[1]), d = _mm512_unpackhi_epi8(own[2], own[3]);
        _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi16(c, d));
        if constexpr (Vectors > 3) _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi16(c, d));
    }
}

template <int Rows, int Vectors>
APART void strip_bytes(const KeptQuads &q, int height, Index groups, const std::uint8_t *x,
                       const float *factors, float *y) {
    alignas(64) std::uint8_t inputs[16 * Vectors * 64];
    const std::int8_t *weights = q.weights;
    const std::uint16_t *columns = q.columns;
    const std::int32_t *counts = q.counts, *begin = q.begin;
    const float *scales = q.scales;
    for (Index g = 0; g < groups; ++g, factors += kStripTokens, begin += height, scales += height) {
        const int quads = counts[g];
        for (int quad = 0; quad < quads; ++quad, columns += 4)
            gather_quad<Vectors>(x, columns, inputs + quad * Vectors * 64);
        const std::uint8_t *end = inputs + quads * Vectors * 64;
        for (int top = 0; top < (quads ? height : 0); top += Rows) {
            __m512i acc[Rows][Vectors];
            for (int r = 0; r < Rows; ++r)
                for (int v = 0; v < Vectors; ++v) acc[r][v] = _mm512_set1_epi32(begin[top + r]);
            const std::int8_t *w = weights + top * 4;
            for (const std::uint8_t *in = inputs; in < end; in += Vectors * 64, w += height * 4) {
                __m512i own[Vectors];
                for (int v = 0; v < Vectors; ++v) own[v] = _mm512_load_si512(in + v * 64);
                for (int r = 0; r < Rows; ++r) {
                    std::int32_t four;
                    std::memcpy(&four, w + 4 * r, 4);
                    const __m512i quad = _mm512_set1_epi32(four);
                    for (int v = 0; v < Vectors; ++v) add_quads(acc[r][v], own[v], quad);
                }
            }
            __m512 factor[Vectors];
            for (int v = 0; v < Vectors; ++v) factor[v] = Widest::load(factors + 16 * v);
            for (int r = 0; r < Rows; ++r) {
                const __m512 scale = Widest::set1(scales[top + r]);
                float *to = y + (top + r) * kStripTokens;
                for (int v = 0; v < Vectors; ++v)
                    store(to + 16 * v, fma(_mm512_cvtepi32_ps(acc[r][v]), mul(scale, factor[v]),
                                           Widest::load(to + 16 * v)));
            }
        }
        weights += quads * height * 4;
    }
}

void strip_ints(const KeptQuads &q, int rows, Index groups, const std::uint8_t *x, const float *factors,
                int tokens, float *y) {
    static constexpr decltype(&strip_bytes<4, 1>) kOf[2][4] = {
        {strip_bytes<4, 1>, strip_bytes<4, 2>, strip_bytes<4, 3>, strip_bytes<4, 4>},
        {strip_bytes<8, 1>, strip_bytes<8, 2>, strip_bytes<4, 3>, strip_bytes<4, 4>}};
    kOf[rows > 4][(tokens - 1) / 16](q, rows, groups, x, factors, y);
}

}  // namespace isa::ISA
