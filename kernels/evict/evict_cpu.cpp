// `evict` on the CPU. A run of rows that lie one behind the other is one memmove; lanes are shared among
// threads. Nothing is allocated that grows with the cache.
#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "evict/evict.h"
#include "host.h"

// Copies of a function for newer instruction sets, chosen when the module loads: the wheel itself is built
// for every x86-64. Not under AddressSanitizer, which is not ready when the choice is made.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define VRTHINKER_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define VRTHINKER_CLONES
#endif

namespace vrthinker {
namespace {

// What a further thread must have to move to be worth starting.
constexpr std::int64_t kBytesPerThread = 1024 * 1024;
// From here on a call moves more than stays in the caches anyway.
constexpr std::int64_t kStreamBytes = 16 * 1024 * 1024;
constexpr std::int64_t kLeastStreamBytes = 16 * 1024;

// One head of one row: pairs (i, i + half) are turned. Two rows never overlap in part: a row moves by whole
// rows.
template <typename Element>
[[gnu::always_inline]] inline void rotate_head(const char* from, char* to, const float* table,
                                               std::int64_t half) {
    using Storage = typename Element::Storage;
    const auto* source = reinterpret_cast<const Storage*>(from);
    auto* target = reinterpret_cast<Storage*>(to);
    // Each pair is read before it is written, and no pair is another's: also where source and target are one.
#pragma GCC ivdep
    for (std::int64_t i = 0; i < half; ++i) {
        const RotatedPair turned = rotate_pair(Element::widen(source[i]), Element::widen(source[half + i]),
                                               table[2 * i], table[2 * i + 1]);
        target[i] = Element::narrow(turned.low);
        target[half + i] = Element::narrow(turned.high);
    }
}

struct Rows {
    const char* source;
    char* target;
    std::int64_t count;
    std::int64_t source_stride;
    std::int64_t target_stride;
};

template <typename Element>
[[gnu::always_inline]] inline void rotate_rows(const Rows& rows, std::int64_t row_bytes, const float* table,
                                               std::int64_t half) {
    const auto head_bytes = static_cast<std::int64_t>(2 * half * sizeof(typename Element::Storage));
    for (std::int64_t row = 0; row < rows.count; ++row) {
        for (std::int64_t head = 0; head < row_bytes; head += head_bytes) {
            rotate_head<Element>(rows.source + row * rows.source_stride + head,
                                 rows.target + row * rows.target_stride + head, table, half);
        }
    }
}

VRTHINKER_CLONES void rotate_float32(const Rows& rows, std::int64_t row_bytes, const float* table,
                                     std::int64_t half) {
    rotate_rows<Float32>(rows, row_bytes, table, half);
}

VRTHINKER_CLONES void rotate_bfloat16(const Rows& rows, std::int64_t row_bytes, const float* table,
                                      std::int64_t half) {
    rotate_rows<BFloat16>(rows, row_bytes, table, half);
}

VRTHINKER_CLONES void rotate_float16(const Rows& rows, std::int64_t row_bytes, const float* table,
                                     std::int64_t half) {
    rotate_rows<Float16>(rows, row_bytes, table, half);
}

// memmove to a lower address (or elsewhere), with stores that go past the caches: a line that is overwritten
// whole need not be read first, which is a third of the traffic. For moves that are larger than the caches.
void stream_rows(char* target, const char* source, std::int64_t bytes) {
#if defined(__SSE2__)
    const auto unaligned = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(target) & 15U);
    const std::int64_t head = std::min(unaligned, bytes);
    std::memmove(target, source, static_cast<std::size_t>(head));
    std::int64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
        const auto* from = reinterpret_cast<const __m128i*>(source + at);
        auto* to = reinterpret_cast<__m128i*>(target + at);
        const __m128i first = _mm_loadu_si128(from);
        const __m128i second = _mm_loadu_si128(from + 1);
        const __m128i third = _mm_loadu_si128(from + 2);
        const __m128i fourth = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, first);
        _mm_stream_si128(to + 1, second);
        _mm_stream_si128(to + 2, third);
        _mm_stream_si128(to + 3, fourth);
    }
    std::memmove(target + at, source + at, static_cast<std::size_t>(bytes - at));
#else
    std::memmove(target, source, static_cast<std::size_t>(bytes));
#endif
}

void move_rows(const EvictTensor& tensor, const Rows& rows, const float* table, std::int64_t half,
               bool stream) {
    if (table != nullptr) {
        switch (tensor.element) {
            case EvictElement::kFloat32:
                return rotate_float32(rows, tensor.row_bytes, table, half);
            case EvictElement::kBFloat16:
                return rotate_bfloat16(rows, tensor.row_bytes, table, half);
            case EvictElement::kFloat16:
                return rotate_float16(rows, tensor.row_bytes, table, half);
            case EvictElement::kBytes:
                break;
        }
    }
    if (rows.source_stride == tensor.row_bytes && rows.target_stride == tensor.row_bytes) {
        const std::int64_t bytes = rows.count * tensor.row_bytes;
        if (stream && bytes >= kLeastStreamBytes) {
            stream_rows(rows.target, rows.source, bytes);
        } else {
            std::memmove(rows.target, rows.source, static_cast<std::size_t>(bytes));
        }
        return;
    }
    for (std::int64_t row = 0; row < rows.count; ++row) {
        std::memcpy(rows.target + row * rows.target_stride, rows.source + row * rows.source_stride,
                    static_cast<std::size_t>(tensor.row_bytes));
    }
}

// Rows that lie one stride apart: to the end of the run, or of the block on either side.
std::int64_t rows_together(const Eviction& eviction, const EvictRun& run, std::int64_t done) {
    std::int64_t rows = run.count - done;
    if (eviction.block_size > 0) {
        rows = std::min({rows, eviction.block_size - (run.source + done) % eviction.block_size,
                         eviction.block_size - (run.target + done) % eviction.block_size});
    }
    return rows;
}

void evict_lane(const Eviction& eviction, const EvictTensor& tensor, std::int64_t sequence, std::int64_t lane,
                bool stream) {
    const char* source = tensor.source + lane_offset(tensor.outer_size, tensor.source_outer, lane);
    char* target = tensor.target + lane_offset(tensor.outer_size, tensor.target_outer, lane);
    const std::int64_t* block_table = eviction.tables.data() + sequence * eviction.table_width;
    std::int64_t filled = 0;
    for (std::int64_t i = eviction.run_offsets[sequence]; i < eviction.run_offsets[sequence + 1]; ++i) {
        const EvictRun& run = eviction.runs[i];
        const float* table = tensor.head_bytes > 0 && run.rotation >= 0
                                 ? eviction.rotations.data() + run.rotation * eviction.half * 2
                                 : nullptr;
        for (std::int64_t done = 0; done < run.count;) {
            const std::int64_t count = rows_together(eviction, run, done);
            const Rows rows{
                .source = source + row_offset(tensor.source_batch, tensor.source_token, block_table,
                                              eviction.block_size, sequence, run.source + done),
                .target = target + row_offset(tensor.target_batch, tensor.target_token, block_table,
                                              eviction.block_size, sequence, run.target + done),
                .count = count,
                .source_stride = tensor.source_token,
                .target_stride = tensor.target_token};
            if (rows.source != rows.target || table != nullptr) {
                move_rows(tensor, rows, table, eviction.half, stream);
            }
            done += count;
        }
        filled = run.target + run.count;
    }
    for (std::int64_t row = filled; row < eviction.out_tokens; ++row) {
        std::memset(target + sequence * tensor.target_batch + row * tensor.target_token, 0,
                    static_cast<std::size_t>(tensor.row_bytes));
    }
}

}  // namespace

void evict_cpu(const Eviction& eviction, int threads) {
    std::vector<std::int64_t> first_item;  // of each tensor; an item is a lane of a sequence
    std::int64_t items = 0;
    std::int64_t lane_bytes = 0;
    std::int64_t moved = 0;
    std::int64_t rows = 0;
    for (const EvictRun& run : eviction.runs) {
        rows += run.count;
    }
    for (const EvictTensor& tensor : eviction.tensors) {
        first_item.push_back(items);
        items += tensor.lanes() * eviction.batch();
        moved += tensor.lanes() * tensor.row_bytes * rows;
        lane_bytes =
            std::max(lane_bytes, tensor.row_bytes * rows / std::max<std::int64_t>(1, eviction.batch()));
    }
    // Only in place: fresh memory of an output is wanted in the caches, where it is read next.
    const bool stream = eviction.in_place && moved >= kStreamBytes;
    const std::int64_t grain = kBytesPerThread / std::max<std::int64_t>(1, lane_bytes) + 1;
    parallel_for(items, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const auto after = std::upper_bound(first_item.begin(), first_item.end(), item);
            const std::int64_t number = after - first_item.begin() - 1;
            const EvictTensor& tensor = eviction.tensors[number];
            const std::int64_t in_tensor = item - first_item[number];
            evict_lane(eviction, tensor, in_tensor / tensor.lanes(), in_tensor % tensor.lanes(), stream);
        }
#if defined(__SSE2__)
        _mm_sfence();  // before another thread may read what was streamed
#endif
    });
}

}  // namespace vrthinker
