// The constants of a block, double quantised or not (QLoRA, section 3): scale = code8[q] * scale_of_256 + offset in two
// roundings.
#pragma once
#include <cstdint>

#include "format/dynamic8.h"

namespace peftk {

inline constexpr int kNestedBlock = 256;

struct Absmax {
  const void* values;   // (blocks,) fp32, or uint8 where scales != nullptr
  const float* scales;  // (ceil(blocks / 256),) fp32, or nullptr
  float offset;         // mean of the absmax; 0 where scales == nullptr
  const Code8* code;    // the signed dynamic 8-bit code

  float operator[](std::int64_t block) const {
    if (!scales) return static_cast<const float*>(values)[block];
    const float scaled = code->value[static_cast<const std::uint8_t*>(values)[block]] * scales[block / kNestedBlock];
    return scaled + offset;
  }
};

inline Absmax make_absmax(const void* values, const float* scales, const float* offset) {
  return {values, scales, scales ? *offset : 0.0f, &code8(true)};
}

}  // namespace peftk
