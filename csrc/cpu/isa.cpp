// Which tiers this build contains, which of them this processor runs, and which one is in use.
#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace peftk {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

bool processor_runs(Tier tier) {
#if defined(__x86_64__) || defined(__i386__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (tier) {
    case Tier::scalar: return true;
    case Tier::avx2: return avx2;
    case Tier::avx512: return avx512;
    case Tier::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512vbmi");
  }
#endif
  return tier == Tier::scalar;
}

std::vector<Tier> tiers_in_build() {
  return {Tier::scalar PEFTK_IF_AVX2(, Tier::avx2) PEFTK_IF_AVX512(, Tier::avx512) PEFTK_IF_AVX512_BF16(, Tier::avx512_bf16)};
}

Tier best_tier() {
  Tier best = Tier::scalar;
  for (Tier tier : tiers_in_build())
    if (processor_runs(tier)) best = tier;
  return best;
}

std::atomic<Tier>& current() {
  static std::atomic<Tier> tier{best_tier()};
  return tier;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> compiled_tiers() {
  std::vector<std::string> names;
  for (Tier tier : tiers_in_build()) names.push_back(kNames[static_cast<int>(tier)]);
  return names;
}

std::vector<std::string> available_tiers() {
  std::vector<std::string> names;
  for (Tier tier : tiers_in_build())
    if (processor_runs(tier)) names.push_back(kNames[static_cast<int>(tier)]);
  return names;
}

std::string tier_name() { return kNames[static_cast<int>(current_tier())]; }

Tier current_tier() { return current().load(std::memory_order_relaxed); }

void set_tier(const std::string& name) {
  for (Tier tier : tiers_in_build())
    if (name == kNames[static_cast<int>(tier)] && processor_runs(tier)) {
      current().store(tier, std::memory_order_relaxed);
      return;
    }
  throw std::invalid_argument("PEFTK_CPU_ISA: expected one of " + joined(available_tiers()) + ", got " + name);
}

}  // namespace peftk
