// CUDA's words for g++: csrc/cuda and csrc/ops/*/cuda.cu run on the host, each thread a fiber (fibers.h). What stands here
// behaves as on the device to the bit; what isn't here no kernel uses.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::cuda_host::this_thread().index)
#define blockIdx (::cuda_host::block_index())
#define blockDim (::cuda_host::block_dim())
#define gridDim (::cuda_host::grid_dim())

// The lambda's type is another one at each place and in each template instance: so it names the object.
#define PEFTK_SHARED(Type, name, extent) auto& name = ::cuda_host::shared<Type extent>([] {})
#define PEFTK_DYNAMIC_SHARED(Type, name) Type* const name = reinterpret_cast<Type*>(::cuda_host::dynamic_shared())

struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { cuda_host::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::sync_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {  // lane: of the own group of `width` lanes
  const int own = static_cast<int>(threadIdx.x) & 31;
  return cuda_host::exchange(mask, "shfl", value, (own & -width) | (lane & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_host::exchange(mask, "shfl.xor", value, (static_cast<int>(threadIdx.x) & 31) ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) { return cuda_host::ballot(mask, predicate); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  unsigned most = value;
  for (int lane = 0; lane < 32; lane++)
    if (const unsigned other = cuda_host::exchange(mask, "redux.max", value, lane); mask >> lane & 1 && other > most) most = other;
  return most;
}
inline bool __any_sync(unsigned mask, bool predicate) { return cuda_host::ballot(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return cuda_host::ballot(mask, predicate) == mask; }

// Addresses in the launch's own shared memory, in 32 bits.
inline std::size_t __cvta_generic_to_shared(const void* data) {
  return static_cast<std::size_t>(static_cast<const char*>(data) - static_cast<const char*>(cuda_host::dynamic_shared()));
}
inline void* __cvta_shared_to_generic(std::size_t at) { return static_cast<char*>(cuda_host::dynamic_shared()) + at; }

template <class T>
T __ldcs(const T* data) {
  return cuda_host::aligned(data);
}
template <class T>
T __ldg(const T* data) {
  return cuda_host::aligned(data);
}
template <class T>
void __stcs(T* data, T value) {
  cuda_host::aligned(data) = value;
}

template <class T>
void __stcg(T* data, T value) {
  cuda_host::aligned(data) = value;
}

template <class T>
T atomicAdd(T* at, T value) {  // fibers change places at barriers only
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  if (value > before) *at = value;
  return before;
}

template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}

inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline std::int32_t __float_as_int(float x) { return static_cast<std::int32_t>(__float_as_uint(x)); }
inline float __uint_as_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float canonical(float x) { return x == x ? x : __uint_as_float(0x7fffffffu); }  // arithmetic on a GPU knows one NaN
inline float __fmul_rn(float a, float b) { return canonical(a * b); }
inline float __fadd_rn(float a, float b) { return canonical(a + b); }
inline float __fsub_rn(float a, float b) { return canonical(a - b); }
inline float __fdiv_rn(float a, float b) { return canonical(a / b); }
inline float __fsqrt_rn(float a) { return canonical(std::sqrt(a)); }
inline float __frcp_rn(float a) { return canonical(1.0f / a); }
inline float __fmaf_rn(float a, float b, float c) { return canonical(std::fmaf(a, b, c)); }
inline float __fmaf_rd(float a, float b, float c) {
  volatile float x = a, y = b, z = c;  // the compiler must not compute it before the rounding mode is set
  std::fesetround(FE_DOWNWARD);
  volatile float result = std::fmaf(x, y, z);
  std::fesetround(FE_TONEAREST);
  return canonical(result);
}

// Byte i of the result: byte (selector >> 4i) & 7 of the eight of `low` and `high`.
inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<std::uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

// The upper half of high:low shifted left.
inline std::uint32_t __funnelshift_l(std::uint32_t low, std::uint32_t high, std::uint32_t bits) {
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(high) << 32 | low) << (bits & 31) >> 32);
}

// c + the dot product of four bytes and four.
inline std::uint32_t __dp4a(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}

namespace cuda_host {

inline std::uint16_t bf16(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline std::uint16_t f16(float x) {
  if (x != x) return 0x7fff;
  const std::uint16_t sign = static_cast<std::uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;  // halfway beyond the largest number
  // Below 2^-14 the numbers are multiples of 2^-24; above, a significand of 11 bits.
  if (size < 0x1p-14f) return sign | static_cast<std::uint16_t>(std::nearbyint(size * 0x1p24f));
  const std::uint32_t bits = __float_as_uint(size);
  return sign | static_cast<std::uint16_t>((bits + 0xfffu + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

inline float from_f16(std::uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? fraction | 1024 : fraction), (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = fraction ? __uint_as_float(0x7fffffffu) : HUGE_VALF;
  return h & 0x8000 ? -size : size;
}

}  // namespace cuda_host

namespace cuda_host {

// c (16, 8) += a (16, 16) b (16, 8) by a warp, fragments as csrc/cuda/mma.cuh has them; `widen` gives an element's number.
// Products and their sum in fp64, one rounding: as in the PTX emulator.
template <class Widen>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Widen widen) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const auto of = gather("mma", mine);
  const int lane = static_cast<int>(threadIdx.x) & 31, g = lane / 4, t = lane % 4;
  const auto half = [&](std::uint32_t pair, int which) { return static_cast<double>(widen(pair >> 16 * which & 0xffff)); };
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; k++) {
      const int pair = k % 8 / 2, high = k / 8;
      sum += half(of[4 * (row % 8) + pair].a[2 * high + row / 8], k % 2) * half(of[4 * column + pair].b[high], k % 2);
    }
    c[i] = canonical(static_cast<float>(sum + c[i]));
  }
}

inline void load_four(std::uint32_t (&out)[4], const void* row, bool transposed) {
  const auto rows = gather("ldmatrix", row);
  const int lane = static_cast<int>(threadIdx.x) & 31, g = lane / 4, t = lane % 4;
  const auto element = [&](int matrix, int r, int column) -> std::uint32_t {
    if (reinterpret_cast<std::uintptr_t>(rows[8 * matrix + r]) % 16) throw std::runtime_error("ldmatrix: a misaligned row");
    return static_cast<const std::uint16_t*>(rows[8 * matrix + r])[column];
  };
  for (int i = 0; i < 4; i++)
    out[i] = transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                        : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
  sync_warp(~0u);  // no lane goes on and writes to shared memory before all have read
}
inline void load_matrices(std::uint32_t (&out)[4], const void* row) { load_four(out, row, false); }
inline void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) { load_four(out, row, true); }

inline void copy_async(void* shared, const void* global, int bytes = 16) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 || reinterpret_cast<std::uintptr_t>(global) % 16)
    throw std::runtime_error("cp.async: a misaligned address");
  if (bytes < 0 || bytes > 16) throw std::runtime_error("cp.async: expected 0 to 16 bytes, got " + std::to_string(bytes));
  async_copies().open.push_back({shared, global, bytes});
}
inline void commit_copies() {
  auto& copies = async_copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int kUnderWay>
void wait_copies() {
  auto& groups = async_copies().groups;
  while (groups.size() > kUnderWay) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.shared, 0, 16);
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_host

struct __half {
  std::uint16_t bits;
};
struct __half2 {
  std::uint16_t low, high;
};
struct __nv_bfloat162 {
  std::uint16_t low, high;
};
inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline float __half2float(__half x) { return cuda_host::from_f16(x.bits); }
inline __half2 __floats2half2_rn(float low, float high) { return {cuda_host::f16(low), cuda_host::f16(high)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {cuda_host::bf16(low), cuda_host::bf16(high)}; }
