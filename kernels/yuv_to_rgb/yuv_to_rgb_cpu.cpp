// `yuv_to_rgb` on the CPU, one thread: readers decode several clips side by side. Chroma samples are weighted
// by quarters in each direction, so their sums are whole numbers of 1/16, and nothing is rounded before the
// last step. Loops over a row become vector instructions.
#include "yuv_to_rgb/yuv_to_rgb.h"

#include <algorithm>
#include <vector>

#include "clones.h"

namespace vrthinker {
namespace {

constexpr int kGrey = 2048;    // chroma without colour, in 1/16
constexpr int kLumaBits = 4;   // luma is in 1/16 too
constexpr int kDownBits = 17;  // 13 fractional bits of the factors, and 4 of the samples
constexpr int kBlock = 64;     // pixels whose three colours wait to be interleaved

// The two samples that a row or a column lies between, and their weights in quarters.
struct Between {
    std::int64_t first;
    std::int64_t second;
    int first_weight;
    int second_weight;
};

// `offset` is where the samples lie, in half pixels. Outside the picture its last sample goes on.
Between between(std::int64_t position, int offset, std::int64_t count) {
    const std::int64_t quarters = 2 * position - offset;  // from the first sample, in quarters of a step
    const std::int64_t first = quarters >= 0 ? quarters / 4 : -1;
    const int second_weight = static_cast<int>(quarters - 4 * first);
    return {.first = std::clamp<std::int64_t>(first, 0, count - 1),
            .second = std::clamp<std::int64_t>(first + 1, 0, count - 1),
            .first_weight = 4 - second_weight,
            .second_weight = second_weight};
}

// One row of chroma at full width, in 1/16, grey at 0. `column` has room for a sample before and after.
VRTHINKER_INLINE void spread(const std::uint8_t* plane, std::int64_t stride, const Between& rows,
                             std::int64_t count, int right, std::int16_t* column, std::int16_t* wide) {
    const std::uint8_t* above = plane + rows.first * stride;
    const std::uint8_t* below = plane + rows.second * stride;
    const auto above_weight = static_cast<std::int16_t>(rows.first_weight);
    const auto below_weight = static_cast<std::int16_t>(rows.second_weight);
    std::int16_t* samples = column + 1;
    for (std::int64_t k = 0; k < count; ++k) {
        samples[k] = static_cast<std::int16_t>(above[k] * above_weight + below[k] * below_weight);
    }
    samples[-1] = samples[0];
    samples[count] = samples[count - 1];
    if (right == 0) {
        for (std::int64_t k = 0; k < count; ++k) {
            wide[2 * k] = static_cast<std::int16_t>(4 * samples[k] - kGrey);
            wide[2 * k + 1] = static_cast<std::int16_t>(2 * (samples[k] + samples[k + 1]) - kGrey);
        }
    } else {
        for (std::int64_t k = 0; k < count; ++k) {
            wide[2 * k] = static_cast<std::int16_t>(samples[k - 1] + 3 * samples[k] - kGrey);
            wide[2 * k + 1] = static_cast<std::int16_t>(3 * samples[k] + samples[k + 1] - kGrey);
        }
    }
}

VRTHINKER_INLINE std::uint8_t to_byte(std::int32_t sum) {
    const std::int32_t level = sum >> kDownBits;
    return static_cast<std::uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
}

VRTHINKER_INLINE void write_pixels(const std::uint8_t* luma, const std::int16_t* u, const std::int16_t* v,
                                   const YuvColours& colours, std::int64_t count, std::uint8_t* rgb) {
    std::uint8_t red[kBlock];
    std::uint8_t green[kBlock];
    std::uint8_t blue[kBlock];
    const std::int32_t start = (1 << (kDownBits - 1)) - ((colours.black * colours.y) << kLumaBits);
    const std::int32_t factor = colours.y << kLumaBits;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t grey = luma[i] * factor + start;
        red[i] = to_byte(grey + v[i] * colours.v_to_red);
        green[i] = to_byte(grey + u[i] * colours.u_to_green + v[i] * colours.v_to_green);
        blue[i] = to_byte(grey + u[i] * colours.u_to_blue);
    }
    for (std::int64_t i = 0; i < count; ++i) {
        rgb[3 * i] = red[i];
        rgb[3 * i + 1] = green[i];
        rgb[3 * i + 2] = blue[i];
    }
}

VRTHINKER_CLONES void convert_row(const YuvPlanes& planes, const YuvColours& colours, std::int64_t row,
                                  std::int16_t* column, std::int16_t* u, std::int16_t* v, std::uint8_t* rgb) {
    const std::int64_t count = planes.width / 2;
    const Between rows = between(row, colours.down, planes.height / 2);
    spread(planes.u, planes.u_stride, rows, count, colours.right, column, u);
    spread(planes.v, planes.v_stride, rows, count, colours.right, column, v);
    const std::uint8_t* luma = planes.y + row * planes.y_stride;
    std::int64_t i = 0;
    for (; i + kBlock <= planes.width; i += kBlock) {
        write_pixels(luma + i, u + i, v + i, colours, kBlock, rgb + 3 * i);
    }
    write_pixels(luma + i, u + i, v + i, colours, planes.width - i, rgb + 3 * i);
}

}  // namespace

void yuv_to_rgb_cpu(const YuvPlanes& planes, const YuvColours& colours, std::uint8_t* rgb) {
    std::vector<std::int16_t> column(static_cast<std::size_t>(planes.width / 2 + 2));
    std::vector<std::int16_t> u(static_cast<std::size_t>(planes.width));
    std::vector<std::int16_t> v(static_cast<std::size_t>(planes.width));
    for (std::int64_t row = 0; row < planes.height; ++row) {
        convert_row(planes, colours, row, column.data(), u.data(), v.data(), rgb + row * planes.width * 3);
    }
}

}  // namespace vrthinker
