// nf4_linear_int8: y = x W^T + bias, W in 4 bits, x rounded to 8 bits.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

PEFTK_EVERY_TIER(void nf4_linear_int8(const std::uint8_t* packed,  // (ceil(n * k / 2),)
                                      const void* absmax,          // (blocks,) fp32, or uint8 codes
                                      const float* absmax_scale,   // (ceil(blocks / 256),) or nullptr
                                      const float* absmax_offset,  // (1,) or nullptr
                                      std::int64_t n, std::int64_t k,
                                      std::int64_t block_size,  // elements a block, a power of two from 16 on
                                      int quant_type,           // 0 nf4, 1 fp4
                                      const void* x,            // (m, k), x_stride elements from row to row
                                      std::int64_t x_stride, std::int64_t m,
                                      int dtype,         // of x, bias and y: DType
                                      const void* bias,  // (n,) or nullptr
                                      void* y,           // (m, n)
                                      int threads);)

}  // namespace peftk
