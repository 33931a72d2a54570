// Threads that work on a step together. The tasks of an op are handed out as threads become free; the op ends for all
// of them once all of its tasks are done.
//
// No thread waits for another one that has no task, so a thread that another program keeps from its core delays nobody
// unless it was interrupted within a task. When it runs again, it passes over the ops that were done without it; if
// the whole job is over, it leaves it.
//
// Ops. They are numbered over the life of a team. `round_` is the number of the op under way, `handed_` the same
// number with the count of tasks handed out, `done_` the count of tasks done, `op_` the number of the op that a thread
// has come to.
//
// - A task is taken by a compare-and-swap on both halves of `handed_`, so a thread takes tasks of its own op only.
// - A thread adds the tasks that it has done to `done_` when none is left. Whoever completes the count prepares the
//   next op and sets `round_`, last. An op with a task that is not done yet can't end, so nobody adds to another op's
//   `done_`.
// - `done_` is acquired and released by everyone who adds, `round_` released by the one who ends the op and acquired
//   by all others, also by those that pass the op over. So whoever comes to an op sees what tasks of earlier ops have
//   written. Taking a task needs no order of its own.
//
// Jobs. The thread that calls `run` opens the job, takes part in it from beginning to end, and closes it. Other
// threads enter at any time before that, at the first op. What belongs to a job must stay as it is until they are out
// again:
//
// - Each has a Place. It enters by IN, then looks whether the job is open; the caller closes the job, then looks at
//   the places. Both are sequentially consistent, so one of them sees the other.
// - The caller waits for a thread that is IN, which has no task left and is on its way to the end. A thread that waits
//   for the end of an op reads nothing of the job, which it declares by WAITING. It may be asleep or kept from its
//   core, so the caller does not wait for it, but sets it OUT; when it runs again, it can't return to IN, and an
//   exception takes it out of the job's frames. Frames of a job must not touch in their destructors what belongs to
//   the job.
//
// Numbers of ops have 32 bits. A thread that is IN can't fall behind by a whole job. One that was set OUT while it
// waited may; if it should find its old number again, it waits for the next op, and then leaves.
//
// Example: two threads, ops of three tasks. Thread 1 is interrupted while it waits for the end of op 7. Thread 0
// finishes op 7, computes all tasks of op 8, and takes task 0 of op 9. Thread 1 runs again: op 7 is over; it asks for
// a task of op 8, but tasks of op 9 are handed out by now, so op 8 is over too; it gets task 1 of op 9.
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
    Team(int size, const int32_t* cores) : size_(size), places_(size) {
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

    // Calls `job(argument, *this, index)` on this thread, the first one, and on all others that come in time. A job is a
    // sequence of ops, the same for all threads. Once it returns, no thread reads what belongs to the job.
    void run(void (*job)(void*, Team&, int), void* argument) {
        job_ = job;
        argument_ = argument;
        first_op_ = round_.load(std::memory_order_relaxed);
        place_ = nullptr;
        op_ = first_op_;
        if (size_ == 1) return job(argument, *this, 0);
        open_.store(true);
        call();
        job(argument, *this, 0);
        open_.store(false);
        for (Place& place : places_) dismiss(place);
    }

    // An op of `count` tasks, numbered from 0: calls `task(number)` for each once, on any thread. All threads call it, with
    // the same count. It returns once all tasks are done; memory that they have written is visible then.
    template <class Task> void all(long count, const Task& task) {
        long done = 0;
        for (long number; (number = next(count)) < count; done++) task(number);
        finish(count, done);
    }

    // The same for small tasks of similar size, handed out a few at a time: each hand-out costs a transfer between cores.
    template <class Task> void each(long count, const Task& task) {
        const long some = count / (CHUNKS * size_) + 1;
        all((count + some - 1) / some, [&](long chunk) {
            for (long i = some * chunk; i < some * (chunk + 1) && i < count; i++) task(i);
        });
    }

    // The two halves of `all`, for ops that need them. The next task of an op of `count` tasks; `count` if none is left.
    long next(long count) {
        uint64_t handed = handed_.load(std::memory_order_relaxed);
        do {
            if (uint32_t(handed >> 32) != op_ || long(uint32_t(handed)) >= count) return count;
        } while (!handed_.compare_exchange_weak(handed, handed + 1, std::memory_order_relaxed));
        return uint32_t(handed);
    }

    // Ends an op after no task is left, on a thread that has done `done` tasks.
    void finish(long count, long done) {
        if (count == 0) return;
        if (done && done_.fetch_add(done, std::memory_order_acq_rel) + done == count) {
            done_.store(0, std::memory_order_relaxed);
            handed_.store(uint64_t(op_ + 1) << 32, std::memory_order_relaxed);
            round_.store(op_ + 1, std::memory_order_release);
            round_.notify_all();
        } else if (round_.load(std::memory_order_acquire) == op_) {
            wait_for_end();
        }
        op_++;
    }

  private:
    static constexpr int CHUNKS = 4;  // per thread, in an op of small tasks
    static constexpr int SPINS = 4000;  // pauses of about 10 to 40 ns
    static constexpr int LEAVE_SPINS = 200;  // a thread that runs leaves a job that is over sooner

    enum State : uint32_t {
        OUT,      // not in a job
        IN,       // in a job: may read what belongs to it
        WAITING,  // in a job, reads nothing: waits for the end of an op
    };

    struct alignas(64) Place {
        std::atomic<uint32_t> state{OUT};
    };

    struct Dismissed {};  // thrown on a thread that waited until its job was over

    void end() {
        ending_.store(true);
        call();
        for (auto& thread : threads_) thread.join();
    }

    static void pin(std::thread& thread, int core) {
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(core, &only);
        pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);  // on failure the thread is not pinned
    }

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");  // `yield` takes no time on most processors
#endif
    }

    // Waits until a value is no longer `old`.
    static void wait_beyond(std::atomic<uint32_t>& value, uint32_t old) {
        for (int i = 0; i < SPINS; i++) {
            if (value.load(std::memory_order_acquire) != old) return;
            pause();
        }
        while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
    }

    void wait_for_end() {
        if (place_ == nullptr) return wait_beyond(round_, op_);
        place_->state.store(WAITING, std::memory_order_release);
        wait_beyond(round_, op_);
        uint32_t state = WAITING;
        if (!place_->state.compare_exchange_strong(state, IN)) throw Dismissed();
    }

    // Has a thread leave a job that is over: at once if it waits, else once it gets to the job's end.
    static void dismiss(Place& place) {
        for (int i = 0; i < LEAVE_SPINS && place.state.load(std::memory_order_acquire) != OUT; i++) pause();
        for (uint32_t state; (state = place.state.load()) != OUT;)
            if (state == IN)
                wait_beyond(place.state, IN);
            else if (place.state.compare_exchange_strong(state, OUT))
                return;
    }

    void leave() {
        place_->state.store(OUT);
        place_->state.notify_all();
    }

    void call() {
        calls_.fetch_add(1, std::memory_order_release);
        calls_.notify_all();
    }

    void serve(int index) {
        place_ = &places_[index];
        for (uint32_t seen = 0;;) {
            while (calls_.load(std::memory_order_acquire) == seen) calls_.wait(seen, std::memory_order_acquire);
            if (ending_.load()) return;
            seen = calls_.load(std::memory_order_acquire);
            place_->state.store(IN);
            if (open_.load()) {
                op_ = first_op_;
                try {
                    job_(argument_, *this, index);
                } catch (const Dismissed&) {
                    continue;
                }
            }
            leave();
        }
    }

    const int size_;
    void (*job_)(void*, Team&, int) = nullptr;
    void* argument_ = nullptr;
    uint32_t first_op_ = 0;  // number of the job's first op
    std::atomic<bool> ending_{false};
    alignas(64) std::atomic<uint32_t> calls_{0};
    std::atomic<bool> open_{false};  // whether there is a job that threads may enter
    alignas(64) std::atomic<uint32_t> round_{0};  // number of the op under way
    alignas(64) std::atomic<uint64_t> handed_{0};  // the same number, and 32 bits of tasks handed out
    alignas(64) std::atomic<long> done_{0};  // tasks of the op
    std::vector<Place> places_;
    std::vector<std::thread> threads_;

    // Of the calling thread: the number of its op, and its place; null on the thread that runs jobs.
    static inline thread_local uint32_t op_ = 0;
    static inline thread_local Place* place_ = nullptr;
};
