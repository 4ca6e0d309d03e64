// CUTLASS's own host code behind a C interface, for tests to compare layouts with.
#include <cstdint>
#include <cstring>
#include <vector>

#include "cutlass/cutlass.h"
#include "cutlass/util/host_reorder.h"
#include "cutlass/util/host_uncompress.h"
#include "cutlass/util/reference/host/gemm.h"

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"

namespace {

using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

// The metadata of a type of weights: its words, and their layout in memory, which
// cutlass/gemm/threadblock/default_mma_core_sparse_sm80.h calls GmemLayoutE.
template <typename A, typename C> struct Type {
    using Weight = A;
    using Sum = C;
    using Word = std::conditional_t<sizeof(A) == 1, std::uint32_t, std::uint16_t>;
    using Stored = cutlass::layout::ColumnMajorInterleaved<2>;
    static constexpr int kColumns = 256 / (8 * sizeof(A));  // of a word, as uncompress() has it
};

// Undo reorder_meta: where it puts every word, it says itself.
template <typename T>
std::vector<typename T::Word> restored(const void *meta, int rows, int words) {
    using Word = typename T::Word;
    using Stored = typename T::Stored;
    std::vector<Word> numbers(std::size_t(rows) * words), moved(numbers.size()), plain(numbers.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = Word(i);
    cutlass::reorder_meta(cutlass::TensorRef<Word, Stored>(moved.data(), Stored::packed({rows, words})),
                          cutlass::TensorRef<Word, RowMajor>(numbers.data(), RowMajor(words)),
                          {rows, 1, words});
    for (std::size_t i = 0; i < moved.size(); ++i)
        std::memcpy(&plain[moved[i]], static_cast<const char *>(meta) + i * sizeof(Word), sizeof(Word));
    return plain;
}

template <typename T>
int uncompress(const void *values, const void *meta, int rows, int columns, void *dense) {
    using A = typename T::Weight;
    using Word = typename T::Word;
    const int words = columns / T::kColumns;
    if (std::size_t(rows) * words > 65536) return 1;  // restored() counts in words
    std::vector<Word> plain = restored<T>(meta, rows, words);
    std::vector<A> stored(std::size_t(rows) * columns / 2);
    std::memcpy(stored.data(), values, stored.size() * sizeof(A));
    cutlass::uncompress(cutlass::TensorRef<A, RowMajor>(static_cast<A *>(dense), RowMajor(columns)),
                        cutlass::TensorRef<A, RowMajor>(stored.data(), RowMajor(columns / 2)),
                        cutlass::TensorRef<Word, RowMajor>(plain.data(), RowMajor(words)), rows, columns);
    return 0;
}

// c = a b^T, a [m, k] and b [n, k].
template <typename T> int multiply(void *a, void *b, void *c, int m, int n, int k) {
    using A = typename T::Weight;
    using Sum = typename T::Sum;
    cutlass::reference::host::Gemm<A, RowMajor, A, ColumnMajor, Sum, RowMajor, Sum, Sum> gemm;
    const cutlass::TensorRef<Sum, RowMajor> to(static_cast<Sum *>(c), RowMajor(n));
    gemm({m, n, k}, Sum(1), {static_cast<A *>(a), RowMajor(k)}, {static_cast<A *>(b), ColumnMajor(k)}, Sum(0),
         to, to);
    return 0;
}

template <typename A, int TileK> int offsets(int rows, int columns, std::int64_t *out) {
    using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, A>, cute::GMMA::Major::K,
                                                 cute::sparse_elem<8, std::uint8_t>, cute::Int<TileK>>;
    const auto layout = Config::fill_layoutE(cute::make_tuple(rows, 1, columns, 1));
    const int high = cute::size<0>(layout), wide = cute::size<1>(layout);
    for (int r = 0; r < high; ++r)
        for (int c = 0; c < wide; ++c) *out++ = layout(r, c, 0);
    return int(typename Config::TensorAAlignmentK{});
}

using Half = Type<cutlass::half_t, float>;
using Bfloat = Type<cutlass::bfloat16_t, float>;
using Int8 = Type<std::int8_t, std::int32_t>;
using Float = Type<float, float>;

}  // namespace

extern "C" {

// Type: 0 fp16, 1 bf16, 2 int8, 3 fp32.
int sm80_uncompress(int type, const void *values, const void *meta, int rows, int columns, void *dense) {
    if (type == 0) return uncompress<Half>(values, meta, rows, columns, dense);
    if (type == 1) return uncompress<Bfloat>(values, meta, rows, columns, dense);
    if (type == 2) return uncompress<Int8>(values, meta, rows, columns, dense);
    return uncompress<Float>(values, meta, rows, columns, dense);
}

int host_gemm(int type, void *a, void *b, void *c, int m, int n, int k) {
    if (type == 0) return multiply<Half>(a, b, c, m, n, k);
    if (type == 1) return multiply<Bfloat>(a, b, c, m, n, k);
    if (type == 2) return multiply<Int8>(a, b, c, m, n, k);
    return multiply<Float>(a, b, c, m, n, k);
}

// The place of the metadata of every weight, in weights, [rows, columns] padded as CUTLASS pads.
// Returns what the columns of the stored values are a multiple of, or -1.
int sm90_offsets(int bytes, int tile_k, int rows, int columns, std::int64_t *out) {
    if (bytes == 2 && tile_k == 32) return offsets<cutlass::half_t, 32>(rows, columns, out);
    if (bytes == 2 && tile_k == 64) return offsets<cutlass::half_t, 64>(rows, columns, out);
    if (bytes == 2 && tile_k == 128) return offsets<cutlass::half_t, 128>(rows, columns, out);
    if (bytes == 1 && tile_k == 64) return offsets<std::int8_t, 64>(rows, columns, out);
    if (bytes == 1 && tile_k == 128) return offsets<std::int8_t, 128>(rows, columns, out);
    return -1;
}
}
