// The layouts of a packed matrix [rows, columns], y = W x: what lies where.
//
// A matrix is a stream of panels, one for every H consecutive rows, in the order in which a product
// reads it. Vectors run over the rows of a panel, so that no sum across lanes is needed. A *slot* is
// one kept weight of each row of a panel; two slots of eight rows make a *chunk*:
//
//   fp32   8 floats of the first slot, 8 of the second                              64 bytes
//   fp16   the same in halves                                                       32
//   bf16   8 x uint32: the first slot in the low, the second in the high half       32
//
// and four slots of eight rows a *quad* of integers, 4 consecutive bytes for each row:
//
//   int8   one quad                                                                 32 bytes
//   int4   two quads, the first in the low nibbles, the second in the high ones,
//          each the value plus 8                                                    32
//
// Integers come in groups of A columns, A = min(group size, 64); a group of a panel starts with the
// fp16 scales of its rows (R = 4: twice).
//
//   kind     H   stream of a panel
//   dense    8   columns are slots: chunks, or groups of quads
//   nm       8   window of 4 (2:4) or 16 columns (N:16, N = 4 or 8), N slots each:
//                  floats: 32 bytes of indices for every 16 slots (2:4: 2 bits in a uint32 for each
//                          row, first slot lowest) or 8 slots (N:16: 4 bits), then their chunks
//                  ints:   32 bytes of indices for every 4 quads (2:4: 2 bits in the byte of the
//                          slot, first quad lowest) or 2 quads (N:16: 4 bits), then their quads
//   vector   R   the kept columns of a block row are slots.
//                  floats: of windows of 256 columns the number of slots, uint16 each; uint8 offsets
//                          of all slots; chunks. The slots of a window are a multiple of 2 (R = 4: of
//                          4), filled up with weight 0 at the last column. R = 16: one chunk for rows
//                          0 to 7 and one for 8 to 15 in turn. R = 4: four slots of four rows make a
//                          chunk, lanes 4 to 7 being the second and the fourth slot.
//                  ints:   the bits of the columns; the scales of all groups; of each group as many
//                          quads as its kept columns need. R = 16: vectors for rows 0 to 7 and 8 to 15 in turn. R = 4: eight
//                          slots of four rows, the first four in the first 16 bytes.
//   bitmask  8   for every 8 columns 8 bytes of bits, one per row; then the kept values in the same
//                order
//
// `rest`: of an unstructured matrix stored as N:16, what is left over, for each panel of 8 rows:
// steps of 8 x uint16 columns and 8 x fp16 weights, short rows filled up with weight 0.
#pragma once

#include <cstdint>

enum class Kind { dense, nm, vector, bitmask };
enum class Type { fp32, bf16, fp16, int8, int4 };

using Index = std::int64_t;

// static: files compiled for different instruction sets must not share these functions.
static constexpr bool is_integer(Type type) { return type == Type::int8 || type == Type::int4; }
static constexpr int bits_of(Type type) {
    return type == Type::fp32 ? 32 : type == Type::int8 ? 8 : type == Type::int4 ? 4 : 16;
}
static constexpr Index round_up(Index x, Index step) { return (x + step - 1) / step * step; }

// What a kernel sees of a matrix: plain pointers, checked when the matrix was packed.
struct View {
    Kind kind = Kind::dense;
    Type type = Type::fp32;
    Index rows = 0, columns = 0;
    Index kept = 0;    // weights
    Index padded = 0;  // columns, rounded up to what the stream goes through
    int height = 8;    // H, rows of a panel
    int window = 0;    // nm: 4 or 16
    int keep = 0;      // nm: N of the window
    int group = 0;     // integers: A
    const std::uint8_t *data = nullptr;
    const Index *starts = nullptr;  // where each panel begins in data; one more at the end
    const std::uint8_t *rest = nullptr;
    const Index *rest_starts = nullptr;  // in steps of 32 bytes; null if nothing is left over
    Index panels = 0;
};

// The activations of a product, ready for the kernels.
struct Inputs {
    const float *x = nullptr;  // [tokens, stride]; columns past the last are 0
    Index stride = 0;
    // Of matrices of integers, if the activations are int8 too, in groups of A columns:
    const std::int8_t *q = nullptr;       // [tokens, padded]
    const float *scale = nullptr;         // [tokens, groups]
    const std::int32_t *total = nullptr;  // [tokens, groups]: sum of q
    Index padded = 0, groups = 0;
};

// How int8 activations meet the integers of a matrix with many tokens, step by step.
enum class Steps {
    pairs,    // two int16
    quads,    // four int8; the weights are uint8, too large by 8
    bytes,    // four int8; the weights are uint8, too large by 128
    signs,    // 2:4: eight int8 and their negatives
    windows,  // N:16: sixteen int8
};
static constexpr Index columns_of(Steps steps) {
    return steps == Steps::pairs ? 2 : steps <= Steps::bytes ? 4 : steps == Steps::signs ? 8 : 16;
}
static constexpr Index bytes_of(Steps steps) { return steps <= Steps::bytes ? 4 : 16; }
static constexpr int excess_of(Steps steps) {
    return steps == Steps::quads ? 8 : steps == Steps::bytes ? 128 : 0;
}

constexpr int kTokens = 4;      // the most that a small product takes at once
constexpr int kMostTile = 12;   // tokens of a tile of a large product, at most
constexpr int kTileRows = 16;

// What is kept of some groups of columns of a panel of blocks of H rows of integers, four columns at a
// time: the quads. The last of each group may be filled up with weights of 0.
struct KeptQuads {
    const std::int8_t *weights;  // [quad][H][4]
    const float *scales;         // [group][H]
    std::int32_t *begin;         // [group][H]: minus 128 times the sum of the weights
    std::uint16_t *columns;      // [quad][4], counted from the first of the columns
    std::int32_t *counts;        // of each group how many quads
};
constexpr int kStripTokens = 64;  // of integers
// Where a token lies in a column of a strip of integers: every sixteen bytes hold four of each sixteen
// tokens, so that interleaving the bytes of four columns lane by lane leaves sixteen tokens in a vector.
static constexpr Index strip_place(Index t) { return t % 16 / 4 * 16 + t / 16 * 4 + t % 4; }

// The kernels of one instruction set. `scratch`: 16 * padded + 4096 bytes.
struct Squeeze;
struct Spread;

struct Kernels {
    const char *name;
    int tile_tokens;  // of a tile of a large product
    // Up to so many tokens every weight is used as it is read from memory: measured with one thread and
    // 2048 x 2048. Not found anew by each process: sums in another order differ in their last bits, and
    // the same question should have the same answer twice.
    Index (*few_tokens)(const View &);
    // y[t * stride + row] = W x_t, for the rows of panels [first, last) and `tokens` <= kTokens.
    void (*small)(const View &, Index first, Index last, const Inputs &, int tokens, float *y,
                  Index stride, float *scratch);
    // Quantise a row of x in groups: q [padded], scale and total [groups].
    void (*quantize)(const float *x, Index columns, Index padded, int group, std::int8_t *q,
                     float *scale, std::int32_t *total);
    // Columns [from, to) of a panel of dense or N:M floats, of whole windows of 256:
    // out[(k - from) * kTileRows + row].
    void (*expand)(const View &, Index panel, Index from, Index to, float *out);
    // The same of a panel of blocks of H rows: w[slot * H + row], and of each slot (its column - from) *
    // wide. Returns how many there are.
    Index (*slots)(const View &, Index panel, Index from, Index to, Index wide, float *w,
                   std::int32_t *places);
    // How many of so many tokens a strip had best have.
    Index (*strip_width)(Index tokens);
    // The lanes being tokens, of 4, 8 or 16 rows: y[row * wide + t] += sum over n of w[n * rows + row] *
    // x[place[n] + t] for t < tokens <= wide; place[n] = n * wide if it is null. What lies behind the
    // tokens, up to `wide`, may be added, too.
    void (*strip)(const float *w, int rows, const std::int32_t *place, const float *x, Index wide,
                  Index count, int tokens, float *y);
    // What strips have summed, of up to 8 tokens: y[t * stride + row] = from[row * wide + t] + bias[row], the
    // bias 0 if it is null; 8 tokens of each row are read.
    void (*turn)(const float *from, Index wide, Index rows, Index tokens, const float *bias, float *y,
                 Index stride);
    // The lanes being rows: y[t * kTileRows + row] += sum over n of w[n * kTileRows + row] *
    // x[n * tile_tokens + t] for t < tokens <= tile_tokens.
    void (*tile)(const float *w, const float *x, Index count, int tokens, float *y);
    // The kept weights of columns [from, to) of the 8 rows of a panel, and of each its column - from:
    // of a bitmask all, else those that are left over. counts[r] of row r, from weights[r * listed]
    // on; 8 more may be written. *read: 0 for the first columns, then what the call before left.
    void (*list)(const View &, Index panel, Index from, Index to, Index listed, float *weights,
                 std::uint16_t *places, std::int32_t *counts, Index *read);
    // Eight rows, the lanes being tokens: y[r * stride + t] += sum over the row's list of
    // weight * x[place * wide + t] for t < 8 * vectors; vectors <= 8; what lies behind them, up to `wide`, may be added, too.
    void (*skip)(const float *w, const std::uint16_t *place, Index listed, const std::int32_t *counts,
                 const float *x, Index wide, int vectors, float *y, Index stride);
    // How activations meet this matrix of integers, which is not one of blocks.
    Steps (*steps)(const View &);
    // Integers: `groups` groups from the first on of the unit-th kTileRows rows, in the order of Steps;
    // scales[g * kTileRows + row]. `out` holds at most 32 bytes a column. Of `bytes` what is left over
    // is among them.
    void (*expand_ints)(const View &, Index unit, Index first, Index groups, std::uint8_t *out,
                        float *scales);
    // y[t * kTileRows + row] += sum over groups of scales[g * kTileRows + row] * factors[at] *
    // (begin[at] + sum over the group's steps of w * x), at = g * tile_tokens + t, x being
    // [step][tile_tokens] of the step's bytes. begin: what makes up for weights that are too large.
    void (*tile_ints)(const View &, const std::uint8_t *w, const float *scales,
                      const std::uint8_t *x, const float *factors, const std::int32_t *begin,
                      Index groups, int tokens, float *y);
    // Blocks of integers; null where they had better become floats. The quads of `groups` groups from the
    // first on of a panel: to out.begin, columns (64 more may be written) and counts, to scales, and to
    // weights, unless they can be used where they lie.
    void (*quads)(const View &, Index panel, Index first, Index groups, std::int8_t *weights, float *scales,
                  KeptQuads &out);
    // y[row * kStripTokens + t] += sum over groups of scales * factors[group * kStripTokens + t] * (begin +
    // sum of the group's weights * x), for t < tokens <= kStripTokens; x [column][kStripTokens] is too
    // large by 128, and its tokens lie in the order of strip_place.
    void (*strip_ints)(const KeptQuads &, int rows, Index groups, const std::uint8_t *x, const float *factors,
                       int tokens, float *y);
    // A row of a weight of `width` bytes a value to stored values and nibbles, see semi_structured.h;
    // bits: the kept columns, or null. False: a group keeps too many.
    bool (*compress_row)(const Squeeze &, int width, const std::uint8_t *row, const std::uint8_t *bits,
                         Index columns, std::uint8_t *values, std::uint8_t *nibbles);
    // And back. False: a nibble is none.
    bool (*expand_row)(const Spread &, int width, const std::uint8_t *values,
                       const std::uint8_t *nibbles, Index columns, std::uint8_t *row);
    // The sum of words, read as fast as memory gives them.
    std::uint64_t (*checksum)(const std::uint64_t *words, Index count);
};

const Kernels &plain_kernels();
#if defined(__x86_64__)
const Kernels &avx2_kernels();
const Kernels &avx512_kernels();
#elif defined(__aarch64__)
const Kernels &neon_kernels();
#endif
