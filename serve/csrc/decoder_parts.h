// What the parts of a step share.
#pragma once

#include <algorithm>

#include "decoder.h"
#include "pool.h"

// Work for each token, in pieces that are worth a thread's while; width: floats of a token.
template <typename Work> void each_token(Index count, Index width, const Work &work) {
    constexpr Index kPiece = 16384;
    over_panels(count, std::max<Index>(1, kPiece / std::max<Index>(1, width)), [&](Index from, Index to) {
        for (Index t = from; t < to; ++t) work(t);
    });
}

inline void grow(Floats &room, Index size) {
    if (Index(room.size()) < size) room.resize(std::size_t(size));
}

// Products with the same inputs [count, columns]; their outputs lie one after the other. next: whose
// turn it is then.
inline void multiply_all(const std::vector<Linear> &linears, const float *x, Index columns, Index count,
                         float *y, const std::vector<Linear> &next) {
    constexpr Index kFew = 8;  // with more, memory is not what a product waits for
    Ahead ranges[kMostAhead];
    int ahead = 0;
    for (const Linear &linear : next) {
        const View &m = linear.matrix->view();
        if (count <= kFew && ahead < kMostAhead) ranges[ahead++] = {m.data, m.starts[m.panels]};
    }
    expect(ranges, ahead);
    std::vector<Factor> factors;
    factors.reserve(linears.size());
    for (const Linear &linear : linears) {
        const float *bias = linear.bias.empty() ? nullptr : linear.bias.data();
        factors.push_back({linear.matrix.get(), linear.act8, bias, y});
        y += linear.matrix->view().rows * count;
    }
    multiply(factors, x, columns, count);
}
