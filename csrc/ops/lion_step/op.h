// lion_step, lion_step8: one step of Lion on a list of tensors, in place; the moment in fp32, or in 8 bits by blocks of 256.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"

namespace peftk {

using LionTensor = std::tuple<void*,          // param (count,) of the call's dtype
                              const void*,    // grad (count,) of the same
                              float*,         // exp_avg (count,)
                              std::int64_t>;  // count: elements

using LionTensor8 = std::tuple<void*,          // param (count,) of the call's dtype
                               const void*,    // grad (count,) of the same
                               std::uint8_t*,  // state1 (count,): signed codes of exp_avg
                               float*,         // absmax1 (ceil(count / 256),)
                               std::int64_t>;  // count: elements

inline constexpr int kLionCoefficients = 7;  // of peftk/ops/lion_step/__init__.py, in that order

PEFTK_EVERY_TIER(void lion_step(const std::vector<LionTensor>& tensors,  //
                                int dtype,                               // of params and grads: DType
                                const std::vector<float>& coefficients,  // (kLionCoefficients,)
                                int threads);
                 void lion_step8(const std::vector<LionTensor8>& tensors,  //
                                 int dtype,                                // of params and grads: DType
                                 const std::vector<float>& coefficients,   // (kLionCoefficients,)
                                 int threads);)

}  // namespace peftk
