// The CUDA kernels of `evict`: one launch moves the rows of every tensor, sequence and lane.
//
// In place, a block owns all rows of its slice of a lane's columns, and walks them in order: it loads a tile
// of rows into registers, waits until all of its threads have theirs, then stores. A store of one tile cannot
// touch what a later tile loads (rows only move down, and tiles ascend), so the next tile's loads are started
// before the barrier: one barrier a tile is enough, and memory stays busy. Blocks never meet: no two own the
// same bytes. Out of place, blocks share the rows of a lane and need no barrier.
#pragma once

#include <type_traits>

#include "device.h"
#include "evict/evict.h"

namespace vrthinker {

// How many rows of a tile one thread has in flight, times two for the tile that is loaded ahead.
inline constexpr int kEvictUnroll = 4;

template <int kBytes>
struct EvictVector;
template <>
struct alignas(16) EvictVector<16> {
    std::uint32_t words[4];
};
template <>
struct alignas(8) EvictVector<8> {
    std::uint32_t words[2];
};
template <>
struct EvictVector<4> {
    std::uint32_t words[1];
};
template <>
struct EvictVector<2> {
    std::uint16_t words[1];
};
template <>
struct EvictVector<1> {
    std::uint8_t words[1];
};

#ifdef VRTHINKER_KERNELS_HERE

// Stands for the element type where nothing is turned.
struct Bytes {
    using Storage = std::uint8_t;
};

// Turns the pairs of two vectors, the low and the high halves of a head. `table` has (cosine, sine) per pair.
template <typename Element, typename Vector>
__device__ inline void rotate_vectors(Vector& low, Vector& high, const float* table) {
    using Storage = typename Element::Storage;
    constexpr int kElements = static_cast<int>(sizeof(Vector) / sizeof(Storage));
    Storage lows[kElements];
    Storage highs[kElements];
    memcpy(lows, &low, sizeof(Vector));
    memcpy(highs, &high, sizeof(Vector));
    VRTHINKER_UNROLL
    for (int i = 0; i < kElements; ++i) {
        const RotatedPair turned =
            rotate_pair(Element::widen(lows[i]), Element::widen(highs[i]), table[2 * i], table[2 * i + 1]);
        lows[i] = Element::narrow(turned.low);
        highs[i] = Element::narrow(turned.high);
    }
    memcpy(&low, lows, sizeof(Vector));
    memcpy(&high, highs, sizeof(Vector));
}

// A sequence's rows in the order of their targets, and the run that each belongs to. Rows are asked for in
// ascending order.
struct EvictWalk {
    const EvictRun* run;
    const EvictRun* end;
    std::int64_t first;  // number of the run's first row among the sequence's rows

    __device__ bool seek(std::int64_t row) {
        while (run != end && row >= first + run->count) {
            first += run->count;
            ++run;
        }
        return run != end;
    }
};

// What a block works on, read from the packed eviction.
struct EvictTask {
    const EvictTensor* tensor;
    const EvictRun* runs;
    const EvictRun* runs_end;
    const std::int64_t* table;  // of the sequence's blocks
    const float* rotations;
    std::int64_t sequence;
    std::int64_t lane;
    std::int64_t part;  // slice of columns (in place), tile of rows (out of place)
};

__device__ inline EvictTask evict_task(const EvictHeader& header, const char* packed, std::int64_t block) {
    const auto* tensors = reinterpret_cast<const EvictTensor*>(packed + header.tensors_at);
    std::int64_t low = 0;
    std::int64_t high = header.n_tensors;
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        if (tensors[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    EvictTask task;
    task.tensor = tensors + low;
    block -= task.tensor->first_block;
    task.part = block % task.tensor->slices;
    block /= task.tensor->slices;
    const std::int64_t lanes = task.tensor->lanes();
    task.lane = block % lanes;
    task.sequence = block / lanes;
    const auto* offsets = reinterpret_cast<const std::int64_t*>(packed + header.run_offsets_at);
    const auto* runs = reinterpret_cast<const EvictRun*>(packed + header.runs_at);
    task.runs = runs + offsets[task.sequence];
    task.runs_end = runs + offsets[task.sequence + 1];
    task.table =
        reinterpret_cast<const std::int64_t*>(packed + header.tables_at) + task.sequence * header.table_width;
    task.rotations = reinterpret_cast<const float*>(packed + header.rotations_at);
    return task;
}

// A thread's column: one vector of a row, or, where keys are rotated, the two vectors whose elements pair.
struct EvictColumn {
    std::int64_t low;  // byte offsets in the row
    std::int64_t high;
    std::int64_t pair;  // first pair, an index into a row of the rotation table
};

template <typename Vector>
__device__ inline EvictColumn evict_column(const EvictTensor& tensor, std::int64_t column) {
    constexpr std::int64_t kBytes = sizeof(Vector);
    if (tensor.head_bytes == 0) {
        return {column * kBytes, 0, 0};
    }
    const std::int64_t half_bytes = tensor.head_bytes / 2;
    const std::int64_t per_head = half_bytes / kBytes;
    const std::int64_t in_head = column % per_head * kBytes;
    const std::int64_t low = column / per_head * tensor.head_bytes + in_head;
    const std::int64_t element = tensor.element == EvictElement::kFloat32 ? 4 : 2;
    return {low, low + half_bytes, in_head / element};
}

// One row's part that a thread has in its registers.
template <typename Vector>
struct EvictPiece {
    Vector low;
    Vector high;
    std::int64_t target;    // byte offset of the row; -1: nothing to store
    std::int64_t rotation;  // -1: none
};

template <typename Vector, typename Element>
__device__ inline void evict_store(const EvictPiece<Vector>& piece, char* target, const EvictColumn& column,
                                   bool rotated, const float* rotations, std::int64_t half) {
    if (piece.target < 0) {
        return;
    }
    Vector low = piece.low;
    Vector high = piece.high;
    if constexpr (!std::is_same_v<Element, Bytes>) {
        if (rotated && piece.rotation >= 0) {
            rotate_vectors<Element>(low, high, rotations + (piece.rotation * half + column.pair) * 2);
        }
    }
    *reinterpret_cast<Vector*>(target + piece.target + column.low) = low;
    if (rotated) {
        *reinterpret_cast<Vector*>(target + piece.target + column.high) = high;
    }
}

template <typename Vector>
__device__ inline void evict_load(EvictPiece<Vector>& piece, const EvictHeader& header, const EvictTask& task,
                                  EvictWalk& walk, std::int64_t row, const char* source,
                                  const EvictColumn& column, bool rotated) {
    piece.target = -1;
    if (!walk.seek(row)) {
        return;
    }
    const EvictTensor& tensor = *task.tensor;
    const std::int64_t in_run = row - walk.first;
    const char* from = source + row_offset(tensor.source_batch, tensor.source_token, task.table,
                                           header.block_size, task.sequence, walk.run->source + in_run);
    piece.target = row_offset(tensor.target_batch, tensor.target_token, task.table, header.block_size,
                              task.sequence, walk.run->target + in_run);
    piece.rotation = walk.run->rotation;
    piece.low = *reinterpret_cast<const Vector*>(from + column.low);
    if (rotated) {
        piece.high = *reinterpret_cast<const Vector*>(from + column.high);
    }
}

// How a block's threads share a tile: each has one column of the block's slice, in every `rows`-th row.
struct EvictShare {
    std::int64_t columns;  // of the slice
    std::int64_t rows;     // side by side
    std::int64_t row;      // this thread's first
    EvictColumn column;
    bool idle;
};

template <typename Vector>
__device__ inline EvictShare evict_share(const EvictTensor& tensor, std::int64_t part, std::int64_t parts) {
    const std::int64_t all =
        tensor.row_bytes / static_cast<std::int64_t>(sizeof(Vector)) / (tensor.head_bytes > 0 ? 2 : 1);
    const std::int64_t begin = all * part / parts;
    EvictShare share;
    share.columns = all * (part + 1) / parts - begin;
    share.rows = kEvictThreads / share.columns;
    share.row = threadIdx.x / share.columns;
    share.idle = share.row >= share.rows;
    share.column = evict_column<Vector>(tensor, begin + threadIdx.x % share.columns);
    return share;
}

template <typename Vector, typename Element>
__global__ void __launch_bounds__(kEvictThreads)
    evict_in_place_kernel(const EvictHeader header, const char* packed) {
    const EvictTask task = evict_task(header, packed, blockIdx.x);
    const EvictTensor& tensor = *task.tensor;
    const EvictShare share = evict_share<Vector>(tensor, task.part, tensor.slices);
    const bool rotated = tensor.head_bytes > 0;
    char* const lane = tensor.target + lane_offset(tensor.outer_size, tensor.target_outer, task.lane);
    std::int64_t rows = 0;
    for (const EvictRun* run = task.runs; run != task.runs_end; ++run) {
        rows += run->count;
    }
    EvictWalk walk{task.runs, task.runs_end, 0};
    EvictPiece<Vector> now[kEvictUnroll];
    EvictPiece<Vector> ahead[kEvictUnroll];
    const std::int64_t tile = share.rows * kEvictUnroll;

    const auto load = [&](EvictPiece<Vector>(&pieces)[kEvictUnroll], std::int64_t first) {
        VRTHINKER_UNROLL
        for (int i = 0; i < kEvictUnroll; ++i) {
            const std::int64_t row = first + i * share.rows + share.row;
            pieces[i].target = -1;
            if (!share.idle && row < rows) {
                evict_load(pieces[i], header, task, walk, row, lane, share.column, rotated);
            }
        }
    };

    load(now, 0);
    for (std::int64_t first = 0; first < rows; first += tile) {
        load(ahead, first + tile);
        // All of this tile's rows are in registers before any of them is overwritten.
        __syncthreads();
        VRTHINKER_UNROLL
        for (int i = 0; i < kEvictUnroll; ++i) {
            evict_store<Vector, Element>(now[i], lane, share.column, rotated, task.rotations, header.half);
            now[i] = ahead[i];
        }
    }
}

template <typename Vector, typename Element>
__global__ void __launch_bounds__(kEvictThreads)
    evict_out_of_place_kernel(const EvictHeader header, const char* packed) {
    const EvictTask task = evict_task(header, packed, blockIdx.x);
    const EvictTensor& tensor = *task.tensor;
    const bool rotated = tensor.head_bytes > 0;
    const char* const source = tensor.source + lane_offset(tensor.outer_size, tensor.source_outer, task.lane);
    char* const target = tensor.target + lane_offset(tensor.outer_size, tensor.target_outer, task.lane);
    const std::int64_t begin = task.part * header.rows_per_block;
    const std::int64_t end =
        begin + header.rows_per_block < header.out_tokens ? begin + header.rows_per_block : header.out_tokens;
    const std::int64_t columns =
        tensor.row_bytes / static_cast<std::int64_t>(sizeof(Vector)) / (rotated ? 2 : 1);
    // A row wider than the block is walked in several passes.
    const std::int64_t width = columns < kEvictThreads ? columns : kEvictThreads;
    const std::int64_t rows = kEvictThreads / width;
    const std::int64_t own_row = threadIdx.x / width;
    if (own_row >= rows) {
        return;
    }
    for (std::int64_t number = threadIdx.x % width; number < columns; number += width) {
        const EvictColumn column = evict_column<Vector>(tensor, number);
        EvictWalk walk{task.runs, task.runs_end, 0};
        for (std::int64_t first = begin; first < end; first += rows * kEvictUnroll) {
            EvictPiece<Vector> pieces[kEvictUnroll];
            VRTHINKER_UNROLL
            for (int i = 0; i < kEvictUnroll; ++i) {
                const std::int64_t row = first + i * rows + own_row;
                pieces[i].target = -1;
                if (row >= end) {
                    continue;
                }
                evict_load(pieces[i], header, task, walk, row, source, column, rotated);
                if (pieces[i].target < 0) {  // behind the last survivor: padding
                    pieces[i].target = task.sequence * tensor.target_batch + row * tensor.target_token;
                    pieces[i].rotation = -1;
                    memset(&pieces[i].low, 0, sizeof(Vector));
                    memset(&pieces[i].high, 0, sizeof(Vector));
                }
            }
            VRTHINKER_UNROLL
            for (int i = 0; i < kEvictUnroll; ++i) {
                evict_store<Vector, Element>(pieces[i], target, column, rotated, task.rotations, header.half);
            }
        }
    }
}

#endif  // VRTHINKER_KERNELS_HERE

}  // namespace vrthinker
