// What a kernel's header needs to be compiled in three ways: by nvcc for a GPU, by a host compiler as plain
// functions (index arithmetic, element types), and by a host compiler behind the fiber emulator of
// tests/native/emulator/, which runs whole kernels on a CPU.
//
// VRTHINKER_KERNELS_HERE is defined where `__global__` functions can be compiled. Nothing in here computes
// with a fused multiply-add: all three give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VRTHINKER_UNROLL _Pragma("unroll")
#else
#define VRTHINKER_UNROLL
#endif

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VRTHINKER_HOST_DEVICE __host__ __device__
#define VRTHINKER_KERNELS_HERE 1
#elif defined(VRTHINKER_EMULATE)
#include "emulator.h"
#define VRTHINKER_HOST_DEVICE
#define VRTHINKER_KERNELS_HERE 1
#else
#define VRTHINKER_HOST_DEVICE
#endif

namespace vrthinker {

// Element types as storage. Widening is exact; narrowing rounds to nearest, ties to even.
struct Float32 {
    using Storage = float;
    VRTHINKER_HOST_DEVICE static float widen(float value) { return value; }
    VRTHINKER_HOST_DEVICE static float narrow(float value) { return value; }
};

VRTHINKER_HOST_DEVICE inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

VRTHINKER_HOST_DEVICE inline float float_of_bits(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct BFloat16 {
    using Storage = std::uint16_t;
    VRTHINKER_HOST_DEVICE static float widen(std::uint16_t value) {
        return float_of_bits(static_cast<std::uint32_t>(value) << 16);
    }
    VRTHINKER_HOST_DEVICE static std::uint16_t narrow(float value) {
        const std::uint32_t bits = float_bits(value);
        if ((bits & 0x7fffffffU) > 0x7f800000U) {
            return static_cast<std::uint16_t>((bits >> 16) | 0x40U);  // NaN stays NaN
        }
        return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
    }
};

struct Float16 {
    using Storage = std::uint16_t;
#if defined(__CUDA_ARCH__)
    __device__ static float widen(std::uint16_t value) { return __half2float(__ushort_as_half(value)); }
    __device__ static std::uint16_t narrow(float value) { return __half_as_ushort(__float2half_rn(value)); }
#else
    static float widen(std::uint16_t value) {
        const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000U) << 16;
        const std::uint32_t rest = value & 0x7fffU;
        if (rest >= 0x7c00U) {  // infinity, NaN
            return float_of_bits(sign | 0x7f800000U | ((rest & 0x3ffU) << 13));
        }
        if (rest >= 0x400U) {
            return float_of_bits(sign | ((rest << 13) + ((127U - 15U) << 23)));
        }
        // Zero and subnormals: rest * 2^-24, exact in float32.
        return float_of_bits(sign | float_bits(static_cast<float>(rest) * float_of_bits(0x33800000U)));
    }
    static std::uint16_t narrow(float value) {
        const std::uint32_t bits = float_bits(value);
        const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
        const std::uint32_t rest = bits & 0x7fffffffU;
        if (rest > 0x7f800000U) {
            return static_cast<std::uint16_t>(sign | 0x7e00U);
        }
        if (rest >= 0x477ff000U) {  // 65520 and above round to infinity
            return static_cast<std::uint16_t>(sign | 0x7c00U);
        }
        if (rest >= 0x38800000U) {  // normal in half precision
            const std::uint32_t rounded = rest + 0xfffU + ((rest >> 13) & 1U);
            return static_cast<std::uint16_t>(sign | ((rounded - ((127U - 15U) << 23)) >> 13));
        }
        // Subnormal: adding 0.5 shifts the value so that float32's own rounding is the one that is wanted.
        const float shifted = float_of_bits(rest) + 0.5F;
        return static_cast<std::uint16_t>(sign | (float_bits(shifted) - 0x3f000000U));
    }
#endif
};

}  // namespace vrthinker
