// `decode_attention` from Python: checks everything that memory safety rests on, then runs without the GIL.
#include "decode_attention/decode_attention.h"

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

DecodeCache as_cache(const TensorView& view) {
    view.require_device(dlpack::kCpu);
    view.require_dtype(dlpack::kFloat, 32);
    view.require_rank(4, "[rows, kv_heads, capacity, head_size]");
    const auto& strides = view.strides();
    if (strides[3] != 1 && view.shape()[3] > 1) {
        view.fail("a stride of " + std::to_string(strides[3]) + " between elements of a head", "1");
    }
    return {.data = static_cast<const float*>(view.data()),
            .row_stride = strides[0],
            .head_stride = strides[1],
            .token_stride = strides[2]};
}

void require_float_rows(const TensorView& view, const std::vector<std::int64_t>& shape) {
    view.require_device(dlpack::kCpu);
    view.require_dtype(dlpack::kFloat, 32);
    view.require_shape(shape);
    view.require_contiguous();
}

void run_cpu(const py::object& query_object, const py::object& keys_object, const py::object& values_object,
             const py::object& lengths_object, const py::object& out_object, double scale, int num_threads) {
    const TensorView query(query_object, "decode_attention", "query");
    const TensorView keys(keys_object, "decode_attention", "keys");
    const TensorView values(values_object, "decode_attention", "values");
    const TensorView lengths(lengths_object, "decode_attention", "lengths");
    const TensorView out(out_object, "decode_attention", "out");
    query.require_rank(3, "[rows, heads, head_size]");
    const auto& sizes = query.shape();
    require_float_rows(query, sizes);
    require_float_rows(out, sizes);
    out.require_writable();
    const DecodeCache key_cache = as_cache(keys);
    const DecodeCache value_cache = as_cache(values);
    values.require_shape(keys.shape());
    const std::int64_t kv_heads = keys.shape()[1];
    const std::int64_t capacity = keys.shape()[2];
    if (keys.shape()[0] != sizes[0] || keys.shape()[3] != sizes[2]) {
        keys.fail("shape " + shape_name(keys.shape()),
                  "rows and head_size of the query, " + shape_name(sizes));
    }
    if (kv_heads < 1 || sizes[1] % kv_heads != 0) {
        keys.fail(std::to_string(kv_heads) + " heads",
                  "a number that divides the query's " + std::to_string(sizes[1]));
    }
    lengths.require_device(dlpack::kCpu);
    lengths.require_dtype(dlpack::kInt, 64);
    lengths.require_shape({sizes[0]});
    lengths.require_contiguous();
    // A copy, because another thread could write to the tensor once the GIL is released.
    const auto* given = static_cast<const std::int64_t*>(lengths.data());
    const std::vector<std::int64_t> counts(given, given + sizes[0]);
    for (const std::int64_t count : counts) {
        if (count < 0 || count > capacity) {
            lengths.fail(std::to_string(count), "0 to the capacity, " + std::to_string(capacity));
        }
    }
    if (num_threads < 1) {
        throw py::value_error("decode_attention: num_threads: got " + std::to_string(num_threads) +
                              ", wanted 1 or more");
    }
    const DecodeShape shape{.rows = sizes[0],
                            .kv_heads = kv_heads,
                            .queries = sizes[1] / kv_heads,
                            .head_size = sizes[2],
                            .scale = static_cast<float>(scale)};
    const py::gil_scoped_release release;
    decode_attention_cpu(shape, static_cast<const float*>(query.data()), key_cache, value_cache,
                         counts.data(), static_cast<float*>(out.data()), num_threads);
}

}  // namespace

void bind_decode_attention(py::module_& module) {
    module.def("decode_attention_cpu", &run_cpu, py::arg("query"), py::arg("keys"), py::arg("values"),
               py::arg("lengths"), py::arg("out"), py::arg("scale"), py::arg("num_threads"),
               "Fills `out` with the attention of one query per row of a cache, all on the CPU.");
}

}  // namespace vrthinker
