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
constexpr Index kPieceBytes = 64 << 10;

// Memory that a thread keeps from product to product.
template <typename T, int Name> T *scratch(Index count) {
    thread_local std::vector<T> kept;
    if (Index(kept.size()) < count) kept.resize(std::size_t(count));
    return kept.data();
}

struct Prepared {
    Inputs in;
    int group = 0;
    Index padded = 0;
};

// Rows of x with zeros behind them, if the stream goes further than the columns.
const float *widen(const float *x, Index columns, Index tokens, Index padded) {
    if (padded == columns) return x;
    float *wide = scratch<float, 0>(tokens * padded + 64);
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
        std::int8_t *q = size ? scratch<std::int8_t, 1>(tokens * padded + 64)
                              : scratch<std::int8_t, 2>(tokens * padded + 64);
        float *scale = size ? scratch<float, 3>(tokens * count) : scratch<float, 4>(tokens * count);
        std::int32_t *total = size ? scratch<std::int32_t, 5>(tokens * count)
                                   : scratch<std::int32_t, 6>(tokens * count);
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
    auto &pieces = *[] {
        thread_local std::vector<Piece> kept;
        kept.clear();
        return &kept;
    }();
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
        float *room = scratch<float, 7>(kTokens * (widest + 320));  // more than enough
        for (Index i = from; i < to; ++i) {
            const Piece &piece = pieces[std::size_t(i)];
            const Factor &f = *piece.factor;
            const View &m = f.matrix->view();
            const Inputs &all = inputs[m.group == 64];
            for (Index p = piece.first; p < piece.last;) {
                // Several passes over panels that stay in the cache.
                const Index own = tokens <= kTokens ? piece.last - p
                                                    : std::max<Index>(1, (16 << 10) * (piece.last - piece.first) /
                                                                             std::max<Index>(1, m.starts[piece.last] - m.starts[piece.first]));
                const Index end = std::min(piece.last, p + own);
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

// Sixteen rows of a matrix as floats, for tiles of tokens to run over.
struct Unit {
    float *w;
    std::int32_t *place;  // null: the columns of the piece, one after the other
    Index count;
};

void multiply_large(const Factor &f, const float *x, Index columns, Index tokens) {
    const Kernels &k = kernels();
    const View &m = f.matrix->view();
    const Index tiles = (tokens + kTile - 1) / kTile, padded = round_up(m.padded, kDepth);
    // Tokens in tiles: tiled[tile][column][token].
    float *tiled = scratch<float, 8>(tiles * padded * kTile + 64);
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
        float *weights = scratch<float, 9>(count * room * kTileRows);
        std::int32_t *places = vectors ? scratch<std::int32_t, 10>(count * (padded + padded / kDepth + 1)) : nullptr;
        float *sums = scratch<float, 11>(count * kBatch * kTile * kTileRows);
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
            for (Index tile = 0; tile < batch; ++tile)
                for (Index t = 0; t < kTile; ++t) {
                    const Index token = (tile0 + tile) * kTile + t;
                    if (token >= tokens) break;
                    for (Index u = 0; u < count; ++u) {
                        const Index top = (first + u) * kTileRows;
                        const Index rows = std::min<Index>(kTileRows, m.rows - top);
                        const float *from = sums + ((u * batch + tile) * kTile + t) * kTileRows;
                        float *y = f.y + token * m.rows + top;
                        for (Index r = 0; r < rows; ++r) y[r] = from[r] + (f.bias ? f.bias[top + r] : 0.0f);
                    }
                }
        }
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
    std::vector<Factor> small;
    small.reserve(factors.size());
    for (const Factor &f : factors) {
        const bool fp32_inputs = is_integer(f.matrix->view().type) && !f.act8;
        if (tokens <= kSmall && !fp32_inputs) small.push_back(f);
        else if (tokens > 0) multiply_large(f, x, columns, tokens);
    }
    if (!small.empty() && tokens > 0) multiply_small(small, x, columns, tokens);
}
