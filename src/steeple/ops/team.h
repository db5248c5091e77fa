// A team of threads inside one parallel region: who am I, wait for all, and share out units of work.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace team {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// All threads of the team wait for each other. Spins, then gives way: cores may be busy with something else.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        if (threads_ == 1) return;
        const int64_t turn = turn_.load(std::memory_order_relaxed);
        if (missing_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            missing_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++)
            if (spins < 4000) relax();
            else std::this_thread::yield();
    }

private:
    const int threads_;
    alignas(64) std::atomic<int> missing_{0};
    alignas(64) std::atomic<int64_t> turn_{0};
};

// Units 0..count of one phase. Every thread begins with a share of neighbours, because memory is read best in order;
// who is done takes from the end of somebody else's share.
class Share {
public:
    explicit Share(int threads) : threads_(threads), left_(new Range[threads]) {}
    // Every thread refills its own share, and needs not wait for the others: a share of the last phase is empty.
    void refill(int t, int64_t count) { left_[t].range = pack(count * t / threads_, count * (t + 1) / threads_); }
    // The next unit for `thread`, or -1.
    int64_t next(int thread) {
        int64_t unit = take(thread, true);
        for (int i = 1; unit < 0 && i < threads_; i++) unit = take((thread + i) % threads_, false);
        return unit;
    }

private:
    struct alignas(64) Range {
        std::atomic<uint64_t> range{0};
    };
    static uint64_t pack(int64_t begin, int64_t end) { return (uint64_t)begin << 32 | (uint64_t)end; }
    int64_t take(int of, bool front) {
        uint64_t range = left_[of].range.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t begin = (int64_t)(range >> 32), end = (int64_t)(range & 0xffffffff);
            if (begin >= end) return -1;
            const uint64_t rest = front ? pack(begin + 1, end) : pack(begin, end - 1);
            if (left_[of].range.compare_exchange_weak(range, rest, std::memory_order_acq_rel))
                return front ? begin : end - 1;
        }
    }
    const int threads_;
    std::unique_ptr<Range[]> left_;
};

// Same as GOMP_parallel: runs body(data) on `threads` threads, the caller's included; and how many there really are.
typedef void (*Run)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
typedef int (*Size)();

// Runs work(thread, threads) on a team of at most `threads`. `run` null: threads of its own.
template <class Work> void parallel(Work&& work, int64_t threads, Run run, Size size) {
    struct Context {
        Work& work;
        Size size;
        int wanted;
        std::atomic<int> numbers{0};
    } context{work, run ? size : nullptr, (int)threads, {}};
    auto body = +[](void* data) {
        Context& c = *(Context*)data;
        const int number = c.numbers.fetch_add(1);
        c.work(number, c.size ? c.size() : c.wanted);
    };
    if (threads <= 1) {
        context.size = nullptr;
        body(&context);
    } else if (run && size) {
        run(body, &context, (unsigned)threads, 0);
    } else {
        context.size = nullptr;
        std::unique_ptr<std::thread[]> others(new std::thread[threads - 1]);
        for (int64_t i = 1; i < threads; i++) others[i - 1] = std::thread(body, &context);
        body(&context);
        for (int64_t i = 1; i < threads; i++) others[i - 1].join();
    }
}

}  // namespace team
