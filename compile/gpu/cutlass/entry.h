// What a kernel's translation unit gives to the registry.
#pragma once

#include <cuda_runtime.h>

#include "sparse_gemm.h"

namespace secateur {

struct Problem {
  int32_t m, n, k;
  const void* values;
  const void* meta;
  const void* b;
  int64_t ldb;
  void* d;
  int64_t ldd;
  const float* row_scale;
  const float* column_scale;
  const void* bias;
  float alpha;
};

struct Entry {
  secateur_kernel_facts facts;
  int64_t (*meta_bytes)(int32_t m, int32_t k);
  int64_t (*workspace_bytes)(Problem const&);
  int32_t (*run)(Problem const&, void* workspace, cudaStream_t);
};

}  // namespace secateur
