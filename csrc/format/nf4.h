// The 4-bit codes: NF4 (Dettmers et al. 2023, QLoRA, appendix E) and bitsandbytes' FP4, their decision thresholds, and the
// packing. Element 2i of a tensor lies in the high nibble of byte i, element 2i+1 in the low one, in flat row-major order.
// code_of_rank[#{thresholds t : x * (1 / absmax) > t}] is the stored code; NF4's ranks are its codes.
#pragma once
#include <cstdint>

#include "format/dtype.h"

namespace peftk {

struct Code4 {
  float value[16];      // by stored code, in units of the block's absmax
  float threshold[16];  // ascending, 15 used; the last one is +inf so that a full vector can be loaded
  std::uint32_t code_of_rank[16];
  std::uint8_t code_of_zero;  // of an all-zero block, and of the nibble that pads an odd count
  float int8_scale;           // the table in 8 bits: value[i] * int8_scale, rounded; chosen in peftk/format/code4.py
};

inline constexpr float kInfinity = __builtin_huge_valf();

inline constexpr Code4 kNF4 = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {-0x1.b239b2p-1f, -0x1.38a4ep-1f, -0x1.d709p-2f, -0x1.5bd4ecp-2f, -0x1.e079d8p-3f, -0x1.1a7178p-3f, -0x1.74f0e2p-5f,
     0x1.45f5fep-5f, 0x1.ec90c6p-4f, 0x1.a0cfcp-3f, 0x1.2b05a8p-2f, 0x1.8ea7f2p-2f, 0x1.00da06p-1f, 0x1.491b5ep-1f,
     0x1.b913b2p-1f, kInfinity},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    7,
    112.0f};

// The rule is |x| > t with the sign apart. For negative x that is x < -t, so the threshold on that side is the number just
// below -t; between code 8 (x < 0) and code 0 it is the number just below zero.
inline constexpr float kJustBelow[8] = {-0x1p-149f,      -0x1.555574p-9f, -0x1.600002p-4f, -0x1.aaaaacp-3f,
                                        -0x1.2aaaacp-2f, -0x1.aaaaaep-2f, -0x1.2aaaa2p-1f, -0x1.aaaaacp-1f};
inline constexpr Code4 kFP4 = {
    {0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f, -0.0f,
     -0.0052083334885537624f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f},
    {kJustBelow[7], kJustBelow[6], kJustBelow[5], kJustBelow[4], kJustBelow[3], kJustBelow[2], kJustBelow[1], kJustBelow[0],
     0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f, kInfinity},
    {11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3},
    0,
    120.0f};

inline const Code4& code4(int quant_type) {
  if (quant_type == 0) return kNF4;
  if (quant_type == 1) return kFP4;
  refuse("quant_type: expected 0 (nf4) or 1 (fp4)", quant_type);
}

}  // namespace peftk
