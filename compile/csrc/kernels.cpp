// The native module of secateur.compile. No torch: it is loaded by processes that have none.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "pool.h"
#include "product.h"
#include "registry.h"
#include "semi_structured.h"

namespace nb = nanobind;

namespace {

template <typename T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const std::uint8_t, 1>;

// What this CPU offers that kernels, ours and others', are chosen by.
std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
    if (__builtin_cpu_supports("fma")) found.push_back("fma");
    if (__builtin_cpu_supports("bmi2")) found.push_back("bmi2");
    if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512vnni");
    if (__builtin_cpu_supports("avx512vbmi2")) found.push_back("avx512vbmi2");
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

template <typename T>
T named(const std::string &name, const std::initializer_list<std::pair<const char *, T>> &known) {
    for (const auto &[text, value] : known)
        if (name == text) return value;
    throw std::invalid_argument("unknown name: " + name);
}

const std::initializer_list<std::pair<const char *, Kind>> kKinds{
    {"dense", Kind::dense}, {"nm", Kind::nm}, {"vector", Kind::vector}, {"bitmask", Kind::bitmask}};
const std::initializer_list<std::pair<const char *, Type>> kTypes{
    {"fp32", Type::fp32}, {"bf16", Type::bf16}, {"fp16", Type::fp16}, {"int8", Type::int8}, {"int4", Type::int4}};

Kept kept_of(Index rows, Index columns, const std::string &type, Index count, int block, int group) {
    Kept kept;
    kept.rows = rows;
    kept.columns = columns;
    kept.block = block;
    kept.type = named(type, kTypes);
    kept.count = count;
    kept.group = group;
    if (rows < 1 || columns < 1 || rows > (Index(1) << 31) || columns > (Index(1) << 31) ||
        rows > (Index(1) << 48) / columns || count < 0 || count > rows * columns || block < 1 || rows % block)
        throw std::invalid_argument("impossible shape");
    return kept;
}

Matrix pack(Index rows, Index columns, const std::string &type, const Bytes &values, Index count,
            const std::optional<Bytes> &bits, int block,
            const std::optional<Array<const std::uint16_t, 2>> &scales, int group,
            const std::string &kind, int window, int keep, bool rest) {
    Kept kept = kept_of(rows, columns, type, count, block, group);
    kept.values = values.data();
    if (Index(values.size()) != (count * bits_of(kept.type) + 7) / 8)
        throw std::invalid_argument(std::to_string(values.size()) + " bytes of values, not " +
                                    std::to_string((count * bits_of(kept.type) + 7) / 8));
    if (bits) {
        if (Index(bits->size()) != rows / block * ((columns + 7) / 8))
            throw std::invalid_argument(std::to_string(bits->size()) + " bytes of mask, not " +
                                        std::to_string(rows / block * ((columns + 7) / 8)));
        kept.bits = bits->data();
    }
    if (scales && group > 0) {
        if (Index(scales->shape(0)) != rows || Index(scales->shape(1)) != (columns + group - 1) / group)
            throw std::invalid_argument("scales of another shape than [rows, groups]");
        kept.scales = scales->data();
    }
    const Shape shape{named(kind, kKinds), window, keep, rest};
    if (!kept.bits && shape.kind != Kind::dense) throw std::invalid_argument("a sparse layout needs a mask");
    const nb::gil_scoped_release release;
    return Matrix(kept, shape);
}

// What `map` takes to make the same matrix again, but for the streams.
nb::dict facts_of(const Matrix &matrix) {
    const View &m = matrix.view();
    const auto name_of = [](auto value, const auto &known) {
        for (const auto &[text, one] : known)
            if (one == value) return text;
        throw std::logic_error("a value without a name");
    };
    nb::dict facts;
    facts["rows"] = m.rows;
    facts["columns"] = m.columns;
    facts["type"] = name_of(m.type, kTypes);
    facts["count"] = m.kept;
    facts["block"] = m.kind == Kind::vector ? m.height : 1;
    facts["group"] = m.group;
    facts["kind"] = name_of(m.kind, kKinds);
    facts["window"] = m.window;
    facts["keep"] = m.keep;
    facts["rest"] = m.rest_starts != nullptr;
    return facts;
}

template <typename T> nb::object part_of(nb::handle owner, const T *data, Index count) {
    return nb::cast(nb::ndarray<nb::numpy, const T, nb::ndim<1>>(data, {std::size_t(count)}, owner));
}

// The streams of a matrix and where its panels begin, as they lie in its memory.
nb::dict streams_of(nb::handle self) {
    const View &m = nb::cast<const Matrix &>(self).view();
    nb::dict streams;
    streams["data"] = part_of(self, m.data, m.starts[m.panels]);
    streams["starts"] = part_of(self, m.starts, m.panels + 1);
    if (!m.rest_starts) return streams;
    streams["rest_data"] = part_of(self, m.rest, m.rest_starts[m.panels] * 32);
    streams["rest_starts"] = part_of(self, m.rest_starts, m.panels + 1);
    return streams;
}

using Starts = Array<const Index, 1>;

Matrix map(Index rows, Index columns, const std::string &type, Index count, int block, int group,
           const std::string &kind, int window, int keep, bool rest, const Bytes &data,
           const Starts &starts, const std::optional<Bytes> &rest_data,
           const std::optional<Starts> &rest_starts) {
    Laid laid;
    laid.data = data.data();
    laid.bytes = Index(data.size());
    laid.starts.assign(starts.data(), starts.data() + starts.size());
    if (rest_data) {
        laid.rest = rest_data->data();
        laid.rest_bytes = Index(rest_data->size());
    }
    if (rest_starts) laid.rest_starts.assign(rest_starts->data(), rest_starts->data() + rest_starts->size());
    return Matrix(kept_of(rows, columns, type, count, block, group), {named(kind, kKinds), window, keep, rest},
                  std::move(laid));
}

using Input = Array<const float, 2>;
using Output = Array<float, 2>;
using Bias = std::optional<Array<const float, 1>>;

// One factor of a product, its shapes checked.
Factor factor(const Matrix &matrix, bool act8, const Bias &bias, const Output &out, const Input &x) {
    const View &m = matrix.view();
    const auto text = [](Index a, Index b) {
        return "[" + std::to_string(a) + ", " + std::to_string(b) + "]";
    };
    if (Index(x.shape(1)) != m.columns)
        throw std::invalid_argument("inputs " + text(x.shape(0), x.shape(1)) + " for a matrix " +
                                    text(m.rows, m.columns));
    if (out.shape(0) != x.shape(0) || Index(out.shape(1)) != m.rows)
        throw std::invalid_argument("outputs " + text(out.shape(0), out.shape(1)) + ", not " +
                                    text(x.shape(0), m.rows));
    if (bias && Index(bias->shape(0)) != m.rows)
        throw std::invalid_argument(std::to_string(bias->shape(0)) + " biases for " +
                                    std::to_string(m.rows) + " rows");
    return {&matrix, act8, bias ? bias->data() : nullptr, out.data()};
}

void multiply_one(const Matrix &matrix, const Input &x, const Output &out, const Bias &bias, bool act8) {
    const std::vector<Factor> factors{factor(matrix, act8, bias, out, x)};
    const nb::gil_scoped_release release;
    multiply(factors, x.data(), Index(x.shape(1)), Index(x.shape(0)));
}

void multiply_all(const std::vector<const Matrix *> &matrices, const Input &x,
                  const std::vector<Output> &outs, const std::vector<Bias> &biases,
                  const std::vector<bool> &act8) {
    if (outs.size() != matrices.size() || biases.size() != matrices.size() || act8.size() != matrices.size())
        throw std::invalid_argument("not one output, bias and flag for each matrix");
    std::vector<Factor> factors;
    for (std::size_t i = 0; i < matrices.size(); ++i)
        factors.push_back(factor(*matrices[i], act8[i], biases[i], outs[i], x));
    const nb::gil_scoped_release release;
    multiply(factors, x.data(), Index(x.shape(1)), Index(x.shape(0)));
}

nb::object decode(const Matrix &matrix) {
    const View &m = matrix.view();
    auto *out = new float[std::size_t(m.rows * m.columns)];
    nb::capsule owner(out, [](void *p) noexcept { delete[] static_cast<float *>(p); });
    {
        const nb::gil_scoped_release release;
        over_panels(m.panels, 8, [&](Index from, Index to) {
            std::vector<float> piece(std::size_t(m.columns * kTileRows));
            for (Index panel = from; panel < to; ++panel) {
                matrix.decode(panel, 0, m.columns, piece.data());
                for (Index r = 0; r < m.height && panel * m.height + r < m.rows; ++r)
                    for (Index c = 0; c < m.columns; ++c)
                        out[(panel * m.height + r) * m.columns + c] =
                            piece[std::size_t(c * kTileRows + r)];
            }
        });
    }
    return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(
        out, {std::size_t(m.rows), std::size_t(m.columns)}, owner));
}

using Rows = Array<const std::uint8_t, 2>;
using NewRows = Array<std::uint8_t, 2>;

// The shape of a weight [rows, columns * width] whose values and nibbles are arrays of enough bytes.
template <typename Weight, typename Parts>
Grouped grouped(const Bytes &rule, int width, const Weight &weight, const Parts &values, const Parts &nibbles) {
    if (rule.size() != 16 || (width != 1 && width != 2 && width != 4) || weight.shape(1) % std::size_t(width))
        throw std::invalid_argument("no such rule or width");
    const Grouped g{rule.data(), width, Index(weight.shape(0)), Index(weight.shape(1)) / width,
                    Index(values.shape(1)), Index(nibbles.shape(1))};
    if (Index(values.shape(0)) < g.rows || Index(nibbles.shape(0)) < g.rows ||
        g.value_bytes < least_value_bytes(g) || g.nibble_bytes < least_nibble_bytes(g))
        throw std::invalid_argument("too few values or nibbles for the weight");
    return g;
}

Index compress_weight(const Bytes &rule, int width, const Rows &weight, const std::optional<Rows> &bits,
                      const NewRows &values, const NewRows &nibbles) {
    const Grouped g = grouped(rule, width, weight, values, nibbles);
    if (bits && (Index(bits->shape(0)) != g.rows || Index(bits->shape(1)) != (g.columns + 7) / 8))
        throw std::invalid_argument("bits of another shape than the weight's");
    const nb::gil_scoped_release release;
    return compress_groups(g, weight.data(), bits ? bits->data() : nullptr, values.data(), nibbles.data());
}

Index expand_weight(const Bytes &rule, int width, const Rows &values, const Rows &nibbles, const NewRows &weight) {
    const Grouped g = grouped(rule, width, weight, values, nibbles);
    const nb::gil_scoped_release release;
    return expand_groups(g, values.data(), nibbles.data(), weight.data());
}

std::uint64_t checksum_of(const Bytes &data) {
    if (data.size() % 8 || reinterpret_cast<std::uintptr_t>(data.data()) % 8)
        throw std::invalid_argument("no whole words");
    const nb::gil_scoped_release release;
    const Index words = Index(data.size()) / 8, piece = 1 << 15;
    const auto *first = reinterpret_cast<const std::uint64_t *>(data.data());
    std::atomic<std::uint64_t> total{0};
    over_panels((words + piece - 1) / piece, 4, [&](Index from, Index to) {
        total += kernels().checksum(first + from * piece, std::min(words, to * piece) - from * piece);
    });
    return total;
}

// GB/s of reading a buffer from all threads, once per round.
std::vector<double> read_bandwidth(Index bytes, int rounds) {
    if (bytes < 4096 || rounds < 1) throw std::invalid_argument("read at least 4096 bytes, once");
    const nb::gil_scoped_release release;
    const Index words = bytes / 8, piece = 1 << 15;
    std::vector<std::uint64_t> buffer(std::size_t(words), 1);
    std::vector<double> speeds;
    std::atomic<std::uint64_t> total{0};
    for (int round = 0; round <= rounds; ++round) {  // the first one warms up
        const auto start = std::chrono::steady_clock::now();
        over_panels(words / piece, 4, [&](Index from, Index to) {
            total += kernels().checksum(buffer.data() + from * piece, (to - from) * piece);
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (round) speeds.push_back(double(words / piece * piece) * 8e-9 / seconds.count());
    }
    if (total == 0) throw std::logic_error("nothing was read");
    return speeds;
}

}  // namespace

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false); // of matrices that a model still holds when Python ends
    m.doc() = "Native kernels of secateur (C++17, no torch).";
    m.def("cpu_features", &cpu_features,
          "Names of the instruction sets of this CPU that secateur's kernels can use.");
    nb::class_<Matrix>(m, "Matrix", "A weight [rows, columns] in a layout of this CPU.")
        .def_prop_ro("rows", [](const Matrix &a) { return a.view().rows; })
        .def_prop_ro("columns", [](const Matrix &a) { return a.view().columns; })
        .def_prop_ro("nbytes", &Matrix::bytes)
        .def("clone", [](const Matrix &a) { return Matrix(a); })
        .def("rounds_inputs", [](const Matrix &a, Index tokens) { return rounds_inputs(a.view(), tokens); },
             nb::arg("tokens"), "Whether a product with so many tokens rounds its inputs to int8, if it may.")
        .def_prop_ro("facts", &facts_of, "What `map` needs beside the streams.")
        .def_prop_ro("streams", &streams_of, "The streams as arrays: data, starts, rest_data, rest_starts.")
        .def("decode", &decode, "The dense weight, float32 [rows, columns].")
        .def("multiply", &multiply_one, nb::arg("x").noconvert(), nb::arg("out").noconvert(),
             nb::arg("bias").none().noconvert(), nb::arg("act8"));
    m.def("pack", &pack, nb::arg("rows"), nb::arg("columns"), nb::arg("type"), nb::arg("values"),
          nb::arg("count"), nb::arg("bits").none(), nb::arg("block"), nb::arg("scales").none(),
          nb::arg("group"), nb::arg("kind"), nb::arg("window"), nb::arg("keep"), nb::arg("rest"));
    m.def("map", &map, nb::arg("rows"), nb::arg("columns"), nb::arg("type"), nb::arg("count"), nb::arg("block"),
          nb::arg("group"), nb::arg("kind"), nb::arg("window"), nb::arg("keep"), nb::arg("rest"), nb::arg("data"),
          nb::arg("starts"), nb::arg("rest_data") = nb::none(), nb::arg("rest_starts") = nb::none(),
          nb::keep_alive<0, 11>(), nb::keep_alive<0, 13>(),
          "A matrix on streams that lie in memory already, 64 bytes behind each; their content is trusted.");
    m.def("checksum", &checksum_of, nb::arg("data"), "A number that changes when the bytes do; of whole words of 64 bits.");
    m.def("multiply_all", &multiply_all, nb::arg("matrices"), nb::arg("x").noconvert(),
          nb::arg("outs").noconvert(), nb::arg("biases").noconvert(), nb::arg("act8"));
    m.def("set_threads", &set_threads, nb::arg("count"), nb::arg("pin"));
    m.def("threads", &get_threads);
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels *k : usable_kernels()) names.push_back(k->name);
        return names;
    });
    m.def("use_isa", [](const std::string &name) {
        for (const Kernels *k : usable_kernels())
            if (name == k->name) return use_kernels(*k);
        throw std::invalid_argument("this CPU cannot run " + name);
    });
    m.def("hold", [](std::shared_ptr<Matrix> matrix, bool act8) { return hold(std::move(matrix), act8); },
          nb::arg("matrix"), nb::arg("act8"), "A number for a matrix, good until it is released.");
    m.def("release", &release, nb::arg("handle"));
    m.def("held", [](std::int64_t handle) {
        const Held found = find(handle);
        if (!found.matrix) throw std::invalid_argument("there is no matrix " + std::to_string(handle));
        return std::make_pair(std::const_pointer_cast<Matrix>(found.matrix), found.act8);
    }, nb::arg("handle"), "The matrix of a number, and whether its activations are int8.");
    m.def("table", [] { return std::uintptr_t(&kernel_table()); }, "Address of the table in table.h.");
    m.def("compress_groups", &compress_weight, nb::arg("rule"), nb::arg("width"), nb::arg("weight").noconvert(),
          nb::arg("bits").none().noconvert(), nb::arg("values").noconvert(), nb::arg("nibbles").noconvert(),
          "Write the stored values and nibbles of a weight; the first row that keeps too many, or -1.");
    m.def("expand_groups", &expand_weight, nb::arg("rule"), nb::arg("width"), nb::arg("values").noconvert(),
          nb::arg("nibbles").noconvert(), nb::arg("weight").noconvert(),
          "Write the dense weight; the first row with a nibble that the rule does not know, or -1.");
    bind_decoder(m);
    bind_sampler(m);
    m.def("read_bandwidth", &read_bandwidth, nb::arg("nbytes"), nb::arg("rounds"));
}
