// Large aligned memory: transparent huge pages where the system gives them, first touched by the threads that will read it.
#pragma once

#include <cstddef>

namespace hasten {

void* allocate(size_t bytes);              // zeroed; 2 MiB aligned from 1 MiB upwards, 64 bytes below; throws std::bad_alloc
void deallocate(void* p, size_t bytes);    // bytes as allocated; nullptr is ignored
size_t huge_page_bytes();                  // how much of this process is backed by huge pages now (AnonHugePages)
double read_bandwidth(int threads, size_t bytes, double seconds);  // bytes a second, best of repeated sums over a buffer

}  // namespace hasten
