// Products with few tokens: every byte of the weights is read once, in the order of its stream.
#pragma once

#include "layout.h"
#include "simd.h"

namespace isa::ISA {

// Bytes ahead of the stream that are asked for: what kept the memory busy where it was measured.
constexpr Index kAheadFloat = 2048, kAheadInt = 2048;

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

// Kept columns of a block row: each slot has its own input.
template <Type V, int T, int Height>
INLINE void vector_slots(const View &m, const std::uint8_t *p, const Rows<T> &in, F8 *sums) {
    constexpr int kHalves = Height == 16 ? 2 : 1;
    const Index windows = (m.columns + 255) / 256;
    const auto *counts = reinterpret_cast<const std::uint16_t *>(p);
    const std::uint8_t *offset = p + 2 * windows;
    Index slots = 0;
    for (Index w = 0; w < windows; ++w) slots += counts[w];
    p += round_up(2 * windows + slots, 32);
    F8 acc[T][kHalves][2];
    for (int t = 0; t < T; ++t)
        for (int h = 0; h < kHalves; ++h) acc[t][h][0] = acc[t][h][1] = zero();
    for (Index w = 0; w < windows; ++w) {
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

// ---------------------------------------------------------------------------------------- integers

template <int T> struct Quads {  // the quantised inputs of T tokens
    const std::int8_t *q[T];
};

INLINE B32 low_nibbles(B32 x) { return both(x, set1_byte(15)); }
INLINE B32 high_nibbles(B32 x) { return both(shift_right32<4>(x), set1_byte(15)); }

// Sums of `Quads` quads of int8, each with the next four inputs.
template <int T>
INLINE const std::uint8_t *dense8(const std::uint8_t *p, Index quads, const Quads<T> &in, B32 *acc) {
    for (int t = 0; t < T; ++t) acc[t] = zero_bytes();
    for (Index k = 0; k < quads; ++k) {
        prefetch(p + kAheadInt);
        const B32 weights = load(p);
        p += 32;
        for (int t = 0; t < T; ++t) {
            const B32 product = dot2(weights, repeat4(in.q[t] + 4 * k));
            acc[t] = add32(acc[t], sum_pairs16(product, 1));
        }
    }
    return p;
}

// The same for int4; the weights are too large by 8. Eight quads stay below 2^15 = 32768: each adds
// two products of at most 15 * 127, 30480 in all.
template <int T>
INLINE const std::uint8_t *dense4(const std::uint8_t *p, Index quads, const Quads<T> &in, B32 *acc) {
    for (int t = 0; t < T; ++t) acc[t] = zero_bytes();
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

// One quad that picks its inputs, and what its weights are too large by.
template <Type V> struct Picked {
    B32 sum = zero_bytes();     // int8: int32; int4: int16
    B32 excess = zero_bytes();  // int4: int16, the sum of the inputs

    INLINE void add(B32 weights, B32 inputs) {
        if constexpr (V == Type::int8) {
            sum = add32(sum, sum_pairs16(dot2(weights, inputs), 1));
        } else {
            accumulate16(sum, dot2_unsigned(weights, inputs));
            accumulate16(excess, dot2_unsigned(set1_byte(1), inputs));
        }
    }
    INLINE B32 total() const {
        if constexpr (V == Type::int8) return sum;
        else return subtract32(sum_pairs16(sum, 1), sum_pairs16(excess, 8));
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
        for (int i = 0; i < G / 8; ++i, ++bits, q += 8) {
            const std::uint64_t own = *bits;
            prefetch(ahead);  // the weights that come next
            ahead += 64;
            compress8(q, own, to);
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

// Kept columns of block rows. Every step has its own factor, so that no loop ends with a group:
// groups keep unequal numbers, and a processor cannot guess where each ends.
template <Type V, int Height, int G>
void int_vector(const View &m, Index panel, const Inputs &in, float *y, std::uint8_t *scratch) {
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
    F8 sums[kHalves];
    for (int h = 0; h < kHalves; ++h) sums[h] = zero();
    const std::uint16_t *group = group_of;
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
                whole = sum_pairs16(dot2(x, weights), 1);  // |x| is found once for all rows
            } else {
                const B32 a = dot2_unsigned(low_nibbles(weights), x);
                const B32 b = dot2_unsigned(high_nibbles(weights), next);
                whole = subtract32(sum_pairs16(add16(a, b), 1), excess);
            }
            sums[h] = fma(to_float(whole), load(factor + 8 * h), sums[h]);
        }
    }
    float *out = y + panel * Height;
    if constexpr (Height == 4) write(out, fold_halves(sums[0]), 4);
    else
        for (int h = 0; h < kHalves; ++h) store(out + 8 * h, sums[h]);
}

enum class Form { dense, two_of_four, four_of_16, eight_of_16 };

template <Type V, int T, int G, Form F>
void int_panels(const View &m, Index first, Index last, const Inputs &in, float *y, Index stride) {
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
            if constexpr (F == Form::dense && V == Type::int8) p = dense8<T>(p, G / 4, quads, acc);
            else if constexpr (F == Form::dense) p = dense4<T>(p, G / 4, quads, acc);
            else if constexpr (F == Form::two_of_four) p = picked24<V, T>(p, G, quads, acc);
            else if constexpr (F == Form::four_of_16) p = picked16<V, T, 4>(p, G, quads, acc);
            else p = picked16<V, T, 8>(p, G, quads, acc);
            for (int t = 0; t < T; ++t) {
                if constexpr (F == Form::dense && V == Type::int4)
                    acc[t] = subtract32(acc[t], set1_32(8 * in.total[t * in.groups + g]));
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

// ---------------------------------------------------------------------------------------- panels

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

template <int T>
void small_of(const View &m, Index first, Index last, const Inputs &in, float *y, Index stride,
              float *scratch) {
    switch (m.type) {
    case Type::fp32: return float_panels<Type::fp32, T>(m, first, last, in, y, stride);
    case Type::bf16: return float_panels<Type::bf16, T>(m, first, last, in, y, stride);
    case Type::fp16: return float_panels<Type::fp16, T>(m, first, last, in, y, stride);
    case Type::int8:
        return m.group == 64 ? small_ints<Type::int8, T, 64>(m, first, last, in, y, stride, scratch)
                             : small_ints<Type::int8, T, 32>(m, first, last, in, y, stride, scratch);
    case Type::int4:
        return m.group == 64 ? small_ints<Type::int4, T, 64>(m, first, last, in, y, stride, scratch)
                             : small_ints<Type::int4, T, 32>(m, first, last, in, y, stride, scratch);
    }
}

void small(const View &m, Index first, Index last, const Inputs &in, int tokens, float *y,
           Index stride, float *scratch) {
    Inputs rest = in;
    while (tokens > 0) {
        const int now = tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        if (now == 4) small_of<4>(m, first, last, rest, y, stride, scratch);
        else if (now == 2) small_of<2>(m, first, last, rest, y, stride, scratch);
        else small_of<1>(m, first, last, rest, y, stride, scratch);
        tokens -= now;
        y += now * stride;
        rest.x += now * rest.stride;
        if (rest.q) {
            rest.q += now * rest.padded;
            rest.scale += now * rest.groups;
            rest.total += now * rest.groups;
        }
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

}  // namespace isa::ISA
