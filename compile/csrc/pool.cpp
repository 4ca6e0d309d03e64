#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSpins = 4000;  // some tens of microseconds
constexpr std::uint32_t kClosed = 1u << 31;
constexpr int kSpans = 4;
constexpr Index kAhead = 512 << 10;  // bytes of an announcement: they must stay in the caches
constexpr Index kAheadStep = 1024;   // at a time: a thread must notice soon that there is work

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void pin_to(int processor) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed)) return;
    int wanted = processor % std::max(1, CPU_COUNT(&allowed));
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &allowed) && wanted-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
            return;
        }
#else
    (void)processor;
#endif
}

class Pool {
  public:
    explicit Pool(int threads, bool pin) {
        for (int i = 1; i < threads; ++i) try {
                workers_.emplace_back([this, i, pin] {
                    if (pin) pin_to(i);
                    serve();
                });
            } catch (const std::system_error &) {
                break;  // no more threads to be had: those that there are do all
            }
    }
    ~Pool() {
        stop_ = true;
        wake();
        for (std::thread &worker : workers_) worker.join();
    }
    int threads() const { return int(workers_.size()) + 1; }

    void run(Index count, Index grain, void (*work)(void *, Index, Index), void *context) {
        const std::unique_lock<std::mutex> own(busy_, std::try_to_lock);
        if (!own || workers_.empty() || count <= grain) {
            for (Index from = 0; from < count; from += grain)
                work(context, from, std::min(count, from + grain));
            return;
        }
        count_ = count;
        grain_ = grain;
        work_ = work;
        context_ = context;
        next_.store(0);
        state_.fetch_and(~kClosed);  // workers may enter
        wake();
        take();
        state_.fetch_or(kClosed);
        // A worker that lost its processor to another program comes back the sooner for a yield.
        for (int i = 0; state_.load(std::memory_order_acquire) != kClosed; ++i)
            i < kSpins ? wait_briefly() : std::this_thread::yield();
    }

    void announce(const Span *spans, int count) {
        left_.store(0, std::memory_order_relaxed);
        Index total = 0;
        for (int i = 0; i < kSpans; ++i) {
            const Index size = i < count ? std::min(spans[i].size, kAhead - total) : 0;
            spans_[i].store(i < count ? spans[i].data : nullptr, std::memory_order_relaxed);
            sizes_[i].store(size, std::memory_order_relaxed);
            total += size;
        }
        left_.store(total, std::memory_order_relaxed);
    }

  private:
    void take() {
        for (Index from; (from = next_.fetch_add(grain_)) < count_;)
            work_(context_, from, std::min(count_, from + grain_));
    }
    // Fetch some of what was announced, or let time pass. (A span that is being replaced meanwhile
    // may be mixed up with another one: a wasted fetch.)
    void wait_briefly() {
        if (left_.load(std::memory_order_relaxed) <= 0) return pause_briefly();
        const Index left = left_.fetch_sub(kAheadStep, std::memory_order_relaxed);
        Index total = 0;
        for (const auto &size : sizes_) total += size.load(std::memory_order_relaxed);
        Index at = total - left;
        if (left <= 0 || at < 0) return;
        for (int i = 0; i < kSpans; ++i) {
            const Index size = sizes_[i].load(std::memory_order_relaxed);
            if (at >= size) {
                at -= size;
                continue;
            }
            const std::uint8_t *from = spans_[i].load(std::memory_order_relaxed) + at;
            for (Index byte = 0; byte < std::min(kAheadStep, size - at); byte += 64)
                __builtin_prefetch(from + byte, 0, 2);
            return;
        }
    }
    void wake() {
        generation_.fetch_add(1);
        if (sleeping_.load() > 0) {
            const std::lock_guard<std::mutex> hold(sleep_);
            woken_.notify_all();
        }
    }
    void serve() {
        for (std::uint32_t seen = 0;;) {
            for (int i = 0; i < kSpins && generation_.load() == seen; ++i) wait_briefly();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> hold(sleep_);
                sleeping_.fetch_add(1);
                woken_.wait(hold, [&] { return generation_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = generation_.load();
            if (stop_) return;
            if (!(state_.fetch_add(1) & kClosed)) take();
            state_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> workers_;
    std::mutex busy_, sleep_;
    std::condition_variable woken_;
    std::atomic<std::uint32_t> generation_{0}, state_{kClosed};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    std::atomic<Index> next_{0}, left_{0};
    std::atomic<const std::uint8_t *> spans_[kSpans] = {};
    std::atomic<Index> sizes_[kSpans] = {};
    Index count_ = 0, grain_ = 1;
    void (*work_)(void *, Index, Index) = nullptr;
    void *context_ = nullptr;
};

std::mutex changing;
std::shared_ptr<Pool> current;

// The threads of a parent do not exist in its child.
void forget_threads() { new (&current) std::shared_ptr<Pool>(); new (&changing) std::mutex(); }

std::shared_ptr<Pool> pool() {
    const std::lock_guard<std::mutex> hold(changing);
    if (!current) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
        (void)registered;
        const unsigned cores = std::thread::hardware_concurrency();
        current = std::make_shared<Pool>(cores ? int(cores) : 1, false);
    }
    return current;
}

}  // namespace

void set_threads(int count, bool pin) {
    auto fresh = std::make_shared<Pool>(std::max(1, count), pin);
    if (pin) pin_to(0);
    pool();
    const std::lock_guard<std::mutex> hold(changing);
    current.swap(fresh);  // the old one ends with its last caller
}

int get_threads() { return pool()->threads(); }

void spread(Index count, Index grain, void (*work)(void *, Index, Index), void *context) {
    if (count > 0) pool()->run(count, grain, work, context);
}

void announce(const Span *spans, int count) { pool()->announce(spans, count); }
