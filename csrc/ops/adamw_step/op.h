// adamw_step, adamw_step8: one step of AdamW on a list of tensors, in place; moments in fp32, or in 8 bits by blocks of 256.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"

namespace peftk {

using AdamTensor = std::tuple<void*,          // param (count,) of the call's dtype
                              const void*,    // grad (count,) of the same
                              float*,         // exp_avg (count,)
                              float*,         // exp_avg_sq (count,)
                              std::int64_t>;  // count: elements

using AdamTensor8 = std::tuple<void*,          // param (count,) of the call's dtype
                               const void*,    // grad (count,) of the same
                               std::uint8_t*,  // state1 (count,): signed codes of exp_avg
                               std::uint8_t*,  // state2 (count,): unsigned codes of exp_avg_sq
                               float*,         // absmax1 (ceil(count / 256),)
                               float*,         // absmax2 (ceil(count / 256),)
                               std::int64_t>;  // count: elements

inline constexpr int kAdamCoefficients = 8;  // of peftk/ops/adamw_step/coefficients.py, in that order

PEFTK_EVERY_TIER(void adamw_step(const std::vector<AdamTensor>& tensors,  //
                                 int dtype,                               // of params and grads: DType
                                 const std::vector<float>& coefficients,  // (kAdamCoefficients,)
                                 int threads);
                 void adamw_step8(const std::vector<AdamTensor8>& tensors,  //
                                  int dtype,                                // of params and grads: DType
                                  const std::vector<float>& coefficients,   // (kAdamCoefficients,)
                                  int threads);)

namespace cuda {
// For the device of `stream`, without waiting for it.
void adamw_step(const std::vector<AdamTensor>& tensors,    //
                int dtype,                                 // of params and grads: DType
                const std::vector<float>& coefficients,    // (kAdamCoefficients,)
                void* stream);                             // cudaStream_t
void adamw_step8(const std::vector<AdamTensor8>& tensors,  //
                 int dtype,                                // of params and grads: DType
                 const std::vector<float>& coefficients,   // (kAdamCoefficients,)
                 const std::int32_t* tables,               // (6656,): CodeTables of csrc/cuda/code_buckets.cuh
                 void* stream);                            // cudaStream_t
}  // namespace cuda

}  // namespace peftk
