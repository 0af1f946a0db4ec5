// Nearest dynamic 8-bit codes by one look-up each. A bucket is what |x| shares its exponent and leading mantissa bits with: so
// few that no bucket has more than one threshold. Its word holds the code below that threshold and the threshold's distance from
// the bucket's end, and the rest of x, added to the word, carries into the code where x is above: exact, ties and signs included.
// Built by peftk/ops/adamw_step/code_tables.py, which has the same numbers.
#pragma once
#include "cuda/kernel.cuh"

namespace peftk::cuda {

// x in [-1, 1] of the signed code: 6 mantissa bits, |x| from 2^-22 on; of the unsigned code: 7, from 2^-23 on. What is smaller
// has the bucket of the smallest, whose code is that of 0.
inline constexpr int kSignedShift = 17, kUnsignedShift = 16;
inline constexpr float kSignedLowest = 0x1p-22f, kUnsignedLowest = 0x1p-23f;
inline constexpr std::uint32_t kSignedFirst = (127u - 22) << (23 - kSignedShift);
inline constexpr std::uint32_t kUnsignedFirst = (127u - 23) << (23 - kUnsignedShift);

struct CodeTables {  // in global memory, then in shared memory
  float signed_value[256], unsigned_value[256];
  std::uint32_t signed_bucket[2048], unsigned_bucket[4096];
};

// Bytes 3 of four words, the first one lowest.
__device__ __forceinline__ std::uint32_t top_bytes(const std::uint32_t (&words)[4]) {
  return __byte_perm(__byte_perm(words[0], words[1], 0x0073), __byte_perm(words[2], words[3], 0x0073), 0x5410);
}

// 0xff where the number is negative, for each of four.
__device__ __forceinline__ std::uint32_t sign_bytes(const float (&x)[4]) {
  std::uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; i++) bits[i] = static_cast<std::uint32_t>(__float_as_int(x[i]) >> 31);
  return top_bytes(bits);
}

// Codes of four numbers in [0, 1], one a byte. NaN gets any.
__device__ __forceinline__ std::uint32_t nearest_unsigned(const std::uint32_t* buckets, const float (&x)[4]) {
  std::uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const std::uint32_t bits = __float_as_uint(fmaxf(x[i], kUnsignedLowest));
    sums[i] = buckets[(bits >> kUnsignedShift) - kUnsignedFirst] + (bits << (24 - kUnsignedShift));
  }
  return top_bytes(sums);
}

// Codes of four numbers in [-1, 1], one a byte: 127 + the rank of |x| among the positive values, or 127 - it. The sign is below
// |x| in the sum, since a tie goes to the lower code: down from a positive number, up from a negative one. `least` is the lowest
// value of the code: the signed code has 1 and no -1. NaN gets any.
__device__ __forceinline__ std::uint32_t nearest_signed(const std::uint32_t* buckets, const float (&x)[4], float least) {
  std::uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float inside = fmaxf(x[i], least);
    const std::uint32_t bits = __float_as_uint(fmaxf(fabsf(inside), kSignedLowest));
    sums[i] = buckets[(bits >> kSignedShift) - kSignedFirst] + __funnelshift_l(__float_as_uint(inside), bits, 24 - kSignedShift);
  }
  const std::uint32_t ranks = top_bytes(sums), negative = sign_bytes(x);
  return 0x7f7f7f7fu + (ranks & ~negative) - (ranks & negative);
}

}  // namespace peftk::cuda
