// Two right kernels for the emulator's own tests, which plant a bug in each.
#pragma once

#include "device.h"

namespace vrthinker {

// out[b] = sum of block b's share of values, for any T; every thread of a block ends with the total.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    block_sum_kernel(const T* __restrict__ values, int count, T* __restrict__ out) {
    __shared__ T sums[kThreads / 32];
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    T sum = 0;
    for (int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i < count;
         i += static_cast<int>(gridDim.x) * kThreads) {
        sum += values[i];
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_down_sync(0xffffffffU, sum, distance);
    }
    if (lane == 0) {
        sums[warp] = sum;
    }
    __syncthreads();
    T total = 0;
    for (int i = 0; i < kThreads / 32; ++i) {
        total += sums[i];
    }
    if (threadIdx.x == 0) {
        out[blockIdx.x] = total;
    }
}

// Moves values[shift:count] to the front, in place, one block for all: a tile is read by all threads before
// any of them writes it.
__global__ void shift_kernel(int* values, int count, int shift) {
    const int threads = static_cast<int>(blockDim.x);
    for (int tile = 0; tile < count - shift; tile += threads) {
        const int to = tile + static_cast<int>(threadIdx.x);
        const bool moves = to + shift < count;
        const int value = moves ? values[to + shift] : 0;
        __syncthreads();
        if (moves) {
            values[to] = value;
        }
    }
}

}  // namespace vrthinker
