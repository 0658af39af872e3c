// Runs CUDA kernels on a CPU, one fiber per CUDA thread, in an order that the seed decides.
//
// For tests: compile a kernel's header with -DVRTHINKER_EMULATE and AddressSanitizer, call
// `vrthinker::emulator::launch` with many seeds, compare with what is right. Blocks run one after another in
// random order. Between two rendezvous (barrier, shuffle, ballot, atomic) a thread runs alone; who runs next
// is random. What is caught, and how:
//   - a missing barrier, and reads and writes that overlap: wrong results under some order;
//   - shared memory that is read before it is written: it holds 0xff bytes (NaN, -1) at a block's start;
//   - a barrier that part of a block does not reach, or that it reaches elsewhere; a shuffle whose named
//     lanes never all arrive: the program says which threads wait where, and exits with kFaultExit;
//   - an access out of range, also of shared arrays: AddressSanitizer.
// What is not: an update that is lost because it should have been atomic, memory ordering, what blocks do to
// each other at the same time, and barriers in a function that two branches call.
//
// A kernel declares its shared arrays itself, not in functions that it calls: only there can they be found,
// and only there does GCC put AddressSanitizer's red zones around them (`__global__` makes kernels static;
// variables of inline functions and templates that several files may share get none).
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"
#include "shared_arrays.h"

#define __global__ [[maybe_unused]] static __attribute__((noinline, noclone))
#define __device__
#define __host__
#define __shared__ static
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace vrthinker::emulator {

// Runs a kernel as <<<grid, block>>> would. Equal seeds run in equal orders.
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, dim3 block, std::uint64_t seed, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
    now.block_size = block;
    now.grid_size = grid;
    if (block.count() < 1 || block.count() > kMostThreads || grid.count() < 1 || grid.y > 65535 ||
        grid.z > 65535) {
        machine.fault("a launch that CUDA refuses (blocks of 1 to 1024 threads, at least one block)");
    }
    const auto shared = find_shared_arrays(reinterpret_cast<std::uintptr_t>(kernel));
    const auto values =
        std::make_tuple(kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...);
    const auto body = [](const void* closure) {
        std::apply([](auto* run, const auto&... each) { run(each...); },
                   *static_cast<const decltype(values)*>(closure));
    };
    Random random(seed);
    std::vector<unsigned> order(grid.count());
    for (unsigned i = 0; i < order.size(); ++i) {
        order[i] = i;
    }
    for (std::size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random.below(i)]);
    }
    for (const unsigned i : order) {
        now.block = grid.at(i);
        for (const SharedArray& array : shared) {
            std::memset(array.data, 0xff, array.bytes);
        }
        machine.run_block(body, &values, seed, random);
    }
}

}  // namespace vrthinker::emulator

#include "intrinsics.h"
