// `patchify` on a GPU. One block takes output rows (patches) in turn; its threads share a row. The table
// of normalised values travels with the launch and is copied to shared memory once per block.
#include <algorithm>

#include "launch.h"
#include "patchify/patchify.h"

namespace vrthinker {
namespace {

constexpr int kThreads = 160;  // patch 14: 147 packs of four per row, patch 16: 192
constexpr int kBlocksPerProcessor = 12;

template <typename Value>
struct DeviceTable {
    Value values[kTableSize];
};

template <typename Value, int kWidth>
__global__ void __launch_bounds__(kThreads)
    patchify_kernel(PatchifyShape shape, const std::uint8_t* __restrict__ frames,
                    const __grid_constant__ DeviceTable<Value> table, Value* __restrict__ out) {
    __shared__ Value values[kTableSize];
    for (int i = threadIdx.x; i < kTableSize; i += kThreads) {
        values[i] = table.values[i];
    }
    __syncthreads();
    for (std::int64_t row = blockIdx.x; row < shape.rows(); row += gridDim.x) {
        patchify_thread<Value, kWidth>(shape, frames, values, out, row, threadIdx.x, kThreads);
    }
}

}  // namespace

template <typename Value>
const char* patchify_cuda(const PatchifyShape& shape, const std::uint8_t* frames,
                          const PatchifyTable<Value>& table, Value* out, int device, std::uintptr_t stream) {
    if (shape.rows() == 0) {
        return nullptr;
    }
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) {
        return describe(guard.status());
    }
    DeviceTable<Value> values;
    std::copy(table.begin(), table.end(), values.values);
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(
        shape.rows(), static_cast<std::int64_t>(processor_count(device)) * kBlocksPerProcessor));
    auto* const cuda_stream = as_stream(stream);
    if (shape.area() % 4 == 0) {
        patchify_kernel<Value, 4><<<blocks, kThreads, 0, cuda_stream>>>(shape, frames, values, out);
    } else {
        patchify_kernel<Value, 1><<<blocks, kThreads, 0, cuda_stream>>>(shape, frames, values, out);
    }
    return describe(cudaGetLastError());
}

template const char* patchify_cuda(const PatchifyShape&, const std::uint8_t*, const PatchifyTable<float>&,
                                   float*, int, std::uintptr_t);
template const char* patchify_cuda(const PatchifyShape&, const std::uint8_t*,
                                   const PatchifyTable<std::uint16_t>&, std::uint16_t*, int, std::uintptr_t);

}  // namespace vrthinker
