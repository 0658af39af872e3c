// The CUDA kernel of `group_advantage`: one launch for statistics, advantages, tokens and status.
//
// Block 0 counts bad values: were the others to add to a counter, a second launch would have to clear it
// first. The other blocks take groups in turn. A block's threads reduce a group together, then each warp
// writes whole episodes. Where has_batch_scale, every block takes the batch's statistics itself, in the same
// order.
//
// Invariant: whatever the offsets say, nothing is read or written out of bounds, and every output is written.
// Offsets are on the device, so the host can't have checked them. A group or token range with a bad offset
// becomes NaN, and so do episodes and tokens that bad offsets leave uncovered. Where bad offsets make ranges
// overlap, which value wins is not defined; the status tells.
#pragma once

#include "group_advantage/group_advantage_math.h"

#ifdef VRTHINKER_KERNELS_HERE

namespace vrthinker {

inline constexpr unsigned kAllLanes = 0xffffffffU;

__device__ inline double exchanged(double value, int distance) {
    return __shfl_xor_sync(kAllLanes, value, distance);
}

__device__ inline Tally exchanged(const Tally& tally, int distance) {
    Tally other;
    other.sum = __shfl_xor_sync(kAllLanes, tally.sum, distance);
    other.lowest = __shfl_xor_sync(kAllLanes, tally.lowest, distance);
    other.highest = __shfl_xor_sync(kAllLanes, tally.highest, distance);
    other.count = __shfl_xor_sync(kAllLanes, tally.count, distance);
    other.bad = __shfl_xor_sync(kAllLanes, tally.bad, distance);
    return other;
}

// Every thread of the block gets the merged value; `shared` has kWarps places. Two exchanging lanes add the
// same two numbers, and addition commutes, so all end with the same bits: those of the tree.
template <typename Partial>
__device__ inline Partial block_fold(Partial mine, Partial* shared) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        merge(mine, exchanged(mine, distance));
    }
    if (lane == 0) {
        shared[warp] = mine;
    }
    __syncthreads();
    mine = shared[lane % kWarps];
    __syncthreads();  // before the next fold writes
    for (int distance = kWarps / 2; distance > 0; distance /= 2) {
        merge(mine, exchanged(mine, distance));
    }
    return mine;
}

template <typename Real>
__device__ inline Tally tally_by_block(const AdvantageTask<Real>& task, Range range, Tally* shared) {
    Tally tally = Tally::empty();
    for (std::int64_t i = range.begin + threadIdx.x; i < range.end; i += kLanes) {
        tally.add(task, i);
    }
    return block_fold(tally, shared);
}

template <typename Real>
__device__ inline double scale_by_block(const AdvantageTask<Real>& task, Range range, const Tally& tally,
                                        double* shared) {
    const double mean = tally.mean();
    double squares = 0.0;
    for (std::int64_t i = range.begin + threadIdx.x; i < range.end; i += kLanes) {
        squares += squared_deviation(task, i, mean);
    }
    return std::sqrt(tally.variance(block_fold(squares, shared), task.ddof)) + task.eps;
}

// A thread takes whole groups: groups are small, and there are many.
template <typename Real>
__device__ inline double batch_scale_by_block(const AdvantageTask<Real>& task, Tally* tallies, double* sums) {
    const Range all{0, task.episodes};
    const Tally tally = tally_by_block(task, all, tallies);
    if (task.method == AdvantageMethod::kBatchStd) {
        return scale_by_block(task, all, tally, sums);
    }
    double squares = 0.0;
    for (std::int64_t group = threadIdx.x; group < task.groups; group += kLanes) {
        squares += squares_within(task, group);
    }
    return std::sqrt(tally.variance(block_fold(squares, sums), task.ddof) + task.eps);
}

template <typename Real>
struct alignas(16) TokenPack {
    static constexpr int kWidth = 16 / sizeof(Real);
    Real values[kWidth];
};

// out[begin:end] = value by one warp, 16 bytes a store but for the ends.
template <typename Real>
__device__ inline void fill_by_warp(Real* out, Range range, Real value) {
    constexpr int kWidth = TokenPack<Real>::kWidth;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto place = reinterpret_cast<std::uintptr_t>(out + range.begin) / sizeof(Real);
    const auto unaligned = static_cast<std::int64_t>((kWidth - place % kWidth) % kWidth);
    const std::int64_t first = unaligned < range.end - range.begin ? range.begin + unaligned : range.end;
    const std::int64_t last = first + (range.end - first) / kWidth * kWidth;
    TokenPack<Real> pack;
    for (int i = 0; i < kWidth; ++i) {
        pack.values[i] = value;
    }
    if (range.begin + lane < first) {
        out[range.begin + lane] = value;
    }
    for (std::int64_t i = first + lane * kWidth; i < last; i += kWarp * kWidth) {
        *reinterpret_cast<TokenPack<Real>*>(out + i) = pack;
    }
    if (last + lane < range.end) {
        out[last + lane] = value;
    }
}

template <typename Real>
__device__ inline void write_group(const AdvantageTask<Real>& task, Range range, const Baseline& baseline) {
    if (!task.token_offsets.given()) {
        for (std::int64_t i = range.begin + threadIdx.x; i < range.end; i += kLanes) {
            task.advantages[i] = baseline.advantage(task, i);
        }
        return;
    }
    for (std::int64_t i = range.begin + threadIdx.x / kWarp; i < range.end; i += kWarps) {
        const bool bad = task.bad_token_offset(i) || task.bad_token_offset(i + 1);
        const Real value = bad ? static_cast<Real>(kNan) : baseline.advantage(task, i);
        fill_by_warp(task.advantages, clamped_range(task.token_offsets, i, task.n_tokens), value);
    }
}

// Tokens before the first and behind the last episode's; shared out over the blocks that take groups.
template <typename Real>
__device__ inline void write_uncovered_tokens(const AdvantageTask<Real>& task) {
    const std::int64_t first = clamped(task.token_offsets[0], task.n_tokens);
    const std::int64_t last = clamped(task.token_offsets[task.episodes], task.n_tokens);
    const Real nan = static_cast<Real>(kNan);
    const Real before = task.bad_token_offset(0) ? nan : Real{0};
    const Real behind = task.bad_token_offset(task.episodes) ? nan : Real{0};
    const std::int64_t mine = static_cast<std::int64_t>(blockIdx.x - 1) * kLanes + threadIdx.x;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x - 1) * kLanes;
    for (std::int64_t i = mine; i < first; i += step) {
        task.advantages[i] = before;
    }
    for (std::int64_t i = last + mine; i < task.n_tokens; i += step) {
        task.advantages[i] = behind;
    }
}

template <typename Real>
__device__ inline void count_bad_values(const AdvantageTask<Real>& task, Tally* shared) {
    Tally tally = Tally::empty();
    for (std::int64_t i = threadIdx.x; i < task.episodes; i += kLanes) {
        tally.add(task, i);
    }
    for (std::int64_t k = threadIdx.x; k <= task.groups; k += kLanes) {
        tally.bad += task.bad_group_offset(k) ? 1 : 0;
    }
    if (task.token_offsets.given()) {
        for (std::int64_t k = threadIdx.x; k <= task.episodes; k += kLanes) {
            tally.bad += task.bad_token_offset(k) ? 1 : 0;
        }
    }
    tally = block_fold(tally, shared);
    if (threadIdx.x == 0) {
        *task.status = static_cast<std::int32_t>(tally.bad < kMaxStatus ? tally.bad : kMaxStatus);
    }
}

// Launch with kLanes threads and at least two blocks. Parts [0, groups) are the groups; the last two are the
// episodes before the first and behind the last offset, of which there are none where the offsets are right.
template <typename Real>
__global__ void __launch_bounds__(kLanes) group_advantage_kernel(AdvantageTask<Real> task) {
    __shared__ Tally tallies[kWarps];
    __shared__ double sums[kWarps];
    if (blockIdx.x == 0) {
        count_bad_values(task, tallies);
        return;
    }
    const double batch_scale = has_batch_scale(task.method) ? batch_scale_by_block(task, tallies, sums) : 1.0;
    for (std::int64_t part = blockIdx.x - 1; part < task.groups + 2; part += gridDim.x - 1) {
        Baseline baseline;
        if (part >= task.groups) {
            baseline.poisoned = true;
            const Range range =
                part == task.groups
                    ? Range{0, clamped(task.group_offsets[0], task.episodes)}
                    : Range{clamped(task.group_offsets[task.groups], task.episodes), task.episodes};
            write_group(task, range, baseline);
            continue;
        }
        const Range range = clamped_range(task.group_offsets, part, task.episodes);
        const Tally tally = tally_by_block(task, range, tallies);
        baseline.mean = tally.mean();
        baseline.sum = tally.sum;
        baseline.others = static_cast<double>(tally.count - 1);
        baseline.poisoned = tally.bad > 0 || task.bad_group_offset(part) || task.bad_group_offset(part + 1);
        baseline.flat = tally.is_flat();
        baseline.scale = task.method == AdvantageMethod::kGrpo && !baseline.flat
                             ? scale_by_block(task, range, tally, sums)
                             : batch_scale;
        write_group(task, range, baseline);
        if (threadIdx.x == 0) {
            task.zero_variance[part] = baseline.flat && !baseline.poisoned ? 1 : 0;
        }
    }
    if (task.token_offsets.given()) {
        write_uncovered_tokens(task);
    }
}

}  // namespace vrthinker

#endif
