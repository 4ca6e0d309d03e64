// What must hold of a model and of a batch: nothing here is computed with before it is checked.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "decoder.h"

namespace {

void refuse(const std::string &why) { throw std::invalid_argument(why); }

std::string text(Index number) { return std::to_string(number); }

void check_rows(const std::vector<Linear> &linears, const std::vector<Index> &rows, Index columns,
                const char *what) {
    Index all = 0;
    for (const Index count : rows) all += count;
    const bool fused = linears.size() == 1;
    if (!fused && linears.size() != rows.size())
        refuse(std::string(what) + ": " + text(Index(linears.size())) + " matrices");
    for (std::size_t i = 0; i < linears.size(); ++i) {
        if (!linears[i].matrix) refuse(std::string(what) + " is missing");
        const View &m = linears[i].matrix->view();
        const Index wanted = fused ? all : rows[i];
        if (m.rows != wanted || m.columns != columns)
            refuse(std::string(what) + " is [" + text(m.rows) + ", " + text(m.columns) + "], not [" +
                   text(wanted) + ", " + text(columns) + "]");
        if (!linears[i].bias.empty() && Index(linears[i].bias.size()) != wanted)
            refuse(std::string(what) + ": " + text(Index(linears[i].bias.size())) + " biases for " +
                   text(wanted) + " rows");
    }
}

void check_norm(const Floats &norm, Index width, bool needed, const char *what) {
    if (needed || !norm.empty())
        if (Index(norm.size()) != width)
            refuse(std::string(what) + " has " + text(Index(norm.size())) + " weights, not " + text(width));
}

std::vector<Index> kv_heads(const Dimensions &shape) {
    std::vector<Index> heads;
    for (const Sizes &sizes : shape.layers) heads.push_back(sizes.kv_heads);
    return heads;
}

}  // namespace

Decoder::Decoder(const Dimensions &shape, std::vector<Rope> ropes, Table embedding, Floats norm,
                 std::vector<Linear> head, CacheType cache, Index pages)
    : shape_(checked(shape, pages)), ropes_(std::move(ropes)), embedding_(embedding), norm_(std::move(norm)),
      head_(std::move(head)), cache_(cache, kv_heads(shape_), shape.head_dim, pages), widest_{},
      uses_(std::size_t(pages), 0), cosines_(ropes_.size()), sines_(ropes_.size()) {
    for (const Rope &rope : ropes_)
        if (rope.frequencies.empty() || 2 * Index(rope.frequencies.size()) > shape.head_dim)
            refuse(text(Index(rope.frequencies.size())) + " frequencies for heads of " + text(shape.head_dim));
    for (const Sizes &sizes : shape.layers) {
        widest_.heads = std::max(widest_.heads, sizes.heads);
        widest_.kv_heads = std::max(widest_.kv_heads, sizes.kv_heads);
        widest_.intermediate = std::max(widest_.intermediate, sizes.intermediate);
    }
    check_norm(norm_, shape.hidden, true, "the last norm");
    check_rows(head_, {shape.vocabulary}, shape.hidden, "the head");
}

Dimensions Decoder::checked(const Dimensions &d, Index pages) {
    constexpr Index kMost = Index(1) << 24;
    std::vector<Index> extents{d.hidden, d.head_dim, d.vocabulary, Index(d.layers.size()), d.max_length, pages};
    for (const Sizes &sizes : d.layers)
        extents.insert(extents.end(), {sizes.heads, sizes.kv_heads, sizes.intermediate});
    for (const Index extent : extents)
        if (extent < 1 || extent > kMost) refuse("an extent of " + text(extent));
    if (d.head_dim > kMostHeadDim)
        refuse("heads of " + text(d.head_dim) + ", of at most " + text(kMostHeadDim));
    for (const Sizes &sizes : d.layers)
        if (sizes.heads % sizes.kv_heads)
            refuse(text(sizes.heads) + " heads for " + text(sizes.kv_heads) + " KV heads");
    return d;
}

void Decoder::add_layer(Layer layer) {
    const Dimensions &d = shape_;
    if (layers_.size() == d.layers.size()) refuse("more than " + text(Index(d.layers.size())) + " layers");
    const Sizes &sizes = d.layers[layers_.size()];
    const Index queries = sizes.heads * d.head_dim, keys = sizes.kv_heads * d.head_dim;
    check_rows(layer.qkv, {queries, keys, keys}, d.hidden, "qkv");
    check_rows(layer.output, {d.hidden}, queries, "the output projection");
    check_rows(layer.gate_up, {sizes.intermediate, sizes.intermediate}, d.hidden, "gate and up");
    check_rows(layer.down, {d.hidden}, sizes.intermediate, "the down projection");
    check_norm(layer.attention_norm, d.hidden, true, "the attention's norm");
    check_norm(layer.mlp_norm, d.hidden, true, "the MLP's norm");
    check_norm(layer.after_attention, d.hidden, false, "the norm after attention");
    check_norm(layer.after_mlp, d.hidden, false, "the norm after the MLP");
    check_norm(layer.query_norm, d.head_dim, false, "the queries' norm");
    check_norm(layer.key_norm, d.head_dim, false, "the keys' norm");
    if (layer.rope < -1 || layer.rope >= int(ropes_.size())) refuse("there is no rope " + text(layer.rope));
    if (layer.window < 0) refuse("a window of " + text(layer.window));
    layers_.push_back(std::move(layer));
}

void Decoder::check(const Batch &b) {
    if (layers_.size() != shape_.layers.size())
        refuse(text(Index(layers_.size())) + " layers of " + text(Index(shape_.layers.size())) + " were added");
    if (b.sequences < 1 || b.count < 1) refuse("the batch is empty");
    if (b.starts[0] != 0 || b.starts[b.sequences] != b.count)
        refuse("starts go from " + text(b.starts[0]) + " to " + text(b.starts[b.sequences]) + " for " +
               text(b.count) + " tokens");
    for (Index i = 0; i < b.count; ++i)
        if (b.tokens[i] < 0 || b.tokens[i] >= shape_.vocabulary)
            refuse("token " + text(b.tokens[i]) + " is not in the vocabulary of " + text(shape_.vocabulary));
    for (Index i = 0; i < b.wanted_count; ++i)
        if (b.wanted[i] < 0 || b.wanted[i] >= b.count || (i && b.wanted[i] <= b.wanted[i - 1]))
            refuse("wanted tokens must rise from 0 to " + text(b.count - 1));
    for (Index s = 0; s < b.sequences; ++s) {
        const Index tokens = Index(b.starts[s + 1]) - b.starts[s], length = b.positions[s] + tokens;
        const std::string who = "sequence " + text(s) + ": ";
        if (tokens < 1) refuse(who + text(tokens) + " tokens");
        if (b.positions[s] < 0 || length > shape_.max_length)
            refuse(who + "position " + text(b.positions[s]) + " and " + text(tokens) +
                   " tokens, of at most " + text(shape_.max_length));
        if ((length + kPageTokens - 1) / kPageTokens > b.table_width)
            refuse(who + text(length) + " tokens in " + text(b.table_width) + " pages of " + text(kPageTokens));
    }
    check_pages(b);
}

// No page that is written to may occur anywhere else.
void Decoder::check_pages(const Batch &b) {
    const auto each = [&](auto visit) {
        for (Index s = 0; s < b.sequences; ++s) {
            const Index length = b.positions[s] + b.starts[s + 1] - b.starts[s];
            for (Index p = 0; p < (length + kPageTokens - 1) / kPageTokens; ++p)
                visit(s, b.tables[s * b.table_width + p], p >= b.positions[s] / kPageTokens);
        }
    };
    each([&](Index s, Index page, bool) {
        if (page < 0 || page >= cache_.pages())
            refuse("sequence " + text(s) + ": page " + text(page) + " of " + text(cache_.pages()));
    });
    Index shared = -1;
    each([&](Index, Index page, bool) { ++uses_[std::size_t(page)]; });
    each([&](Index, Index page, bool written) {
        if (written && uses_[std::size_t(page)] > 1) shared = page;
    });
    each([&](Index, Index page, bool) { uses_[std::size_t(page)] = 0; });
    if (shared >= 0) refuse("page " + text(shared) + " is written to and used elsewhere");
}
