// The kernels of `evict` against its C++ version, over random caches, spans and thread orders. Says which
// case where a byte differs, and exits with kWrongExit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "evict/evict_cpu.cpp"  // what it is compared with, and what packs it
#include "evict/evict_kernel.h"
#include "evict/evict_pack.cpp"

namespace {

using namespace vrthinker;  // NOLINT: a test's driver

constexpr int kWrongExit = 1;

class Cases {
  public:
    explicit Cases(std::uint64_t seed) : random_(seed) {}

    std::int64_t up_to(std::int64_t most) {
        return std::uniform_int_distribution<std::int64_t>(0, most)(random_);
    }

    // Random bytes, or random normal numbers of an element type.
    std::vector<char> bytes(std::int64_t count, EvictElement element) {
        std::vector<char> data(static_cast<std::size_t>(count));
        if (element == EvictElement::kBytes) {
            std::generate(data.begin(), data.end(), [&] { return static_cast<char>(up_to(255)); });
            return data;
        }
        std::normal_distribution<float> normal;
        const std::int64_t size = element == EvictElement::kFloat32 ? 4 : 2;
        for (std::int64_t at = 0; at + size <= count; at += size) {
            const float value = normal(random_);
            const std::uint16_t half =
                element == EvictElement::kBFloat16 ? BFloat16::narrow(value) : Float16::narrow(value);
            std::memcpy(data.data() + at, size == 4 ? static_cast<const void*>(&value) : &half,
                        static_cast<std::size_t>(size));
        }
        return data;
    }

  private:
    std::mt19937_64 random_;
};

struct Memory {
    std::vector<std::vector<char>> sources;
    std::vector<std::vector<char>> targets;  // empty in place
};

template <typename Vector, typename Element>
void run(const EvictHeader& header, const char* packed, std::uint64_t seed) {
    const dim3 grid(static_cast<unsigned>(header.blocks));
    const dim3 block(kEvictThreads);
    if (header.in_place) {
        emulator::launch(grid, block, seed, evict_in_place_kernel<Vector, Element>, header, packed);
    } else {
        emulator::launch(grid, block, seed, evict_out_of_place_kernel<Vector, Element>, header, packed);
    }
}

template <typename Element>
void run_rotated(const EvictHeader& header, const char* packed, std::uint64_t seed) {
    if (header.vector_bytes == 16) {
        return run<EvictVector<16>, Element>(header, packed, seed);
    }
    run<EvictVector<sizeof(typename Element::Storage)>, Element>(header, packed, seed);
}

void run_bytes(const EvictHeader& header, const char* packed, std::uint64_t seed) {
    switch (header.vector_bytes) {
        case 16:
            return run<EvictVector<16>, Bytes>(header, packed, seed);
        case 8:
            return run<EvictVector<8>, Bytes>(header, packed, seed);
        case 4:
            return run<EvictVector<4>, Bytes>(header, packed, seed);
        case 2:
            return run<EvictVector<2>, Bytes>(header, packed, seed);
        default:
            return run<EvictVector<1>, Bytes>(header, packed, seed);
    }
}

// As evict.cu does it.
void emulate(const Eviction& eviction, int processors, std::uint64_t seed) {
    const std::vector<char> packed = pack_eviction(eviction, processors);
    EvictHeader header{};
    std::memcpy(&header, packed.data(), sizeof header);
    if (header.blocks == 0) {
        return;
    }
    switch (static_cast<EvictElement>(header.element)) {
        case EvictElement::kFloat32:
            return run_rotated<Float32>(header, packed.data(), seed);
        case EvictElement::kBFloat16:
            return run_rotated<BFloat16>(header, packed.data(), seed);
        case EvictElement::kFloat16:
            return run_rotated<Float16>(header, packed.data(), seed);
        case EvictElement::kBytes:
            return run_bytes(header, packed.data(), seed);
    }
}

// Ascending runs with holes between them, per sequence.
void make_runs(Cases& cases, Eviction& eviction, std::int64_t batch, std::int64_t tokens,
               std::int64_t shifts) {
    eviction.run_offsets.push_back(0);
    for (std::int64_t sequence = 0; sequence < batch; ++sequence) {
        std::int64_t source = 0;
        std::int64_t target = 0;
        while (true) {
            source += cases.up_to(2) == 0 ? cases.up_to(40) : cases.up_to(2);
            const std::int64_t count = 1 + cases.up_to(120);
            if (source + count > tokens) {
                break;
            }
            eviction.runs.push_back(
                {source, target, count,
                 shifts > 0 && (source > target || cases.up_to(1) == 0) ? cases.up_to(shifts - 1) : -1});
            source += count;
            target += count;
        }
        eviction.out_tokens = std::max(eviction.out_tokens, target + cases.up_to(3));
        eviction.run_offsets.push_back(static_cast<std::int64_t>(eviction.runs.size()));
    }
    if (eviction.in_place) {
        eviction.out_tokens = 0;
    }
}

void add_tensor(Cases& cases, Eviction& eviction, Memory& memory, EvictElement element, std::int64_t tokens,
                std::int64_t least) {
    EvictTensor tensor{};
    tensor.element = element;
    if (element == EvictElement::kBytes) {
        // Never less aligned than what is turned beside it: the op gives such tensors a launch of their own.
        tensor.row_bytes = cases.up_to(1) == 0 ? least * (1 + cases.up_to(20)) : 16 * (1 + cases.up_to(40));
    } else {
        tensor.head_bytes = 2 * eviction.half * (element == EvictElement::kFloat32 ? 4 : 2);
        tensor.row_bytes = tensor.head_bytes * (1 + cases.up_to(2));
    }
    const bool paged = eviction.block_size > 0;
    const std::int64_t rows = paged ? eviction.block_size : tokens;
    const std::int64_t batch = paged ? static_cast<std::int64_t>(eviction.tables.size()) : eviction.batch();
    std::fill_n(tensor.outer_size, kOuterDims, 1);
    tensor.outer_size[1] = 1 + cases.up_to(2);
    tensor.source_token = tensor.row_bytes + cases.up_to(1) * 16;  // rows may have gaps between them
    tensor.source_outer[1] = tensor.source_token * rows;
    tensor.source_batch = tensor.source_outer[1] * tensor.outer_size[1];
    memory.sources.push_back(cases.bytes(tensor.source_batch * batch, element));
    tensor.target_token = tensor.source_token;
    tensor.target_outer[1] = tensor.source_outer[1];
    tensor.target_batch = tensor.source_batch;
    if (!eviction.in_place) {
        tensor.target_token = tensor.row_bytes;
        tensor.target_outer[1] = tensor.target_token * eviction.out_tokens;
        tensor.target_batch = tensor.target_outer[1] * tensor.outer_size[1];
        memory.targets.emplace_back(static_cast<std::size_t>(tensor.target_batch * batch), char{0x55});
    }
    eviction.tensors.push_back(tensor);
}

// A random eviction over memory of its own. In a paged one every sequence has its own blocks.
Eviction make_eviction(Cases& cases, Memory& memory) {
    Eviction eviction;
    const std::int64_t batch = 1 + cases.up_to(2);
    const std::int64_t tokens = 1 + cases.up_to(300);
    eviction.in_place = cases.up_to(3) > 0;
    if (eviction.in_place && cases.up_to(2) == 0) {
        eviction.block_size = 1 + cases.up_to(16);
        eviction.table_width = (tokens + eviction.block_size - 1) / eviction.block_size;
        for (std::int64_t i = 0; i < batch * eviction.table_width; ++i) {
            eviction.tables.insert(eviction.tables.begin() + cases.up_to(i), i);
        }
    }
    const bool rotated = cases.up_to(1) == 0;
    const std::int64_t shifts = rotated ? 3 : 0;
    eviction.half = rotated ? std::int64_t{1} << cases.up_to(5) : 0;
    for (std::int64_t i = 0; i < shifts * eviction.half; ++i) {
        const auto angle = static_cast<float>(cases.up_to(6000)) / 1000.0F;
        eviction.rotations.push_back(std::cos(angle));
        eviction.rotations.push_back(std::sin(angle));
    }
    make_runs(cases, eviction, batch, tokens, shifts);
    const auto element = static_cast<EvictElement>(1 + cases.up_to(2));
    const std::int64_t least = !rotated ? 1 : element == EvictElement::kFloat32 ? 4 : 2;
    for (std::int64_t i = cases.up_to(2); i >= 0; --i) {
        add_tensor(cases, eviction, memory, rotated && i % 2 == 0 ? element : EvictElement::kBytes, tokens,
                   least);
    }
    return eviction;
}

void point(Eviction& eviction, Memory& memory) {
    for (std::size_t i = 0; i < eviction.tensors.size(); ++i) {
        eviction.tensors[i].source = memory.sources[i].data();
        eviction.tensors[i].target = (eviction.in_place ? memory.sources : memory.targets)[i].data();
    }
}

}  // namespace

int main(int count, char** arguments) {
    const std::uint64_t seeds = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 50;
    for (std::uint64_t seed = 0; seed < seeds; ++seed) {
        Cases cases(seed);
        Memory memory;
        Eviction eviction = make_eviction(cases, memory);
        Memory expected = memory;
        point(eviction, expected);
        evict_cpu(eviction, 1);
        point(eviction, memory);
        emulate(eviction, static_cast<int>(1 + seed % 132), seed);
        if (memory.sources != expected.sources || memory.targets != expected.targets) {
            std::printf("wrong: seed %llu, %s%s: a byte differs from the C++ version\n",
                        static_cast<unsigned long long>(seed),
                        eviction.in_place ? "in place" : "out of place",
                        eviction.block_size ? ", paged" : "");
            return kWrongExit;
        }
    }
    std::printf("right under %llu seeds\n", static_cast<unsigned long long>(seeds));
    return 0;
}
