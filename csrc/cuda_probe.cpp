// Asks the CUDA driver, loaded when asked, what devices there are. It needs no CUDA at build time, so a
// CPU-only build can still say that a GPU is there and that a CUDA build would use it.
//
// Hazard: cuInit in a process that forks later breaks CUDA in the children. Call the probe from a
// command, never at import.
#include <dlfcn.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

using Status = int;  // CUresult; 0 is success
using DeviceHandle = int;
constexpr int kComputeCapabilityMajor = 75;  // CUdevice_attribute
constexpr int kComputeCapabilityMinor = 76;

struct DeviceFacts {
    int index;
    std::string name;
    int major;
    int minor;
    std::size_t memory_bytes;
};

struct Probe {
    std::optional<std::string> driver_version;
    std::vector<DeviceFacts> devices;
    std::string reason;  // why there are no devices; empty when there are some
};

class Driver {
  public:
    Driver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
        if (!library_) {
            const char* text = dlerror();
            error_ = text ? text : "unknown error";
        }
    }

    // The library is never closed: other users of CUDA in this process may hold it too.

    bool loaded() const { return library_ != nullptr; }
    const std::string& error() const { return error_; }

    template <typename... Arguments>
    Status call(const char* name, Arguments... arguments) {
        auto function = reinterpret_cast<Status (*)(Arguments...)>(dlsym(library_, name));
        if (!function) {
            error_ = std::string("the driver has no ") + name;
            return -1;
        }
        const Status status = function(arguments...);
        if (status != 0) {
            error_ = std::string(name) + ": " + describe(status);
        }
        return status;
    }

  private:
    std::string describe(Status status) {
        const char* text = nullptr;
        auto function =
            reinterpret_cast<Status (*)(Status, const char**)>(dlsym(library_, "cuGetErrorString"));
        if (function && function(status, &text) == 0 && text) {
            return std::string(text) + " (error " + std::to_string(status) + ")";
        }
        return "error " + std::to_string(status);
    }

    void* library_;
    std::string error_;
};

bool read_device(Driver& driver, int index, DeviceFacts& facts) {
    DeviceHandle device = 0;
    char name[256] = {};
    facts.index = index;
    if (driver.call("cuDeviceGet", &device, index) != 0 ||
        driver.call("cuDeviceGetName", &name[0], static_cast<int>(sizeof(name) - 1), device) != 0 ||
        driver.call("cuDeviceTotalMem_v2", &facts.memory_bytes, device) != 0 ||
        driver.call("cuDeviceGetAttribute", &facts.major, kComputeCapabilityMajor, device) != 0 ||
        driver.call("cuDeviceGetAttribute", &facts.minor, kComputeCapabilityMinor, device) != 0) {
        return false;
    }
    facts.name = name;
    return true;
}

Probe probe() {
    Probe result;
    Driver driver;
    if (!driver.loaded()) {
        result.reason = "no CUDA driver: " + driver.error();
        return result;
    }
    int version = 0;
    if (driver.call("cuDriverGetVersion", &version) == 0) {
        result.driver_version = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    }
    int count = 0;
    if (driver.call("cuInit", 0U) != 0 || driver.call("cuDeviceGetCount", &count) != 0) {
        result.reason = driver.error();
        return result;
    }
    for (int index = 0; index < count; ++index) {
        DeviceFacts facts{};
        if (!read_device(driver, index, facts)) {
            result.reason = "device " + std::to_string(index) + ": " + driver.error();
            return result;
        }
        result.devices.push_back(facts);
    }
    if (count == 0) {
        result.reason = "the driver sees no device (is CUDA_VISIBLE_DEVICES empty?)";
    }
    return result;
}

}  // namespace

py::dict cuda_probe() {
    Probe found;
    {
        py::gil_scoped_release release;  // the first cuInit takes a second or more
        found = probe();
    }
    py::list devices;
    for (const DeviceFacts& facts : found.devices) {
        py::dict device;
        device["index"] = facts.index;
        device["name"] = facts.name;
        device["compute_capability"] = std::to_string(facts.major) + "." + std::to_string(facts.minor);
        device["memory_bytes"] = facts.memory_bytes;
        devices.append(device);
    }
    py::dict result;
    result["driver_version"] = found.driver_version;
    result["device_count"] = found.devices.size();
    result["devices"] = devices;
    result["reason"] = found.reason.empty() ? py::object(py::none()) : py::object(py::str(found.reason));
    return result;
}

}  // namespace vrthinker
