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
constexpr Index kAheadBytes = 96 << 10;  // what a thread that waits fetches; a part of its cache

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

// One call of spread, in threads that are not ours.
struct Shared {
    std::atomic<Index> next{0};
    Index count, grain;
    void (*work)(void *, Index, Index);
    void *context;
};

void take_shared(void *pointer) {
    Shared &all = *static_cast<Shared *>(pointer);
    for (Index from; (from = all.next.fetch_add(all.grain)) < all.count;)
        all.work(all.context, from, std::min(all.count, from + all.grain));
}

class Pool {
  public:
    Pool(int threads, Lend lend) : lend_(lend), lent_(threads) {}
    explicit Pool(int threads, bool pin) : shares_(std::size_t(threads)) {
        for (int i = 1; i < threads; ++i) try {
                workers_.emplace_back([this, i, pin] {
                    if (pin) pin_to(i);
                    serve(i);
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
    int threads() const { return lend_ ? lent_ : int(workers_.size()) + 1; }

    void run(Index count, Index grain, void (*work)(void *, Index, Index), void *context) {
        if (lend_ && count > grain) {
            Shared shared{{0}, count, grain, work, context};
            lend_(&take_shared, &shared);
            return;
        }
        const std::unique_lock<std::mutex> own(busy_, std::try_to_lock);
        if (!own || workers_.empty() || count <= grain) {
            for (Index from = 0; from < count; from += grain)
                work(context, from, std::min(count, from + grain));
            return;
        }
        grain_ = grain;
        work_ = work;
        context_ = context;
        // Neighbouring pieces for each thread: memory is read in long runs.
        const Index pieces = (count + grain - 1) / grain, threads = Index(shares_.size());
        for (Index i = 0; i < threads; ++i) {
            shares_[std::size_t(i)].next.store(pieces * i / threads * grain);
            shares_[std::size_t(i)].end = std::min(count, pieces * (i + 1) / threads * grain);
        }
        state_.fetch_and(~kClosed);  // workers may enter
        wake();
        take(0);
        state_.fetch_or(kClosed);
        // A worker that lost its processor to another program comes back the sooner for a yield.
        for (int i = 0; state_.load(std::memory_order_acquire) != kClosed; ++i)
            i < kSpins ? pause_briefly() : std::this_thread::yield();
    }

    void expect(const Ahead *ranges, int count) {
        for (int i = 0; i < kMostAhead; ++i) {
            expected_[i].data.store(i < count ? ranges[i].data : nullptr, std::memory_order_relaxed);
            expected_[i].bytes.store(i < count ? ranges[i].bytes : 0, std::memory_order_relaxed);
        }
    }

  private:
    // First what is one's own, then what others have not come to.
    void take(int own) {
        const int threads = int(shares_.size());
        for (int i = 0; i < threads; ++i) {
            Share &share = shares_[std::size_t((own + i) % threads)];
            for (Index from; (from = share.next.fetch_add(grain_)) < share.end;)
                work_(context_, from, std::min(share.end, from + grain_));
        }
    }
    // Until there is work, for `seen` was the last.
    void look_ahead(int own, std::uint32_t seen) {
        const Index threads = Index(shares_.size());
        Index all = 0;
        for (const Expected &one : expected_) all += one.bytes.load(std::memory_order_relaxed);
        Index skip = all * own / threads, left = std::min(kAheadBytes, all / threads);
        for (const Expected &one : expected_) {
            const Index bytes = one.bytes.load(std::memory_order_relaxed);
            const std::uint8_t *data = one.data.load(std::memory_order_relaxed);
            for (Index at = skip; at < bytes && left > 0; at += 64, left -= 64) {
                __builtin_prefetch(data + at, 0, 2);
                if (at % 1024 < 64 && generation_.load(std::memory_order_relaxed) != seen) return;
            }
            skip = std::max<Index>(0, skip - bytes);
        }
    }
    void wake() {
        generation_.fetch_add(1);
        if (sleeping_.load() > 0) {
            const std::lock_guard<std::mutex> hold(sleep_);
            woken_.notify_all();
        }
    }
    void serve(int own) {
        for (std::uint32_t seen = 0;;) {
            look_ahead(own, seen);
            for (int i = 0; i < kSpins && generation_.load() == seen; ++i) pause_briefly();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> hold(sleep_);
                sleeping_.fetch_add(1);
                woken_.wait(hold, [&] { return generation_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = generation_.load();
            if (stop_) return;
            if (!(state_.fetch_add(1) & kClosed)) take(own);
            state_.fetch_sub(1, std::memory_order_release);
        }
    }

    Lend lend_ = nullptr;
    int lent_ = 1;
    std::vector<std::thread> workers_;
    std::mutex busy_, sleep_;
    std::condition_variable woken_;
    std::atomic<std::uint32_t> generation_{0}, state_{kClosed};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    struct alignas(64) Share {
        std::atomic<Index> next{0};
        Index end = 0;
    };
    std::vector<Share> shares_;
    struct Expected {
        std::atomic<const std::uint8_t *> data{nullptr};
        std::atomic<Index> bytes{0};
    };
    Expected expected_[kMostAhead];
    Index grain_ = 1;
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

void replace_pool(std::shared_ptr<Pool> fresh) {
    pool();
    const std::lock_guard<std::mutex> hold(changing);
    current.swap(fresh);  // the old one ends with its last caller
}

}  // namespace

void set_threads(int count, bool pin) {
    auto fresh = std::make_shared<Pool>(std::max(1, count), pin);
    if (pin) pin_to(0);
    replace_pool(std::move(fresh));
}

void borrow_threads(int count, Lend lend) {
    replace_pool(std::make_shared<Pool>(std::max(1, count), lend));
}

int get_threads() { return pool()->threads(); }

void spread(Index count, Index grain, void (*work)(void *, Index, Index), void *context) {
    if (count > 0) pool()->run(count, grain, work, context);
}

void expect(const Ahead *ranges, int count) { pool()->expect(ranges, count); }
