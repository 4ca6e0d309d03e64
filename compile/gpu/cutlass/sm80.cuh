// Sparse GEMMs of CUTLASS 2 (mma.sp) with the epilogue of sparse_gemm.h.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_sparse_with_visitor.h>
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "entry.h"

namespace secateur::sm80 {

using namespace cute;
namespace tb = cutlass::epilogue::threadblock;

// D = alpha * (row_scale * (column_scale * accumulator)) + bias, rounded once.
template <class Output, class TileShape, class WarpShape>
struct Epilogue {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using Threads = tb::OutputTileThreadLayout<TileShape, WarpShape, Output,
                                             128 / cutlass::sizeof_bits<Output>::value, 1>;
  using Times = tb::VisitorCompute<cutlass::multiplies, float, float, kRound>;
  using TimesPlus = tb::VisitorCompute<cutlass::homogeneous_multiply_add, Output, float, kRound>;
  using RowScale = tb::VisitorColBroadcast<Threads, float, Stride<_1, _0, _0>>;
  using ColumnScale = tb::VisitorRowBroadcast<Threads, float, Stride<_0, _1, _0>>;
  using Bias = tb::VisitorColBroadcast<Threads, Output, Stride<_1, _0, _0>>;
  using Alpha = tb::VisitorScalarBroadcast<float>;
  using Inner = tb::Sm80EVT<Times, ColumnScale, tb::VisitorAccFetch>;
  using Scaled = tb::Sm80EVT<Times, RowScale, Inner>;
  using Biased = tb::Sm80EVT<TimesPlus, Alpha, Scaled, Bias>;
  using Store = tb::VisitorAuxStore<Threads, Output, kRound, Stride<int64_t, _1, _0>>;
  using Tree = tb::Sm80EVT<Store, Biased>;

  static typename Tree::Arguments arguments(Problem const& p) {
    typename Inner::Arguments inner{{p.column_scale, 1.0f, {}}, {}, {}};
    typename Scaled::Arguments scaled{{p.row_scale, 1.0f, {}}, inner, {}};
    typename Biased::Arguments biased{
        {{p.alpha}}, scaled, {static_cast<Output const*>(p.bias), Output(0), {}}, {}};
    return {biased, {static_cast<Output*>(p.d), {p.ldd, _1{}, _0{}}}};
  }
};

template <class Gemm, class Fused, class Output>
struct Kernel {
  static constexpr int kPerMeta = Gemm::kSparse * Gemm::kElementsPerElementE;

  static typename Gemm::Arguments arguments(Problem const& p) {
    using E = typename Gemm::ElementE;
    auto meta = const_cast<E*>(static_cast<E const*>(p.meta));
    return {{p.m, p.n, p.k},
            {static_cast<typename Gemm::ElementA const*>(p.values), p.k / Gemm::kSparse},
            {static_cast<typename Gemm::ElementB const*>(p.b), p.ldb},
            {meta, Gemm::LayoutE::packed({p.m, p.k / kPerMeta})},
            Fused::arguments(p)};
  }

  static int64_t meta_bytes(int32_t m, int32_t k) {
    return int64_t(m) * (k / kPerMeta) * sizeof(typename Gemm::ElementE);
  }

  static int64_t workspace_bytes(Problem const&) { return 0; }

  static int32_t run(Problem const& p, void* workspace, cudaStream_t stream) {
    Gemm gemm;
    auto problem = arguments(p);
    auto status = Gemm::can_implement(problem);
    if (status == cutlass::Status::kSuccess) status = gemm(problem, workspace, stream);
    return int32_t(status);
  }

  static Entry entry(const char* name, const char* operation) {
    using Shape = typename Gemm::ThreadblockShape;
    constexpr int kVector = 128 / cutlass::sizeof_bits<Output>::value;
    // Rows: metadata is stored in groups of 32 rows of 16-bit words, or 16 of 32-bit ones.
    constexpr int kRows = sizeof(typename Gemm::ElementE) == 2 ? 32 : 16;
    return {{name, operation, Shape::kM, Shape::kN, Shape::kK, Gemm::kStages,
             Gemm::GemmKernel::kThreadCount, int32_t(sizeof(typename Gemm::GemmKernel::SharedStorage)),
             kRows, kVector, Shape::kK, Gemm::kAlignmentB, kVector, 0, 0},
            meta_bytes, workspace_bytes, run};
  }
};

}  // namespace secateur::sm80
