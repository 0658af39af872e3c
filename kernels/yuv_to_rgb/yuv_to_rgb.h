// `yuv_to_rgb`: decoded pictures in 4:2:0 with 8 bits to RGB, in exact integer arithmetic.
#pragma once

#include <cstdint>

namespace vrthinker {

// A picture's three planes. Strides are in bytes; the chroma planes have half the width and half the height.
struct YuvPlanes {
    const std::uint8_t* y;
    const std::uint8_t* u;
    const std::uint8_t* v;
    std::int64_t y_stride;
    std::int64_t u_stride;
    std::int64_t v_stride;
    std::int64_t height;  // of the picture, even
    std::int64_t width;   // of the picture, even
};

// How a picture's numbers become colours. Factors have 13 fractional bits and are below 2^15 in size.
struct YuvColours {
    std::int32_t black;  // the luma of black: 0 or 16
    std::int32_t y;
    std::int32_t v_to_red;
    std::int32_t u_to_green;
    std::int32_t v_to_green;
    std::int32_t u_to_blue;
    // Where the chroma samples lie, in halves of a luma pixel from the first pixel of their block: 0 or 1 to
    // the right, 0, 1 or 2 down.
    int right;
    int down;
};

// Writes `height` rows of `width` pixels of three bytes, one after the other.
void yuv_to_rgb_cpu(const YuvPlanes& planes, const YuvColours& colours, std::uint8_t* rgb);

}  // namespace vrthinker
