// Two OpenMP runtimes in one process spin against each other (a 0.17 ms kernel took 8 ms), so this file links none: it calls the
// one that is already loaded through GOMP_parallel, which libgomp, libomp and libiomp5 all export.
#include "cpu/parallel.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#endif

#if defined(__linux__) && !defined(PEFTK_NO_OPENMP)
#include <dlfcn.h>
#include <link.h>
#define PEFTK_FIND_OPENMP 1
#endif

namespace peftk {
namespace {

// Threads that sleep between calls. Used where the process has no OpenMP runtime, and by sanitizer builds.
class ParkedPool {
 public:
  using Body = void (*)(void*, int, int);

  void run(int threads, Body body, void* context) {
    std::unique_lock<std::mutex> one_call(call_, std::try_to_lock);
    if (!one_call.owns_lock()) return body(context, 0, 1);  // called from inside a kernel, or by two threads at once
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body, context_ = context, team_ = threads, pending_ = threads - 1, generation_++;
    }
    wake_.notify_all();
    body(context, 0, threads);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return pending_ == 0; });
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(started_) < workers) {
      std::lock_guard<std::mutex> lock(mutex_);
      std::thread(&ParkedPool::work, this, static_cast<int>(++started_), generation_).detach();
    }
  }

  void work(int thread, std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (thread >= team_) continue;
      const Body body = body_;
      void* const context = context_;
      const int team = team_;
      lock.unlock();
      body(context, thread, team);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex call_, mutex_;
  std::condition_variable wake_, done_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int team_ = 0, pending_ = 0;
  std::size_t started_ = 0;
  std::uint64_t generation_ = 0;
};

ParkedPool* pool = new ParkedPool;  // never destroyed: its threads may outlive main

#ifdef PEFTK_FIND_OPENMP
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
} openmp;

struct Search {
  const std::string& folder;
  std::string found;
};

int visit(dl_phdr_info* object, std::size_t, void* raw) {
  auto& search = *static_cast<Search*>(raw);
  const char* path = object->dlpi_name ? object->dlpi_name : "";
  const char* slash = std::strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  for (const char* stem : {"libgomp", "libiomp5", "libomp"})
    if (std::strncmp(name, stem, std::strlen(stem)) == 0) {
      const bool preferred = !search.folder.empty() && std::strncmp(path, search.folder.c_str(), search.folder.size()) == 0;
      if (preferred || search.found.empty()) search.found = path;
    }
  return 0;
}

struct Team {
  void (*body)(void*, int, int);
  void* context;
};

void run_as_team_member(void* raw) {
  const auto& team = *static_cast<Team*>(raw);
  team.body(team.context, openmp.thread_num(), openmp.num_threads());
}
#endif

// A forked child has the caller's thread only. A runtime that counts on the others waits for ever (libgomp does, and with it a
// product of torch's own), so the child starts with a fresh pool.
#ifdef __linux__
void start_afresh() {
  pool = new ParkedPool;
#ifdef PEFTK_FIND_OPENMP
  openmp = OpenMP{};
#endif
}
const int kForkHandler = pthread_atfork(nullptr, nullptr, start_afresh);
#endif

}  // namespace

std::string find_thread_runtime(const std::string& preferred_folder) {
#ifdef PEFTK_FIND_OPENMP
  Search search{preferred_folder, ""};
  dl_iterate_phdr(visit, &search);
  if (void* library = search.found.empty() ? nullptr : dlopen(search.found.c_str(), RTLD_NOW | RTLD_NOLOAD)) {
    OpenMP found;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
    found.num_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
    found.in_parallel = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
    if (found.parallel && found.thread_num && found.num_threads && found.in_parallel) {
      openmp = found;
      return "the process's OpenMP runtime, " + search.found.substr(search.found.rfind('/') + 1);
    }
  }
#else
  (void)preferred_folder;
#endif
  return "own parked pool";
}

void run_on_threads(int threads, void (*body)(void*, int, int), void* context) {
#ifdef PEFTK_FIND_OPENMP
  if (openmp.parallel) {
    if (openmp.in_parallel()) return body(context, 0, 1);
    Team team{body, context};
    return openmp.parallel(run_as_team_member, &team, static_cast<unsigned>(threads), 0);
  }
#endif
  pool->run(threads, body, context);
}

}  // namespace peftk
