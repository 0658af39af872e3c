// Bodies that the CPU versions of ops compile for several instruction sets.
#pragma once

// One compiled body per instruction set, chosen when the module is loaded; no -march, so the wheel runs
// anywhere. Sanitizers are not up yet when the choice is made.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VRTHINKER_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VRTHINKER_CLONES
#endif
// Parts of the compiled bodies: a function of its own would be compiled for the oldest processors.
#define VRTHINKER_INLINE [[gnu::always_inline]] inline
