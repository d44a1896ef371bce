// See pool.h. Two facts carry the whole of it:
// - A share's word holds the phase it was last claimed in and how many of its chunks were. A chunk is claimed by reading the
//   word, then checking that the phase is still the present one, then one compare-and-swap of the word. A phase is over only
//   when the chunks of all shares were claimed and done; so if it ends after the check, the word has changed and the swap
//   fails. One that succeeds knows that its phase lasts until it counts its chunk as done, and may read its description.
// - Whoever must sleep announces it first and then sleeps on the word that the other side changes first (Dekker's pattern,
//   all sequentially consistent): either the sleeper sees the change, or the other side sees the announcement and wakes it.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory.h"

namespace hasten {
namespace {

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` does nothing on most cores
#endif
}

using Clock = std::chrono::steady_clock;

// Spins until ready() or the time is over; the clock is read only now and then.
template <class Ready>
bool spin(int microseconds, Ready&& ready) {
  const auto end = Clock::now() + std::chrono::microseconds(microseconds);
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return ready();
}

// Whether a neighbour has lately shown itself.
class Neighbour {
 public:
  void seen() { busy_until_ = Clock::now() + std::chrono::milliseconds(50); }
  bool busy() const { return Clock::now() < busy_until_; }

 private:
  Clock::time_point busy_until_{};
};

long preemptions() {  // of this thread
  rusage usage;
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  for (int size = 1024; size <= 1 << 16; size *= 2) {  // the kernel refuses a mask shorter than its own
    cpu_set_t* set = CPU_ALLOC(size);
    const bool ok = sched_getaffinity(0, CPU_ALLOC_SIZE(size), set) == 0;
    for (int cpu = 0; ok && cpu < size; cpu++)
      if (CPU_ISSET_S(cpu, CPU_ALLOC_SIZE(size), set)) cpus.push_back(cpu);
    CPU_FREE(set);
    if (ok) break;
  }
  return cpus;
}

int read_int(const std::string& path, int otherwise) {
  int value;
  return std::sscanf(read_text(path).c_str(), "%d", &value) == 1 ? value : otherwise;
}

// Cores' worth of time that the control group grants, rounded up; INT_MAX without a limit.
int quota_cores() {
  double quota = 0, period = 0;
  if (std::sscanf(read_text("/sys/fs/cgroup/cpu.max").c_str(), "%lf %lf", &quota, &period) != 2) {  // as with "max"
    quota = read_int("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1);
    period = read_int("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 0);
  }
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period + 0.999)) : INT_MAX;
}

// The allowed CPUs of each NUMA node that has any.
std::vector<std::vector<int>> numa_nodes() {
  const std::vector<int> allowed = allowed_cpus();
  std::vector<std::vector<int>> nodes;
  for (int node = 0; node < 256; node++) {
    const std::string list = read_text("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
    std::vector<int> cpus;
    for (size_t begin = 0, end; begin < list.size(); begin = end + 1) {
      end = std::min(list.find(',', begin), list.size());
      int first = 0, last = 0;
      const int found = std::sscanf(list.c_str() + begin, "%d-%d", &first, &last);
      for (int cpu = first; found > 0 && cpu <= (found == 2 ? last : first); cpu++)
        if (std::find(allowed.begin(), allowed.end(), cpu) != allowed.end()) cpus.push_back(cpu);
    }
    if (!cpus.empty()) nodes.push_back(std::move(cpus));
  }
  return nodes;
}

void pin(std::thread& thread, const std::vector<int>& cpus) {
  const int size = *std::max_element(cpus.begin(), cpus.end()) + 1;
  cpu_set_t* set = CPU_ALLOC(size);
  CPU_ZERO_S(CPU_ALLOC_SIZE(size), set);
  for (int cpu : cpus) CPU_SET_S(cpu, CPU_ALLOC_SIZE(size), set);
  pthread_setaffinity_np(thread.native_handle(), CPU_ALLOC_SIZE(size), set);  // a wish: if refused, the thread floats
  CPU_FREE(set);
}

// Phase and count in one word; 40 bits of phases outlast any share that happens to stay unclaimed.
constexpr int kCountBits = 24;
constexpr uint64_t pack_word(uint64_t phase, uint32_t count) { return phase << kCountBits | count; }
constexpr uint64_t phase_of(uint64_t word) { return word >> kCountBits; }
constexpr uint32_t count_of(uint64_t word) { return static_cast<uint32_t>(word & ((uint64_t{1} << kCountBits) - 1)); }

struct alignas(64) Share {
  std::atomic<uint64_t> claimed{0};  // the phase of the last claim, and how many chunks were claimed in it
};

}  // namespace

struct Pool::State {
  const int num_threads;
  const int spin_microseconds;
  std::vector<Share> shares;  // one a thread
  // The present phase's function; stable while a claimed chunk of it is not done.
  void* context = nullptr;
  void (*call)(void*, int, int) = nullptr;
  alignas(64) std::atomic<uint64_t> phase{0};   // number of the phase, and of its chunks
  std::atomic<uint32_t> wake{0};                // workers sleep on it
  std::atomic<uint32_t> sleepers{0};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<uint32_t> undone{0};  // chunks of the present phase; the caller sleeps on it
  std::atomic<bool> caller_sleeps{false};
  Neighbour late;                               // a worker kept the caller waiting
  std::vector<std::thread> workers;

  State(int threads, int spin) : num_threads(threads), spin_microseconds(spin), shares(static_cast<size_t>(threads)) {}

  int share_begin(int share, uint32_t num_chunks) const {
    return static_cast<int>(static_cast<int64_t>(num_chunks) * share / num_threads);
  }

  // Runs chunks of one share until none is left.
  void drain(int share, uint64_t present, int thread) {
    const int begin = share_begin(share, count_of(present));
    const uint32_t size = static_cast<uint32_t>(share_begin(share + 1, count_of(present)) - begin);
    std::atomic<uint64_t>& claimed = shares[static_cast<size_t>(share)].claimed;
    while (size) {
      uint64_t word = claimed.load(std::memory_order_acquire);
      if (phase.load(std::memory_order_relaxed) != present) return;
      const uint32_t count = phase_of(word) == phase_of(present) ? count_of(word) : 0;
      if (count >= size) return;
      const uint64_t next = pack_word(phase_of(present), count + 1);
      if (!claimed.compare_exchange_weak(word, next, std::memory_order_acq_rel, std::memory_order_relaxed)) continue;
      call(context, begin + static_cast<int>(count), thread);
      if (undone.fetch_sub(1, std::memory_order_seq_cst) == 1 && thread && caller_sleeps.load(std::memory_order_seq_cst))
        futex_wake(undone);
    }
  }

  void drain_all(uint64_t present, int thread) {
    for (int i = 0; i < num_threads; i++) drain((thread + i) % num_threads, present, thread);
  }

  // Spins for work, less where this thread is being preempted.
  bool spin_for_work(uint64_t seen, Neighbour& neighbour, long& preempted) {
    const auto changed = [&] {
      return phase.load(std::memory_order_relaxed) != seen || stop.load(std::memory_order_relaxed);
    };
    if (spin(std::min(spin_microseconds, kBusySpinMicroseconds), changed)) return true;
    const long now = preemptions();
    if (now != preempted) neighbour.seen();
    preempted = now;
    return !neighbour.busy() && spin(spin_microseconds, changed);
  }

  void work(int thread) {
    uint64_t seen = 0;
    Neighbour neighbour;
    long preempted = preemptions();
    while (!stop.load(std::memory_order_acquire)) {
      const uint32_t before = wake.load(std::memory_order_seq_cst);
      const uint64_t present = phase.load(std::memory_order_acquire);
      if (present != seen) {
        drain_all(present, thread);
        seen = present;
      }
      if (spin_for_work(seen, neighbour, preempted)) continue;
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      futex_wait(wake, before);
      sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void end_workers() {
    stop.store(true, std::memory_order_seq_cst);
    wake_workers();
    for (std::thread& worker : workers) worker.join();
  }

  void wake_workers() {
    wake.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) futex_wake(wake);
  }

  // Sleeping leaves a core idle, to which the system moves a worker that waits behind a neighbour on another core.
  void wait_until_done() {
    const auto done = [this] { return undone.load(std::memory_order_acquire) == 0; };
    const int patience = late.busy() ? kBusySpinMicroseconds : spin_microseconds;
    while (!spin(std::min(patience, spin_microseconds), done)) {
      late.seen();
      caller_sleeps.store(true, std::memory_order_seq_cst);
      for (uint32_t left; (left = undone.load(std::memory_order_seq_cst)) != 0;) futex_wait(undone, left);
      caller_sleeps.store(false, std::memory_order_relaxed);
    }
  }
};

int available_cores() {
  std::set<std::pair<int, int>> cores;
  for (int cpu : allowed_cpus()) {
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    // Without the file, each CPU counts as a core of its own. Two threads of one core share what a product is bound by.
    cores.insert({read_int(topology + "physical_package_id", 0), read_int(topology + "core_id", -1 - cpu)});
  }
  return std::max(1, std::min(static_cast<int>(cores.size()), quota_cores()));
}

int most_threads() { return 4 * std::max(1, static_cast<int>(allowed_cpus().size())); }

Pool::Pool(int num_threads, int spin_microseconds) {
  if (num_threads > most_threads())
    throw std::invalid_argument("threads is " + std::to_string(num_threads) + ", expected 0 (all cores) to " +
                                std::to_string(most_threads()) + ", four for each CPU that this process may run on");
  const std::vector<std::vector<int>> nodes = numa_nodes();
  if (num_threads <= 0) num_threads = available_cores();
  state_ = std::make_unique<State>(num_threads, spin_microseconds);
  try {
    for (int thread = 1; thread < num_threads; thread++) {
      state_->workers.emplace_back([state = state_.get(), thread] { state->work(thread); });
      // Neighbours in number share a node, so that shares next to each other in memory do.
      const size_t node = static_cast<size_t>(thread) * nodes.size() / static_cast<size_t>(num_threads);
      if (nodes.size() > 1) pin(state_->workers.back(), nodes[node]);
    }
  } catch (const std::exception& error) {
    state_->end_workers();
    throw std::runtime_error("the system gave " + std::to_string(state_->workers.size() + 1) + " of " +
                             std::to_string(num_threads) + " threads (" + error.what() + ")");
  }
}

Pool::~Pool() { state_->end_workers(); }

int Pool::size() const { return state_->num_threads; }

void Pool::run_erased(int num_chunks, void* context, void (*call)(void*, int, int)) {
  State& s = *state_;
  if (num_chunks <= 1 || s.num_threads == 1) {
    for (int chunk = 0; chunk < num_chunks; chunk++) call(context, chunk, 0);
    return;
  }
  if (num_chunks >= 1 << kCountBits) throw std::invalid_argument("a phase has " + std::to_string(num_chunks) + " chunks");
  s.context = context;
  s.call = call;
  s.undone.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
  const uint64_t present = pack_word(phase_of(s.phase.load(std::memory_order_relaxed)) + 1,
                                     static_cast<uint32_t>(num_chunks));
  s.phase.store(present, std::memory_order_seq_cst);
  s.wake_workers();
  s.drain_all(present, 0);
  s.wait_until_done();
}

}  // namespace hasten
