// A packed byte to the values of its two codes in one 64-bit read. Row b of a table in shared memory has both values of byte b,
// once for each lane of a half warp, so no two lanes meet in a bank; rows are 256 bytes apart, so one byte permute makes the
// address out of byte and lane.
#pragma once
#include "cuda/block_scale.cuh"
#include "format/nf4.h"

namespace peftk::cuda {

inline constexpr int kByteCopies = 16;  // a 64-bit access is served half a warp at a time

struct ByteRow {
  float2 pair[kByteCopies];    // of the packed byte that numbers the row: high nibble, low nibble
  float2 value8[kByteCopies];  // .x: the dynamic 8-bit code of that number
};
static_assert(sizeof(ByteRow) == 256, "the byte permute in pair_at counts on it");
inline constexpr std::size_t kByteTableBytes = 256 * sizeof(ByteRow);

struct ByteTables {  // one parameter: nvcc copies a struct of 16 numbers to local memory before it indexes it
  float value4[16];
  Values8 code8;
};

inline ByteTables byte_tables(int quant_type) {
  ByteTables tables{{}, values8(true)};
  for (int i = 0; i < 16; i++) tables.value4[i] = code4(quant_type).value[i];
  return tables;
}

// By all threads of a block.
template <int kThreads>
__device__ __forceinline__ void fill(ByteRow* rows, const ByteTables& tables) {
  for (int i = threadIdx.x; i < 256 * kByteCopies; i += kThreads) {
    const int row = i / kByteCopies, copy = i % kByteCopies;
    rows[row].pair[copy] = {tables.value4[row >> 4], tables.value4[row & 15]};
    rows[row].value8[copy] = {tables.code8.value[row], 0.0f};
  }
  __syncthreads();
}

// `at` is the lane's own place in a row, in bytes.
__device__ __forceinline__ float2 pair_at(const ByteRow* rows, std::uint32_t word, int byte, std::uint32_t at) {
  const std::uint32_t address = __byte_perm(word, at, 0x6504 | byte << 4);  // 256 * byte + at
  return *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(rows) + address);
}

// value * scale + 0. fma(v, s, +0) is that in one rounding: the same but where the product rounds to zero, which takes a scale
// for which may_underflow holds.
__device__ __forceinline__ bool may_underflow(float scale) { return fabsf(scale) <= 0x1p-100f; }

template <bool kUnderflow>
__device__ __forceinline__ float scaled(float value, float scale) {
  return kUnderflow ? __fadd_rn(__fmul_rn(value, scale), 0.0f) : __fmaf_rn(value, scale, 0.0f);
}

// Both elements of each of the first n / 2 bytes of a word.
template <bool kUnderflow, int n>
__device__ __forceinline__ void decode_bytes(const ByteRow* rows, std::uint32_t word, std::uint32_t at, float scale,
                                             float (&values)[n]) {
#pragma unroll
  for (int byte = 0; byte < n / 2; byte++) {
    const float2 value = pair_at(rows, word, byte, at);
    values[2 * byte] = scaled<kUnderflow>(value.x, scale);
    values[2 * byte + 1] = scaled<kUnderflow>(value.y, scale);
  }
}

}  // namespace peftk::cuda
