// philox_dropout: out = x * keep / (1 - p), keep from a counter-based generator.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace peftk {

PEFTK_EVERY_TIER(void philox_dropout(const void* x,             // (count,) fp32 | bf16 | fp16
                                     int dtype,                 // of x and out: DType
                                     std::int64_t count,        // elements
                                     std::uint32_t drop_below,  // an element with a smaller random word is dropped: p * 2^32
                                     float keep_scale,          // 1 / (1 - p)
                                     std::uint64_t seed,        // the generator's key
                                     void* out,                 // (count,)
                                     int threads);)

namespace cuda {
// On the device of `stream`, without waiting for it.
void philox_dropout(const void* x,             // (count,) fp32 | bf16 | fp16
                    int dtype,                 // of x and out: DType
                    std::int64_t count,        // elements
                    std::uint32_t drop_below,  // p * 2^32
                    float keep_scale,          // 1 / (1 - p)
                    std::uint64_t seed,        // the generator's key
                    void* out,                 // (count,)
                    void* stream);             // cudaStream_t
}  // namespace cuda

}  // namespace peftk
