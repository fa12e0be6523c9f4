# Finds an nvcc and enables the language CUDA with it; leaves CMAKE_CUDA_COMPILER unset where there is none.
#
# In this order: what the caller named (CUDACXX, CMAKE_CUDA_COMPILER), the PATH, CUDA's usual folder, and the wheels that
# NVIDIA publishes on PyPI (requirements/nvcc.txt lists the ones that make a compiler).
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(fastreg_nvcc nvcc PATHS /usr/local/cuda/bin)
  if(NOT fastreg_nvcc)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import glob, importlib.util
spec = importlib.util.find_spec('nvidia')
roots = spec.submodule_search_locations if spec else []
print(next((path for root in roots for path in sorted(glob.glob(root + '/cu*/bin/nvcc'))), ''), end='')"
      OUTPUT_VARIABLE wheel_nvcc COMMAND_ERROR_IS_FATAL ANY)
    if(wheel_nvcc)
      set(fastreg_nvcc "${wheel_nvcc}" CACHE FILEPATH "nvcc" FORCE)
      # This nvcc looks for its libraries in lib64, but the wheels have them in lib.
      cmake_path(SET wheel_libraries NORMALIZE "${wheel_nvcc}/../../lib")
      set(ENV{CUDAFLAGS} "-L${wheel_libraries} $ENV{CUDAFLAGS}")
    endif()
  endif()
  if(fastreg_nvcc)
    set(CMAKE_CUDA_COMPILER "${fastreg_nvcc}" CACHE FILEPATH "nvcc" FORCE)
  endif()
endif()

if(NOT FASTREG_CUDA_ARCHITECTURES)
  set(FASTREG_CUDA_ARCHITECTURES $ENV{FASTREG_CUDA_ARCHITECTURES})
endif()
if(NOT FASTREG_CUDA_ARCHITECTURES)
  set(FASTREG_CUDA_ARCHITECTURES 80 90 100 120)
endif()
# Given before the language is enabled, or CMake would choose an architecture itself (perhaps by asking for a GPU).
set(CMAKE_CUDA_ARCHITECTURES ${FASTREG_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
# A shared runtime would tie the library to one CUDA release.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    message(FATAL_ERROR "fastreg needs CUDA 12.8 or newer, found ${CMAKE_CUDA_COMPILER_VERSION}: ${CMAKE_CUDA_COMPILER}")
  endif()
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}: ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
else()
  set(how_to_get_nvcc "put CUDA 12.8 or newer on the PATH, or pip install -r requirements/nvcc.txt")
  if(FASTREG_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FASTREG_CUDA=1, but no working nvcc was found: ${how_to_get_nvcc}")
  endif()
  message(STATUS "No working nvcc: building without the CUDA library; to get it, ${how_to_get_nvcc}")
endif()
