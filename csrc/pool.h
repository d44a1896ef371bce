// A thread pool for phases of microseconds, built to survive a busy neighbour on its cores.
//
// A phase is a number of chunks. Threads claim chunks one by one; the phase is over when every *chunk* is done, not when
// every thread has arrived: a worker that the system has descheduled before it claimed anything is not waited for, the
// others do its share. Workers spin for a bounded time between phases and then sleep on a futex.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>

namespace hasten {

// How long a worker without work, or a caller waiting for one, spins before it sleeps: long enough for what lies between two
// steps of a small model on quiet cores. Beside a busy neighbour, which shows as a preemption or a worker that keeps the
// caller waiting, it is kBusySpinMicroseconds: a worker that spins uses up its part of the core, which is then taken away
// in the midst of a chunk.
constexpr int kSpinMicroseconds = 100, kBusySpinMicroseconds = 5;

class Pool {
 public:
  // num_threads counts the caller. 0 takes one for each core this process may run on (affinity and cgroup quota counted).
  // Workers are pinned, node by node, only where the machine has several NUMA nodes. Throws std::invalid_argument for more
  // than most_threads(), std::runtime_error where the system refuses a thread; none is left running then.
  explicit Pool(int num_threads, int spin_microseconds = kSpinMicroseconds);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const;

  // Held by whoever uses the pool, or what computes with it, where several threads may: run() itself takes no lock.
  std::mutex one_caller;

  // Calls fn(chunk, thread) once for each chunk in [0, num_chunks), thread in [0, size()); returns when all are done. Each
  // thread takes, in rising order, the chunks of its share, the thread-th part of [0, num_chunks), then helps the others:
  // who reads memory in the order of chunks reads it front to back, and reads what the same thread has touched first.
  // Not reentrant; one caller at a time (see one_caller). fn must not throw.
  template <class F>
  void run(int num_chunks, F&& fn) {
    run_erased(num_chunks, const_cast<void*>(static_cast<const void*>(&fn)), [](void* f, int chunk, int thread) {
      (*static_cast<std::remove_reference_t<F>*>(f))(chunk, thread);
    });
  }

 private:
  void run_erased(int num_chunks, void* context, void (*call)(void*, int, int));
  struct State;
  std::unique_ptr<State> state_;
};

int available_cores();  // what Pool(0) takes
int most_threads();     // what a Pool can have: four for each CPU that this process may run on

}  // namespace hasten
