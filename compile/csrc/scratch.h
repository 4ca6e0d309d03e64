// Memory that a thread keeps from product to product.
#pragma once

#include "memory.h"

enum class Room {
    widened, q64, q32, scale64, scale32, total64, total32, partial,         // few tokens
    tiled, factors, begin, q, scale, total,                                // many: activations
    weights, scales, places, counts, sums,                                  // many: weights
};

// `count` values, aligned so that no vector crosses a line; what a thread asks for under the same
// name later lies in the same place.
template <typename T, Room> T *scratch(Index count) {
    thread_local Buffer kept;
    const Index size = count * Index(sizeof(T));
    if (kept.size() < size) kept = Buffer(size + size / 4);
    return reinterpret_cast<T *>(kept.data());
}
