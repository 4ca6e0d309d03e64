// What the native loops of secateur.prune share: array types, and rows spread over threads.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

using Index = std::int64_t;

template <typename T, int Dims>
using Array = nanobind::ndarray<T, nanobind::ndim<Dims>, nanobind::c_contig, nanobind::device::cpu>;

template <typename A>
bool has_shape(const A &array, std::initializer_list<Index> shape) {
    return std::equal(shape.begin(), shape.end(), array.shape_ptr());
}

// Whether code compiled for AVX2 and FMA may run here.
inline bool has_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

// Call work(row, scratch) for every row, from as many threads as there are scratches.
template <typename Scratch, typename Work>
void over_rows(Index rows, std::vector<Scratch> &scratches, const Work &work) {
    std::atomic<Index> next{0};
    const auto loop = [&](Scratch &scratch) {
        for (Index row; (row = next++) < rows;) work(row, scratch);
    };
    std::vector<std::thread> others;
    try {
        for (std::size_t t = 1; t < scratches.size(); ++t)
            others.emplace_back(loop, std::ref(scratches[t]));
    } catch (const std::system_error &) {
        // No more threads to be had: those that there are do all rows.
    }
    loop(scratches[0]);
    for (std::thread &other : others) other.join();
}
