// Storage types: loads, stores and conversions, the same on a GPU and on a host.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EPT_BOTH __host__ __device__ __forceinline__
#define EPT_DEVICE __device__ __forceinline__
#define EPT_PRAGMA(text) _Pragma(#text)
#define EPT_UNROLL EPT_PRAGMA(unroll)
#define EPT_UNROLL_BY(number) EPT_PRAGMA(unroll number)
#else
#include <stdexcept>
#define EPT_BOTH inline
#define EPT_DEVICE inline
#define EPT_UNROLL
#define EPT_UNROLL_BY(number)
#endif

namespace ept {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

EPT_BOTH uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EPT_BOTH float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

EPT_BOTH float not_a_number() { return float_of(0x7fc00000u); }

EPT_BOTH float to_float(float value) { return value; }

EPT_BOTH float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

EPT_BOTH float to_float(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu, mantissa = value.bits & 0x3ffu;
  if (exponent == 0x1fu) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float least = float_of(0x33800000u);  // 2^-24, the unit of the subnormal numbers
  const float magnitude = static_cast<float>(mantissa) * least;
  return float_of(sign | bits_of(magnitude));
#endif
}

template <class T>
EPT_BOTH T from_float(float value);

template <>
EPT_BOTH float from_float<float>(float value) {
  return value;
}

// To the nearest, ties to even; a NaN stays one.
template <>
EPT_BOTH BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
EPT_BOTH Half from_float<Half>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const auto half = [sign](uint32_t rest) { return Half{static_cast<uint16_t>(sign | rest)}; };
  if (magnitude > 0x7f800000u) return half(0x7e00u);
  if (magnitude >= 0x47800000u) return half(0x7c00u);  // 2^16 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 2^-1 leaves the number in units of 2^-24, rounded by the addition.
    return half(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
  }
  return half((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
#endif
}

// An element of a tensor whose type is known at run time only.
EPT_BOTH float load(const void* data, Type type, int64_t index) {
  if (type == Type::float32) return static_cast<const float*>(data)[index];
  if (type == Type::float16) return to_float(static_cast<const Half*>(data)[index]);
  return to_float(static_cast<const BFloat16*>(data)[index]);
}

// `body(data)` with a pointer to the tensor's type. Around a loop: a choice of the type within it
// would have each load wait for the one before.
template <class Body>
EPT_BOTH void with_numbers(void* data, Type type, Body body) {
  if (type == Type::float32) return body(static_cast<float*>(data));
  if (type == Type::float16) return body(static_cast<Half*>(data));
  body(static_cast<BFloat16*>(data));
}

EPT_BOTH void store(void* data, Type type, int64_t index, float value) {
  with_numbers(data, type, [&]<class T>(T* its) { its[index] = from_float<T>(value); });
}

EPT_BOTH int64_t load_integer(const void* data, Type type, int64_t index) {
  if (type == Type::int64) return static_cast<const int64_t*>(data)[index];
  if (type == Type::int32) return static_cast<const int32_t*>(data)[index];
  if (type == Type::int16) return static_cast<const int16_t*>(data)[index];
  return static_cast<const int8_t*>(data)[index];
}

template <class Body>
EPT_BOTH void with_integers(const View& tensor, Body body) {
  if (tensor.type == Type::int64) return body(static_cast<const int64_t*>(tensor.data));
  if (tensor.type == Type::int32) return body(static_cast<const int32_t*>(tensor.data));
  if (tensor.type == Type::int16) return body(static_cast<const int16_t*>(tensor.data));
  body(static_cast<const int8_t*>(tensor.data));
}

// 16 bytes of neighbouring elements: what one instruction moves.
struct alignas(16) Packed {
  uint32_t word[4];
};

template <class T>
inline constexpr int packed_size = 16 / static_cast<int>(sizeof(T));

EPT_BOTH Packed load_packed(const void* data) {
#ifdef __CUDA_ARCH__
  return *static_cast<const Packed*>(data);
#else
#ifndef __CUDACC__
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) throw std::runtime_error("unaligned load");
#endif
  Packed packed;
  memcpy(&packed, data, sizeof packed);
  return packed;
#endif
}

EPT_BOTH void store_packed(void* data, const Packed& packed) {
#ifdef __CUDA_ARCH__
  *static_cast<Packed*>(data) = packed;
#else
#ifndef __CUDACC__
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) throw std::runtime_error("unaligned store");
#endif
  memcpy(data, &packed, sizeof packed);
#endif
}

template <class T>
EPT_BOTH float unpack(const Packed& packed, int index) {
  if constexpr (sizeof(T) == 4) {
    return float_of(packed.word[index]);
  } else {
    return to_float(T{static_cast<uint16_t>(packed.word[index / 2] >> (index % 2 * 16))});
  }
}

template <class T>
EPT_BOTH Packed pack(const float* values) {
  Packed packed;
  EPT_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      packed.word[i] = bits_of(values[i]);
    } else {
      const uint32_t low = from_float<T>(values[2 * i]).bits;
      packed.word[i] = low | uint32_t{from_float<T>(values[2 * i + 1]).bits} << 16;
    }
  }
  return packed;
}

}  // namespace ept
