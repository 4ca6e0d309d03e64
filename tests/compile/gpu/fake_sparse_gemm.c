// The interface of sparse_gemm.h on a CPU, from the definitions of layouts and types alone: what
// the caller passes is checked as the real library checks it, and the product is computed plainly.
// -DSM90: kernels of sm_90a; else of sm_80.
#include "sparse_gemm.h"

#include <math.h>
#include <string.h>

#ifdef SM90
enum { kCount = 4 };
static const char* const kNames[] = {"sm_90a-bf16-64x64x128", "sm_90a-fp16-64x64x128",
                                     "sm_90a-fp8-bf16-64x64x128", "sm_90a-fp8-fp16-64x64x128"};
#else
enum { kCount = 2 };
static const char* const kNames[] = {"sm_80-bf16-64x64x64", "sm_80-fp16-64x64x64"};
#endif

static int is_fp8(int32_t kernel) { return kernel >= 2; }
static int is_bf16(int32_t kernel) { return kernel % 2 == 0; }
static int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static float half_at(const void* at, int64_t i, int bf16) {
  uint16_t bits = ((const uint16_t*)at)[i];
  if (bf16) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
}

static float at(const void* p, int64_t i, int32_t kernel) {
  if (!is_fp8(kernel)) return half_at(p, i, is_bf16(kernel));
  int byte = ((const uint8_t*)p)[i], exponent = byte >> 3 & 15, mantissa = byte & 7;
  float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return byte & 128 ? -size : size;
}

static void put(void* p, int64_t i, float x, int bf16) {
  uint16_t bits;
  if (bf16) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    bits = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
  } else {
    _Float16 narrow = (_Float16)x;
    memcpy(&bits, &narrow, 2);
  }
  ((uint16_t*)p)[i] = bits;
}

// The nibble of row r and group g: where the layout of this architecture has it.
static int nibble(const uint8_t* meta, int64_t m, int64_t r, int64_t g, int32_t kernel) {
#ifdef SM90
  int64_t k = 4 * g, rows = up(m, 64), tile = 128, bit;
  if (is_fp8(kernel)) {
    bit = k % tile + tile * (r % 64) + 64 * tile * (r / 64) + rows * tile * (k / tile);
  } else {
    int64_t kk = k % tile;
    bit = kk % 16 + 16 * (r / 8 % 2) + 32 * (kk / 32) + 128 * (r % 8) + 1024 * (kk / 16 % 2) +
          2048 * (r / 16 % 4) + 8192 * (r / 64) + rows * tile * (k / tile);
  }
  return meta[bit / 8] >> (bit % 8 ? 4 : 0) & 15;
#else
  int64_t word = g / 4, row = r / 32 * 32 + r % 8 * 4 + r % 32 / 8;
  if (row % 2 == 0 && word % 2 == 1)
    row += 1, word -= 1;
  else if (row % 2 == 1 && word % 2 == 0)
    row -= 1, word += 1;
  return ((const uint16_t*)meta)[word / 2 * m * 2 + row * 2 + word % 2] >> 4 * (g % 4) & 15;
#endif
}

int32_t secateur_abi(void) { return SECATEUR_SPARSE_GEMM_ABI; }
const char* secateur_build_key(void) { return "fake"; }
const char* secateur_build_versions(void) { return "none"; }
int32_t secateur_kernel_count(void) { return kCount; }

int32_t secateur_kernel(int32_t kernel, secateur_kernel_facts* facts) {
  memset(facts, 0, sizeof *facts);
  facts->name = kNames[kernel];
  facts->operation = "plain";
#ifdef SM90
  int32_t b = is_fp8(kernel) ? 16 : 8;
  facts->multiple_m = 8, facts->multiple_n = 1, facts->multiple_k = 2 * b;
  facts->multiple_b = b, facts->multiple_d = 8, facts->d_column_major = 1;
  facts->meta_tile_k = 128;
#else
  facts->multiple_m = 32, facts->multiple_n = 8, facts->multiple_k = 64;
  facts->multiple_b = 8, facts->multiple_d = 8;
#endif
  return SECATEUR_OK;
}

int64_t secateur_meta_bytes(int32_t kernel, int32_t m, int32_t k) {
#ifdef SM90
  return up(m, 64) * up(k, 128) / 8;
#else
  return (int64_t)m * k / 8;
#endif
}

int64_t secateur_workspace_bytes(int32_t kernel, int32_t m, int32_t n, int32_t k) {
  return (int64_t)sizeof(float) * m * n;
}

int32_t secateur_sparse_gemm(int32_t kernel, int32_t m, int32_t n, int32_t k, const void* values,
                             const void* meta, const void* b, int64_t ldb, void* d, int64_t ldd,
                             const float* row_scale, const float* column_scale, const void* bias,
                             float alpha, void* workspace, int64_t workspace_bytes, void* stream) {
  secateur_kernel_facts facts;
  if (kernel < 0 || kernel >= kCount || stream) return SECATEUR_NO_SUCH_KERNEL;
  secateur_kernel(kernel, &facts);
  if (m % facts.multiple_m || n % facts.multiple_n || k % facts.multiple_k) return SECATEUR_SHAPE;
  if (ldb < k || ldb % facts.multiple_b || ldd % facts.multiple_d ||
      ldd < (facts.d_column_major ? m : n))
    return SECATEUR_LEADING;
  if (!values || !meta || !b || !d) return SECATEUR_NULL;
  if (!workspace || workspace_bytes < secateur_workspace_bytes(kernel, m, n, k))
    return SECATEUR_WORKSPACE;
  float* sums = workspace;
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t t = 0; t < n; ++t) {
      float sum = 0;
      for (int64_t g = 0; g < k / 4; ++g) {
        int places = nibble(meta, m, r, g, kernel), place[2] = {places & 3, places >> 2};
        for (int i = 0; i < 2; ++i)
          sum += at(values, r * (k / 2) + 2 * g + i, kernel) *
                 at(b, t * ldb + 4 * g + place[i], kernel);
      }
      sums[r * n + t] = sum;
    }
  }
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t t = 0; t < n; ++t) {
      float y = alpha * (row_scale ? row_scale[r] : 1) * (column_scale ? column_scale[t] : 1);
      y = y * sums[r * n + t] + (bias ? half_at(bias, r, is_bf16(kernel)) : 0);
      put(d, facts.d_column_major ? t * ldd + r : r * ldd + t, y, is_bf16(kernel));
    }
  }
  return SECATEUR_OK;
}

const char* secateur_message(int32_t status) { return status ? "refused" : "ok"; }
