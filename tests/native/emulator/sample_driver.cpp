// Runs the sample kernels under many seeds:  sample_driver sum|shift SEEDS
#include <cstdlib>
#include <cstring>
#include <memory>

#include "sample/sample_kernel.h"

namespace {

using vrthinker::emulator::launch;

int wrong(const char* kernel, unsigned seed) {
    std::printf("wrong: %s, seed %u\n", kernel, seed);
    return 1;
}

int check_sum(unsigned seeds) {
    constexpr int kCount = 1000;
    constexpr int kThreads = 128;
    constexpr unsigned kBlocks = 3;
    // As large as it has to be and no larger, so that AddressSanitizer sees the first access beyond.
    const auto values = std::make_unique<int[]>(kCount);
    const auto out = std::make_unique<int[]>(kBlocks);
    int expected = 0;
    for (int i = 0; i < kCount; ++i) {
        values[i] = i * i % 1009;
        expected += values[i];
    }
    for (unsigned seed = 0; seed < seeds; ++seed) {
        launch(kBlocks, kThreads, seed, vrthinker::block_sum_kernel<int, kThreads>, values.get(), kCount,
               out.get());
        if (out[0] + out[1] + out[2] != expected) {
            return wrong("sum", seed);
        }
    }
    return 0;
}

int check_shift(unsigned seeds) {
    constexpr int kCount = 300;
    constexpr int kShift = 5;
    for (unsigned seed = 0; seed < seeds; ++seed) {
        const auto values = std::make_unique<int[]>(kCount);
        for (int i = 0; i < kCount; ++i) {
            values[i] = i;
        }
        launch(1, 64, seed, vrthinker::shift_kernel, values.get(), kCount, kShift);
        for (int i = 0; i < kCount; ++i) {
            if (values[i] != (i < kCount - kShift ? i + kShift : i)) {
                return wrong("shift", seed);
            }
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        return 2;
    }
    const auto seeds = static_cast<unsigned>(std::atoi(argv[2]));
    const int status = std::strcmp(argv[1], "sum") == 0 ? check_sum(seeds) : check_shift(seeds);
    if (status == 0) {
        std::printf("right under %u seeds\n", seeds);
    }
    return status;
}
