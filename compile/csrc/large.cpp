// Products with many tokens: what is read of the weights is used for all of them.
#include <algorithm>
#include <cstring>

#include "pool.h"
#include "product.h"
#include "scratch.h"

namespace {

constexpr Index kDepth = 256;  // columns of a piece of floats
constexpr Index kIntDepth = 1024;  // of integers
constexpr Index kUnits = 8;    // times kTileRows: the most rows of a piece
constexpr Index kBatch = 240;  // tokens of a piece: of whole tiles
constexpr Index kSkipped = 8;  // panels of 8 rows that run over single weights at once

// The results of a batch of tiles: sums[unit][tile][token][row].
void write_tiles(const Factor &f, const float *sums, Index first, Index count, Index tile0,
                 Index batch, Index wide, Index tokens) {
    const Index all = f.matrix->view().rows;
    for (Index tile = 0; tile < batch; ++tile)
        for (Index t = 0; t < wide; ++t) {
            const Index token = (tile0 + tile) * wide + t;
            if (token >= tokens) break;
            for (Index u = 0; u < count; ++u) {
                const Index top = (first + u) * kTileRows, rows = std::min<Index>(kTileRows, all - top);
                const float *from = sums + ((u * batch + tile) * wide + t) * kTileRows;
                float *y = f.y + token * all + top;
                if (rows == kTileRows) std::memcpy(y, from, kTileRows * sizeof(float));
                else std::copy(from, from + rows, y);
                for (Index r = 0; f.bias && r < rows; ++r) y[r] += f.bias[top + r];
            }
        }
}

// Of a batch of strips: sums[unit][strip][row][token]. Eight tokens at a time, of all rows: rows of y may
// lie so that few of them stay in the nearest cache.
void write_strips(const Kernels &k, const Factor &f, const float *sums, Index first, Index count, Index strip0,
                  Index batch, Index wide, Index tokens) {
    const Index all = f.matrix->view().rows;
    for (Index strip = 0; strip < batch; ++strip)
        for (Index t = 0; t < wide; t += 8) {
            const Index token = (strip0 + strip) * wide + t;
            for (Index u = 0; u < count && token < tokens; ++u) {
                const Index top = (first + u) * kTileRows, rows = std::min<Index>(kTileRows, all - top);
                k.turn(sums + (u * batch + strip) * wide * kTileRows + t, wide, rows, std::min<Index>(8, tokens - token),
                       f.bias ? f.bias + top : nullptr, f.y + token * all + top, all);
            }
        }
}

// Every piece of the columns of every kTileRows rows, a unit, meets every tile of tokens. `group`
// units at a time meet a tile, as many as stay in the nearest cache beside it. Each thread has a Work
// of its own, which has room for kUnits units:
//   expand(unit, piece, u): make the piece ready, as the u-th of those at hand
//   run(piece, u, tile, here, y): y[token * kTileRows + row] += for the `here` tokens of a tile of `wide`;
//   if kStrips, y[row * wide + token]
template <typename Work>
void over_tiles(const Factor &f, Index tokens, Index pieces, const Work &shared) {
    const Index wide = shared.wide, tiles = (tokens + wide - 1) / wide;
    const Index size = wide * kTileRows, most = kBatch / wide, group = shared.group();
    const Index units = (f.matrix->view().rows + kTileRows - 1) / kTileRows;
    // As many pieces for each thread, of at most kUnits.
    const Index threads = get_threads(), rounds = (units + threads * kUnits - 1) / (threads * kUnits);
    const Index step = std::max<Index>(1, units / (threads * rounds));
    over_panels(units, step, [&](Index first, Index last) {
        Work work = shared;
        work.take_room();
        const Index count = last - first;
        float *sums = scratch<float, Room::sums>(kUnits * kBatch * kTileRows);
        for (Index tile0 = 0; tile0 < tiles; tile0 += most) {
            const Index batch = std::min(most, tiles - tile0);
            std::fill(sums, sums + count * batch * size, 0.0f);
            for (Index piece = 0; piece < pieces; ++piece)
                for (Index u = 0; u < count; u += group) {
                    const Index end = std::min(u + group, count);
                    for (Index i = u; i < end; ++i) work.expand(first + i, piece, i);
                    for (Index tile = 0; tile < batch; ++tile) {
                        const Index at = tile0 + tile;
                        const int here = int(std::min(wide, tokens - at * wide));
                        for (Index i = u; i < end; ++i)
                            work.run(piece, i, at, here, sums + (i * batch + tile) * size);
                    }
                }
            if constexpr (Work::kStrips) write_strips(shared.k, f, sums, first, count, tile0, batch, wide, tokens);
            else write_tiles(f, sums, first, count, tile0, batch, wide, tokens);
        }
    });
}

// --------------------------------------------------------------------------------------- floats

// Tokens in tiles: tiled[tile][column][token], zeros behind the columns and the tokens.
const float *tile_floats(const float *x, Index columns, Index tokens, Index padded, Index width) {
    const Index tiles = (tokens + width - 1) / width, pieces = padded / 32;
    float *tiled = scratch<float, Room::tiled>(tiles * padded * width + 64);
    over_panels(tiles * pieces, 16, [&](Index from, Index to) {
        for (Index i = from; i < to; ++i) {
            const Index tile = i / pieces, top = i % pieces * 32;
            float *out = tiled + (tile * padded + top) * width;
            for (Index t = 0; t < width; ++t) {
                const Index token = tile * width + t;
                const float *in = x + token * columns + top;
                const Index here = token < tokens ? std::max<Index>(0, std::min<Index>(32, columns - top)) : 0;
                for (Index c = 0; c < here; ++c) out[c * width + t] = in[c];
                for (Index c = here; c < 32; ++c) out[c * width + t] = 0;
            }
        }
    });
    return tiled;
}

// The weights as floats, zeros included.
struct DenseWork {
    const Kernels &k;
    const Matrix &matrix;
    const View &m;
    const float *tiled;
    Index padded, wide;
    float *weights = nullptr;
    static constexpr bool kStrips = true;

    Index group() const { return 1; }
    void take_room() { weights = scratch<float, Room::weights>(kUnits * kDepth * kTileRows); }
    float *own(Index u) const { return weights + u * kDepth * kTileRows; }
    void expand(Index unit, Index piece, Index u) const {
        const Index from = piece * kDepth, to = std::min(m.padded, from + kDepth);
        const Index panels = kTileRows / m.height;
        const bool fast = !(is_integer(m.type) || m.rest_starts);
        if ((unit + 1) * panels > m.panels) std::fill(own(u), own(u) + kDepth * kTileRows, 0.0f);
        for (Index h = 0; h < panels && unit * panels + h < m.panels; ++h) {
            const Index panel = unit * panels + h;
            if (fast) k.expand(m, panel, from, to, own(u) + h * m.height);
            else matrix.decode(panel, from, to, own(u) + h * m.height);
        }
    }
    void run(Index piece, Index u, Index tile, int here, float *y) const {
        const Index from = piece * kDepth, count = std::min(m.padded - from, kDepth);
        k.strip(own(u), kTileRows, nullptr, tiled + (tile * padded + from) * wide, wide, count, here, y);
    }
};

// Blocks: of the columns, those that are kept.
struct SlotWork {
    const Kernels &k;
    const View &m;
    const float *tiled;
    Index padded, wide;
    static constexpr bool kStrips = true;
    float *weights = nullptr;
    std::int32_t *places = nullptr;
    Index kept[kUnits * 4] = {};  // of the blocks of the units at hand

    Index blocks() const { return kTileRows / m.height; }  // of a unit
    Index group() const {
        const Index slots = m.kept / (m.rows * (padded / kDepth));  // of a piece
        return std::min(kUnits, std::max<Index>(1, kDepth / std::max<Index>(1, slots)));
    }
    void take_room() {
        weights = scratch<float, Room::weights>(kUnits * kDepth * kTileRows);
        places = scratch<std::int32_t, Room::places>(kUnits * blocks() * kDepth);
    }
    float *own(Index block) const { return weights + block * kDepth * m.height; }
    void expand(Index unit, Index piece, Index u) {
        const Index from = piece * kDepth, to = std::min(m.columns, from + kDepth);
        for (Index b = 0; b < blocks(); ++b) {
            const Index panel = unit * blocks() + b, block = u * blocks() + b;
            kept[block] = panel < m.panels
                ? k.slots(m, panel, from, to, wide, own(block), places + block * kDepth) : 0;
        }
    }
    void run(Index piece, Index u, Index tile, int here, float *y) const {
        const float *x = tiled + (tile * padded + piece * kDepth) * wide;
        for (Index b = 0; b < blocks(); ++b) {
            const Index block = u * blocks() + b;
            k.strip(own(block), m.height, places + block * kDepth, x, wide, kept[block], here, y + b * m.height * wide);
        }
    }
};

// ------------------------------------------------------------------------------------- integers

// Activations in tiles of Steps.
struct IntTiles {
    const std::uint8_t *steps;  // [tile][step][token]
    const float *factors;       // [tile][group][token]: the scales
    const std::int32_t *begin;  // the same: minus what weights that are too large give too much
    Index groups, tile_bytes;
};

void write_steps(Steps steps, const std::int8_t *q, Index count, Index wide, std::uint8_t *out) {
    const Index stride = wide * bytes_of(steps), columns = columns_of(steps);
    for (Index s = 0; s < count; ++s, q += columns, out += stride) {
        if (steps == Steps::pairs) {
            const std::int16_t pair[2] = {q[0], q[1]};
            std::memcpy(out, pair, 4);
        } else if (bytes_of(steps) == 4) {
            std::memcpy(out, q, 4);
        } else if (steps == Steps::signs) {
            std::int8_t both[16];
            for (int i = 0; i < 8; ++i) {
                both[i] = q[i];
                both[8 + i] = std::int8_t(-q[i]);
            }
            std::memcpy(out, both, 16);
        } else {
            std::memcpy(out, q, 16);
        }
    }
}

IntTiles tile_ints(const Kernels &k, Steps steps, int group, const float *x, Index columns, Index tokens) {
    const Index wide = k.tile_tokens, tiles = (tokens + wide - 1) / wide, padded = round_up(columns, group);
    const Index groups = padded / group, count = padded / columns_of(steps), size = bytes_of(steps);
    std::uint8_t *tiled = scratch<std::uint8_t, Room::tiled>(tiles * count * size * wide + 64);
    float *factors = scratch<float, Room::factors>(tiles * groups * wide);
    std::int32_t *begin = scratch<std::int32_t, Room::begin>(tiles * groups * wide);
    over_panels(tiles, 1, [&](Index from, Index to) {
        std::int8_t *q = scratch<std::int8_t, Room::q>(padded);
        float *scale = scratch<float, Room::scale>(groups);
        std::int32_t *total = scratch<std::int32_t, Room::total>(groups);
        for (Index token = from * wide; token < to * wide; ++token) {
            const Index tile = token / wide, t = token % wide;
            if (token < tokens) {
                k.quantize(x + token * columns, columns, padded, group, q, scale, total);
            } else {
                std::fill(q, q + padded, std::int8_t(0));
                std::fill(scale, scale + groups, 0.0f);
                std::fill(total, total + groups, 0);
            }
            write_steps(steps, q, count, wide, tiled + (tile * count * wide + t) * size);
            for (Index g = 0; g < groups; ++g) {
                factors[(tile * groups + g) * wide + t] = scale[g];
                begin[(tile * groups + g) * wide + t] = -excess_of(steps) * total[g];
            }
        }
    });
    return {tiled, factors, begin, groups, count * size * wide};
}

struct IntWork {
    const Kernels &k;
    const View &m;
    IntTiles in;
    std::uint8_t *weights = nullptr;
    float *scales = nullptr;

    static constexpr bool kStrips = false;
    const Index wide = k.tile_tokens;
    Index depth() const { return kIntDepth / m.group; }  // groups of a piece
    Index group() const { return 1; }
    void take_room() {
        weights = scratch<std::uint8_t, Room::weights>(kUnits * kIntDepth * 32);
        scales = scratch<float, Room::scales>(kUnits * depth() * kTileRows);
    }
    std::uint8_t *own(Index u) const { return weights + u * kIntDepth * 32; }
    float *own_scales(Index u) const { return scales + u * depth() * kTileRows; }
    void expand(Index unit, Index piece, Index u) const {
        const Index g = piece * depth(), here = std::min(depth(), in.groups - g);
        k.expand_ints(m, unit, g, here, own(u), own_scales(u));
    }
    void run(Index piece, Index u, Index tile, int here, float *y) const {
        const Index g = piece * depth(), groups = std::min(depth(), in.groups - g);
        const Index at = (tile * in.groups + g) * k.tile_tokens;
        const std::uint8_t *steps = in.steps + tile * in.tile_bytes + g * (in.tile_bytes / in.groups);
        k.tile_ints(m, own(u), own_scales(u), steps, in.factors + at, in.begin + at, groups, here, y);
    }
};

// Activations of strips, column by column.
struct IntStrips {
    const std::uint8_t *inputs;  // [strip][column][token], too large by 128, in the order of strip_place
    const float *factors;        // [strip][group][token]: the scales
    Index padded, groups;
};

IntStrips strip_ints(const Kernels &k, int group, const float *x, Index columns, Index tokens) {
    constexpr Index kWide = kStripTokens;
    const Index strips = (tokens + kWide - 1) / kWide, padded = round_up(columns, group), groups = padded / group;
    std::uint8_t *inputs = scratch<std::uint8_t, Room::tiled>(strips * padded * kWide);
    float *factors = scratch<float, Room::factors>(strips * groups * kWide);
    over_panels(strips * (kWide / 4), 1, [&](Index from, Index to) {
        std::int8_t *q = scratch<std::int8_t, Room::q>(4 * padded);
        float *scale = scratch<float, Room::scale>(groups);
        std::int32_t *total = scratch<std::int32_t, Room::total>(groups);
        for (Index four = from; four < to; ++four) {
            const Index strip = four * 4 / kWide, t = four * 4 % kWide;
            for (Index i = 0; i < 4; ++i) {
                const Index token = four * 4 + i;
                if (token < tokens) {
                    k.quantize(x + token * columns, columns, padded, group, q + i * padded, scale, total);
                } else {
                    std::fill(q + i * padded, q + (i + 1) * padded, std::int8_t(0));
                    std::fill(scale, scale + groups, 0.0f);
                }
                for (Index g = 0; g < groups; ++g) factors[(strip * groups + g) * kWide + t + i] = scale[g];
            }
            std::uint8_t *out = inputs + strip * padded * kWide + strip_place(t);
            for (Index c = 0; c < padded; ++c) {
                const std::uint8_t own[4] = {
                    std::uint8_t(q[c] + 128), std::uint8_t(q[padded + c] + 128),
                    std::uint8_t(q[2 * padded + c] + 128), std::uint8_t(q[3 * padded + c] + 128)};
                std::memcpy(out + c * kWide, own, 4);
            }
        }
    });
    return {inputs, factors, padded, groups};
}

// Blocks of integers: of the columns, those that are kept, four at a time.
struct QuadWork {
    const Kernels &k;
    const View &m;
    IntStrips in;
    std::int8_t *weights = nullptr;
    float *scales = nullptr;
    std::int32_t *begin = nullptr, *counts = nullptr;
    std::uint16_t *places = nullptr;
    KeptQuads kept[kUnits * 4] = {};
    static constexpr bool kStrips = true;
    static constexpr Index wide = kStripTokens;

    Index depth() const { return kIntDepth / m.group; }  // groups of a piece
    Index blocks() const { return kTileRows / m.height; }
    Index group() const { return 1; }
    void take_room() {
        const Index most = kUnits * blocks();
        weights = scratch<std::int8_t, Room::weights>(most * kIntDepth * m.height);
        scales = scratch<float, Room::scales>(most * depth() * m.height);
        begin = scratch<std::int32_t, Room::begin>(most * depth() * m.height);
        counts = scratch<std::int32_t, Room::counts>(most * depth());
        places = scratch<std::uint16_t, Room::places>(most * (kIntDepth + 64));
    }
    void expand(Index unit, Index piece, Index u) {
        const Index g = piece * depth(), here = std::min(depth(), in.groups - g);
        for (Index b = u * blocks(); b < (u + 1) * blocks(); ++b) {
            const Index panel = unit * blocks() + b - u * blocks();
            KeptQuads &own = kept[b];
            own.begin = begin + b * depth() * m.height;
            own.counts = counts + b * depth();
            own.columns = places + b * (kIntDepth + 64);
            if (panel < m.panels)
                k.quads(m, panel, g, here, weights + b * kIntDepth * m.height, scales + b * depth() * m.height, own);
            else std::fill(own.counts, own.counts + here, 0);
        }
    }
    void run(Index piece, Index u, Index strip, int here, float *y) const {
        const Index g = piece * depth(), groups = std::min(depth(), in.groups - g);
        const std::uint8_t *x = in.inputs + (strip * in.padded + g * m.group) * kStripTokens;
        for (Index b = 0; b < blocks(); ++b)
            k.strip_ints(kept[u * blocks() + b], m.height, groups, x, in.factors + (strip * in.groups + g) * kStripTokens,
                         here, y + b * m.height * kStripTokens);
    }
};

// ---------------------------------------------------------------------------------- single weights

// The lanes are tokens, and every kept weight is one step: of bitmasks all weights, else those that
// are left over, which are added to y. A piece has `wide` tokens and `depth` columns: of a bitmask so
// many that the activations stay in the cache; weights that are left over are few, and far apart.
void multiply_skipping(const Kernels &k, const Factor &f, const float *x, Index columns, Index tokens,
                       Index wide, Index depth) {
    const View &m = f.matrix->view();
    const bool added = m.kind != Kind::bitmask;
    const Index padded = round_up(m.padded, depth), tiles = (tokens + wide - 1) / wide;
    const Index listed = depth + 8;
    const float *tiled = tile_floats(x, columns, tokens, padded, wide);
    const Index step = std::max<Index>(1, std::min(kSkipped, m.panels / (2 * get_threads())));
    over_panels(m.panels, step, [&](Index first, Index last) {
        const Index count = last - first;
        const Index width = tiles * wide + 16;  // rows that do not share their cache lines
        float *weights = scratch<float, Room::weights>(count * 8 * listed);
        auto *places = scratch<std::uint16_t, Room::places>(count * 8 * listed);
        std::int32_t *counts = scratch<std::int32_t, Room::counts>(count * 8);
        float *sums = scratch<float, Room::sums>(count * 8 * width);
        std::fill(sums, sums + count * 8 * width, 0.0f);
        Index read[kSkipped] = {};
        for (Index from = 0; from < m.padded; from += depth) {
            for (Index p = 0; p < count; ++p)
                k.list(m, first + p, from, std::min(m.padded, from + depth), listed, weights + p * 8 * listed,
                       places + p * 8 * listed, counts + p * 8, read + p);
            for (Index tile = 0; tile < tiles; ++tile) {
                const int vectors = int(std::min<Index>(wide, tokens - tile * wide) + 7) / 8;
                const float *in = tiled + (tile * padded + from) * wide;
                for (Index p = 0; p < count; ++p)
                    k.skip(weights + p * 8 * listed, places + p * 8 * listed, listed, counts + p * 8, in,
                           wide, vectors, sums + p * 8 * width + tile * wide, width);
            }
        }
        const Index top = first * 8, rows = std::min(m.rows - top, count * 8);
        for (Index t = 0; !added && t < tokens; t += 8)
            k.turn(sums + t, width, rows, std::min<Index>(8, tokens - t), f.bias ? f.bias + top : nullptr,
                   f.y + t * m.rows + top, m.rows);
        for (Index t = 0; added && t < tokens; ++t)
            for (Index r = 0; r < rows; ++r)
                f.y[t * m.rows + top + r] += sums[r * width + t] + (f.bias ? f.bias[top + r] : 0.0f);
    });
}

// What a product reads of the activations; factors that read the same share it.
enum class Form { floats, skipped, ints, quads };
Form form_of(const Kernels &k, const Factor &f) {
    const View &m = f.matrix->view();
    if (m.kind == Kind::bitmask) return Form::skipped;
    if (!f.act8 || !rounds_inputs(k, m)) return Form::floats;
    return m.kind == Kind::vector ? Form::quads : Form::ints;
}

// Whether some weights are left over that expanding the integers leaves out.
bool has_rest(const Kernels &k, const Factor &f) {
    const View &m = f.matrix->view();
    return m.rest_starts && k.steps(m) != Steps::bytes;
}

}  // namespace

bool rounds_inputs(const Kernels &k, const View &m) {
    return is_integer(m.type) && (m.kind != Kind::vector || k.quads);
}

void multiply_large(const std::vector<Factor> &factors, const float *x, Index columns, Index tokens) {
    const Kernels &k = kernels();
    std::vector<const Factor *> left;
    for (const Factor &f : factors) left.push_back(&f);
    while (!left.empty()) {
        const View &m = left.front()->matrix->view();
        const Form form = form_of(k, *left.front());
        const auto same = std::stable_partition(left.begin(), left.end(), [&](const Factor *f) {
            const View &other = f->matrix->view();
            return form_of(k, *f) == form && (form < Form::ints || (other.group == m.group && k.steps(other) == k.steps(m)));
        });
        if (form == Form::floats) {
            const Index padded = round_up(columns, kDepth);
            const Index wide = k.strip_width(tokens);
            const float *tiled = tile_floats(x, columns, tokens, padded, wide);
            for (auto f = left.begin(); f != same; ++f) {
                const Matrix &matrix = *(*f)->matrix;
                const View &own = matrix.view();
                if (own.kind == Kind::vector)
                    over_tiles(**f, tokens, padded / kDepth, SlotWork{k, own, tiled, padded, wide});
                else over_tiles(**f, tokens, padded / kDepth, DenseWork{k, matrix, own, tiled, padded, wide});
            }
        } else if (form == Form::quads) {
            const IntStrips in = strip_ints(k, m.group, x, columns, tokens);
            const Index depth = kIntDepth / m.group;
            for (auto f = left.begin(); f != same; ++f)
                over_tiles(**f, tokens, (in.groups + depth - 1) / depth, QuadWork{k, (*f)->matrix->view(), in});
        } else if (form == Form::ints) {
            const IntTiles in = tile_ints(k, k.steps(m), m.group, x, columns, tokens);
            const Index depth = kIntDepth / m.group;
            for (auto f = left.begin(); f != same; ++f) {
                Factor most = **f;
                if (has_rest(k, **f)) most.bias = nullptr;  // what is left over comes first
                over_tiles(most, tokens, (in.groups + depth - 1) / depth, IntWork{k, most.matrix->view(), in});
            }
        }
        for (auto f = left.begin(); f != same; ++f)
            if (form == Form::skipped) multiply_skipping(k, **f, x, columns, tokens, 64, 128);
            else if (form == Form::ints && has_rest(k, **f))
                multiply_skipping(k, **f, x, columns, tokens, 32, m.padded);
        left.erase(left.begin(), same);
    }
}
