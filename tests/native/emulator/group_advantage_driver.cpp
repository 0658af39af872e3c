// Runs the CUDA kernel of `group_advantage` under many seeds:  group_advantage_driver SEEDS
//
// Good input: the same bits as the C++ version. Bad input: the status counts it, bad groups are NaN, every
// output is written, and nothing outside of the buffers is touched (AddressSanitizer).
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "group_advantage/group_advantage_cpu.cpp"
#include "group_advantage/group_advantage_kernel.h"

namespace {

using namespace vrthinker;

// As large as it has to be and no larger, so that AddressSanitizer sees the first access beyond.
template <typename Value>
std::unique_ptr<Value[]> copied(const std::vector<Value>& values) {
    auto copy = std::make_unique<Value[]>(values.size());
    std::copy(values.begin(), values.end(), copy.get());
    return copy;
}

template <typename Real>
struct Problem {
    std::vector<Real> rewards;
    std::vector<std::uint8_t> valid;  // empty: not given
    std::vector<std::int64_t> group_offsets;
    std::vector<std::int64_t> token_offsets;  // empty: not given
    std::int64_t n_tokens = 0;
    AdvantageMethod method = AdvantageMethod::kGrpo;
    std::int64_t shift = 0;  // of the output from an aligned address
};

template <typename Real>
struct Result {
    std::vector<Real> advantages;
    std::vector<std::uint8_t> zero_variance;
    std::int32_t status = 0;
};

constexpr double kUnwritten = -77777.0;

// Runs run(task) on copies.
template <typename Real, typename Run>
Result<Real> run_on(const Problem<Real>& problem, const Run& run) {
    const auto rewards = copied(problem.rewards);
    const auto valid = copied(problem.valid);
    const auto group_offsets = copied(problem.group_offsets);
    const auto token_offsets = copied(problem.token_offsets);
    const bool to_tokens = !problem.token_offsets.empty();
    const std::size_t length = to_tokens ? problem.n_tokens : problem.rewards.size();
    const std::size_t groups = problem.group_offsets.size() - 1;
    const auto advantages = copied(std::vector<Real>(length + problem.shift, static_cast<Real>(kUnwritten)));
    const auto zero_variance = copied(std::vector<std::uint8_t>(groups, 9));
    const auto status = std::make_unique<std::int32_t>(-1);
    AdvantageTask<Real> task;
    task.rewards = {rewards.get(), 1};
    if (!problem.valid.empty()) {
        task.valid = {valid.get(), 1};
    }
    task.group_offsets = {group_offsets.get(), 1};
    if (to_tokens) {
        task.token_offsets = {token_offsets.get(), 1};
        task.n_tokens = problem.n_tokens;
    }
    task.episodes = static_cast<std::int64_t>(problem.rewards.size());
    task.groups = static_cast<std::int64_t>(groups);
    task.method = problem.method;
    task.advantages = advantages.get() + problem.shift;
    task.zero_variance = zero_variance.get();
    task.status = status.get();
    run(task);
    return {{task.advantages, task.advantages + length},
            {zero_variance.get(), zero_variance.get() + groups},
            *status};
}

template <typename Real>
Result<Real> emulated(const Problem<Real>& problem, std::uint64_t seed, unsigned blocks) {
    return run_on(problem, [&](const AdvantageTask<Real>& task) {
        emulator::launch(blocks, kLanes, seed, group_advantage_kernel<Real>, task);
    });
}

template <typename Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0);
}

int wrong(const char* what, unsigned seed) {
    std::printf("wrong: %s, seed %u\n", what, seed);
    return 1;
}

template <typename Real>
Problem<Real> random_problem(std::mt19937& random, unsigned seed) {
    const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
    Problem<Real> problem;
    problem.group_offsets = {0};
    constexpr int kSizes[] = {8, 0, 1, 3, 40, 300};  // beyond a warp, beyond a block
    for (const int size : kSizes) {
        problem.group_offsets.push_back(problem.group_offsets.back() + size);
    }
    const bool some_invalid = below(2) == 0;
    for (std::int64_t i = 0; i < problem.group_offsets.back(); ++i) {
        problem.rewards.push_back(static_cast<Real>(below(1000)) / Real{7});
        if (some_invalid) {
            problem.valid.push_back(below(4) == 0 ? 0 : 1);
            if (problem.valid.back() == 0) {
                problem.rewards.back() = static_cast<Real>(kNan);
            }
        }
    }
    if (below(3) > 0) {
        problem.token_offsets = {below(3)};
        for (std::size_t i = 0; i < problem.rewards.size(); ++i) {
            problem.token_offsets.push_back(problem.token_offsets.back() + below(i == 5 ? 300 : 9));
        }
        problem.n_tokens = problem.token_offsets.back() + below(300);
        problem.shift = below(4);
    }
    problem.method = static_cast<AdvantageMethod>(seed % 5);
    return problem;
}

template <typename Real>
int check_good(unsigned seed) {
    std::mt19937 random(seed);
    const Problem<Real> problem = random_problem<Real>(random, seed);
    const Result<Real> expected =
        run_on(problem, [](const AdvantageTask<Real>& task) { group_advantage_cpu(task, 1); });
    const Result<Real> result = emulated(problem, seed, 2 + seed % 7);
    if (!same_bits(result.advantages, expected.advantages)) {
        return wrong("advantages", seed);
    }
    if (!same_bits(result.zero_variance, expected.zero_variance)) {
        return wrong("zero_variance", seed);
    }
    return result.status == 0 ? 0 : wrong("status", seed);
}

int check_bad_values(unsigned seed) {
    Problem<float> problem;
    problem.group_offsets = {0, 3, 6, 8};
    problem.rewards = {1, 2, 3, 4, static_cast<float>(kNan), 6, 7, 9};
    problem.method = static_cast<AdvantageMethod>(seed % 5);
    Result<float> result = emulated(problem, seed, 4);
    const bool batch = has_batch_scale(problem.method);
    for (std::size_t i = 0; i < 8; ++i) {
        if (std::isnan(result.advantages[i]) != (batch || (i >= 3 && i < 6))) {
            return wrong("where a bad reward spreads to", seed);
        }
    }
    if (result.status != 1 || result.zero_variance != std::vector<std::uint8_t>{0, 0, 0}) {
        return wrong("marks of a bad reward", seed);
    }

    // Offsets of any kind: counted, and every output is written whatever they say.
    std::mt19937_64 random(seed);
    const auto offset = [&](std::int64_t limit) {
        constexpr std::int64_t kHuge = std::int64_t{1} << 62;
        const std::int64_t any[] = {-kHuge, -1, 0, limit / 3, limit / 2, limit, limit + 1, kHuge};
        return any[random() % 8];
    };
    problem.rewards[4] = 5;
    problem.n_tokens = 50;
    problem.token_offsets.clear();
    for (int i = 0; i < 9; ++i) {
        problem.token_offsets.push_back(offset(problem.n_tokens));
    }
    for (std::int64_t& value : problem.group_offsets) {
        value = offset(8);
    }
    std::int32_t bad = 0;
    result = emulated(problem, seed, 4);
    run_on(problem, [&](const AdvantageTask<float>& task) {
        for (std::int64_t k = 0; k <= task.groups; ++k) {
            bad += task.bad_group_offset(k) ? 1 : 0;
        }
        for (std::int64_t k = 0; k <= task.episodes; ++k) {
            bad += task.bad_token_offset(k) ? 1 : 0;
        }
    });
    if (result.status != bad) {
        return wrong("count of bad offsets", seed);
    }
    for (const float value : result.advantages) {
        if (value == static_cast<float>(kUnwritten)) {
            return wrong("a token was not written", seed);
        }
    }
    return 0;
}

int check_empty(unsigned seed) {
    Problem<double> problem;
    problem.group_offsets = {0};
    problem.token_offsets = {2};
    problem.n_tokens = 700;
    const Result<double> result = emulated(problem, seed, 3);
    return result.status == 0 && result.advantages == std::vector<double>(700, 0.0) ? 0
                                                                                    : wrong("empty", seed);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        return 2;
    }
    const auto seeds = static_cast<unsigned>(std::atoi(argv[1]));
    for (unsigned seed = 0; seed < seeds; ++seed) {
        if (check_good<float>(seed) || check_good<double>(seed) || check_bad_values(seed) ||
            check_empty(seed)) {
            return 1;
        }
    }
    std::printf("right under %u seeds\n", seeds);
    return 0;
}
