// Random decoders, and texts through them cut into steps and batches in random ways, with every
// instruction set: however a text is cut its logits are the same; a batch that contradicts itself is
// refused and leaves nothing behind; no byte is read or written that is not there (built with
// sanitizers, see the Makefile).
//
//   steps SEED COUNT [FIRST]     cases FIRST to FIRST + COUNT - 1 of a seed
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "decoder.h"
#include "pool.h"
#include "weights.h"

namespace {

struct Wrong : std::runtime_error {
    using std::runtime_error::runtime_error;
};

Floats floats(Random &random, Index count, float scale) {
    Floats made(std::size_t(count), 0.0f);
    for (float &value : made) value = scale * random.unit();
    return made;
}

Linear linear(Random &random, Index rows, Index columns) {
    const Packed weight = sound(random, columns, rows);
    Linear made{std::make_shared<Matrix>(weight.view(), weight.shape), false, {}};
    if (random.one_in(3)) made.bias = floats(random, rows, 1);
    return made;
}

// Several matrices with the same inputs, or one with their rows.
std::vector<Linear> linears(Random &random, const std::vector<Index> &rows, Index columns) {
    Index all = 0;
    for (const Index count : rows) all += count;
    if (random.one_in(3)) return {linear(random, all, columns)};
    std::vector<Linear> made;
    for (const Index count : rows) made.push_back(linear(random, count, columns));
    return made;
}

struct Model {
    Dimensions shape;
    std::vector<std::uint8_t> table;
    CacheType cache;
    Index pages;
    std::unique_ptr<Decoder> decoder;
};

Model model(Random &random) {
    Model made;
    Dimensions &d = made.shape;
    for (Index i = 1 + random.below(2); i > 0; --i) {  // blocks of sizes of their own
        const Index kv_heads = 1 + random.below(3);
        d.layers.push_back({kv_heads * (1 + random.below(4)), kv_heads, 1 + random.below(90)});
    }
    d.head_dim = 2 * (1 + random.below(random.one_in(4) ? 40 : 10));
    d.hidden = 1 + random.below(70);
    d.vocabulary = 1 + random.below(60);
    d.max_length = 16 + random.below(60);
    d.epsilon = 1e-5f;
    d.attention_scale = 0.3f / float(d.head_dim);
    d.attention_cap = random.one_in(3) ? 5.0f : 0;
    d.logit_cap = random.one_in(3) ? 30.0f : 0;
    d.embedding_scale = random.one_in(2) ? 1 : 3;
    d.activation = random.of({Activation::silu, Activation::gelu, Activation::gelu_tanh});
    made.cache = random.of({CacheType::fp32, CacheType::fp16, CacheType::int8});
    made.pages = 4 * ((d.max_length + kPageTokens - 1) / kPageTokens);
    const Index half = 1 + random.below(d.head_dim / 2);
    const Floats embedding = floats(random, d.vocabulary * d.hidden, 1);
    made.table.resize(embedding.size() * 4);
    std::memcpy(made.table.data(), embedding.data(), made.table.size());
    made.decoder = std::make_unique<Decoder>(
        d, std::vector<Rope>{{floats(random, half, 1), 1}}, Table{made.table.data(), Type::fp32},
        floats(random, d.hidden, 1), std::vector<Linear>{linear(random, d.vocabulary, d.hidden)}, made.cache,
        made.pages);
    for (const Sizes &sizes : d.layers) {
        const Index queries = sizes.heads * d.head_dim, keys = sizes.kv_heads * d.head_dim;
        const auto norm = [&](Index width, Index one_in) {
            return random.one_in(one_in) ? floats(random, width, 0.3f) : Floats();
        };
        made.decoder->add_layer({linears(random, {queries, keys, keys}, d.hidden),
                                 linears(random, {sizes.intermediate, sizes.intermediate}, d.hidden),
                                 {linear(random, d.hidden, queries)},
                                 {linear(random, d.hidden, sizes.intermediate)},
                                 norm(d.hidden, 1), norm(d.hidden, 2), norm(d.hidden, 1), norm(d.hidden, 2),
                                 norm(d.head_dim, 2), norm(d.head_dim, 2), int(random.below(2)) - 1,
                                 random.one_in(2) ? 1 + random.below(20) : 0});
    }
    return made;
}

// ------------------------------------------------------------------------------------- batches

// A text on its way: its tokens, its pages, and how many were read.
struct Text {
    std::vector<std::int32_t> tokens, pages;
    Index read = 0;
};

// What a step is given, in buffers of exactly these lengths.
struct Arrays {
    std::vector<std::int32_t> tokens, starts{0}, positions, tables, wanted;
    Index table_width = 0;

    Batch batch() const {
        return {tokens.data(), starts.data(), positions.data(), tables.data(), wanted.data(),
                Index(tokens.size()), Index(positions.size()), table_width, Index(wanted.size())};
    }
};

// The next `counts[i]` tokens of each text that has any; all of their logits are wanted.
Arrays next_of(const std::vector<Text> &texts, const std::vector<Index> &counts) {
    Arrays made;
    for (const Text &text : texts) made.table_width = std::max(made.table_width, Index(text.pages.size()));
    for (std::size_t i = 0; i < texts.size(); ++i) {
        const Text &text = texts[i];
        if (!counts[i]) continue;
        made.positions.push_back(std::int32_t(text.read));
        for (Index t = 0; t < counts[i]; ++t) {
            made.wanted.push_back(std::int32_t(made.tokens.size()));
            made.tokens.push_back(text.tokens[std::size_t(text.read + t)]);
        }
        made.starts.push_back(std::int32_t(made.tokens.size()));
        std::vector<std::int32_t> row = text.pages;
        row.resize(std::size_t(made.table_width), 0);
        made.tables.insert(made.tables.end(), row.begin(), row.end());
    }
    return made;
}

void damage(Random &random, Arrays &a) {
    const std::int32_t wild = random.of({-1, 1 << 30, -(1 << 30), 7, 0});
    std::vector<std::int32_t> &hit =
        *random.of({&a.tokens, &a.starts, &a.positions, &a.tables, &a.wanted});
    if (!hit.empty()) hit[std::size_t(random.below(Index(hit.size())))] = wild;
}

void check_close(const Floats &found, const Floats &wanted, float slack, const char *isa, const char *how) {
    float peak = 1;
    for (const float value : wanted) peak = std::max(peak, std::fabs(value));
    for (std::size_t i = 0; i < wanted.size(); ++i)
        if (!(std::fabs(found[i] - wanted[i]) <= slack * peak))
            throw Wrong(std::string(isa) + ", " + how + ": logit " + std::to_string(i) + " is " +
                        std::to_string(found[i]) + ", not " + std::to_string(wanted[i]));
}

// Read texts to their ends, by steps of `counts`; the logits of each.
template <typename Counts>
std::vector<Floats> read(Model &m, std::vector<Text> texts, const Counts &counts) {
    std::vector<Floats> logits(texts.size());
    for (;;) {
        const std::vector<Index> now = counts(texts);
        const Arrays arrays = next_of(texts, now);
        if (arrays.tokens.empty()) return logits;
        const float *out = m.decoder->step(arrays.batch());
        for (std::size_t i = 0; i < texts.size(); ++i) {
            const Index size = now[i] * m.shape.vocabulary;
            logits[i].insert(logits[i].end(), out, out + size);
            out += size;
            texts[i].read += now[i];
        }
    }
}

void run_case(Random &random, Index *refused) {
    Model m = model(random);
    std::vector<Text> texts(std::size_t(1 + random.below(4)));
    std::vector<std::int32_t> pages;
    for (std::int32_t page = 0; page < m.pages; ++page) pages.push_back(page);
    for (Text &text : texts) {
        const Index length = 1 + random.below(m.shape.max_length);
        for (Index t = 0; t < length; ++t)
            text.tokens.push_back(std::int32_t(random.below(m.shape.vocabulary)));
        for (Index p = 0; p < (length + kPageTokens - 1) / kPageTokens; ++p) {
            const Index at = random.below(Index(pages.size()));
            text.pages.push_back(pages[std::size_t(at)]);
            pages.erase(pages.begin() + at);
        }
    }
    const auto left = [](const Text &text) { return Index(text.tokens.size()) - text.read; };
    const auto whole = [&](const std::vector<Text> &all) {
        std::vector<Index> counts;
        for (const Text &text : all) counts.push_back(left(text));
        return counts;
    };
    const auto pieces = [&](const std::vector<Text> &all) {
        std::vector<Index> counts;
        bool any = false;
        for (const Text &text : all) {
            const Index most = std::min(left(text), random.of<Index>({1, 1, 5, 20}));
            counts.push_back(random.one_in(3) ? 0 : most);
            any |= counts.back() > 0;
        }
        if (!any)
            for (std::size_t i = 0; i < all.size(); ++i) counts[i] = std::min<Index>(1, left(all[i]));
        return counts;
    };
    const float slack = m.cache == CacheType::int8 ? 0.05f : 2e-3f;
    std::vector<Floats> first;
    for (const Kernels *isa : usable_kernels()) {
        use_kernels(*isa);
        const std::vector<Floats> at_once = read(m, texts, whole);
        Arrays broken = next_of(texts, whole(texts));
        damage(random, broken);
        try {
            m.decoder->step(broken.batch());
        } catch (const std::invalid_argument &) {
            ++*refused;
        }
        const std::vector<Floats> cut = read(m, texts, pieces);
        for (std::size_t i = 0; i < texts.size(); ++i)
            check_close(cut[i], at_once[i], slack, isa->name, "cut into steps");
        if (first.empty()) first = at_once;
        for (std::size_t i = 0; i < texts.size(); ++i)
            check_close(at_once[i], first[i], slack, isa->name, "beside another instruction set");
    }
}

}  // namespace

int main(int count_of_arguments, char **arguments) {
    if (count_of_arguments < 3) {
        std::fprintf(stderr, "usage: steps SEED COUNT [FIRST]\n");
        return 2;
    }
    const std::uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
    const Index count = std::atoll(arguments[2]);
    const Index first = count_of_arguments > 3 ? std::atoll(arguments[3]) : 0;
    Index refused = 0, wrong = 0;
    for (Index i = first; i < first + count && wrong < 10; ++i) {
        if (i == first || i % 100 == 0) set_threads(i / 100 % 4 == 3 ? 3 : 1, false);
        std::thread([&] {  // of its own: what a thread keeps is just as large as this case needs it
            Random random(seed * 1000003 + std::uint64_t(i));
            try {
                run_case(random, &refused);
            } catch (const std::exception &fault) {
                ++wrong;
                std::fprintf(stderr, "case %lld of seed %llu: %s\n", static_cast<long long>(i),
                             static_cast<unsigned long long>(seed), fault.what());
            }
        }).join();
    }
    std::printf("%lld decoders, %lld damaged batches refused, %lld wrong, with", static_cast<long long>(count),
                static_cast<long long>(refused), static_cast<long long>(wrong));
    for (const Kernels *isa : usable_kernels()) std::printf(" %s", isa->name);
    std::printf("\n");
    return wrong ? 1 : 0;
}
