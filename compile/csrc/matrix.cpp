#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "places.h"
#include "pool.h"

namespace {

using namespace places;

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

// How many weights of a row of N:M its windows hold beyond N.
Index left_over_of(const View &m, const std::uint8_t *bits, Index bytes) {
    Index over = 0;
    for (Index i = 0; i < bytes; i += 8) {
        std::uint64_t word = 0;
        std::memcpy(&word, bits + i, std::size_t(std::min<Index>(8, bytes - i)));
        if (m.window == 4) {  // three bits of a nibble, or four
            const std::uint64_t pairs = word & word >> 1 & 0x5555555555555555, ones = word | word >> 1;
            const std::uint64_t full = pairs | pairs >> 2;         // a pair of the nibble is full
            const std::uint64_t both = ones & ones >> 2;           // and no pair is empty
            if (!(full & both & 0x1111111111111111)) continue;
        }
        for (int first = 0; first < 64; first += m.window) {
            const std::uint64_t window = word >> first & ((std::uint64_t(1) << m.window) - 1);
            over += std::max(0, __builtin_popcountll(window) - m.keep);
        }
    }
    return over;
}

}  // namespace

// What of the view follows from shape and type.
void Matrix::describe(const Kept &kept, const Shape &shape) {
    if (kept.rows < 1 || kept.columns < 1) throw std::invalid_argument("the matrix is empty");
    View &m = view_;
    m.kind = shape.kind;
    m.type = kept.type;
    m.rows = kept.rows;
    m.columns = kept.columns;
    m.kept = kept.count;
    m.window = m.kind == Kind::nm ? shape.window : 0;
    m.keep = m.kind == Kind::nm ? shape.keep : 0;
    m.height = m.kind == Kind::vector ? kept.block : 8;
    if (is_integer(m.type)) {
        if (kept.group != 32 && kept.group != 64 && kept.group != 128)
            throw std::invalid_argument("groups of " + std::to_string(kept.group) +
                                        " columns; 32, 64 or 128 are possible");
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
    if (shape.rest && m.columns > 65536) throw std::invalid_argument("more than 65536 columns");
    m.panels = (m.rows + m.height - 1) / m.height;
}

Matrix::Matrix(const Kept &kept, const Shape &shape) {
    describe(kept, shape);
    if (is_integer(kept.type) && !kept.scales) throw std::invalid_argument("integers without scales");
    measure(kept, shape.rest);
    refuse_extremes(kept);
    over_panels(view_.panels, 8, [&](Index from, Index to) {
        for (Index panel = from; panel < to; ++panel) fill(kept, panel);
    });
    first_.clear();
    first_.shrink_to_fit();
}

Matrix::Matrix(const Matrix &other)
    : view_(other.view_), data_(Buffer::lasting(other.data_.size())),
      rest_(Buffer::lasting(other.rest_.size())),
      starts_(other.starts_), rest_starts_(other.rest_starts_) {
    std::memcpy(data_.data(), other.data_.data(), std::size_t(data_.size()));
    if (rest_.size()) std::memcpy(rest_.data(), other.rest_.data(), std::size_t(rest_.size()));
    point();
}

Matrix::Matrix(const Kept &kept, const Shape &shape, Laid laid) {
    describe(kept, shape);
    const auto check = [&](const std::vector<Index> &starts, const std::uint8_t *data, Index step, Index bytes) {
        const bool fits = Index(starts.size()) == view_.panels + 1 && starts[0] == 0 &&
                          std::is_sorted(starts.begin(), starts.end()) && starts.back() <= (bytes - kSlack) / step;
        if (!fits || reinterpret_cast<std::uintptr_t>(data) % 64)
            throw std::invalid_argument("streams of other lengths than the layout's");
    };
    check(laid.starts, laid.data, 1, laid.bytes);
    if (shape.rest) check(laid.rest_starts, laid.rest, 32, laid.rest_bytes);
    starts_ = std::move(laid.starts);
    data_ = Buffer::borrowed(laid.data, starts_.back());
    if (shape.rest) {
        rest_starts_ = std::move(laid.rest_starts);
        rest_ = Buffer::borrowed(laid.rest, rest_starts_.back() * 32);
    }
    point();
}

void Matrix::point() {
    view_.data = data_.data();
    view_.starts = starts_.data();
    if (rest_starts_.empty()) return;
    view_.rest = rest_.data();
    view_.rest_starts = rest_starts_.data();
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
                        const Index over = left_over_of(m, row_bits(row), bytes);
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
    data_ = Buffer::lasting(starts_.back());
    if (rest) rest_ = Buffer::lasting(rest_starts_.back() * 32);
    point();
}
