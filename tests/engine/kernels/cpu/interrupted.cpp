// Run by test_team.py: a job of several ops while threads of the team are interrupted at chosen places.
//
// Within each op every task must run once, after all tasks of the op before.

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "team.h"

using namespace std::chrono_literals;

constexpr int OPS = 40, TASKS = 7, LIMIT_MS = 100'000;

static std::atomic<bool> held{false}, released{false};

// Keeps the thread from running until it is released.
static void hold(int) {
    held = true;
    for (int i = 0; i < LIMIT_MS && !released; i++) usleep(1000);
    held = false;
}

static void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

template <class Condition> static void await(const Condition& condition, const char* what) {
    for (int i = 0; i < LIMIT_MS && !condition(); i++) usleep(1000);
    check(condition(), what);
}

struct Job {
    std::atomic<int> runs[OPS][TASKS] = {};
    std::atomic<int> done[OPS] = {};
    std::atomic<bool> taken{false};  // a task by a thread other than the caller
    pthread_t other{};
    bool shares = false;      // op 3 has two tasks, one for each of two threads
    bool interrupts = false;  // the caller's task of op 3 holds the other thread, which has done its own
    bool lingers = false;     // after op 3 the other thread does not come to the next op for a while
    std::atomic<bool> lingering{false}, over{false};

    void run(Team& team) {
        team.run([](void* self, Team& team, int thread) { static_cast<Job*>(self)->ops(team, thread); }, this);
        over = true;
        for (int op = 0; op < OPS; op++) check(done[op] == TASKS, "a task did not run");
    }

    void ops(Team& team, int thread) {
        for (int op = 0; op < OPS; op++) {
            if (shares && op == 3) {
                team.all(2, [&](long) { share(thread); });
                if (lingers) linger(thread);
            }
            check(!over, "a thread is in a job that is over");
            auto task = [&](long number) {
                check(op == 0 || done[op - 1] == TASKS, "an op began before the end of the one before");
                check(runs[op][number]++ == 0, "a task ran twice");
                done[op]++;
            };
            if (op % 2)
                team.all(TASKS, task);
            else
                team.each(TASKS, task);
            team.all(0, [](long) { check(false, "an op without tasks has one"); });
        }
    }

    void linger(int thread) {
        if (thread == 0) return await([&] { return lingering.load(); }, "the other thread does not go on");
        lingering = true;
        usleep(50'000);
    }

    void share(int thread) {
        if (thread) {
            other = pthread_self();
            taken = true;
            return;
        }
        await([&] { return taken.load(); }, "the other thread did not come");
        if (!interrupts) return;
        usleep(300'000);  // it waits for the end of the op by now
        pthread_kill(other, SIGUSR1);
        await([] { return held.load(); }, "the other thread was not interrupted");
    }
};

static void order() {
    for (int threads = 1; threads <= 5; threads++) {
        Team team(threads, nullptr);
        for (int i = 0; i < 200; i++) {
            Job job;
            job.run(team);
        }
    }
}

// Finds the other thread of a team of two.
static pthread_t find_other(Team& team) {
    Job job;
    job.shares = true;
    job.run(team);
    return job.other;
}

static void asleep() {
    Team team(2, nullptr);
    pthread_kill(find_other(team), SIGUSR1);
    await([] { return held.load(); }, "the other thread was not interrupted");
    for (int i = 0; i < 3; i++) {
        Job job;
        job.run(team);
    }
    check(held, "jobs waited for a thread that sleeps");
    released = true;
    await([] { return !held; }, "the other thread was not released");
    find_other(team);  // takes part again
}

static void waiting() {
    Team team(2, nullptr);
    Job job;
    job.shares = job.interrupts = true;
    job.run(team);
    check(held, "the job waited for a thread that has no task");
    Job next;
    next.run(team);
    check(held, "the next job waited for it");
    released = true;
    await([] { return !held; }, "the other thread was not released");
    find_other(team);
}

// A thread that is neither within a task nor waits when the last task is done.
static void late() {
    Team team(2, nullptr);
    Job jobs[3];
    for (Job& job : jobs) {
        job.shares = job.lingers = true;
        job.run(team);
    }
    usleep(100'000);  // for a thread that should not be in the last one any more
}

// A thread that is interrupted within a task, as often as it runs one.
static void task() {
    Team team(3, nullptr);
    pthread_t other = find_other(team);
    std::atomic<bool> over{false};
    std::thread interrupter([&] {
        while (!over) {
            pthread_kill(other, SIGUSR2);
            usleep(500);
        }
    });
    for (int i = 0; i < 300; i++) {
        Job job;
        job.run(team);
    }
    over = true;
    interrupter.join();
}

// Ops of any number of tasks, each of which reads all that the op before has written; threads come late to ops and tasks.
// What a job works on is freed and overwritten as soon as `run` returns.
struct Chain {
    static constexpr int LENGTH = 30, MOST = 40;

    struct Values {
        long all[LENGTH + 1][MOST];
    };

    unsigned seed;
    int counts[LENGTH];
    std::unique_ptr<Values> values{new Values};

    Chain(unsigned seed) : seed(seed) {
        std::mt19937 luck(seed);
        for (int& count : counts) count = luck() % 3 ? luck() % 5 : luck() % MOST;
        for (long& value : values->all[0]) value = luck() % 1000;
    }

    ~Chain() { std::memset(values->all, -1, sizeof values->all); }

    static long next_value(const long* before, long number) {
        long sum = number;
        for (int i = 0; i < MOST; i++) sum += (before[i] ^ number) & 0xFFFF;
        return sum;
    }

    static void delay(std::mt19937& luck) {
        const unsigned what = luck() % 100;
        if (what == 0) usleep(luck() % 300);
        if (what < 30) sched_yield();
    }

    static void run(void* self, Team& team, int thread) { static_cast<Chain*>(self)->ops(team, thread); }

    void ops(Team& team, int thread) {
        std::mt19937 luck(seed * 31 + thread);
        for (int op = 0; op < LENGTH; op++) {
            const long* before = values->all[op];
            long* after = values->all[op + 1];
            delay(luck);
            if (counts[op] == 0) {  // the values of the op before, by an op of another kind
                team.each(MOST, [&](long number) { after[number] = before[number]; });
                continue;
            }
            team.all(counts[op], [&](long part) {
                delay(luck);
                for (long number = part; number < MOST; number += counts[op])
                    after[number] = next_value(before, number);
            });
        }
    }

    void check_values() const {
        long before[MOST], after[MOST];
        std::memcpy(before, values->all[0], sizeof before);
        for (int op = 0; op < LENGTH; op++) {
            for (long number = 0; number < MOST; number++)
                after[number] = counts[op] ? next_value(before, number) : before[number];
            check(std::memcmp(after, values->all[op + 1], sizeof after) == 0, "a task read or wrote at the wrong time");
            std::memcpy(before, after, sizeof before);
        }
    }
};

static void stress() {
    for (int threads = 2; threads <= 4; threads++) {
        Team team(threads, nullptr);
        pthread_t other = find_other(team);
        std::atomic<bool> over{false};
        std::thread interrupter([&] {
            for (std::mt19937 luck(threads); !over; usleep(luck() % 1000)) pthread_kill(other, SIGUSR2);
        });
        for (unsigned seed = 0; seed < 150; seed++) {
            Chain chain(seed);
            team.run(Chain::run, &chain);
            chain.check_values();
            if (seed % 10 == 0) usleep(500);  // threads fall asleep
        }
        over = true;
        interrupter.join();
    }
}

int main(int, char** arguments) {
    signal(SIGUSR1, hold);
    signal(SIGUSR2, [](int) { usleep(300); });
    const struct {
        const char* name;
        void (*run)();
    } cases[] = {{"order", order}, {"asleep", asleep}, {"waiting", waiting},
                 {"late", late},   {"task", task},     {"stress", stress}};
    for (const auto& one : cases)
        if (std::strcmp(one.name, arguments[1]) == 0) {
            one.run();
            std::puts("right");
            return 0;
        }
    return 2;
}
