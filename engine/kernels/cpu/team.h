// Threads that work on a step together. The tasks of an op are handed out as threads become free; a barrier ends the op.
//
// Between steps threads sleep. Within a step they spin for about 100 microseconds first, since ops follow each other
// closely; no longer, since another process may need the core.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <thread>
#include <vector>

#include "simd.h"

class Team {
  public:
    // cores: [size], to pin the threads to; null: no pinning. The caller pins its own thread, the first one.
    Team(int size, const int32_t* cores) : size_(size) {
        try {
            for (int i = 1; i < size; i++) {
                threads_.emplace_back([this, i] { serve(i); });
                if (cores) pin(threads_.back(), cores[i]);
            }
        } catch (...) {
            end();
            throw;
        }
    }

    ~Team() { end(); }

    int size() const { return size_; }

    // Calls `job(argument, *this, index)` on all threads, the calling one included, and waits for all.
    void run(void (*job)(void*, Team&, int), void* argument) {
        if (size_ == 1) return job(argument, *this, 0);
        job_ = job;
        argument_ = argument;
        call();
        job(argument, *this, 0);
        barrier();
    }

    // Waits for all threads; memory written before is visible after. Task numbers start again from 0.
    void barrier() {
        if (size_ == 1) {
            next_task_.store(0, std::memory_order_relaxed);
            return;
        }
        uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_task_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
        } else {
            wait_beyond(round_, round);
        }
    }

    // The next task of the op; tasks are numbered from 0 over all threads.
    long next() { return next_task_.fetch_add(1, std::memory_order_relaxed); }

    // An op of `count` small tasks of similar size, handed out a few at a time: each hand-out costs a transfer between cores.
    template <class Task> void each(long count, const Task& task) {
        const long some = count / (CHUNKS * size_) + 1;
        for (long begin; (begin = some * next()) < count;)
            for (long i = begin; i < begin + some && i < count; i++) task(i);
    }

  private:
    static constexpr int CHUNKS = 4;  // per thread, in an op of small tasks
    static constexpr int SPINS = 4000;  // pauses of about 10 to 40 ns

    void end() {
        job_ = nullptr;
        call();
        for (auto& thread : threads_) thread.join();
    }

    static void pin(std::thread& thread, int core) {
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(core, &only);
        pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);  // on failure the thread is not pinned
    }

    static void wait_beyond(std::atomic<uint32_t>& value, uint32_t old) {
        for (int i = 0; i < SPINS; i++) {
            if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
    }

    void call() {
        calls_.fetch_add(1, std::memory_order_release);
        calls_.notify_all();
    }

    void serve(int index) {
        for (uint32_t seen = 0;; seen++) {
            while (calls_.load(std::memory_order_acquire) == seen) calls_.wait(seen, std::memory_order_acquire);
            if (job_ == nullptr) return;
            job_(argument_, *this, index);
            barrier();
        }
    }

    const int size_;
    void (*job_)(void*, Team&, int) = nullptr;
    void* argument_ = nullptr;
    alignas(64) std::atomic<uint32_t> calls_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<long> next_task_{0};
    std::vector<std::thread> threads_;
};
