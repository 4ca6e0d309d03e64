// Eight rows at a time: the few vector operations that the kernels are written in.
//
// One of the headers below gives them for the instruction set that this file is compiled for, all
// in the namespace `isa::NAME`, so that several of them can be linked into one library:
//   F8   eight floats                     B32  thirty-two bytes, also as 16 x int16 or 8 x int32
//   Widest::V   as many floats as a register holds: eight, or sixteen with AVX-512
// The meaning of each operation is that of simd_plain.h, which is plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef INLINE  // the sanitizers' build, where it would take minutes
#elif defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

// A loop whose sums fill the registers is a function of its own: inlined into others, compilers keep
// some of the sums in memory, and it takes up to twice as long.
#if defined(__GNUC__)
#define APART __attribute__((noinline))
#else
#define APART
#endif

// The build says which one: -DISA=plain, avx2, avx512 or neon.
#define SIMD_plain 0
#define SIMD_avx2 1
#define SIMD_neon 2
#define SIMD_avx512 3
#define SIMD_NUMBER(isa) SIMD_NUMBER_(isa)
#define SIMD_NUMBER_(isa) SIMD_##isa
#if SIMD_NUMBER(ISA) == SIMD_avx2
#include "simd_avx2.h"
#elif SIMD_NUMBER(ISA) == SIMD_avx512
#include "simd_avx512.h"
#elif SIMD_NUMBER(ISA) == SIMD_neon
#include "simd_neon.h"
#else
#include "simd_plain.h"
#endif

namespace isa::ISA {

struct Eight {
    using V = F8;
    static constexpr int lanes = 8;
    static INLINE V load(const float *p) { return isa::ISA::load(p); }
    static INLINE V set1(float x) { return isa::ISA::set1(x); }
};
#if SIMD_NUMBER(ISA) != SIMD_avx512
using Widest = Eight;

// int32 i of the sum: plus a_j b_j of int8, none of which is -128, j = 4 i to 4 i + 3.
INLINE B32 dot4(B32 sum, B32 a, B32 b) { return add32(sum, sum_pairs16(dot2(a, b), 1)); }

constexpr int kCompressed = 8;  // bytes that compress_bytes takes
#endif

}  // namespace isa::ISA
