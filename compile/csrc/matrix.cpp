#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "pool.h"

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

int popcount(const std::uint8_t *p, Index count) {
    int total = 0;
    for (; count >= 8; p += 8, count -= 8) {
        std::uint64_t word;
        std::memcpy(&word, p, 8);
        total += __builtin_popcountll(word);
    }
    for (; count > 0; ++p, --count) total += __builtin_popcount(*p);
    return total;
}

// ------------------------------------------------------------- where a weight lies in its panel

// What of a View these functions read, known to the compiler: packing must keep up with the disk.
template <Type V, Kind K, int Window, int Keep, int Height> struct Fixed {
    static constexpr Type type = V;
    static constexpr Kind kind = K;
    static constexpr int window = Window, keep = Keep, height = Height;
};

template <class M> int chunk_bytes(const M &m) { return m.type == Type::fp32 ? 64 : 32; }
template <class M> int index_bits(const M &m) { return m.window == 4 ? 2 : 4; }
// nm: slots that one vector of indices serves.
template <class M> int index_slots(const M &m) {
    return m.window == 4 ? 16 : 8;
}

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
Index scale_bytes(const View &m) { return m.height == 16 ? 32 : 16; }

// Bytes of the weights of a group of `slots` slots; of kind nm also of their indices.
Index group_bytes(const View &m, Index slots) {
    const Index per_vector = (m.type == Type::int4 ? 2 : 1) * (m.height == 4 ? 8 : 4);
    Index vectors = (slots + per_vector - 1) / per_vector;
    if (m.type == Type::int4 && m.height == 16) vectors = (slots + 7) / 8;
    if (m.height == 16) vectors *= 2;
    if (m.kind == Kind::nm) vectors += slots / index_slots(m);
    return vectors * 32;
}

Index vector_windows(const View &m) {
    return is_integer(m.type) ? m.padded / m.group : (m.columns + 255) / 256;
}
int vector_window(const View &m) { return is_integer(m.type) ? m.group : 256; }

// Floats: the slots of a window come in steps of so many.
template <class M> int slot_step(const M &m) { return m.height == 4 ? 4 : 2; }

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
    if constexpr (M::kind == Kind::dense) {
        const auto keep = [&](Index column) {
            const std::uint32_t value = value_at<M::type>(kept, i++);
            if constexpr (ints) put(column >> shift, column & (group_size - 1), value);
            else put(0, column, value);
        };
        if (!bits)
            for (Index k = 0; k < kept.columns; ++k) keep(k);
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
                        scale = float_of_half(kept.scales[row * all + column / kept.group]);
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

// The kernels count on -127 to 127 and -7 to 7.
void refuse_extremes(const Kept &kept) {
    if (kept.type == Type::int8) {
        if (std::memchr(kept.values, 0x80, std::size_t(kept.count)))
            throw std::invalid_argument("an int8 value is -128");
    } else if (kept.type == Type::int4) {
        const auto *bytes = static_cast<const std::uint8_t *>(kept.values);
        bool found = false;
        for (Index i = 0; i < kept.count / 2; ++i)
            found |= (bytes[i] & 15) == 8 || (bytes[i] & 0xf0) == 0x80;
        if (kept.count % 2) found |= (bytes[kept.count / 2] & 15) == 8;
        if (found) throw std::invalid_argument("an int4 value is -8");
    }
}

}  // namespace

float float_of(Type type, std::uint32_t bits) {
    if (type == Type::fp32) return float_of_bits(bits);
    if (type == Type::bf16) return float_of_bits(bits << 16);
    if (type == Type::fp16) return float_of_half(std::uint16_t(bits));
    return float(std::int32_t(bits));
}

Buffer::Buffer(Index size) : size_(size) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 4096, std::size_t(size + 64))) throw std::bad_alloc();
    data_.reset(static_cast<std::uint8_t *>(memory));
}

Matrix::Matrix(const Kept &kept, const Shape &shape) {
    if (kept.rows < 1 || kept.columns < 1) throw std::invalid_argument("the matrix is empty");
    View &m = view_;
    m.kind = shape.kind;
    m.type = kept.type;
    m.rows = kept.rows;
    m.columns = kept.columns;
    m.window = m.kind == Kind::nm ? shape.window : 0;
    m.keep = m.kind == Kind::nm ? shape.keep : 0;
    m.height = m.kind == Kind::vector ? kept.block : 8;
    if (is_integer(m.type)) {
        if (kept.group != 32 && kept.group != 64 && kept.group != 128)
            throw std::invalid_argument("groups of " + std::to_string(kept.group) +
                                        " columns; 32, 64 or 128 are possible");
        if (!kept.scales) throw std::invalid_argument("integers without scales");
        if (m.kind == Kind::bitmask) throw std::invalid_argument("no bitmask layout of integers");
        m.group = std::min(kept.group, 64);
        m.padded = round_up(m.columns, m.group);
    } else {
        m.padded = round_up(m.columns, m.kind == Kind::vector ? 256 : 32);
    }
    if (m.kind == Kind::vector && m.columns > Index(1) << 21)
        throw std::invalid_argument("a vector layout of more than 2097152 columns");
    if (m.kind == Kind::vector && m.height != 4 && m.height != 8 && m.height != 16)
        throw std::invalid_argument("a vector layout needs blocks of 4, 8 or 16 rows");
    if (m.kind == Kind::nm &&
        !((m.window == 4 && m.keep == 2) || (m.window == 16 && (m.keep == 4 || m.keep == 8))))
        throw std::invalid_argument("no layout for this N:M");
    measure(kept, shape.rest);
    refuse_extremes(kept);
    over_panels(view_.panels, 8, [&](Index from, Index to) {
        for (Index panel = from; panel < to; ++panel) fill(kept, panel);
    });
    first_.clear();
    first_.shrink_to_fit();
}

Matrix::Matrix(const Matrix &other)
    : view_(other.view_), data_(other.data_.size()), rest_(other.rest_.size()),
      starts_(other.starts_), rest_starts_(other.rest_starts_) {
    std::memcpy(data_.data(), other.data_.data(), std::size_t(data_.size()));
    if (rest_.size()) std::memcpy(rest_.data(), other.rest_.data(), std::size_t(rest_.size()));
    view_.data = data_.data();
    view_.starts = starts_.data();
    if (view_.rest_starts) {
        view_.rest = rest_.data();
        view_.rest_starts = rest_starts_.data();
    }
}

Index Matrix::bytes() const {
    return starts_.back() + (rest_starts_.empty() ? 0 : rest_starts_.back() * 32);
}

// How long each panel is; and that the bits say what the values are.
void Matrix::measure(const Kept &kept, bool rest) {
    View &m = view_;
    const Index bytes = (m.columns + 7) / 8, blocks = m.rows / kept.block;
    if (m.rows % kept.block)
        throw std::invalid_argument(std::to_string(m.rows) + " rows in blocks of " +
                                    std::to_string(kept.block));
    first_.resize(std::size_t(m.rows) + 1);
    const int stray = m.columns % 8 ? 0xff << (m.columns % 8) & 0xff : 0;
    Index total = 0;
    for (Index b = 0; b < blocks; ++b) {
        Index own = m.columns;
        if (kept.bits) {
            const std::uint8_t *bits = kept.bits + b * bytes;
            if (bits[bytes - 1] & stray)
                throw std::invalid_argument("a bit past the last column is set in row " +
                                            std::to_string(b));
            own = popcount(bits, bytes);
        }
        for (int r = 0; r < kept.block; ++r, total += own)
            first_[std::size_t(b * kept.block + r)] = total;
    }
    first_.back() = total;
    if (first_.back() != kept.count)
        throw std::invalid_argument(std::to_string(kept.count) + " values for " +
                                    std::to_string(first_.back()) + " kept weights");
    m.panels = (m.rows + m.height - 1) / m.height;
    starts_.assign(std::size_t(m.panels) + 1, 0);
    if (rest) rest_starts_.assign(std::size_t(m.panels) + 1, 0);
    over_panels(m.panels, 64, [&](Index from, Index to) {
        for (Index panel = from; panel < to; ++panel) {
            Index size = 0, left_over = 0;
            const auto row_bits = [&](Index row) { return kept.bits + row / kept.block * bytes; };
            if (m.kind == Kind::vector) {
                const Index windows = vector_windows(m), width = vector_window(m) / 8;
                const std::uint8_t *bits = row_bits(panel * m.height);
                Index total = 0;
                for (Index w = 0; w < windows; ++w) {
                    const Index n = popcount(bits + w * width, std::min(width, bytes - w * width));
                    total += is_integer(m.type) ? group_bytes(m, n) : round_up(n, slot_step(m));
                }
                size = is_integer(m.type) ? round_up(m.padded / 8, 32) + windows * scale_bytes(m) + total
                                          : round_up(2 * windows + total, 32) +
                                                float_place(m, 0, round_up(total, 4));
            } else if (m.kind == Kind::bitmask) {
                size = m.padded;
                for (Index row = panel * 8; row < std::min(m.rows, panel * 8 + 8); ++row)
                    size += (first_[std::size_t(row) + 1] - first_[std::size_t(row)]) * bits_of(m.type) / 8;
            } else {
                const Index slots = m.kind == Kind::dense ? m.padded : m.padded / m.window * m.keep;
                if (is_integer(m.type)) {
                    size = m.padded / m.group * (scale_bytes(m) + group_bytes(m, slots / (m.padded / m.group)));
                } else {
                    size = slots / 2 * chunk_bytes(m);
                    if (m.kind == Kind::nm) size += slots / index_slots(m) * 32;
                }
                if (m.kind == Kind::nm)
                    for (Index row = panel * 8; row < std::min(m.rows, panel * 8 + 8); ++row) {
                        Index over = 0;
                        const std::uint8_t *bits = row_bits(row);
                        const Index step = m.window == 4 ? 1 : 2;  // bytes
                        for (Index i = 0; i < bytes; i += step) {
                            if (m.window == 4) {
                                over += std::max(0, __builtin_popcount(bits[i] & 15) - 2);
                                over += std::max(0, __builtin_popcount(bits[i] >> 4) - 2);
                            } else {
                                const int n = __builtin_popcount(bits[i]) +
                                              (i + 1 < bytes ? __builtin_popcount(bits[i + 1]) : 0);
                                over += std::max(0, n - m.keep);
                            }
                        }
                        left_over = std::max(left_over, over);
                    }
            }
            starts_[std::size_t(panel) + 1] = round_up(size, 32);
            if (rest) rest_starts_[std::size_t(panel) + 1] = left_over;
            else if (left_over) starts_[std::size_t(panel) + 1] = -1;
        }
    });
    for (std::size_t i = 1; i < starts_.size(); ++i) {
        if (starts_[i] < 0) throw std::invalid_argument("the mask is not of this N:M");
        starts_[i] += starts_[i - 1];
        if (rest) rest_starts_[i] += rest_starts_[i - 1];
    }
    data_ = Buffer(starts_.back());
    m.data = data_.data();
    m.starts = starts_.data();
    if (rest) {
        if (m.columns > 65536) throw std::invalid_argument("more than 65536 columns");
        rest_ = Buffer(rest_starts_.back() * 32);
        m.rest = rest_.data();
        m.rest_starts = rest_starts_.data();
    }
}

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
