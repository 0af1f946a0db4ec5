// nf4_dequantize: 4-bit codes and their constants -> fp32 | bf16 | fp16.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

PEFTK_EVERY_TIER(void nf4_dequantize(const std::uint8_t* packed,  // (ceil(total / 2),)
                                     const void* absmax,          // (blocks,) fp32, or uint8 codes
                                     const float* absmax_scale,   // (ceil(blocks / 256),) or nullptr
                                     const float* absmax_offset,  // (1,) or nullptr
                                     std::int64_t first,          // first element wanted, flat
                                     std::int64_t count,          // elements wanted
                                     std::int64_t block_size,     // elements a block, even
                                     int quant_type,              // 0 nf4, 1 fp4
                                     void* out,                   // (count,)
                                     int dtype,                   // of out: DType
                                     int threads);)

namespace cuda {
// For the device of `stream`, without waiting for it.
void nf4_dequantize(const std::uint8_t* packed,  // (ceil(total / 2),)
                    const void* absmax,          // (blocks,) fp32, or uint8 codes
                    const float* absmax_scale,   // (ceil(blocks / 256),) or nullptr
                    const float* absmax_offset,  // (1,) or nullptr
                    std::int64_t first,          // first element wanted, flat
                    std::int64_t count,          // elements wanted
                    std::int64_t block_size,     // elements a block, even
                    int quant_type,              // 0 nf4, 1 fp4
                    void* out,                   // (count,)
                    int dtype,                   // of out: DType
                    void* stream);               // cudaStream_t
}  // namespace cuda

}  // namespace peftk
