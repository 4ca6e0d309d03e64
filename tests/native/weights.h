// Packed weights that a test makes up.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "matrix.h"

class Random {
  public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}
    Index below(Index limit) { return Index(engine_() % std::uint64_t(limit)); }
    bool one_in(Index n) { return below(n) == 0; }
    float unit() { return float(Index(engine_() >> 40)) * 0x1p-23f - 1; }  // [-1, 1)
    std::uint8_t byte() { return std::uint8_t(engine_()); }
    template <typename T> T of(std::initializer_list<T> choices) {
        return choices.begin()[below(Index(choices.size()))];
    }

  private:
    std::mt19937_64 engine_;
};

struct Packed {
    Index rows = 1, columns = 1, count = 0;
    int block = 1, group = 64;
    Type type = Type::fp32;
    Shape shape;
    bool masked = true;
    std::vector<std::uint8_t> bits, values;
    std::vector<std::uint16_t> scales;

    // Buffers of exactly the lengths that the Python module insists on.
    void fit(Random &random) {
        masked |= shape.kind != Kind::dense;
        const auto resize = [&](auto &buffer, Index size) {
            const std::size_t before = buffer.size();
            buffer.resize(std::size_t(size));
            for (std::size_t i = before; i < buffer.size(); ++i) buffer[i] = random.byte();
            buffer.shrink_to_fit();
        };
        resize(bits, masked ? rows / block * ((columns + 7) / 8) : 0);
        resize(values, (count * bits_of(type) + 7) / 8);
        const bool scaled = is_integer(type) && group > 0;
        resize(scales, scaled ? rows * ((columns + group - 1) / group) : 0);
    }
    bool kept(Index row, Index column) const {
        const Index byte = row / block * ((columns + 7) / 8) + column / 8;
        return !masked || bits[std::size_t(byte)] >> (column % 8) & 1;
    }
    void count_kept() {
        count = 0;
        for (Index row = 0; row < rows; ++row)
            for (Index column = 0; column < columns; ++column) count += kept(row, column);
    }
    Kept view() const {
        Kept all;
        all.rows = rows;
        all.columns = columns;
        all.block = block;
        all.bits = masked ? bits.data() : nullptr;
        all.type = type;
        all.values = values.empty() ? "" : static_cast<const void *>(values.data());  // as numpy does
        all.count = count;
        all.scales = scales.empty() ? nullptr : scales.data();
        all.group = group;
        return all;
    }
};

// A weight with all its parts in order; `rows` of them, or some.
inline Packed sound(Random &random, Index columns, Index rows = 0) {
    Packed p;
    p.type = random.of({Type::fp32, Type::bf16, Type::fp16, Type::int8, Type::int4});
    p.shape.kind = random.of({Kind::dense, Kind::nm, Kind::nm, Kind::vector, Kind::bitmask});
    if (is_integer(p.type) && p.shape.kind == Kind::bitmask) p.shape.kind = Kind::vector;
    p.block = random.of({1, 1, 4, 8, 16});
    if (p.shape.kind == Kind::vector && p.block == 1) p.block = 8;
    if (p.shape.kind == Kind::nm) {
        p.shape.window = random.of({4, 16});
        p.shape.keep = p.shape.window == 4 ? 2 : random.of({4, 8});
        p.shape.rest = random.one_in(3);
    }
    p.group = random.of({32, 64, 128});
    p.rows = (1 + random.below(random.one_in(4) ? 40 : 12)) * p.block;
    if (p.rows > 48) p.rows = p.block;
    if (rows && rows % p.block) {
        p.block = 1;
        if (p.shape.kind == Kind::vector) p.shape.kind = is_integer(p.type) ? Kind::dense : Kind::bitmask;
    }
    if (rows) p.rows = rows;
    p.columns = columns;
    p.masked = p.shape.kind != Kind::dense || random.one_in(2);
    p.fit(random);
    std::fill(p.bits.begin(), p.bits.end(), std::uint8_t(0));
    const Index of_hundred = random.of({0, 10, 30, 50, 100}), bytes = (columns + 7) / 8;
    for (Index row = 0; row < (p.masked ? p.rows / p.block : 0); ++row) {
        const Index density = random.one_in(8) ? random.of({0, 100}) : of_hundred;
        for (Index column = 0, in_window = 0; column < columns; ++column) {
            if (p.shape.kind == Kind::nm && column % p.shape.window == 0) in_window = 0;
            if (random.below(100) >= density) continue;
            if (p.shape.kind == Kind::nm && !p.shape.rest && in_window++ >= p.shape.keep) continue;
            p.bits[std::size_t(row * bytes + column / 8)] |= std::uint8_t(1 << column % 8);
        }
    }
    p.count_kept();
    p.fit(random);
    if (p.type == Type::fp32) {
        for (std::size_t i = 0; i < p.values.size(); i += 4) {
            const float value = random.unit();
            std::memcpy(&p.values[i], &value, 4);
        }
    } else if (p.type == Type::int8) {
        for (std::uint8_t &value : p.values) value = value == 0x80 ? 0 : value;
    } else if (p.type == Type::int4) {
        for (std::uint8_t &value : p.values) {
            if ((value & 15) == 8) value &= 0xf0;
            if (value >> 4 == 8) value &= 0x0f;
        }
    } else {  // exponents near that of 1
        const int exponent = p.type == Type::bf16 ? 0x3f : 0x3c;
        for (std::size_t i = 1; i < p.values.size(); i += 2)
            p.values[i] = std::uint8_t((p.values[i] & 0x80) | (exponent - (p.values[i] & 3)));
    }
    for (std::uint16_t &scale : p.scales) scale = std::uint16_t(0x1c00 + random.below(0x1000));
    return p;
}
