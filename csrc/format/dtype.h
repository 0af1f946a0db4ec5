// Element types that kernels read and write, as they lie in memory.
#pragma once
#include <cstdint>
#include <type_traits>

namespace peftk {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// Throws std::invalid_argument "<expected>, got <value>". Out of line: what several tiers inline from the standard library the
// linker merges, and the copy that stays may need an instruction set that the processor lacks.
[[noreturn]] void refuse(const char* expected, long value);

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // the same numbers as NATIVE_DTYPE in peftk/native.py

// Calls body(T*) with the pointer typed; the only place where a dtype number becomes a type.
template <class Void, class Body>
decltype(auto) with_type(Void* data, int dtype, Body&& body) {
  constexpr bool is_const = std::is_const_v<Void>;
  using F = std::conditional_t<is_const, const float, float>;
  using B = std::conditional_t<is_const, const Bf16, Bf16>;
  using H = std::conditional_t<is_const, const F16, F16>;
  switch (static_cast<DType>(dtype)) {
    case DType::f32: return body(static_cast<F*>(data));
    case DType::bf16: return body(static_cast<B*>(data));
    case DType::f16: return body(static_cast<H*>(data));
  }
  refuse("dtype: expected 0 (fp32), 1 (bf16) or 2 (fp16)", dtype);
}

}  // namespace peftk
