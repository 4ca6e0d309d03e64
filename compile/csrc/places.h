// Where a weight lies in its panel, for packing and for reading single weights; see layout.h.
#pragma once

#include <cstring>

#include "matrix.h"

namespace places {

inline int popcount(const std::uint8_t *p, Index count) {
    int total = 0;
    for (; count >= 8; p += 8, count -= 8) {
        std::uint64_t word;
        std::memcpy(&word, p, 8);
        total += __builtin_popcountll(word);
    }
    for (; count > 0; ++p, --count) total += __builtin_popcount(*p);
    return total;
}

template <class M> int chunk_bytes(const M &m) { return m.type == Type::fp32 ? 64 : 32; }
template <class M> int index_bits(const M &m) { return m.window == 4 ? 2 : 4; }
// nm: slots that one vector of indices serves.
template <class M> int index_slots(const M &m) { return m.window == 4 ? 16 : 8; }

// Of floats: the byte of a slot within the stream of chunks; R = 16 has two chunks for two slots.
template <class M> Index float_place(const M &m, int row, Index slot) {
    const int width = m.type == Type::fp32 ? 4 : 2;
    Index chunk = slot / 2;
    int lane = row % 8, second = int(slot % 2);
    if (m.height == 16) chunk = slot / 2 * 2 + row / 8;
    if (m.height == 4) {
        chunk = slot / 4;
        lane = int(slot % 2) * 4 + row;
        second = int(slot % 4 / 2);
    }
    const int within = m.type == Type::bf16 ? 2 * lane + second : second * 8 + lane;
    Index at = chunk * chunk_bytes(m) + within * width;
    if (m.kind == Kind::nm) at += (slot / index_slots(m) + 1) * 32;
    return at;
}

struct Nibble {
    Index byte;
    int shift;
};

// Of integers: the byte of a slot within its group, after the scales; int4: also which nibble.
template <class M> Nibble int_place(const M &m, int row, Index slot) {
    const bool small = m.type == Type::int4;
    if (m.height == 4) {
        const Index vector = small ? slot / 16 : slot / 8;
        return {vector * 32 + slot % 8 / 4 * 16 + row * 4 + slot % 4, small ? int(slot % 16 / 8) * 4 : 0};
    }
    const Index quad = slot / 4;
    Index vector = small ? quad / 2 : quad;
    if (m.height == 16) vector = vector * 2 + row / 8;
    if (m.kind == Kind::nm) vector += slot / index_slots(m) + 1;
    return {vector * 32 + row % 8 * 4 + slot % 4, small ? int(quad % 2) * 4 : 0};
}

template <class M> void put_index(const M &m, std::uint8_t *base, int row, Index slot, int value) {
    const int bits = index_bits(m), slots = index_slots(m), own = int(slot % slots);
    if (!is_integer(m.type)) {
        std::uint32_t *word = reinterpret_cast<std::uint32_t *>(
            base + slot / slots * (32 + slots / 2 * chunk_bytes(m)) + row * 4);
        *word |= std::uint32_t(value) << (bits * own);
    } else {
        const Index vectors = m.type == Type::int4 ? slots / 8 : slots / 4;
        base[slot / slots * (32 + vectors * 32) + row * 4 + own % 4] |=
            std::uint8_t(value << (bits * (own / 4)));
    }
}

template <class M> int get_index(const M &m, const std::uint8_t *base, int row, Index slot) {
    const int bits = index_bits(m), slots = index_slots(m), own = int(slot % slots);
    const int mask = (1 << bits) - 1;
    if (!is_integer(m.type)) {
        std::uint32_t word;
        std::memcpy(&word, base + slot / slots * (32 + slots / 2 * chunk_bytes(m)) + row * 4, 4);
        return int(word >> (bits * own)) & mask;
    }
    const Index vectors = m.type == Type::int4 ? slots / 8 : slots / 4;
    return base[slot / slots * (32 + vectors * 32) + row * 4 + own % 4] >> (bits * (own / 4)) & mask;
}

// Bytes of the scales of a group.
inline Index scale_bytes(const View &m) { return m.height == 16 ? 32 : 16; }

// Bytes of the weights of a group of `slots` slots; of kind nm also of their indices.
inline Index group_bytes(const View &m, Index slots) {
    const Index per_vector = (m.type == Type::int4 ? 2 : 1) * (m.height == 4 ? 8 : 4);
    Index vectors = (slots + per_vector - 1) / per_vector;
    if (m.type == Type::int4 && m.height == 16) vectors = (slots + 7) / 8;
    if (m.height == 16) vectors *= 2;
    if (m.kind == Kind::nm) vectors += slots / index_slots(m);
    return vectors * 32;
}

inline Index vector_windows(const View &m) {
    return is_integer(m.type) ? m.padded / m.group : (m.columns + 255) / 256;
}
inline int vector_window(const View &m) { return is_integer(m.type) ? m.group : 256; }

// Floats: the slots of a window come in steps of so many.
template <class M> int slot_step(const M &m) { return m.height == 4 ? 4 : 2; }

}  // namespace places
