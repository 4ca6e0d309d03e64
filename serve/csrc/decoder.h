// A decoder-only transformer: what it is made of, and one step for a batch of ragged sequences.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "decoder_cache.h"
#include "decoder_kernels.h"
#include "product.h"

using Floats = std::vector<float>;

// A weight with what its product needs.
struct Linear {
    std::shared_ptr<const Matrix> matrix;
    bool act8 = false;
    Floats bias;  // empty: none
};

// Angles that queries and keys are turned by: position * frequencies; sines and cosines * factor.
struct Rope {
    Floats frequencies;
    float factor = 1;
};

// What blocks may differ in.
struct Sizes {
    Index heads, kv_heads, intermediate;
    Index group() const { return heads / kv_heads; }
};

// The numbers that a model is described by; 0 switches a limit or a window off.
struct Dimensions {
    std::vector<Sizes> layers;
    Index hidden, head_dim, vocabulary, max_length;
    float epsilon, attention_scale, attention_cap, logit_cap, embedding_scale;
    Activation activation;
};

// One block. Empty norms are left out.
struct Layer {
    std::vector<Linear> qkv;      // three, or one with their rows in this order
    std::vector<Linear> gate_up;  // two, or one
    std::vector<Linear> output, down;  // one
    Floats attention_norm, after_attention, mlp_norm, after_mlp, query_norm, key_norm;
    int rope = -1;     // which of the model's; -1: none
    Index window = 0;  // tokens that a query sees, itself included; 0: all
};

// Rows of floats that lie in a file: read where they are asked for, at any alignment.
struct Table {
    const std::uint8_t *data = nullptr;
    Type type = Type::fp32;
};

// New tokens of sequences; see serve/native/step.py.
struct Batch {
    const std::int32_t *tokens, *starts, *positions, *tables, *wanted;
    Index count, sequences, table_width, wanted_count;
};

class Decoder {
  public:
    // Throws std::invalid_argument if the parts do not fit each other.
    Decoder(const Dimensions &shape, std::vector<Rope> ropes, Table embedding, Floats norm,
            std::vector<Linear> head, CacheType cache, Index pages);
    void add_layer(Layer layer);

    // Logits [wanted, vocabulary], good until the next step.
    // Throws std::invalid_argument if the batch contradicts itself or the model.
    const float *step(const Batch &batch);

    const Dimensions &shape() const { return shape_; }
    Index cache_bytes() const { return cache_.bytes(); }
    Index pages() const { return cache_.pages(); }

  private:
    // Rows of queries of one sequence and KV head: row r is token r / group, head r % group.
    struct Unit {
        Index sequence, head, first, last;
    };
    static Dimensions checked(const Dimensions &shape, Index pages);
    void check(const Batch &batch);
    void check_pages(const Batch &batch);
    void embed(const Batch &batch);
    void place(const Batch &batch);  // where tokens stand, sines and cosines
    void plan(const Batch &batch, const Sizes &sizes);  // the units of such layers
    void attention(const Batch &batch, Index layer);
    void keep(const Batch &batch, Index layer);  // keys and values, in the cache
    void attend(const Batch &batch, Index layer, const Unit &unit);
    void mlp(const Layer &layer, Index width, Index count, const std::vector<Linear> &next);
    void join(const Floats &after, const Floats *next, Index count);
    const float *logits(const Batch &batch);

    Dimensions shape_;
    std::vector<Rope> ropes_;
    Table embedding_;
    Floats norm_;
    std::vector<Linear> head_;
    Cache cache_;
    std::vector<Layer> layers_;
    Sizes widest_;  // of all layers

    std::mutex busy_;
    std::vector<std::int32_t> uses_;  // of each page, while a batch is checked
    std::vector<Index> sequence_of_, position_of_;
    std::vector<Unit> units_;
    Index planned_group_ = 0, planned_heads_ = 0;  // what the units are for; 0: not of this batch
    struct {
        float *at;
        Index stride;
    } query_, key_, value_;  // of this layer, [tokens, stride]
    Index work_ = 0;  // of attention, in multiplications
    Floats x_, normed_, qkv_, mixed_, gates_, gated_, added_, logits_;
    std::vector<Floats> cosines_, sines_;  // of each rope: [tokens, half]
};
