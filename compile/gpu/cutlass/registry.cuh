// The functions of sparse_gemm.h over `secateur::entries`, which the generated source defines
// together with SECATEUR_BUILD_KEY, SECATEUR_BUILD_VERSIONS and SECATEUR_RUNS_ON (see `runs_on`).
#pragma once

#include <cutlass/cutlass.h>

#include "entry.h"

namespace secateur {

inline Entry const* find(int32_t kernel) {
  return kernel >= 0 && kernel < kEntryCount ? entries[kernel] : nullptr;
}

// Whether a GPU of compute capability major.minor runs code for 10 * major + minor = `built`.
// Code of an "a" architecture (`exact`) runs there alone; other code has PTX for what came later.
inline bool runs_on(int major, int minor, int built, bool exact) {
  int capability = 10 * major + minor;
  return exact ? capability == built : capability >= built;
}

inline int32_t check(secateur_kernel_facts const& facts, Problem const& p) {
  if (p.m <= 0 || p.n <= 0 || p.k <= 0 || p.m % facts.multiple_m || p.n % facts.multiple_n ||
      p.k % facts.multiple_k)
    return SECATEUR_SHAPE;
  if (!p.values || !p.meta || !p.b || !p.d) return SECATEUR_NULL;
  if (p.ldb < p.k || p.ldd < (facts.d_column_major ? p.m : p.n) || p.ldb % facts.multiple_b ||
      p.ldd % facts.multiple_d)
    return SECATEUR_LEADING;
  return SECATEUR_OK;
}

inline int32_t check_device(secateur_kernel_facts const& facts) {
  int device = 0, major = 0, minor = 0, shared = 0;
  cudaError_t fault = cudaGetDevice(&device);
  if (!fault) fault = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!fault) fault = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!fault)
    fault = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (fault) {
    cudaGetLastError();  // ours to report, not the next caller's
    return SECATEUR_CUDA + fault;
  }
  if (!runs_on(major, minor, SECATEUR_RUNS_ON)) return SECATEUR_ARCHITECTURE;
  return facts.shared_bytes > shared ? SECATEUR_SHARED : SECATEUR_OK;
}

}  // namespace secateur

extern "C" {

int32_t secateur_abi(void) { return SECATEUR_SPARSE_GEMM_ABI; }
const char* secateur_build_key(void) { return SECATEUR_BUILD_KEY; }
const char* secateur_build_versions(void) { return SECATEUR_BUILD_VERSIONS; }
int32_t secateur_kernel_count(void) { return secateur::kEntryCount; }

int32_t secateur_kernel(int32_t kernel, secateur_kernel_facts* facts) {
  auto entry = secateur::find(kernel);
  if (!entry) return SECATEUR_NO_SUCH_KERNEL;
  *facts = entry->facts;
  return SECATEUR_OK;
}

int64_t secateur_meta_bytes(int32_t kernel, int32_t m, int32_t k) {
  auto entry = secateur::find(kernel);
  return entry ? entry->meta_bytes(m, k) : -1;
}

int64_t secateur_workspace_bytes(int32_t kernel, int32_t m, int32_t n, int32_t k) {
  auto entry = secateur::find(kernel);
  secateur::Problem problem{m, n, k};
  return entry ? entry->workspace_bytes(problem) : -1;
}

int32_t secateur_sparse_gemm(int32_t kernel, int32_t m, int32_t n, int32_t k, const void* values,
                             const void* meta, const void* b, int64_t ldb, void* d, int64_t ldd,
                             const float* row_scale, const float* column_scale, const void* bias,
                             float alpha, void* workspace, int64_t workspace_bytes, void* stream) {
  auto entry = secateur::find(kernel);
  if (!entry) return SECATEUR_NO_SUCH_KERNEL;
  secateur::Problem problem{m, n, k,   values,    meta,         b,    ldb,
                            d, ldd, row_scale, column_scale, bias, alpha};
  if (int32_t status = secateur::check(entry->facts, problem)) return status;
  if (int32_t status = secateur::check_device(entry->facts)) return status;
  int64_t needed = entry->workspace_bytes(problem);
  if (workspace_bytes < needed || (needed && !workspace)) return SECATEUR_WORKSPACE;
  return entry->run(problem, workspace, static_cast<cudaStream_t>(stream));
}

const char* secateur_message(int32_t status) {
  switch (status) {
    case SECATEUR_OK: return "ok";
    case SECATEUR_NO_SUCH_KERNEL: return "this library has no kernel of that number";
    case SECATEUR_SHAPE: return "m, n or k is not a positive multiple of what the kernel needs";
    case SECATEUR_LEADING: return "ldb or ldd is too small, or not a multiple of what is needed";
    case SECATEUR_NULL: return "the pointer to values, meta, b or d is null";
    case SECATEUR_WORKSPACE: return "the workspace is too small";
    case SECATEUR_ARCHITECTURE: return "the GPU cannot run code of this library's architecture";
    case SECATEUR_SHARED: return "the kernel needs more shared memory than this GPU has";
  }
  if (status >= SECATEUR_CUDA)
    return cudaGetErrorString(static_cast<cudaError_t>(status - SECATEUR_CUDA));
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}
}
