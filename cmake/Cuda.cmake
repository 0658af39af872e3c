# VRTHINKER_CUDA: AUTO builds the CUDA kernels where there are nvcc and a GPU, OFF never looks, ON needs nvcc only
# (wheels are built that way) and stops where it is missing. Compiling for six architectures takes minutes, which
# a machine that cannot run them should not spend.
# Sets VRTHINKER_WITH_CUDA; vrthinker_set_cuda(target) adds what a target with CUDA sources needs.
include(CheckLanguage)

# A GPU whose driver is loaded: NVIDIA's own devices, or /dev/dxg under WSL.
function(vrthinker_find_gpu result)
  file(GLOB _devices "/proc/driver/nvidia/gpus/*" "/dev/nvidia[0-9]*" "/dev/dxg")
  if(_devices)
    set(${result} ON PARENT_SCOPE)
  else()
    set(${result} OFF PARENT_SCOPE)
  endif()
endfunction()

set(VRTHINKER_CUDA AUTO CACHE STRING "Build the CUDA versions of the kernels: ON, OFF or AUTO")
set_property(CACHE VRTHINKER_CUDA PROPERTY STRINGS AUTO ON OFF)
string(TOUPPER "${VRTHINKER_CUDA}" _vrthinker_cuda)
if(NOT _vrthinker_cuda MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "VRTHINKER_CUDA: got '${VRTHINKER_CUDA}', allowed: ON, OFF, AUTO")
endif()

set(VRTHINKER_WITH_CUDA OFF)
set(_vrthinker_look ON)
if(_vrthinker_cuda STREQUAL "OFF")
  set(_vrthinker_look OFF)
elseif(_vrthinker_cuda STREQUAL "AUTO")
  vrthinker_find_gpu(_vrthinker_look)
  if(NOT _vrthinker_look)
    message(STATUS "vrthinker: no GPU here, so the CUDA kernels are not built; -DVRTHINKER_CUDA=ON builds them")
  endif()
endif()
if(_vrthinker_look)
  set(CMAKE_CUDA_ARCHITECTURES ${VRTHINKER_CUDA_ARCHITECTURES})
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      set(VRTHINKER_WITH_CUDA ON)
    elseif(_vrthinker_cuda STREQUAL "ON")
      message(FATAL_ERROR "VRTHINKER_CUDA=ON: found CUDA ${CMAKE_CUDA_COMPILER_VERSION}, need 12.8 or "
                          "newer (the first that knows architecture 120)")
    endif()
  elseif(_vrthinker_cuda STREQUAL "ON")
    message(FATAL_ERROR "VRTHINKER_CUDA=ON, but no CUDA compiler was found. Put nvcc on the PATH, or "
                        "name it with CUDACXX=/path/to/nvcc, or build with -DVRTHINKER_CUDA=OFF.")
  endif()
endif()
message(STATUS "vrthinker: CUDA kernels ${VRTHINKER_WITH_CUDA} (VRTHINKER_CUDA=${VRTHINKER_CUDA})")

function(vrthinker_set_cuda target)
  if(NOT VRTHINKER_WITH_CUDA)
    return()
  endif()
  find_package(CUDAToolkit REQUIRED)
  # The static runtime loads the driver when it is first called, so the module imports without one.
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  target_compile_definitions(${target} PRIVATE VRTHINKER_WITH_CUDA=1)
endfunction()
