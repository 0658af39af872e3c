// The native versions of `grpo_loss`: what they take, what they fill, and one token's arithmetic, which the
// C++ and the CUDA version share. Callers have checked every argument (csrc/grpo_loss.cpp).
#pragma once

#include <cstdint>

#include "device.h"
#include "exponential.h"

namespace vrthinker {

enum class LogprobType : std::int32_t { kFloat32, kBFloat16, kFloat16 };
enum class Aggregation : std::int32_t { kTokenMean, kEpisodeMean, kFixedLength };

// The order of the metrics vector (METRICS in reference.py).
enum GrpoMetric { kRatioMean, kRatioMax, kClipLow, kClipHigh, kClipTotal, kKlRef, kGrpoMetrics };

// [tokens] values; no data: the column is not there. Strides are in elements, of any sign.
struct Logprobs {
    const void* data;
    std::int64_t stride;
    LogprobType type;
};

struct GrpoClip {
    float lowest_ratio;
    float highest_ratio;
    float kl_weight;  // 0: the KL is measured, but no part of the loss
};

struct GrpoInput {
    Logprobs policy;
    Logprobs old_policy;
    Logprobs reference;  // may have no data
    const float* advantages;
    std::int64_t advantage_stride;
    const std::uint8_t* mask;
    std::int64_t mask_stride;
    const std::int64_t* offsets;  // [episodes + 1]
    std::int64_t offset_stride;
    std::int64_t tokens;
    std::int64_t episodes;
    GrpoClip clip;
    Aggregation aggregation;
    bool advantage_per_episode;
    double fixed_length;
    double normalizer;  // 0: counted here
};

struct GrpoOutput {
    float* loss;        // [1]
    float* token_loss;  // [tokens], contiguous
    float* gradient;    // [tokens], contiguous; times `scale` it is the gradient of the loss
    float* scale;       // [1]
    float* metrics;     // [kGrpoMetrics]
};

// What is added up over the learned tokens (largest_ratio: the largest, or NaN). No initialisers: shared
// memory of a kernel takes none; elsewhere it is made with {}.
template <typename Real>
struct GrpoSums {
    Real loss;
    Real ratio;
    Real kl;
    Real tokens;
    Real low;
    Real high;
    Real largest_ratio;
};

// The larger one, and NaN if either is NaN.
template <typename Real>
VRTHINKER_HOST_DEVICE inline Real larger_or_nan(Real value, Real other) {
    return other > value || other != other ? other : value;
}

// A selection that stays one: compilers turn a loop over `?:` into branches and then find no vector code.
VRTHINKER_HOST_DEVICE inline float choose(bool condition, float yes, float no) {
#if defined(__CUDA_ARCH__)
    return condition ? yes : no;
#else
    const std::uint32_t mask = 0U - static_cast<std::uint32_t>(condition);
    return float_of_bits((float_bits(yes) & mask) | (float_bits(no) & ~mask));
#endif
}

VRTHINKER_HOST_DEVICE inline bool is_finite(float value) {
    return (float_bits(value) & 0x7fffffffU) < 0x7f800000U;
}

// Whether everything that a learned token's loss is made of is a finite number.
template <bool kKl>
VRTHINKER_HOST_DEVICE inline bool grpo_is_finite(float policy, float old_policy, float reference,
                                                 float advantage, const GrpoClip& clip) {
    const float counted = kKl ? choose(clip.kl_weight != 0.0F, reference, 0.0F) : 0.0F;
    return is_finite(policy) & is_finite(old_policy) & is_finite(advantage) & is_finite(counted);
}

// What the KL term needs of d = ref - policy: e^d - 1, and k3 = e^d - 1 - d. Neither may be computed as a
// difference near 0, where hardly a digit of it would be right.
struct GrpoGap {
    float expm1;
    float k3;
};

struct GrpoToken {
    float loss;
    float gradient;
    float kl;
    float low;   // 1 or 0
    float high;  // 1 or 0
};

// One learned token. `ratio` is exp(policy - old); `gap` is ignored without kKl. Selections, not products: a
// clipped token has gradient 0 even if its ratio overflowed. An infinite logprob could be clipped away in the
// same way, so a token that is not `finite` (grpo_is_finite) is NaN.
template <bool kKl>
VRTHINKER_HOST_DEVICE inline GrpoToken grpo_token(float ratio, const GrpoGap& gap, float advantage,
                                                  bool finite, const GrpoClip& clip) {
    GrpoToken token;
    const bool below = ratio < clip.lowest_ratio;
    const bool above = ratio > clip.highest_ratio;
    // NaN is neither, and stays NaN.
    const float clipped = choose(below, clip.lowest_ratio, choose(above, clip.highest_ratio, ratio));
    const float unclipped_gain = ratio * advantage;
    const float clipped_gain = clipped * advantage;
    const float share = choose((below | above) & (unclipped_gain == clipped_gain), 0.5F, 1.0F);
    const bool clip_decides = unclipped_gain > clipped_gain;
    token.loss = -choose(clip_decides, clipped_gain, unclipped_gain);
    token.gradient = choose(clip_decides, 0.0F, -unclipped_gain * share);
    token.low = choose(below & (advantage < 0.0F), 1.0F, 0.0F);
    token.high = choose(above & (advantage > 0.0F), 1.0F, 0.0F);
    token.kl = 0.0F;
    if (kKl) {
        const bool counts = clip.kl_weight != 0.0F;
        token.kl = gap.k3;
        token.loss = choose(counts, token.loss + clip.kl_weight * token.kl, token.loss);
        token.gradient = choose(counts, token.gradient - clip.kl_weight * gap.expm1, token.gradient);
    }
    const float nan = float_of_bits(0x7fc00000U);
    token.loss = choose(finite, token.loss, nan);
    token.gradient = choose(finite, token.gradient, nan);
    return token;
}

// What `loss`, `scale` and `metrics` are once everything is added up. `episodes` are those that count.
VRTHINKER_HOST_DEVICE inline void grpo_finish(const GrpoInput& in, const GrpoSums<double>& sums,
                                              double episodes, const GrpoOutput& out) {
    double divisor = in.aggregation == Aggregation::kTokenMean ? sums.tokens : episodes;
    if (in.normalizer > 0.0) {
        divisor = in.normalizer;
    }
    if (in.aggregation == Aggregation::kFixedLength) {
        divisor *= in.fixed_length;
    }
    const double scale = divisor > 0.0 ? 1.0 / divisor : 0.0;
    *out.scale = static_cast<float>(scale);
    *out.loss = static_cast<float>(sums.loss * scale);
    const bool none = sums.tokens == 0.0;
    const double tokens = none ? 1.0 : sums.tokens;
    out.metrics[kRatioMean] = none ? 1.0F : static_cast<float>(sums.ratio / tokens);
    out.metrics[kRatioMax] = none ? 1.0F : static_cast<float>(sums.largest_ratio);
    out.metrics[kClipLow] = static_cast<float>(sums.low / tokens);
    out.metrics[kClipHigh] = static_cast<float>(sums.high / tokens);
    out.metrics[kClipTotal] = static_cast<float>((sums.low + sums.high) / tokens);
    out.metrics[kKlRef] = static_cast<float>(sums.kl / tokens);
}

// The episode that a token belongs to: how many have ended at or before it, found between `first` and the
// last. Whatever the offsets hold, the result is in [first, max(episodes - 1, first)].
VRTHINKER_HOST_DEVICE inline std::int64_t episode_of_token(const GrpoInput& in, std::int64_t token,
                                                           std::int64_t first) {
    std::int64_t low = first;
    std::int64_t high = in.episodes - 1;
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (in.offsets[(middle + 1) * in.offset_stride] <= token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Fills `out` on up to `threads` threads; the result does not depend on how many. Offsets ascend from 0 to
// `tokens`.
void grpo_loss_cpu(const GrpoInput& in, const GrpoOutput& out, int threads);

// A CUDA block's part of the tokens.
inline constexpr int kGrpoThreads = 256;
inline constexpr int kGrpoTokensPerThread = 4;
inline constexpr int kGrpoTile = kGrpoThreads * kGrpoTokensPerThread;

inline std::int64_t grpo_tiles(std::int64_t tokens) {
    return (tokens + kGrpoTile - 1) / kGrpoTile;
}

// Bytes of scratch memory that the CUDA version wants, 8-byte aligned: learned tokens per episode, sums per
// tile, a ticket.
inline std::int64_t grpo_workspace_bytes(std::int64_t tokens, std::int64_t episodes) {
    return episodes * static_cast<std::int64_t>(sizeof(std::int64_t)) +
           (grpo_tiles(tokens) > 0 ? grpo_tiles(tokens) : 1) *
               static_cast<std::int64_t>(sizeof(GrpoSums<float>)) +
           8;
}

#ifdef VRTHINKER_WITH_CUDA
// Queues two kernels on `stream` of `device`; returns nullptr, or CUDA's description of what went wrong.
const char* grpo_loss_cuda(const GrpoInput& in, const GrpoOutput& out, void* workspace, int device,
                           std::uintptr_t stream);
#endif

}  // namespace vrthinker
