// One block of columns of sparsegpt.py, one block row after the other.
//
// The rule and the names are those of sparsegpt.py: at each column j the error e = w_j / U_jj of a
// removed weight is taken off the columns from j on, w_k -= e U_jk; N:M chooses what stays at the
// first column of each group, by the weights as they are then.
#include "sparsegpt.h"

#include <numeric>
#include <utility>

namespace nb = nanobind;

namespace {

struct Columns {
    const float *factor;         // U [width, width]
    Index width, height, n, m;   // height: R; m: 0 where the mask is given
};

struct BlockRow {
    float *weight;  // [R, width]
    bool *kept;     // [R, width], the same in all R rows
    float *error;   // [R, width]
};

using Scores = std::vector<std::pair<float, Index>>;  // of a group, by place

// Of equal scores the first goes first, as in masks.keep_highest.
INLINE void choose(const Columns &c, const BlockRow &row, Index first, Scores &scores) {
    for (Index k = 0; k < c.m; ++k) {
        const float pivot = c.factor[(first + k) * c.width + first + k];
        float sum = 0;
        for (Index r = 0; r < c.height; ++r) {
            const float scaled = row.weight[r * c.width + first + k] / pivot;
            sum += scaled * scaled;
        }
        scores[k] = {sum == sum ? sum : 0, k};  // NaN has no place in an order
    }
    std::sort(scores.begin(), scores.end());
    for (Index k = 0; k < c.m; ++k)
        for (Index r = 0; r < c.height; ++r)
            row.kept[r * c.width + first + scores[k].second] = k >= c.m - c.n;
}

INLINE void compensate_row(const Columns &c, const BlockRow &row, Scores &scores) {
    for (Index j = 0; j < c.width; ++j) {
        if (c.m && j % c.m == 0) choose(c, row, j, scores);
        const float *factor = c.factor + j * c.width;
        for (Index r = 0; r < c.height; ++r) {
            float *weight = row.weight + r * c.width;
            const bool stays = row.kept[r * c.width + j];
            const float error = stays ? 0.0f : weight[j] / factor[j];
            row.error[r * c.width + j] = error;
            if (!stays)
                for (Index k = j; k < c.width; ++k) weight[k] -= error * factor[k];
        }
    }
    for (Index k = 0; k < c.height * c.width; ++k)
        if (!row.kept[k]) row.weight[k] = 0;
}

void compensate_plain(const Columns &c, const BlockRow &row, Scores &scores) {
    compensate_row(c, row, scores);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma")))
void compensate_avx2(const Columns &c, const BlockRow &row, Scores &scores) {
    compensate_row(c, row, scores);
}
#else
constexpr auto compensate_avx2 = compensate_plain;
#endif

void compensate(Array<float, 2> weight, Array<bool, 2> kept, Array<float, 2> error,
                Array<const float, 2> factor, Index n, Index m, Index height, Index threads) {
    const Index rows = weight.shape(0), width = weight.shape(1);
    if (!has_shape(kept, {rows, width}) || !has_shape(error, {rows, width}) ||
        !has_shape(factor, {width, width}))
        throw nb::value_error("the shapes of the tensors do not agree");
    if (height < 1 || rows % height || m < 0 || n < 0 || n > m || (m && width % m))
        throw nb::value_error("blocks or groups do not fit");
    nb::gil_scoped_release released;
    const Columns columns{factor.data(), width, height, n, m};
    const auto one = has_avx2() ? compensate_avx2 : compensate_plain;
    std::vector<Scores> scores(std::max<Index>(1, std::min(threads, rows / height)), Scores(m));
    over_rows(rows / height, scores, [&](Index b, Scores &own) {
        const Index at = b * height * width;
        one(columns, {weight.data() + at, kept.data() + at, error.data() + at}, own);
    });
}

}  // namespace

void bind_sparsegpt(nb::module_ &module) {
    module.def("compensate", &compensate, nb::arg("weight").noconvert(),
               nb::arg("kept").noconvert(), nb::arg("error").noconvert(), nb::arg("factor"),
               nb::arg("n"), nb::arg("m"), nb::arg("height"), nb::arg("threads"),
               "A block of columns of sparsegpt.py; weight, kept and error are changed in place.");
}
