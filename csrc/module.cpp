// vrthinker._core. Importing it touches neither a driver nor a device.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "build_config.h"

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native part of vrthinker: kernels, build information, CUDA probe.";
    module.attr("__version__") = VRTHINKER_VERSION;
    module.def("build_info", &vrthinker::build_info,
               "How this module was built: version, compiler, C++ standard, CUDA version (or None), ...");
    module.def("cuda_probe", &vrthinker::cuda_probe,
               "What the CUDA driver says of this machine: driver version, devices, or why there is none.");
    vrthinker::bind_decode_attention(module);
    vrthinker::bind_evict(module);
    vrthinker::bind_group_advantage(module);
    vrthinker::bind_grpo_loss(module);
    vrthinker::bind_patchify(module);
    vrthinker::bind_yuv_to_rgb(module);
}
