// Runs the kernels of `grpo_loss` under many seeds against the C++ version, on fresh random batches with good
// and with wrong offsets, and against double precision near the reference policy:
//   grpo_loss_driver SEEDS FIRST_SEED
#include "grpo_loss/grpo_loss_kernel.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "grpo_loss/grpo_loss_cpu.cpp"

namespace {

using namespace vrthinker;

// A column in memory that ends with its last value, so that AddressSanitizer sees the first access beyond.
template <typename T>
struct Column {
    std::unique_ptr<T[]> memory;
    std::int64_t stride;
    T& operator[](std::int64_t i) { return memory[i * stride]; }
};

template <typename T>
Column<T> make_column(std::int64_t count, std::int64_t stride) {
    return {std::make_unique<T[]>(static_cast<std::size_t>(count > 0 ? (count - 1) * stride + 1 : 0)),
            stride};
}

// No loss comes near it.
constexpr float kUnwritten = 7.0e30F;

struct Filled {
    explicit Filled(std::int64_t tokens)
        : token_loss(static_cast<std::size_t>(tokens), kUnwritten),
          gradient(static_cast<std::size_t>(tokens), kUnwritten) {}
    GrpoOutput output() { return {&loss, token_loss.data(), gradient.data(), &scale, metrics}; }

    float loss = kUnwritten;
    float scale = kUnwritten;
    float metrics[kGrpoMetrics] = {};
    std::vector<float> token_loss;
    std::vector<float> gradient;
};

bool near(float found, float wanted) {
    return std::abs(found - wanted) <= 2e-6F + 2e-5F * std::abs(wanted);
}

bool same(const Filled& found, const Filled& wanted) {
    bool equal = near(found.loss, wanted.loss) && near(found.scale, wanted.scale);
    for (int i = 0; i < kGrpoMetrics; ++i) {
        equal = equal && near(found.metrics[i], wanted.metrics[i]);
    }
    for (std::size_t i = 0; i < wanted.token_loss.size(); ++i) {
        equal = equal && near(found.token_loss[i], wanted.token_loss[i]) &&
                near(found.gradient[i], wanted.gradient[i]);
    }
    return equal;
}

void launch(const GrpoInput& in, Filled& filled, unsigned seed) {
    const auto bytes = static_cast<std::size_t>(grpo_workspace_bytes(in.tokens, in.episodes));
    const auto memory = std::make_unique<std::int64_t[]>(bytes / sizeof(std::int64_t) + 1);
    std::fill_n(memory.get(), bytes / sizeof(std::int64_t) + 1, -1);
    const GrpoWorkspace workspace = grpo_workspace(memory.get(), in.tokens, in.episodes);
    const auto tiles = static_cast<unsigned>(std::max<std::int64_t>(grpo_tiles(in.tokens), 1));
    emulator::launch(2U, kGrpoThreads, seed, grpo_count_kernel, in, workspace);
    emulator::launch(tiles, kGrpoThreads, seed + 1, grpo_loss_kernel, in, filled.output(), workspace);
}

class Batch {
  public:
    explicit Batch(unsigned seed) : random_(seed) {
        const std::int64_t episodes = below(12) + (seed % 5 == 0 ? 0 : 1);
        std::vector<std::int64_t> bounds{0};
        for (std::int64_t i = 0; i < episodes; ++i) {
            const std::int64_t length = below(3) == 0 ? below(3) : below(500);
            bounds.push_back(bounds.back() + length);
        }
        in.tokens = bounds.back();
        in.episodes = episodes;
        offsets_ = make_column<std::int64_t>(episodes + 1, 1 + below(2));
        for (std::int64_t i = 0; i <= episodes; ++i) {
            offsets_[i] = bounds[static_cast<std::size_t>(i)];
        }
        mask_ = make_column<std::uint8_t>(in.tokens, 1 + below(2));
        policy_ = make_column<float>(in.tokens, 1 + below(3));
        old_policy_ = make_column<std::uint16_t>(in.tokens, 1 + below(3));
        reference_ = make_column<std::uint16_t>(in.tokens, 1);
        in.advantage_per_episode = below(2) == 0 && episodes != in.tokens;
        advantages_ = make_column<float>(in.advantage_per_episode ? episodes : in.tokens, 1 + below(2));
        const float share = static_cast<float>(below(5)) / 4.0F;
        std::normal_distribution<float> normal;
        for (std::int64_t i = 0; i < in.tokens; ++i) {
            const bool learned = std::uniform_real_distribution<float>()(random_) < share;
            mask_[i] = learned ? 1 : 0;
            policy_[i] = learned ? normal(random_) - 2.0F : std::numeric_limits<float>::quiet_NaN();
            old_policy_[i] = learned ? BFloat16::narrow(policy_[i] + 0.3F * normal(random_)) : 0x7f80U;
            reference_[i] = learned ? Float16::narrow(policy_[i] + 0.5F * normal(random_)) : 0x7e00U;
        }
        for (std::int64_t i = 0; i < (in.advantage_per_episode ? episodes : in.tokens); ++i) {
            advantages_[i] = normal(random_);
        }
        in.policy = {policy_.memory.get(), policy_.stride, LogprobType::kFloat32};
        in.old_policy = {old_policy_.memory.get(), old_policy_.stride, LogprobType::kBFloat16};
        if (below(3) > 0) {
            in.reference = {reference_.memory.get(), reference_.stride, LogprobType::kFloat16};
        }
        in.advantages = advantages_.memory.get();
        in.advantage_stride = advantages_.stride;
        in.mask = mask_.memory.get();
        in.mask_stride = mask_.stride;
        in.offsets = offsets_.memory.get();
        in.offset_stride = offsets_.stride;
        in.clip = {0.8F, 1.25F, 0.1F};
        in.aggregation = static_cast<Aggregation>(seed % 3);
        in.fixed_length = 9.0;
        in.normalizer = below(3) == 0 ? 5.0 : 0.0;
    }

    void spoil_offsets() {
        constexpr std::int64_t kWrong[] = {-1, std::numeric_limits<std::int64_t>::min(),
                                           std::numeric_limits<std::int64_t>::max(), 1 << 20};
        for (std::int64_t i = 0; i <= in.episodes; ++i) {
            offsets_[i] = below(2) == 0 ? kWrong[below(4)] : below(in.tokens + 2);
        }
    }

    GrpoInput in{};

  private:
    std::int64_t below(std::int64_t bound) {
        return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(bound));
    }

    std::mt19937_64 random_;
    Column<std::int64_t> offsets_;
    Column<std::uint8_t> mask_;
    Column<float> policy_;
    Column<std::uint16_t> old_policy_;
    Column<std::uint16_t> reference_;
    Column<float> advantages_;
};

bool close(float found, double wanted) {
    return std::abs(found - wanted) <= 2e-6 * std::abs(wanted);
}

// Tokens whose loss is their KL, with reference - policy from 1e-9 to 2.7; then some that hold what is not
// finite: infinite ratios that would be clipped away, and logprobs and advantages that multiply to nothing.
int check_kl_and_not_finite(unsigned seed) {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr int kTokens = 600;
    constexpr int kBad = 9;
    std::vector<float> policy(kTokens, 0.0F);
    std::vector<float> old_policy(kTokens, 0.0F);
    std::vector<float> reference;
    std::vector<float> advantages(kTokens, 0.0F);
    const std::vector<std::uint8_t> mask(kTokens, 1);
    const std::vector<std::int64_t> offsets{0, kTokens};
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> exponent(-9.0F, 0.43F);
    for (int i = 0; i < kTokens; ++i) {
        reference.push_back((i % 2 == 0 ? 1.0F : -1.0F) * std::pow(10.0F, exponent(random)));
    }
    std::fill_n(advantages.begin(), kBad, 1.0F);
    for (int i = 0; i < 3; ++i) {
        constexpr float kAll[] = {kInfinity, -kInfinity, kNan};
        policy[i] = kAll[i];
        old_policy[3 + i] = kAll[i];
        reference[6 + i] = kAll[i];
    }
    GrpoInput in{};
    in.policy = {policy.data(), 1, LogprobType::kFloat32};
    in.old_policy = {old_policy.data(), 1, LogprobType::kFloat32};
    in.reference = {reference.data(), 1, LogprobType::kFloat32};
    in.advantages = advantages.data();
    in.advantage_stride = 1;
    in.mask = mask.data();
    in.mask_stride = 1;
    in.offsets = offsets.data();
    in.offset_stride = 1;
    in.tokens = kTokens;
    in.episodes = 1;
    in.clip = {0.8F, 1.25F, 1.0F};
    in.normalizer = 1.0;
    Filled found(kTokens);
    launch(in, found, seed);
    for (int i = 0; i < kTokens; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const double expm1 = std::expm1(static_cast<double>(reference[at]));
        const bool right = i < kBad
                               ? std::isnan(found.token_loss[at]) && std::isnan(found.gradient[at])
                               : close(found.token_loss[at], expm1 - static_cast<double>(reference[at])) &&
                                     close(found.gradient[at], -expm1);
        if (!right) {
            std::printf("wrong: seed %u, token %d, gap %g: loss %g, gradient %g\n", seed, i,
                        static_cast<double>(reference[at]), static_cast<double>(found.token_loss[at]),
                        static_cast<double>(found.gradient[at]));
            return 1;
        }
    }
    return std::isnan(found.loss) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        return 2;
    }
    const auto seeds = static_cast<unsigned>(std::atoi(argv[1]));
    const auto first = static_cast<unsigned>(std::atoi(argv[2]));
    for (unsigned seed = first; seed < first + seeds; ++seed) {
        if (check_kl_and_not_finite(seed) != 0) {
            return 1;
        }
        Batch batch(seed);
        Filled wanted(batch.in.tokens);
        grpo_loss_cpu(batch.in, wanted.output(), 1);
        Filled found(batch.in.tokens);
        launch(batch.in, found, seed);
        if (!same(found, wanted)) {
            std::printf("wrong: seed %u, %lld tokens, loss %g, wanted %g\n", seed,
                        static_cast<long long>(batch.in.tokens), static_cast<double>(found.loss),
                        static_cast<double>(wanted.loss));
            return 1;
        }
        // Wrong offsets: any numbers, but nothing out of bounds, and nothing left unwritten.
        batch.spoil_offsets();
        Filled spoilt(batch.in.tokens);
        launch(batch.in, spoilt, seed);
        for (std::int64_t i = 0; i < batch.in.tokens; ++i) {
            const auto at = static_cast<std::size_t>(i);
            const bool learned = batch.in.mask[i * batch.in.mask_stride] != 0;
            const bool written = spoilt.gradient[at] != kUnwritten && spoilt.token_loss[at] != kUnwritten;
            if (!written || (!learned && (spoilt.gradient[at] != 0.0F || spoilt.token_loss[at] != 0.0F))) {
                std::printf("wrong: seed %u, token %lld %s\n", seed, static_cast<long long>(i),
                            written ? "is not learned and has a loss" : "was not written");
                return 1;
            }
        }
    }
    std::printf("right under %u seeds\n", seeds);
    return 0;
}
