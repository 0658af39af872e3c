// The launch of `group_advantage` on a GPU (group_advantage_kernel.h).
#include <algorithm>

#include "group_advantage/group_advantage.h"
#include "group_advantage/group_advantage_kernel.h"
#include "launch.h"

namespace vrthinker {
namespace {

constexpr int kBlocksPerProcessor = 8;
// Where has_batch_scale, every block reads the whole batch first, so fewer blocks with more groups each.
constexpr int kBatchBlocksPerProcessor = 2;

}  // namespace

template <typename Real>
const char* group_advantage_cuda(const AdvantageTask<Real>& task, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) {
        return describe(guard.status());
    }
    const std::int64_t per_processor =
        has_batch_scale(task.method) ? kBatchBlocksPerProcessor : kBlocksPerProcessor;
    const auto workers = static_cast<unsigned>(
        std::min<std::int64_t>(task.groups + 2, processor_count(device) * per_processor));
    group_advantage_kernel<Real><<<workers + 1, kLanes, 0, as_stream(stream)>>>(task);
    return describe(cudaGetLastError());
}

template const char* group_advantage_cuda(const AdvantageTask<float>&, int, std::uintptr_t);
template const char* group_advantage_cuda(const AdvantageTask<double>&, int, std::uintptr_t);

}  // namespace vrthinker
