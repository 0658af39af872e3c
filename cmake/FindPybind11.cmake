# pybind11 comes with the build environment (scikit-build-core adds it to the search path). A plain
# `cmake` call asks the Python that it builds for.
find_package(pybind11 3.0 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE _pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
    RESULT_VARIABLE _pybind11_result)
  if(NOT _pybind11_result EQUAL 0)
    message(FATAL_ERROR "pybind11 was not found for ${Python_EXECUTABLE}: pip install 'pybind11>=3.0'")
  endif()
  find_package(pybind11 3.0 CONFIG REQUIRED PATHS "${_pybind11_dir}")
endif()
