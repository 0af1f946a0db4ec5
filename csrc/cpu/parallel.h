// Threads for CPU kernels. The work is cut into contiguous ranges of units; a unit's result never depends on who computes it, so
// results are the same for any number of threads.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>

namespace peftk {

// Runs body(context, thread, threads) on `threads` threads at most and returns when all are done.
void run_on_threads(int threads, void (*body)(void* context, int thread, int threads), void* context);

// Where the threads come from: the OpenMP runtime that is already in the process (torch's, so that no second pool spins beside
// it), else a parked pool of our own. `preferred_folder`: take the runtime of this folder first. Returns a line for peftk.info().
std::string find_thread_runtime(const std::string& preferred_folder);

// Of `threads`, those that so many multiplications are worth: a team costs 3 us, as much as 2^17 of them on one thread.
inline int threads_worth(std::int64_t multiplications, int threads) {
  const std::int64_t worth = multiplications >> 17;
  return worth < 1 ? 1 : worth < threads ? static_cast<int>(worth) : threads;
}

// body(begin, end, thread) over [0, units), cut statically.
template <class Body>
void parallel_for_threads(std::int64_t units, int threads, Body&& body) {
  if (threads > units) threads = static_cast<int>(units);
  if (threads <= 1) {
    if (units > 0) body(std::int64_t{0}, units, 0);
    return;
  }
  struct Context {
    std::remove_reference_t<Body>* body;
    std::int64_t units;
  } context{&body, units};
  run_on_threads(
      threads,
      [](void* raw, int thread, int team) {
        auto& c = *static_cast<Context*>(raw);
        const std::int64_t begin = c.units * thread / team, end = c.units * (thread + 1) / team;
        if (begin < end) (*c.body)(begin, end, thread);
      },
      &context);
}

// body(begin, end) over [0, units), cut statically.
template <class Body>
void parallel_for(std::int64_t units, int threads, Body&& body) {
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int) { body(begin, end); });
}

}  // namespace peftk
