// blockwise8_quantize: blocks of the flat tensor -> dynamic 8-bit codes and one fp32 absmax a block.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

PEFTK_EVERY_TIER(void blockwise8_quantize(const void* x,            // (count,) fp32 | bf16 | fp16
                                          int dtype,                // of x: DType
                                          std::int64_t count,       // elements
                                          std::int64_t block_size,  // elements a block
                                          bool is_signed,           // which of the two dynamic codes
                                          std::uint8_t* codes,      // out (count,)
                                          float* absmax,            // out (ceil(count / block_size),)
                                          int threads);)

namespace cuda {
// For the device of `stream`, without waiting for it.
void blockwise8_quantize(const void* x,            // (count,) fp32 | bf16 | fp16
                         int dtype,                // of x: DType
                         std::int64_t count,       // elements
                         std::int64_t block_size,  // elements a block
                         bool is_signed,           // which of the two dynamic codes
                         std::uint8_t* codes,      // out (count,)
                         float* absmax,            // out (ceil(count / block_size),)
                         void* stream);            // cudaStream_t
}  // namespace cuda

}  // namespace peftk
