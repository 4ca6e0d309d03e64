// A packed matrix as floats, weight by weight.
#include <algorithm>
#include <cstring>

#include "matrix.h"
#include "places.h"

using namespace places;

namespace {

float float_of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

float float_of_half(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000) << 16, body = half & 0x7fff;
    if (body >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
    const float magnitude = float_of_bits(body << 13) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

}  // namespace

float float_of(Type type, std::uint32_t bits) {
    if (type == Type::fp32) return float_of_bits(bits);
    if (type == Type::bf16) return float_of_bits(bits << 16);
    if (type == Type::fp16) return float_of_half(std::uint16_t(bits));
    return float(std::int32_t(bits));
}

void Matrix::decode(Index panel, Index from, Index to, float *out) const {
    const View &m = view_;
    const std::uint8_t *base = m.data + m.starts[panel];
    for (Index k = 0; k < to - from; ++k) std::fill_n(out + k * kTileRows, m.height, 0.0f);
    const auto put = [&](int row, Index column, float value) {
        if (column >= from && column < to) out[(column - from) * kTileRows + row] += value;
    };
    const auto float_at = [&](const std::uint8_t *at) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, at, m.type == Type::fp32 ? 4 : 2);
        return float_of(m.type, bits);
    };
    const auto int_at = [&](const std::uint8_t *group, int row, Index slot) {
        const Nibble place = int_place(m, row, slot);
        const int byte = group[place.byte];
        return m.type == Type::int8 ? int(std::int8_t(byte)) : (byte >> place.shift & 15) - 8;
    };
    if (m.kind == Kind::bitmask) {
        const std::uint8_t *at = base + m.padded;
        for (Index k = 0; k < to; k += 8)
            for (int r = 0; r < 8; ++r)
                for (int byte = base[k + r]; byte; byte &= byte - 1) {
                    put(r, k + __builtin_ctz(unsigned(byte)), float_at(at));
                    at += bits_of(m.type) / 8;
                }
        return;
    }
    const bool ints = is_integer(m.type);
    const std::uint8_t *body = base;
    if (!ints && m.kind == Kind::vector) {
        const Index windows = vector_windows(m);
        const auto *counts = reinterpret_cast<const std::uint16_t *>(base);
        const std::uint8_t *offset = base + 2 * windows;
        Index total = 0;
        for (Index w = 0; w < windows; ++w) total += counts[w];
        body = base + round_up(2 * windows + total, 32);
        for (Index w = 0, slot = 0; w < windows; ++w)
            for (Index end = slot + counts[w]; slot < end; ++slot, ++offset)
                for (int r = 0; r < m.height; ++r)
                    put(r, w * 256 + *offset, float_at(body + float_place(m, r, slot)));
        return;
    }
    if (m.kind == Kind::vector) body = base + round_up(m.padded / 8, 32);
    if (!ints) {
        for (int r = 0; r < 8; ++r) {
            if (m.kind == Kind::dense)
                for (Index k = from; k < to; ++k) put(r, k, float_at(body + float_place(m, r, k)));
            else
                for (Index slot = from / m.window * m.keep; slot < (to + m.window - 1) / m.window * m.keep; ++slot) {
                    const float value = float_at(body + float_place(m, r, slot));
                    if (value != 0)
                        put(r, slot / m.keep * m.window + get_index(m, body, r, slot), value);
                }
        }
    } else {
        const bool apart = m.kind == Kind::vector;
        const std::uint8_t *at = body + (apart ? m.padded / m.group * scale_bytes(m) : 0);
        for (Index g = 0; g * m.group < to; ++g) {
            const std::uint8_t *bits = base + g * m.group / 8;  // vector
            const Index slots = m.kind == Kind::vector ? popcount(bits, m.group / 8)
                                : m.kind == Kind::dense ? m.group
                                                        : Index(m.group) / m.window * m.keep;
            const auto *scales =
                reinterpret_cast<const std::uint16_t *>(apart ? body + g * scale_bytes(m) : at);
            const std::uint8_t *group = at + (apart ? 0 : scale_bytes(m));
            std::uint8_t columns[64];
            if (m.kind == Kind::vector)
                for (int k = 0, n = 0; k < m.group; ++k)
                    if (bits[k / 8] >> (k % 8) & 1) columns[n++] = std::uint8_t(k);
            if ((g + 1) * m.group > from)
                for (int r = 0; r < m.height; ++r) {
                    const float scale = float_of_half(scales[r]);
                    for (Index slot = 0; slot < slots; ++slot) {
                        const int value = int_at(group, r, slot);
                        Index column = slot;
                        if (m.kind == Kind::vector) column = columns[slot];
                        if (m.kind == Kind::nm) {
                            if (value == 0) continue;
                            column = slot / m.keep * m.window + get_index(m, group, r, slot);
                        }
                        put(r, g * m.group + column, float(value) * scale);
                    }
                }
            at = group + group_bytes(m, slots);
        }
    }
    if (m.rest_starts)
        for (Index s = m.rest_starts[panel]; s < m.rest_starts[panel + 1]; ++s) {
            const auto *step = reinterpret_cast<const std::uint16_t *>(m.rest + s * 32);
            for (int r = 0; r < 8; ++r)
                if (step[8 + r]) put(r, step[r], float_of_half(step[8 + r]));
        }
}
