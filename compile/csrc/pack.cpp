// Where the kept weights of a matrix go.
#include <algorithm>
#include <cstring>
#include <utility>

#include "matrix.h"
#include "places.h"

using namespace places;

namespace {

// The nearest half; ties to even.
std::uint16_t half_of_float(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const auto sign = std::uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // subnormal: let the addition round
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::uint32_t rounded;
        std::memcpy(&rounded, &magnitude, 4);
        return std::uint16_t(sign | (rounded - 0x3f000000));
    }
    return std::uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// What of a View filling a row read, known to the compiler: packing must keep up with the disk.
template <Type V, Kind K, int Window, int Keep, int Height> struct Fixed {
    static constexpr Type type = V;
    static constexpr Kind kind = K;
    static constexpr int window = Window, keep = Keep, height = Height;
};

template <Type V> std::uint32_t value_at(const Kept &kept, Index i) {
    if constexpr (V == Type::fp32) return static_cast<const std::uint32_t *>(kept.values)[i];
    if constexpr (V == Type::int8)
        return std::uint32_t(static_cast<const std::int8_t *>(kept.values)[i]);
    if constexpr (V == Type::int4) {
        const int nibble = static_cast<const std::uint8_t *>(kept.values)[i / 2] >> (i % 2 * 4) & 15;
        return std::uint32_t((nibble ^ 8) - 8);
    }
    if constexpr (bits_of(V) == 16) return static_cast<const std::uint16_t *>(kept.values)[i];
}

template <class M> void put_float(const M &m, std::uint8_t *at, std::uint32_t bits) {
    if (m.type == Type::fp32) std::memcpy(at, &bits, 4);
    else std::memcpy(at, &bits, 2);
}

template <class M> void put_int(const M &m, std::uint8_t *at, int shift, std::uint32_t value) {
    if (m.type == Type::int8) *at = std::uint8_t(value);
    else *at = std::uint8_t((*at & (0xf0 >> shift)) | ((value + 8) & 15) << shift);
}

// Bytes of sixteen slots of eight rows.
template <Type V> constexpr Index kSixteen = V == Type::int8 ? 128 : V == Type::int4 ? 64 : V == Type::fp32 ? 512 : 256;

// The nibbles of a word as bytes.
std::uint32_t spread_nibbles(std::uint32_t four) {
    four = (four | four << 8) & 0x00ff00ff;
    return (four | four << 4) & 0x0f0f0f0f;
}

// Sixteen values from value i on, as row r of the sixteen slots that begin at `to`: what put_float
// and put_int would do one by one.
template <Type V> void put_sixteen(const Kept &kept, Index i, int r, std::uint8_t *to) {
    const auto *bytes = static_cast<const std::uint8_t *>(kept.values);
    if constexpr (V == Type::int4) {
        std::uint64_t nibbles;
        std::memcpy(&nibbles, bytes + i / 2, 8);
        if (i % 2) nibbles = nibbles >> 4 | std::uint64_t(bytes[i / 2 + 8]) << 60;
        nibbles ^= 0x8888888888888888;  // each plus 8
        for (int pair = 0; pair < 2; ++pair, nibbles >>= 32) {
            const std::uint32_t low = std::uint32_t(nibbles) & 0xffff, high = std::uint32_t(nibbles) >> 16;
            const std::uint32_t both = spread_nibbles(low) | spread_nibbles(high) << 4;
            std::memcpy(to + 32 * pair + 4 * r, &both, 4);
        }
    } else if constexpr (V == Type::int8) {
        for (int quad = 0; quad < 4; ++quad) std::memcpy(to + 32 * quad + 4 * r, bytes + i + 4 * quad, 4);
    } else if constexpr (V == Type::bf16) {
        for (int chunk = 0; chunk < 8; ++chunk)
            std::memcpy(to + 32 * chunk + 4 * r, bytes + 2 * i + 4 * chunk, 4);
    } else {
        constexpr int kWidth = bits_of(V) / 8;
        for (int slot = 0; slot < 16; ++slot)
            std::memcpy(to + kWidth * (8 * slot + r), bytes + kWidth * (i + slot), kWidth);
    }
}

// The two positions of each nibble with two bits, 2 bits each; 255 of other nibbles.
constexpr std::uint8_t kTwo[16] = {255, 255, 255, 4, 255, 8, 9, 255, 255, 12, 13, 255, 14, 255, 255, 255};

// The indices of eight windows of 2:4 as put_index writes them; false if one does not keep two.
template <Type V> bool find_indices(const std::uint8_t *bits, std::uint32_t &word) {
    unsigned strange = 0;
    word = 0;
    for (int byte = 0; byte < 4; ++byte) {
        const std::uint8_t low = kTwo[bits[byte] & 15], high = kTwo[bits[byte] >> 4];
        strange |= low | high;
        word |= std::uint32_t(low | high << 4) << 8 * byte;
    }
    if constexpr (is_integer(V)) {  // [quad][slot] becomes [slot][quad]
        std::uint32_t swapped = (word ^ word >> 6) & 0x00cc00cc;
        word ^= swapped | swapped << 6;
        swapped = (word ^ word >> 12) & 0x0000f0f0;
        word ^= swapped | swapped << 12;
    }
    return strange < 16;
}

// Of a row of N:M: columns and values of what its windows hold beyond N.
using LeftOver = std::vector<std::pair<std::uint16_t, float>>;

// Put the kept weights of a row, the first of which is value i, where they belong.
template <class M>
void fill_row_of(const M &m, const Kept &kept, int group_size, Index row, int r, Index i,
                 std::uint8_t *body, std::uint8_t *const *groups, LeftOver &over) {
    constexpr bool ints = is_integer(M::type);
    const int shift = group_size == 64 ? 6 : 5;
    const Index bytes = (kept.columns + 7) / 8;
    const std::uint8_t *bits = kept.bits ? kept.bits + row / kept.block * bytes : nullptr;
    const auto put = [&](Index g, Index slot, std::uint32_t value) {
        if constexpr (ints) {
            const Nibble place = int_place(m, r, slot);
            put_int(m, groups[g] + place.byte, place.shift, value);
        } else {
            put_float(m, body + float_place(m, r, slot), value);
        }
    };
    // Of a matrix whose every `step` columns have `size` bytes: where those from column k on begin.
    const auto at = [&](Index k, Index step, Index size) {
        return ints ? groups[k >> shift] + (k & (group_size - 1)) / step * size : body + k / step * size;
    };
    if constexpr (M::kind == Kind::dense) {
        const auto keep = [&](Index column) {
            const std::uint32_t value = value_at<M::type>(kept, i++);
            if constexpr (ints) put(column >> shift, column & (group_size - 1), value);
            else put(0, column, value);
        };
        Index k = 0;
        if (!bits)
            for (; k + 16 <= kept.columns; k += 16, i += 16)
                put_sixteen<M::type>(kept, i, r, at(k, 16, kSixteen<M::type>));
        if (!bits)
            for (; k < kept.columns; ++k) keep(k);
        else
            for (Index b = 0; b < bytes; ++b)
                for (unsigned byte = bits[b]; byte; byte &= byte - 1)
                    keep(b * 8 + __builtin_ctz(byte));
    } else if constexpr (M::kind == Kind::vector) {
        const int windows = ints ? shift : 8;
        Index slot = 0, window = 0;
        for (Index b = 0; b < bytes; ++b) {
            if ((b * 8) >> windows != window) {
                window = (b * 8) >> windows;
                slot = ints ? 0 : round_up(slot, slot_step(m));
            }
            for (unsigned byte = bits[b]; byte; byte &= byte - 1)
                put(window, slot++, value_at<M::type>(kept, i++));
        }
    } else {
        constexpr int kShift = M::window == 4 ? 2 : 4;
        const Index inside = ints ? (Index(1) << (shift - kShift)) - 1 : -1;  // windows of a group
        for (Index window = 0; window << kShift < kept.columns; ++window) {
            if constexpr (M::window == 4) {
                const Index k = window * 4;
                std::uint32_t indices;
                if (k % 32 == 0 && k + 32 <= kept.columns && find_indices<M::type>(bits + k / 8, indices)) {
                    std::uint8_t *to = at(k, 32, 32 + kSixteen<M::type>);
                    std::memcpy(to + 4 * r, &indices, 4);
                    put_sixteen<M::type>(kept, i, r, to + 32);
                    i += 16;
                    window += 7;
                    continue;
                }
            }
            unsigned set;
            if (M::window == 4) set = bits[window / 2] >> (window % 2 * 4) & 15;
            else set = bits[window * 2] | (window * 2 + 1 < bytes ? bits[window * 2 + 1] << 8 : 0);
            const Index g = (window << kShift) >> shift;
            Index slot = (window & inside) * M::keep;
            const Index end = slot + M::keep;
            for (; set; set &= set - 1, ++slot) {
                const int place = __builtin_ctz(set);
                const std::uint32_t value = value_at<M::type>(kept, i++);
                if (slot >= end) {
                    const Index column = (window << kShift) + place;
                    float scale = 1;
                    if (ints) {
                        const Index all = (kept.columns + kept.group - 1) / kept.group;
                        scale = float_of(Type::fp16, kept.scales[row * all + column / kept.group]);
                    }
                    over.emplace_back(std::uint16_t(column), float_of(M::type, value) * scale);
                    continue;
                }
                put(g, slot, value);
                put_index(m, ints ? groups[g] : body, r, slot, place);
            }
        }
    }
}

template <Type V>
void fill_row_as(const View &m, const Kept &kept, Index row, int r, Index i, std::uint8_t *body,
                 std::uint8_t *const *groups, LeftOver &over) {
    const auto with = [&](auto fixed) {
        fill_row_of(fixed, kept, m.group, row, r, i, body, groups, over);
    };
    if (m.kind == Kind::dense) with(Fixed<V, Kind::dense, 0, 0, 8>());
    else if (m.kind == Kind::nm && m.window == 4) with(Fixed<V, Kind::nm, 4, 2, 8>());
    else if (m.kind == Kind::nm && m.keep == 4) with(Fixed<V, Kind::nm, 16, 4, 8>());
    else if (m.kind == Kind::nm) with(Fixed<V, Kind::nm, 16, 8, 8>());
    else if (m.height == 4) with(Fixed<V, Kind::vector, 0, 0, 4>());
    else if (m.height == 8) with(Fixed<V, Kind::vector, 0, 0, 8>());
    else with(Fixed<V, Kind::vector, 0, 0, 16>());
}

void fill_row(const View &m, const Kept &kept, Index row, int r, Index i, std::uint8_t *body,
              std::uint8_t *const *groups, LeftOver &over) {
    switch (m.type) {
    case Type::fp32: return fill_row_as<Type::fp32>(m, kept, row, r, i, body, groups, over);
    case Type::bf16: return fill_row_as<Type::bf16>(m, kept, row, r, i, body, groups, over);
    case Type::fp16: return fill_row_as<Type::fp16>(m, kept, row, r, i, body, groups, over);
    case Type::int8: return fill_row_as<Type::int8>(m, kept, row, r, i, body, groups, over);
    case Type::int4: return fill_row_as<Type::int4>(m, kept, row, r, i, body, groups, over);
    }
}

}  // namespace

void Matrix::fill(const Kept &kept, Index panel) {
    const View &m = view_;
    std::uint8_t *base = data_.data() + starts_[std::size_t(panel)];
    const Index size = starts_[std::size_t(panel) + 1] - starts_[std::size_t(panel)];
    const bool ints = is_integer(m.type), small = m.type == Type::int4;
    std::memset(base, 0, std::size_t(size));
    const Index bytes = (m.columns + 7) / 8, top = panel * m.height;
    const Index rows = std::min<Index>(m.height, m.rows - top);
    const Index scale_columns = ints ? (m.columns + kept.group - 1) / kept.group : 0;

    // Where each group begins, its scales written, int4 filled with what stands for 0.
    thread_local std::vector<std::uint8_t *> groups;
    const Index count = ints ? m.padded / m.group : 0;
    std::uint8_t *body = base;
    const std::uint8_t *block_bits = kept.bits ? kept.bits + top / kept.block * bytes : nullptr;
    if (m.kind == Kind::vector && ints) {
        std::memcpy(base, block_bits, std::size_t(bytes));
        body = base + round_up(m.padded / 8, 32);
    } else if (m.kind == Kind::vector) {
        const Index windows = vector_windows(m);
        auto *counts = reinterpret_cast<std::uint16_t *>(base);
        std::uint8_t *offset = base + 2 * windows;
        for (Index w = 0; w < windows; ++w) {
            const std::uint8_t *begin = offset;
            for (Index i = w * 32; i < std::min(bytes, (w + 1) * 32); ++i)
                for (int byte = block_bits[i]; byte; byte &= byte - 1)
                    *offset++ = std::uint8_t((i - w * 32) * 8 + __builtin_ctz(unsigned(byte)));
            while ((offset - begin) % slot_step(m)) {  // weights 0, at a column that is kept
                *offset = offset[-1];
                ++offset;
            }
            counts[w] = std::uint16_t(offset - begin);
        }
        body = base + round_up(offset - base, 32);
    }
    if (ints) {
        groups.assign(std::size_t(count), nullptr);
        // Of kind vector all scales come first, else those of a group before its weights.
        const bool apart = m.kind == Kind::vector;
        std::uint8_t *at = body + (apart ? count * scale_bytes(m) : 0);
        for (Index g = 0; g < count; ++g) {
            const Index slots = m.kind == Kind::vector ? popcount(base + g * m.group / 8, m.group / 8)
                                : m.kind == Kind::dense ? m.group
                                                        : Index(m.group) / m.window * m.keep;
            auto *scales = reinterpret_cast<std::uint16_t *>(apart ? body + g * scale_bytes(m) : at);
            for (Index r = 0; r < rows; ++r) {
                const Index g_of = g * m.group / kept.group;
                scales[r] = kept.scales[(top + r) * scale_columns + g_of];
                if (m.height == 4) scales[4 + r] = scales[r];
            }
            const Index head = apart ? 0 : scale_bytes(m), whole = head + group_bytes(m, slots);
            groups[std::size_t(g)] = at + head;
            if (small) {
                if (m.kind != Kind::nm) {
                    std::memset(at + head, 0x88, std::size_t(whole - head));
                } else {
                    const Index step = index_slots(m) / 8 * 32;  // bytes of values after 32 of indices
                    for (Index i = head; i < whole; i += 32 + step) std::memset(at + i + 32, 0x88, std::size_t(step));
                }
            }
            at += whole;
        }
    }

    if (m.kind == Kind::bitmask) {
        const Index width = bits_of(m.type) / 8;
        const std::uint8_t *values[8];
        for (Index r = 0; r < rows; ++r)
            values[r] = static_cast<const std::uint8_t *>(kept.values) + first_[std::size_t(top + r)] * width;
        std::uint8_t *to = base + m.padded;
        for (Index b = 0; b < bytes; ++b)
            for (Index r = 0; r < rows; ++r) {
                const std::uint8_t byte = kept.bits[(top + r) / kept.block * bytes + b];
                const Index size = popcount(&byte, 1) * width;
                base[8 * b + r] = byte;
                std::memcpy(to, values[r], std::size_t(size));
                values[r] += size;
                to += size;
            }
        return;
    }
    thread_local LeftOver over[kTileRows];
    for (LeftOver &list : over) list.clear();
    for (Index r = 0; r < rows; ++r)
        fill_row(m, kept, top + r, int(r), first_[std::size_t(top + r)], body, groups.data(), over[r]);
    if (m.rest_starts) {
        auto *step = reinterpret_cast<std::uint16_t *>(rest_.data() + rest_starts_[std::size_t(panel)] * 32);
        const Index steps = rest_starts_[std::size_t(panel) + 1] - rest_starts_[std::size_t(panel)];
        std::memset(step, 0, std::size_t(steps * 32));
        for (int r = 0; r < 8; ++r)
            for (std::size_t s = 0; s < over[r].size(); ++s) {
                step[s * 16 + r] = over[r][s].first;
                step[s * 16 + 8 + r] = half_of_float(over[r][s].second);
            }
    }
}
