/* The C interface of a library of sparse GEMM kernels, one library for each architecture.
 *
 *     D = alpha * row_scale[m] * column_scale[n] * (A B) + bias[m]
 *
 * A [m, k] is 2:4 sparse and packed (fp32: 1:2): a linear's weight, m outputs and k inputs. B [k, n]
 * is column-major with ldb between columns: activations, a row of memory for each of n tokens. The
 * sums are fp32 (int8: exact, int32), and so is what follows them until D is rounded, once.
 * All pointers are to device memory; nothing here synchronises. Loading the library and all
 * functions but secateur_sparse_gemm need neither a GPU nor a driver.
 */
#ifndef SECATEUR_SPARSE_GEMM_H
#define SECATEUR_SPARSE_GEMM_H

#include <stddef.h>
#include <stdint.h>

#define SECATEUR_SPARSE_GEMM_ABI 1

/* Statuses: 0; those of cutlass::Status; these; 1000 + a cudaError_t. */
enum {
  SECATEUR_OK = 0,
  SECATEUR_NO_SUCH_KERNEL = 100,
  SECATEUR_SHAPE = 101,        /* an extent is not positive or not a multiple of what it must be */
  SECATEUR_LEADING = 102,      /* ldb or ldd is too small or not a multiple of what it must be */
  SECATEUR_NULL = 103,         /* values, meta, b or d is null */
  SECATEUR_WORKSPACE = 104,    /* the workspace is too small */
  SECATEUR_ARCHITECTURE = 105, /* the current GPU cannot run this library's code */
  SECATEUR_SHARED = 106,       /* the kernel needs more shared memory than the current GPU has */
  SECATEUR_CUDA = 1000
};

typedef struct {
  const char* name;      /* unique: architecture-types-tile */
  const char* operation; /* CUTLASS's name of the GEMM */
  int32_t tile_m, tile_n, tile_k, stages, threads, shared_bytes;
  int32_t multiple_m, multiple_n, multiple_k; /* what m, n and k must be multiples of */
  int32_t multiple_b, multiple_d;             /* what ldb and ldd must be multiples of */
  int32_t d_column_major; /* 1: D has a row of memory for each token, ldd apart; 0: for each output */
  int32_t meta_tile_k; /* 0: SM80 order of metadata; -1: SM100; else SM90 order with this tile */
} secateur_kernel_facts;

#ifdef __cplusplus
extern "C" {
#endif

int32_t secateur_abi(void);
/* What the library was built from: a hash of its sources, compiler and flags; and in words. */
const char* secateur_build_key(void);
const char* secateur_build_versions(void);

int32_t secateur_kernel_count(void);
/* A status. */
int32_t secateur_kernel(int32_t kernel, secateur_kernel_facts* facts);
/* Bytes of metadata of A, and of workspace; -1 if there is no such kernel. */
int64_t secateur_meta_bytes(int32_t kernel, int32_t m, int32_t k);
int64_t secateur_workspace_bytes(int32_t kernel, int32_t m, int32_t n, int32_t k);

/* Start D on a stream. row_scale [m], column_scale [n] (fp32) and bias [m] (the type of D) may be
 * null: 1, 1 and 0. Returns a status. */
int32_t secateur_sparse_gemm(int32_t kernel, int32_t m, int32_t n, int32_t k, const void* values,
                             const void* meta, const void* b, int64_t ldb, void* d, int64_t ldd,
                             const float* row_scale, const float* column_scale, const void* bias,
                             float alpha, void* workspace, int64_t workspace_bytes, void* stream);

/* A status in words; never null. */
const char* secateur_message(int32_t status);

#ifdef __cplusplus
}
#endif
#endif
