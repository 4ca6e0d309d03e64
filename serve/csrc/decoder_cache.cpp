#include "decoder_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "decoder_kernels.h"

Cache::Cache(CacheType type, const std::vector<Index> &heads, Index head_dim, Index pages)
    : type_(type), starts_(heads.size() + 1, 0), head_dim_(head_dim), pages_(pages),
      chunks_((head_dim + kPageTokens - 1) / kPageTokens),
      width_(type == CacheType::fp32 ? 4 : type == CacheType::fp16 ? 2 : 1),
      key_bytes_(head_dim * kPageTokens * width_),
      scales_at_(key_bytes_ + chunks_ * kPageTokens * kPageTokens * width_),
      page_bytes_(round_up(scales_at_ + (type == CacheType::int8 ? 2 * kPageTokens * 4 : 0), 64)) {
    std::partial_sum(heads.begin(), heads.end(), starts_.begin() + 1);
    // calloc: large pieces come from the system untouched
    void *untouched = std::calloc(std::size_t(starts_.back() * pages), std::size_t(page_bytes_));
    data_.reset(static_cast<std::uint8_t *>(untouched));
    if (!data_) throw std::bad_alloc();
}

namespace {

template <typename T>
void scatter(const T *key, const T *value, Index head_dim, Index slot, T *keys, T *values) {
    for (Index i = 0; i < head_dim; ++i) keys[i * kPageTokens + slot] = key[i];
    for (Index from = 0; from < head_dim; from += kPageTokens) {
        T *row = values + from * kPageTokens + slot * kPageTokens;
        const Index here = std::min(kPageTokens, head_dim - from);
        std::copy(value + from, value + from + here, row);
        std::fill(row + here, row + kPageTokens, T(0));
    }
}

}  // namespace

void Cache::write(Index layer, Index page, Index head, Index slot, const float *key, const float *value) {
    std::uint8_t *keys = at(layer, page, head), *values = keys + key_bytes_;
    const DecoderKernels &k = decoder_kernels();
    if (type_ == CacheType::fp32) {
        scatter(key, value, head_dim_, slot, reinterpret_cast<float *>(keys),
                reinterpret_cast<float *>(values));
    } else if (type_ == CacheType::fp16) {
        std::uint16_t halves[2][kMostHeadDim];
        k.narrow_half(key, head_dim_, halves[0]);
        k.narrow_half(value, head_dim_, halves[1]);
        scatter(halves[0], halves[1], head_dim_, slot, reinterpret_cast<std::uint16_t *>(keys),
                reinterpret_cast<std::uint16_t *>(values));
    } else {
        std::int8_t whole[2][kMostHeadDim];
        const float *sources[2] = {key, value};
        float *scales = reinterpret_cast<float *>(keys + scales_at_) + slot;
        for (int i = 0; i < 2; ++i) {
            const float peak = k.peak(sources[i], head_dim_), factor = peak > 0x1p-100f ? 127.0f / peak : 0.0f;
            scales[i * kPageTokens] = factor > 0 ? peak / 127.0f : 0.0f;
            k.narrow_int8(sources[i], factor, head_dim_, whole[i]);
        }
        scatter(whole[0], whole[1], head_dim_, slot, reinterpret_cast<std::int8_t *>(keys),
                reinterpret_cast<std::int8_t *>(values));
    }
}

const float *Cache::widened(const std::uint8_t *stored, Index count, float *room) const {
    const DecoderKernels &k = decoder_kernels();
    if (type_ == CacheType::fp32) return reinterpret_cast<const float *>(stored);
    if (type_ == CacheType::fp16) k.widen_half(reinterpret_cast<const std::uint16_t *>(stored), count, room);
    else k.widen_int8(reinterpret_cast<const std::int8_t *>(stored), count, room);
    return room;
}

const float *Cache::keys(Index layer, Index page, Index head, float *room) const {
    return widened(at(layer, page, head), head_dim_ * kPageTokens, room);
}

const float *Cache::values(Index layer, Index page, Index head, float *room) const {
    return widened(at(layer, page, head) + key_bytes_, chunks_ * kPageTokens * kPageTokens, room);
}

void Cache::fetch(const std::uint8_t *stored, Index count) const {
    for (Index i = 0; i < count * width_; i += 64) __builtin_prefetch(stored + i);
}

void Cache::fetch_keys(Index layer, Index page, Index head) const {
    fetch(at(layer, page, head), head_dim_ * kPageTokens);
}

void Cache::fetch_values(Index layer, Index page, Index head) const {
    fetch(at(layer, page, head) + key_bytes_, chunks_ * kPageTokens * kPageTokens);
}

const float *Cache::key_scales(Index layer, Index page, Index head) const {
    if (type_ != CacheType::int8) return nullptr;
    return reinterpret_cast<const float *>(at(layer, page, head) + scales_at_);
}

const float *Cache::value_scales(Index layer, Index page, Index head) const {
    const float *scales = key_scales(layer, page, head);
    return scales ? scales + kPageTokens : nullptr;
}
