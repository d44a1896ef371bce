// Large aligned memory: transparent huge pages where the system gives them, first touched by the threads that will read it.
#pragma once

#include <cstddef>
#include <string>

namespace hasten {

// Zeroed, 64-byte aligned; throws std::bad_alloc. Neighbours share huge pages: a matrix of 1.7 MB alone would get none, and
// with small pages it is read a third slower.
void* allocate(size_t bytes);
void deallocate(void* p, size_t bytes);    // bytes as allocated; nullptr is ignored
size_t huge_page_bytes();                  // how much of this process is backed by huge pages now (AnonHugePages)
double read_bandwidth(int threads, size_t bytes, double seconds);  // bytes a second, best of repeated sums over a buffer

// A small file; empty where there is none. By stdio: once libraries that carry a C++ runtime of their own are in the process
// (torch brings NVIDIA's), std::ifstream may be taken from one that was never set up, and crashes.
std::string read_text(const std::string& path);

}  // namespace hasten
