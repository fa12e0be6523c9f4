# Finds torch through the Python interpreter and makes the target fastreg_torch of it.
#
# Not find_package(Torch): that wants the CUDA toolkit's libraries wherever torch was built with CUDA, and the stable ABI
# needs headers and two sonames only. torch is located without being imported: that would cost seconds.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.metadata, importlib.util
spec = importlib.util.find_spec('torch')
print(spec.submodule_search_locations[0] if spec else '', end=';')
print(importlib.metadata.version('torch') if spec else '', end='')"
  OUTPUT_VARIABLE torch_found COMMAND_ERROR_IS_FATAL ANY)
list(GET torch_found 0 torch_directory)
list(GET torch_found 1 torch_version)
if(NOT torch_directory)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: pip install torch (2.11 or newer)")
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${torch_version}")
if(torch_release VERSION_LESS 2.11)
  message(FATAL_ERROR "fastreg's native libraries need torch 2.11 or newer, found ${torch_version} in ${torch_directory}")
endif()
message(STATUS "torch ${torch_version}: ${torch_directory}")

add_library(fastreg_torch INTERFACE)
target_include_directories(fastreg_torch SYSTEM INTERFACE
  "${torch_directory}/include" "${torch_directory}/include/torch/csrc/api/include")
# Only what torch 2.11 has may be used; without this, a build on a newer torch needs symbols that 2.11 lacks.
target_compile_definitions(fastreg_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# libtorch.so must stay in NEEDED though no strong symbol comes from it: torch loads its libraries RTLD_LOCAL, so the weak
# symbol that gives the CUDA stream is found only through our own dependency on it.
target_link_libraries(fastreg_torch INTERFACE
  -Wl,--push-state,--no-as-needed "${torch_directory}/lib/libtorch.so" -Wl,--pop-state
  "${torch_directory}/lib/libtorch_cpu.so")
