// Working memory of a kernel, aligned to cache lines. A thread keeps what it gave back, up to kKept bytes: fresh pages from the
// system cost more than the small products that they serve.
#pragma once
#include <cstddef>

namespace peftk {

class Scratch {
 public:
  explicit Scratch(std::size_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  std::size_t bytes_;
};

}  // namespace peftk
