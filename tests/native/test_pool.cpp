// The pool under stress: every chunk of every phase exactly once, results visible to the caller, late and sleeping workers.
// Meant to run under ThreadSanitizer as well.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "pool: %s\n", what);
  std::exit(1);
}

// Phases of changing size that write plain (not atomic) memory: a chunk run twice, lost, or run in another phase shows.
void phases(int threads, int spin_microseconds, int count, bool pauses) {
  hasten::Pool pool(threads, spin_microseconds);
  std::vector<int> runs;
  for (int phase = 0; phase < count; phase++) {
    const int num_chunks = (phase * 7919 + 13) % 41;
    runs.assign(static_cast<size_t>(num_chunks), 0);
    pool.run(num_chunks, [&](int chunk, int thread) {
      require(chunk >= 0 && chunk < num_chunks, "a chunk out of range");
      require(thread >= 0 && thread < pool.size(), "a thread out of range");
      runs[static_cast<size_t>(chunk)] += phase + 1;
    });
    for (int value : runs) require(value == phase + 1, "a chunk did not run exactly once");
    if (pauses && phase % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(phase % 200));
  }
}

// A worker stuck in a chunk must be waited for, one that has claimed nothing must not.
void uneven() {
  hasten::Pool pool(4, 20);
  for (int phase = 0; phase < 30; phase++) {
    std::atomic<int> done{0};
    pool.run(9, [&](int chunk, int) {
      if (chunk == phase % 9) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      done.fetch_add(1);
    });
    require(done.load() == 9, "returned before all chunks were done");
  }
}

void create_and_destroy() {
  for (int i = 0; i < 50; i++) {
    hasten::Pool pool(3, i % 2 ? 0 : 1000);
    if (i % 3 == 0) continue;  // workers that never had work must end as well
    int sum[5] = {};
    pool.run(5, [&](int chunk, int) { sum[chunk] = chunk; });
    for (int chunk = 0; chunk < 5; chunk++) require(sum[chunk] == chunk, "a chunk is missing after creation");
  }
}

}  // namespace

int main() {
  require(hasten::available_cores() >= 1, "no core available");
  require(hasten::Pool(0).size() == hasten::available_cores(), "Pool(0) does not take all cores");
  for (int threads = 1; threads <= 5; threads++) {
    phases(threads, 50, 2000, false);
    phases(threads, 0, 500, true);  // always asleep between phases
    phases(threads, 20, 1000, true);
  }
  uneven();
  create_and_destroy();
  std::puts("pool: ok");
}
