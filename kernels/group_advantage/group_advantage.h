// The native versions of `group_advantage`. Callers have checked shapes, types and devices
// (csrc/group_advantage.cpp); the values are checked here.
#pragma once

#include <cstdint>
#include <optional>

#include "group_advantage/group_advantage_math.h"

namespace vrthinker {

// The first bad value of a call.
struct AdvantageProblem {
    enum class Kind { kGroupOffset, kTokenOffset, kReward } kind;
    std::int64_t index;
    std::int64_t offset;  // of the offset kinds
    double reward;        // of kReward
};

// Looks at every offset and every valid reward, in this order.
template <typename Real>
std::optional<AdvantageProblem> find_problem(const AdvantageTask<Real>& task);

// Fills advantages and zero_variance on up to `threads` threads. `find_problem` found none.
template <typename Real>
void group_advantage_cpu(const AdvantageTask<Real>& task, int threads);

#ifdef VRTHINKER_WITH_CUDA
// Queues the kernel on `stream` of `device`; returns nullptr, or CUDA's description of what went wrong. Bad
// values are counted in task.status (see group_advantage_kernel.h).
template <typename Real>
const char* group_advantage_cuda(const AdvantageTask<Real>& task, int device, std::uintptr_t stream);
#endif

}  // namespace vrthinker
