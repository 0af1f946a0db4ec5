// Kernels with known faults, and without, that the shim itself is tested with.
#include "bindings_wire.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace peftk::cuda;

namespace planted {

enum Fault : int { kNone, kNoBarrier, kSomeReturn, kSomeSkipTheBarrier, kOverrun, kUnwritten, kLaneMissing, kMisaligned, kThrow };

// out[i] = in[n - 1 - i] within each block, through shared memory.
template <class T>
__global__ void reverse(const T* in, T* out, int fault) {
  PEFTK_DYNAMIC_SHARED(T, held);
  PEFTK_SHARED(T, still, [2]);
  const int n = blockDim.x, i = threadIdx.x, base = blockIdx.x * n;
  if (fault == kSomeReturn && i == 3) return;
  if (fault == kThrow && i == 5) throw std::runtime_error("thrown by a thread");
  if (fault != kUnwritten || i != 7) held[i + (fault == kOverrun && i == n - 1)] = in[base + i];
  if (i == 0) still[blockIdx.x % 2] = in[base];
  if (fault != kNoBarrier && !(fault == kSomeSkipTheBarrier && i % 2)) __syncthreads();
  out[base + i] = i == n - 1 ? still[blockIdx.x % 2] : held[n - 1 - i];
  if (fault == kMisaligned) __stcs(reinterpret_cast<uint4*>(out + 1), uint4{});
}

// out[i] = the sum over the warp of in, the butterfly's way; out[32 + warp] = the ballot of odd numbers.
__global__ void warp_sums(const int* in, int* out, int fault) {
  int sum = in[threadIdx.x];
  const unsigned odd = __ballot_sync(kWholeWarp, sum % 2 != 0);
  if (fault == kLaneMissing && threadIdx.x == 9) return;
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
  out[threadIdx.x] = __shfl_sync(kWholeWarp, sum, 0) + (__any_sync(kWholeWarp, odd == 0) ? 1000 : 0);
  __syncwarp();
  if (threadIdx.x % 32 == 0) out[blockDim.x + threadIdx.x / 32] = static_cast<int>(odd);
}

__global__ void count(int* total, int* most) {
  atomicAdd(total, 1);
  atomicMax(most, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

// The order in which threads of a grid of 2 x 2 blocks of 2 x 3 come.
__global__ void order(int* next, int* out) {
  const int block = blockIdx.y * gridDim.x + blockIdx.x, thread = threadIdx.y * blockDim.x + threadIdx.x;
  out[atomicAdd(next, 1)] = block * 6 + thread;
}

}  // namespace planted

PYBIND11_MODULE(planted, m) {
  m.def("set_seed", &cuda_host::set_seed);
  m.def("reverse", [](std::uintptr_t in, std::uintptr_t out, unsigned blocks, unsigned threads, int fault) {
    launch(planted::reverse<int>, blocks, threads, threads * sizeof(int), nullptr, reinterpret_cast<const int*>(in),
           reinterpret_cast<int*>(out), fault);
  });
  m.def("warp_sums", [](std::uintptr_t in, std::uintptr_t out, unsigned threads, int fault) {
    launch(planted::warp_sums, 1, threads, 0, nullptr, reinterpret_cast<const int*>(in), reinterpret_cast<int*>(out), fault);
  });
  m.def("count", [](std::uintptr_t total, std::uintptr_t most, unsigned blocks, unsigned threads) {
    launch(planted::count, blocks, threads, 0, nullptr, reinterpret_cast<int*>(total), reinterpret_cast<int*>(most));
  });
  m.def("order", [](std::uintptr_t next, std::uintptr_t out) {
    launch(planted::order, dim3(2, 2), dim3(2, 3), 0, nullptr, reinterpret_cast<int*>(next), reinterpret_cast<int*>(out));
  });
  // The shim's conversions, to be held against torch's: bits of fp32 -> bits.
  m.def("round", [](std::uint32_t bits, bool bf16) {
    const float x = __uint_as_float(bits);
    return bf16 ? __floats2bfloat162_rn(x, 0.0f).low : __floats2half2_rn(x, 0.0f).low;
  });
  m.def("from_half", [](std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); });
  m.def("fma_down", [](float a, float b, float c) { return __fmaf_rd(a, b, c); });
  m.def("byte_perm", [](std::uint32_t low, std::uint32_t high, std::uint32_t s) { return __byte_perm(low, high, s); });
}
