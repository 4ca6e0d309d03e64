// Products of floats with few tokens, and what the other kernels share with them.
#pragma once

#include "layout.h"
#include "simd.h"

namespace isa::ISA {

// Bytes ahead of the stream that are asked for: what kept the memory busy where it was measured.
constexpr Index kAheadFloat = 4096, kAheadInt = 4096;

// Into the cache behind the nearest one: for what another pass over the rows will read.
INLINE void fetch(const std::uint8_t *p) { __builtin_prefetch(p, 0, 2); }

// One chunk: two slots of eight rows.
template <Type V> constexpr Index kChunk = V == Type::fp32 ? 64 : 32;
template <Type V> INLINE void load_chunk(const std::uint8_t *p, F8 &first, F8 &second) {
    if constexpr (V == Type::fp32) {
        first = load(reinterpret_cast<const float *>(p));
        second = load(reinterpret_cast<const float *>(p) + 8);
    } else if constexpr (V == Type::fp16) {
        first = load_half(reinterpret_cast<const std::uint16_t *>(p));
        second = load_half(reinterpret_cast<const std::uint16_t *>(p) + 8);
    } else {
        const B32 bits = load(p);
        first = as_float(shift_left32<16>(bits));
        second = as_float(both(bits, set1_32(std::int32_t(0xffff0000))));
    }
}

INLINE B32 low_nibbles(B32 x) { return both(x, set1_byte(15)); }
INLINE B32 high_nibbles(B32 x) { return both(shift_right32<4>(x), set1_byte(15)); }

template <int T> struct Rows {  // the inputs of T tokens
    const float *x[T];
};

INLINE void write(float *y, F8 sums, Index rows) {
    if (rows >= 8) return store(y, sums);
    float lanes[8];
    store(lanes, sums);
    for (Index i = 0; i < rows; ++i) y[i] = lanes[i];
}

// The left-over weights of a panel of eight rows.
INLINE F8 add_rest(const View &m, Index panel, const float *x, F8 sums) {
    const std::uint8_t *p = m.rest + m.rest_starts[panel] * 32;
    const std::uint8_t *end = m.rest + m.rest_starts[panel + 1] * 32;
    for (; p < end; p += 32) {
        const auto *words = reinterpret_cast<const std::uint16_t *>(p);
        sums = fma(load_half(words + 8), gather(x, words), sums);
    }
    return sums;
}

// ---------------------------------------------------------------------------------------- floats

template <Type V, int T>
INLINE void dense_slots(const std::uint8_t *p, Index columns, const Rows<T> &in, F8 *sums) {
    F8 acc[T][4];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = zero();
    for (Index k = 0; k < columns; k += 4)
        for (int i = 0; i < 4; i += 2) {
            prefetch(p + kAheadFloat);
            F8 first, second;
            load_chunk<V>(p, first, second);
            p += kChunk<V>;
            for (int t = 0; t < T; ++t) {
                acc[t][i] = fma(first, set1(in.x[t][k + i]), acc[t][i]);
                acc[t][i + 1] = fma(second, set1(in.x[t][k + i + 1]), acc[t][i + 1]);
            }
        }
    for (int t = 0; t < T; ++t)
        sums[t] = add(add(acc[t][0], acc[t][1]), add(acc[t][2], acc[t][3]));
}

// Go from the begin of a block row to its chunks: what lies before them. Returns how many windows.
INLINE Index open_block(const View &m, const std::uint16_t *&counts, const std::uint8_t *&offset,
                        const std::uint8_t *&p) {
    const Index windows = (m.columns + 255) / 256;
    counts = reinterpret_cast<const std::uint16_t *>(p);
    offset = p + 2 * windows;
    Index slots = 0;
    for (Index w = 0; w < windows; ++w) slots += counts[w];
    p += round_up(2 * windows + slots, 32);
    return windows;
}

// Asks for what lies ahead of a window's columns, as going over its chunks does for what lies ahead of those.
INLINE void ask_ahead(const std::uint8_t *offset, Index count) {
    for (Index i = 0; i < count; i += 64) prefetch(offset + i + kAheadFloat);
}

// Kept columns of a block row: each slot has its own input.
template <Type V, int T, int Height>
INLINE void vector_slots(const View &m, const std::uint8_t *p, const Rows<T> &in, F8 *sums) {
    constexpr int kHalves = Height == 16 ? 2 : 1;
    const std::uint16_t *counts;
    const std::uint8_t *offset;
    const Index windows = open_block(m, counts, offset, p);
    F8 acc[T][kHalves][2];
    for (int t = 0; t < T; ++t)
        for (int h = 0; h < kHalves; ++h) acc[t][h][0] = acc[t][h][1] = zero();
    for (Index w = 0; w < windows; ++w) {
        ask_ahead(offset, counts[w]);
        for (const std::uint8_t *end = offset + counts[w]; offset < end;
             offset += Height == 4 ? 4 : 2) {
            prefetch(p + kAheadFloat);
            for (int h = 0; h < kHalves; ++h) {
                F8 first, second;
                load_chunk<V>(p, first, second);
                p += kChunk<V>;
                for (int t = 0; t < T; ++t) {
                    const float *x = in.x[t] + 256 * w;
                    if constexpr (Height == 4) {
                        acc[t][h][0] = fma(first, spread2(x + offset[0], x + offset[1]), acc[t][h][0]);
                        acc[t][h][1] = fma(second, spread2(x + offset[2], x + offset[3]), acc[t][h][1]);
                    } else {
                        acc[t][h][0] = fma(first, set1(x[offset[0]]), acc[t][h][0]);
                        acc[t][h][1] = fma(second, set1(x[offset[1]]), acc[t][h][1]);
                    }
                }
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int h = 0; h < kHalves; ++h) {
            const F8 sum = add(acc[t][h][0], acc[t][h][1]);
            sums[t * kHalves + h] = Height == 4 ? fold_halves(sum) : sum;
        }
}

#if SIMD_NUMBER(ISA) == SIMD_avx512
// Two slots of sixteen rows.
template <Type V> INLINE void load_chunks(const std::uint8_t *p, __m512 &first, __m512 &second) {
    if constexpr (V == Type::bf16) {
        const __m512i bits = _mm512_loadu_si512(p);
        first = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        second = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(std::int32_t(0xffff0000))));
        return;
    }
    F8 parts[4];
    load_chunk<V>(p, parts[0], parts[1]);
    load_chunk<V>(p + kChunk<V>, parts[2], parts[3]);
    first = _mm512_insertf32x8(_mm512_castps256_ps512(parts[0]), parts[2], 1);
    second = _mm512_insertf32x8(_mm512_castps256_ps512(parts[1]), parts[3], 1);
}

// vector_slots of sixteen rows.
template <Type V, int T>
INLINE void sixteen_slots(const View &m, const std::uint8_t *p, const Rows<T> &in, float *y, Index stride) {
    const std::uint16_t *counts;
    const std::uint8_t *offset;
    const Index windows = open_block(m, counts, offset, p);
    __m512 acc[T][2];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    for (Index w = 0; w < windows; ++w) {
        ask_ahead(offset, counts[w]);
        for (const std::uint8_t *end = offset + counts[w]; offset < end; offset += 2) {
            prefetch(p + kAheadFloat);
            __m512 first, second;
            load_chunks<V>(p, first, second);
            p += 2 * kChunk<V>;
            for (int t = 0; t < T; ++t) {
                const float *x = in.x[t] + 256 * w;
                acc[t][0] = fma(first, Widest::set1(x[offset[0]]), acc[t][0]);
                acc[t][1] = fma(second, Widest::set1(x[offset[1]]), acc[t][1]);
            }
        }
    }
    for (int t = 0; t < T; ++t) store(y + t * stride, add(acc[t][0], acc[t][1]));
}

// A chunk as it lies there.
template <Type V> INLINE __m512 load_whole(const std::uint8_t *p) {
    if constexpr (V == Type::fp32) return _mm512_loadu_ps(p);
    else if constexpr (V == Type::fp16) return _mm512_cvtph_ps(load(p));
    else return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load(p)), 16));
}

// vector_slots of eight or four rows: a chunk's slots, two or four, in one vector.
template <Type V, int T, int Height>
INLINE void chunk_slots(const View &m, const std::uint8_t *p, const Rows<T> &in, float *y, Index stride) {
    constexpr int kSlots = 16 / Height;
    // bf16: the rows of two slots in turn.
    const auto lane = [](int slot, int row) {
        if (V != Type::bf16) return slot * Height + row;
        return Height == 8 ? 2 * row + slot : slot % 2 * 8 + 2 * row + slot / 2;
    };
    constexpr bool kMixed = V == Type::bf16;
    constexpr __mmask16 kSecond = Height == 8 ? (kMixed ? 0xaaaa : 0xff00) : (kMixed ? 0x5500 : 0x00f0);
    [[maybe_unused]] constexpr __mmask16 kThird = kMixed ? 0x00aa : 0x0f00, kFourth = kMixed ? 0xaa00 : 0xf000;
    const std::uint16_t *counts;
    const std::uint8_t *offset;
    const Index windows = open_block(m, counts, offset, p);
    __m512 acc[T][2];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    const auto step = [&](Index w, int which) {
        prefetch(p + kAheadFloat);
        const __m512 weights = load_whole<V>(p);
        for (int t = 0; t < T; ++t) {
            const float *x = in.x[t] + 256 * w;
            __m512 inputs = Widest::set1(x[offset[0]]);
            inputs = _mm512_mask_broadcastss_ps(inputs, kSecond, _mm_load_ss(x + offset[1]));
            if constexpr (Height == 4) {
                inputs = _mm512_mask_broadcastss_ps(inputs, kThird, _mm_load_ss(x + offset[2]));
                inputs = _mm512_mask_broadcastss_ps(inputs, kFourth, _mm_load_ss(x + offset[3]));
            }
            acc[t][which] = fma(weights, inputs, acc[t][which]);
        }
        p += kChunk<V>;
        offset += kSlots;
    };
    for (Index w = 0; w < windows; ++w) {
        ask_ahead(offset, counts[w]);
        const std::uint8_t *end = offset + counts[w];
        while (offset + kSlots < end) {
            step(w, 0);
            step(w, 1);
        }
        if (offset < end) step(w, 0);
    }
    for (int t = 0; t < T; ++t) {
        float lanes[16];
        store(lanes, add(acc[t][0], acc[t][1]));
        for (int r = 0; r < Height; ++r) {
            float &sum = y[t * stride + r] = 0;
            for (int slot = 0; slot < kSlots; ++slot) sum += lanes[lane(slot, r)];
        }
    }
}
#endif

template <Type V, int T>
INLINE void two_of_four(const std::uint8_t *p, Index columns, const Rows<T> &in, F8 *sums) {
    F8 acc[T][2];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = zero();
    for (Index k = 0; k < columns; k += 32) {
        B32 index = load(p);
        p += 32;
        for (int w = 0; w < 8; ++w) {
            prefetch(p + kAheadFloat);
            F8 first, second;
            load_chunk<V>(p, first, second);
            p += kChunk<V>;
            const B32 next = shift_right32<2>(index);
            for (int t = 0; t < T; ++t) {
                const F8 window = broadcast4(in.x[t] + k + 4 * w);
                acc[t][0] = fma(first, pick4(window, index), acc[t][0]);
                acc[t][1] = fma(second, pick4(window, next), acc[t][1]);
            }
            index = shift_right32<4>(index);
        }
    }
    for (int t = 0; t < T; ++t) sums[t] = add(acc[t][0], acc[t][1]);
}

template <Type V, int T, int Keep>
INLINE void n_of_sixteen(const std::uint8_t *p, Index columns, const Rows<T> &in, F8 *sums) {
    constexpr int kWindows = 8 / Keep;  // of one vector of indices
    F8 acc[T][2];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = zero();
    for (Index k = 0; k < columns; k += 16 * kWindows) {
        B32 index = load(p);
        p += 32;
        for (int w = 0; w < kWindows; ++w) {
            F8 low[T], high[T];
            for (int t = 0; t < T; ++t) {
                low[t] = load(in.x[t] + k + 16 * w);
                high[t] = load(in.x[t] + k + 16 * w + 8);
            }
            for (int pair = 0; pair < Keep / 2; ++pair) {
                prefetch(p + kAheadFloat);
                F8 first, second;
                load_chunk<V>(p, first, second);
                p += kChunk<V>;
                const B32 next = shift_right32<4>(index);
                for (int t = 0; t < T; ++t) {
                    acc[t][0] = fma(first, pick16(low[t], high[t], index), acc[t][0]);
                    acc[t][1] = fma(second, pick16(low[t], high[t], next), acc[t][1]);
                }
                index = shift_right32<8>(index);
            }
        }
    }
    for (int t = 0; t < T; ++t) sums[t] = add(acc[t][0], acc[t][1]);
}

// Eight rows at once; their values follow each other block by block of eight columns.
template <Type V>
INLINE void masked_rows(const View &m, const std::uint8_t *p, const float *x, float *sums) {
    const std::uint8_t *mask = p, *end = p + m.padded;
    F8 acc[8];
    for (int r = 0; r < 8; ++r) acc[r] = zero();
    p = end;
    for (; mask < end; mask += 8, x += 8) {
        const F8 inputs = load(x);
        prefetch(p + kAheadFloat);
        prefetch(mask + 512);
        for (int r = 0; r < 8; ++r) {
            const std::uint64_t own = mask[r];
            acc[r] = fma(expand_masked<V>(p, own), inputs, acc[r]);
            p += std::uint64_t(__builtin_popcountll(own)) * (V == Type::fp32 ? 4 : 2);
        }
    }
    for (int r = 0; r < 8; ++r) sums[r] = sum(acc[r]);
}

template <Type V, int T>
void float_panels(const View &m, Index first, Index last, const Inputs &in, float *y,
                  Index stride) {
    Rows<T> rows;
    for (int t = 0; t < T; ++t) rows.x[t] = in.x + t * in.stride;
    for (Index panel = first; panel < last; ++panel) {
        const std::uint8_t *p = m.data + m.starts[panel];
        const Index row = panel * m.height, left = m.rows - row;
        F8 sums[T * 2];
        if (m.kind == Kind::bitmask) {
            for (int t = 0; t < T; ++t) {
                float lanes[8];
                masked_rows<V>(m, p, rows.x[t], lanes);
                write(y + t * stride + row, load(lanes), left);
            }
            continue;
        }
#if SIMD_NUMBER(ISA) == SIMD_avx512
        if (m.kind == Kind::vector) {
            float *to = y + row;
            if (m.height == 16) sixteen_slots<V, T>(m, p, rows, to, stride);
            else if (m.height == 8) chunk_slots<V, T, 8>(m, p, rows, to, stride);
            else chunk_slots<V, T, 4>(m, p, rows, to, stride);
            continue;
        }
#else
        if (m.kind == Kind::vector && m.height == 16) {
            vector_slots<V, T, 16>(m, p, rows, sums);
            for (int t = 0; t < T; ++t)
                for (int h = 0; h < 2; ++h) store(y + t * stride + row + 8 * h, sums[2 * t + h]);
            continue;
        }
        if (m.kind == Kind::vector && m.height == 4) {
            vector_slots<V, T, 4>(m, p, rows, sums);
            for (int t = 0; t < T; ++t) write(y + t * stride + row, sums[t], 4);
            continue;
        }
#endif
        if (m.kind == Kind::vector) vector_slots<V, T, 8>(m, p, rows, sums);
        else if (m.kind == Kind::dense) dense_slots<V, T>(p, m.padded, rows, sums);
        else if (m.window == 4) two_of_four<V, T>(p, m.padded, rows, sums);
        else if (m.keep == 4) n_of_sixteen<V, T, 4>(p, m.padded, rows, sums);
        else n_of_sixteen<V, T, 8>(p, m.padded, rows, sums);
        for (int t = 0; t < T; ++t) {
            if (m.rest_starts) sums[t] = add_rest(m, panel, rows.x[t], sums[t]);
            write(y + t * stride + row, sums[t], left);
        }
    }
}

}  // namespace isa::ISA
