// Threads for the kernels: torch's own OpenMP team where it is loaded, else threads of ours.
#pragma once

#include <cstdint>

namespace bellbit {

// Calls work(context, first, last) on pieces of 0 … count, at least `grain` long, from up to `threads` threads.
void parallel_for(int64_t count, int64_t grain, int threads, void (*work)(const void* context, int64_t first, int64_t last),
                  const void* context);

// The same with work(first, last), anything that can be called so.
template <class Work>
void parallel_for(int64_t count, int64_t grain, int threads, const Work& work) {
  const auto call = [](const void* context, int64_t first, int64_t last) {
    (*static_cast<const Work*>(context))(first, last);
  };
  parallel_for(count, grain, threads, call, &work);
}

}  // namespace bellbit
