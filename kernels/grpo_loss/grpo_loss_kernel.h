// The CUDA kernels of `grpo_loss`, two launches:
//   1. grpo_count_kernel: learned tokens of every episode (for episode_mean only), and a ticket at 0;
//   2. grpo_loss_kernel: one pass over the logprobs. A block takes a tile of tokens and leaves its sums; the
//      block that takes the last ticket adds up all tiles, in their order, so equal inputs give equal bits.
// Offsets are data on the device that nobody has checked: they choose an episode or bound a count, both
// clamped, and never index a token.
#pragma once

#include <cstdint>

#include "device.h"
#include "grpo_loss/grpo_loss.h"

#ifdef VRTHINKER_KERNELS_HERE

namespace vrthinker {

// Where the parts of the workspace lie. The last is a 4-byte ticket.
struct GrpoWorkspace {
    std::int64_t* learned;   // [episodes]
    GrpoSums<float>* tiles;  // [tiles]
    unsigned int* ticket;
};

inline GrpoWorkspace grpo_workspace(void* memory, std::int64_t tokens, std::int64_t episodes) {
    auto* const learned = static_cast<std::int64_t*>(memory);
    auto* const tiles = reinterpret_cast<GrpoSums<float>*>(learned + episodes);
    const std::int64_t count = grpo_tiles(tokens) > 0 ? grpo_tiles(tokens) : 1;
    return {learned, tiles, reinterpret_cast<unsigned int*>(tiles + count)};
}

inline __device__ float load_logprob(const Logprobs& column, std::int64_t token) {
    const std::int64_t at = token * column.stride;
    if (column.type == LogprobType::kFloat32) {
        return static_cast<const float*>(column.data)[at];
    }
    const std::uint16_t bits = static_cast<const std::uint16_t*>(column.data)[at];
    return column.type == LogprobType::kBFloat16 ? BFloat16::widen(bits) : Float16::widen(bits);
}

inline __device__ GrpoGap gap_of(float d) {
    const float expm1 = expm1f(d);
    const bool near = d >= -0.34F && d <= 0.34F;
    return {expm1, near ? exp_tail(d) * (d * d) : expm1 - d};
}

inline __device__ std::int64_t clamp_to_tokens(std::int64_t offset, std::int64_t tokens) {
    return offset < 0 ? 0 : (offset > tokens ? tokens : offset);
}

// Adds up the sums of a warp's lanes; lane 0 has the result.
template <typename Real>
__device__ inline void warp_add(GrpoSums<Real>& sums) {
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        sums.loss += __shfl_down_sync(0xffffffffU, sums.loss, distance);
        sums.ratio += __shfl_down_sync(0xffffffffU, sums.ratio, distance);
        sums.kl += __shfl_down_sync(0xffffffffU, sums.kl, distance);
        sums.tokens += __shfl_down_sync(0xffffffffU, sums.tokens, distance);
        sums.low += __shfl_down_sync(0xffffffffU, sums.low, distance);
        sums.high += __shfl_down_sync(0xffffffffU, sums.high, distance);
        sums.largest_ratio =
            larger_or_nan(sums.largest_ratio, __shfl_down_sync(0xffffffffU, sums.largest_ratio, distance));
    }
}

template <typename Real, typename Other>
__device__ inline void add_sums(GrpoSums<Real>& sums, const GrpoSums<Other>& other) {
    sums.loss += other.loss;
    sums.ratio += other.ratio;
    sums.kl += other.kl;
    sums.tokens += other.tokens;
    sums.low += other.low;
    sums.high += other.high;
    sums.largest_ratio = larger_or_nan(sums.largest_ratio, static_cast<Real>(other.largest_ratio));
}

__global__ void __launch_bounds__(kGrpoThreads) grpo_count_kernel(GrpoInput in, GrpoWorkspace workspace) {
    __shared__ int warp_counts[kGrpoThreads / 32];
    const int thread = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && thread == 0) {
        *workspace.ticket = 0;
    }
    if (in.aggregation != Aggregation::kEpisodeMean) {
        return;
    }
    for (std::int64_t episode = blockIdx.x; episode < in.episodes; episode += gridDim.x) {
        const std::int64_t begin = clamp_to_tokens(in.offsets[episode * in.offset_stride], in.tokens);
        const std::int64_t end = clamp_to_tokens(in.offsets[(episode + 1) * in.offset_stride], in.tokens);
        int count = 0;
        for (std::int64_t i = begin + thread; i < end; i += kGrpoThreads) {
            count += in.mask[i * in.mask_stride] != 0 ? 1 : 0;
        }
        for (unsigned distance = 16; distance > 0; distance /= 2) {
            count += __shfl_down_sync(0xffffffffU, count, distance);
        }
        if (thread % 32 == 0) {
            warp_counts[thread / 32] = count;
        }
        __syncthreads();
        if (thread == 0) {
            std::int64_t learned = 0;
            for (int warp = 0; warp < kGrpoThreads / 32; ++warp) {
                learned += warp_counts[warp];
            }
            workspace.learned[episode] = learned;
        }
        __syncthreads();  // before the next episode's counts are written
    }
}

__global__ void __launch_bounds__(kGrpoThreads)
    grpo_loss_kernel(GrpoInput in, GrpoOutput out, GrpoWorkspace workspace) {
    constexpr int kWarps = kGrpoThreads / 32;
    __shared__ GrpoSums<float> warp_sums[kWarps];
    __shared__ GrpoSums<double> final_sums[kWarps];
    __shared__ double final_episodes[kWarps];
    __shared__ bool is_last;
    const int thread = static_cast<int>(threadIdx.x);

    GrpoSums<float> sums{};
    std::int64_t episode = 0;
    const bool needs_episode = in.advantage_per_episode || in.aggregation == Aggregation::kEpisodeMean;
    for (int step = 0; step < kGrpoTokensPerThread; ++step) {
        const std::int64_t token =
            static_cast<std::int64_t>(blockIdx.x) * kGrpoTile + step * kGrpoThreads + thread;
        if (token >= in.tokens) {
            break;
        }
        if (in.mask[token * in.mask_stride] == 0) {
            out.token_loss[token] = 0.0F;
            out.gradient[token] = 0.0F;
            continue;
        }
        if (needs_episode) {
            episode = episode_of_token(in, token, episode);
        }
        const float policy = load_logprob(in.policy, token);
        const float advantage =
            in.advantages[(in.advantage_per_episode ? episode : token) * in.advantage_stride];
        const float old_policy = load_logprob(in.old_policy, token);
        const float ratio = expf(policy - old_policy);
        GrpoToken one;
        if (in.reference.data != nullptr) {
            const float reference = load_logprob(in.reference, token);
            const bool finite = grpo_is_finite<true>(policy, old_policy, reference, advantage, in.clip);
            one = grpo_token<true>(ratio, gap_of(reference - policy), advantage, finite, in.clip);
        } else {
            const bool finite = grpo_is_finite<false>(policy, old_policy, 0.0F, advantage, in.clip);
            one = grpo_token<false>(ratio, GrpoGap{}, advantage, finite, in.clip);
        }
        float weight = 1.0F;
        if (in.aggregation == Aggregation::kEpisodeMean) {
            const std::int64_t learned = workspace.learned[episode];
            weight = 1.0F / static_cast<float>(learned > 0 ? learned : 1);  // 0 only if offsets are wrong
        }
        out.token_loss[token] = one.loss;
        out.gradient[token] = one.gradient * weight;
        sums.loss += one.loss * weight;
        sums.ratio += ratio;
        sums.kl += one.kl;
        sums.tokens += 1.0F;
        sums.low += one.low;
        sums.high += one.high;
        sums.largest_ratio = larger_or_nan(sums.largest_ratio, ratio);
    }

    warp_add(sums);
    if (thread % 32 == 0) {
        warp_sums[thread / 32] = sums;
    }
    __syncthreads();
    if (thread == 0) {
        GrpoSums<float> tile{};
        for (int warp = 0; warp < kWarps; ++warp) {
            add_sums(tile, warp_sums[warp]);
        }
        workspace.tiles[blockIdx.x] = tile;
        __threadfence();  // the tile is seen by whoever sees the ticket
        is_last = atomicAdd(workspace.ticket, 1U) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) {
        return;
    }

    GrpoSums<double> total{};
    for (std::int64_t tile = thread; tile < gridDim.x; tile += kGrpoThreads) {
        const volatile GrpoSums<float>& from = workspace.tiles[tile];  // other blocks' writes, past the L1
        GrpoSums<float> part{};
        part.loss = from.loss;
        part.ratio = from.ratio;
        part.kl = from.kl;
        part.tokens = from.tokens;
        part.low = from.low;
        part.high = from.high;
        part.largest_ratio = from.largest_ratio;
        add_sums(total, part);
    }
    double episodes = 0.0;
    for (std::int64_t i = thread; i < in.episodes; i += kGrpoThreads) {
        episodes += in.aggregation != Aggregation::kEpisodeMean || workspace.learned[i] > 0 ? 1.0 : 0.0;
    }
    warp_add(total);
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        episodes += __shfl_down_sync(0xffffffffU, episodes, distance);
    }
    if (thread % 32 == 0) {
        final_sums[thread / 32] = total;
        final_episodes[thread / 32] = episodes;
    }
    __syncthreads();
    if (thread == 0) {
        for (int warp = 1; warp < kWarps; ++warp) {
            add_sums(total, final_sums[warp]);
            episodes += final_episodes[warp];
        }
        grpo_finish(in, total, episodes, out);
    }
}

}  // namespace vrthinker

#endif
