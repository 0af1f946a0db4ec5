#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace peftk {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kKept = 8 << 20;  // bytes a thread: a packed block of 512 rows of 4096 bf16 and two threads' panels

struct Block {
  void* memory = nullptr;
  std::size_t bytes = 0;
};

struct Kept {
  Block blocks[4];
  ~Kept() {
    for (const Block& block : blocks) std::free(block.memory);
  }
  std::size_t total() const {
    std::size_t sum = 0;
    for (const Block& block : blocks) sum += block.bytes;
    return sum;
  }
};
thread_local Kept kept;

}  // namespace

Scratch::Scratch(std::size_t bytes) : memory_(nullptr), bytes_((bytes + kLine) / kLine * kLine) {
  Block* best = nullptr;
  for (Block& block : kept.blocks)
    if (block.bytes >= bytes_ && (!best || block.bytes < best->bytes)) best = &block;
  if (best) {
    memory_ = best->memory, bytes_ = best->bytes;
    *best = {};
    return;
  }
  memory_ = std::aligned_alloc(kLine, bytes_);
  if (!memory_) throw std::bad_alloc();
}

Scratch::~Scratch() {
  for (Block& block : kept.blocks)  // smaller blocks make room: the next call probably wants this size
    if (block.bytes < bytes_ && kept.total() + bytes_ > kKept) {
      std::free(block.memory);
      block = {};
    }
  if (kept.total() + bytes_ <= kKept)
    for (Block& block : kept.blocks)
      if (!block.memory) {
        block = {memory_, bytes_};
        return;
      }
  std::free(memory_);
}

}  // namespace peftk
