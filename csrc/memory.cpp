#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "pool.h"

namespace hasten {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr size_t kMapFrom = size_t{1} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void* allocate(size_t bytes) {
  if (bytes < kMapFrom) {
    const size_t size = std::max(round_up(bytes, 64), size_t{64});
    void* p = std::aligned_alloc(64, size);
    if (!p) throw std::bad_alloc();
    return std::memset(p, 0, size);
  }
  const size_t size = round_up(bytes, kPage);
  void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  // Give back what lies outside the aligned part; the pages of the part itself come zeroed when first touched.
  uint8_t* start = static_cast<uint8_t*>(raw);
  uint8_t* aligned = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(raw), kHugePage));
  if (aligned > start) munmap(start, static_cast<size_t>(aligned - start));
  munmap(aligned + size, static_cast<size_t>(start + kHugePage - aligned));
  madvise(aligned, size, MADV_HUGEPAGE);  // a wish: without huge pages it only runs slower
  return aligned;
}

void deallocate(void* p, size_t bytes) {
  if (!p) return;
  if (bytes < kMapFrom)
    std::free(p);
  else
    munmap(p, round_up(bytes, kPage));
}

size_t huge_page_bytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  std::string word;
  for (size_t kib; file >> word;)
    if (word == "AnonHugePages:" && file >> kib) return kib << 10;
  return 0;
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
      for (size_t i = 0; i < kChunk / 8; i += 8)
        for (int lane = 0; lane < 8; lane++) sum[lane] += words[i + lane];
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
