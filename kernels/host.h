// What the C++ versions of the ops share: threads, and memory that is cheap to touch.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace vrthinker {

// Runs work(begin, end) over parts of [0, count) on up to `threads` threads, this one included; returns when
// all are done. A part has at least `grain` elements: below that a further thread costs more than it brings
// (starting one can take a millisecond where another pool's idle threads still spin on the cores). `work`
// must not throw. Where the system gives no further thread, this one does the part itself.
template <typename Work>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Work& work) {
    if (count <= 0) {
        return;
    }
    const std::int64_t workers =
        std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1, std::max(threads, 1));
    std::vector<std::jthread> others;
    others.reserve(static_cast<std::size_t>(workers - 1));
    const auto part = [&](std::int64_t i) { work(count * i / workers, count * (i + 1) / workers); };
    std::int64_t started = 1;
    try {
        for (; started < workers; ++started) {
            others.emplace_back(part, started);
        }
    } catch (const std::system_error&) {
        // The parts from `started` on are left.
    }
    part(0);
    for (std::int64_t i = started; i < workers; ++i) {
        part(i);
    }
}

// From here on an output is worth huge pages.
inline constexpr std::int64_t kLargeBytes = 8 * 1024 * 1024;

// Asks for huge pages under a large, fresh output: the page faults of 4 kB pages take longer than filling
// them. Advice only: where the system has no huge pages to give, nothing changes.
inline void advise_huge_pages(void* data, std::int64_t bytes) {
    constexpr std::uintptr_t kHugePage = 2 * 1024 * 1024;
    if (bytes < kLargeBytes) {
        return;
    }
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end =
        (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
    if (begin < end) {
        (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
}

}  // namespace vrthinker
