// Both weights of a packed byte as one pair of 16-bit elements, which is a register of a tensor core's operand: a table in shared
// memory, a row a byte, its 32 copies a bank a lane, so that no two lanes meet. The 4-bit code is rounded once, in units that a
// kernel gives back with its sums: y = pair_unit * (sum of x * pair * scale).
#pragma once
#include <type_traits>

#include "cuda/convert.cuh"
#include "cuda/shared.cuh"
#include "format/nf4.h"

namespace peftk::cuda {

inline constexpr int kPairRow = kWarp;                 // words
inline constexpr int kPairBytes = 256 * kPairRow * 4;  // of the table
static_assert(kPairRow * 4 == 0x80, "pair_of multiplies by it");

// What the codes are multiplied by before they are rounded, by quant_type. Rounded as they are, NF4's have a mean error that
// inputs with a mean pile up over k: 4.7e-4 of the weights' deviation in bf16 and 5.9e-5 in fp16, against 1.0e-5 and 7.4e-7 here
// (Gaussian weights, blocks of 64 to 4096; the deviation of the error is 1.03 and 0.93 times that of weights rounded one by one).
// FP4's become exact: they are multiples of 1/3, but for one.
template <class T>
__device__ __forceinline__ float pair_factor(int quant_type) {
  constexpr float kNF4Factor = std::is_same_v<T, Bf16> ? 0x1.74d4p+0f : 0x1.4eacp+0f;
  return quant_type == 0 ? kNF4Factor : 1.5f;
}

// By all threads of a block; a barrier must follow. `value4`: code4(quant_type).value.
template <class T>
__device__ __forceinline__ void fill_pairs(std::uint32_t* pairs, const float (&value4)[16], float factor, int threads) {
  constexpr int kStores = kPairRow / 4;  // of 16 bytes a row
  for (int i = threadIdx.x; i < 256 * kStores; i += threads) {
    const int byte = i / kStores;
    const std::uint32_t pair = round_pair<T>(__fmul_rn(value4[byte >> 4], factor), __fmul_rn(value4[byte & 15], factor));
    reinterpret_cast<uint4*>(pairs)[i] = {pair, pair, pair, pair};
  }
}

// A lane's copy of the table.
__device__ __forceinline__ SharedAddress lane_pairs(std::uint32_t* pairs, int lane) { return shared_address(pairs + lane); }

// Of byte `at` of a word. The dot product of bytes is byte extraction, the row's offset and its sum with the copy's address in
// one instruction.
__device__ __forceinline__ std::uint32_t pair_of(SharedAddress lane_pairs, std::uint32_t word, int at) {
  const std::uint32_t row = 0x80u << 8 * at;
#ifdef PEFTK_CUDA_HOST
  return *shared_pointer<const std::uint32_t>(lane_pairs + __dp4a(word, row, 0u));
#else
  return *shared_pointer<const std::uint32_t>(__dp4a(word, row, lane_pairs));
#endif
}

}  // namespace peftk::cuda
