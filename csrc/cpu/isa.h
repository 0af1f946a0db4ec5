// Instruction-set tiers. Every csrc/ops/*/cpu.cpp is compiled once per tier into the tier's own namespace; calls are routed at
// run time by cpuid. CMakeLists.txt defines PEFTK_WITH_<TIER> for each tier that the compiler can build, and PEFTK_TIER in its
// objects.
#pragma once
#include <string>
#include <utility>
#include <vector>

#ifdef PEFTK_WITH_AVX2
#define PEFTK_IF_AVX2(...) __VA_ARGS__
#else
#define PEFTK_IF_AVX2(...)
#endif
#ifdef PEFTK_WITH_AVX512
#define PEFTK_IF_AVX512(...) __VA_ARGS__
#else
#define PEFTK_IF_AVX512(...)
#endif
#ifdef PEFTK_WITH_AVX512_BF16
#define PEFTK_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define PEFTK_IF_AVX512_BF16(...)
#endif
#ifdef PEFTK_WITH_AMX_BF16
#define PEFTK_IF_AMX_BF16(...) __VA_ARGS__
#else
#define PEFTK_IF_AMX_BF16(...)
#endif

// Declares one function in every tier: PEFTK_EVERY_TIER(void f(int a);)
#define PEFTK_EVERY_TIER(...)                              \
  namespace scalar {                                       \
  __VA_ARGS__                                              \
  }                                                        \
  PEFTK_IF_AVX2(namespace avx2{__VA_ARGS__})               \
  PEFTK_IF_AVX512(namespace avx512{__VA_ARGS__})           \
  PEFTK_IF_AVX512_BF16(namespace avx512_bf16{__VA_ARGS__}) \
  PEFTK_IF_AMX_BF16(namespace amx_bf16{__VA_ARGS__})

// The function of that name in the tier that runs now.
#define PEFTK_TIERED(function)                                                                        \
  [] {                                                                                                \
    switch (::peftk::current_tier()) {                                                                \
      PEFTK_IF_AVX2(case ::peftk::Tier::avx2 : return &::peftk::avx2::function;)                      \
      PEFTK_IF_AVX512(case ::peftk::Tier::avx512 : return &::peftk::avx512::function;)                \
      PEFTK_IF_AVX512_BF16(case ::peftk::Tier::avx512_bf16 : return &::peftk::avx512_bf16::function;) \
      PEFTK_IF_AMX_BF16(case ::peftk::Tier::amx_bf16 : return &::peftk::amx_bf16::function;)          \
      default: return &::peftk::scalar::function;                                                     \
    }                                                                                                 \
  }()

namespace peftk {

enum class Tier : int { scalar, avx2, avx512, avx512_bf16, amx_bf16 };

std::vector<std::string> compiled_tiers();                         // what this build contains, slowest first
std::vector<std::string> available_tiers();                        // of those, what this processor runs
std::vector<std::pair<std::string, std::string>> why_not_tiers();  // the others of all there are, and why not
std::string tier_name();
Tier current_tier();
void set_tier(const std::string& name);  // throws std::invalid_argument where the tier is not available

}  // namespace peftk
