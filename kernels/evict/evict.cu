// `evict` on a GPU: picks the kernel's types and launches it, once.
#include "evict/evict_kernel.h"
#include "launch.h"

namespace vrthinker {
namespace {

template <typename Vector, typename Element>
const char* launch(const EvictHeader& header, const char* packed, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(header.blocks);
    if (header.in_place) {
        evict_in_place_kernel<Vector, Element><<<blocks, kEvictThreads, 0, stream>>>(header, packed);
    } else {
        evict_out_of_place_kernel<Vector, Element><<<blocks, kEvictThreads, 0, stream>>>(header, packed);
    }
    return describe(cudaGetLastError());
}

// Where something is turned, a vector is 16 bytes or one element (see `pack_eviction`).
template <typename Element>
const char* launch_rotated(const EvictHeader& header, const char* packed, cudaStream_t stream) {
    if (header.vector_bytes == 16) {
        return launch<EvictVector<16>, Element>(header, packed, stream);
    }
    return launch<EvictVector<sizeof(typename Element::Storage)>, Element>(header, packed, stream);
}

// What is only moved has no element type.
const char* launch_bytes(const EvictHeader& header, const char* packed, cudaStream_t stream) {
    switch (header.vector_bytes) {
        case 16:
            return launch<EvictVector<16>, Bytes>(header, packed, stream);
        case 8:
            return launch<EvictVector<8>, Bytes>(header, packed, stream);
        case 4:
            return launch<EvictVector<4>, Bytes>(header, packed, stream);
        case 2:
            return launch<EvictVector<2>, Bytes>(header, packed, stream);
        default:
            return launch<EvictVector<1>, Bytes>(header, packed, stream);
    }
}

}  // namespace

const char* evict_cuda(const EvictHeader& header, const char* packed, int device, std::uintptr_t stream) {
    if (header.blocks == 0) {
        return nullptr;
    }
    if (header.blocks > 0x7fffffff) {
        return "more than 2^31 - 1 blocks: give fewer tensors at a time";
    }
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) {
        return describe(guard.status());
    }
    switch (static_cast<EvictElement>(header.element)) {
        case EvictElement::kFloat32:
            return launch_rotated<Float32>(header, packed, as_stream(stream));
        case EvictElement::kBFloat16:
            return launch_rotated<BFloat16>(header, packed, as_stream(stream));
        case EvictElement::kFloat16:
            return launch_rotated<Float16>(header, packed, as_stream(stream));
        case EvictElement::kBytes:
            break;
    }
    return launch_bytes(header, packed, as_stream(stream));
}

}  // namespace vrthinker
