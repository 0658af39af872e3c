// The native versions of `evict`: what they are asked to do, and their entry points. Callers have checked
// every argument (csrc/evict.cpp).
//
// A tensor is seen as lanes: for each sequence, every combination of the dimensions that are neither batch,
// nor token, nor part of the contiguous bytes of one token (`row`). Within a lane, rows move; lanes never
// meet. Invariant of everything in place: per sequence the runs are ascending and no run moves to a higher
// row, so a row is overwritten only after every row that was there to be read before it.
#pragma once

#include <cstdint>
#include <vector>

#include "device.h"

namespace vrthinker {

inline constexpr int kOuterDims = 4;

enum class EvictElement : std::int32_t { kBytes = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Strides and sizes in bytes. In a paged cache the batch stride is that of a block.
struct EvictTensor {
    char* source;
    char* target;  // `source` in place
    std::int64_t source_batch;
    std::int64_t target_batch;
    std::int64_t source_token;
    std::int64_t target_token;
    std::int64_t outer_size[kOuterDims];
    std::int64_t source_outer[kOuterDims];
    std::int64_t target_outer[kOuterDims];
    std::int64_t row_bytes;
    std::int64_t head_bytes;  // what is rotated as one, a part of the row; 0: nothing is rotated
    EvictElement element;     // of what is rotated
    // For the GPU, filled by `pack`: its first block, how its rows are shared among blocks.
    std::int32_t slices;
    std::int64_t first_block;

    VRTHINKER_HOST_DEVICE std::int64_t lanes() const {
        return outer_size[0] * outer_size[1] * outer_size[2] * outer_size[3];
    }
};

// Rows [source, source + count) become [target, target + count).
struct EvictRun {
    std::int64_t source;
    std::int64_t target;
    std::int64_t count;
    std::int64_t rotation;  // row of the rotation table; -1: none
};

struct Eviction {
    std::vector<EvictTensor> tensors;
    std::vector<EvictRun> runs;             // by sequence; targets ascending
    std::vector<std::int64_t> run_offsets;  // [batch + 1]
    bool in_place = true;
    std::int64_t out_tokens = 0;       // out of place: rows of each target lane; what no run fills is zeroed
    std::vector<std::int64_t> tables;  // paged: [batch, table_width], which block holds rows of a sequence
    std::int64_t table_width = 0;
    std::int64_t block_size = 0;   // 0: not paged
    std::vector<float> rotations;  // [shifts, half, 2]: cosine and sine
    std::int64_t half = 0;

    std::int64_t batch() const { return static_cast<std::int64_t>(run_offsets.size()) - 1; }
};

// Byte offset of a lane in a tensor.
VRTHINKER_HOST_DEVICE inline std::int64_t lane_offset(const std::int64_t* sizes, const std::int64_t* strides,
                                                      std::int64_t lane) {
    std::int64_t offset = 0;
    for (int dim = kOuterDims - 1; dim >= 0; --dim) {
        offset += lane % sizes[dim] * strides[dim];
        lane /= sizes[dim];
    }
    return offset;
}

// Byte offset of a row in its lane: by the sequence's batch stride, or through its block table.
VRTHINKER_HOST_DEVICE inline std::int64_t row_offset(std::int64_t batch_stride, std::int64_t token_stride,
                                                     const std::int64_t* table, std::int64_t block_size,
                                                     std::int64_t sequence, std::int64_t row) {
    if (block_size == 0) {
        return sequence * batch_stride + row * token_stride;
    }
    return table[row / block_size] * batch_stride + row % block_size * token_stride;
}

// One pair of a rotary embedding, turned: the same steps, in fp32 without fused operations, everywhere.
struct RotatedPair {
    float low;
    float high;
};
VRTHINKER_HOST_DEVICE inline RotatedPair rotate_pair(float low, float high, float cosine, float sine) {
    return {low * cosine - high * sine, high * cosine + low * sine};
}

void evict_cpu(const Eviction& eviction, int threads);

// How an eviction travels to a GPU: one block of bytes with everything that the kernel reads.
struct EvictHeader {
    std::int64_t batch;
    std::int64_t n_tensors;
    std::int64_t blocks;          // of the launch
    std::int64_t rows_per_block;  // out of place
    std::int64_t out_tokens;
    std::int64_t block_size;
    std::int64_t table_width;
    std::int64_t half;
    std::int64_t tensors_at;  // byte offsets from the header
    std::int64_t runs_at;
    std::int64_t run_offsets_at;
    std::int64_t tables_at;
    std::int64_t rotations_at;
    std::int32_t vector_bytes;  // what a thread moves at a time: 16, 8, 4, 2 or 1
    std::int32_t in_place;
    std::int32_t element;  // of rotated tensors, one per call
    std::int32_t reserved;
};

inline constexpr int kEvictThreads = 256;

// Packs an eviction for a GPU with so many multiprocessors. What moves nothing in place is left out. Throws
// std::invalid_argument where a tensor is less aligned than the elements of what is rotated beside it.
std::vector<char> pack_eviction(const Eviction& eviction, int processors);

#ifdef VRTHINKER_WITH_CUDA
// Queues the kernel on `stream` of `device`; `packed` lies on that device. Returns nullptr, or CUDA's
// description of what went wrong.
const char* evict_cuda(const EvictHeader& header, const char* packed, int device, std::uintptr_t stream);
#endif

}  // namespace vrthinker
