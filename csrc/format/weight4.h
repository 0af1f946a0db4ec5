// A 4-bit weight as one of a list that ops take: what nf4_linear is given of it one by one.
#pragma once
#include <cstdint>
#include <tuple>

namespace peftk {

using Weight4 = std::tuple<const std::uint8_t*,  // packed
                           const void*,          // absmax
                           const float*,         // absmax_scale
                           const float*,         // absmax_offset
                           std::int64_t,         // n
                           std::int64_t,         // block_size
                           int>;                 // quant_type

}  // namespace peftk
