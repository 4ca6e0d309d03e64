// Memory for the kernels: aligned, and with room behind it for a careless vector load.
#pragma once

#include <memory>

#include "layout.h"

constexpr Index kSlack = 64;  // behind every buffer

class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(Index size);
    // For what is made once and read for long: buffers share huge pages, where the system has them,
    // so that a product that goes from one to the next does not wait for page tables.
    static Buffer lasting(Index size);
    // Of `size` bytes that somebody else keeps, and kSlack behind them.
    static Buffer borrowed(const std::uint8_t *data, Index size);

    std::uint8_t *data() const { return data_.get(); }
    Index size() const { return size_; }

  private:
    Index size_ = 0;
    std::shared_ptr<std::uint8_t> data_;
};
