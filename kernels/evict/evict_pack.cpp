// How an eviction travels to a GPU: sizes of the launch, and everything that the kernel reads in one block of
// bytes, so that one small copy and one launch do it all.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "evict/evict.h"

namespace vrthinker {
namespace {

// In place a lane is shared by columns, not by rows; a slice narrower than this wastes memory bursts.
constexpr std::int64_t kLeastSliceBytes = 64;
// Blocks per multiprocessor that keep its memory pipeline full.
constexpr std::int64_t kBlocksPerProcessor = 8;
// Bytes of a row tile that a block copies out of place.
constexpr std::int64_t kBytesPerBlock = 64 * 1024;

std::int64_t common_alignment(const EvictTensor& tensor) {
    std::uint64_t all =
        reinterpret_cast<std::uintptr_t>(tensor.source) | reinterpret_cast<std::uintptr_t>(tensor.target);
    for (const std::int64_t stride : {tensor.source_batch, tensor.target_batch, tensor.source_token,
                                      tensor.target_token, tensor.row_bytes, tensor.head_bytes / 2}) {
        all |= static_cast<std::uint64_t>(stride);
    }
    for (int dim = 0; dim < kOuterDims; ++dim) {
        if (tensor.outer_size[dim] > 1) {
            all |= static_cast<std::uint64_t>(tensor.source_outer[dim]) |
                   static_cast<std::uint64_t>(tensor.target_outer[dim]);
        }
    }
    std::int64_t bytes = 16;
    while (all % static_cast<std::uint64_t>(bytes) != 0) {
        bytes /= 2;
    }
    return bytes;
}

template <typename Item>
std::int64_t append(std::vector<char>& bytes, const Item* items, std::size_t count) {
    bytes.resize((bytes.size() + 15) / 16 * 16);
    const auto at = static_cast<std::int64_t>(bytes.size());
    bytes.resize(bytes.size() + count * sizeof(Item));
    if (count > 0) {
        std::memcpy(bytes.data() + at, items, count * sizeof(Item));
    }
    return at;
}

}  // namespace

std::vector<char> pack_eviction(const Eviction& eviction, int processors) {
    EvictHeader header{};
    header.batch = eviction.batch();
    header.out_tokens = eviction.out_tokens;
    header.block_size = eviction.block_size;
    header.table_width = eviction.table_width;
    header.half = eviction.half;
    header.in_place = eviction.in_place ? 1 : 0;

    // In place, rows that stay where they are and are not turned need no thread.
    std::vector<EvictRun> runs;
    std::vector<std::int64_t> offsets{0};
    for (std::int64_t sequence = 0; sequence < header.batch; ++sequence) {
        for (std::int64_t i = eviction.run_offsets[sequence]; i < eviction.run_offsets[sequence + 1]; ++i) {
            const EvictRun& run = eviction.runs[i];
            if (!eviction.in_place || run.source != run.target || run.rotation >= 0) {
                runs.push_back(run);
            }
        }
        offsets.push_back(static_cast<std::int64_t>(runs.size()));
    }

    std::vector<EvictTensor> tensors;
    std::int64_t vector_bytes = 16;
    std::int64_t widest = 1;
    std::int64_t lanes = 0;
    for (const EvictTensor& tensor : eviction.tensors) {
        if (tensor.lanes() * tensor.row_bytes == 0) {
            continue;
        }
        tensors.push_back(tensor);
        vector_bytes = std::min(vector_bytes, common_alignment(tensor));
        widest = std::max(widest, tensor.row_bytes);
        lanes += tensor.lanes() * header.batch;
        if (tensor.head_bytes > 0) {
            header.element = static_cast<std::int32_t>(tensor.element);
        }
    }
    if (header.element != static_cast<std::int32_t>(EvictElement::kBytes)) {
        const std::int64_t element_bytes =
            header.element == static_cast<std::int32_t>(EvictElement::kFloat32) ? 4 : 2;
        if (vector_bytes < element_bytes) {
            throw std::invalid_argument(
                "evict: tensors are less aligned than the elements of what is rotated");
        }
        // Two sizes of vector are enough where something is turned: fewer kernels in the wheel.
        vector_bytes = vector_bytes == 16 ? 16 : element_bytes;
    }
    header.vector_bytes = static_cast<std::int32_t>(vector_bytes);
    header.rows_per_block = std::max<std::int64_t>(1, kBytesPerBlock / widest);
    const std::int64_t row_tiles = (eviction.out_tokens + header.rows_per_block - 1) / header.rows_per_block;
    const std::int64_t wanted_blocks = std::max<std::int64_t>(1, processors) * kBlocksPerProcessor;
    for (EvictTensor& tensor : tensors) {
        tensor.first_block = header.blocks;
        if (eviction.in_place) {
            // A column is one vector, or a pair of them where keys are turned.
            const std::int64_t columns = tensor.row_bytes / vector_bytes / (tensor.head_bytes > 0 ? 2 : 1);
            const std::int64_t needed = (columns + kEvictThreads - 1) / kEvictThreads;
            const std::int64_t useful =
                std::clamp<std::int64_t>(tensor.row_bytes / kLeastSliceBytes, 1, columns);
            const std::int64_t wanted = (wanted_blocks + lanes - 1) / std::max<std::int64_t>(1, lanes);
            tensor.slices = static_cast<std::int32_t>(std::max(needed, std::min(wanted, useful)));
        } else {
            tensor.slices = static_cast<std::int32_t>(row_tiles);
        }
        header.blocks += tensor.lanes() * header.batch * tensor.slices;
    }
    if (eviction.in_place && runs.empty()) {
        header.blocks = 0;
    }
    header.n_tensors = static_cast<std::int64_t>(tensors.size());

    std::vector<char> bytes(sizeof(EvictHeader));
    header.tensors_at = append(bytes, tensors.data(), tensors.size());
    header.runs_at = append(bytes, runs.data(), runs.size());
    header.run_offsets_at = append(bytes, offsets.data(), offsets.size());
    header.tables_at = append(bytes, eviction.tables.data(), eviction.tables.size());
    header.rotations_at = append(bytes, eviction.rotations.data(), eviction.rotations.size());
    std::memcpy(bytes.data(), &header, sizeof header);
    return bytes;
}

}  // namespace vrthinker
