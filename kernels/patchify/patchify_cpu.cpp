// `patchify` on the CPU. Every byte is looked up in a table of 256 values per channel (3 kB, stays in the
// first-level cache) and written `temporal` times. What takes the time is the page faults of a fresh output,
// so a large one asks for huge pages. Stores past the caches were tried: faster into memory that was touched
// before, but slower into the fresh memory that every call gets.
#include <algorithm>
#include <cstring>

#include "host.h"
#include "patchify/patchify.h"

namespace vrthinker {
namespace {

// What a further thread must have to write to be worth starting.
constexpr std::int64_t kBytesPerThread = 8 * 1024 * 1024;

// kPatch and kPixelStride are compile-time copies of the shape's values, or 0 to read them from it.
template <typename Value, int kPatch, int kPixelStride>
void fill_row(const PatchifyShape& shape, const std::uint8_t* corner, const PatchifyTable<Value>& table,
              Value* row) {
    const int patch = kPatch ? kPatch : shape.patch;
    const std::int64_t pixel_stride = kPixelStride ? kPixelStride : shape.pixel_stride;
    const std::int32_t area = patch * patch;
    for (int c = 0; c < kChannels; ++c) {
        const Value* values = table.data() + c * 256;
        Value* first_copy = row + static_cast<std::int64_t>(c) * shape.temporal * area;
        for (int y = 0; y < patch; ++y) {
            const std::uint8_t* pixels = corner + y * shape.row_stride + c * shape.channel_stride;
            for (int x = 0; x < patch; ++x) {
                first_copy[y * patch + x] = values[pixels[x * pixel_stride]];
            }
        }
        for (int t = 1; t < shape.temporal; ++t) {
            std::memcpy(first_copy + t * area, first_copy, sizeof(Value) * area);
        }
    }
}

// Rows [begin, end) of the output.
template <typename Value, int kPatch, int kPixelStride>
void patchify_rows(const PatchifyShape& shape, const std::uint8_t* frames, const PatchifyTable<Value>& table,
                   Value* out, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        fill_row<Value, kPatch, kPixelStride>(shape, frames + patch_offset(shape, row), table,
                                              out + row * shape.row_length());
    }
}

template <typename Value>
using RowsFunction = void (*)(const PatchifyShape&, const std::uint8_t*, const PatchifyTable<Value>&, Value*,
                              std::int64_t, std::int64_t);

template <typename Value>
RowsFunction<Value> choose_rows(const PatchifyShape& shape) {
    if (shape.pixel_stride == 3 && shape.patch == 14) {
        return &patchify_rows<Value, 14, 3>;
    }
    if (shape.pixel_stride == 3 && shape.patch == 16) {
        return &patchify_rows<Value, 16, 3>;
    }
    return &patchify_rows<Value, 0, 0>;
}

}  // namespace

PatchifyTable<float> make_float_table(const std::array<double, kChannels>& mean,
                                      const std::array<double, kChannels>& std) {
    PatchifyTable<float> table;
    for (int c = 0; c < kChannels; ++c) {
        for (int value = 0; value < 256; ++value) {
            const auto rescaled = static_cast<float>(value * (1.0 / 255.0));
            table[c * 256 + value] = (rescaled - static_cast<float>(mean[c])) / static_cast<float>(std[c]);
        }
    }
    return table;
}

PatchifyTable<std::uint16_t> make_bfloat16_table(const std::array<double, kChannels>& mean,
                                                 const std::array<double, kChannels>& std) {
    const PatchifyTable<float> exact = make_float_table(mean, std);
    PatchifyTable<std::uint16_t> table;
    std::transform(exact.begin(), exact.end(), table.begin(), BFloat16::narrow);
    return table;
}

template <typename Value>
void patchify_cpu(const PatchifyShape& shape, const std::uint8_t* frames, const PatchifyTable<Value>& table,
                  Value* out, int threads) {
    const std::int64_t rows = shape.rows();
    const std::int64_t row_bytes = static_cast<std::int64_t>(sizeof(Value)) * shape.row_length();
    advise_huge_pages(out, rows * row_bytes);
    const RowsFunction<Value> run = choose_rows<Value>(shape);
    parallel_for(rows, kBytesPerThread / row_bytes, threads,
                 [&](std::int64_t begin, std::int64_t end) { run(shape, frames, table, out, begin, end); });
}

template <typename Value>
void patchify_cuda_emulated(const PatchifyShape& shape, const std::uint8_t* frames,
                            const PatchifyTable<Value>& table, Value* out) {
    constexpr std::int32_t kThreads = 96;
    for (std::int64_t row = 0; row < shape.rows(); ++row) {
        for (std::int32_t thread = 0; thread < kThreads; ++thread) {
            if (shape.area() % 4 == 0) {
                patchify_thread<Value, 4>(shape, frames, table.data(), out, row, thread, kThreads);
            } else {
                patchify_thread<Value, 1>(shape, frames, table.data(), out, row, thread, kThreads);
            }
        }
    }
}

template void patchify_cpu(const PatchifyShape&, const std::uint8_t*, const PatchifyTable<float>&, float*,
                           int);
template void patchify_cpu(const PatchifyShape&, const std::uint8_t*, const PatchifyTable<std::uint16_t>&,
                           std::uint16_t*, int);
template void patchify_cuda_emulated(const PatchifyShape&, const std::uint8_t*, const PatchifyTable<float>&,
                                     float*);
template void patchify_cuda_emulated(const PatchifyShape&, const std::uint8_t*,
                                     const PatchifyTable<std::uint16_t>&, std::uint16_t*);

}  // namespace vrthinker
