// One step: embedding, blocks, head. Attention itself is in decoder_attention.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "decoder_parts.h"

const DecoderKernels &decoder_kernels() {
    const std::string name = kernels().name;
#if defined(__x86_64__) && defined(__GNUC__)
    if (name == "avx512") return avx512_decoder_kernels();
    if (name == "avx2") return avx2_decoder_kernels();
#elif defined(__aarch64__)
    if (name == "neon") return neon_decoder_kernels();
#endif
    return plain_decoder_kernels();
}

const float *Decoder::step(const Batch &batch) {
    const std::lock_guard<std::mutex> hold(busy_);
    check(batch);
    const Index n = batch.count;
    const Dimensions &d = shape_;
    const Index per_token = (widest_.heads + 2 * widest_.kv_heads) * d.head_dim;
    grow(x_, n * d.hidden);
    grow(normed_, n * d.hidden);
    grow(added_, n * d.hidden);
    grow(qkv_, n * per_token);
    grow(mixed_, n * widest_.heads * d.head_dim);
    grow(gates_, n * 2 * widest_.intermediate);
    grow(gated_, n * widest_.intermediate);
    place(batch);
    embed(batch);
    const Index layers = Index(layers_.size());
    for (Index i = 0; i < layers; ++i) {
        const Layer &layer = layers_[std::size_t(i)];
        const Sizes &sizes = d.layers[std::size_t(i)];
        attention(batch, i);
        multiply_all(layer.output, mixed_.data(), sizes.heads * d.head_dim, n, added_.data(), layer.gate_up);
        join(layer.after_attention, &layer.mlp_norm, n);
        mlp(layer, sizes.intermediate, n, i + 1 < layers ? layers_[std::size_t(i) + 1].qkv : head_);
        join(layer.after_mlp, i + 1 < layers ? &layers_[std::size_t(i) + 1].attention_norm : nullptr, n);
    }
    return logits(batch);
}

// Rows of the embedding, and what the first block reads.
void Decoder::embed(const Batch &batch) {
    const DecoderKernels &k = decoder_kernels();
    const Index width = shape_.hidden, bytes = width * bits_of(embedding_.type) / 8;
    each_token(batch.count, width, [&](Index t) {
        float *x = x_.data() + t * width;
        const std::uint8_t *row = embedding_.data + batch.tokens[t] * bytes;
        const auto *halves = reinterpret_cast<const std::uint16_t *>(row);
        if (embedding_.type == Type::fp32) std::memcpy(x, row, std::size_t(bytes));
        else if (embedding_.type == Type::fp16) k.widen_half(halves, width, x);
        else k.widen_bfloat(halves, width, x);
        if (shape_.embedding_scale != 1)
            for (Index i = 0; i < width; ++i) x[i] *= shape_.embedding_scale;
        k.norm(x, layers_[0].attention_norm.data(), shape_.epsilon, width, normed_.data() + t * width);
    });
}

// Where each token stands, and its sines and cosines.
void Decoder::place(const Batch &batch) {
    sequence_of_.resize(std::size_t(batch.count));
    position_of_.resize(std::size_t(batch.count));
    for (Index s = 0; s < batch.sequences; ++s)
        for (Index t = batch.starts[s]; t < batch.starts[s + 1]; ++t) {
            sequence_of_[std::size_t(t)] = s;
            position_of_[std::size_t(t)] = batch.positions[s] + t - batch.starts[s];
        }
    for (std::size_t r = 0; r < ropes_.size(); ++r) {
        const Rope &rope = ropes_[r];
        const Index half = Index(rope.frequencies.size());
        grow(cosines_[r], batch.count * half);
        grow(sines_[r], batch.count * half);
        each_token(batch.count, 32 * half, [&](Index t) {
            for (Index i = 0; i < half; ++i) {
                const float angle = float(position_of_[std::size_t(t)]) * rope.frequencies[std::size_t(i)];
                cosines_[r][std::size_t(t * half + i)] = std::cos(angle) * rope.factor;
                sines_[r][std::size_t(t * half + i)] = std::sin(angle) * rope.factor;
            }
        });
    }
    planned_group_ = 0;
}

// x += what a part of a block added; and the norm of it, for the next part.
void Decoder::join(const Floats &after, const Floats *next, Index count) {
    const DecoderKernels &k = decoder_kernels();
    const Index width = shape_.hidden;
    each_token(count, 2 * width, [&](Index t) {
        float *x = x_.data() + t * width, *added = added_.data() + t * width;
        if (!after.empty()) k.norm(added, after.data(), shape_.epsilon, width, added);
        k.add(added, width, x);
        if (next) k.norm(x, next->data(), shape_.epsilon, width, normed_.data() + t * width);
    });
}

void Decoder::mlp(const Layer &layer, Index width, Index count, const std::vector<Linear> &next) {
    constexpr Index kPiece = 2048;
    const DecoderKernels &k = decoder_kernels();
    const Index pieces = (width + kPiece - 1) / kPiece;
    const bool fused = layer.gate_up.size() == 1;
    multiply_all(layer.gate_up, normed_.data(), shape_.hidden, count, gates_.data(), layer.down);
    const Index stride = fused ? 2 * width : width;
    const float *ups = gates_.data() + (fused ? width : count * width);
    over_panels(count * pieces, std::max<Index>(1, 4 * kPiece / width), [&](Index from, Index to) {
        for (Index i = from; i < to; ++i) {
            const Index t = i / pieces, first = i % pieces * kPiece, here = std::min(kPiece, width - first);
            k.gate(shape_.activation, gates_.data() + t * stride + first, ups + t * stride + first, here,
                   gated_.data() + t * width + first);
        }
    });
    multiply_all(layer.down, gated_.data(), width, count, added_.data(), next);
}

const float *Decoder::logits(const Batch &batch) {
    const DecoderKernels &k = decoder_kernels();
    const Index width = shape_.hidden, count = batch.wanted_count, vocabulary = shape_.vocabulary;
    grow(logits_, count * vocabulary);
    each_token(count, width, [&](Index w) {
        k.norm(x_.data() + batch.wanted[w] * width, norm_.data(), shape_.epsilon, width,
               normed_.data() + w * width);
    });
    multiply_all(head_, normed_.data(), width, count, logits_.data(), layers_[0].qkv);
    if (shape_.logit_cap > 0)
        each_token(count, vocabulary, [&](Index w) {
            k.cap(shape_.logit_cap, vocabulary, logits_.data() + w * vocabulary);
        });
    return logits_.data();
}
