// `group_advantage` on the CPU: statistics group by group, then the tokens, split by position so that ragged
// episodes share out evenly. What takes the time is writing the tokens, and in a fresh output the page
// faults.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "group_advantage/group_advantage.h"
#include "host.h"

namespace vrthinker {
namespace {

// What a further thread must have to do to be worth starting.
constexpr std::int64_t kEpisodesPerThread = 128 * 1024;
constexpr std::int64_t kBytesPerThread = 4 * 1024 * 1024;

// add(partial, episode) for every episode of the range, in the fixed order of group_advantage_math.h. Lanes
// and warps that have nothing are left out: adding them changes nothing.
template <typename Partial, typename Add>
Partial reduce(Range range, Partial neutral, const Add& add) {
    const auto count = static_cast<std::uint64_t>(range.end - range.begin);
    const auto lanes = static_cast<int>(std::bit_ceil(std::min<std::uint64_t>(count, kLanes)));
    std::array<Partial, kLanes> partials;
    std::fill_n(partials.begin(), lanes, neutral);
    for (std::uint64_t i = 0; i < count; ++i) {
        add(partials[i % kLanes], range.begin + static_cast<std::int64_t>(i));
    }
    const int warp_lanes = std::min(lanes, kWarp);
    for (int warp = 0; warp < lanes / warp_lanes; ++warp) {
        for (int distance = warp_lanes / 2; distance > 0; distance /= 2) {
            for (int lane = warp * kWarp; lane < warp * kWarp + distance; ++lane) {
                merge(partials[lane], partials[lane + distance]);
            }
        }
    }
    for (int distance = lanes / warp_lanes / 2; distance > 0; distance /= 2) {
        for (int warp = 0; warp < distance; ++warp) {
            merge(partials[warp * kWarp], partials[(warp + distance) * kWarp]);
        }
    }
    return partials[0];
}

template <typename Real>
Tally tally_of(const AdvantageTask<Real>& task, Range range) {
    return reduce(range, Tally::empty(),
                  [&](Tally& tally, std::int64_t episode) { tally.add(task, episode); });
}

template <typename Real>
double scale_of(const AdvantageTask<Real>& task, Range range, const Tally& tally) {
    const double mean = tally.mean();
    const double squares = reduce(range, 0.0, [&](double& sum, std::int64_t episode) {
        sum += squared_deviation(task, episode, mean);
    });
    return std::sqrt(tally.variance(squares, task.ddof)) + task.eps;
}

template <typename Real>
double batch_scale_of(const AdvantageTask<Real>& task) {
    const Range all{0, task.episodes};
    const Tally tally = tally_of(task, all);
    if (task.method == AdvantageMethod::kBatchStd) {
        return scale_of(task, all, tally);
    }
    const double squares = reduce(Range{0, task.groups}, 0.0, [&](double& sum, std::int64_t group) {
        sum += squares_within(task, group);
    });
    return std::sqrt(tally.variance(squares, task.ddof) + task.eps);
}

// The advantages of groups [begin, end), one per episode.
template <typename Real>
void groups_of(const AdvantageTask<Real>& task, double batch_scale, std::int64_t begin, std::int64_t end,
               Real* values) {
    for (std::int64_t group = begin; group < end; ++group) {
        const Range range{task.group_offsets[group], task.group_offsets[group + 1]};
        const Tally tally = tally_of(task, range);
        Baseline baseline{.mean = tally.mean(),
                          .sum = tally.sum,
                          .others = static_cast<double>(tally.count - 1),
                          .scale = batch_scale,
                          .poisoned = false,
                          .flat = tally.is_flat()};
        if (task.method == AdvantageMethod::kGrpo && !baseline.flat) {
            baseline.scale = scale_of(task, range, tally);
        }
        for (std::int64_t episode = range.begin; episode < range.end; ++episode) {
            values[episode] = baseline.advantage(task, episode);
        }
        task.zero_variance[group] = baseline.flat ? 1 : 0;
    }
}

// Tokens [begin, end): each has its episode's value, or 0 where no episode covers it.
template <typename Real>
void fill_tokens(const AdvantageTask<Real>& task, const Real* values, std::int64_t begin, std::int64_t end) {
    std::int64_t low = 0;  // the first episode whose tokens end behind `begin`
    std::int64_t high = task.episodes;
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (task.token_offsets[middle + 1] <= begin) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    std::int64_t position = begin;
    for (std::int64_t episode = low; episode < task.episodes && position < end; ++episode) {
        const std::int64_t first = std::clamp(task.token_offsets[episode], position, end);
        const std::int64_t last = std::clamp(task.token_offsets[episode + 1], first, end);
        std::fill(task.advantages + position, task.advantages + first, Real{0});
        std::fill(task.advantages + first, task.advantages + last, values[episode]);
        position = last;
    }
    std::fill(task.advantages + position, task.advantages + end, Real{0});
}

}  // namespace

template <typename Real>
std::optional<AdvantageProblem> find_problem(const AdvantageTask<Real>& task) {
    using Kind = AdvantageProblem::Kind;
    for (std::int64_t k = 0; k <= task.groups; ++k) {
        if (task.bad_group_offset(k)) {
            return AdvantageProblem{Kind::kGroupOffset, k, task.group_offsets[k], 0.0};
        }
    }
    for (std::int64_t k = 0; task.token_offsets.given() && k <= task.episodes; ++k) {
        if (task.bad_token_offset(k)) {
            return AdvantageProblem{Kind::kTokenOffset, k, task.token_offsets[k], 0.0};
        }
    }
    for (std::int64_t episode = 0; episode < task.episodes; ++episode) {
        if (task.is_valid(episode) && AdvantageTask<Real>::is_bad(task.rewards[episode])) {
            return AdvantageProblem{Kind::kReward, episode, 0, task.rewards[episode]};
        }
    }
    return std::nullopt;
}

template <typename Real>
void group_advantage_cpu(const AdvantageTask<Real>& task, int threads) {
    const double batch_scale = has_batch_scale(task.method) ? batch_scale_of(task) : 1.0;
    const bool to_tokens = task.token_offsets.given();
    std::vector<Real> per_episode(to_tokens ? static_cast<std::size_t>(task.episodes) : 0);
    Real* values = to_tokens ? per_episode.data() : task.advantages;
    const std::int64_t episodes_per_group = task.episodes / std::max<std::int64_t>(task.groups, 1);
    parallel_for(
        task.groups, kEpisodesPerThread / std::max<std::int64_t>(episodes_per_group, 1), threads,
        [&](std::int64_t begin, std::int64_t end) { groups_of(task, batch_scale, begin, end, values); });
    if (to_tokens) {
        constexpr auto kSize = static_cast<std::int64_t>(sizeof(Real));
        advise_huge_pages(task.advantages, task.n_tokens * kSize);
        parallel_for(task.n_tokens, kBytesPerThread / kSize, threads,
                     [&](std::int64_t begin, std::int64_t end) { fill_tokens(task, values, begin, end); });
    }
}

template std::optional<AdvantageProblem> find_problem(const AdvantageTask<float>&);
template std::optional<AdvantageProblem> find_problem(const AdvantageTask<double>&);
template void group_advantage_cpu(const AdvantageTask<float>&, int);
template void group_advantage_cpu(const AdvantageTask<double>&, int);

}  // namespace vrthinker
