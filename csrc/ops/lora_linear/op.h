// lora_linear: y = x W^T + bias + scale D(z) A^T B^T, W dense and frozen, D dropout; S = D(z) A^T is kept for the backward pass:
// T = scale dy B, dx = dy W (+ D(T A) where z is x), dz = D(T A), dA = T^T D(z), dB = scale dy^T S.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

PEFTK_EVERY_TIER(void lora_linear(const void* w,          // (n, k); w_turned: it lies as (k, n)
                                  std::int64_t w_stride,  // elements from row to row of what lies there
                                  int w_turned, std::int64_t n, std::int64_t k,
                                  const void* x,  // (m, k), x_stride elements from row to row
                                  std::int64_t x_stride, std::int64_t m,
                                  int dtype,      // of w, x, bias, z, y and s
                                  const void* z,  // (m, k), or nullptr: x
                                  std::int64_t z_stride,
                                  const void* a,             // (r, k)
                                  int a_dtype,               //
                                  const void* b,             // (n, r)
                                  int b_dtype,               //
                                  std::int64_t r,            //
                                  float scale,               //
                                  const void* bias,          // (n,) or nullptr
                                  std::uint32_t drop_below,  // p * 2^32
                                  float keep_scale,          // 1 / (1 - p)
                                  std::uint64_t seed,        //
                                  void* y,                   // (m, n)
                                  void* s,                   // (m, r)
                                  int threads);)

PEFTK_EVERY_TIER(void lora_linear_backward(const void* w, std::int64_t w_stride, int w_turned, std::int64_t n, std::int64_t k,
                                           const void* dy,  // (m, n), dy_stride elements from row to row
                                           std::int64_t dy_stride, std::int64_t m,
                                           int dtype,      // of w, dy, z, s, dx and dz
                                           const void* z,  // (m, k), the branch's input, z_stride elements from row to row
                                           std::int64_t z_stride,
                                           const void* s,  // (m, r)
                                           const void* a, int a_dtype, const void* b, int b_dtype, std::int64_t r, float scale,
                                           std::uint32_t drop_below, float keep_scale, std::uint64_t seed,
                                           int z_is_x,  // dx takes the branch's share
                                           void* dx,    // (m, k), or nullptr
                                           void* dz,    // (m, k), or nullptr
                                           void* da,    // (r, k) in a_dtype
                                           void* db,    // (n, r) in b_dtype
                                           int threads);)

}  // namespace peftk
