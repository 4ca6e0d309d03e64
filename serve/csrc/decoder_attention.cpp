// Attention over pages: two passes, scores = K q and then the values weighted by them.
//
// Rows of queries are the heads that share a KV head, token after token, as many at a time as a
// tile has tokens. A unit has some such blocks, so that a page is brought into the cache, and made floats,
// once for all of them.
#include <algorithm>
#include <cstring>

#include "decoder_parts.h"

namespace {

constexpr Index kMostBlocks = 8;           // of a unit
constexpr Index kScores = 64 << 10;        // floats of the scores of a unit, if it has several blocks
constexpr Index kParallelWork = 128 << 10; // multiplications that are worth waking threads for

// Memory that a thread keeps from unit to unit.
enum Name { kQueries, kScoresOf, kSums, kRoom };
template <Name> float *scratch(Index count) {
    thread_local Buffer kept;
    const Index size = count * 4;
    if (kept.size() < size) kept = Buffer(size + size / 4);
    return reinterpret_cast<float *>(kept.data());
}

}  // namespace

void Decoder::plan(const Batch &batch, const Sizes &sizes) {
    const Index group = sizes.group(), wide = kernels().tile_tokens;
    if (planned_group_ == group && planned_heads_ == sizes.kv_heads) return;
    planned_group_ = group;
    planned_heads_ = sizes.kv_heads;
    units_.clear();
    work_ = 0;
    for (Index s = 0; s < batch.sequences; ++s) {
        const Index tokens = batch.starts[s + 1] - batch.starts[s], rows = tokens * group;
        const Index length = batch.positions[s] + tokens;
        const Index blocks = std::clamp<Index>(kScores / (wide * length), 1, kMostBlocks);
        for (Index head = 0; head < sizes.kv_heads; ++head)
            for (Index first = 0; first < rows; first += blocks * wide)
                units_.push_back({s, head, first, std::min(rows, first + blocks * wide)});
        work_ += rows * sizes.kv_heads * length * shape_.head_dim * 2;
    }
}

void Decoder::attention(const Batch &batch, Index index) {
    const Layer &layer = layers_[std::size_t(index)];
    const Dimensions &d = shape_;
    const Sizes &sizes = d.layers[std::size_t(index)];
    const Index queries = sizes.heads * d.head_dim, keys = sizes.kv_heads * d.head_dim;
    plan(batch, sizes);
    float *y = qkv_.data();
    multiply_all(layer.qkv, normed_.data(), d.hidden, batch.count, y, layer.output);
    if (layer.qkv.size() == 1) {
        query_ = {y, queries + 2 * keys};
        key_ = {y + queries, queries + 2 * keys};
        value_ = {y + queries + keys, queries + 2 * keys};
    } else {
        query_ = {y, queries};
        key_ = {y + batch.count * queries, keys};
        value_ = {y + batch.count * (queries + keys), keys};
    }
    keep(batch, index);
    const Index count = Index(units_.size());
    over_panels(count, work_ < kParallelWork ? count : 1, [&](Index from, Index to) {
        for (Index i = from; i < to; ++i) attend(batch, index, units_[std::size_t(i)]);
    });
}

// Norm and turn the queries and keys, and keep the keys and values.
void Decoder::keep(const Batch &batch, Index index) {
    const DecoderKernels &k = decoder_kernels();
    const Layer &layer = layers_[std::size_t(index)];
    const Dimensions &d = shape_;
    const Sizes &sizes = d.layers[std::size_t(index)];
    const auto finish = [&](float *x, const Floats &norm, Index t) {
        if (!norm.empty()) k.norm(x, norm.data(), d.epsilon, d.head_dim, x);
        if (layer.rope < 0) return;
        const auto r = std::size_t(layer.rope);
        const Index half = Index(ropes_[r].frequencies.size());
        k.rotate(cosines_[r].data() + t * half, sines_[r].data() + t * half, half, x);
    };
    each_token(batch.count, 4 * query_.stride, [&](Index t) {
        float *query = query_.at + t * query_.stride, *key = key_.at + t * key_.stride;
        const float *value = value_.at + t * value_.stride;
        const Index position = position_of_[std::size_t(t)];
        const std::int32_t *table = batch.tables + sequence_of_[std::size_t(t)] * batch.table_width;
        const Index page = table[position / kPageTokens], slot = position % kPageTokens;
        for (Index h = 0; h < sizes.heads; ++h) finish(query + h * d.head_dim, layer.query_norm, t);
        for (Index h = 0; h < sizes.kv_heads; ++h) {
            finish(key + h * d.head_dim, layer.key_norm, t);
            cache_.write(index, page, h, slot, key + h * d.head_dim, value + h * d.head_dim);
        }
    });
}

void Decoder::attend(const Batch &batch, Index index, const Unit &unit) {
    const Kernels &products = kernels();
    const DecoderKernels &k = decoder_kernels();
    const Dimensions &d = shape_;
    const Sizes &sizes = d.layers[std::size_t(index)];
    const Index window = layers_[std::size_t(index)].window, group = sizes.group();
    const Index wide = products.tile_tokens;  // rows of a block
    const Index rows = unit.last - unit.first, blocks = (rows + wide - 1) / wide;
    const Index start = batch.starts[unit.sequence], before = batch.positions[unit.sequence];
    const std::int32_t *table = batch.tables + unit.sequence * batch.table_width;
    const auto token_of = [&](Index row) { return (unit.first + row) / group; };
    const auto first_key = [&](Index row) {
        return window ? std::max<Index>(0, before + token_of(row) - window + 1) : 0;
    };
    const Index first_page = first_key(0) / kPageTokens, end = before + token_of(rows - 1) + 1;
    const Index pages = (end + kPageTokens - 1) / kPageTokens - first_page, width = pages * kPageTokens;
    const Index chunks = cache_.chunks(), tile = wide * kTileRows;
    float *queries = scratch<kQueries>(blocks * d.head_dim * wide);
    float *scores = scratch<kScoresOf>(blocks * wide * width);
    float *sums = scratch<kSums>(blocks * chunks * tile);
    float *room = scratch<kRoom>(cache_.room());

    for (Index r = 0; r < rows; ++r) {
        const Index head = unit.head * group + (unit.first + r) % group;
        const float *query = query_.at + (start + token_of(r)) * query_.stride + head * d.head_dim;
        float *out = queries + r / wide * d.head_dim * wide + r % wide;
        for (Index i = 0; i < d.head_dim; ++i) out[i * wide] = query[i] * d.attention_scale;
    }
    const auto rows_of = [&](Index block) { return int(std::min(wide, rows - block * wide)); };
    for (Index p = 0; p < pages; ++p) {
        const Index page = table[first_page + p];
        if (p + 1 < pages) cache_.fetch_keys(index, table[first_page + p + 1], unit.head);
        const float *keys = cache_.keys(index, page, unit.head, room);
        const float *scales = cache_.key_scales(index, page, unit.head);
        for (Index b = 0; b < blocks; ++b) {
            float y[kMostTile * kTileRows] = {};
            products.tile(keys, queries + b * d.head_dim * wide, d.head_dim, rows_of(b), y);
            for (Index r = 0; r < rows_of(b); ++r) {
                float *out = scores + (b * wide + r) * width + p * kPageTokens;
                for (Index i = 0; i < kPageTokens; ++i)
                    out[i] = scales ? y[r * kTileRows + i] * scales[i] : y[r * kTileRows + i];
            }
        }
    }
    float totals[kMostBlocks * kMostTile];
    for (Index r = 0; r < rows; ++r) {
        float *own = scores + r * width;
        const Index from = first_key(r) - first_page * kPageTokens;
        const Index to = before + token_of(r) + 1 - first_page * kPageTokens;
        if (d.attention_cap > 0) k.cap(d.attention_cap, to - from, own + from);
        totals[r] = k.exponentials(to - from, own + from);
        std::fill(own, own + from, 0.0f);
        std::fill(own + to, own + width, 0.0f);
    }
    std::fill(sums, sums + blocks * chunks * tile, 0.0f);
    for (Index p = 0; p < pages; ++p) {
        const Index page = table[first_page + p];
        const Index here = std::min(kPageTokens, end - (first_page + p) * kPageTokens);
        if (p + 1 < pages) cache_.fetch_values(index, table[first_page + p + 1], unit.head);
        const float *values = cache_.values(index, page, unit.head, room);
        const float *scales = cache_.value_scales(index, page, unit.head);
        for (Index b = 0; b < blocks; ++b) {
            float weights[kPageTokens * kMostTile];
            for (Index r = 0; r < rows_of(b); ++r) {
                const float *own = scores + (b * wide + r) * width + p * kPageTokens;
                for (Index i = 0; i < here; ++i) weights[i * wide + r] = scales ? own[i] * scales[i] : own[i];
            }
            for (Index c = 0; c < chunks; ++c)
                products.tile(values + c * kPageTokens * kTileRows, weights, here, rows_of(b),
                              sums + (b * chunks + c) * tile);
        }
    }
    for (Index r = 0; r < rows; ++r) {
        const Index head = unit.head * group + (unit.first + r) % group;
        float *out = mixed_.data() + ((start + token_of(r)) * sizes.heads + head) * d.head_dim;
        for (Index i = 0; i < d.head_dim; ++i)
            out[i] = sums[(r / wide * chunks + i / kTileRows) * tile + r % wide * kTileRows +
                          i % kTileRows] / totals[r];
    }
}
