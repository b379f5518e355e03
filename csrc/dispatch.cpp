// Which instruction sets this build has and this machine runs.
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bellbit {
namespace {

struct Available {
  const Kernels* list[4];
  int count = 0;

  void add(const Kernels& kernels) { list[count++] = &kernels; }

  Available() {
#if defined(BELLBIT_X86)
    __builtin_cpu_init();
    const bool avx512_all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512_all && __builtin_cpu_supports("avx512vnni")) add(avx512vnni);
    if (avx512_all) add(avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) add(avx2);
#elif defined(BELLBIT_ARM)
#if defined(__APPLE__)
    add(neondot);
#elif defined(__linux__)
    constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
    if (getauxval(AT_HWCAP) & kDotProduct) add(neondot);
#endif
    add(neon);
#endif
    add(portable);
  }
};

const Available& all() {
  static const Available found;
  return found;
}

const Kernels* current = nullptr;

}  // namespace

int available(const Kernels* const** list) {
  *list = all().list;
  return all().count;
}

const Kernels& chosen() { return current ? *current : *all().list[0]; }

bool choose(const char* name) {
  for (int i = 0; i < all().count; i++)
    if (!std::strcmp(all().list[i]->name, name)) {
      current = all().list[i];
      return true;
    }
  return false;
}

}  // namespace bellbit
