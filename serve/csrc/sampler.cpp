// From logits to tokens for the rows of a batch: serve/sampling.py says the same in numpy.
//
// Order: logit_bias, penalties, temperature (0: argmax), min_p, top_k, top_p, draw. All sums are in
// double. Tokens that are equally likely are ranked by id. Nothing sorts the vocabulary: a heap
// keeps the best k; the end of the nucleus, and the draw from it, lie in one class of weights.
// Weights are computed and added up once, block by block; a draw looks into one block.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bind.h"
#include "layout.h"
#include "pool.h"

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

namespace nb = nanobind;

namespace {

template <typename T, int Dims>
using Array = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Logits = Array<float, 2>;
using Numbers = Array<std::int32_t, 1>;

constexpr double kGreedyBelow = 1e-5;
constexpr int kLanes = 256;  // running values of a loop over the vocabulary, so that it is vectorised
constexpr double kLeast = std::numeric_limits<double>::denorm_min();
constexpr std::int32_t kRefused = -1;

struct Ranked {
    double value;
    std::int32_t id;
};

bool better(const Ranked &a, const Ranked &b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

// The greatest of n values; NaN if one of them is.
template <typename T> T greatest(const T *x, Index n) {
    T most[kLanes];
    int odd[kLanes] = {};
    std::fill(most, most + kLanes, -std::numeric_limits<T>::infinity());
    Index i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) {
            odd[j] |= x[i + j] != x[i + j];
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
        }
    for (; i < n; ++i) {
        odd[0] |= x[i] != x[i];
        most[0] = x[i] > most[0] ? x[i] : most[0];
    }
    return *std::max_element(odd, odd + kLanes) ? std::numeric_limits<T>::quiet_NaN()
                                                : *std::max_element(most, most + kLanes);
}

// The first place of a value that is there.
template <typename T> Index place_of(T value, const T *x, Index n) {
    Index i = 0;
    for (int found = 0; i + kLanes <= n; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) found |= x[i + j] == value;
        if (found) break;
    }
    return std::find(x + i, x + n, value) - x;
}

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

// The best `count` of those values that reach `floor`, best first.
template <typename T> std::vector<Ranked> best_of(const T *x, Index n, Index count, double floor) {
    std::vector<Ranked> heap;  // the worst on top
    for (Index i = 0; i < n && count > 0; ++i) {
        const double value = double(x[i]);
        if (Index(heap.size()) == count) {
            if (!(value > heap.front().value)) continue;  // equal: the earlier id is better
            std::pop_heap(heap.begin(), heap.end(), better);
            heap.pop_back();
        } else if (!(value >= floor)) {
            continue;
        }
        heap.push_back({value, std::int32_t(i)});
        std::push_heap(heap.begin(), heap.end(), better);
    }
    std::sort_heap(heap.begin(), heap.end(), better);
    return heap;
}

double sum_of(const std::vector<Ranked> &some) {
    double sum = 0;
    for (const Ranked &one : some) sum += one.value;
    return sum;
}

// How many of the best it takes until their sum reaches `target`; those come first, the last of
// them at the end. A search by halves: the two sides of the middle are never sorted.
std::size_t fill(std::vector<Ranked> &some, double target) {
    const auto at = [&](std::size_t i) { return some.begin() + std::ptrdiff_t(i); };
    std::size_t low = 0, high = some.size();
    for (double reached = 0; high - low > 1;) {
        const std::size_t middle = (low + high) / 2;
        std::nth_element(at(low), at(middle), at(high), better);
        double sum = reached;
        for (std::size_t i = low; i < middle; ++i) sum += some[i].value;
        if (sum >= target) {
            high = middle;
        } else {
            low = middle;
            reached = sum;
        }
    }
    return high;
}

// The first token, best first, with which the sum of the weights reaches `target`, and that sum. The
// weights, at most 1, are added up in classes of almost equal ones; one class is searched.
Ranked crossing(const std::vector<Ranked> &weights, double target) {
    constexpr int kClasses = 1024, kShift = 48;  // sixteen for each power of two
    const auto class_of = [](double weight) {
        std::uint64_t bits;
        std::memcpy(&bits, &weight, sizeof bits);
        const std::uint64_t one = std::uint64_t(1023) << (52 - kShift);
        return int(std::min<std::uint64_t>(one - (bits >> kShift), kClasses - 1));
    };
    double sums[kClasses] = {};
    for (const Ranked &one : weights) sums[class_of(one.value)] += one.value;
    int last = 0;  // the class in which the target is reached, or the last that is not empty
    double reached = 0;
    for (int next = 1; next < kClasses && reached + sums[last] < target; ++next)
        if (sums[next] > 0) {
            reached += sums[last];
            last = next;
        }
    std::vector<Ranked> some;
    for (const Ranked &one : weights)
        if (class_of(one.value) == last) some.push_back(one);
    some.resize(fill(some, target - reached));
    return {reached + sum_of(some), some.back().id};
}

// How one sequence chooses its tokens, and those it has chosen.
class Sampler {
  public:
    double temperature, top_p, min_p, repetition, presence, frequency;
    Index top_k;
    std::vector<std::pair<std::int32_t, double>> bias;

    void read(const std::vector<std::int32_t> &prompt) {
        if (repetition != 1)
            for (std::int32_t token : prompt) counts_.emplace(check(token), 0);
    }
    void add(std::int32_t token) {
        if (penalises()) ++counts_[check(token)];
    }
    std::int32_t check(std::int32_t token) {
        if (token < 0) throw std::invalid_argument("a token below 0");
        highest_ = std::max(highest_, token);
        return token;
    }
    std::int32_t highest() const { return highest_; }

    std::int32_t choose(const float *logits, Index n, double uniform) const {
        if (bias.empty() && counts_.empty()) return pick(logits, n, uniform);
        std::vector<double> scores(logits, logits + n);
        for (const auto &[token, number] : bias) scores[std::size_t(token)] += number;
        for (const auto &[token, count] : counts_) {
            double &score = scores[std::size_t(token)];
            if (repetition != 1) score = score > 0 ? score / repetition : score * repetition;
            if (count) score -= presence + frequency * count;
        }
        return pick(scores.data(), n, uniform);
    }

  private:
    bool penalises() const { return repetition != 1 || presence != 0 || frequency != 0; }

    template <typename T> std::int32_t pick(const T *scores, Index n, double uniform) const {
        const T most = greatest(scores, n);
        if (!std::isfinite(most)) return kRefused;
        if (temperature < kGreedyBelow) return std::int32_t(place_of(most, scores, n));
        const double floor = min_p > 0 ? min_p : 0;
        const Weights w(scores, n, double(most), temperature, floor);
        const bool best_only = 0 < top_k && top_k < w.count();
        if (!best_only && top_p == 1) return w.at_sum(uniform * w.mass());
        if (!best_only) {
            // What lies below this adds up to less than the nucleus leaves out: none of it is inside.
            const double bar = (1 - top_p) * w.mass() / double(w.count()) * (1 - 1e-9);
            const std::vector<Ranked> some = w.above(std::max({floor, kLeast, bar}));
            const Ranked edge = crossing(some, top_p * w.mass());
            const std::int32_t drawn = crossing(some, std::nextafter(uniform * edge.value, 2 * w.mass())).id;
            // Rounding may not lead out of the nucleus.
            return better({w[edge.id], edge.id}, {w[drawn], drawn}) ? edge.id : drawn;
        }
        std::vector<Ranked> kept = best_of(w.data(), n, top_k, std::max(floor, kLeast));
        if (top_p < 1) kept.resize(fill(kept, top_p * sum_of(kept)));
        return kept[fill(kept, std::nextafter(uniform * sum_of(kept), 2 * w.mass())) - 1].id;
    }

    std::unordered_map<std::int32_t, int> counts_;  // of tokens in the prompt (0) and in the output
    std::int32_t highest_ = 0;
};

void check_rows(const Logits &logits, const Numbers &rows, std::size_t expected, const char *what) {
    if (rows.size() != expected)
        throw std::invalid_argument(std::to_string(expected) + " " + what + " for " +
                                    std::to_string(rows.size()) + " rows");
    if (logits.shape(1) == 0) throw std::invalid_argument("logits of no tokens");
    for (std::size_t i = 0; i < rows.size(); ++i)
        if (rows.data()[i] < 0 || std::size_t(rows.data()[i]) >= logits.shape(0))
            throw std::invalid_argument("there is no row " + std::to_string(rows.data()[i]) + " in " +
                                        std::to_string(logits.shape(0)) + " rows of logits");
}

std::vector<std::int32_t> sample(const std::vector<Sampler *> &samplers, const Logits &logits,
                                 const Numbers &rows, const Array<double, 1> &uniforms) {
    check_rows(logits, rows, samplers.size(), "samplers");
    check_rows(logits, rows, uniforms.size(), "random numbers");
    const Index width = Index(logits.shape(1));
    for (const Sampler *one : samplers)
        if (one->highest() >= width)
            throw std::invalid_argument("a sampler knows token " + std::to_string(one->highest()) +
                                        ", the logits have " + std::to_string(width));
    std::vector<std::int32_t> tokens(samplers.size());
    {
        const nb::gil_scoped_release release;
        over_panels(Index(samplers.size()), 1, [&](Index from, Index to) {
            for (Index i = from; i < to; ++i)
                tokens[std::size_t(i)] = samplers[std::size_t(i)]->choose(
                    logits.data() + rows.data()[i] * width, width, uniforms.data()[i]);
        });
    }
    for (std::size_t i = 0; i < tokens.size(); ++i)
        if (tokens[i] != kRefused) samplers[i]->add(tokens[i]);
    return tokens;
}

using Scored = std::pair<double, std::vector<std::pair<std::int32_t, double>>>;

Scored score(const float *logits, Index n, std::int32_t token, Index count) {
    const double most = double(greatest(logits, n));
    const double total = most + std::log(Weights(logits, n, most, 1, 0).mass());
    Scored scored{double(logits[token]) - total, {}};
    for (const Ranked &one : best_of(logits, n, count, -std::numeric_limits<double>::infinity()))
        scored.second.emplace_back(one.id, one.value - total);
    return scored;
}

std::vector<Scored> logprobs(const Logits &logits, const Numbers &rows, const Numbers &tokens,
                             const Numbers &counts) {
    check_rows(logits, rows, tokens.size(), "tokens");
    check_rows(logits, rows, counts.size(), "counts");
    const Index width = Index(logits.shape(1));
    for (std::size_t i = 0; i < tokens.size(); ++i)
        if (tokens.data()[i] < 0 || tokens.data()[i] >= width)
            throw std::invalid_argument("there is no token " + std::to_string(tokens.data()[i]));
    std::vector<Scored> scored(tokens.size());
    const nb::gil_scoped_release release;
    over_panels(Index(tokens.size()), 1, [&](Index from, Index to) {
        for (Index i = from; i < to; ++i)
            scored[std::size_t(i)] = score(logits.data() + rows.data()[i] * width, width,
                                           tokens.data()[i], counts.data()[i]);
    });
    return scored;
}

}  // namespace

void bind_sampler(nb::module_ &m) {
    nb::class_<Sampler>(m, "Sampler", "How one sequence chooses its tokens, and those it has chosen.")
        .def("__init__",
             [](Sampler *self, double temperature, double top_p, Index top_k, double min_p,
                double repetition_penalty, double presence_penalty, double frequency_penalty,
                std::vector<std::pair<std::int32_t, double>> logit_bias,
                const std::vector<std::int32_t> &prompt) {
                 new (self) Sampler;
                 self->temperature = temperature;
                 self->top_p = top_p;
                 self->top_k = top_k;
                 self->min_p = min_p;
                 self->repetition = repetition_penalty;
                 self->presence = presence_penalty;
                 self->frequency = frequency_penalty;
                 self->bias = std::move(logit_bias);
                 for (const auto &[token, number] : self->bias) self->check(token);
                 self->read(prompt);
             },
             nb::kw_only(), nb::arg("temperature"), nb::arg("top_p"), nb::arg("top_k"),
             nb::arg("min_p"), nb::arg("repetition_penalty"), nb::arg("presence_penalty"),
             nb::arg("frequency_penalty"), nb::arg("logit_bias"), nb::arg("prompt"));
    m.def("sample", &sample, nb::arg("samplers"), nb::arg("logits").noconvert(),
          nb::arg("rows").noconvert(), nb::arg("uniforms").noconvert(),
          "A token for each row of the logits; -1 where they are not numbers.");
    m.def("logprobs", &logprobs, nb::arg("logits").noconvert(), nb::arg("rows").noconvert(),
          nb::arg("tokens").noconvert(), nb::arg("counts").noconvert(),
          "The log-probability of a token of each row, and the best with theirs.");
}
