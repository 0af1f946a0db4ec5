// The constants of a 4-bit weight's blocks on the device, double quantised or not: as in format/absmax.h, in two roundings.
#pragma once
#include "cuda/kernel.cuh"
#include "format/absmax.h"

namespace peftk::cuda {

struct Values8 {  // of a dynamic 8-bit code, as a kernel parameter
  float value[256];
};

inline Values8 values8(bool is_signed) {
  Values8 table;
  for (int i = 0; i < 256; i++) table.value[i] = code8(is_signed).value[i];
  return table;
}

struct BlockScales {
  const void* values;   // (blocks,) fp32, or uint8 codes where double quantised
  const float* scales;  // (ceil(blocks / 256),) or nullptr
  const float* offset;  // (1,) or nullptr
};

template <bool kNested>
__device__ __forceinline__ float offset_of(const BlockScales& source) {
  return kNested ? *source.offset : 0.0f;
}

// Of a double-quantised constant: its code's value, the scale of its 256, the offset.
__device__ __forceinline__ float nested_scale(float value, float scale, float offset) {
  return __fadd_rn(__fmul_rn(value, scale), offset);
}

// `value8` gives the value of a signed dynamic 8-bit code; `offset` is offset_of(source), read once. Below 2^40 blocks.
template <bool kNested, class Lookup>
__device__ __forceinline__ float scale_of(const BlockScales& source, std::uint64_t block, float offset, Lookup value8) {
  if constexpr (kNested)
    return nested_scale(value8(static_cast<const std::uint8_t*>(source.values)[block]),
                        source.scales[static_cast<std::uint32_t>(block / kNestedBlock)], offset);
  else
    return static_cast<const float*>(source.values)[block];
}

}  // namespace peftk::cuda
