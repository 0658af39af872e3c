// What the build was: for `vrthinker doctor`, bug reports and benchmark rows.
#include <algorithm>
#include <string>

#include "bindings.h"
#include "build_config.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

py::object text_or_none(const std::string& text) {
    return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::list split(const std::string& text) {
    py::list parts;
    std::size_t begin = 0;
    while (begin < text.size()) {
        const std::size_t end = std::min(text.find(',', begin), text.size());
        parts.append(py::str(text.substr(begin, end - begin)));
        begin = end + 1;
    }
    return parts;
}

std::string cxx_standard() {
    const long year = __cplusplus / 100;
    return "C++" + std::to_string(year % 100);
}

}  // namespace

py::dict build_info() {
    py::dict info;
    info["version"] = VRTHINKER_VERSION;
    info["compiler"] = VRTHINKER_COMPILER;
    info["cxx_standard"] = cxx_standard();
    info["build_type"] = VRTHINKER_BUILD_TYPE;
#ifdef __OPTIMIZE__
    info["optimized"] = true;
#else
    info["optimized"] = false;
#endif
    info["cuda_version"] = text_or_none(VRTHINKER_CUDA_VERSION);
    info["cuda_architectures"] = split(VRTHINKER_CUDA_ARCHITECTURES);
    info["sanitizers"] = split(VRTHINKER_SANITIZERS);
    return info;
}

}  // namespace vrthinker
