// What the kernels' module offers a library that is not linked with it: plain C.
#pragma once

#include <cstdint>

extern "C" {
enum { kTableVersion = 2 };
enum Outcome { kDone = 0, kUnknown = 1, kMisfit = 2, kNoMemory = 3 };

// Matrices go by the numbers that registry.h gives them; every call checks its arguments anew.
struct KernelTable {
    std::int64_t version;
    int (*shape)(std::int64_t handle, std::int64_t *rows, std::int64_t *columns);
    // y [tokens, rows] = x [tokens, columns] Wᵀ + bias [rows] (null: none), from any thread.
    int (*multiply)(std::int64_t handle, const float *x, std::int64_t tokens, std::int64_t columns,
                    const float *bias, float *y, std::int64_t rows);
    // As borrow_threads in pool.h.
    void (*borrow)(int count, void (*lend)(void (*task)(void *), void *context));
};
}
