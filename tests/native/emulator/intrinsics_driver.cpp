// The emulated intrinsics against what CUDA's programming guide says of them.
#include <cstdint>
#include <memory>

#include "device.h"

namespace {

using vrthinker::emulator::launch;

constexpr unsigned kAll = 0xffffffffU;

__global__ void lanes_kernel(int* failed) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int part = lane / 8 * 8;
    const auto expect = [&](bool holds, int check) {
        if (!holds) {
            failed[check] += 1;
        }
    };
    expect(__shfl_sync(kAll, lane, 3) == 3, 0);
    expect(__shfl_sync(kAll, lane, 11, 8) == part + 3, 1);
    expect(__shfl_xor_sync(kAll, lane, 16) == (lane ^ 16), 2);
    expect(__shfl_xor_sync(kAll, lane, 8, 8) == ((lane ^ 8) < lane ? (lane ^ 8) : lane), 3);
    expect(__shfl_down_sync(kAll, lane, 5) == (lane + 5 < 32 ? lane + 5 : lane), 4);
    expect(__shfl_down_sync(kAll, lane, 5, 8) == (lane + 5 < part + 8 ? lane + 5 : lane), 5);
    expect(__shfl_up_sync(kAll, lane, 5, 8) == (lane - 5 >= part ? lane - 5 : lane), 6);
    expect(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249U, 7);
    expect(__any_sync(kAll, lane == 31) != 0 && __any_sync(kAll, 0) == 0, 8);
    expect(__all_sync(kAll, 1) != 0 && __all_sync(kAll, lane < 31) == 0, 9);
    expect(__shfl_xor_sync(kAll, lane * 0.5, 1) == (lane ^ 1) * 0.5, 10);
    if (lane < 4) {  // part of a warp, by its mask; a lane outside of it brings nothing
        expect(__shfl_sync(0xfU, lane, 2) == 2, 11);
        expect(__shfl_sync(0xfU, lane, 20) == -1, 12);
        __syncwarp(0xfU);
    }
    if (lane % 2 == 0) {
        __syncwarp();
    } else {
        __syncwarp();
    }
}

template <typename T>
__global__ void atomics_kernel(T* sum, T* most, unsigned* bits) {
    atomicAdd(sum, static_cast<T>(threadIdx.x));
    atomicMax(most, static_cast<T>(blockIdx.x * blockDim.x + threadIdx.x));
    atomicOr(bits, 1U << threadIdx.x % 32);
}

// Shared memory at a block's start, in and out of a template.
template <typename T>
__global__ void garbage_kernel(int* clean) {
    __shared__ T values[5];
    static constexpr int kTable[2] = {1, 2};
    if (threadIdx.x == 0) {
        for (auto& value : values) {
            std::uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            clean[0] += bits != 0xffffffffU;
            value = 0;
        }
        clean[0] += kTable[blockIdx.x % 2] != static_cast<int>(blockIdx.x % 2) + 1;
    }
}

__global__ void plain_garbage_kernel(int* clean) {
    __shared__ int value;
    if (threadIdx.x == 0) {
        clean[0] += value != -1;
        value = 0;
    }
}

// Every thread of the launch once, with the coordinates that CUDA gives it.
__global__ void coordinates_kernel(int* seen) {
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    seen[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

template <typename T>
int count_wrong_atomics(unsigned seed) {
    T sum = 0;
    T most = 0;
    unsigned bits = 0;
    launch(3, 40, seed, atomics_kernel<T>, &sum, &most, &bits);
    return (sum != T(3 * 780)) + (most != T(119)) + (bits != kAll);
}

}  // namespace

int main() {
    int failures = 0;
    for (unsigned seed = 0; seed < 20; ++seed) {
        int failed[13] = {};
        launch(2, 64, seed, lanes_kernel, failed);
        for (int check = 0; check < 13; ++check) {
            if (failed[check] != 0) {
                std::printf("check %d failed in %d threads, seed %u\n", check, failed[check], seed);
                failures += 1;
            }
        }
        failures += count_wrong_atomics<int>(seed) + count_wrong_atomics<unsigned>(seed) +
                    count_wrong_atomics<float>(seed) + count_wrong_atomics<double>(seed);
        int clean = 0;
        launch(4, 32, seed, garbage_kernel<float>, &clean);
        launch(4, 32, seed, garbage_kernel<std::uint32_t>, &clean);
        launch(4, 32, seed, plain_garbage_kernel, &clean);
        failures += clean;
        int seen[2 * 3 * 2 * 4 * 2 * 5] = {};
        launch({2, 3, 2}, {4, 2, 5}, seed, coordinates_kernel, seen);
        for (const int times : seen) {
            failures += times != 1;
        }
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
