// Where every value of the patch layout comes from: index arithmetic shared by the C++ and the CUDA
// version, so that the CPU test suite runs the very lines that the GPU runs.
//
// Row r of the output is one patch of one frame. Within a frame the patches come in merge blocks (the
// merge x merge patches that become one token stand together), blocks row by row. Inside a row the order
// is channel, temporal copy, y, x: value (c, t, k) stands at (c * temporal + t) * patch^2 + k.
#pragma once

#include <cstdint>

#include "device.h"

namespace vrthinker {

inline constexpr int kChannels = 3;
inline constexpr int kTableSize = kChannels * 256;  // table[c * 256 + value]

// Sizes in pixels, strides in bytes (any sign: views may be permuted or flipped).
struct PatchifyShape {
    std::int64_t frames;
    std::int64_t height;
    std::int64_t width;
    std::int64_t frame_stride;
    std::int64_t row_stride;
    std::int64_t pixel_stride;
    std::int64_t channel_stride;
    std::int32_t patch;
    std::int32_t merge;
    std::int32_t temporal;

    VRTHINKER_HOST_DEVICE std::int64_t rows() const { return frames * (height / patch) * (width / patch); }
    VRTHINKER_HOST_DEVICE std::int32_t area() const { return patch * patch; }
    VRTHINKER_HOST_DEVICE std::int32_t row_length() const { return kChannels * temporal * area(); }
};

// Byte offset of the top left pixel (channel 0) of the patch that output row `row` holds.
VRTHINKER_HOST_DEVICE inline std::int64_t patch_offset(const PatchifyShape& shape, std::int64_t row) {
    const std::int64_t grid_height = shape.height / shape.patch;
    const std::int64_t grid_width = shape.width / shape.patch;
    const std::int64_t frame = row / (grid_height * grid_width);
    const std::int64_t in_frame = row - frame * grid_height * grid_width;
    const std::int64_t block = in_frame / (shape.merge * shape.merge);
    const std::int64_t in_block = in_frame - block * shape.merge * shape.merge;
    const std::int64_t blocks_across = grid_width / shape.merge;
    const std::int64_t grid_y = block / blocks_across * shape.merge + in_block / shape.merge;
    const std::int64_t grid_x = block % blocks_across * shape.merge + in_block % shape.merge;
    return frame * shape.frame_stride + grid_y * shape.patch * shape.row_stride +
           grid_x * shape.patch * shape.pixel_stride;
}

// Byte offset, from the patch's top left pixel, of pixel k = y * patch + x in channel c.
VRTHINKER_HOST_DEVICE inline std::int64_t pixel_offset(const PatchifyShape& shape, std::int32_t c,
                                                       std::int32_t k) {
    const std::int32_t y = k / shape.patch;
    const std::int32_t x = k - y * shape.patch;
    return y * shape.row_stride + x * shape.pixel_stride + c * shape.channel_stride;
}

template <typename Value, int kWidth>
struct alignas(sizeof(Value) * kWidth) Pack {
    Value values[kWidth];
};

// The body of the CUDA kernel: what thread `thread` of the `threads` that share output row `row` does.
// Each step reads kWidth pixels of one channel and writes them to every temporal copy; kWidth must
// divide patch^2, and `out` must be aligned to kWidth values.
template <typename Value, int kWidth>
VRTHINKER_HOST_DEVICE inline void patchify_thread(const PatchifyShape& shape, const std::uint8_t* frames,
                                                  const Value* table, Value* out, std::int64_t row,
                                                  std::int32_t thread, std::int32_t threads) {
    const std::uint8_t* patch = frames + patch_offset(shape, row);
    Value* out_row = out + row * shape.row_length();
    const std::int32_t area = shape.area();
    for (std::int32_t first = thread * kWidth; first < kChannels * area; first += threads * kWidth) {
        const std::int32_t c = first / area;
        const std::int32_t k = first - c * area;
        Pack<Value, kWidth> pack;
        for (int i = 0; i < kWidth; ++i) {
            pack.values[i] = table[c * 256 + patch[pixel_offset(shape, c, k + i)]];
        }
        for (std::int32_t t = 0; t < shape.temporal; ++t) {
            *reinterpret_cast<Pack<Value, kWidth>*>(out_row + (c * shape.temporal + t) * area + k) = pack;
        }
    }
}

}  // namespace vrthinker
