#include "dlpack.h"

#include <cstring>
#include <unordered_map>
#include <utility>

namespace py = pybind11;

namespace vrthinker {
namespace {

constexpr std::int32_t kMaxRank = 16;

// A producer that knows DLPack 1.0 may say that its memory is read-only; older ones know no max_version.
py::object export_capsule(const py::object& object, dlpack::DeviceType type) {
    py::dict arguments;
    if (type == dlpack::kCuda) {
        arguments["stream"] = -1;  // no synchronisation: the caller passes the stream it works on
    }
    py::object method = object.attr("__dlpack__");
    py::dict versioned = py::dict(**arguments);
    versioned["max_version"] = py::make_tuple(1, 0);
    try {
        return method(**versioned);
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) {
            throw;
        }
    }
    return method(**arguments);
}

// The exchange table of a type, or null: asked once a type, under the GIL. Types that offer one are immortal
// in practice (torch.Tensor, and Parameter, which inherits it).
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    static std::unordered_map<PyTypeObject*, const dlpack::ExchangeApi*> known;
    const auto found = known.find(type);
    if (found != known.end()) {
        return found->second;
    }
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (capsule == nullptr) {
        PyErr_Clear();
        return nullptr;  // not remembered: the type may go and another take its address
    }
    const dlpack::ExchangeApi* api = nullptr;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        if (api->major != 1 || api->tensor_from_object == nullptr) {
            api = nullptr;
        }
    }
    Py_DECREF(capsule);
    if (api != nullptr) {
        Py_INCREF(type);
        known.emplace(type, api);
    }
    return api;
}

std::vector<std::int64_t> row_major_strides(const std::vector<std::int64_t>& shape) {
    std::vector<std::int64_t> strides(shape.size(), 1);
    for (std::size_t i = shape.size(); i-- > 1;) {
        strides[i - 1] = strides[i] * shape[i];
    }
    return strides;
}

}  // namespace

std::string dtype_name(std::uint8_t code, std::uint8_t bits) {
    switch (code) {
        case dlpack::kInt:
            return "int" + std::to_string(bits);
        case dlpack::kUInt:
            return "uint" + std::to_string(bits);
        case dlpack::kFloat:
            return "float" + std::to_string(bits);
        case dlpack::kBfloat:
            return "bfloat" + std::to_string(bits);
        case dlpack::kBool:
            return "bool";
        default:
            return "DLPack type code " + std::to_string(code) + " of " + std::to_string(bits) + " bits";
    }
}

std::string device_name(dlpack::Device device) {
    switch (device.type) {
        case dlpack::kCpu:
            return "cpu";
        case dlpack::kCuda:
            return "cuda:" + std::to_string(device.id);
        default:
            return "DLPack device type " + std::to_string(device.type);
    }
}

std::string shape_name(const std::vector<std::int64_t>& shape) {
    std::string name = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (i > 0) {
            name.append(", ");
        }
        name.append(std::to_string(shape[i]));
    }
    return name.append("]");
}

TensorView::TensorView(const py::object& object, std::string op, std::string argument)
    : op_(std::move(op)), argument_(std::move(argument)) {
    if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
        dlpack::Tensor tensor{};
        if (api->tensor_from_object(object.ptr(), &tensor) != 0) {
            throw py::error_already_set();
        }
        keeper_ = object;
        device_ = tensor.device;
        if (device_.type != dlpack::kCpu && device_.type != dlpack::kCuda) {
            fail("device " + device_name(device_), "cpu or cuda");
        }
        read(tensor);
        return;
    }
    if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
        throw py::type_error(op_ + ": " + argument_ + ": got " + Py_TYPE(object.ptr())->tp_name +
                             ", wanted a tensor that exports DLPack (a torch tensor, a numpy array)");
    }
    const auto place = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    device_ = {place.first, place.second};
    if (device_.type != dlpack::kCpu && device_.type != dlpack::kCuda) {
        fail("device " + device_name(device_), "cpu or cuda");
    }
    keeper_ = export_capsule(object, static_cast<dlpack::DeviceType>(device_.type));

    const dlpack::Tensor* tensor = nullptr;
    if (PyCapsule_IsValid(keeper_.ptr(), "dltensor_versioned")) {
        const auto* managed = static_cast<const dlpack::VersionedManagedTensor*>(
            PyCapsule_GetPointer(keeper_.ptr(), "dltensor_versioned"));
        if (managed->major != 1) {
            fail("DLPack " + std::to_string(managed->major) + "." + std::to_string(managed->minor),
                 "DLPack 1.x or older");
        }
        read_only_ = (managed->flags & dlpack::kReadOnly) != 0;
        tensor = &managed->tensor;
    } else if (PyCapsule_IsValid(keeper_.ptr(), "dltensor")) {
        tensor = &static_cast<const dlpack::ManagedTensor*>(PyCapsule_GetPointer(keeper_.ptr(), "dltensor"))
                      ->tensor;
    } else {
        const char* name = PyCapsule_CheckExact(keeper_.ptr()) ? PyCapsule_GetName(keeper_.ptr()) : nullptr;
        fail(name ? std::string("a capsule named '") + name + "'"
                  : std::string(Py_TYPE(keeper_.ptr())->tp_name) + " from __dlpack__()",
             "an unused DLPack capsule");
    }
    read(*tensor);
}

void TensorView::read(const dlpack::Tensor& tensor) {
    if (tensor.rank < 0 || tensor.rank > kMaxRank) {
        fail(std::to_string(tensor.rank) + " dimensions", "0 to " + std::to_string(kMaxRank));
    }
    if (tensor.device.type != device_.type || tensor.device.id != device_.id) {
        fail("a tensor on " + device_name(tensor.device), "the device it names, " + device_name(device_));
    }
    dtype_ = tensor.dtype;
    if (dtype_.lanes != 1) {
        fail(std::to_string(dtype_.lanes) + " lanes", "one lane");
    }
    shape_.assign(tensor.shape, tensor.shape + tensor.rank);
    for (const std::int64_t size : shape_) {
        if (size < 0) {
            fail("shape " + shape_name(shape_), "sizes of 0 or more");
        }
    }
    strides_ = tensor.strides ? std::vector<std::int64_t>(tensor.strides, tensor.strides + tensor.rank)
                              : row_major_strides(shape_);
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    if (tensor.data == nullptr && element_count() > 0) {
        fail("no memory for shape " + shape_name(shape_), "memory");
    }
}

std::int64_t TensorView::element_count() const {
    std::int64_t count = 1;
    for (const std::int64_t size : shape_) {
        count *= size;
    }
    return count;
}

bool TensorView::is_contiguous() const {
    std::int64_t expected = 1;
    for (std::size_t i = shape_.size(); i-- > 0;) {
        if (shape_[i] == 0) {
            return true;
        }
        if (shape_[i] != 1 && strides_[i] != expected) {
            return false;
        }
        expected *= shape_[i];
    }
    return true;
}

void TensorView::fail(const std::string& got, const std::string& wanted) const {
    throw py::value_error(op_ + ": " + argument_ + ": got " + got + ", wanted " + wanted);
}

void TensorView::require_dtype(std::uint8_t code, std::uint8_t bits) const {
    if (dtype_.code != code || dtype_.bits != bits) {
        fail("dtype " + dtype_name(dtype_.code, dtype_.bits), dtype_name(code, bits));
    }
}

void TensorView::require_device(dlpack::DeviceType type) const {
    if (device_.type != type) {
        fail("a tensor on " + device_name(device_), type == dlpack::kCpu ? "one on cpu" : "one on cuda");
    }
}

void TensorView::require_rank(std::size_t rank, const char* dimensions) const {
    if (shape_.size() != rank) {
        fail("shape " + shape_name(shape_), dimensions);
    }
}

void TensorView::require_shape(const std::vector<std::int64_t>& shape) const {
    if (shape_ != shape) {
        fail("shape " + shape_name(shape_), shape_name(shape));
    }
}

void TensorView::require_contiguous() const {
    if (!is_contiguous()) {
        fail("strides " + shape_name(strides_) + " for shape " + shape_name(shape_), "a contiguous tensor");
    }
}

void TensorView::require_writable() const {
    if (read_only_) {
        fail("read-only memory", "writable memory");
    }
}

}  // namespace vrthinker
