// `grpo_loss` on a GPU: the launches. The kernels are in grpo_loss_kernel.h.
#include <algorithm>
#include <limits>

#include "grpo_loss/grpo_loss_kernel.h"
#include "launch.h"

namespace vrthinker {

const char* grpo_loss_cuda(const GrpoInput& in, const GrpoOutput& out, void* workspace, int device,
                           std::uintptr_t stream) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) {
        return describe(guard.status());
    }
    const GrpoWorkspace parts = grpo_workspace(workspace, in.tokens, in.episodes);
    const std::int64_t counting =
        in.aggregation == Aggregation::kEpisodeMean
            ? std::clamp<std::int64_t>(in.episodes, 1, static_cast<std::int64_t>(processor_count(device)) * 8)
            : 1;
    // Without tokens one block runs all the same: it fills the scalars.
    const std::int64_t tiles = std::max<std::int64_t>(grpo_tiles(in.tokens), 1);
    if (tiles > std::numeric_limits<std::int32_t>::max()) {
        return "too many tokens for one launch";
    }
    auto* const cuda_stream = as_stream(stream);
    grpo_count_kernel<<<static_cast<unsigned>(counting), kGrpoThreads, 0, cuda_stream>>>(in, parts);
    grpo_loss_kernel<<<static_cast<unsigned>(tiles), kGrpoThreads, 0, cuda_stream>>>(in, out, parts);
    return describe(cudaGetLastError());
}

}  // namespace vrthinker
