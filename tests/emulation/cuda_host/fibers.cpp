#include "fibers.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // sanitizers make frames large
constexpr int kWarp = 32;

struct Fiber : Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  int number;                  // in the block
  bool done;
  AsyncCopies copies;
  std::string waits_for;  // empty where it can run
};

// A barrier, or an exchange of some lanes of a warp.
struct Meeting {
  std::vector<Fiber*> arrived;
  std::size_t expected;
  std::vector<std::string> values = std::vector<std::string>(kWarp);
};
using MeetingPlace = std::pair<int, std::string>;  // warp (-1: the block), and what is done there

using Bytes = std::unique_ptr<unsigned char, void (*)(void*)>;

Bytes poisoned(std::size_t size) {
  // Exactly as large as asked for: AddressSanitizer then sees the first byte beyond.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, size ? size : 1)) throw std::bad_alloc();
  std::memset(memory, kPoison, size);
  return {static_cast<unsigned char*>(memory), std::free};
}

struct Device {
  std::uint64_t seed = 0, state = 0;
  int multiprocessors = 2;
  int capability = 80;
  std::function<void(const Launch&)> receiver;

  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::map<MeetingPlace, std::shared_ptr<Meeting>> open;
  std::map<const void*, Bytes> shared;
  Bytes dynamic{nullptr, std::free};
  dim3 block, block_dim, grid_dim;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  std::exception_ptr failure;

  std::uint64_t draw(std::uint64_t below) {  // xorshift64*
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (state * 0x2545F4914F6CDD1Dull >> 33) % below;
  }
} device;

void to_scheduler(bool for_good) {
  Fiber& self = *device.current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, device.scheduler_stack, device.scheduler_stack_bytes);
#else
  (void)for_good;
#endif
  swapcontext(&self.context, &device.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  device.current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&device.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&device.scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(device.scheduler_fake_stack, nullptr, nullptr);
#endif
  device.current = nullptr;
}

#ifdef __SANITIZE_ADDRESS__
__attribute__((no_sanitize_address))  // its frame is never left
#endif
void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &device.scheduler_stack, &device.scheduler_stack_bytes);
#endif
  try {
    (*device.body)();
  } catch (...) {
    if (!device.failure) device.failure = std::current_exception();
  }
  device.current->done = true;
  to_scheduler(true);
}

// The meeting that this fiber waited for, once all have come.
std::shared_ptr<Meeting> meet(int warp, const std::string& what, std::size_t expected, const std::string& value) {
  Fiber* self = device.current;
  auto& slot = device.open[{warp, what}];
  if (!slot) slot = std::make_shared<Meeting>();
  const std::shared_ptr<Meeting> meeting = slot;
  meeting->expected = expected;
  meeting->values[self->number % kWarp] = value;
  meeting->arrived.push_back(self);
  if (meeting->arrived.size() == expected) {
    device.open.erase({warp, what});
    for (Fiber* fiber : meeting->arrived) {
      fiber->waits_for.clear();
      if (fiber != self) device.ready.push_back(fiber);
    }
  } else {
    self->waits_for = what;
    to_scheduler(false);
  }
  return meeting;
}

std::shared_ptr<Meeting> meet_lanes(unsigned mask, const std::string& what, const std::string& value) {
  const int number = device.current->number, warp = number / kWarp;
  if (!(mask >> number % kWarp & 1))
    throw std::runtime_error(what + ": lane " + std::to_string(number % kWarp) + " is not in its own mask");
  const int lanes = std::min(kWarp, static_cast<int>(device.fibers.size()) - warp * kWarp);
  const unsigned present = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  return meet(warp, what + " of lanes " + std::to_string(mask), __builtin_popcount(mask & present), value);
}

std::string place(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

void start(Fiber& fiber, int number) {
  const dim3& dim = device.block_dim;
  fiber.number = number;
  fiber.index = {number % dim.x, number / dim.x % dim.y, number / (dim.x * dim.y)};
  fiber.done = false;
  fiber.waits_for.clear();
  fiber.copies = {};
  fiber.fake_stack = nullptr;
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  device.ready.push_back(&fiber);
}

std::string who_waits() {
  std::map<std::string, int> waiting;
  int left = 0;
  for (const Fiber& fiber : device.fibers) left += fiber.done, waiting[fiber.waits_for] += !fiber.done;
  std::string text = "deadlock in block " + place(device.block) + ": ";
  for (const auto& [what, count] : waiting)
    if (count) text += std::to_string(count) + " threads wait at " + what + ", ";
  return text + std::to_string(left) + " have returned";
}

// Any that is ready; or in every second block, drawn, one of the warp that comes first there, so that one warp runs far ahead of
// the others: that is what a missing barrier between rounds takes to show.
Fiber* take_next(bool by_rank, const std::vector<int>& rank_of_warp) {
  const auto rank = [&](const Fiber* fiber) { return rank_of_warp[fiber->number / kWarp]; };
  std::swap(device.ready[device.draw(device.ready.size())], device.ready.back());
  if (by_rank) {
    const auto first = [&](const Fiber* a, const Fiber* b) { return rank(a) < rank(b); };
    std::iter_swap(std::min_element(device.ready.begin(), device.ready.end(), first), device.ready.end() - 1);
  }
  Fiber* fiber = device.ready.back();
  device.ready.pop_back();
  return fiber;
}

void run_block(std::size_t shared_bytes) {
  device.dynamic = poisoned(shared_bytes);
  device.shared.clear();
  device.open.clear();
  device.ready.clear();
  for (std::size_t i = 0; i < device.fibers.size(); i++) start(device.fibers[i], static_cast<int>(i));
  std::vector<int> rank_of_warp(device.fibers.size() / kWarp + 1);
  for (int& rank : rank_of_warp) rank = static_cast<int>(device.draw(1 << 20));
  const bool by_rank = device.draw(2);
  std::size_t running = device.fibers.size();
  while (running && !device.failure) {
    if (device.ready.empty()) {
      device.failure = std::make_exception_ptr(std::runtime_error(who_waits()));
      break;
    }
    Fiber* fiber = take_next(by_rank, rank_of_warp);
    to_fiber(*fiber);
    running -= fiber->done;
  }
  if (device.failure) {
    device.fibers.clear();  // their stacks were left in the middle
    std::rethrow_exception(std::exchange(device.failure, nullptr));
  }
}

}  // namespace

const Thread& this_thread() { return *device.current; }
const dim3& block_index() { return device.block; }
const dim3& block_dim() { return device.block_dim; }
const dim3& grid_dim() { return device.grid_dim; }

void sync_block() { meet(-1, "__syncthreads", device.fibers.size(), ""); }
void sync_warp(unsigned mask) { meet_lanes(mask, "__syncwarp", ""); }

void exchange_bytes(unsigned mask, const char* what, void* bytes, std::size_t size, int lane) {
  const auto meeting = meet_lanes(mask, what, std::string(static_cast<const char*>(bytes), size));
  const std::string& value = meeting->values[lane];
  if (value.size() != size)
    throw std::runtime_error(std::string(what) + ": lane " + std::to_string(lane) + " has no value to give");
  std::memcpy(bytes, value.data(), size);
}

unsigned ballot(unsigned mask, bool predicate) {
  const auto meeting = meet_lanes(mask, "vote", predicate ? "1" : "0");
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; lane++) votes |= static_cast<unsigned>(meeting->values[lane] == "1") << lane;
  return votes;
}

void gather_bytes(const char* what, const void* mine, std::size_t size, void* all) {
  const auto meeting = meet_lanes(~0u, what, std::string(static_cast<const char*>(mine), size));
  for (int lane = 0; lane < kWarp; lane++) {
    if (meeting->values[lane].size() != size)
      throw std::runtime_error(std::string(what) + ": lane " + std::to_string(lane) + " has no value to give");
    std::memcpy(static_cast<char*>(all) + lane * size, meeting->values[lane].data(), size);
  }
}

AsyncCopies& async_copies() { return device.current->copies; }

void* shared_bytes(const void* name, std::size_t size) {
  auto found = device.shared.find(name);
  if (found == device.shared.end()) found = device.shared.emplace(name, poisoned(size)).first;
  return found->second.get();
}
void* dynamic_shared() { return device.dynamic.get(); }

void set_seed(std::uint64_t seed) { device.seed = seed; }
void set_capability(int number) { device.capability = number; }
int capability() { return device.capability; }
void set_multiprocessors(int count) { device.multiprocessors = count; }
int multiprocessors() { return device.multiprocessors; }
void set_receiver(std::function<void(const Launch&)> receiver) { device.receiver = std::move(receiver); }

void run(Launch launch, const std::function<void()>& body) {
  Dl_info info;
  if (!dladdr(launch.kernel, &info) || !info.dli_sname)
    throw std::runtime_error("a kernel has no name: is it in an anonymous namespace?");
  launch.symbol = info.dli_sname;
  const std::size_t threads = static_cast<std::size_t>(launch.block.x) * launch.block.y * launch.block.z;
  const std::uint64_t blocks = static_cast<std::uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (threads < 1 || threads > 1024 || blocks < 1 || launch.grid.y > 65535 || launch.grid.z > 65535)
    throw std::runtime_error(launch.symbol + ": invalid configuration: blocks " + place(launch.grid) + ", threads " +
                             place(launch.block));
  if (device.receiver) return device.receiver(launch);

  device.state = (device.seed + 1) * 0x9E3779B97F4A7C15ull;
  device.body = &body;
  device.grid_dim = launch.grid;
  device.block_dim = launch.block;
  if (device.fibers.size() != threads) {
    device.fibers = std::vector<Fiber>(threads);
  }
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; i++) order[i] = i;
  for (std::uint64_t left = blocks; left; left--) {
    std::swap(order[device.draw(left)], order[left - 1]);
    const std::uint64_t i = order[left - 1];
    device.block = dim3(static_cast<unsigned>(i % launch.grid.x), static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                        static_cast<unsigned>(i / launch.grid.x / launch.grid.y));
    try {
      run_block(launch.shared_bytes);
    } catch (const std::exception& error) {
      throw std::runtime_error(launch.symbol + ": " + error.what());
    }
  }
}

}  // namespace cuda_host
