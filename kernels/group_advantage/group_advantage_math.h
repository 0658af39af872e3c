// What a group's advantage is, and in which order its sums are taken: shared by the C++ and the CUDA version,
// so that both give the same bits.
//
// Statistics are double and two-pass. The order of a sum over items [begin, end) is fixed: kLanes partial
// sums (item i belongs to lane (i - begin) % kLanes, in ascending order), folded as a tree: within each warp
// of 32 lanes at distances 16, 8, 4, 2, 1, then the warps' sums at distances kWarps / 2, ..., 1. Items are
// episodes, or groups where deviations from every group's own mean are added up.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "device.h"

namespace vrthinker {

enum class AdvantageMethod : std::int32_t { kGrpo, kDrGrpo, kRloo, kBatchStd, kReinforcePlusPlus };

// Whether all groups are divided by one number, which is taken from the whole batch.
VRTHINKER_HOST_DEVICE inline bool has_batch_scale(AdvantageMethod method) {
    return method == AdvantageMethod::kBatchStd || method == AdvantageMethod::kReinforcePlusPlus;
}

inline constexpr int kLanes = 256;  // also the threads of a CUDA block
inline constexpr int kWarp = 32;
inline constexpr int kWarps = kLanes / kWarp;

// A larger reward is as bad as an infinite one: differences of two would overflow a float32 advantage.
inline constexpr double kMaxReward = 1e38;

// Device code may read such constants, but not call numeric_limits.
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
inline constexpr std::int64_t kMaxStatus = std::numeric_limits<std::int32_t>::max();

// A one-dimensional tensor of any stride (in elements).
template <typename Value>
struct Strided {
    const Value* data = nullptr;
    std::int64_t stride = 1;

    VRTHINKER_HOST_DEVICE const Value& operator[](std::int64_t i) const { return data[i * stride]; }
    VRTHINKER_HOST_DEVICE bool given() const { return data != nullptr; }
};

// Half-open, clamped: 0 <= begin <= end <= limit, whatever the offsets say.
struct Range {
    std::int64_t begin;
    std::int64_t end;
};

// One call. `advantages` has n_tokens values where token_offsets are given, else one per episode.
template <typename Real>
struct AdvantageTask {
    Strided<Real> rewards;                // [episodes]
    Strided<std::uint8_t> valid;          // [episodes], or not given: all are
    Strided<std::int64_t> group_offsets;  // [groups + 1]
    Strided<std::int64_t> token_offsets;  // [episodes + 1], or not given
    std::int64_t episodes = 0;
    std::int64_t groups = 0;
    std::int64_t n_tokens = 0;
    AdvantageMethod method = AdvantageMethod::kGrpo;
    std::int32_t ddof = 1;
    double eps = 1e-6;
    Real* advantages = nullptr;
    std::uint8_t* zero_variance = nullptr;  // [groups]
    std::int32_t* status = nullptr;         // [1]; the CUDA version's

    VRTHINKER_HOST_DEVICE bool is_valid(std::int64_t episode) const {
        return !valid.given() || valid[episode] != 0;
    }
    VRTHINKER_HOST_DEVICE static bool is_bad(double reward) { return !(std::fabs(reward) <= kMaxReward); }

    // Whether offset k of group_offsets is out of place: they ascend from 0 to episodes.
    VRTHINKER_HOST_DEVICE bool bad_group_offset(std::int64_t k) const {
        const std::int64_t value = group_offsets[k];
        return value < (k == 0 ? 0 : group_offsets[k - 1]) || value < 0 || value > episodes ||
               (k == 0 && value != 0) || (k == groups && value != episodes);
    }
    // Token offsets ascend within [0, n_tokens]; they need not reach either end.
    VRTHINKER_HOST_DEVICE bool bad_token_offset(std::int64_t k) const {
        const std::int64_t value = token_offsets[k];
        return value < (k == 0 ? 0 : token_offsets[k - 1]) || value < 0 || value > n_tokens;
    }
};

VRTHINKER_HOST_DEVICE inline std::int64_t clamped(std::int64_t value, std::int64_t limit) {
    return value < 0 ? 0 : value > limit ? limit : value;
}

VRTHINKER_HOST_DEVICE inline Range clamped_range(const Strided<std::int64_t>& offsets, std::int64_t i,
                                                 std::int64_t limit) {
    const std::int64_t begin = clamped(offsets[i], limit);
    const std::int64_t end = clamped(offsets[i + 1], limit);
    return {begin, end < begin ? begin : end};
}

// First pass: what a set of rewards has in it. Invalid episodes are left out, bad rewards only counted.
// No member initialisers: CUDA allows none in shared memory.
struct Tally {
    double sum;
    double lowest;
    double highest;
    std::int64_t count;
    std::int64_t bad;

    VRTHINKER_HOST_DEVICE static Tally empty() { return {0.0, kInfinity, -kInfinity, 0, 0}; }
    template <typename Real>
    VRTHINKER_HOST_DEVICE void add(const AdvantageTask<Real>& task, std::int64_t episode) {
        if (!task.is_valid(episode)) {
            return;
        }
        const double reward = task.rewards[episode];
        if (AdvantageTask<Real>::is_bad(reward)) {
            ++bad;
            return;
        }
        sum += reward;
        lowest = reward < lowest ? reward : lowest;
        highest = reward > highest ? reward : highest;
        ++count;
    }
    VRTHINKER_HOST_DEVICE double mean() const { return sum / static_cast<double>(count < 1 ? 1 : count); }
    // Fewer than two rewards, or all equal: no signal.
    VRTHINKER_HOST_DEVICE bool is_flat() const { return !(lowest < highest); }
    // Second pass: the variance, from the sum of squared deviations. NaN where a reward is bad.
    VRTHINKER_HOST_DEVICE double variance(double squares, std::int32_t ddof) const {
        if (bad > 0) {
            return kNan;
        }
        const std::int64_t freedom = count - ddof;
        return squares / static_cast<double>(freedom < 1 ? 1 : freedom);
    }
};

VRTHINKER_HOST_DEVICE inline void merge(Tally& tally, const Tally& other) {
    tally.sum += other.sum;
    tally.lowest = other.lowest < tally.lowest ? other.lowest : tally.lowest;
    tally.highest = other.highest > tally.highest ? other.highest : tally.highest;
    tally.count += other.count;
    tally.bad += other.bad;
}

VRTHINKER_HOST_DEVICE inline void merge(double& sum, double other) {
    sum += other;
}

template <typename Real>
VRTHINKER_HOST_DEVICE inline double squared_deviation(const AdvantageTask<Real>& task, std::int64_t episode,
                                                      double mean) {
    if (!task.is_valid(episode)) {
        return 0.0;
    }
    const double deviation = task.rewards[episode] - mean;
    return deviation * deviation;
}

// The sum of the squared deviations from a group's own mean, in order. 0 for a group without signal, in which
// rounding alone would deviate.
template <typename Real>
VRTHINKER_HOST_DEVICE inline double squares_within(const AdvantageTask<Real>& task, std::int64_t group) {
    const Range range = clamped_range(task.group_offsets, group, task.episodes);
    Tally tally = Tally::empty();
    for (std::int64_t i = range.begin; i < range.end; ++i) {
        tally.add(task, i);
    }
    double squares = 0.0;
    for (std::int64_t i = range.begin; i < range.end && !tally.is_flat(); ++i) {
        squares += squared_deviation(task, i, tally.mean());
    }
    return squares;
}

// What turns a group's rewards into advantages.
struct Baseline {
    double mean = 0.0;
    double sum = 0.0;
    double others = 1.0;  // valid episodes beside this one
    double scale = 1.0;   // what deviations are divided by
    bool poisoned = false;
    bool flat = false;

    template <typename Real>
    VRTHINKER_HOST_DEVICE Real advantage(const AdvantageTask<Real>& task, std::int64_t episode) const {
        if (!task.is_valid(episode)) {
            return 0;
        }
        if (poisoned) {
            return static_cast<Real>(kNan);
        }
        if (flat) {
            return 0;
        }
        const double reward = task.rewards[episode];
        switch (task.method) {
            case AdvantageMethod::kDrGrpo:
                return static_cast<Real>(reward - mean);
            case AdvantageMethod::kRloo:
                return static_cast<Real>(reward - (sum - reward) / others);
            default:
                return static_cast<Real>((reward - mean) / scale);
        }
    }
};

}  // namespace vrthinker
