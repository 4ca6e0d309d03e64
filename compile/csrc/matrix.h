// A packed matrix: made from a bitmask and kept values, checked once, then only read.
#pragma once

#include <string>
#include <vector>

#include "memory.h"

// The kept weights of a matrix as a packed model stores them; see docs/format.md.
struct Kept {
    Index rows = 0, columns = 0;
    int block = 1;                       // R: rows that share one row of bits
    const std::uint8_t *bits = nullptr;  // [rows / R, ceil(columns / 8)]; null: all are kept
    Type type = Type::fp32;
    const void *values = nullptr;  // row by row; int4: two in a byte, the first in the low nibble
    Index count = 0;               // how many values
    const std::uint16_t *scales = nullptr;  // fp16 [rows, ceil(columns / group)]
    int group = 0;
};

// How a matrix shall be stored.
struct Shape {
    Kind kind = Kind::dense;
    int window = 0, keep = 0;  // nm
    bool rest = false;         // nm: what a window holds beyond `keep` is left over
};

// A packed matrix in memory that somebody else keeps, as `Matrix::view` and `Matrix::bytes` of an
// equal one told: its streams with kSlack bytes behind each.
struct Laid {
    const std::uint8_t *data = nullptr, *rest = nullptr;
    Index bytes = 0, rest_bytes = 0;
    std::vector<Index> starts, rest_starts;
};

class Matrix {
  public:
    // Throws std::invalid_argument if the parts contradict each other, or do not fit the shape.
    Matrix(const Kept &kept, const Shape &shape);
    // Of `kept` only what the layout is of counts, not its values. Throws if the streams are not as
    // long as they say; what is in them is trusted.
    Matrix(const Kept &kept, const Shape &shape, Laid laid);
    Matrix(const Matrix &other);
    Matrix(Matrix &&other) = default;  // what the view points to stays where it is

    const View &view() const { return view_; }
    Index bytes() const;
    // Columns [from, to) of a panel as floats: out[(k - from) * kTileRows + row].
    void decode(Index panel, Index from, Index to, float *out) const;

  private:
    void describe(const Kept &kept, const Shape &shape);
    void measure(const Kept &kept, bool rest);
    void point();
    void fill(const Kept &kept, Index panel);

    View view_;
    Buffer data_, rest_;
    std::vector<Index> starts_, rest_starts_;
    std::vector<Index> first_;  // of each row: its first value; only while packing
};

float float_of(Type type, std::uint32_t bits);
