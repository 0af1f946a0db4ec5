// Which tiers this build contains, which of them this processor runs, and which one is in use.
#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftk {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if defined(__x86_64__) && defined(__linux__)
// Tile registers: the processor has them, the system saves them, and it lets this process use them, which is asked for once.
std::string why_not_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles))
    return "this processor has no amx_tile and amx_bf16";
  constexpr unsigned kSavesState = 1u << 27, kTileState = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesState)) return "the system doesn't save extended registers";
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileState) != kTileState) return "the system doesn't save tile registers (XCR0)";
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA; Linux 5.16 and later
  if (syscall(SYS_arch_prctl, kAskForState, kTileData) != 0)
    return std::string("the system refuses tile registers to this process: ") + std::strerror(errno);
  return "";
}
#else
std::string why_not_tiles() { return "no tile registers on this system"; }
#endif

std::string why_not(Tier tier) {
#if defined(__x86_64__) || defined(__i386__)
  std::string missing;
  const auto need = [&](bool there, const char* name) {
    if (!there) missing += (missing.empty() ? "" : ", ") + std::string(name);
  };
  if (tier >= Tier::avx2) {
    need(__builtin_cpu_supports("avx2"), "avx2");
    need(__builtin_cpu_supports("fma"), "fma");
    need(__builtin_cpu_supports("f16c"), "f16c");
  }
  if (tier >= Tier::avx512) {
    need(__builtin_cpu_supports("avx512f"), "avx512f");
    need(__builtin_cpu_supports("avx512bw"), "avx512bw");
    need(__builtin_cpu_supports("avx512vl"), "avx512vl");
    need(__builtin_cpu_supports("avx512dq"), "avx512dq");
  }
  if (tier >= Tier::avx512_bf16) {
    need(__builtin_cpu_supports("avx512bf16"), "avx512bf16");
    need(__builtin_cpu_supports("avx512vnni"), "avx512vnni");
    need(__builtin_cpu_supports("avx512vbmi"), "avx512vbmi");
  }
  if (!missing.empty()) return "this processor has no " + missing;
  if (tier < Tier::amx_bf16) return "";
  static const std::string tiles = why_not_tiles();
  return tiles;
#else
  return tier == Tier::scalar ? "" : "this is no x86 processor";
#endif
}

bool runs(Tier tier) { return why_not(tier).empty(); }

std::vector<Tier> tiers_in_build() {
  return {Tier::scalar PEFTK_IF_AVX2(, Tier::avx2) PEFTK_IF_AVX512(, Tier::avx512) PEFTK_IF_AVX512_BF16(, Tier::avx512_bf16)
              PEFTK_IF_AMX_BF16(, Tier::amx_bf16)};
}

Tier best_tier() {
  Tier best = Tier::scalar;
  for (Tier tier : tiers_in_build())
    if (runs(tier)) best = tier;
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
    if (runs(tier)) names.push_back(kNames[static_cast<int>(tier)]);
  return names;
}

std::vector<std::pair<std::string, std::string>> why_not_tiers() {
  std::vector<std::pair<std::string, std::string>> reasons;
  const auto compiled = tiers_in_build();
  for (Tier tier : {Tier::scalar, Tier::avx2, Tier::avx512, Tier::avx512_bf16, Tier::amx_bf16}) {
    const bool built = std::find(compiled.begin(), compiled.end(), tier) != compiled.end();
    const std::string reason = built ? why_not(tier) : "this build doesn't have it";
    if (!reason.empty()) reasons.emplace_back(kNames[static_cast<int>(tier)], reason);
  }
  return reasons;
}

std::string tier_name() { return kNames[static_cast<int>(current_tier())]; }

Tier current_tier() { return current().load(std::memory_order_relaxed); }

void set_tier(const std::string& name) {
  for (Tier tier : tiers_in_build())
    if (name == kNames[static_cast<int>(tier)] && runs(tier)) {
      current().store(tier, std::memory_order_relaxed);
      return;
    }
  std::string reason;
  for (const auto& [other, why] : why_not_tiers())
    if (other == name) reason = " (" + why + ")";
  throw std::invalid_argument("PEFTK_CPU_ISA: expected one of " + joined(available_tiers()) + ", got " + name + reason);
}

}  // namespace peftk
