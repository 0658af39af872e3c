// The native versions of `patchify`. Callers have checked every argument (csrc/patchify.cpp).
#pragma once

#include <array>
#include <cstdint>

#include "patchify/patchify_index.h"

namespace vrthinker {

// Normalised value of every byte of every channel, in the output's type (bfloat16 as its bits).
template <typename Value>
using PatchifyTable = std::array<Value, kTableSize>;

// ((float)(v * (1 / 255)) - mean) / std, the product in double and the rest in float, exactly the steps
// of the Hugging Face processor; bfloat16 is that value rounded to nearest even.
PatchifyTable<float> make_float_table(const std::array<double, kChannels>& mean,
                                      const std::array<double, kChannels>& std);
PatchifyTable<std::uint16_t> make_bfloat16_table(const std::array<double, kChannels>& mean,
                                                 const std::array<double, kChannels>& std);

// Fills `out` ([shape.rows(), shape.row_length()], contiguous) on `threads` threads.
template <typename Value>
void patchify_cpu(const PatchifyShape& shape, const std::uint8_t* frames, const PatchifyTable<Value>& table,
                  Value* out, int threads);

// The CUDA kernel's body on the CPU, thread after thread: for tests of its index arithmetic.
template <typename Value>
void patchify_cuda_emulated(const PatchifyShape& shape, const std::uint8_t* frames,
                            const PatchifyTable<Value>& table, Value* out);

#ifdef VRTHINKER_WITH_CUDA
// Queues the kernel on `stream` of `device`; returns nullptr, or CUDA's description of what went wrong.
template <typename Value>
const char* patchify_cuda(const PatchifyShape& shape, const std::uint8_t* frames,
                          const PatchifyTable<Value>& table, Value* out, int device, std::uintptr_t stream);
#endif

}  // namespace vrthinker
