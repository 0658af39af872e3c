// `evict` from Python: turns tensors into lanes, checks everything that memory safety rests on, then runs a
// version of kernels/evict/ without the GIL.
#include "evict/evict.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "dlpack.h"
#include "host.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

[[noreturn]] void refuse(const std::string& argument, const std::string& got, const std::string& wanted) {
    throw py::value_error("evict: " + argument + ": got " + got + ", wanted " + wanted);
}

std::int64_t element_bytes(const TensorView& view) {
    const int bits = view.dtype().bits;
    if (bits % 8 != 0 || bits == 0) {
        view.fail("dtype " + dtype_name(view.dtype().code, view.dtype().bits), "whole bytes");
    }
    return bits / 8;
}

EvictElement rotated_element(const TensorView& view) {
    const dlpack::DataType dtype = view.dtype();
    if (dtype.code == dlpack::kFloat && dtype.bits == 32) {
        return EvictElement::kFloat32;
    }
    if (dtype.code == dlpack::kBfloat && dtype.bits == 16) {
        return EvictElement::kBFloat16;
    }
    if (dtype.code == dlpack::kFloat && dtype.bits == 16) {
        return EvictElement::kFloat16;
    }
    view.fail("dtype " + dtype_name(dtype.code, dtype.bits), "float32, bfloat16 or float16 (it is rotated)");
}

// Contiguous host data of a fixed width.
const std::int64_t* int64_data(const TensorView& view) {
    view.require_device(dlpack::kCpu);
    view.require_dtype(dlpack::kInt, 64);
    view.require_contiguous();
    return static_cast<const std::int64_t*>(view.data());
}

// Sees a tensor as lanes: the dimensions that are neither batch nor token, innermost first, become the row as
// long as they are contiguous on both sides, and outer dimensions after that.
EvictTensor as_lanes(const TensorView& source, const TensorView& target, std::size_t batch_dim,
                     std::size_t token_dim, std::int64_t rotated_half) {
    const std::size_t rank = source.shape().size();
    const std::int64_t size = element_bytes(source);
    EvictTensor tensor{};
    tensor.source = static_cast<char*>(source.data());
    tensor.target = static_cast<char*>(target.data());
    tensor.source_batch = source.strides()[batch_dim] * size;
    tensor.target_batch = target.strides()[batch_dim] * size;
    tensor.source_token = source.strides()[token_dim] * size;
    tensor.target_token = target.strides()[token_dim] * size;
    std::fill_n(tensor.outer_size, kOuterDims, 1);
    tensor.element = EvictElement::kBytes;
    std::vector<std::size_t> dims;
    for (std::size_t dim = 0; dim < rank; ++dim) {
        if (dim != batch_dim && dim != token_dim && source.shape()[dim] != 1) {
            dims.push_back(dim);
        }
    }
    std::stable_sort(dims.begin(), dims.end(),
                     [&](std::size_t a, std::size_t b) { return source.strides()[a] < source.strides()[b]; });
    if (rotated_half > 0) {
        if (rank < 3 || batch_dim == rank - 1 || token_dim == rank - 1 ||
            source.shape()[rank - 1] != 2 * rotated_half || source.strides()[rank - 1] != 1 ||
            target.strides()[rank - 1] != 1) {
            source.fail(
                "shape " + shape_name(source.shape()) + " with strides " + shape_name(source.strides()),
                "a contiguous last dimension of " + std::to_string(2 * rotated_half) +
                    ", twice the frequencies");
        }
        tensor.element = rotated_element(source);
        tensor.head_bytes = 2 * rotated_half * size;
        std::stable_partition(dims.begin(), dims.end(), [&](std::size_t dim) { return dim == rank - 1; });
    }
    std::int64_t row = 1;
    int outer = 0;
    for (const std::size_t dim : dims) {
        const std::int64_t count = source.shape()[dim];
        if (outer == 0 && source.strides()[dim] == row && target.strides()[dim] == row) {
            row *= count;
            continue;
        }
        if (outer == kOuterDims) {
            source.fail(
                "strides " + shape_name(source.strides()) + " for shape " + shape_name(source.shape()),
                "at most " + std::to_string(kOuterDims) + " dimensions that are not contiguous");
        }
        tensor.outer_size[outer] = count;
        tensor.source_outer[outer] = source.strides()[dim] * size;
        tensor.target_outer[outer] = target.strides()[dim] * size;
        ++outer;
    }
    tensor.row_bytes = row * size;
    return tensor;
}

// What every version gets, checked. The views keep the memory alive.
struct Call {
    Call(const std::vector<py::object>& sources, const std::vector<py::object>& targets,
         const std::vector<std::size_t>& batch_dims, const std::vector<std::size_t>& token_dims,
         const py::object& runs_object, const py::object& rotations_object, std::size_t n_rotated,
         const py::object& tables_object, std::int64_t block_size, std::int64_t out_tokens,
         dlpack::DeviceType device) {
        const bool in_place = targets.empty();
        if ((!in_place && targets.size() != sources.size()) || batch_dims.size() != sources.size() ||
            token_dims.size() != sources.size()) {
            refuse("tensors", std::to_string(sources.size()), "as many targets and dimensions");
        }
        if (block_size < 0 || out_tokens < 0 || n_rotated > sources.size()) {
            refuse("sizes", "one out of range", "0 or more");
        }
        eviction.in_place = in_place;
        eviction.out_tokens = in_place ? 0 : out_tokens;
        eviction.block_size = block_size;
        take_rotations(rotations_object, n_rotated);
        views.reserve(2 * sources.size());  // references to views stay good
        for (std::size_t i = 0; i < sources.size(); ++i) {
            take_tensor(sources[i], in_place ? sources[i] : targets[i], batch_dims[i], token_dims[i],
                        i < n_rotated, "tensors[" + std::to_string(i) + "]", device);
        }
        take_tables(tables_object);
        take_runs(runs_object);
    }

    void take_rotations(const py::object& object, std::size_t n_rotated) {
        if (object.is_none()) {
            if (n_rotated > 0) {
                refuse("rotations", "none", "a table, since tensors are rotated");
            }
            return;
        }
        const TensorView view(object, "evict", "rotations");
        view.require_device(dlpack::kCpu);
        view.require_dtype(dlpack::kFloat, 32);
        view.require_contiguous();
        view.require_rank(3, "[shifts, half, 2]");
        if (view.shape()[2] != 2 || view.shape()[1] < 1) {
            view.fail("shape " + shape_name(view.shape()), "[shifts, half, 2]");
        }
        eviction.half = view.shape()[1];
        const auto* values = static_cast<const float*>(view.data());
        eviction.rotations.assign(values, values + view.element_count());
    }

    void take_tensor(const py::object& source_object, const py::object& target_object, std::size_t batch_dim,
                     std::size_t token_dim, bool rotated, const std::string& name,
                     dlpack::DeviceType device) {
        const TensorView& source = views.emplace_back(source_object, "evict", name);
        const bool same = target_object.ptr() == source_object.ptr();
        const TensorView& target =
            same ? source : views.emplace_back(target_object, "evict", name + " (target)");
        source.require_device(device);
        target.require_device(device);
        target.require_writable();
        const auto& shape = source.shape();
        if (batch_dim >= shape.size() || token_dim >= shape.size() || batch_dim == token_dim) {
            source.fail("batch dimension " + std::to_string(batch_dim) + " and token dimension " +
                            std::to_string(token_dim) + " for shape " + shape_name(shape),
                        "two different dimensions of it");
        }
        std::vector<std::int64_t> wanted = shape;
        if (!eviction.in_place) {
            wanted[token_dim] = eviction.out_tokens;
        }
        target.require_shape(wanted);
        if (target.dtype().code != source.dtype().code || target.dtype().bits != source.dtype().bits) {
            target.fail("dtype " + dtype_name(target.dtype().code, target.dtype().bits), "the source's");
        }
        if (views.front().device().id != source.device().id || source.device().id != target.device().id) {
            source.fail(device_name(source.device()), "the first tensor's device");
        }
        const std::int64_t n = shape[batch_dim];
        if (batch >= 0 && n != batch) {
            source.fail(std::to_string(n) + " in the batch dimension", std::to_string(batch));
        }
        batch = n;
        tokens = tokens < 0 ? shape[token_dim] : std::min(tokens, shape[token_dim]);
        eviction.tensors.push_back(
            as_lanes(source, target, batch_dim, token_dim, rotated ? eviction.half : 0));
        if (rotated && eviction.tensors.back().element != eviction.tensors.front().element) {
            source.fail("another dtype than the first rotated tensor's", "one dtype for all");
        }
        if (!eviction.in_place) {
            std::int64_t bytes = element_bytes(target) * target.element_count();
            if (device == dlpack::kCpu && target.is_contiguous()) {
                fresh.emplace_back(target.data(), bytes);
            }
        }
    }

    void take_tables(const py::object& object) {
        if (eviction.block_size == 0) {
            if (!object.is_none()) {
                refuse("block_tables", "some", "none without a block size");
            }
            return;
        }
        if (!eviction.in_place) {
            refuse("block_tables", "targets", "a paged cache in place");
        }
        const TensorView view(object, "evict", "block_tables");
        const std::int64_t* values = int64_data(view);
        view.require_rank(2, "[batch, blocks of a sequence]");
        for (std::int64_t i = 0; i < view.element_count(); ++i) {
            if (values[i] < 0 || values[i] >= batch) {
                view.fail("block " + std::to_string(values[i]), "0 to " + std::to_string(batch - 1));
            }
        }
        if (tokens != eviction.block_size) {
            view.fail("blocks of " + std::to_string(tokens), std::to_string(eviction.block_size));
        }
        eviction.tables.assign(values, values + view.element_count());
        eviction.table_width = view.shape()[1];
        batch = view.shape()[0];
        tokens = eviction.table_width * eviction.block_size;
    }

    void take_runs(const py::object& object) {
        const TensorView view(object, "evict", "runs");
        const std::int64_t* values = int64_data(view);
        view.require_rank(2, "[runs, 5]");
        if (view.shape()[1] != 5) {
            view.fail("shape " + shape_name(view.shape()), "[runs, 5]");
        }
        const std::int64_t shifts =
            eviction.half > 0 ? static_cast<std::int64_t>(eviction.rotations.size()) / (2 * eviction.half)
                              : 0;
        const std::int64_t out = eviction.in_place ? tokens : eviction.out_tokens;
        std::int64_t sequence = 0;
        std::int64_t source_end = 0;
        std::int64_t target_end = 0;
        eviction.run_offsets.push_back(0);
        for (std::int64_t i = 0; i < view.shape()[0]; ++i) {
            const std::int64_t* run = values + 5 * i;
            if (run[0] < sequence || run[0] >= std::max<std::int64_t>(batch, 0)) {
                view.fail("sequence " + std::to_string(run[0]) + " in run " + std::to_string(i),
                          "ascending ones below " + std::to_string(batch));
            }
            for (; sequence < run[0]; ++sequence) {
                eviction.run_offsets.push_back(i);
                source_end = target_end = 0;
            }
            const auto fits = [](std::int64_t begin, std::int64_t count, std::int64_t least,
                                 std::int64_t end) {
                return begin >= least && count >= 1 && begin <= end && count <= end - begin;
            };
            if (!fits(run[1], run[3], source_end, tokens) || !fits(run[2], run[3], target_end, out) ||
                (eviction.in_place ? run[2] > run[1] : run[2] != target_end) || run[4] < -1 ||
                run[4] >= shifts) {
                view.fail("run " + std::to_string(i) + " from " + std::to_string(run[1]) + " to " +
                              std::to_string(run[2]) + " of " + std::to_string(run[3]) +
                              " tokens, rotation " + std::to_string(run[4]),
                          std::string(eviction.in_place ? "ascending" : "adjacent") + " runs within " +
                              std::to_string(tokens) + " tokens and " + std::to_string(shifts) +
                              " rotations");
            }
            source_end = run[1] + run[3];
            target_end = run[2] + run[3];
            eviction.runs.push_back(
                {.source = run[1], .target = run[2], .count = run[3], .rotation = run[4]});
        }
        for (; sequence < batch; ++sequence) {
            eviction.run_offsets.push_back(view.shape()[0]);
        }
    }

    Eviction eviction;
    std::vector<TensorView> views;
    std::vector<std::pair<void*, std::int64_t>> fresh;  // outputs that nobody has touched yet
    std::int64_t batch = -1;
    std::int64_t tokens = -1;
};

void run_cpu(const std::vector<py::object>& sources, const std::vector<py::object>& targets,
             const std::vector<std::size_t>& batch_dims, const std::vector<std::size_t>& token_dims,
             const py::object& runs, const py::object& rotations, std::size_t n_rotated,
             const py::object& tables, std::int64_t block_size, std::int64_t out_tokens, int num_threads) {
    const Call call(sources, targets, batch_dims, token_dims, runs, rotations, n_rotated, tables, block_size,
                    out_tokens, dlpack::kCpu);
    if (num_threads < 1) {
        refuse("num_threads", std::to_string(num_threads), "1 or more");
    }
    py::gil_scoped_release release;
    for (const auto& [data, bytes] : call.fresh) {
        advise_huge_pages(data, bytes);
    }
    evict_cpu(call.eviction, num_threads);
}

#ifdef VRTHINKER_WITH_CUDA
py::bytearray pack(const std::vector<py::object>& sources, const std::vector<py::object>& targets,
                   const std::vector<std::size_t>& batch_dims, const std::vector<std::size_t>& token_dims,
                   const py::object& runs, const py::object& rotations, std::size_t n_rotated,
                   const py::object& tables, std::int64_t block_size, std::int64_t out_tokens,
                   int processors) {
    const Call call(sources, targets, batch_dims, token_dims, runs, rotations, n_rotated, tables, block_size,
                    out_tokens, dlpack::kCuda);
    const std::vector<char> bytes = pack_eviction(call.eviction, processors);
    return {bytes.data(), bytes.size()};
}

void run_cuda(const py::bytearray& packed, const py::object& on_device, std::uintptr_t stream) {
    const TensorView device(on_device, "evict", "packed");
    device.require_device(dlpack::kCuda);
    device.require_contiguous();
    EvictHeader header{};
    if (packed.size() < sizeof header ||
        device.element_count() * device.dtype().bits != static_cast<std::int64_t>(packed.size()) * 8) {
        refuse("packed", std::to_string(packed.size()) + " bytes", "what evict_pack gave, on the device too");
    }
    std::memcpy(&header, PyByteArray_AS_STRING(packed.ptr()), sizeof header);
    const char* error = nullptr;
    {
        py::gil_scoped_release release;
        error = evict_cuda(header, static_cast<const char*>(device.data()), device.device().id, stream);
    }
    if (error) {
        throw std::runtime_error(std::string("evict: CUDA: ") + error);
    }
}
#endif

}  // namespace

void bind_evict(py::module_& module) {
    module.def("evict_cpu", &run_cpu, py::arg("sources"), py::arg("targets"), py::arg("batch_dims"),
               py::arg("token_dims"), py::arg("runs"), py::arg("rotations"), py::arg("n_rotated"),
               py::arg("block_tables"), py::arg("block_size"), py::arg("out_tokens"), py::arg("num_threads"),
               "Moves runs of tokens in CPU tensors: into targets, or, without any, in place.");
#ifdef VRTHINKER_WITH_CUDA
    module.def("evict_pack", &pack, py::arg("sources"), py::arg("targets"), py::arg("batch_dims"),
               py::arg("token_dims"), py::arg("runs"), py::arg("rotations"), py::arg("n_rotated"),
               py::arg("block_tables"), py::arg("block_size"), py::arg("out_tokens"), py::arg("processors"),
               "Checks an eviction of CUDA tensors and packs it for `evict_cuda`.");
    module.def("evict_cuda", &run_cuda, py::arg("packed"), py::arg("on_device"), py::arg("stream"),
               "Queues a packed eviction, whose bytes lie on the device too, on a raw stream.");
#endif
}

}  // namespace vrthinker
