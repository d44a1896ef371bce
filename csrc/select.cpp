// Which kernels this CPU can run, asked once.
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace hasten {
namespace {

constexpr int kMaxTables = 4;

struct Available {
  const Kernels* tables[kMaxTables + 1] = {};
  const char* names[kMaxTables + 1] = {};
  int count = 0;

  void add(const Kernels& kernels) {
    tables[count] = &kernels;
    names[count++] = kernels.isa;
  }

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();  // its answers include what the system saves on a context switch
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifndef HASTEN_QUICK
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) add(kernels_avx512bf16);
    if (avx512) add(kernels_avx512);
#endif
    if (avx2) add(kernels_avx2);
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add(kernels_neon);
#endif
    add(kernels_portable);
  }
};

const Available& available() {
  static const Available found;
  return found;
}

}  // namespace

const Kernels* select_kernels(const char* isa) {
  const Available& found = available();
  for (int i = 0; i < found.count; i++)
    if (!isa || !*isa || std::strcmp(isa, found.names[i]) == 0) return found.tables[i];
  return nullptr;
}

const char* const* available_isas() { return available().names; }

}  // namespace hasten
