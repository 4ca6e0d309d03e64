// Random matrices, sound ones and damaged ones, through Matrix and multiply with every instruction
// set: a damaged matrix is refused or multiplied rightly, a sound one is multiplied rightly, and no
// byte is read or written that is not there (built with sanitizers, see the Makefile).
//
//   sweep SEED COUNT [FIRST]     cases FIRST to FIRST + COUNT - 1 of a seed; all of them are alike
//                                on every machine, so a case that fails can be run alone
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"
#include "product.h"
#include "weights.h"

namespace {

constexpr Index kApart = 8;  // tokens up to which AVX-512 keeps apart what is left over

struct Wrong : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void flip(Random &random, std::uint8_t *bytes, std::size_t size) {
    if (size) bytes[std::size_t(random.below(Index(size)))] ^= std::uint8_t(1 << random.below(8));
}

void damage(Random &random, Packed &p) {
    switch (random.below(12)) {
    case 0: case 1: case 2: return flip(random, p.bits.data(), p.bits.size());
    case 3: case 4: return flip(random, p.values.data(), p.values.size());
    case 5: return flip(random, reinterpret_cast<std::uint8_t *>(p.scales.data()), p.scales.size() * 2);
    case 6: p.count = std::max<Index>(0, p.count + random.of<Index>({-1, 1, 7, -64})); break;
    case 7: p.rows += p.block * random.of({1, -1}); break;
    case 8: p.columns += random.of({1, -1, 8, -8, 64}); break;
    case 9: p.group = random.of({32, 64, 128, 0, -64, 48, 1, 1 << 30}); break;
    case 10:
        p.shape.kind = random.of({Kind::dense, Kind::nm, Kind::vector, Kind::bitmask});
        p.shape.window = random.of({0, 4, 8, 16, p.shape.window});
        p.shape.keep = random.of({0, 1, 2, 4, 8, 16, p.shape.keep});
        p.shape.rest = random.one_in(2);
        break;
    default:
        p.type = random.of({Type::fp32, Type::bf16, Type::fp16, Type::int8, Type::int4});
        p.block = random.of({1, 2, 3, 4, 8, 16, 32});
    }
    p.rows = std::max<Index>(1, p.rows / p.block) * p.block;
    p.columns = std::max<Index>(1, p.columns);
    p.fit(random);
}

// ------------------------------------------------------------------------ what a weight stands for

double half(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::nan("") : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// The nearest half, ties to even.
double to_half(double x) {
    if (x == 0 || !std::isfinite(x)) return x;
    const double step = std::ldexp(1, std::max(std::ilogb(x), -14) - 10);
    const double rounded = std::nearbyint(x / step) * step;
    return std::fabs(rounded) < 65536 ? rounded : std::copysign(INFINITY, x);
}

struct Dense {
    std::vector<double> w;          // [rows, columns]
    std::vector<std::uint8_t> how;  // 0: removed, 1: kept, 2: kept apart, with fp32 activations
};

Dense unpack(const Packed &p) {
    Dense d{std::vector<double>(std::size_t(p.rows * p.columns)),
            std::vector<std::uint8_t>(std::size_t(p.rows * p.columns))};
    const bool apart = p.shape.kind == Kind::nm && p.shape.rest;
    Index next = 0;
    for (Index row = 0; row < p.rows; ++row)
        for (Index column = 0, in_window = 0; column < p.columns; ++column) {
            if (apart && column % p.shape.window == 0) in_window = 0;
            if (!p.kept(row, column)) continue;
            const Index i = next++;
            double value = 0;
            if (p.type == Type::fp32) {
                float exact;
                std::memcpy(&exact, &p.values[std::size_t(4 * i)], 4);
                value = exact;
            } else if (p.type == Type::int8) {
                value = std::int8_t(p.values[std::size_t(i)]);
            } else if (p.type == Type::int4) {
                const int nibble = p.values[std::size_t(i / 2)] >> (i % 2 * 4) & 15;
                value = nibble < 8 ? nibble : nibble - 16;
            } else {
                const int bits = p.values[std::size_t(2 * i)] | p.values[std::size_t(2 * i + 1)] << 8;
                const std::uint32_t wide = std::uint32_t(bits) << 16;
                float exact;
                std::memcpy(&exact, &wide, 4);
                value = p.type == Type::fp16 ? half(std::uint16_t(bits)) : exact;
            }
            if (is_integer(p.type)) {
                const Index groups = (p.columns + p.group - 1) / p.group;
                value *= half(p.scales[std::size_t(row * groups + column / p.group)]);
            }
            const bool over = apart && in_window++ >= p.shape.keep;
            d.w[std::size_t(row * p.columns + column)] = over ? to_half(value) : value;
            d.how[std::size_t(row * p.columns + column)] = over ? 2 : 1;
        }
    return d;
}

// Activations in int8, as compile/cpu.py says, and of each group the scale.
void quantise(const float *x, Index columns, Index group, std::vector<double> &q,
              std::vector<double> &scale) {
    q.assign(std::size_t(columns), 0);
    scale.assign(std::size_t((columns + group - 1) / group), 0);
    for (Index from = 0; from < columns; from += group) {
        const Index to = std::min(columns, from + group);
        float peak = 0;
        bool finite = true;
        for (Index i = from; i < to; ++i) {
            finite &= bool(std::isfinite(x[i]));
            peak = std::max(peak, std::fabs(x[i]));
        }
        double &own = scale[std::size_t(from / group)];
        own = finite ? double(peak) / 127 : std::nan("");
        if (!finite || peak < 0x1p-100f) {
            if (finite) own = 0;
            continue;
        }
        const float factor = 127.0f / peak;
        for (Index i = from; i < to; ++i) {
            const float scaled = x[i] * factor;
            q[std::size_t(i)] = std::nearbyint(double(scaled));
        }
    }
}

// ------------------------------------------------------------------------------------ one case

std::string text(const Packed &p, const char *isa, Index tokens) {
    static const char *kinds[] = {"dense", "nm", "vector", "bitmask"};
    static const char *types[] = {"fp32", "bf16", "fp16", "int8", "int4"};
    std::string said = std::string(isa) + ", " + kinds[int(p.shape.kind)] + " " + types[int(p.type)];
    said += " " + std::to_string(p.rows) + "x" + std::to_string(p.columns) + ", blocks of " +
            std::to_string(p.block) + ", " + std::to_string(p.shape.keep) + ":" +
            std::to_string(p.shape.window) + (p.shape.rest ? "+rest" : "") + ", groups of " +
            std::to_string(p.group) + ", " + std::to_string(tokens) + " tokens";
    return said;
}

std::string digits(double x) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.9g", x);
    return buffer;
}

// The integer times its scale again that a weight was before it was rounded to half; NaN if it cannot
// be found.
double recovered(const Packed &p, double rounded, Index row, Index column) {
    const double scale = half(p.scales[std::size_t(row * ((p.columns + p.group - 1) / p.group) + column / p.group)]);
    const float whole = rounded == 0 ? 0 : std::rint(float(rounded) / float(scale));
    return std::fabs(whole) <= 127 ? double(whole) * scale : NAN;
}

void check(const Packed &p, const Dense &d, const Matrix &matrix, bool act8, const float *x, Index tokens,
           const float *bias, const float *y, const std::string &where) {
    const Index group = std::min(p.group, 64);
    const bool rough = act8 && rounds_inputs(matrix.view(), tokens);
    const bool apart = tokens <= kApart || kernels().steps(matrix.view()) != Steps::bytes;
    std::vector<double> q, scale;
    for (Index t = 0; t < tokens; ++t) {
        const float *in = x + t * p.columns;
        if (rough) quantise(in, p.columns, group, q, scale);
        for (Index row = 0; row < p.rows; ++row) {
            double sum = 0, size = 0;
            bool unclear = false, finite = true;
            for (Index column = 0; column < p.columns; ++column) {
                const std::size_t at = std::size_t(row * p.columns + column);
                const bool eight = rough && (d.how[at] < 2 || !apart);
                const double weight = eight && d.how[at] == 2 ? recovered(p, d.w[at], row, column) : d.w[at];
                unclear |= std::isnan(weight) && !std::isnan(d.w[at]);
                const double own = eight ? scale[std::size_t(column / group)] : 1;
                const double input = eight ? q[std::size_t(column)] * own : in[column];
                if (d.how[at] == 0) {  // a stored zero may have been multiplied with it
                    unclear |= !std::isfinite(input);
                    continue;
                }
                finite &= std::isfinite(weight) && std::isfinite(input);
                unclear |= eight && std::fabs(weight) * own > 1e30;
                sum += weight * input;
                size += std::fabs(weight * input);
            }
            if (is_integer(p.type)) {  // scales of other weights than the kept ones are used, too
                const Index groups = (p.columns + p.group - 1) / p.group;
                for (Index g = 0; g < groups; ++g) {
                    const double own = half(p.scales[std::size_t(row * groups + g)]);
                    if (!std::isfinite(own)) unclear = true;
                    const Index end = rough ? std::min(p.columns, (g + 1) * p.group) : 0;
                    for (Index column = g * p.group; column < end; ++column) {
                        const double factor = std::fabs(own) * scale[std::size_t(column / group)];
                        unclear |= !(factor < 1e30);
                    }
                }
            }
            const float found = y[t * p.rows + row];
            if (bias) {
                sum += bias[row];
                size += std::fabs(double(bias[row]));
            }
            const bool fine = finite ? unclear || size > 1e37 || std::fabs(found - sum) <= 4e-6 * size + 1e-35
                                     : unclear || !std::isfinite(found);
            if (!fine)
                throw Wrong(where + ": row " + std::to_string(row) + " of token " +
                            std::to_string(t) + " is " + digits(found) + ", not " + digits(sum));
        }
    }
}

void check_decoded(Random &random, const Packed &p, const Dense &d, const Matrix &matrix,
                   const std::string &where) {
    const View &m = matrix.view();
    const Index panel = random.below(m.panels), from = random.below(p.columns) & ~Index(31);
    const Index to = from + 1 + random.below(p.columns - from);
    std::vector<float> out(std::size_t((to - from) * kTileRows), 7);
    matrix.decode(panel, from, to, out.data());
    for (Index row = panel * m.height; row < std::min(p.rows, (panel + 1) * m.height); ++row)
        for (Index column = from; column < to; ++column) {
            const float found = out[std::size_t((column - from) * kTileRows + row - panel * m.height)];
            const auto wanted = float(d.w[std::size_t(row * p.columns + column)]);
            if (found != wanted && !(std::isnan(found) && std::isnan(wanted)))
                throw Wrong(where + ": weight " + std::to_string(row) + ", " + std::to_string(column) +
                            " is " + digits(found) + ", not " + digits(wanted));
        }
}

// True if the weight was taken.
bool run_case(Random &random, bool damaged) {
    const Index widest = random.of<Index>({20, 70, 140, 140, 600});
    std::vector<Packed> packed{sound(random, 1 + random.below(widest))};
    if (random.one_in(4)) packed.push_back(sound(random, packed[0].columns));
    if (damaged) {
        for (Index n = 1 + random.below(3); n > 0; --n) damage(random, packed[0]);
        if (!random.one_in(3)) {  // as one who wants it to be taken would do
            packed[0].count_kept();
            packed[0].fit(random);
        }
    }
    if (packed[0].columns != packed.back().columns) packed.pop_back();
    std::vector<std::unique_ptr<Matrix>> matrices;
    std::vector<Dense> dense;
    try {
        for (const Packed &p : packed) matrices.push_back(std::make_unique<Matrix>(p.view(), p.shape));
    } catch (const std::invalid_argument &fault) {
        if (!damaged) throw Wrong(text(packed[0], "refused", 0) + ": " + fault.what());
        return false;
    }
    for (std::size_t i = 0; i < packed.size(); ++i) {
        dense.push_back(unpack(packed[i]));
        if (random.one_in(4)) matrices[i] = std::make_unique<Matrix>(*matrices[i]);
        check_decoded(random, packed[i], dense[i], *matrices[i], text(packed[i], "decoded", 0));
    }
    const Index tokens = random.one_in(6) ? random.of<Index>({7, 16, 17, 19, 31, 45, 61, 70}) : 1 + random.below(5);
    const Index columns = packed[0].columns;
    std::vector<float> x(std::size_t(tokens * columns));
    const int exponent = int(random.of<Index>({0, 0, 0, -20, 10}));
    for (float &value : x) value = std::ldexp(random.unit(), exponent);
    if (random.one_in(5))
        for (Index n = 1 + random.below(4); n > 0; --n)
            x[std::size_t(random.below(Index(x.size())))] =
                random.of({INFINITY, -INFINITY, NAN, -0.0f, 1e-41f, 1e-30f, 3e38f});
    std::vector<std::vector<float>> biases, ys;
    std::vector<Factor> factors;
    for (std::size_t i = 0; i < packed.size(); ++i) {
        biases.emplace_back(std::size_t(random.one_in(2) ? packed[i].rows : 0));
        for (float &value : biases[i]) value = random.unit();
        ys.emplace_back(std::size_t(tokens * packed[i].rows));
    }
    for (std::size_t i = 0; i < packed.size(); ++i)
        factors.push_back({matrices[i].get(), is_integer(packed[i].type) && !random.one_in(4),
                           biases[i].empty() ? nullptr : biases[i].data(), ys[i].data()});
    for (const Kernels *isa : usable_kernels()) {
        use_kernels(*isa);
        for (auto &y : ys) std::fill(y.begin(), y.end(), 12345.0f);
        multiply(factors, x.data(), columns, tokens);
        for (std::size_t i = 0; i < packed.size(); ++i)
            check(packed[i], dense[i], *matrices[i], factors[i].act8, x.data(), tokens, factors[i].bias, ys[i].data(),
                  text(packed[i], isa->name, tokens));
    }
    return true;
}

}  // namespace

int main(int count_of_arguments, char **arguments) {
    if (count_of_arguments < 3) {
        std::fprintf(stderr, "usage: sweep SEED COUNT [FIRST]\n");
        return 2;
    }
    const std::uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
    const Index count = std::atoll(arguments[2]);
    const Index first = count_of_arguments > 3 ? std::atoll(arguments[3]) : 0;
    Index taken[2] = {}, refused = 0, wrong = 0;
    for (Index i = first; i < first + count && wrong < 10; ++i) {
        if (i == first || i % 1000 == 0) set_threads(i / 1000 % 4 == 3 ? 3 : 1, false);
        // A thread of its own: what a thread keeps from product to product is made anew, and so
        // just as large as this case needs it.
        std::thread([&] {
            Random random(seed * 1000003 + std::uint64_t(i));
            const bool damaged = i % 4 != 0;
            try {
                if (run_case(random, damaged)) ++taken[damaged];
                else ++refused;
            } catch (const std::exception &fault) {
                ++wrong;
                std::fprintf(stderr, "case %lld of seed %llu: %s\n", static_cast<long long>(i),
                             static_cast<unsigned long long>(seed), fault.what());
            }
        }).join();
    }
    std::printf("%lld sound and %lld damaged matrices multiplied, %lld refused, %lld wrong, with",
                static_cast<long long>(taken[0]), static_cast<long long>(taken[1]),
                static_cast<long long>(refused), static_cast<long long>(wrong));
    for (const Kernels *isa : usable_kernels()) std::printf(" %s", isa->name);
    std::printf("\n");
    return wrong ? 1 : 0;
}
