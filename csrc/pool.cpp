// See pool.h. Two facts carry the whole of it:
// - A chunk is claimed by one compare-and-swap on a counter of chunks left. The phase's description is written before that
//   counter is raised and read only after a successful claim; until the claimed chunk is counted as done, the phase cannot
//   end and its description cannot change. So a thread that comes late finds either nothing or a chunk of the present phase.
// - Whoever must sleep announces it first and then sleeps on the word that the other side changes first (Dekker's pattern,
//   all sequentially consistent): either the sleeper sees the change, or the other side sees the announcement and wakes it.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdio>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

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

// Spins until ready() or the time is over; the clock is read only now and then.
template <class Ready>
bool spin(int microseconds, Ready&& ready) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
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
  std::ifstream file(path);
  int value;
  return file >> value ? value : otherwise;
}

// Cores' worth of time that the control group grants, rounded up; INT_MAX without a limit.
int quota_cores() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(v2 >> quota >> period)) {  // "max" is no number either
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
    std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
    std::vector<int> cpus;
    std::string range;
    while (std::getline(file, range, ',')) {
      int first = 0, last = 0;
      const int found = std::sscanf(range.c_str(), "%d-%d", &first, &last);
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

struct alignas(64) Share {    // of one node, in the present phase
  std::atomic<uint32_t> left{0};  // chunks not yet claimed
  int end = 0;                // chunk numbers [end - left, end)
};

}  // namespace

struct Pool::State {
  int num_threads;
  int spin_microseconds;
  std::vector<Share> shares;  // one a node
  // The present phase; stable while a claimed chunk of it is not done.
  void* context = nullptr;
  void (*call)(void*, int, int) = nullptr;
  alignas(64) std::atomic<uint32_t> phase{0};     // workers sleep on it
  std::atomic<uint32_t> sleepers{0};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<uint32_t> undone{0};    // chunks of the present phase; the caller sleeps on it
  std::atomic<bool> caller_sleeps{false};
  std::vector<std::thread> workers;

  State(int threads, int spin_us, int nodes) : num_threads(threads), spin_microseconds(spin_us), shares(nodes) {}

  int node_of(int thread) const { return static_cast<int>(static_cast<int64_t>(thread) * shares.size() / num_threads); }

  bool has_work() const {
    for (const Share& share : shares)
      if (share.left.load(std::memory_order_relaxed)) return true;
    return false;
  }

  // Runs chunks of one share until none is left.
  void drain(Share& share, int thread) {
    uint32_t left = share.left.load(std::memory_order_relaxed);
    while (left) {
      if (!share.left.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      call(context, share.end - static_cast<int>(left), thread);
      if (undone.fetch_sub(1, std::memory_order_seq_cst) == 1 && thread && caller_sleeps.load(std::memory_order_seq_cst))
        futex_wake(undone);
      left = share.left.load(std::memory_order_relaxed);
    }
  }

  void drain_all(int thread) {
    const int num_nodes = static_cast<int>(shares.size()), own = node_of(thread);
    for (int i = 0; i < num_nodes; i++) drain(shares[(own + i) % num_nodes], thread);
  }

  void work(int thread) {
    while (!stop.load(std::memory_order_acquire)) {
      const uint32_t seen = phase.load(std::memory_order_seq_cst);
      drain_all(thread);
      if (spin(spin_microseconds, [this] { return has_work() || stop.load(std::memory_order_relaxed); })) continue;
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      if (!stop.load(std::memory_order_seq_cst)) futex_wait(phase, seen);
      sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void announce() {
    phase.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) futex_wake(phase);
  }

  // Sleeping leaves a core idle, to which the system moves a worker that waits behind a neighbour on another core.
  void wait_until_done() {
    while (!spin(spin_microseconds, [this] { return undone.load(std::memory_order_acquire) == 0; })) {
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

Pool::Pool(int num_threads, int spin_microseconds, int num_nodes) {
  const std::vector<std::vector<int>> nodes = numa_nodes();
  if (num_threads <= 0) num_threads = available_cores();
  if (num_nodes <= 0) num_nodes = std::max<int>(1, static_cast<int>(nodes.size()));
  num_nodes = std::min(num_nodes, num_threads);
  state_ = std::make_unique<State>(num_threads, spin_microseconds, num_nodes);
  for (int thread = 1; thread < num_threads; thread++) {
    state_->workers.emplace_back([state = state_.get(), thread] { state->work(thread); });
    if (nodes.size() > 1 && num_nodes == static_cast<int>(nodes.size()))
      pin(state_->workers.back(), nodes[state_->node_of(thread)]);
  }
}

Pool::~Pool() {
  state_->stop.store(true, std::memory_order_seq_cst);
  state_->announce();
  for (std::thread& worker : state_->workers) worker.join();
}

int Pool::size() const { return state_->num_threads; }

void Pool::run_erased(int num_chunks, void* context, void (*call)(void*, int, int)) {
  State& s = *state_;
  if (num_chunks <= 1 || s.num_threads == 1) {
    for (int chunk = 0; chunk < num_chunks; chunk++) call(context, chunk, 0);
    return;
  }
  s.context = context;
  s.call = call;
  s.undone.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
  const int num_nodes = static_cast<int>(s.shares.size());
  int first = 0;
  for (int node = 0; node < num_nodes; node++) {
    s.shares[node].end = static_cast<int>(static_cast<int64_t>(num_chunks) * (node + 1) / num_nodes);
    s.shares[node].left.store(static_cast<uint32_t>(s.shares[node].end - first), std::memory_order_release);
    first = s.shares[node].end;
  }
  s.announce();
  s.drain_all(0);
  s.wait_until_done();
}

}  // namespace hasten
