// nf4_lora_linear_rows: y[i] = W x[i] + bias + scale B A z[i], W in 4 bits and common to all rows, A and B those of row i's
// adapter.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "format/weight4.h"

namespace peftk {

using AdapterFactors = std::tuple<const void*,   // a (r, k)
                                  int,           // its dtype
                                  const void*,   // b (n, r)
                                  int,           // its dtype
                                  std::int64_t,  // r
                                  float>;        // scale

// An adapter's rows of x are compact in s: its j-th row of x is row j there, (rows of the adapter, r).
PEFTK_EVERY_TIER(void nf4_lora_linear_rows(const Weight4& weight,
                                           const std::vector<std::tuple<AdapterFactors, void*>>& adapters,  // and its s
                                           const std::vector<std::int64_t>& index,  // by row: its adapter, -1 for none
                                           std::int64_t repeat,                     // rows of x that an entry stands for
                                           std::int64_t k, const void* x,           // (m, k), x_stride elements from row to row
                                           std::int64_t x_stride,
                                           int dtype,      // of x, z, bias, y and s: DType
                                           const void* z,  // (m, k), the branches' input, or nullptr: x
                                           std::int64_t z_stride,
                                           const void* bias,  // (n,) or nullptr
                                           void* y,           // (m, n)
                                           int threads);)

PEFTK_EVERY_TIER(void nf4_lora_linear_rows_backward(const Weight4& weight,
                                                    const std::vector<std::tuple<AdapterFactors,
                                                                                 const void*,  // s
                                                                                 void*,        // da (r, k) in a's dtype
                                                                                 void*>>&      // db (n, r) in b's dtype
                                                        adapters,
                                                    const std::vector<std::int64_t>& index, std::int64_t repeat, std::int64_t k,
                                                    const void* dy,  // (m, n), dy_stride elements from row to row
                                                    std::int64_t dy_stride,
                                                    int dtype,      // of dy, z, s, dx and dz
                                                    const void* z,  // (m, k), the branches' input
                                                    std::int64_t z_stride,
                                                    int z_is_x,  // dx takes the branches' share
                                                    void* dx,    // (m, k), or nullptr
                                                    void* dz,    // (m, k), or nullptr
                                                    int threads);)

}  // namespace peftk
