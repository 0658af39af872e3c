// What every CUDA launch of the package shares. For .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vrthinker {

// Works on `device` and puts back whichever device was current.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&previous_);
        if (status_ == cudaSuccess && previous_ != device) {
            status_ = cudaSetDevice(device);
            changed_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) {
            cudaSetDevice(previous_);
        }
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

  private:
    int previous_ = 0;
    bool changed_ = false;
    cudaError_t status_ = cudaSuccess;
};

inline cudaStream_t as_stream(std::uintptr_t stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}

// nullptr for success, else CUDA's own words.
inline const char* describe(cudaError_t status) {
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

inline int processor_count(int device) {
    int processors = 0;
    return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess
               ? processors
               : 1;
}

}  // namespace vrthinker
