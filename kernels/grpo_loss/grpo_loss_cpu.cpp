// `grpo_loss` on the CPU. Tokens are taken in chunks that fit the first-level cache: loaded and widened,
// computed by loops that the compiler turns into vector instructions, added up in a fixed number of lanes,
// stored. Chunks belong to blocks of fixed size whose sums are added in order, so the result depends neither
// on the number of threads nor on the vector width.
#include <algorithm>
#include <cstring>
#include <vector>

#include "grpo_loss/grpo_loss.h"
#include "host.h"

// One compiled body per instruction set, chosen when the module is loaded; no -march, so the wheel runs
// anywhere. Sanitizers are not up yet when the choice is made. The rounding is the same in all of them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VRTHINKER_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VRTHINKER_CLONES
#endif

namespace vrthinker {
namespace {

constexpr int kChunk = 512;
constexpr int kLanes = 16;
constexpr std::int64_t kBlock = 8192;  // tokens whose sums are added up together
static_assert(kBlock % kChunk == 0 && kChunk % kLanes == 0);

// What a further thread must have to do to be worth starting.
constexpr std::int64_t kBlocksPerThread = 8;
constexpr std::int64_t kCountedPerThread = 1 << 21;

struct alignas(64) Chunk {
    float policy[kChunk];
    float old_policy[kChunk];
    float reference[kChunk];
    float advantage[kChunk];
    float weight[kChunk];
    float learned[kChunk];  // 1 or 0
    float token_loss[kChunk];
    float gradient[kChunk];
    float ratio[kChunk];
    float kl[kChunk];
    float low[kChunk];
    float high[kChunk];
};

struct Exponential {
    float value;  // e^x
    GrpoGap gap;
};

// e^x, less than 1 ulp off, and what is left of it (tests/kernels/test_grpo_loss.py); NaN for NaN. Branches
// are selections, so that loops over it become vector code, and what a caller does not use is not computed.
// Method: x = n ln 2 + r, a polynomial in r, and 2^n in two steps, since 2^128 and 2^-150 are no floats.
// Where n is 0, r is x itself.
inline Exponential exp_float(float x) {
    constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const float bounded = choose(x > 89.0F, 89.0F, choose(x < -104.0F, -104.0F, x));
    const float rounded = bounded * 1.44269504088896341F + kRounder;
    const float n = rounded - kRounder;
    const float r = (bounded - n * 0.693359375F) + n * 2.12194440e-4F;
    const float tail = exp_tail(r) * (r * r);
    const auto exponent = static_cast<std::int32_t>(float_bits(rounded) - float_bits(kRounder));
    const std::int32_t half = exponent >> 1;
    const auto power = [](std::int32_t k) {
        return float_of_bits(static_cast<std::uint32_t>(k + 127) << 23);
    };
    const float value = ((tail + r) + 1.0F) * power(half) * power(exponent - half);
    const bool near = n == 0.0F;
    const float expm1 = value - 1.0F;
    return {value, {choose(near, tail + r, expm1), choose(near, tail, expm1 - x)}};
}

// Always a part of compute_chunk's bodies: a function of its own would be compiled for the oldest processors.
template <bool kKl>
[[gnu::always_inline]] inline void compute_tokens(Chunk& chunk, GrpoClip clip) {
    for (int i = 0; i < kChunk; ++i) {
        // What is not learned may be NaN: it is replaced, not multiplied away.
        const bool learned = chunk.learned[i] != 0.0F;
        const float policy = choose(learned, chunk.policy[i], 0.0F);
        const float old_policy = choose(learned, chunk.old_policy[i], 0.0F);
        const float reference = kKl ? choose(learned, chunk.reference[i], 0.0F) : 0.0F;
        const float advantage = choose(learned, chunk.advantage[i], 0.0F);
        const float ratio = exp_float(policy - old_policy).value;
        const GrpoGap gap = kKl ? exp_float(reference - policy).gap : GrpoGap{};
        const bool finite = grpo_is_finite<kKl>(policy, old_policy, reference, advantage, clip);
        const GrpoToken token = grpo_token<kKl>(ratio, gap, advantage, finite, clip);
        chunk.ratio[i] = choose(learned, ratio, 0.0F);
        chunk.token_loss[i] = choose(learned, token.loss, 0.0F);
        chunk.gradient[i] = choose(learned, token.gradient * chunk.weight[i], 0.0F);
        chunk.kl[i] = choose(learned, token.kl, 0.0F);
        chunk.low[i] = token.low;
        chunk.high[i] = token.high;
    }
}

inline double add_lanes(const float* lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
        sum += lanes[lane];
    }
    return sum;
}

VRTHINKER_CLONES void compute_chunk(Chunk& chunk, const GrpoClip& clip, bool has_reference,
                                    GrpoSums<double>& sums) {
    if (has_reference) {
        compute_tokens<true>(chunk, clip);
    } else {
        compute_tokens<false>(chunk, clip);
    }
    float loss[kLanes] = {};
    float ratio[kLanes] = {};
    float kl[kLanes] = {};
    float tokens[kLanes] = {};
    float low[kLanes] = {};
    float high[kLanes] = {};
    float largest[kLanes] = {};
    for (int first = 0; first < kChunk; first += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int i = first + lane;
            loss[lane] += chunk.token_loss[i] * chunk.weight[i];
            ratio[lane] += chunk.ratio[i];
            kl[lane] += chunk.kl[i];
            tokens[lane] += chunk.learned[i];
            low[lane] += chunk.low[i];
            high[lane] += chunk.high[i];
            largest[lane] = larger_or_nan(largest[lane], chunk.ratio[i]);
        }
    }
    sums.loss += add_lanes(loss);
    sums.ratio += add_lanes(ratio);
    sums.kl += add_lanes(kl);
    sums.tokens += add_lanes(tokens);
    sums.low += add_lanes(low);
    sums.high += add_lanes(high);
    for (int lane = 0; lane < kLanes; ++lane) {
        sums.largest_ratio = larger_or_nan(sums.largest_ratio, static_cast<double>(largest[lane]));
    }
}

template <typename Type>
void widen(const Logprobs& column, std::int64_t first, int count, float* out) {
    const auto* values = static_cast<const typename Type::Storage*>(column.data) + first * column.stride;
    if (column.stride == 1) {
        for (int i = 0; i < count; ++i) {
            out[i] = Type::widen(values[i]);
        }
    } else {
        for (int i = 0; i < count; ++i) {
            out[i] = Type::widen(values[i * column.stride]);
        }
    }
}

void load(const Logprobs& column, std::int64_t first, int count, float* out) {
    if (column.type == LogprobType::kFloat32) {
        widen<Float32>(column, first, count, out);
    } else if (column.type == LogprobType::kBFloat16) {
        widen<BFloat16>(column, first, count, out);
    } else {
        widen<Float16>(column, first, count, out);
    }
}

// Advantages and weights of tokens [first, first + count), episode after episode; `episode` is the first
// token's and becomes the last one's.
void load_episodes(const GrpoInput& in, const std::vector<std::int64_t>& learned, std::int64_t first,
                   int count, std::int64_t& episode, Chunk& chunk) {
    for (int i = 0; i < count;) {
        while (episode + 1 < in.episodes && in.offsets[(episode + 1) * in.offset_stride] <= first + i) {
            ++episode;
        }
        const std::int64_t end_of_episode = in.offsets[(episode + 1) * in.offset_stride] - first;
        const int end = static_cast<int>(std::clamp<std::int64_t>(end_of_episode, i + 1, count));
        const std::int64_t tokens = learned.empty() ? 1 : std::max<std::int64_t>(learned[episode], 1);
        std::fill(chunk.weight + i, chunk.weight + end, 1.0F / static_cast<float>(tokens));
        if (in.advantage_per_episode) {
            std::fill(chunk.advantage + i, chunk.advantage + end,
                      in.advantages[episode * in.advantage_stride]);
        }
        i = end;
    }
    if (!in.advantage_per_episode) {
        const float* advantages = in.advantages + first * in.advantage_stride;
        for (int i = 0; i < count; ++i) {
            chunk.advantage[i] = advantages[i * in.advantage_stride];
        }
    }
}

GrpoSums<double> run_block(const GrpoInput& in, const GrpoOutput& out,
                           const std::vector<std::int64_t>& learned, std::int64_t begin, Chunk& chunk) {
    GrpoSums<double> sums{};
    const std::int64_t end = std::min(begin + kBlock, in.tokens);
    std::int64_t episode = episode_of_token(in, begin, 0);
    for (std::int64_t first = begin; first < end; first += kChunk) {
        const int count = static_cast<int>(std::min<std::int64_t>(kChunk, end - first));
        for (int i = 0; i < count; ++i) {
            chunk.learned[i] = in.mask[(first + i) * in.mask_stride] != 0 ? 1.0F : 0.0F;
        }
        std::fill(chunk.learned + count, chunk.learned + kChunk, 0.0F);
        load(in.policy, first, count, chunk.policy);
        load(in.old_policy, first, count, chunk.old_policy);
        if (in.reference.data != nullptr) {
            load(in.reference, first, count, chunk.reference);
        }
        load_episodes(in, learned, first, count, episode, chunk);
        compute_chunk(chunk, in.clip, in.reference.data != nullptr, sums);
        std::memcpy(out.token_loss + first, chunk.token_loss,
                    sizeof(float) * static_cast<std::size_t>(count));
        std::memcpy(out.gradient + first, chunk.gradient, sizeof(float) * static_cast<std::size_t>(count));
    }
    return sums;
}

// Learned tokens of every episode.
std::vector<std::int64_t> count_learned(const GrpoInput& in, int threads) {
    std::vector<std::int64_t> learned(static_cast<std::size_t>(in.episodes));
    const std::int64_t tokens_per_episode =
        std::max<std::int64_t>(in.tokens / std::max<std::int64_t>(in.episodes, 1), 1);
    parallel_for(in.episodes, kCountedPerThread / tokens_per_episode, threads,
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t episode = begin; episode < end; ++episode) {
                         const std::int64_t last = in.offsets[(episode + 1) * in.offset_stride];
                         std::int64_t count = 0;
                         for (std::int64_t i = in.offsets[episode * in.offset_stride]; i < last; ++i) {
                             count += in.mask[i * in.mask_stride] != 0 ? 1 : 0;
                         }
                         learned[static_cast<std::size_t>(episode)] = count;
                     }
                 });
    return learned;
}

}  // namespace

void grpo_loss_cpu(const GrpoInput& in, const GrpoOutput& out, int threads) {
    std::vector<std::int64_t> learned;
    std::int64_t episodes = in.episodes;
    if (in.aggregation == Aggregation::kEpisodeMean) {
        learned = count_learned(in, threads);
        episodes =
            std::count_if(learned.begin(), learned.end(), [](std::int64_t count) { return count > 0; });
    }
    const std::int64_t blocks = (in.tokens + kBlock - 1) / kBlock;
    std::vector<GrpoSums<double>> sums(static_cast<std::size_t>(blocks));
    parallel_for(blocks, kBlocksPerThread, threads, [&](std::int64_t begin, std::int64_t end) {
        Chunk chunk{};
        for (std::int64_t block = begin; block < end; ++block) {
            sums[static_cast<std::size_t>(block)] = run_block(in, out, learned, block * kBlock, chunk);
        }
    });
    GrpoSums<double> total{};
    for (const GrpoSums<double>& part : sums) {
        total.loss += part.loss;
        total.ratio += part.ratio;
        total.kl += part.kl;
        total.tokens += part.tokens;
        total.low += part.low;
        total.high += part.high;
        total.largest_ratio = larger_or_nan(total.largest_ratio, part.largest_ratio);
    }
    grpo_finish(in, total, static_cast<double>(episodes), out);
}

}  // namespace vrthinker
