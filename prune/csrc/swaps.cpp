// The native module of secateur.prune: the exchanges of swaps.py, one block row after the other.
//
// The rule and the names are those of swaps.py. A column is flipped when it is removed or comes
// back; with s = 1 for a kept and -1 for a removed column, and v the weights that count for it (x
// if kept, W if removed), one formula covers both:
//     cost_j = sum over R rows of 2 s v_j c_j + v_j^2 G_jj          (a_p or b_u)
//     change = cost_p + cost_u - 2 G_pu * sum over R rows of v_p v_u
//     flip j:  c += s v_j G_j,  s -> -s,  v_j -> W_j
// Patterns N:M come with the columns sorted by their place in their group, so that one pair of
// places is a loop over consecutive groups.
#include "sparsegpt.h"

#include <limits>
#include <utility>

namespace nb = nanobind;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Layer {
    const float *gram;                            // [columns, columns]
    const float *near;                            // N:M: [pairs of places, groups], from gram
    Index columns, height, m, candidates, limit;  // height: R; m: 0 for P%
};

struct BlockRow {
    const float *target;  // W [R, columns]
    float *value;         // v [R, columns]
    bool *kept;           // [columns]
    float *slope;         // c [R, columns]
    float least;          // what a swap must gain
};

// What one thread needs besides its block row.
struct Scratch {
    std::vector<float> sign, square, cost, rest, best, product, bond;
    std::vector<std::pair<float, Index>> order;

    explicit Scratch(const Layer &l)
        : sign(l.columns), square(l.columns), cost(l.columns), rest(l.columns), best(l.columns),
          product(l.columns), bond(l.m ? l.columns * (l.m - 1) / 2 : 0), order(l.columns) {}
};

INLINE float product_of(const Layer &l, const BlockRow &row, Index p, Index u) {
    float sum = 0;
    for (Index r = 0; r < l.height; ++r)
        sum += row.value[r * l.columns + p] * row.value[r * l.columns + u];
    return sum;
}

INLINE void start(const Layer &l, const BlockRow &row, Scratch &s) {
    for (Index j = 0; j < l.columns; ++j) {
        s.sign[j] = row.kept[j] ? 1.0f : -1.0f;
        s.square[j] = l.gram[j * l.columns + j] * product_of(l, row, j, j);
    }
}

INLINE void find_costs(const Layer &l, const BlockRow &row, Scratch &s) {
    const Index columns = l.columns;  // in a register: the loops over it are the hot ones
    const float *sign = s.sign.data(), *square = s.square.data();
    float *cost = s.cost.data();
    for (Index r = 0; r < l.height; ++r) {
        const float *v = row.value + r * columns, *c = row.slope + r * columns;
        const float *before = r ? cost : square;
        for (Index j = 0; j < columns; ++j) cost[j] = before[j] + 2 * sign[j] * v[j] * c[j];
    }
}

// Flips p and u.
INLINE void exchange(const Layer &l, const BlockRow &row, Scratch &s, Index p, Index u) {
    const Index columns = l.columns;
    const float *gram_p = l.gram + p * columns, *gram_u = l.gram + u * columns;
    for (Index r = 0; r < l.height; ++r) {
        float *v = row.value + r * columns, *c = row.slope + r * columns;
        const float of_p = s.sign[p] * v[p], of_u = s.sign[u] * v[u];
        for (Index j = 0; j < columns; ++j) c[j] += of_p * gram_p[j] + of_u * gram_u[j];
        for (Index j : {p, u}) v[j] = row.target[r * columns + j];
    }
    for (Index j : {p, u}) {
        s.sign[j] = -s.sign[j];
        row.kept[j] = !row.kept[j];
        s.square[j] = l.gram[j * l.columns + j] * product_of(l, row, j, j);
    }
}

// The first place of the lowest value.
INLINE Index lowest(const float *values, Index count) {
    constexpr Index lanes = 16;
    float least[lanes];
    for (float &value : least) value = kInf;
    Index j = 0;
    for (; j + lanes <= count; j += lanes)
        for (Index k = 0; k < lanes; ++k)
            least[k] = values[j + k] < least[k] ? values[j + k] : least[k];
    for (; j < count; ++j) least[0] = std::min(least[0], values[j]);
    const float found = *std::min_element(least, least + lanes);
    return std::min<Index>(std::find(values, values + count, found) - values, count - 1);
}

// N:M. bond [pairs, groups] is 2 G_pu * sum of v_p v_u, or -inf where both or neither are kept.
INLINE void find_bonds(const Layer &l, const BlockRow &row, Scratch &s, Index group) {
    const Index groups = l.columns / l.m;
    Index at = group;
    for (Index i = 0; i < l.m; ++i)
        for (Index j = i + 1; j < l.m; ++j, at += groups) {
            const Index p = i * groups + group, u = j * groups + group;
            const bool both = row.kept[p] == row.kept[u];
            s.bond[at] = both ? -kInf : 2 * l.near[at] * product_of(l, row, p, u);
        }
}

INLINE Index swap_in_groups(const Layer &l, const BlockRow &row, Scratch &s) {
    const Index groups = l.columns / l.m;
    float *best = s.best.data();
    start(l, row, s);
    for (Index g = 0; g < groups; ++g) find_bonds(l, row, s, g);
    Index made = 0;
    for (; made < l.limit; ++made) {
        find_costs(l, row, s);
        std::fill_n(best, groups, kInf);
        const float *bond = s.bond.data();
        for (Index i = 0; i < l.m; ++i)
            for (Index j = i + 1; j < l.m; ++j, bond += groups) {
                const float *cost_i = &s.cost[i * groups], *cost_j = &s.cost[j * groups];
                for (Index g = 0; g < groups; ++g) {
                    const float change = cost_i[g] + cost_j[g] - bond[g];
                    best[g] = change < best[g] ? change : best[g];
                }
            }
        const Index group = lowest(best, groups);
        if (!(best[group] < -row.least)) break;
        Index p = 0, u = 0, at = group;
        float change = kInf;
        for (Index i = 0; i < l.m; ++i)
            for (Index j = i + 1; j < l.m; ++j, at += groups) {
                const Index one = i * groups + group, two = j * groups + group;
                const float other = s.cost[one] + s.cost[two] - s.bond[at];
                if (other < change) change = other, p = one, u = two;
            }
        exchange(l, row, s, p, u);
        find_bonds(l, row, s, group);
    }
    return made;
}

// P%. The best exchange of one kept column for any removed one: best[u] = min(best[u], change
// less cost_u).
INLINE void compare(const Layer &l, const BlockRow &row, Scratch &s, Index p) {
    const Index columns = l.columns;
    const float *gram_p = l.gram + p * columns;
    float *best = s.best.data(), *product = s.product.data();
    const float cost = s.cost[p];
    const Index last = l.height - 1;
    for (Index r = 0; r < last; ++r) {
        const float *v = row.value + r * columns;
        const float of_p = 2 * v[p];
        for (Index u = 0; u < columns; ++u) product[u] = (r ? product[u] : 0) + of_p * v[u];
    }
    const float *v = row.value + last * columns;
    const float of_p = 2 * v[p];
    if (last == 0) {
        for (Index u = 0; u < columns; ++u) {
            const float change = cost - gram_p[u] * (of_p * v[u]);
            best[u] = change < best[u] ? change : best[u];
        }
    } else {
        for (Index u = 0; u < columns; ++u) {
            const float change = cost - gram_p[u] * (product[u] + of_p * v[u]);
            best[u] = change < best[u] ? change : best[u];
        }
    }
}

INLINE Index swap_anywhere(const Layer &l, const BlockRow &row, Scratch &s) {
    const Index columns = l.columns;
    const float *sign = s.sign.data(), *cost = s.cost.data(), *best = s.best.data();
    const auto order = s.order.begin();
    const auto by_cost = [](const auto &one, const auto &two) { return one.first < two.first; };
    float *rest = s.rest.data();
    start(l, row, s);
    Index made = 0;
    for (; made < l.limit; ++made) {
        find_costs(l, row, s);
        Index count = 0;
        for (Index j = 0; j < columns; ++j) {
            order[count] = {cost[j] < kInf ? cost[j] : kInf, j};  // NaN cannot be sorted
            count += sign[j] > 0;
        }
        bool found = false;
        for (Index first = 0; first < count && !found; first += l.candidates) {
            const Index last = std::min(first + l.candidates, count);
            if (last < count)
                std::nth_element(order + first, order + last, order + count, by_cost);
            std::fill(s.best.begin(), s.best.end(), kInf);
            for (Index k = first; k < last; ++k) compare(l, row, s, order[k].second);
            for (Index j = 0; j < columns; ++j) {
                const float change = best[j] + cost[j];
                rest[j] = sign[j] < 0 ? change : kInf;
            }
            const Index u = lowest(rest, columns);
            if (!(rest[u] < -row.least)) continue;
            found = true;
            Index p = 0;
            float change = kInf;
            for (Index k = first; k < last; ++k) {
                const Index q = order[k].second;
                const float bond = 2 * l.gram[q * columns + u] * product_of(l, row, q, u);
                if (cost[q] - bond < change) change = cost[q] - bond, p = q;
            }
            exchange(l, row, s, p, u);
        }
        if (!found) break;
    }
    return made;
}

INLINE Index swap_row(const Layer &l, const BlockRow &row, Scratch &s) {
    return l.m ? swap_in_groups(l, row, s) : swap_anywhere(l, row, s);
}

using SwapRow = Index (*)(const Layer &, const BlockRow &, Scratch &);

Index swap_row_plain(const Layer &l, const BlockRow &row, Scratch &s) {
    return swap_row(l, row, s);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same code for CPUs with wider registers; whatever CPU compiled it, any x86-64 can load it.
__attribute__((target("avx2,fma")))
Index swap_row_avx2(const Layer &l, const BlockRow &row, Scratch &s) {
    return swap_row(l, row, s);
}

#else
constexpr auto swap_row_avx2 = swap_row_plain;
#endif

void swap(Array<const float, 2> gram, Array<const float, 3> target, Array<float, 3> value,
          Array<bool, 2> kept, Array<float, 3> slope, Array<const float, 1> least,
          Array<Index, 1> made, Index m, Index candidates, Index limit, Index threads) {
    const Index rows = target.shape(0), height = target.shape(1), columns = target.shape(2);
    if (!has_shape(gram, {columns, columns}) || !has_shape(value, {rows, height, columns}) ||
        !has_shape(kept, {rows, columns}) || !has_shape(slope, {rows, height, columns}) ||
        !has_shape(least, {rows}) || !has_shape(made, {rows}))
        throw nb::value_error("the shapes of the tensors do not agree");
    if (height < 1 || columns < 1 || m < 0 || (m && columns % m) || candidates < 1)
        throw nb::value_error("nothing to swap, no candidate, or groups that do not fit");

    nb::gil_scoped_release released;
    std::vector<float> near;
    const Index groups = m ? columns / m : 0;
    for (Index i = 0; i < m; ++i)
        for (Index j = i + 1; j < m; ++j)
            for (Index g = 0; g < groups; ++g)
                near.push_back(gram.data()[(i * groups + g) * columns + j * groups + g]);
    const Layer layer{gram.data(), near.data(), columns, height, m, candidates, limit};
    const SwapRow swap_one = has_avx2() ? swap_row_avx2 : swap_row_plain;
    std::vector<Scratch> scratches(std::max<Index>(1, std::min(threads, rows)), Scratch(layer));
    over_rows(rows, scratches, [&](Index b, Scratch &scratch) {
        const Index at = b * height * columns;
        const BlockRow row{target.data() + at, value.data() + at, kept.data() + b * columns,
                           slope.data() + at, least.data()[b]};
        made.data()[b] = swap_one(layer, row, scratch);
    });
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native loops of secateur.prune (C++17, no torch).";
    module.def("swap", &swap, nb::arg("gram"), nb::arg("target"), nb::arg("value").noconvert(),
               nb::arg("kept").noconvert(), nb::arg("slope").noconvert(), nb::arg("least"),
               nb::arg("made").noconvert(), nb::arg("m"), nb::arg("candidates"), nb::arg("limit"),
               nb::arg("threads"),
               "The exchanges of swaps.py; value, kept, slope and made are changed in place.");
    bind_sparsegpt(module);
}
