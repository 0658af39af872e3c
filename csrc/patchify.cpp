// `patchify` from Python: checks every argument, then runs a version of kernels/patchify/ without the GIL.
#include "patchify/patchify.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

using Triple = std::array<double, kChannels>;

constexpr int kMaxSize = 1024;  // of patch, merge and temporal: far above any model, keeps products in int32

void require_size(const char* argument, std::int64_t value) {
    if (value < 1 || value > kMaxSize) {
        throw py::value_error(std::string("patchify: ") + argument + ": got " + std::to_string(value) +
                              ", wanted 1 to " + std::to_string(kMaxSize));
    }
}

void require_statistics(const Triple& mean, const Triple& std) {
    for (int c = 0; c < kChannels; ++c) {
        if (!std::isfinite(static_cast<float>(mean[c]))) {
            throw py::value_error("patchify: mean: got " + std::to_string(mean[c]) +
                                  ", wanted finite numbers");
        }
        if (!std::isfinite(static_cast<float>(std[c])) || static_cast<float>(std[c]) <= 0.0F) {
            throw py::value_error("patchify: std: got " + std::to_string(std[c]) +
                                  ", wanted finite numbers above 0");
        }
    }
}

PatchifyShape check_shape(const TensorView& frames, std::int64_t patch, std::int64_t merge,
                          std::int64_t temporal) {
    require_size("patch_size", patch);
    require_size("merge_size", merge);
    require_size("temporal_patch_size", temporal);
    if (kChannels * temporal * patch * patch > std::numeric_limits<std::int32_t>::max() / 4) {
        throw py::value_error("patchify: got patches of " + std::to_string(patch) + " x " +
                              std::to_string(patch) + " x " + std::to_string(temporal) +
                              ", wanted fewer than 2^27 values each");
    }
    frames.require_dtype(dlpack::kUInt, 8);
    frames.require_rank(4, "[n, height, width, 3]");
    const auto& sizes = frames.shape();
    const std::int64_t factor = patch * merge;
    if (sizes[3] != kChannels) {
        frames.fail("shape " + shape_name(sizes), "[n, height, width, 3]");
    }
    if (sizes[1] % factor != 0 || sizes[2] % factor != 0 || sizes[1] == 0 || sizes[2] == 0) {
        frames.fail("height " + std::to_string(sizes[1]) + " and width " + std::to_string(sizes[2]),
                    "multiples of patch_size * merge_size = " + std::to_string(factor));
    }
    const auto& strides = frames.strides();
    return {.frames = sizes[0],
            .height = sizes[1],
            .width = sizes[2],
            .frame_stride = strides[0],
            .row_stride = strides[1],
            .pixel_stride = strides[2],
            .channel_stride = strides[3],
            .patch = static_cast<std::int32_t>(patch),
            .merge = static_cast<std::int32_t>(merge),
            .temporal = static_cast<std::int32_t>(temporal)};
}

// What every version gets, checked.
struct Call {
    Call(const py::object& frames_object, const py::object& out_object, std::int64_t patch,
         std::int64_t merge, std::int64_t temporal, const Triple& mean_values, const Triple& std_values,
         dlpack::DeviceType device)
        : frames(frames_object, "patchify", "frames"),
          out(out_object, "patchify", "out"),
          mean(mean_values),
          std(std_values) {
        frames.require_device(device);
        out.require_device(device);
        shape = check_shape(frames, patch, merge, temporal);
        require_statistics(mean, std);
        if (frames.device().id != out.device().id) {
            out.fail(device_name(out.device()), "the frames' device, " + device_name(frames.device()));
        }
        out.require_shape({shape.rows(), shape.row_length()});
        out.require_contiguous();
        out.require_writable();
        is_bfloat16 = out.dtype().code == dlpack::kBfloat && out.dtype().bits == 16;
        if (!is_bfloat16 && !(out.dtype().code == dlpack::kFloat && out.dtype().bits == 32)) {
            out.fail("dtype " + dtype_name(out.dtype().code, out.dtype().bits), "float32 or bfloat16");
        }
        if (reinterpret_cast<std::uintptr_t>(out.data()) % (is_bfloat16 ? 8 : 16) != 0) {
            out.fail("memory that is not aligned to four values", "aligned memory");
        }
    }

    // Calls run(table, out) with the table and the pointer of the output's type, without the GIL.
    template <typename Run>
    void dispatch(Run run) const {
        py::gil_scoped_release release;
        if (is_bfloat16) {
            run(make_bfloat16_table(mean, std), static_cast<std::uint16_t*>(out.data()));
        } else {
            run(make_float_table(mean, std), static_cast<float*>(out.data()));
        }
    }

    const std::uint8_t* pixels() const { return static_cast<const std::uint8_t*>(frames.data()); }

    TensorView frames;
    TensorView out;
    Triple mean;
    Triple std;
    PatchifyShape shape{};
    bool is_bfloat16 = false;
};

void run_cpu(const py::object& frames, const py::object& out, std::int64_t patch_size,
             std::int64_t merge_size, std::int64_t temporal_patch_size, const Triple& mean, const Triple& std,
             int num_threads) {
    const Call call(frames, out, patch_size, merge_size, temporal_patch_size, mean, std, dlpack::kCpu);
    if (num_threads < 1) {
        throw py::value_error("patchify: num_threads: got " + std::to_string(num_threads) +
                              ", wanted 1 or more");
    }
    call.dispatch([&](const auto& table, auto* values) {
        patchify_cpu(call.shape, call.pixels(), table, values, num_threads);
    });
}

void run_cuda_emulated(const py::object& frames, const py::object& out, std::int64_t patch_size,
                       std::int64_t merge_size, std::int64_t temporal_patch_size, const Triple& mean,
                       const Triple& std) {
    const Call call(frames, out, patch_size, merge_size, temporal_patch_size, mean, std, dlpack::kCpu);
    call.dispatch([&](const auto& table, auto* values) {
        patchify_cuda_emulated(call.shape, call.pixels(), table, values);
    });
}

#ifdef VRTHINKER_WITH_CUDA
void run_cuda(const py::object& frames, const py::object& out, std::int64_t patch_size,
              std::int64_t merge_size, std::int64_t temporal_patch_size, const Triple& mean,
              const Triple& std, std::uintptr_t stream) {
    const Call call(frames, out, patch_size, merge_size, temporal_patch_size, mean, std, dlpack::kCuda);
    const char* error = nullptr;
    call.dispatch([&](const auto& table, auto* values) {
        error = patchify_cuda(call.shape, call.pixels(), table, values, call.frames.device().id, stream);
    });
    if (error) {
        throw std::runtime_error(std::string("patchify: CUDA: ") + error);
    }
}
#endif

}  // namespace

void bind_patchify(py::module_& module) {
    module.def("patchify_cpu", &run_cpu, py::arg("frames"), py::arg("out"), py::arg("patch_size"),
               py::arg("merge_size"), py::arg("temporal_patch_size"), py::arg("mean"), py::arg("std"),
               py::arg("num_threads"), "Fills `out` with the patch layout of `frames`, both on the CPU.");
    module.def("patchify_cuda_emulated", &run_cuda_emulated, py::arg("frames"), py::arg("out"),
               py::arg("patch_size"), py::arg("merge_size"), py::arg("temporal_patch_size"), py::arg("mean"),
               py::arg("std"), "The CUDA kernel's index arithmetic, run on the CPU (for tests).");
#ifdef VRTHINKER_WITH_CUDA
    module.def("patchify_cuda", &run_cuda, py::arg("frames"), py::arg("out"), py::arg("patch_size"),
               py::arg("merge_size"), py::arg("temporal_patch_size"), py::arg("mean"), py::arg("std"),
               py::arg("stream"), "Queues `patchify` of CUDA tensors on a raw stream.");
#endif
}

}  // namespace vrthinker
