# kvk/array/_array: the ops over DLPack for NumPy, CuPy and others, without torch. It compiles the adapters of csrc/torch a second
# time, over stand-ins for the headers of LibTorch that they include (csrc/array/README.md), so that a new op is in both faces.
if(CMAKE_VERSION VERSION_GREATER_EQUAL 3.27)
  cmake_policy(SET CMP0148 NEW)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 2.12 CONFIG REQUIRED)

file(GLOB KVK_ADAPTERS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/torch/*.cc)
# What is about torch itself: its devices and streams, its build, its cache of compiled kernels.
list(FILTER KVK_ADAPTERS EXCLUDE REGEX "/(device|info|runtime)\\.cc$")
pybind11_add_module(kvk_array MODULE NO_EXTRAS csrc/array/module.cc csrc/array/device.cc ${KVK_ADAPTERS}
  $<TARGET_OBJECTS:kvk_objects> ${KVK_LEVEL_OBJECTS})
target_include_directories(kvk_array BEFORE PRIVATE csrc/array/stand_in)
target_link_libraries(kvk_array PRIVATE kvk_options Threads::Threads ${CMAKE_DL_LIBS})
set_target_properties(kvk_array PROPERTIES OUTPUT_NAME _array SKIP_BUILD_RPATH TRUE INSTALL_RPATH "")
if(CMAKE_BUILD_TYPE STREQUAL Release AND NOT KVK_SANITIZE)
  target_link_options(kvk_array PRIVATE -s)
endif()
install(TARGETS kvk_array LIBRARY DESTINATION . COMPONENT array EXCLUDE_FROM_ALL)
