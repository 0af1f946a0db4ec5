// CUDA threads as fibers of one host thread: a block at a time, blocks and threads in an order drawn from a seed. A fiber runs
// until a barrier or a warp's exchange; so code that needs a barrier and lacks it gives other results with another seed, and a
// barrier that some thread never reaches is an error that says where.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_host {

inline constexpr unsigned char kPoison = 0xA5;  // what shared memory holds when a block starts

struct Thread {
  dim3 index;
};
const Thread& this_thread();
const dim3& block_index();
const dim3& block_dim();
const dim3& grid_dim();

void sync_block();
void sync_warp(unsigned mask);

// Waits for the lanes of `mask`; `bytes` holds this lane's value, and then the one of `lane`.
void exchange_bytes(unsigned mask, const char* what, void* bytes, std::size_t size, int lane);
unsigned ballot(unsigned mask, bool predicate);
template <class T>
T exchange(unsigned mask, const char* what, T value, int lane) {
  exchange_bytes(mask, what, &value, sizeof(T), lane);
  return value;
}

// Waits for the whole warp; then the value of every lane.
void gather_bytes(const char* what, const void* mine, std::size_t size, void* all);
template <class T>
std::array<T, 32> gather(const char* what, const T& value) {
  std::array<T, 32> all;
  gather_bytes(what, &value, sizeof(T), all.data());
  return all;
}

// A thread's asynchronous copies are done when it waits for their group, no sooner: what reads too early sees what was there.
struct AsyncCopies {
  struct Copy {
    void* shared;
    const void* global;
    int bytes;
  };
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;  // not yet in a group
};
AsyncCopies& async_copies();  // of the running thread

void* shared_bytes(const void* name, std::size_t size);  // of the running block, the same for all its threads; poisoned
void* dynamic_shared();                                  // the launch's own, poisoned at each block's start
template <class T, class Place>
T& shared(Place) {
  static const char name = 0;
  return *static_cast<T*>(shared_bytes(&name, sizeof(T)));
}

template <class T>
T& aligned(T* data) {
  if (reinterpret_cast<std::uintptr_t>(data) % sizeof(T))
    throw std::runtime_error("a misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  return *data;
}

// One launch, as its receiver gets it.
struct Launch {
  const void* kernel;
  std::string symbol;  // the kernel's mangled name, the same as nvcc's
  dim3 grid, block;
  std::size_t shared_bytes;
  std::vector<std::string> parameters;  // raw bytes of each
};

void set_seed(std::uint64_t seed);
void set_capability(int number);  // 80: sm_80
int capability();
void set_multiprocessors(int count);
int multiprocessors();
void set_receiver(std::function<void(const Launch&)> receiver);  // takes launches instead of fibers; empty: fibers again

void run(Launch launch, const std::function<void()>& body);

template <class T>
struct Declared {
  using Type = T;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, std::size_t shared_bytes, void* /*stream*/,
            const typename Declared<Parameters>::Type&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  const auto bytes = [](const auto& value) { return std::string(reinterpret_cast<const char*>(&value), sizeof(value)); };
  run({reinterpret_cast<const void*>(kernel), "", blocks, threads, shared_bytes, {bytes(arguments)...}},
      [&] { kernel(arguments...); });
}

}  // namespace cuda_host
