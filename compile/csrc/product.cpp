#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool.h"
#include "scratch.h"

namespace {

constexpr Index kPieceBytes = 256 << 10;  // of a thread at a time: a stream that memory can follow
constexpr Index kCachedBytes = 16 << 10;  // read again for every kTokens tokens

// Rows of x with zeros behind them, if the stream goes further than the columns.
const float *widen(const float *x, Index columns, Index tokens, Index padded) {
    if (padded == columns) return x;
    float *wide = scratch<float, Room::widened>(tokens * padded + 64);
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
        std::int8_t *q = size ? scratch<std::int8_t, Room::q64>(tokens * padded + 64)
                              : scratch<std::int8_t, Room::q32>(tokens * padded + 64);
        float *scale = size ? scratch<float, Room::scale64>(tokens * count) : scratch<float, Room::scale32>(tokens * count);
        std::int32_t *total = size ? scratch<std::int32_t, Room::total64>(tokens * count)
                                   : scratch<std::int32_t, Room::total32>(tokens * count);
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
        float *room = scratch<float, Room::partial>(4 * (widest + 64) + 1024);
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

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

bool rounds_inputs(const View &m, Index tokens) {
    const Kernels &k = kernels();
    return tokens <= k.few_tokens(m) ? is_integer(m.type) : rounds_inputs(k, m);
}

std::vector<const Kernels *> usable_kernels() {
    std::vector<const Kernels *> found;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
            __builtin_cpu_supports("avx512vbmi2"))
            found.push_back(&avx512_kernels());
        found.push_back(&avx2_kernels());
    }
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
    std::vector<Factor> small, large;
    for (const Factor &f : factors) {
        const View &m = f.matrix->view();
        (tokens <= kernels().few_tokens(m) && (f.act8 || !is_integer(m.type)) ? small : large).push_back(f);
    }
    if (!small.empty()) multiply_small(small, x, columns, tokens);
    if (!large.empty()) multiply_large(large, x, columns, tokens);
}
