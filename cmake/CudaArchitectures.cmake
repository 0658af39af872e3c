# The GPUs that a CUDA build carries machine code for: A100 (80), RTX 30 (86), RTX 40 and L4 (89),
# H100 and H200 (90), B200 (100), RTX 50 (120); and the PTX of the last, which the driver compiles for
# GPUs that come after it.
set(VRTHINKER_CUDA_ARCHITECTURES
    80-real 86-real 89-real 90-real 100-real 120-real 120-virtual
    CACHE STRING "CUDA architectures to build for")
