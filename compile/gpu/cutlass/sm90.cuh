// Sparse GEMMs of CUTLASS 3 (wgmma.sp and later) with the epilogue of sparse_gemm.h.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "entry.h"

namespace secateur::sm90 {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// D = alpha * (row_scale * (column_scale * accumulator)) + bias, rounded once.
template <class Output, class TileShape>
struct Epilogue {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using Times = fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>;
  using TimesPlus = fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Output, float, kRound>;
  using RowScale = fusion::Sm90ColBroadcast<0, TileShape, float>;
  using ColumnScale = fusion::Sm90RowBroadcast<0, TileShape, float>;
  using Bias = fusion::Sm90ColBroadcast<0, TileShape, Output, float>;
  using Alpha = fusion::Sm90ScalarBroadcast<float>;
  using Inner = fusion::Sm90EVT<Times, ColumnScale, fusion::Sm90AccFetch>;
  using Scaled = fusion::Sm90EVT<Times, RowScale, Inner>;
  using Tree = fusion::Sm90EVT<TimesPlus, Alpha, Scaled, Bias>;

  static typename Tree::Arguments arguments(Problem const& p) {
    typename Inner::Arguments inner{{p.column_scale, 1.0f, {}}, {}, {}};
    typename Scaled::Arguments scaled{{p.row_scale, 1.0f, {}}, inner, {}};
    return {{{p.alpha}}, scaled, {static_cast<Output const*>(p.bias), Output(0), {}}, {}};
  }
};

template <class GemmKernel, class Fused, class Output>
struct Kernel {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;
  using Mainloop = typename GemmKernel::CollectiveMainloop;
  using Config = typename Mainloop::SparseConfig;

  static typename Gemm::Arguments arguments(Problem const& p, int processors) {
    auto shape = make_shape(p.m, p.n, p.k, 1);
    typename GemmKernel::StrideB stride_b{};
    typename GemmKernel::StrideD stride_d{};
    get<0>(stride_b) = p.ldb;
    get<1>(stride_d) = p.ldd;
    cutlass::KernelHardwareInfo hardware;
    hardware.sm_count = processors;
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            shape,
            {static_cast<typename Gemm::ElementA const*>(p.values), Config::fill_layoutA(shape),
             static_cast<typename Gemm::ElementB const*>(p.b), stride_b,
             static_cast<typename Mainloop::ElementE const*>(p.meta), Config::fill_layoutE(shape)},
            {Fused::arguments(p), nullptr, {}, static_cast<Output*>(p.d), stride_d},
            hardware};
  }

  static int64_t meta_bytes(int32_t m, int32_t k) {
    auto elements = cosize(Config::fill_layoutE(make_shape(m, 1, k, 1)));
    return int64_t(elements) / typename Mainloop::ElementEMma{}.sparsity;
  }

  // The scheduler's, for a GPU with one processor: it only grows where K is split, and none is here.
  static int64_t workspace_bytes(Problem const& p) {
    return int64_t(Gemm::get_workspace_size(arguments(p, 1)));
  }

  static int32_t run(Problem const& p, void* workspace, cudaStream_t stream) {
    int device = 0;
    if (auto fault = cudaGetDevice(&device)) return SECATEUR_CUDA + fault;
    auto processors = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
    auto problem = arguments(p, processors);
    Gemm gemm;
    auto status = gemm.can_implement(problem);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(problem, workspace, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return int32_t(status);
  }

  static Entry entry(const char* name, const char* operation) {
    using Shape = typename GemmKernel::TileShape;
    // TMA moves lines of 16 bytes: of the kept values, of B's columns, of D's columns.
    constexpr int kB = 128 / cutlass::sizeof_bits<typename Gemm::ElementB>::value;
    constexpr int kD = 128 / cutlass::sizeof_bits<Output>::value;
    return {{name, operation, int(size<0>(Shape{})), int(size<1>(Shape{})), int(size<2>(Shape{})),
             int(Mainloop::DispatchPolicy::Stages), int(GemmKernel::MaxThreadsPerBlock),
             int(GemmKernel::SharedStorageSize), kD, 1, 2 * kB, kB, kD, 1,
             std::is_same_v<typename GemmKernel::ArchTag, cutlass::arch::Sm90>
                 ? int(typename Config::TensorEAtomK{})
                 : -1},
            meta_bytes, workspace_bytes, run};
  }
};

}  // namespace secateur::sm90
