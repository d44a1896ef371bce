#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "pool.h"

namespace hasten {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlab = size_t{64} << 20;       // address space, not memory: pages come when touched
constexpr size_t kOwnMapping = size_t{16} << 20; // from here on an allocation has a mapping to itself

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Fresh zero pages at an aligned address.
uint8_t* map(size_t size, size_t alignment) {
  void* raw = mmap(nullptr, size + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  uint8_t* start = static_cast<uint8_t*>(raw);
  uint8_t* aligned = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(raw), alignment));
  if (aligned > start) munmap(start, static_cast<size_t>(aligned - start));
  munmap(aligned + size, static_cast<size_t>(start + alignment - aligned));
  madvise(aligned, size, MADV_HUGEPAGE);  // a wish: without huge pages it only runs slower
  return aligned;
}

// A slab is handed out from its front to its end, never reused, and unmapped once all of it is free. It starts at a multiple
// of its size and with this header, so that an address finds its slab.
struct Slab {
  size_t used;
  size_t live;  // allocations, and one for being the slab in use
};

std::mutex slab_mutex;
Slab* slab_in_use = nullptr;

void let_go(Slab* slab) {
  if (--slab->live == 0) munmap(slab, kSlab);
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

// One block of the heap each, exactly as long as asked for: in a slab no access beyond the end would be noticed.
void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max(bytes, size_t{1}))) throw std::bad_alloc();
  return std::memset(p, 0, bytes);
}

void deallocate(void* p, size_t) { std::free(p); }

#else

void* allocate(size_t bytes) {
  const size_t size = std::max(round_up(bytes, 64), size_t{64});
  if (size >= kOwnMapping) return map(round_up(size, kHugePage), kHugePage);
  const std::lock_guard<std::mutex> lock(slab_mutex);
  if (!slab_in_use || slab_in_use->used + size > kSlab) {
    Slab* fresh = reinterpret_cast<Slab*>(map(kSlab, kSlab));
    if (slab_in_use) let_go(slab_in_use);
    *fresh = {64, 1};
    slab_in_use = fresh;
  }
  uint8_t* p = reinterpret_cast<uint8_t*>(slab_in_use) + slab_in_use->used;
  slab_in_use->used += size;
  slab_in_use->live++;
  return p;
}

void deallocate(void* p, size_t bytes) {
  if (!p) return;
  const size_t size = std::max(round_up(bytes, 64), size_t{64});
  if (size >= kOwnMapping) {
    munmap(p, round_up(size, kHugePage));
    return;
  }
  // The slab's addresses are not used again, but its whole pages go back at once.
  const uintptr_t start = reinterpret_cast<uintptr_t>(p);
  const uintptr_t first = round_up(start, kPage), last = (start + size) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  const std::lock_guard<std::mutex> lock(slab_mutex);
  let_go(reinterpret_cast<Slab*>(reinterpret_cast<uintptr_t>(p) / kSlab * kSlab));
}

#endif

std::string read_text(const std::string& path) {
  std::string text;
  if (std::FILE* file = std::fopen(path.c_str(), "re")) {
    char piece[4096];
    for (size_t size; (size = std::fread(piece, 1, sizeof piece, file)) > 0;) text.append(piece, size);
    std::fclose(file);
  }
  return text;
}

size_t huge_page_bytes() {
  const std::string text = read_text("/proc/self/smaps_rollup");
  const size_t at = text.find("AnonHugePages:");
  size_t kib = 0;
  return at != std::string::npos && std::sscanf(text.c_str() + at, "AnonHugePages: %zu", &kib) == 1 ? kib << 10 : 0;
}

double read_bandwidth(int threads, size_t bytes, double seconds) {
  constexpr size_t kChunk = size_t{1} << 20;
  const int num_chunks = static_cast<int>(std::max(size_t{1}, bytes / kChunk));
  const size_t size = static_cast<size_t>(num_chunks) * kChunk;
  const auto release = [size](void* p) { deallocate(p, size); };
  const std::unique_ptr<void, decltype(release)> buffer(allocate(size), release);
  uint8_t* data = static_cast<uint8_t*>(buffer.get());
  Pool pool(threads);
  pool.run(num_chunks, [&](int chunk, int) { std::memset(data + chunk * kChunk, chunk, kChunk); });
  std::vector<uint64_t> sums(static_cast<size_t>(pool.size()) * 8);
  using clock = std::chrono::steady_clock;
  double best = 0;
  const auto end = clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto start = clock::now();
    pool.run(num_chunks, [&](int chunk, int thread) {
      const uint64_t* words = reinterpret_cast<const uint64_t*>(data + chunk * kChunk);
      uint64_t sum[8] = {};
      for (size_t i = 0; i < kChunk / 8; i += 8) {
        __builtin_prefetch(words + i + 512);  // as the products do: without, one core asks for too little at a time
        for (int lane = 0; lane < 8; lane++) sum[lane] += words[i + lane];
      }
      for (int lane = 0; lane < 8; lane++) sums[thread * 8 + lane] += sum[lane];
    });
    best = std::max(best, size / std::chrono::duration<double>(clock::now() - start).count());
  } while (clock::now() < end);
  // Every byte of chunk c is c: the sum is known, and checking it keeps the reads from being optimised away.
  volatile uint64_t checked = 0;
  for (uint64_t sum : sums) checked = checked + sum;
  return best;
}

}  // namespace hasten
