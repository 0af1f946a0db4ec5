// ademamix_step, ademamix_step8: one step of AdEMAMix on a list of tensors, in place; moments in fp32, or in 8 bits by blocks of
// 256.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"

namespace peftk {

using AdEMAMixTensor = std::tuple<void*,          // param (count,) of the call's dtype
                                  const void*,    // grad (count,) of the same
                                  float*,         // exp_avg (count,)
                                  float*,         // exp_avg_sq (count,)
                                  float*,         // exp_avg_slow (count,)
                                  std::int64_t>;  // count: elements

using AdEMAMixTensor8 = std::tuple<void*,          // param (count,) of the call's dtype
                                   const void*,    // grad (count,) of the same
                                   std::uint8_t*,  // state1 (count,): signed codes of exp_avg
                                   std::uint8_t*,  // state2 (count,): unsigned codes of exp_avg_sq
                                   std::uint8_t*,  // state3 (count,): signed codes of exp_avg_slow
                                   float*,         // absmax1 (ceil(count / 256),)
                                   float*,         // absmax2 (ceil(count / 256),)
                                   float*,         // absmax3 (ceil(count / 256),)
                                   std::int64_t>;  // count: elements

inline constexpr int kAdEMAMixCoefficients = 10;  // of peftk/ops/ademamix_step/__init__.py, in that order

PEFTK_EVERY_TIER(void ademamix_step(const std::vector<AdEMAMixTensor>& tensors,  //
                                    int dtype,                                   // of params and grads: DType
                                    const std::vector<float>& coefficients,      // (kAdEMAMixCoefficients,)
                                    int threads);
                 void ademamix_step8(const std::vector<AdEMAMixTensor8>& tensors,  //
                                     int dtype,                                    // of params and grads: DType
                                     const std::vector<float>& coefficients,       // (kAdEMAMixCoefficients,)
                                     int threads);)

}  // namespace peftk
