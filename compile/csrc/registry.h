// Matrices by number, for callers that pass numbers around: torch ops.
#pragma once

#include <cstdint>
#include <memory>

#include "matrix.h"
#include "table.h"

struct Held {
    std::shared_ptr<const Matrix> matrix;
    bool act8;
};

// A number is never given twice, so that a stale one is found out.
std::int64_t hold(std::shared_ptr<const Matrix> matrix, bool act8);
void release(std::int64_t handle);  // an unknown number: nothing happens
Held find(std::int64_t handle);     // an unknown number: matrix is null

const KernelTable &kernel_table();
