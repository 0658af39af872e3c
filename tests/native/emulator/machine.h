// What runs one block of a kernel: a fiber per thread, and the rendezvous that let them go on. Included by
// emulator.h, which says what for.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr unsigned count() const { return x * y * z; }
    constexpr uint3 at(unsigned i) const { return {i % x, i / x % y, i / x / y}; }
};

namespace vrthinker::emulator {

inline constexpr int kFaultExit = 70;
inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMostThreads = 1024;  // of a block
inline constexpr unsigned kWholeBlock = 0;      // as a mask of lanes
inline constexpr std::size_t kStackBytes = 256 * 1024;

struct Coordinates {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
inline Coordinates now;

using Site = std::source_location;
using Lanes = std::array<std::uint64_t, kWarp>;

// What a thread waits for: the lanes in `mask` of its warp, or its whole block, at the same intrinsic.
struct Wait {
    const char* intrinsic = nullptr;
    unsigned mask = kWholeBlock;
    bool same_site = true;  // must all wait at one place of the source
    Site site{};
    std::uint64_t value = 0;  // what the thread brings for the others
};

enum class State { kReady, kWaiting, kReturned };

struct Thread {
    ucontext_t context{};
    char* stack = nullptr;
    void* fake_stack = nullptr;
    State state = State::kReady;
    Wait wait;
    Lanes heard{};  // what the lanes of the last rendezvous brought
};

// Splitmix64: <random> takes a second to compile.
class Random {
  public:
    explicit Random(std::uint64_t seed = 0) : state_(seed) {}
    unsigned below(std::size_t bound) { return static_cast<unsigned>(next() % bound); }

  private:
    std::uint64_t next() {
        std::uint64_t value = state_ += 0x9e3779b97f4a7c15U;
        value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9U;
        value = (value ^ (value >> 27)) * 0x94d049bb133111ebU;
        return value ^ (value >> 31);
    }
    std::uint64_t state_;
};

class Machine {
  public:
    // Runs `body(closure)` once per thread of the block that `now` names.
    void run_block(void (*body)(const void*), const void* closure, std::uint64_t seed, Random& random) {
        body_ = body;
        closure_ = closure;
        seed_ = seed;
        prepare(now.block_size.count());
        stickiness_ = random.below(3) * 2;
        std::vector<unsigned> ready(count_);
        for (unsigned i = 0; i < count_; ++i) {
            ready[i] = i;
        }
        while (returned_ < count_) {
            if (ready.empty()) {
                report_stuck();
            }
            const unsigned chosen = take(ready, random);
            resume(chosen);
            switch (threads_[chosen].state) {
                case State::kReady:  // it only gave the others a chance
                    ready.push_back(chosen);
                    break;
                case State::kWaiting:
                    release_if_complete(chosen, ready);
                    break;
                case State::kReturned:
                    ++returned_;
            }
        }
        running_ = kNone;
    }

    // From inside a kernel: waits until everyone whom `wait` names waits too; returns what they brought.
    const Lanes& meet(const Wait& wait) {
        Thread& self = threads_[running_];
        self.wait = wait;
        if (wait.mask != kWholeBlock && (wait.mask >> lane() & 1U) == 0) {
            fault("a lane that its own mask does not name", wait.intrinsic);
        }
        self.state = State::kWaiting;
        suspend(self);
        return self.heard;
    }

    // From inside a kernel: another thread may run now. Nothing happens on the host side.
    void yield() {
        if (running_ != kNone) {
            suspend(threads_[running_]);
        }
    }

    unsigned lane() const { return running_ % kWarp; }

    [[noreturn]] void fault(const char* what, const char* intrinsic = "") const {
        std::fflush(stdout);
        std::fprintf(stderr, "emulator: %s%s%s: block (%u, %u, %u) of %u threads, seed %llu\n", intrinsic,
                     *intrinsic ? ": " : "", what, now.block.x, now.block.y, now.block.z, count_,
                     static_cast<unsigned long long>(seed_));
        report_threads();
        std::_Exit(kFaultExit);
    }

  private:
    static constexpr unsigned kNone = ~0U;

    void prepare(unsigned count) {
        count_ = count;
        returned_ = 0;
        waiting_ = 0;
        waiting_in_warp_.fill(0);
        last_ = 0;
        if (threads_.size() < count) {
            threads_.resize(count);
        }
        for (unsigned i = 0; i < count; ++i) {
            Thread& thread = threads_[i];
            if (!thread.stack) {
                thread.stack = new_stack();
            }
#if defined(__SANITIZE_ADDRESS__)
            // The frames of the fiber that used the stack before were left, not returned from.
            __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
            thread.state = State::kReady;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack;
            thread.context.uc_stack.ss_size = kStackBytes;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, &Machine::fiber, 0);
            // AddressSanitizer clears its red zones on the stack that a context names whenever it is
            // switched to; the context needs the stack no longer, so it names none.
            thread.context.uc_stack.ss_size = 0;
        }
    }

    // With a page below it that faults: a kernel that overflows its stack must not write into the next.
    char* new_stack() {
        constexpr std::size_t kGuard = 4096;
        void* memory = mmap(nullptr, kGuard + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
            fault("no memory for a stack");
        }
        return static_cast<char*>(memory) + kGuard;
    }

    // A random ready thread. In some blocks never, in some half of the time, in some whenever it can be one
    // of the warp that ran last: then a warp runs far ahead, to where only a barrier holds it.
    unsigned take(std::vector<unsigned>& ready, Random& random) {
        const std::size_t count = ready.size();
        unsigned* const threads = ready.data();  // unoptimised, every use of a vector is a call
        std::size_t at = random.below(count);
        if (random.below(4) < stickiness_) {
            const unsigned warp = last_ / kWarp;
            for (std::size_t i = 0, candidate = at; i < count; ++i) {
                if (threads[candidate] / kWarp == warp) {
                    at = candidate;
                    break;
                }
                candidate = candidate + 1 < count ? candidate + 1 : 0;
            }
        }
        last_ = threads[at];
        threads[at] = threads[count - 1];
        ready.pop_back();
        return last_;
    }

    void release_if_complete(unsigned arrived, std::vector<unsigned>& ready) {
        Thread* const threads = threads_.data();
        const Wait& wait = threads[arrived].wait;
        const bool whole = wait.mask == kWholeBlock;
        const unsigned warp = arrived / kWarp;
        ++waiting_;
        ++waiting_in_warp_[warp];
        // Most arrivals are not the last one: that is seen without a look at the others.
        if (whole ? waiting_ < count_
                  : waiting_in_warp_[warp] < static_cast<unsigned>(__builtin_popcount(wait.mask))) {
            return;
        }
        const unsigned first = whole ? 0 : warp * kWarp;
        const unsigned last = whole ? count_ : first + kWarp;
        const auto named = [&](unsigned i) { return whole || (wait.mask >> (i - first) & 1U) != 0; };
        Lanes brought;
        brought.fill(~std::uint64_t{0});  // from lanes that the mask does not name: undefined
        for (unsigned i = first; i < last; ++i) {
            if (!named(i)) {
                continue;
            }
            if (i >= count_ || threads[i].state != State::kWaiting || !agree(threads[i].wait, wait)) {
                return;
            }
            brought[i % kWarp] = threads[i].wait.value;
        }
        for (unsigned i = first; i < last; ++i) {
            if (named(i)) {
                threads[i].state = State::kReady;
                threads[i].heard = brought;
                --waiting_;
                --waiting_in_warp_[i / kWarp];
                ready.push_back(i);
            }
        }
    }

    // Equal texts mostly are one text: comparing characters is what costs.
    static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

    static bool same(const Site& a, const Site& b) {
        return a.line() == b.line() && a.column() == b.column() && same(a.file_name(), b.file_name());
    }

    static bool agree(const Wait& a, const Wait& b) {
        return same(a.intrinsic, b.intrinsic) && a.mask == b.mask && (!a.same_site || same(a.site, b.site));
    }

    [[noreturn]] void report_stuck() const {
        for (unsigned i = 0; i < count_; ++i) {
            if (threads_[i].state == State::kWaiting && threads_[i].wait.mask != kWholeBlock) {
                fault("lanes that never all arrive", threads_[i].wait.intrinsic);
            }
        }
        fault("divergent barrier", "__syncthreads");
    }

    // Who waits where, each place once, and how many have returned.
    void report_threads() const {
        for (unsigned i = 0; i < count_; ++i) {
            const Wait& wait = threads_[i].wait;
            unsigned alike = 0;
            bool told = threads_[i].state != State::kWaiting;
            for (unsigned j = 0; j < count_ && !told; ++j) {
                const bool like = threads_[j].state == State::kWaiting &&
                                  same(threads_[j].wait.site, wait.site) &&
                                  threads_[j].wait.mask == wait.mask;
                told = like && j < i;
                alike += like;
            }
            if (!told) {
                std::fprintf(stderr, "  %u wait in %s, lanes %08x, the first is thread %u: %s:%u, %s\n",
                             alike, wait.intrinsic, wait.mask == kWholeBlock ? ~0U : wait.mask, i,
                             wait.site.file_name(), wait.site.line(), wait.site.function_name());
            }
        }
        if (returned_ > 0) {
            std::fprintf(stderr, "  %u have returned\n", returned_);
        }
    }

    void resume(unsigned i) {
        running_ = i;
        now.thread = now.block_size.at(i);
        [[maybe_unused]] void* fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fake_stack, threads_[i].stack, kStackBytes);
#endif
        swapcontext(&scheduler_, &threads_[i].context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
        running_ = kNone;
    }

    void suspend(Thread& self) {
#if defined(__SANITIZE_ADDRESS__)
        const bool over = self.state == State::kReturned;
        __sanitizer_start_switch_fiber(over ? nullptr : &self.fake_stack, scheduler_stack_, scheduler_bytes_);
#endif
        swapcontext(&self.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
    }

    static void fiber();

    std::vector<Thread> threads_;
    ucontext_t scheduler_{};
    [[maybe_unused]] const void* scheduler_stack_ = nullptr;
    [[maybe_unused]] std::size_t scheduler_bytes_ = 0;
    void (*body_)(const void*) = nullptr;
    const void* closure_ = nullptr;
    std::uint64_t seed_ = 0;
    unsigned count_ = 0;
    unsigned returned_ = 0;
    unsigned waiting_ = 0;
    std::array<unsigned, kMostThreads / kWarp> waiting_in_warp_{};
    unsigned running_ = kNone;
    unsigned last_ = 0;
    unsigned stickiness_ = 2;
};

inline Machine machine;

inline void Machine::fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_, &machine.scheduler_bytes_);
#endif
    machine.body_(machine.closure_);
    Thread& self = machine.threads_[machine.running_];
    self.state = State::kReturned;
    machine.suspend(self);
}

}  // namespace vrthinker::emulator
