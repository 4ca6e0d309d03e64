// Random weights of two of four, some of which keep too many, and random nibbles, most of which mean
// nothing, through every instruction set: what is written is what one group at a time gives, and no
// byte is read or written that is not there (built with sanitizers, see the Makefile).
//
//   groups SEED COUNT
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "pool.h"
#include "product.h"
#include "semi_structured.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::uint8_t kRules[2][16] = {{14, 8, 9, 4, 14, 8, 9, 15, 14, 12, 13, 15, 14, 15, 15, 15},
                                        {0, 12, 13, 4, 14, 8, 9, 15, 12, 12, 13, 15, 14, 15, 15, 15}};

struct Case {
    Grouped g;
    Bytes weight, bits;  // bits: empty if what is not 0 is kept
    Bytes values, nibbles;
};

bool kept_at(const Case &c, Index row, Index column) {
    if (column >= c.g.columns) return false;
    if (!c.bits.empty())
        return c.bits[std::size_t(row * ((c.g.columns + 7) / 8) + column / 8)] >> column % 8 & 1;
    const std::uint8_t *value = &c.weight[std::size_t((row * c.g.columns + column) * c.g.width)];
    for (int byte = 0; byte < c.g.width; ++byte)
        if (value[byte] & (c.g.width > 1 && byte == c.g.width - 1 ? 0x7f : 0xff)) return true;
    return false;
}

// The definition: -1 and values and nibbles, or the first row that keeps too many.
Index compress(const Case &c, Bytes &values, Bytes &nibbles) {
    const int size = c.g.width == 4 ? 2 : 4;
    values.assign(values.size(), 0);
    nibbles.assign(nibbles.size(), 0);
    for (Index row = 0; row < c.g.rows; ++row)
        for (Index group = 0; group < c.g.nibble_bytes * 2; ++group) {
            int mask = 0;
            for (int i = 0; i < size; ++i) mask |= kept_at(c, row, group * size + i) << i;
            const int wide = size == 4 ? mask : (mask & 1 ? 3 : 0) | (mask & 2 ? 12 : 0);
            const int nibble = c.g.rule[wide];
            if (nibble == 15) return row;
            nibbles[std::size_t(row * c.g.nibble_bytes + group / 2)] |= std::uint8_t(nibble << group % 2 * 4);
            for (int i = 0; i < size / 2; ++i) {
                const int place = size == 4 ? nibble >> 2 * i & 3 : nibble == 4 ? 0 : 1;
                if (!(mask >> place & 1)) continue;
                std::memcpy(&values[std::size_t(row * c.g.value_bytes + (group * size / 2 + i) * c.g.width)],
                            &c.weight[std::size_t((row * c.g.columns + group * size + place) * c.g.width)],
                            std::size_t(c.g.width));
            }
        }
    return -1;
}

bool legal(const Case &c, int nibble) {
    if (c.g.width == 4) return nibble == c.g.rule[3] || nibble == c.g.rule[12];
    return nibble != 15 && std::memchr(c.g.rule, nibble, 16);
}

// What the nibbles say of the stored values: the first row that holds one of no meaning, or -1.
Index expand(const Case &c, const Bytes &values, const Bytes &nibbles, Bytes &weight) {
    const int size = c.g.width == 4 ? 2 : 4;
    weight.assign(c.weight.size(), 0);
    for (Index row = 0; row < c.g.rows; ++row)
        for (Index group = 0; group < c.g.nibble_bytes * 2; ++group) {
            const int nibble =
                nibbles[std::size_t(row * c.g.nibble_bytes + group / 2)] >> group % 2 * 4 & 15;
            if (!legal(c, nibble)) return row;
            for (int i = 0; i < size / 2 && nibble; ++i) {
                const Index column = group * size + (size == 4 ? nibble >> 2 * i & 3 : nibble == 4 ? 0 : 1);
                if (column < c.g.columns)
                    std::memcpy(&weight[std::size_t((row * c.g.columns + column) * c.g.width)],
                                &values[std::size_t(row * c.g.value_bytes + (group * size / 2 + i) * c.g.width)],
                                std::size_t(c.g.width));
            }
        }
    return -1;
}

Case draw(std::mt19937_64 &random) {
    const auto below = [&](Index limit) { return Index(random() % std::uint64_t(limit)); };
    const int width = 1 << below(3);
    Case c;
    c.g = {kRules[width == 4 ? 0 : below(2)], width, 1 + below(40), 1 + below(200), 0, 0};
    c.g.value_bytes = least_value_bytes(c.g);
    c.g.nibble_bytes = least_nibble_bytes(c.g);
    c.weight.resize(std::size_t(c.g.rows * c.g.columns * width));
    c.values.resize(std::size_t(c.g.rows * c.g.value_bytes));
    c.nibbles.resize(std::size_t(c.g.rows * c.g.nibble_bytes));
    for (auto &byte : c.weight) byte = std::uint8_t(random());
    const Index row_bytes = (c.g.columns + 7) / 8, size = width == 4 ? 2 : 4, fault = below(4);
    Bytes bits(std::size_t(c.g.rows * row_bytes), 0);
    for (Index row = 0; row < c.g.rows; ++row)
        for (Index first = 0; first < c.g.columns; first += size) {
            Index most = fault == 0 && below(300) == 0 ? size : size / 2;
            for (Index tries = below(6); tries > 0 && most > 0; --tries) {
                const Index column = first + below(size);
                if (column >= c.g.columns) continue;
                std::uint8_t &byte = bits[std::size_t(row * row_bytes + column / 8)];
                most -= !(byte >> column % 8 & 1);
                byte |= std::uint8_t(1 << column % 8);
            }
        }
    if (below(2)) {
        c.bits = bits;
        return c;
    }
    for (Index row = 0; row < c.g.rows; ++row)  // by zeros, now and then -0
        for (Index column = 0; column < c.g.columns; ++column)
            if (!(bits[std::size_t(row * row_bytes + column / 8)] >> column % 8 & 1)) {
                std::uint8_t *value = &c.weight[std::size_t((row * c.g.columns + column) * width)];
                std::memset(value, 0, std::size_t(width));
                if (width > 1 && below(9) == 0) value[width - 1] = 0x80;
            }
    return c;
}

const char *run(std::mt19937_64 &random, Index (&taken)[2]) {
    Case c = draw(random);
    Bytes values = c.values, nibbles = c.nibbles, weight;
    const Index wrong = compress(c, values, nibbles);
    ++taken[wrong >= 0];
    for (const Kernels *isa : usable_kernels()) {
        use_kernels(*isa);
        const std::uint8_t *bits = c.bits.empty() ? nullptr : c.bits.data();
        if (compress_groups(c.g, c.weight.data(), bits, c.values.data(), c.nibbles.data()) != wrong)
            return "another row keeps too many";
        if (wrong < 0 && (c.values != values || c.nibbles != nibbles)) return "other bytes";
    }
    Bytes strange = nibbles;
    if (wrong >= 0 || random() % 2)
        for (Index i = 0; i < 3; ++i) strange[random() % strange.size()] = std::uint8_t(random());
    const Index unknown = expand(c, values, strange, weight);
    Bytes dense(c.weight.size());
    for (const Kernels *isa : usable_kernels()) {
        use_kernels(*isa);
        if (expand_groups(c.g, values.data(), strange.data(), dense.data()) != unknown)
            return "another row holds a nibble of no meaning";
        if (unknown < 0 && dense != weight) return "another weight";
    }
    return nullptr;
}

}  // namespace

int main(int count_of_arguments, char **arguments) {
    if (count_of_arguments != 3) {
        std::fprintf(stderr, "usage: groups SEED COUNT\n");
        return 2;
    }
    const std::uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
    Index taken[2] = {}, wrong = 0;
    for (Index i = 0; i < std::atoll(arguments[2]) && wrong < 10; ++i) {
        if (i % 1000 == 0) set_threads(i / 1000 % 2 ? 3 : 1, false);
        std::mt19937_64 random(seed * 1000003 + std::uint64_t(i));
        if (const char *what = run(random, taken)) {
            ++wrong;
            std::fprintf(stderr, "case %lld of seed %llu: %s\n", static_cast<long long>(i),
                         static_cast<unsigned long long>(seed), what);
        }
    }
    std::printf("%lld weights compressed, %lld refused, %lld wrong, with", static_cast<long long>(taken[0]),
                static_cast<long long>(taken[1]), static_cast<long long>(wrong));
    for (const Kernels *isa : usable_kernels()) std::printf(" %s", isa->name);
    std::printf("\n");
    return wrong ? 1 : 0;
}
