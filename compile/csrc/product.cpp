#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool.h"

namespace {

constexpr Index kSmall = 16;      // more tokens than this make a large product
constexpr Index kDepth = 256;     // columns of a piece of a large product
constexpr Index kUnits = 4;       // times kTileRows: rows of a piece
constexpr Index kBatch = 40;      // tiles of tokens of a piece
constexpr Index kPieceBytes = 256 << 10;  // of a thread at a time: a stream that memory can follow
constexpr Index kCachedBytes = 16 << 10;  // read again for every kTokens tokens

// Memory that a thread keeps from product to product, aligned so that no vector crosses a line.
enum Name {
    kWidened, kQ64, kQ32, kScale64, kScale32, kTotal64, kTotal32, kRoom,          // few tokens
    kTiled, kWeights, kPlaces, kSums, kCounts,                                    // many
    kIntTiled, kFactors, kTotals, kRowQ, kRowScale, kRowTotal, kIntWeights, kIntScales, kIntSums,
};
template <typename T, Name> T *scratch(Index count) {
    thread_local Buffer kept;
    const Index size = count * Index(sizeof(T));
    if (kept.size() < size) kept = Buffer(size + size / 4);
    return reinterpret_cast<T *>(kept.data());
}

// Rows of x with zeros behind them, if the stream goes further than the columns.
const float *widen(const float *x, Index columns, Index tokens, Index padded) {
    if (padded == columns) return x;
    float *wide = scratch<float, kWidened>(tokens * padded + 64);
    for (Index t = 0; t < tokens; ++t) {
        std::memcpy(wide + t * padded, x + t * columns, std::size_t(columns) * 4);
        std::fill(wide + t * padded + columns, wide + (t + 1) * padded, 0.0f);
    }
    return wide;
}

void multiply_small(const std::vector<Factor> &factors, const float *x, Index columns,
                    Index tokens) {
    const Kernels &k = kernels();
    Index widest = columns, groups = 0, length = 0;
    for (const Factor &f : factors) {
        const View &m = f.matrix->view();
        widest = std::max(widest, m.padded);
        if (is_integer(m.type)) {
            groups = std::max(groups, m.padded / m.group);
            length = std::max(length, m.padded);
        }
    }
    const float *wide = widen(x, columns, tokens, widest);
    // At most two sizes of groups: 32 and 64.
    Inputs inputs[2];
    for (int size = 0; size < 2; ++size) {
        inputs[size].x = wide;
        inputs[size].stride = widest;
        const int group = size ? 64 : 32;
        const bool wanted = std::any_of(factors.begin(), factors.end(), [&](const Factor &f) {
            return is_integer(f.matrix->view().type) && f.matrix->view().group == group;
        });
        if (!wanted) continue;
        const Index padded = round_up(columns, group), count = padded / group;
        std::int8_t *q = size ? scratch<std::int8_t, kQ64>(tokens * padded + 64)
                              : scratch<std::int8_t, kQ32>(tokens * padded + 64);
        float *scale = size ? scratch<float, kScale64>(tokens * count) : scratch<float, kScale32>(tokens * count);
        std::int32_t *total = size ? scratch<std::int32_t, kTotal64>(tokens * count)
                                   : scratch<std::int32_t, kTotal32>(tokens * count);
        for (Index t = 0; t < tokens; ++t)
            k.quantize(x + t * columns, columns, padded, group, q + t * padded, scale + t * count,
                       total + t * count);
        inputs[size].q = q;
        inputs[size].scale = scale;
        inputs[size].total = total;
        inputs[size].padded = padded;
        inputs[size].groups = count;
    }
    struct Piece {
        const Factor *factor;
        Index first, last;
    };
    thread_local std::vector<Piece> kept_pieces;
    std::vector<Piece> &pieces = kept_pieces;  // the caller's, also in the lambda below
    pieces.clear();
    Index bytes = 0;
    for (const Factor &f : factors) bytes += f.matrix->bytes();
    const Index aim = std::max<Index>(4096, std::min(kPieceBytes, bytes / (4 * get_threads())));
    for (const Factor &f : factors) {
        const View &m = f.matrix->view();
        const Index per_panel = std::max<Index>(1, f.matrix->bytes() / m.panels);
        const Index step = std::max<Index>(1, aim / per_panel);
        for (Index from = 0; from < m.panels; from += step)
            pieces.push_back({&f, from, std::min(m.panels, from + step)});
    }
    over_panels(Index(pieces.size()), 1, [&](Index from, Index to) {
        float *room = scratch<float, kRoom>(4 * (widest + 64) + 1024);
        for (Index i = from; i < to; ++i) {
            const Piece &piece = pieces[std::size_t(i)];
            const Factor &f = *piece.factor;
            const View &m = f.matrix->view();
            const Inputs &all = inputs[m.group == 64];
            for (Index p = piece.first; p < piece.last;) {
                // Several passes over panels that stay in the cache.
                const Index per_panel = std::max<Index>(1, (m.starts[piece.last] - m.starts[piece.first]) /
                                                               (piece.last - piece.first));
                const Index own = std::max<Index>(1, kCachedBytes / per_panel);
                const Index end = tokens <= kTokens ? piece.last : std::min(piece.last, p + own);
                for (Index t = 0; t < tokens; t += kTokens) {
                    Inputs in = all;
                    in.x += t * in.stride;
                    if (in.q) {
                        in.q += t * in.padded;
                        in.scale += t * in.groups;
                        in.total += t * in.groups;
                    }
                    k.small(m, p, end, in, int(std::min<Index>(kTokens, tokens - t)),
                            f.y + t * m.rows, m.rows, room);
                }
                p = end;
            }
            if (f.bias) {
                const Index top = piece.first * m.height, bottom = std::min(m.rows, piece.last * m.height);
                for (Index t = 0; t < tokens; ++t)
                    for (Index r = top; r < bottom; ++r) f.y[t * m.rows + r] += f.bias[r];
            }
        }
    });
}

// The results of a batch of tiles: sums[unit][tile][token][row].
void write_tiles(const Factor &f, const float *sums, Index first, Index count, Index tile0,
                 Index batch, Index tokens) {
    const Index all = f.matrix->view().rows;
    for (Index tile = 0; tile < batch; ++tile)
        for (Index t = 0; t < kTile; ++t) {
            const Index token = (tile0 + tile) * kTile + t;
            if (token >= tokens) break;
            for (Index u = 0; u < count; ++u) {
                const Index top = (first + u) * kTileRows, rows = std::min<Index>(kTileRows, all - top);
                const float *from = sums + ((u * batch + tile) * kTile + t) * kTileRows;
                float *y = f.y + token * all + top;
                for (Index r = 0; r < rows; ++r) y[r] = from[r] + (f.bias ? f.bias[top + r] : 0.0f);
            }
        }
}

void multiply_large(const Factor &f, const float *x, Index columns, Index tokens) {
    const Kernels &k = kernels();
    const View &m = f.matrix->view();
    const Index tiles = (tokens + kTile - 1) / kTile, padded = round_up(m.padded, kDepth);
    // Tokens in tiles: tiled[tile][column][token].
    float *tiled = scratch<float, kTiled>(tiles * padded * kTile + 64);
    over_panels(tiles, 1, [&](Index from, Index to) {
        for (Index tile = from; tile < to; ++tile) {
            float *out = tiled + tile * padded * kTile;
            for (int t = 0; t < kTile; ++t) {
                const Index token = tile * kTile + t;
                const float *in = x + token * columns;
                const Index here = token < tokens ? columns : 0;
                for (Index c = 0; c < here; ++c) out[c * kTile + t] = in[c];
                for (Index c = here; c < padded; ++c) out[c * kTile + t] = 0;
            }
        }
    });
    const bool vectors = m.kind == Kind::vector && m.height == 16 && !is_integer(m.type);
    const bool fast = !is_integer(m.type) && !m.rest_starts &&
                      (m.kind == Kind::dense || m.kind == Kind::nm);
    const Index units = (m.rows + kTileRows - 1) / kTileRows;
    const Index step = std::max<Index>(1, std::min(kUnits, units / (2 * get_threads())));
    over_panels(units, step, [&](Index first, Index last) {
        const Index count = last - first;
        const Index room = vectors ? padded : kDepth;
        float *weights = scratch<float, kWeights>(count * room * kTileRows);
        std::int32_t *places = vectors ? scratch<std::int32_t, kPlaces>(count * (padded + padded / kDepth + 1)) : nullptr;
        float *sums = scratch<float, kSums>(count * kBatch * kTile * kTileRows);
        const Index pieces = padded / kDepth;
        if (vectors)
            for (Index u = 0; u < count; ++u)
                k.slots(m, first + u, weights + u * room * kTileRows, places + u * (padded + pieces + 1));
        for (Index tile0 = 0; tile0 < tiles; tile0 += kBatch) {
            const Index batch = std::min(kBatch, tiles - tile0);
            std::fill(sums, sums + count * batch * kTile * kTileRows, 0.0f);
            for (Index piece = 0; piece < pieces; ++piece) {
                const Index from = piece * kDepth, to = std::min(m.padded, from + kDepth);
                if (!vectors)
                    for (Index u = 0; u < count; ++u) {
                        float *w = weights + u * room * kTileRows;
                        const Index panels = kTileRows / m.height;
                        if ((first + u + 1) * panels > m.panels) std::fill(w, w + room * kTileRows, 0.0f);
                        for (Index h = 0; h < panels; ++h) {
                            const Index panel = (first + u) * panels + h;
                            if (panel >= m.panels) break;
                            if (fast) k.expand(m, panel, from, to, w + h * m.height);
                            else f.matrix->decode(panel, from, to, w + h * m.height);
                        }
                    }
                for (Index tile = 0; tile < batch; ++tile) {
                    const Index at = tile0 + tile;
                    const int here = int(std::min<Index>(kTile, tokens - at * kTile));
                    const float *inputs = tiled + at * padded * kTile;
                    for (Index u = 0; u < count; ++u) {
                        float *y = sums + (u * batch + tile) * kTile * kTileRows;
                        if (vectors) {
                            const std::int32_t *bounds = places + u * (padded + pieces + 1);
                            const std::int32_t *place = bounds + pieces + 1 + bounds[piece];
                            k.tile(weights + (u * room + bounds[piece]) * kTileRows, place, inputs,
                                   bounds[piece + 1] - bounds[piece], here, y);
                        } else {
                            k.tile(weights + u * room * kTileRows, nullptr, inputs + from * kTile,
                                   to - from, here, y);
                        }
                    }
                }
            }
            write_tiles(f, sums, first, count, tile0, batch, tokens);
        }
    });
}

// Integers: the activations become int8, too, in tiles of steps of 4 bytes.
void multiply_large_ints(const Factor &f, const float *x, Index columns, Index tokens) {
    const Kernels &k = kernels();
    const View &m = f.matrix->view();
    const bool wide = m.type == Type::int8;  // steps of two int16, else of four int8
    const Index tiles = (tokens + kTile - 1) / kTile, groups = m.padded / m.group;
    const Index steps = m.padded / (wide ? 2 : 4), depth = kDepth / m.group;  // groups of a piece
    const Index tile_bytes = steps * kTile * 4;
    std::uint8_t *tiled = scratch<std::uint8_t, kIntTiled>(tiles * tile_bytes + 64);
    float *factors = scratch<float, kFactors>(tiles * groups * kTile);
    float *totals = scratch<float, kTotals>(tiles * groups * kTile);
    over_panels(tiles, 1, [&](Index from, Index to) {
        std::int8_t *q = scratch<std::int8_t, kRowQ>(m.padded);
        float *scale = scratch<float, kRowScale>(groups);
        std::int32_t *total = scratch<std::int32_t, kRowTotal>(groups);
        for (Index tile = from; tile < to; ++tile)
            for (Index t = 0; t < kTile; ++t) {
                const Index token = tile * kTile + t;
                std::uint8_t *out = tiled + tile * tile_bytes + t * 4;
                float *factor = factors + tile * groups * kTile + t;
                float *sum = totals + tile * groups * kTile + t;
                if (token >= tokens) {
                    for (Index s = 0; s < steps; ++s) std::memset(out + s * kTile * 4, 0, 4);
                    for (Index g = 0; g < groups; ++g) factor[g * kTile] = sum[g * kTile] = 0;
                    continue;
                }
                k.quantize(x + token * columns, columns, m.padded, m.group, q, scale, total);
                for (Index s = 0; s < steps; ++s) {
                    if (wide) {
                        const std::int16_t pair[2] = {q[2 * s], q[2 * s + 1]};
                        std::memcpy(out + s * kTile * 4, pair, 4);
                    } else {
                        std::memcpy(out + s * kTile * 4, q + 4 * s, 4);
                    }
                }
                for (Index g = 0; g < groups; ++g) {
                    factor[g * kTile] = scale[g];
                    sum[g * kTile] = -8.0f * scale[g] * float(total[g]);
                }
            }
    });
    const Index units = (m.rows + kTileRows - 1) / kTileRows;
    const Index step = std::max<Index>(1, std::min(kUnits, units / (2 * get_threads())));
    over_panels(units, step, [&](Index first, Index last) {
        const Index count = last - first;
        const Index unit_bytes = kDepth / (wide ? 2 : 4) * kTileRows * 4;
        std::uint8_t *weights = scratch<std::uint8_t, kIntWeights>(count * unit_bytes);
        float *scales = scratch<float, kIntScales>(count * depth * kTileRows);
        float *sums = scratch<float, kIntSums>(count * kBatch * kTile * kTileRows);
        for (Index tile0 = 0; tile0 < tiles; tile0 += kBatch) {
            const Index batch = std::min(kBatch, tiles - tile0);
            std::fill(sums, sums + count * batch * kTile * kTileRows, 0.0f);
            for (Index g = 0; g < groups; g += depth) {
                const Index here = std::min(depth, groups - g);
                for (Index u = 0; u < count; ++u)
                    for (Index h = 0; h < 2; ++h) {
                        const Index panel = std::min((first + u) * 2 + h, m.panels - 1);
                        k.expand_ints(m, panel, g, here, weights + u * unit_bytes + 32 * h,
                                      scales + u * depth * kTileRows + 8 * h);
                    }
                for (Index tile = 0; tile < batch; ++tile) {
                    const Index at = tile0 + tile;
                    const int now = int(std::min<Index>(kTile, tokens - at * kTile));
                    const std::uint8_t *in = tiled + at * tile_bytes + g * (steps / groups) * kTile * 4;
                    const Index offset = (at * groups + g) * kTile;
                    for (Index u = 0; u < count; ++u) {
                        float *y = sums + (u * batch + tile) * kTile * kTileRows;
                        const float *own = scales + u * depth * kTileRows;
                        k.tile_ints(m.type, m.group, weights + u * unit_bytes, own, in,
                                    factors + offset, here, now, y);
                        if (!wide) k.tile(own, nullptr, totals + offset, here, now, y);
                    }
                }
            }
            write_tiles(f, sums, first, count, tile0, batch, tokens);
        }
    });
}

// Bitmasks of floats: the lanes are tokens, and every kept weight is one step.
void multiply_skipping(const Factor &f, const float *x, Index columns, Index tokens) {
    constexpr Index kWide = 64, kShort = kListed - 8;  // tokens and columns of a piece: 24 KiB
    const Kernels &k = kernels();
    const View &m = f.matrix->view();
    const Index tiles = (tokens + kWide - 1) / kWide, padded = round_up(m.padded, kShort);
    float *tiled = scratch<float, kTiled>(tiles * padded * kWide);
    over_panels(tiles * (padded / kShort), 1, [&](Index from, Index to) {
        for (Index i = from; i < to; ++i) {
            const Index tile = i / (padded / kShort), top = i % (padded / kShort) * kShort;
            float *out = tiled + (tile * padded + top) * kWide;
            for (Index t = 0; t < kWide; ++t) {
                const Index token = tile * kWide + t;
                const float *in = x + token * columns + top;
                const Index here = token < tokens ? std::max<Index>(0, std::min(kShort, columns - top)) : 0;
                for (Index c = 0; c < here; ++c) out[c * kWide + t] = in[c];
                for (Index c = here; c < kShort; ++c) out[c * kWide + t] = 0;
            }
        }
    });
    const Index step = std::max<Index>(1, std::min<Index>(8, m.panels / (2 * get_threads())));
    over_panels(m.panels, step, [&](Index first, Index last) {
        const Index count = last - first;
        const Index width = tiles * kWide + 16;  // rows that do not share their cache lines
        const Index listed = 8 * kListed;
        float *weights = scratch<float, kWeights>(count * listed);
        std::int32_t *places = scratch<std::int32_t, kPlaces>(count * listed);
        float *sums = scratch<float, kSums>(count * 8 * width);
        std::int32_t *counts = scratch<std::int32_t, kCounts>(count * 8);
        std::fill(sums, sums + count * 8 * width, 0.0f);
        for (Index from = 0; from < m.padded; from += kShort) {
            for (Index p = 0; p < count; ++p)
                k.list(m, first + p, from, std::min(m.padded, from + kShort), kWide,
                       weights + p * listed, places + p * listed, counts + p * 8);
            for (Index tile = 0; tile < tiles; ++tile) {
                const int vectors = int(std::min<Index>(8, (tokens - tile * kWide + 7) / 8));
                const float *in = tiled + (tile * padded + from) * kWide;
                for (Index row = 0; row < count * 8; ++row)
                    k.skip(weights + row * kListed, places + row * kListed, counts[row], in, vectors,
                           sums + row * width + tile * kWide);
            }
        }
        const Index top = first * 8, rows = std::min(m.rows - top, count * 8);
        for (Index t = 0; t < tokens; ++t)
            for (Index r = 0; r < rows; ++r)
                f.y[t * m.rows + top + r] = sums[r * width + t] + (f.bias ? f.bias[top + r] : 0.0f);
    });
}

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

std::vector<const Kernels *> usable_kernels() {
    std::vector<const Kernels *> found;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
        found.push_back(&avx2_kernels());
#elif defined(__aarch64__)
    found.push_back(&neon_kernels());
#endif
    found.push_back(&plain_kernels());
    return found;
}

const Kernels &kernels() {
    const Kernels *now = chosen.load(std::memory_order_relaxed);
    if (!now) chosen.store(now = usable_kernels().front());
    return *now;
}

void use_kernels(const Kernels &wanted) { chosen.store(&wanted); }

void multiply(const std::vector<Factor> &factors, const float *x, Index columns, Index tokens) {
    if (tokens <= 0) return;
    std::vector<Factor> small;
    small.reserve(factors.size());
    for (const Factor &f : factors) {
        const View &m = f.matrix->view();
        const bool ints = is_integer(m.type);
        const bool tiles_of_ints = m.kind == Kind::dense || (m.window == 4 && !m.rest_starts);
        if (tokens <= kSmall && (!ints || f.act8)) small.push_back(f);
        else if (ints && f.act8 && tiles_of_ints) multiply_large_ints(f, x, columns, tokens);
        else if (m.kind == Kind::bitmask) multiply_skipping(f, x, columns, tokens);
        else multiply_large(f, x, columns, tokens);
    }
    if (!small.empty()) multiply_small(small, x, columns, tokens);
}
