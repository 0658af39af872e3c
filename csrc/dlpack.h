// Tensors from Python, through DLPack, without linking any tensor library.
//
// Invariant: a TensorView was checked when it was made (a real DLPack capsule, one lane, a sane rank and
// strides for every dimension); the `require` calls check what an op wants of it, before anything is
// written, and say the op's name, what was got and what is wanted.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace vrthinker {

// The DLPack ABI (https://dmlc.github.io/dlpack/latest/c_api.html), the part that is read here.
namespace dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
inline constexpr std::uint64_t kReadOnly = 1;

struct Device {
    std::int32_t type;
    std::int32_t id;
};

struct DataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t rank;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null means row-major and contiguous
    std::uint64_t byte_offset;
};

struct ManagedTensor {  // capsule "dltensor"
    Tensor tensor;
    void* manager_context;
    void (*deleter)(ManagedTensor*);
};

struct VersionedManagedTensor {  // capsule "dltensor_versioned"
    std::uint32_t major;
    std::uint32_t minor;
    void* manager_context;
    void (*deleter)(VersionedManagedTensor*);
    std::uint64_t flags;
    Tensor tensor;
};

// The C exchange table that a tensor type may offer (DLPack 1.3; torch has it): a view costs a call in C
// instead of one in Python.
struct ExchangeApi {
    std::uint32_t major;
    std::uint32_t minor;
    const void* older;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);  // borrows; may be null
    void* current_stream;
};

}  // namespace dlpack

class TensorView {
  public:
    // Borrows the memory of `object`: through its type's exchange table where it has one, else through a
    // capsule. The object (or the capsule) stays alive as long as the view. `op` and `argument` name the
    // place in error messages. Raises ValueError or TypeError.
    TensorView(const pybind11::object& object, std::string op, std::string argument);

    void* data() const { return data_; }
    dlpack::Device device() const { return device_; }
    dlpack::DataType dtype() const { return dtype_; }
    const std::vector<std::int64_t>& shape() const { return shape_; }
    const std::vector<std::int64_t>& strides() const { return strides_; }  // in elements
    std::int64_t element_count() const;
    bool is_contiguous() const;

    // Each raises ValueError("<op>: <argument>: got ..., wanted ...").
    void require_dtype(std::uint8_t code, std::uint8_t bits) const;
    void require_device(dlpack::DeviceType type) const;
    void require_rank(std::size_t rank, const char* dimensions) const;
    void require_shape(const std::vector<std::int64_t>& shape) const;
    void require_contiguous() const;
    void require_writable() const;

    [[noreturn]] void fail(const std::string& got, const std::string& wanted) const;

  private:
    std::string op_;
    std::string argument_;
    void read(const dlpack::Tensor& tensor);

    pybind11::object keeper_;
    void* data_ = nullptr;
    dlpack::Device device_{};
    dlpack::DataType dtype_{};
    std::vector<std::int64_t> shape_;
    std::vector<std::int64_t> strides_;
    bool read_only_ = false;
};

// "uint8", "float32", "bfloat16", ...: names as torch spells them.
std::string dtype_name(std::uint8_t code, std::uint8_t bits);
std::string device_name(dlpack::Device device);
std::string shape_name(const std::vector<std::int64_t>& shape);

}  // namespace vrthinker
