// How fast memory can be read: GB/s for a sum over BYTES (default 300 MB) by THREADS threads, each pinned to a core.
//
//     cpu_probe THREADS [BYTES] [PASSES]
//
// Prints the median of the passes. The buffer asks for huge pages: the figure is to be a limit.

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// Many sums side by side: one would wait for its own additions.
uint64_t sum(const uint64_t* from, size_t count) {
  uint64_t sums[64] = {};
  size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __builtin_prefetch(from + i + 512);
    for (size_t j = 0; j < 64; ++j) sums[j] += from[i + j];
  }
  uint64_t total = 0;
  for (uint64_t one : sums) total += one;
  for (; i < count; ++i) total += from[i];
  return total;
}

std::vector<int> usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  return cores;
}

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const size_t bytes = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 300'000'000;
  const int passes = argc > 3 ? std::atoi(argv[3]) : 15;
  if (threads < 1 || passes < 1 || bytes < 1'000'000) {
    std::fprintf(stderr, "usage: cpu_probe THREADS [BYTES, at least 1000000] [PASSES]\n");
    return 2;
  }
  const std::vector<int> cores = usable_cores();
  const size_t count = bytes / sizeof(uint64_t);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    return 1;
  }
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  const auto* data = static_cast<const uint64_t*>(memory);

  std::vector<double> rates;
  std::atomic<uint64_t> kept{0};
  for (int pass = 0; pass < passes; ++pass) {
    std::atomic<int> waiting{threads};
    std::vector<Clock::time_point> begins(threads), ends(threads);
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        pin(cores[t % cores.size()]);
        const size_t from = count * t / threads, to = count * (t + 1) / threads;
        --waiting;
        while (waiting > 0) std::this_thread::yield();
        begins[t] = Clock::now();
        kept += sum(data + from, to - from);
        ends[t] = Clock::now();
      });
    }
    for (auto& worker : workers) worker.join();
    const auto began = *std::min_element(begins.begin(), begins.end());
    const auto ended = *std::max_element(ends.begin(), ends.end());
    rates.push_back(count * sizeof(uint64_t) / std::chrono::duration<double>(ended - began).count() / 1e9);
  }
  std::sort(rates.begin(), rates.end());
  std::printf("%.3f\n", rates[rates.size() / 2]);
  return kept == 0;  // never: keeps the sums from being left out
}
