#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr Index kPage = 4096, kHuge = 2 << 20;
constexpr Index kSlab = 32 << 20;
constexpr Index kLine = 64;

std::shared_ptr<std::uint8_t> allocate(Index size, Index alignment) {
    void *memory = nullptr;
    if (posix_memalign(&memory, std::size_t(alignment), std::size_t(size))) throw std::bad_alloc();
    return {static_cast<std::uint8_t *>(memory), std::free};
}

// What is being filled; it goes with the last buffer in it.
struct Slab {
    std::mutex filling;
    std::weak_ptr<std::uint8_t> memory;
    Index used = 0;
};

}  // namespace

Buffer::Buffer(Index size) : size_(size), data_(allocate(size + kSlack, kPage)) {}

Buffer Buffer::lasting(Index size) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // which sees no border inside a slab
    static Slab slab;
    const Index need = round_up(size + kSlack, kLine);
    const bool own = need > kSlab / 2;
    const std::lock_guard<std::mutex> hold(slab.filling);
    std::shared_ptr<std::uint8_t> memory = own ? nullptr : slab.memory.lock();
    if (memory && slab.used + need > kSlab) memory = nullptr;
    const bool fresh = !memory;
    if (fresh) {
        const Index all = own ? round_up(need, kHuge) : kSlab;
        memory = allocate(all, kHuge);
        madvise(memory.get(), std::size_t(all), MADV_HUGEPAGE);
    }
    Buffer buffer;
    buffer.size_ = size;
    if (own) {
        buffer.data_ = std::move(memory);
        return buffer;
    }
    if (fresh) {
        slab.memory = memory;
        slab.used = 0;
    }
    buffer.data_ = {memory, memory.get() + slab.used};
    slab.used += need;
    return buffer;
#else
    return Buffer(size);
#endif
}

Buffer Buffer::borrowed(const std::uint8_t *data, Index size) {
    Buffer buffer;
    buffer.size_ = size;
    buffer.data_ = {std::shared_ptr<void>(), const_cast<std::uint8_t *>(data)};
    return buffer;
}
