# libkvk.so: the whole library behind torch.ops.kvk, through the LibTorch stable ABI. It needs torch's headers, not torch:
# an empty stub with torch's SONAME gives the NEEDED entry that the libtorch_cpu.so of `import torch` satisfies.
set(KVK_TORCH_MINIMUM 0x020A000000000000)  # 2.10

if(NOT EXISTS "${KVK_TORCH_INCLUDE}/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "kvk: no headers of torch >= 2.10 in KVK_TORCH_INCLUDE='${KVK_TORCH_INCLUDE}' (want torch/csrc/stable/library.h). "
    "Install the torch you want first, then build kvk; or pass -DKVK_TORCH_INCLUDE=<site-packages>/torch/include; or "
    "-DKVK_BUILD_TORCH=OFF for the C++ library alone.")
endif()
file(STRINGS ${KVK_TORCH_INCLUDE}/torch/headeronly/version.h KVK_TORCH_VERSION REGEX "define TORCH_VERSION_(MAJOR|MINOR) ")
string(REGEX REPLACE "[^0-9]*([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2" KVK_TORCH_VERSION "${KVK_TORCH_VERSION}")
if(KVK_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "kvk: the headers in ${KVK_TORCH_INCLUDE} are of torch ${KVK_TORCH_VERSION}, kvk needs 2.10 or later")
endif()
message(STATUS "kvk: headers of torch ${KVK_TORCH_VERSION} from ${KVK_TORCH_INCLUDE}")

file(WRITE ${CMAKE_BINARY_DIR}/torch_stub/stub.cc "extern \"C\" void kvk_torch_stub() {}\n")
add_library(kvk_torch_stub SHARED ${CMAKE_BINARY_DIR}/torch_stub/stub.cc)
set_target_properties(kvk_torch_stub PROPERTIES
  OUTPUT_NAME torch_cpu LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/torch_stub)

add_library(kvk_torch MODULE
  csrc/torch/sparse.cc csrc/torch/sparse_attention.cc
  csrc/torch/lightning.cc
  csrc/torch/linear.cc
  csrc/torch/block_sparse.cc csrc/torch/neighborhood.cc
  csrc/torch/adapter.cc csrc/torch/device.cc csrc/torch/hadamard.cc csrc/torch/info.cc csrc/torch/paged.cc csrc/torch/quant.cc csrc/torch/quant_attention.cc csrc/torch/recorded.cc csrc/torch/runtime.cc $<TARGET_OBJECTS:kvk_objects> ${KVK_LEVEL_OBJECTS})
target_link_libraries(kvk_torch PRIVATE kvk_options kvk_torch_stub Threads::Threads ${CMAKE_DL_LIBS})
target_include_directories(kvk_torch SYSTEM PRIVATE ${KVK_TORCH_INCLUDE})
target_precompile_headers(kvk_torch PRIVATE <torch/csrc/stable/library.h> <torch/csrc/stable/ops.h> <torch/csrc/stable/tensor.h>)
target_compile_definitions(kvk_torch PRIVATE TORCH_TARGET_VERSION=${KVK_TORCH_MINIMUM})
string(REPLACE ";" " " KVK_LEVELS_TEXT "${KVK_LEVEL_OBJECTS_NAMES}")
set_source_files_properties(csrc/torch/info.cc PROPERTIES COMPILE_DEFINITIONS
  "KVK_LEVEL_NAMES=\"${KVK_LEVELS_TEXT}\";KVK_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\";KVK_TORCH_HEADERS=\"${KVK_TORCH_VERSION}\"")
# torch calls what the library registers and needs no symbol of it; hiding the rest keeps two libraries in one process,
# this one and the C++ libkvk, from mixing.
set(KVK_EXPORTS ${PROJECT_SOURCE_DIR}/cmake/torch_face.map)
target_link_options(kvk_torch PRIVATE LINKER:--no-as-needed LINKER:--version-script=${KVK_EXPORTS})
set_target_properties(kvk_torch PROPERTIES LINK_DEPENDS ${KVK_EXPORTS})
if(CMAKE_BUILD_TYPE STREQUAL Release AND NOT KVK_SANITIZE)
  target_link_options(kvk_torch PRIVATE -s)
endif()
set_target_properties(kvk_torch PROPERTIES OUTPUT_NAME kvk SKIP_BUILD_RPATH TRUE INSTALL_RPATH "")
