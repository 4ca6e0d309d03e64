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
#include "token_weights.h"

namespace nb = nanobind;

namespace {

template <typename T, int Dims>
using Array = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Logits = Array<float, 2>;
using Numbers = Array<std::int32_t, 1>;

constexpr double kGreedyBelow = 1e-5;
constexpr double kLeast = std::numeric_limits<double>::denorm_min();
constexpr std::int32_t kRefused = -1;

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
