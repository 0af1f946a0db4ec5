// nf4_quantize: blocks of the flat tensor -> 4-bit codes and one fp32 absmax a block.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

// A block with a NaN has absmax NaN, one with an Inf has absmax Inf.
PEFTK_EVERY_TIER(void nf4_quantize(const void* w,            // (count,) fp32 | bf16 | fp16
                                   int dtype,                // of w: DType
                                   std::int64_t count,       // elements
                                   std::int64_t block_size,  // elements a block, even
                                   int quant_type,           // 0 nf4, 1 fp4
                                   std::uint8_t* packed,     // out (ceil(count / 2),)
                                   float* absmax,            // out (ceil(count / block_size),)
                                   int threads);)

namespace cuda {
// For the device of `stream`, without waiting for it.
void nf4_quantize(const void* w,            // (count,) fp32 | bf16 | fp16
                  int dtype,                // of w: DType
                  std::int64_t count,       // elements
                  std::int64_t block_size,  // elements a block, even
                  int quant_type,           // 0 nf4, 1 fp4
                  std::uint8_t* packed,     // out (ceil(count / 2),)
                  float* absmax,            // out (ceil(count / block_size),)
                  void* stream);            // cudaStream_t
}  // namespace cuda

}  // namespace peftk
