// nf4_linear: y = x W^T + bias; nf4_linear_dx: dx = sum of dy W over the weights that share x; W in 4 bits.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "format/weight4.h"

namespace peftk {

PEFTK_EVERY_TIER(void nf4_linear(const std::uint8_t* packed,  // (ceil(n * k / 2),)
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

// The same for several weights of one k.
PEFTK_EVERY_TIER(void nf4_linear_many(const std::vector<std::tuple<Weight4,
                                                                   const void*,  // bias
                                                                   void*>>&      // y
                                          outputs,
                                      std::int64_t k, const void* x, std::int64_t x_stride, std::int64_t m, int dtype,
                                      int threads);)

PEFTK_EVERY_TIER(void nf4_linear_dx(const std::vector<std::tuple<Weight4,
                                                                 const void*,     // dy (m, n)
                                                                 std::int64_t>>&  // elements from row to row of it
                                        gradients,
                                    std::int64_t k, std::int64_t m,
                                    int dtype,  // of dy and dx
                                    void* dx,   // (m, k)
                                    int threads);)

}  // namespace peftk
