// Philox (format/philox.h) by one thread, and the dropout that is made of it: element i of a matrix, counted row by row, stays
// where word i % 4 of counter i / 4 is not below drop_below, and is scaled then.
#pragma once
#include "cuda/kernel.cuh"
#include "format/philox.h"

namespace peftk::cuda {

struct Dropout {
  std::uint32_t drop_below;  // p * 2^32; 0: no dropout
  float keep_scale;          // 1 / (1 - p)
  std::uint64_t seed;
};

// The words of one counter, for elements 4 * counter … + 3.
__device__ __forceinline__ uint4 philox(std::uint64_t counter, std::uint64_t key) {
  uint4 c = {static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0};
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; round++, k0 += kPhiloxKeyStep0, k1 += kPhiloxKeyStep1) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kPhiloxFactor0) * c.x;
    const std::uint64_t p1 = static_cast<std::uint64_t>(kPhiloxFactor1) * c.z;
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<std::uint32_t>(p0)};
  }
  return c;
}

// Word `at` of four, without an indexed array (that would lie in local memory).
__device__ __forceinline__ std::uint32_t word_of(const uint4& words, unsigned at) {
  const std::uint32_t low = at & 1 ? words.y : words.x, high = at & 1 ? words.w : words.z;
  return at & 2 ? high : low;
}

// Whether one element stays. Four neighbours from a multiple of 4 on share a counter: make it once where you can.
__device__ __forceinline__ bool keeps(const Dropout& dropout, std::uint64_t element) {
  return word_of(philox(element / 4, dropout.seed), element % 4) >= dropout.drop_below;
}

}  // namespace peftk::cuda
