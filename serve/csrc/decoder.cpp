// The decoder as Python sees it.
#include "decoder.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "bind.h"

namespace nb = nanobind;

namespace {

template <typename T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Vector = Array<const float, 1>;
using Ints = Array<const std::int32_t, 1>;
// A matrix, whether its activations are int8, and its biases.
using Part = std::tuple<std::shared_ptr<Matrix>, bool, std::optional<Vector>>;

Floats floats(const Vector &x) { return Floats(x.data(), x.data() + x.size()); }
Floats floats(const std::optional<Vector> &x) { return x ? floats(*x) : Floats(); }

std::vector<Linear> linears(const std::vector<Part> &parts) {
    std::vector<Linear> made;
    for (const auto &[matrix, act8, bias] : parts) made.push_back({matrix, act8, floats(bias)});
    return made;
}

template <typename T>
T named(const std::string &name, std::initializer_list<std::pair<const char *, T>> known) {
    for (const auto &[text, value] : known)
        if (name == text) return value;
    throw std::invalid_argument("unknown name: " + name);
}

// A decoder with the array that its embedding lies in.
struct Owner {
    Array<const std::uint8_t, 2> embedding;
    Decoder decoder;
};

Owner *make(const std::vector<std::tuple<Index, Index, Index>> &layers, Index hidden, Index head_dim,
           Index vocabulary, Index max_length, float epsilon, float attention_scale, float attention_cap,
           float logit_cap, float embedding_scale, const std::string &activation,
           const std::vector<std::pair<Vector, float>> &ropes, const Array<const std::uint8_t, 2> &embedding,
           const std::string &embedding_type, const Vector &norm, const Part &head,
           const std::string &cache_type, Index pages) {
    const auto function = named<Activation>(activation, {{"silu", Activation::silu}, {"gelu", Activation::gelu},
                                                         {"gelu_tanh", Activation::gelu_tanh}});
    const auto type = named<Type>(embedding_type, {{"fp32", Type::fp32}, {"bf16", Type::bf16},
                                                   {"fp16", Type::fp16}});
    const auto cache = named<CacheType>(cache_type, {{"fp32", CacheType::fp32}, {"fp16", CacheType::fp16},
                                                     {"int8", CacheType::int8}});
    if (Index(embedding.shape(0)) != vocabulary || Index(embedding.shape(1)) != hidden * bits_of(type) / 8)
        throw std::invalid_argument("an embedding of another shape than [vocabulary, hidden]");
    std::vector<Rope> turned;
    for (const auto &[frequencies, factor] : ropes) turned.push_back({floats(frequencies), factor});
    std::vector<Sizes> sizes;
    for (const auto &[heads, kv_heads, intermediate] : layers) sizes.push_back({heads, kv_heads, intermediate});
    const Dimensions shape{sizes, hidden, head_dim, vocabulary, max_length,
                           epsilon, attention_scale, attention_cap, logit_cap, embedding_scale, function};
    return new Owner{embedding, Decoder(shape, std::move(turned), {embedding.data(), type}, floats(norm),
                                       linears({head}), cache, pages)};
}

void add_layer(Owner &owner, const std::vector<Part> &qkv, const Part &output, const std::vector<Part> &gate_up,
               const Part &down, const Vector &attention_norm, const std::optional<Vector> &after_attention,
               const Vector &mlp_norm, const std::optional<Vector> &after_mlp,
               const std::optional<Vector> &query_norm, const std::optional<Vector> &key_norm, int rope,
               Index window) {
    owner.decoder.add_layer({linears(qkv), linears(gate_up), linears({output}), linears({down}),
                            floats(attention_norm), floats(after_attention), floats(mlp_norm),
                            floats(after_mlp), floats(query_norm), floats(key_norm), rope, window});
}

nb::object step(nb::handle self, const Ints &tokens, const Ints &starts, const Ints &positions,
                const Array<const std::int32_t, 2> &tables, const Ints &wanted) {
    Owner &owner = nb::cast<Owner &>(self);
    if (starts.size() != positions.size() + 1 || tables.shape(0) != positions.size())
        throw std::invalid_argument("not one start, position and page table for each sequence");
    const Batch batch{tokens.data(), starts.data(), positions.data(), tables.data(), wanted.data(),
                      Index(tokens.size()), Index(positions.size()), Index(tables.shape(1)),
                      Index(wanted.size())};
    const float *logits;
    {
        const nb::gil_scoped_release release;
        logits = owner.decoder.step(batch);
    }
    return nb::cast(nb::ndarray<nb::numpy, const float, nb::ndim<2>>(
        logits, {wanted.size(), std::size_t(owner.decoder.shape().vocabulary)}, self));
}

}  // namespace

void bind_decoder(nb::module_ &m) {
    using namespace nb::literals;
    nb::class_<Owner>(m, "Decoder", "A decoder-only transformer with a paged KV cache.")
        .def_prop_ro("max_length", [](const Owner &h) { return h.decoder.shape().max_length; })
        .def_prop_ro("cache_bytes", [](const Owner &h) { return h.decoder.cache_bytes(); })
        .def("add_layer", &add_layer, nb::kw_only(), "qkv"_a, "output"_a, "gate_up"_a, "down"_a,
             "attention_norm"_a, "after_attention"_a.none(), "mlp_norm"_a, "after_mlp"_a.none(),
             "query_norm"_a.none(), "key_norm"_a.none(), "rope"_a, "window"_a)
        .def("step", &step, "tokens"_a.noconvert(), "starts"_a.noconvert(), "positions"_a.noconvert(),
             "tables"_a.noconvert(), "wanted"_a.noconvert());
    m.def("decoder", &make, nb::rv_policy::take_ownership, nb::kw_only(), "layers"_a, "hidden"_a, "head_dim"_a,
          "vocabulary"_a, "max_length"_a, "epsilon"_a,
          "attention_scale"_a, "attention_cap"_a, "logit_cap"_a, "embedding_scale"_a, "activation"_a,
          "ropes"_a, "embedding"_a, "embedding_type"_a, "norm"_a, "head"_a, "cache_type"_a, "pages"_a);
}
