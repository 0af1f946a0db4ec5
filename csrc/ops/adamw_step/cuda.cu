// AdamW with moments in fp32, a list of tensors a launch. Memory is the bound: 28 bytes an fp32 element, 22 in 16 bits. A thread
// takes what one 128-bit access of a parameter holds.
#include "ops/adamw_step/cuda_tensors.cuh"

namespace peftk::cuda {
namespace adamw_step_kernels {

constexpr int kThreads = 256, kBlocks = 4;  // 64 registers a thread
template <class T>
constexpr int kChunk = kThreads * kPerVector<T>;  // elements

struct Place {
  void* param;
  const void* grad;
  float *m, *v;
  std::int64_t count;

  __device__ __forceinline__ bool is_wide() const {
    const auto bits = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at); };
    return (bits(param) | bits(grad) | bits(m) | bits(v)) % kVectorBytes == 0;
  }
};
using List = TensorList<Place>;
static_assert(sizeof(List) + sizeof(Coefficients) <= kMostParameterBytes);

// kPerVector<T> elements of parameters and gradients, or `left`, one by one.
template <class T>
__device__ __forceinline__ void step_vector(const Coefficients& c, T* param, const T* grad, float* m, float* v) {
  constexpr int n = kPerVector<T>, kHalf = kPerVector<float>;
  float p[n], g[n], first[n], second[n];
  load_vector(param, p);
  load_vector(grad, g);
#pragma unroll
  for (int i = 0; i < n; i += kHalf) load_vector(m + i, first + i), load_vector(v + i, second + i);
#pragma unroll
  for (int i = 0; i < n; i++) update(c, g[i], p[i], first[i], second[i]);
  store_vector(param, p);
#pragma unroll
  for (int i = 0; i < n; i += kHalf) store_vector(m + i, first + i), store_vector(v + i, second + i);
}

template <class T>
__device__ __forceinline__ void step_elements(const Coefficients& c, T* param, const T* grad, float* m, float* v,
                                              std::int64_t left) {
#pragma unroll 1
  for (int i = 0; i < kPerVector<T> && i < left; i++) {
    float p = to_float(param[i]), first = m[i], second = v[i];
    update(c, to_float(grad[i]), p, first, second);
    param[i] = round_to<T>(p), m[i] = first, v[i] = second;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    adamw_step_kernel(const __grid_constant__ List list, const __grid_constant__ Coefficients c) {
  std::uint32_t number = 0, begin = 0, end = 0;  // tensor at hand, its chunks
  for (std::uint32_t chunk = blockIdx.x; chunk < list.chunks(); chunk += gridDim.x) {
    if (chunk >= end) number = list.find(chunk), begin = list.first[number], end = list.first[number + 1];
    const Place& at = list.of[number];
    const std::int64_t first = (chunk - begin) * static_cast<std::int64_t>(kChunk<T>) + threadIdx.x * kPerVector<T>;
    const std::int64_t left = at.count - first;
    T* const param = static_cast<T*>(at.param) + first;
    const T* const grad = static_cast<const T*>(at.grad) + first;
    if (left >= kPerVector<T> && at.is_wide())
      step_vector(c, param, grad, at.m + first, at.v + first);
    else
      step_elements(c, param, grad, at.m + first, at.v + first, left);
  }
}

}  // namespace adamw_step_kernels

void adamw_step(const std::vector<AdamTensor>& tensors, int dtype, const std::vector<float>& coefficients, void* stream) {
  using namespace adamw_step_kernels;
  const Coefficients c = make_coefficients(coefficients);
  with_type(static_cast<void*>(nullptr), dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const auto place = [](const AdamTensor& tensor) {
      const auto& [param, grad, m, v, count] = tensor;
      return Place{param, grad, m, v, count};
    };
    for_each_list<Place>(tensors, kChunk<T>, place, [&](const List& list) {
      launch(adamw_step_kernel<T>, blocks_for(list.first[list.count], 1, kBlocks), kThreads, 0, stream, list, c);
    });
  });
}

}  // namespace peftk::cuda
