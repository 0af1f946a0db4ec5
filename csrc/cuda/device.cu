#include <cuda_runtime.h>

#include "cuda/device.h"

namespace peftk {

std::string cuda_status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::vector<std::string> cuda_devices() {
  std::vector<std::string> names;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return names;
  for (int device = 0; device < count; device++) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) == cudaSuccess)
      names.push_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                      std::to_string(properties.minor));
  }
  return names;
}

}  // namespace peftk
