// blockwise8_dequantize: dynamic 8-bit codes and one absmax a block -> fp32 | bf16 | fp16.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

PEFTK_EVERY_TIER(void blockwise8_dequantize(const std::uint8_t* codes,  // (count,)
                                            const float* absmax,        // (ceil(count / block_size),)
                                            std::int64_t count,         // elements
                                            std::int64_t block_size,    // elements a block
                                            bool is_signed,             // which of the two dynamic codes
                                            void* out,                  // (count,)
                                            int dtype,                  // of out: DType
                                            int threads);)

namespace cuda {
// For the device of `stream`, without waiting for it.
void blockwise8_dequantize(const std::uint8_t* codes,  // (count,)
                           const float* absmax,        // (ceil(count / block_size),)
                           std::int64_t count,         // elements
                           std::int64_t block_size,    // elements a block
                           bool is_signed,             // which of the two dynamic codes
                           void* out,                  // (count,)
                           int dtype,                  // of out: DType
                           void* stream);              // cudaStream_t
}  // namespace cuda

}  // namespace peftk
