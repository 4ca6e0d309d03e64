// Products of integers with many tokens, with AVX-512: every piece of the weights becomes dense bytes in
// the cache, removed ones included, for one instruction multiplies four of each of sixteen rows.
#pragma once

#include <algorithm>

#include "large.h"
#include "small_ints.h"

namespace isa::ISA {

Steps steps(const View &) { return Steps::bytes; }

// uint8, too large by 128.
INLINE B32 raised(B32 x) { return _mm256_xor_si256(x, set1_byte(-128)); }
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

// For a byte shuffle: the weights of a quad to the columns of a step that the nibble says are kept.
struct Nibbles {
    alignas(64) std::uint8_t v[16][16];
};
constexpr Nibbles find_nibbles() {
    Nibbles places{};
    for (int nibble = 0; nibble < 16; ++nibble)
        for (int i = 0, rank = 0; i < 16; ++i) {
            if (i % 4 == 0) rank = 0;
            places.v[nibble][i] = std::uint8_t(nibble >> i % 4 & 1 ? i / 4 * 4 + rank++ : 255);
        }
    return places;
}
inline constexpr Nibbles kNibbles = find_nibbles();

// Blocks of R rows, R = 4 in the lower half of vectors. `lane`: the first of these rows within the tile.
template <Type V, int Height>
void expand_blocks(const View &m, Index panel, int lane, Index first, Index groups, std::uint8_t *out,
                   float *scales) {
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
    const auto size = [&](std::uint64_t kept) {
        return Index(__builtin_popcountll(kept) + kStep - 1) / kStep * kHalves * 32;
    };
    // The quad that slot `slot` begins, of rows 8 h on.
    const auto quad_at = [&](int quad, int h) {
        if constexpr (Height == 4) {
            const std::uint8_t *at = p + quad / (2 * kQuads) * 32 + quad % 2 * 16;
            const B32 bytes = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
            return signed_quad<V>(bytes, quad / 2 % kQuads);
        } else {
            return signed_quad<V>(load(p + (quad / kQuads * kHalves + h) * 32), quad % kQuads);
        }
    };
    for (Index g = 0; g < first; ++g) p += size(word(g));
    out += 4 * lane;
    for (Index g = first; g < first + groups; ++g, scales += kTileRows) {
        for (int h = 0; h < kHalves; ++h) {
            const F8 own = load_half(factors + (g * kHalves + h) * 8);
            if (Height == 4) _mm_storeu_ps(scales + lane, _mm256_castps256_ps128(own));
            else store(scales + lane + 8 * h, own);
        }
        const std::uint64_t kept = word(g);
        const int last = std::max(0, __builtin_popcountll(kept) - 1) / 4;  // no quad behind it is read
        std::uint64_t left = kept;
        for (int step = 0, slot = 0; step < m.group / 4; ++step, left >>= 4, out += 64) {
            const int nibble = int(left & 15), shift = slot % 4 * 8;
            const B32 places = _mm256_broadcastsi128_si256(
                _mm_load_si128(reinterpret_cast<const __m128i *>(kNibbles.v[nibble])));
            for (int h = 0; h < kHalves; ++h) {
                const B32 low = _mm256_srl_epi32(quad_at(std::min(slot / 4, last), h), _mm_cvtsi32_si128(shift));
                const B32 high = _mm256_sll_epi32(quad_at(std::min(slot / 4 + 1, last), h), _mm_cvtsi32_si128(32 - shift));
                const B32 dense = raised(pick_bytes(either(low, high), places));
                if (Height == 4)
                    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(dense));
                else store(out + 32 * h, dense);
            }
            slot += __builtin_popcount(unsigned(nibble));
        }
        p += size(kept);
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
    const Index panels = kTileRows / m.height;  // of a unit; the last may have fewer
    const auto panel = [&](Index i) { return std::min(unit * panels + i, m.panels - 1); };
    if (m.kind == Kind::vector) {
        const auto blocks = m.type == Type::int8
            ? (m.height == 16 ? expand_blocks<Type::int8, 16> : m.height == 8 ? expand_blocks<Type::int8, 8>
                                                                              : expand_blocks<Type::int8, 4>)
            : (m.height == 16 ? expand_blocks<Type::int4, 16> : m.height == 8 ? expand_blocks<Type::int4, 8>
                                                                              : expand_blocks<Type::int4, 4>);
        for (Index i = 0; i < panels; ++i)
            blocks(m, panel(i), int(i) * m.height, first, groups, out, scales);
        return;
    }
    const Panels both{m.data + m.starts[panel(0)], m.data + m.starts[panel(1)],
                      ahead_of(m, unit * panels)};
    with_known(m, [&](auto type, auto group, auto keep) {
        if constexpr (keep.value == 0) expand_dense<type.value, group.value>(both, first, groups, out, scales);
        else expand_picked<type.value, group.value, keep.value>(both, first, groups, out, scales);
    });
    for (Index i = 0; m.rest_starts && i < panels; ++i)
        add_left_over(m, panel(i), int(i) * 8, first, groups, out, scales);
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

}  // namespace isa::ISA
