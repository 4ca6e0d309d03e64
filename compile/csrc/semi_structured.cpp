#include "semi_structured.h"

#include <atomic>
#include <cstring>

#include "pool.h"
#include "product.h"

namespace {

// Of a group of `size` columns: the column of stored value i.
int place_of(int nibble, int i, int size) { return size == 4 ? nibble >> 2 * i & 3 : (nibble & 3) / 2; }

// Do `work` for every row, from all threads: the first row of which it says false, or -1.
template <typename Work> Index first_wrong(Index rows, const Work &work) {
    std::atomic<Index> first{rows};
    over_panels(rows, 16, [&](Index from, Index to) {
        for (Index row = from; row < to; ++row)
            if (!work(row))
                for (Index known = first; row < known && !first.compare_exchange_weak(known, row);) {}
    });
    return first < rows ? Index(first) : -1;
}

Index steps_of(const Grouped &g) { return (g.columns * g.width + 15) / 16; }

}  // namespace

Squeeze::Squeeze(const std::uint8_t *rule, int width) {
    const int size = width == 4 ? 2 : 4, stored = size / 2;
    std::memset(this, 0, sizeof *this);
    std::memset(places, 128, sizeof places);
    for (int mask = 0; mask < 1 << 2 * size; ++mask)
        for (int half = 0; half < 2; ++half) {
            const int kept = mask >> half * size & ((1 << size) - 1);
            const int nibble = rule[size == 4 ? kept : (kept & 1) * 3 | (kept & 2) * 6];
            wrong[mask] |= nibble == 15;
            nibbles[mask] |= std::uint8_t(nibble << 4 * half);
            for (int i = 0; i < stored; ++i) {
                const int place = place_of(nibble, i, size);
                if (!(kept >> place & 1)) continue;
                for (int byte = 0; byte < width; ++byte)
                    places[mask][(half * stored + i) * width + byte] =
                        std::uint8_t((half * size + place) * width + byte);
            }
        }
}

Spread::Spread(const std::uint8_t *rule, int width) {
    const int size = width == 4 ? 2 : 4, stored = size / 2;
    std::memset(this, 0, sizeof *this);
    std::memset(places, 128, sizeof places);
    for (int pair = 0; pair < 256; ++pair)
        for (int half = 0; half < 2; ++half) {
            const int nibble = pair >> 4 * half & 15;
            wrong[pair] |= nibble == 15 || !std::memchr(rule, nibble, 16) ||
                           (size == 2 && nibble != rule[3] && nibble != rule[12]);
            for (int i = 0; i < stored && nibble; ++i)
                for (int byte = 0; byte < width; ++byte)
                    places[pair][(half * size + place_of(nibble, i, size)) * width + byte] =
                        std::uint8_t((half * stored + i) * width + byte);
        }
}

Index least_value_bytes(const Grouped &g) { return steps_of(g) * 8; }
Index least_nibble_bytes(const Grouped &g) { return steps_of(g) * (g.width == 1 ? 2 : 1); }

Index compress_groups(const Grouped &g, const std::uint8_t *weight, const std::uint8_t *bits,
                      std::uint8_t *values, std::uint8_t *nibbles) {
    const Squeeze table(g.rule, g.width);
    const Index bytes = g.columns * g.width, mask_bytes = (g.columns + 7) / 8;
    return first_wrong(g.rows, [&](Index row) {
        return kernels().compress_row(table, g.width, weight + row * bytes, bits ? bits + row * mask_bytes : nullptr,
                                      g.columns, values + row * g.value_bytes, nibbles + row * g.nibble_bytes);
    });
}

Index expand_groups(const Grouped &g, const std::uint8_t *values, const std::uint8_t *nibbles,
                    std::uint8_t *weight) {
    const Spread table(g.rule, g.width);
    return first_wrong(g.rows, [&](Index row) {
        return kernels().expand_row(table, g.width, values + row * g.value_bytes, nibbles + row * g.nibble_bytes,
                                    g.columns, weight + row * g.columns * g.width);
    });
}
