// The rows of semi_structured.h for the instruction set that this file is compiled for.
#pragma once

#include <cstring>

#include "semi_structured.h"
#include "simd.h"

namespace isa::ISA {
namespace {

INLINE std::uint64_t word_at(const std::uint8_t *p) {
    std::uint64_t word;
    std::memcpy(&word, p, 8);
    return word;
}

// Bit i: value i of the 16 bytes is not zero; of floats (width 2 and 4) -0 is zero.
template <int Width> INLINE unsigned nonzero(const std::uint8_t *from);
// Eight of the 16 bytes at `from`; 0 for a place of 128 or more.
INLINE void pick8(const std::uint8_t *from, std::uint64_t places, std::uint8_t *to);
// Sixteen of the 8 bytes at `from`, the same way.
INLINE void pick16(const std::uint8_t *from, std::uint64_t low, std::uint64_t high, std::uint8_t *to);

#if SIMD_NUMBER(ISA) == SIMD_avx2 || SIMD_NUMBER(ISA) == SIMD_avx512
template <int Width> INLINE unsigned nonzero(const std::uint8_t *from) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from)), zero = _mm_setzero_si128();
    if constexpr (Width == 1) return ~unsigned(_mm_movemask_epi8(_mm_cmpeq_epi8(x, zero))) & 0xffff;
    if constexpr (Width == 2) {
        const __m128i zeros = _mm_cmpeq_epi16(_mm_slli_epi16(x, 1), zero);
        return ~unsigned(_mm_movemask_epi8(_mm_packs_epi16(zeros, zero))) & 0xff;
    }
    const __m128i zeros = _mm_cmpeq_epi32(_mm_slli_epi32(x, 1), zero);
    return ~unsigned(_mm_movemask_ps(_mm_castsi128_ps(zeros))) & 0xf;
}
INLINE void pick8(const std::uint8_t *from, std::uint64_t places, std::uint8_t *to) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to),
                     _mm_shuffle_epi8(x, _mm_cvtsi64_si128(static_cast<long long>(places))));
}
INLINE void pick16(const std::uint8_t *from, std::uint64_t low, std::uint64_t high, std::uint8_t *to) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    const __m128i places = _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm_shuffle_epi8(x, places));
}
#else
template <int Width> INLINE unsigned nonzero(const std::uint8_t *from) {
    unsigned found = 0;
    for (int i = 0; i < 16 / Width; ++i) {
        std::uint32_t value = 0;
        std::memcpy(&value, from + i * Width, Width);
        if (Width > 1) value <<= 33 - 8 * Width;  // without the sign
        found |= unsigned(value != 0) << i;
    }
    return found;
}
INLINE void pick8(const std::uint8_t *from, std::uint64_t places, std::uint8_t *to) {
    for (int i = 0; i < 8; ++i, places >>= 8) to[i] = places & 128 ? std::uint8_t(0) : from[places & 15];
}
INLINE void pick16(const std::uint8_t *from, std::uint64_t low, std::uint64_t high, std::uint8_t *to) {
    for (int i = 0; i < 8; ++i, low >>= 8) to[i] = low & 128 ? std::uint8_t(0) : from[low & 7];
    for (int i = 8; i < 16; ++i, high >>= 8) to[i] = high & 128 ? std::uint8_t(0) : from[high & 7];
}
#endif

// The kept columns of a step, as bits; `bytes` of the row's bits are there.
template <int Width> INLINE unsigned kept_of(const std::uint8_t *bits, Index bytes, Index step) {
    if constexpr (Width == 4) return bits[step / 2] >> (step % 2 * 4) & 15;
    if constexpr (Width == 2) return bits[step];
    return bits[2 * step] | (2 * step + 1 < bytes ? bits[2 * step + 1] << 8 : 0);
}

// How many bytes of nibbles a step has.
template <int Width> constexpr int kNibbleBytes = Width == 1 ? 2 : 1;

template <int Width>
bool compress_as(const Squeeze &to, const std::uint8_t *row, const std::uint8_t *bits, Index columns,
                 std::uint8_t *values, std::uint8_t *nibbles) {
    constexpr Index kColumns = 16 / Width;
    bool wrong = false;
    for (Index step = 0; step * kColumns < columns; ++step) {
        const std::uint8_t *from = row + 16 * step;
        std::uint8_t last[16];
        if ((step + 1) * kColumns > columns) {
            std::memset(last, 0, 16);
            std::memcpy(last, from, std::size_t((columns - step * kColumns) * Width));
            from = last;
        }
        const unsigned kept = bits ? kept_of<Width>(bits, (columns + 7) / 8, step) : nonzero<Width>(from);
        const unsigned low = kept & 255, high = kept >> 8;
        std::uint64_t places = word_at(to.places[low]);
        nibbles[kNibbleBytes<Width> * step] = to.nibbles[low];
        wrong |= to.wrong[low];
        if constexpr (Width == 1) {
            places = (places & 0xffffffff) | (word_at(to.places[high]) + 0x08080808) << 32;
            nibbles[2 * step + 1] = to.nibbles[high];
            wrong |= to.wrong[high];
        }
        pick8(from, places, values + 8 * step);
    }
    return !wrong;
}

template <int Width>
bool expand_as(const Spread &to, const std::uint8_t *values, const std::uint8_t *nibbles, Index columns,
               std::uint8_t *row) {
    constexpr Index kColumns = 16 / Width;
    bool wrong = false;
    for (Index step = 0; step * kColumns < columns; ++step) {
        const std::uint8_t *own = nibbles + kNibbleBytes<Width> * step;
        const std::uint8_t *places = to.places[own[0]];
        std::uint64_t low = word_at(places), high = word_at(places + 8);
        wrong |= to.wrong[own[0]];
        if constexpr (Width == 1) {
            high = word_at(to.places[own[1]]) + 0x0404040404040404;
            wrong |= to.wrong[own[1]];
        }
        if ((step + 1) * kColumns <= columns) {
            pick16(values + 8 * step, low, high, row + 16 * step);
        } else {
            std::uint8_t last[16];
            pick16(values + 8 * step, low, high, last);
            std::memcpy(row + 16 * step, last, std::size_t((columns - step * kColumns) * Width));
        }
    }
    return !wrong;
}

bool compress_row(const Squeeze &to, int width, const std::uint8_t *row, const std::uint8_t *bits,
                  Index columns, std::uint8_t *values, std::uint8_t *nibbles) {
    if (width == 1) return compress_as<1>(to, row, bits, columns, values, nibbles);
    if (width == 2) return compress_as<2>(to, row, bits, columns, values, nibbles);
    return compress_as<4>(to, row, bits, columns, values, nibbles);
}

bool expand_row(const Spread &to, int width, const std::uint8_t *values, const std::uint8_t *nibbles,
                Index columns, std::uint8_t *row) {
    if (width == 1) return expand_as<1>(to, values, nibbles, columns, row);
    if (width == 2) return expand_as<2>(to, values, nibbles, columns, row);
    return expand_as<4>(to, values, nibbles, columns, row);
}

}  // namespace
}  // namespace isa::ISA
