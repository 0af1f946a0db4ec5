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

namespace cuda {
// The thin products beside W, on the device of `stream`, without waiting for it, a list of them (16 at most) in one launch. D is
// dropout on a matrix with c columns, whose mask its elements' flat indices give. Sums in fp32 in a fixed order.
using Shrink = std::tuple<const void*,    // wide (m, c)
                          std::int64_t,   // elements from row to row of it
                          std::int64_t,   // c
                          const void*,    // factor (c, r)
                          std::int64_t,   // elements from row to row of it
                          std::int64_t,   // elements from column to column of it
                          std::int64_t,   // r
                          float,          // scale
                          std::uint32_t,  // p * 2^32
                          float,          // 1 / (1 - p)
                          std::uint64_t,  // seed
                          void*>;         // out (m, r) = scale * D(wide) factor
using Outer = std::tuple<const void*,     // thin (m, r)
                         std::int64_t,    // r
                         const void*,     // wide (m, c)
                         std::int64_t,    // elements from row to row of it
                         std::int64_t,    // c
                         float,           // scale
                         std::uint32_t,   // p * 2^32
                         float,           // 1 / (1 - p)
                         std::uint64_t,   // seed
                         void*,           // out (r, c) = scale * thin^T D(wide)
                         std::int64_t,    // elements from row to row of it
                         std::int64_t,    // elements from column to column of it
                         int>;            // its dtype

// S = D(z) A^T and T = scale dy B. split: runs of c, whose sums a second kernel adds.
void nf4_lora_linear_shrink(const std::vector<Shrink>& products, std::int64_t m,
                            int dtype,  // of wide, factor and out
                            int split,
                            float* partial,  // (split * m * (sum of r),), or nullptr where split is 1
                            void* stream);

// dA = T^T D(z) and dB = scale dy^T S. split: runs of m, whose sums a second kernel adds.
void nf4_lora_linear_outer(const std::vector<Outer>& products, std::int64_t m,
                           int dtype,  // of thin and wide
                           int split,
                           float* partial,  // (split * (sum of r * c),), or nullptr where split is 1
                           void* stream);
}  // namespace cuda

}  // namespace peftk
