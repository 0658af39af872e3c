# VRTHINKER_SANITIZE: a comma-separated list for -fsanitize (address,undefined or thread). The Python
# that loads the module must preload the runtime: LD_PRELOAD="$(c++ -print-file-name=libasan.so)". The
# presets in CMakePresets.json name the usual combinations.
set(VRTHINKER_SANITIZE "" CACHE STRING "Sanitizers: address,undefined or thread; empty for none")

if(VRTHINKER_SANITIZE)
  string(REPLACE "," ";" _vrthinker_sanitizers "${VRTHINKER_SANITIZE}")
  foreach(sanitizer IN LISTS _vrthinker_sanitizers)
    if(NOT sanitizer MATCHES "^(address|undefined|thread|leak)$")
      message(FATAL_ERROR "VRTHINKER_SANITIZE: got '${sanitizer}', allowed: address, undefined, leak, thread")
    endif()
  endforeach()
  if("thread" IN_LIST _vrthinker_sanitizers AND "address" IN_LIST _vrthinker_sanitizers)
    message(FATAL_ERROR "VRTHINKER_SANITIZE: address and thread can't be combined; build twice")
  endif()
endif()

function(vrthinker_set_sanitizers target)
  if(VRTHINKER_SANITIZE)
    target_compile_options(
      ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${VRTHINKER_SANITIZE} -fno-omit-frame-pointer
                        -fno-sanitize-recover=all -g>)
    target_link_options(${target} PRIVATE -fsanitize=${VRTHINKER_SANITIZE})
  endif()
endfunction()
