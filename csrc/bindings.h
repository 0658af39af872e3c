// What each file of csrc/ adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace vrthinker {

pybind11::dict build_info();
pybind11::dict cuda_probe();
void bind_decode_attention(pybind11::module_& module);
void bind_evict(pybind11::module_& module);
void bind_group_advantage(pybind11::module_& module);
void bind_grpo_loss(pybind11::module_& module);
void bind_patchify(pybind11::module_& module);
void bind_yuv_to_rgb(pybind11::module_& module);

}  // namespace vrthinker
