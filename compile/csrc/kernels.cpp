// The native module of secateur.compile. No torch: it is loaded by processes that have none.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace nb = nanobind;

// The instruction sets that this CPU offers and that kernels are chosen by.
static std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
    if (__builtin_cpu_supports("fma")) found.push_back("fma");
    if (__builtin_cpu_supports("bmi2")) found.push_back("bmi2");
    if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512vnni");
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

NB_MODULE(_kernels, m) {
    m.doc() = "Native kernels of secateur (C++17, no torch).";
    m.def("cpu_features", &cpu_features,
          "Names of the instruction sets of this CPU that secateur's kernels can use.");
}
