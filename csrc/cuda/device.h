// What the CUDA runtime that is linked into this module sees.
#pragma once
#include <string>
#include <vector>

namespace peftk {

std::vector<std::string> cuda_devices();  // "NVIDIA H100, sm_90" …; empty without a driver or a device
std::string cuda_status();                // "" where devices can be used, else the runtime's own reason

}  // namespace peftk
