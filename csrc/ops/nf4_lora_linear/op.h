// nf4_lora_linear: y = x W^T + bias + scale D(z) A^T B^T for each of the weights that share x (k and z too), W in 4 bits, D
// dropout; S = D(z) A^T is kept for the backward pass: T = scale dy B, dx = sum of dy W (+ D(T A) where z is x),
// dz = sum of D(T A), dA = T^T D(z), dB = scale dy^T S.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "format/weight4.h"

namespace peftk {

using LowRank = std::tuple<const void*,     // a (r, k)
                           int,             // its dtype
                           const void*,     // b (n, r)
                           int,             // its dtype
                           std::int64_t,    // r
                           float,           // scale
                           std::uint32_t,   // p * 2^32
                           float,           // 1 / (1 - p)
                           std::uint64_t>;  // seed

PEFTK_EVERY_TIER(void nf4_lora_linear(const std::vector<std::tuple<Weight4, LowRank,
                                                                   const void*,  // bias (n,) or nullptr
                                                                   void*,        // y (m, n)
                                                                   void*>>&      // s (m, r)
                                          outputs,
                                      std::int64_t k,
                                      const void* x,  // (m, k), x_stride elements from row to row
                                      std::int64_t x_stride, std::int64_t m,
                                      int dtype,      // of x, bias, z, y and s
                                      const void* z,  // (m, k), or nullptr: x
                                      std::int64_t z_stride, int threads);)

PEFTK_EVERY_TIER(void nf4_lora_linear_backward(const std::vector<std::tuple<Weight4, LowRank,
                                                                            const void*,   // dy (m, n)
                                                                            std::int64_t,  // elements from row to row of it
                                                                            const void*,   // s (m, r)
                                                                            void*,         // da (r, k) in a's dtype
                                                                            void*>>&       // db (n, r) in b's dtype
                                                   gradients,
                                               std::int64_t k, std::int64_t m,
                                               int dtype,      // of dy, z, s, dx and dz
                                               const void* z,  // (m, k), the branch's input, z_stride elements from row to row
                                               std::int64_t z_stride,
                                               int z_is_x,  // dx takes the branch's share
                                               void* dx,    // (m, k), or nullptr
                                               void* dz,    // (m, k), or nullptr
                                               int threads);)

}  // namespace peftk
