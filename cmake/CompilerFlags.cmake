# Flags of our own sources. The C++ standard is fixed; no -march, so that a wheel runs on every machine
# of its kind; no -ffast-math, so that a kernel equals its reference bit for bit where it says so.
# Warnings are shown, not errors: a compiler that we never met must not stop someone's install.
option(VRTHINKER_WERROR "Treat compiler warnings as errors (for developers)" OFF)

function(vrthinker_set_flags target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(
    ${target}
    PROPERTIES CXX_EXTENSIONS OFF
               CXX_VISIBILITY_PRESET hidden
               CUDA_VISIBILITY_PRESET hidden
               CUDA_STANDARD 17
               CUDA_STANDARD_REQUIRED ON
               VISIBILITY_INLINES_HIDDEN ON
               POSITION_INDEPENDENT_CODE ON)
  target_compile_options(
    ${target}
    PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow>
            $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-O3>
            # Fused multiply-add would round once where the reference rounds twice.
            $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>
            $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall>)
  target_link_options(${target} PRIVATE "-Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map")
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS "${PROJECT_SOURCE_DIR}/cmake/exports.map")
  if(VRTHINKER_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endfunction()
