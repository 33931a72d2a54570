// Run by test_team.py: a job of several ops while threads of the team are interrupted at chosen places.
//
// Within each op every task must run once, after all tasks of the op before.

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

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
    bool shares = false;     // op 3 has two tasks, one for each of two threads
    bool interrupts = false;  // the caller's task of op 3 holds the other thread, which has done its own

    static void run(void* self, Team& team, int thread) { static_cast<Job*>(self)->ops(team, thread); }

    void ops(Team& team, int thread) {
        for (int op = 0; op < OPS; op++) {
            if (shares && op == 3)
                team.all(2, [&](long) { share(thread); });
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

    void check_all() const {
        for (int op = 0; op < OPS; op++) check(done[op] == TASKS, "a task did not run");
    }
};

static void order() {
    for (int threads = 1; threads <= 5; threads++) {
        Team team(threads, nullptr);
        for (int i = 0; i < 200; i++) {
            Job job;
            team.run(Job::run, &job);
            job.check_all();
        }
    }
}

// Finds the other thread of a team of two.
static pthread_t find_other(Team& team) {
    Job job;
    job.shares = true;
    team.run(Job::run, &job);
    return job.other;
}

static void asleep() {
    Team team(2, nullptr);
    pthread_kill(find_other(team), SIGUSR1);
    await([] { return held.load(); }, "the other thread was not interrupted");
    for (int i = 0; i < 3; i++) {
        Job job;
        team.run(Job::run, &job);
        job.check_all();
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
    team.run(Job::run, &job);
    job.check_all();
    check(held, "the job waited for a thread that has no task");
    Job next;
    team.run(Job::run, &next);
    next.check_all();
    check(held, "the next job waited for it");
    released = true;
    await([] { return !held; }, "the other thread was not released");
    find_other(team);
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
        team.run(Job::run, &job);
        job.check_all();
    }
    over = true;
    interrupter.join();
}

int main(int, char** arguments) {
    signal(SIGUSR1, hold);
    signal(SIGUSR2, [](int) { usleep(300); });
    const struct {
        const char* name;
        void (*run)();
    } cases[] = {{"order", order}, {"asleep", asleep}, {"waiting", waiting}, {"task", task}};
    for (const auto& one : cases)
        if (std::strcmp(one.name, arguments[1]) == 0) {
            one.run();
            std::puts("right");
            return 0;
        }
    return 2;
}
