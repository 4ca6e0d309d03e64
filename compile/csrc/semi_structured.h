// Two of four for GPUs: a weight to its stored values and nibbles, and back.
//
// What a nibble is, and where zeros go that fill a group, says compile/gpu/semi_structured.py. Values
// have 1, 2 or 4 bytes (the *width*); of 4 bytes one of two is stored. A *step* is 16 bytes of a
// row; they become 8 bytes of values and one byte of nibbles, of width 1 two.
#pragma once

#include "layout.h"

// By the mask of eight columns (width 4: of four): what becomes of them.
struct Squeeze {
    // rule: the nibble of each mask of four columns; 15: they are too many.
    Squeeze(const std::uint8_t *rule, int width);

    alignas(64) std::uint8_t places[256][8];  // of each byte stored, width 1: in 4; 128: a zero
    std::uint8_t nibbles[256];
    bool wrong[256];  // a group keeps too many
};

// By two nibbles: where each byte of the dense row comes from. A nibble 0 stores nothing.
struct Spread {
    Spread(const std::uint8_t *rule, int width);

    alignas(64) std::uint8_t places[256][16];  // width 1: in 8; 128: a zero
    bool wrong[256];                           // a nibble that the rule does not know
};

// A dense weight and its compressed form; rows of the latter may be longer than the weight needs.
struct Grouped {
    const std::uint8_t *rule;  // of 16 masks
    int width;
    Index rows, columns;
    Index value_bytes, nibble_bytes;  // from row to row
};
// How many bytes of values, of nibbles, the kernels write of a row at least.
Index least_value_bytes(const Grouped &g);
Index least_nibble_bytes(const Grouped &g);

// bits: the kept columns of each row, or null: those that are not 0. The first row that keeps too
// many in a group, or -1.
Index compress_groups(const Grouped &g, const std::uint8_t *weight, const std::uint8_t *bits,
                      std::uint8_t *values, std::uint8_t *nibbles);
// The first row with a nibble that the rule does not know, or -1.
Index expand_groups(const Grouped &g, const std::uint8_t *values, const std::uint8_t *nibbles,
                    std::uint8_t *weight);
