// 64 elements a step: 16 counters of Philox, 4 words each.
#include "cpu/dropout.h"
#include "ops/philox_dropout/op.h"

namespace peftk::PEFTK_TIER {

void philox_dropout(const void* x, int dtype, std::int64_t count, std::uint32_t drop_below, float keep_scale, std::uint64_t seed,
                    void* out, int threads) {
  const Dropout dropout{drop_below, keep_scale, seed};
  with_type(x, dtype, [&](const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    T* result = static_cast<T*>(out);
    parallel_for((count + kKeepBits - 1) / kKeepBits, threads, [&](std::int64_t begin, std::int64_t end) {
      const F32 scale = broadcast(keep_scale);
      for (std::int64_t step = begin; step < end; step++) {
        const std::uint64_t keep = keep_bits(dropout, step);
        const std::int64_t start = step * kKeepBits, here = count - start < kKeepBits ? count - start : kKeepBits;
        const auto factors = [&](std::int64_t i) { return where(static_cast<std::uint32_t>(keep >> i), scale); };
        std::int64_t i = 0;
        for (; i + kLanes <= here; i += kLanes) store(result + start + i, load(values + start + i) * factors(i));
        if (i < here) {
          T few[kLanes] = {};
          std::memcpy(few, values + start + i, sizeof(T) * (here - i));
          store(few, load(few) * factors(i));
          std::memcpy(result + start + i, few, sizeof(T) * (here - i));
        }
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
