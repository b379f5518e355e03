#include "threads.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace bellbit {
namespace {

using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A second OpenMP runtime would fight torch's for the cores: its threads wait busily for milliseconds after each
// piece of work. torch loads its runtime for the whole process, so its entry point can be asked for by name.
Team torch_team() {
#ifdef _WIN32
  return nullptr;
#else
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team;
#endif
}

struct Job {
  int64_t count, piece;
  void (*work)(const void*, int64_t, int64_t);
  const void* context;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t first; (first = next.fetch_add(piece)) < count;)
      work(context, first, std::min(first + piece, count));
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, void (*work)(const void*, int64_t, int64_t),
                  const void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, count / std::max<int64_t>(grain, 1)));
  if (threads <= 1) {
    work(context, 0, count);
    return;
  }
  // a few pieces each: a core that is busy otherwise then holds nobody up
  Job job{count, std::max(grain, count / (4 * threads)), work, context};
  if (const Team team = torch_team()) {
    team([](void* job) { static_cast<Job*>(job)->run(); }, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::jthread> helpers;
  for (int i = 1; i < threads; i++) helpers.emplace_back([&job] { job.run(); });
  job.run();
}

}  // namespace bellbit
