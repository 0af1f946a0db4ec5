// 64 elements a step: 16 counters of Philox, 4 words each.
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/simd.h"
#include "ops/philox_dropout/op.h"

namespace peftk::PEFTK_TIER {
namespace {

constexpr std::int64_t kStep = 4 * kPhiloxLanes;

// scale[i] = keep_scale or 0 for the elements [step * kStep, (step + 1) * kStep).
void mask_of_step(std::int64_t step, std::uint64_t seed, std::uint32_t drop_below, float keep_scale, float* scale) {
  const PhiloxWords words = philox(static_cast<std::uint64_t>(step) * kPhiloxLanes, seed);
  for (int i = 0; i < kPhiloxLanes; i++)
    for (int w = 0; w < 4; w++) scale[4 * i + w] = words.word[w][i] < drop_below ? 0.0f : keep_scale;
}

}  // namespace

void philox_dropout(const void* x, int dtype, std::int64_t count, std::uint32_t drop_below, float keep_scale, std::uint64_t seed,
                    void* out, int threads) {
  with_type(x, dtype, [&](const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    T* result = static_cast<T*>(out);
    parallel_for((count + kStep - 1) / kStep, threads, [&](std::int64_t begin, std::int64_t end) {
      float scale[kStep];
      for (std::int64_t step = begin; step < end; step++) {
        mask_of_step(step, seed, drop_below, keep_scale, scale);
        const std::int64_t start = step * kStep, here = count - start < kStep ? count - start : kStep;
        std::int64_t i = 0;
        for (; i + kLanes <= here; i += kLanes) store(result + start + i, load(values + start + i) * load(scale + i));
        if (i < here) {
          T few[kLanes] = {};
          std::memcpy(few, values + start + i, sizeof(T) * (here - i));
          store(few, load(few) * load(scale + i));
          std::memcpy(result + start + i, few, sizeof(T) * (here - i));
        }
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
