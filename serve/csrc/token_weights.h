// What the tokens of a vocabulary weigh: exp of their scores, in double, with sums block by block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layout.h"

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

namespace {

constexpr int kLanes = 256;  // running values of a loop over the vocabulary, so that it is vectorised

struct Ranked {
    double value;
    std::int32_t id;
};

// exp(x) for kLanes numbers x <= 0 within two units in the last place; 0 where that is below 1e-306.
// Whole blocks only, so that equal numbers take the same way: through the vectorised loop. The
// bounds have loops of their own, since GCC would make branches of them.
INLINE void exponentials_of(double *x) {
    constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: the sum's lowest bits are an integer
    for (int i = 0; i < kLanes; ++i) x[i] = x[i] > -707 ? x[i] : -707;
    for (int i = 0; i < kLanes; ++i) {
        const double shifted = x[i] * 1.4426950408889634 + kShift;
        const double k = shifted - kShift;
        const double r = x[i] - k * 6.93147180369123816490e-01 - k * 1.90821492927058770002e-10;
        double power = 1.0 / 6227020800;  // Taylor's series to r^13, |r| <= ln(2) / 2
        power = power * r + 1.0 / 479001600;
        power = power * r + 1.0 / 39916800;
        power = power * r + 1.0 / 3628800;
        power = power * r + 1.0 / 362880;
        power = power * r + 1.0 / 40320;
        power = power * r + 1.0 / 5040;
        power = power * r + 1.0 / 720;
        power = power * r + 1.0 / 120;
        power = power * r + 1.0 / 24;
        power = power * r + 1.0 / 6;
        power = power * r + 0.5;
        power = power * r + 1.0;
        power = power * r + 1.0;
        std::uint64_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits = (bits + 1023) << 52;
        double scale;
        std::memcpy(&scale, &bits, sizeof scale);
        x[i] = power * scale;
    }
    for (int i = 0; i < kLanes; ++i) x[i] = x[i] > 1e-306 ? x[i] : 0;
}

// Of each block of kLanes tokens the sum of the weights that reach the floor, the greatest, and how
// many reach it.
struct Block {
    double sum, peak;
    Index count;
};

// What `count` tokens weigh: exp((x - most) * sharpness); behind them 0.
template <typename T>
INLINE Block weigh(const T *x, Index count, double most, double sharpness, double floor, double *w) {
    if (count == kLanes) {
        for (int i = 0; i < kLanes; ++i) w[i] = (double(x[i]) - most) * sharpness;
    } else {
        for (Index i = 0; i < kLanes; ++i) w[i] = i < count ? (double(x[i]) - most) * sharpness : -1000;
    }
    exponentials_of(w);
    constexpr int kParts = 16;
    double sums[kParts] = {}, peaks[kParts] = {}, counts[kParts] = {};
    for (int i = 0; i < kLanes; i += kParts)
        for (int j = 0; j < kParts; ++j) {
            const double one = w[i + j];
            sums[j] += one >= floor ? one : 0;
            counts[j] += one >= floor ? 1 : 0;
            peaks[j] = one > peaks[j] ? one : peaks[j];
        }
    Block block{0, 0, 0};
    for (int j = 0; j < kParts; ++j) {
        block.sum += sums[j];
        block.count += Index(counts[j]);
        block.peak = std::max(block.peak, peaks[j]);
    }
    return block;
}

template <typename T>
INLINE void weigh_blocks(const T *x, Index n, double most, double sharpness, double floor, double *w,
                         Block *blocks) {
    for (Index i = 0; i < n; i += kLanes)
        *blocks++ = weigh(x + i, std::min<Index>(kLanes, n - i), most, sharpness, floor, w + i);
}

#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma"))) void weigh_wide(const T *x, Index n, double most, double sharpness,
                                                    double floor, double *w, Block *blocks) {
    weigh_blocks(x, n, most, sharpness, floor, w, blocks);
}
template <typename T>
__attribute__((target("avx512f,avx512dq,avx512vl,fma,prefer-vector-width=512"))) void
weigh_widest(const T *x, Index n, double most, double sharpness, double floor, double *w, Block *blocks) {
    weigh_blocks(x, n, most, sharpness, floor, w, blocks);
}
#endif

// The weights of a row of scores, in memory of this thread, good until it weighs the next one. The
// greatest is 1.
class Weights {
  public:
    template <typename T> Weights(const T *x, Index n, double most, double temperature, double floor)
        : n_(n), floor_(floor) {
        thread_local std::vector<double> room;
        thread_local std::vector<Block> blocks;
        room.resize(std::size_t(round_up(n, kLanes)));
        blocks.resize(room.size() / kLanes);
        w_ = room.data();
        blocks_ = blocks.data();
        fill(x, most, 1 / temperature, room.data(), blocks.data());
        for (const Block &block : blocks) {
            mass_ += block.sum;
            count_ += block.count;
        }
        if (!(floor > 0)) count_ = n;
    }
    double mass() const { return mass_; }    // of those that reach the floor
    Index count() const { return count_; }   // how many do
    const double *data() const { return w_; }
    double operator[](std::int32_t id) const { return w_[id]; }

    // The token at which the running sum passes `goal`; the last one if rounding keeps it from that.
    std::int32_t at_sum(double goal) const {
        double reached = 0;
        Index b = 0;
        for (Index i = 0; i * kLanes < n_; ++i) {
            if (!(blocks_[i].sum > 0)) continue;
            b = i;
            if (reached + blocks_[i].sum > goal) break;
            reached += blocks_[i].sum;
        }
        Index last = b * kLanes;
        for (Index i = last; i < std::min(n_, (b + 1) * kLanes); ++i) {
            if (!(w_[i] >= floor_ && w_[i] > 0)) continue;
            last = i;
            reached += w_[i];
            if (reached > goal) break;
        }
        return std::int32_t(last);
    }
    // Those that reach `bar`, which is above 0.
    std::vector<Ranked> above(double bar) const {
        std::vector<Ranked> some;
        for (Index b = 0; b * kLanes < n_; ++b) {
            if (blocks_[b].peak < bar) continue;
            for (Index i = b * kLanes; i < std::min(n_, (b + 1) * kLanes); ++i)
                if (w_[i] >= bar) some.push_back({w_[i], std::int32_t(i)});
        }
        return some;
    }

  private:
    template <typename T> void fill(const T *x, double most, double sharpness, double *w, Block *blocks) {
#if defined(__x86_64__)
        static const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        static const bool widest = wide && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (widest) return weigh_widest(x, n_, most, sharpness, floor_, w, blocks);
        if (wide) return weigh_wide(x, n_, most, sharpness, floor_, w, blocks);
#endif
        weigh_blocks(x, n_, most, sharpness, floor_, w, blocks);
    }

    const double *w_;
    const Block *blocks_;
    Index n_, count_ = 0;
    double floor_, mass_ = 0;
};

}  // namespace
