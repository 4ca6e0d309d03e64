// The keys and values of all sequences, in pages of 16 tokens.
//
// Of a layer and KV head a page holds the keys transposed, [head_dim][16 tokens], and the values in
// chunks of 16 of their elements, [chunks][16 tokens][16], the last chunk filled up with 0: so that
// one kernel, `Kernels::tile`, computes products with both. int8 has one scale for each token.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "layout.h"

enum class CacheType { fp32, fp16, int8 };

constexpr Index kPageTokens = 16;
constexpr Index kMostHeadDim = 1024;

class Cache {
  public:
    // Throws std::bad_alloc. Pages take no memory until they are written to.
    // heads: of each layer.
    Cache(CacheType type, const std::vector<Index> &heads, Index head_dim, Index pages);

    Index pages() const { return pages_; }
    Index chunks() const { return chunks_; }
    Index bytes() const { return starts_.back() * pages_ * page_bytes_; }
    // Floats that `keys` and `values` need as room.
    Index room() const { return chunks_ * kPageTokens * kPageTokens; }

    // Keep key and value [head_dim] of the token `slot` of a page.
    void write(Index layer, Index page, Index head, Index slot, const float *key, const float *value);
    // A page as floats, in `room` or where it lies; int8 yet without the scales.
    const float *keys(Index layer, Index page, Index head, float *room) const;
    const float *values(Index layer, Index page, Index head, float *room) const;
    // Bring what `keys` and `values` will read into the cache.
    void fetch_keys(Index layer, Index page, Index head) const;
    void fetch_values(Index layer, Index page, Index head) const;
    // int8: the scales [16] of a page; else null.
    const float *key_scales(Index layer, Index page, Index head) const;
    const float *value_scales(Index layer, Index page, Index head) const;

  private:
    struct Free {
        void operator()(std::uint8_t *p) const { std::free(p); }
    };
    std::uint8_t *at(Index layer, Index page, Index head) const {
        const auto l = std::size_t(layer);
        const Index heads = starts_[l + 1] - starts_[l];
        return data_.get() + (starts_[l] * pages_ + page * heads + head) * page_bytes_;
    }
    void fetch(const std::uint8_t *stored, Index count) const;
    const float *widened(const std::uint8_t *stored, Index count, float *room) const;

    CacheType type_;
    std::vector<Index> starts_;  // heads of the layers before each, and of all
    Index head_dim_, pages_, chunks_;
    Index width_;       // bytes of an element
    Index key_bytes_;   // where the values begin
    Index scales_at_;   // where the scales begin
    Index page_bytes_;  // of one layer and head
    std::unique_ptr<std::uint8_t[], Free> data_;
};
