// `yuv_to_rgb` from Python: checks everything that memory safety rests on, then runs without the GIL.
#include "yuv_to_rgb/yuv_to_rgb.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <string>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

constexpr std::int64_t kMaxSide = 1 << 16;  // far above any picture; keeps products in int64
constexpr int kFactorLimit = 1 << 15;       // keeps sums in int32

const std::uint8_t* plane_of(const TensorView& view, std::int64_t height, std::int64_t width) {
    view.require_device(dlpack::kCpu);
    view.require_dtype(dlpack::kUInt, 8);
    view.require_shape({height, width});
    if (view.strides()[1] != 1 && width > 1) {
        view.fail("a stride of " + std::to_string(view.strides()[1]) + " between pixels", "1");
    }
    return static_cast<const std::uint8_t*>(view.data());
}

[[noreturn]] void fail(const std::string& argument, const std::string& got, const std::string& wanted) {
    throw py::value_error("yuv_to_rgb: " + argument + ": got " + got + ", wanted " + wanted);
}

void run_cpu(const py::object& y_object, const py::object& u_object, const py::object& v_object,
             const py::object& out_object, int black, const std::array<int, 5>& factors, int right,
             int down) {
    const TensorView y(y_object, "yuv_to_rgb", "y");
    const TensorView u(u_object, "yuv_to_rgb", "u");
    const TensorView v(v_object, "yuv_to_rgb", "v");
    const TensorView out(out_object, "yuv_to_rgb", "out");
    y.require_rank(2, "[height, width]");
    const std::int64_t height = y.shape()[0];
    const std::int64_t width = y.shape()[1];
    if (height < 2 || width < 2 || height % 2 != 0 || width % 2 != 0 || height > kMaxSide ||
        width > kMaxSide) {
        y.fail("shape " + shape_name(y.shape()), "even sides of 2 to " + std::to_string(kMaxSide));
    }
    const YuvPlanes planes{.y = plane_of(y, height, width),
                           .u = plane_of(u, height / 2, width / 2),
                           .v = plane_of(v, height / 2, width / 2),
                           .y_stride = y.strides()[0],
                           .u_stride = u.strides()[0],
                           .v_stride = v.strides()[0],
                           .height = height,
                           .width = width};
    out.require_device(dlpack::kCpu);
    out.require_dtype(dlpack::kUInt, 8);
    out.require_shape({height, width, 3});
    out.require_contiguous();
    out.require_writable();
    if (black < 0 || black > 255) {
        fail("black", std::to_string(black), "0 to 255");
    }
    for (const int factor : factors) {
        if (std::abs(factor) >= kFactorLimit) {
            fail("factors", std::to_string(factor), "sizes below " + std::to_string(kFactorLimit));
        }
    }
    if (right < 0 || right > 1 || down < 0 || down > 2) {
        fail("right and down", std::to_string(right) + " and " + std::to_string(down), "0 or 1, and 0 to 2");
    }
    const YuvColours colours{.black = black,
                             .y = factors[0],
                             .v_to_red = factors[1],
                             .u_to_green = factors[2],
                             .v_to_green = factors[3],
                             .u_to_blue = factors[4],
                             .right = right,
                             .down = down};
    const py::gil_scoped_release release;
    yuv_to_rgb_cpu(planes, colours, static_cast<std::uint8_t*>(out.data()));
}

}  // namespace

void bind_yuv_to_rgb(py::module_& module) {
    module.def("yuv_to_rgb_cpu", &run_cpu, py::arg("y"), py::arg("u"), py::arg("v"), py::arg("out"),
               py::arg("black"), py::arg("factors"), py::arg("right"), py::arg("down"),
               "Fills `out` with the RGB of a picture in 4:2:0, all on the CPU, in this thread.");
}

}  // namespace vrthinker
