// The CUDA names that kernels use, over the emulator's machine. Included by emulator.h.
//
// Where CUDA leaves a result undefined (a shuffle from a lane that the mask does not name), all its bits are
// set: NaN, or -1.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "machine.h"

inline const uint3& threadIdx = vrthinker::emulator::now.thread;
inline const uint3& blockIdx = vrthinker::emulator::now.block;
inline const dim3& blockDim = vrthinker::emulator::now.block_size;
inline const dim3& gridDim = vrthinker::emulator::now.grid_size;
inline constexpr int warpSize = 32;

using std::max;
using std::min;

inline void __syncthreads(vrthinker::emulator::Site site = std::source_location::current()) {
    vrthinker::emulator::machine.meet({.intrinsic = "__syncthreads", .site = site});
}

inline void __syncwarp(unsigned mask = 0xffffffffU,
                       vrthinker::emulator::Site site = std::source_location::current()) {
    // Lanes may come from different branches: that is what it is for.
    vrthinker::emulator::machine.meet(
        {.intrinsic = "__syncwarp", .mask = mask, .same_site = false, .site = site});
}

namespace vrthinker::emulator {

template <typename T>
T exchange(const char* intrinsic, unsigned mask, T value, unsigned source, Site site) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint64_t));
    Wait wait{.intrinsic = intrinsic, .mask = mask, .site = site};
    std::memcpy(&wait.value, &value, sizeof value);
    const std::uint64_t heard = machine.meet(wait)[source];
    std::memcpy(&value, &heard, sizeof value);
    return value;
}

inline unsigned votes(const char* intrinsic, unsigned mask, bool vote, Site site) {
    const Lanes& lanes = machine.meet({.intrinsic = intrinsic, .mask = mask, .site = site, .value = vote});
    unsigned result = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
        result |= static_cast<unsigned>((mask >> i & 1U) != 0 && lanes[i] != 0) << i;
    }
    return result;
}

// An atomic operation on memory; afterwards the others may run.
template <typename T, typename Change>
T atomically(T* address, Change change) {
    const T old = *address;
    *address = change(old);
    machine.yield();
    return old;
}

template <typename T>
using Same = std::type_identity_t<T>;

}  // namespace vrthinker::emulator

// Shuffles. `width` (a power of two) cuts the warp into parts that do not see each other.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              vrthinker::emulator::Site site = std::source_location::current()) {
    const unsigned lane = vrthinker::emulator::machine.lane();
    const auto part = static_cast<unsigned>(width);
    const unsigned from = (lane & ~(part - 1)) | (static_cast<unsigned>(source) & (part - 1));
    return vrthinker::emulator::exchange("__shfl_sync", mask, value, from, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  vrthinker::emulator::Site site = std::source_location::current()) {
    const unsigned lane = vrthinker::emulator::machine.lane();
    const unsigned last = lane | (static_cast<unsigned>(width) - 1);
    const unsigned from = lane ^ static_cast<unsigned>(lane_mask);
    return vrthinker::emulator::exchange("__shfl_xor_sync", mask, value, from > last ? lane : from, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   vrthinker::emulator::Site site = std::source_location::current()) {
    const unsigned lane = vrthinker::emulator::machine.lane();
    const unsigned last = lane | (static_cast<unsigned>(width) - 1);
    const unsigned from = lane + delta > last ? lane : lane + delta;
    return vrthinker::emulator::exchange("__shfl_down_sync", mask, value, from, site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 vrthinker::emulator::Site site = std::source_location::current()) {
    const unsigned lane = vrthinker::emulator::machine.lane();
    const unsigned first = lane & ~(static_cast<unsigned>(width) - 1);
    const unsigned from = lane < first + delta ? lane : lane - delta;
    return vrthinker::emulator::exchange("__shfl_up_sync", mask, value, from, site);
}

inline unsigned __ballot_sync(unsigned mask, int vote,
                              vrthinker::emulator::Site site = std::source_location::current()) {
    return vrthinker::emulator::votes("__ballot_sync", mask, vote != 0, site);
}

inline int __any_sync(unsigned mask, int vote,
                      vrthinker::emulator::Site site = std::source_location::current()) {
    return vrthinker::emulator::votes("__any_sync", mask, vote != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int vote,
                      vrthinker::emulator::Site site = std::source_location::current()) {
    return vrthinker::emulator::votes("__all_sync", mask, vote != 0, site) == mask;
}

template <typename T>
T atomicAdd(T* address, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T old) { return static_cast<T>(old + value); });
}

template <typename T>
T atomicMax(T* address, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T old) { return std::max(old, value); });
}

template <typename T>
T atomicMin(T* address, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T old) { return std::min(old, value); });
}

template <typename T>
T atomicOr(T* address, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T old) { return old | value; });
}

template <typename T>
T atomicAnd(T* address, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T old) { return old & value; });
}

template <typename T>
T atomicExch(T* address, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T) { return value; });
}

template <typename T>
T atomicCAS(T* address, vrthinker::emulator::Same<T> compare, vrthinker::emulator::Same<T> value) {
    return vrthinker::emulator::atomically(address, [&](T old) { return old == compare ? value : old; });
}

inline void __threadfence() {}

template <typename T>
T __ldg(const T* address) {
    return *address;
}

inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}

inline int __ffs(int value) {
    return __builtin_ffs(value);
}

inline int __clz(int value) {
    return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
