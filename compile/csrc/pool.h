// The threads that share the work of a product: they stay, spin for a moment, then sleep.
#pragma once

#include <cstdint>

#include "layout.h"

// How many threads a product uses, this one included. `pin`: bind each to a processor of its own.
void set_threads(int count, bool pin);
int get_threads();

// Use the `count` threads of somebody else instead, who calls task(context) in each of them, all at
// once, and returns when all have: two pools that spin on the same processors are slow. Until
// set_threads is called.
using Lend = void (*)(void (*task)(void *), void *context);
void borrow_threads(int count, Lend lend);

// Call work(context, from, to) for pieces of [0, count) of `grain` each, from several threads.
// A caller that finds the threads busy does all of its work itself.
void spread(Index count, Index grain, void (*work)(void *, Index, Index), void *context);

// What is read when the work that is given out next is done: its bytes in the order in which it is
// spread. A thread that finds nothing more to do brings the beginning of its share into its cache. Where
// the bytes lie no longer, nothing happens.
struct Ahead {
    const std::uint8_t *data;
    Index bytes;
};
constexpr int kMostAhead = 3;
void expect(const Ahead *ranges, int count);

template <typename Work> void over_panels(Index count, Index grain, const Work &work) {
    spread(
        count, grain,
        [](void *context, Index from, Index to) { (*static_cast<const Work *>(context))(from, to); },
        const_cast<void *>(static_cast<const void *>(&work)));
}
