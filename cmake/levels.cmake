# kvk_add_levels(TARGET SOURCES OUT): compiles SOURCES once per instruction-set level; puts the objects' paths in OUT and
# the levels' names, lowest first, in OUT_NAMES.
#
# A level's objects are linked into one (`ld -r`), COMDAT groups dissolved, and every symbol but the level's table made
# local: an inline function compiled for AVX-512 can then never be the copy that an older machine runs.
include(CheckCXXCompilerFlag)

set(KVK_PRECOMPILED "\\.(gch|pch)$")  # CMake counts precompiled headers among a target's objects

function(kvk_add_levels target sources out)
  set(levels base)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(base_name "x86-64-v2")
    set(base_flags -march=x86-64-v2)
    set(wanted ${KVK_CPU_LEVELS})
    separate_arguments(wanted)
    if(wanted STREQUAL "auto")
      set(wanted x86-64-v3 x86-64-v4)
    endif()
    foreach(level IN LISTS wanted)
      check_cxx_compiler_flag(-march=${level} KVK_COMPILER_KNOWS_${level})
      if(NOT KVK_COMPILER_KNOWS_${level})
        message(FATAL_ERROR "kvk: the compiler does not know -march=${level}; leave it out of KVK_CPU_LEVELS, or take GCC 11 or Clang 12 and later")
      endif()
      string(REGEX REPLACE "[^a-z0-9]" "_" name ${level})
      list(APPEND levels ${name})
      set(${name}_name ${level})
      set(${name}_flags -march=${level})
      if(level STREQUAL "x86-64-v4")
        # GCC 12 warns inside its own AVX-512 intrinsics (GCC bug 105593), with sanitizers more so.
        list(APPEND ${name}_flags -mprefer-vector-width=512 -Wno-maybe-uninitialized -Wno-uninitialized)
      endif()
      string(TOUPPER ${name} upper)
      target_compile_definitions(${target} PRIVATE KVK_HAVE_${upper})
    endforeach()
  else()
    set(base_name ${CMAKE_SYSTEM_PROCESSOR})
    set(base_flags "")
  endif()

  set(objects)
  set(names)
  foreach(level IN LISTS levels)
    list(APPEND names ${${level}_name})
    set(library kvk_level_${level})
    add_library(${library} OBJECT ${sources})
    target_link_libraries(${library} PRIVATE kvk_options)
    target_precompile_headers(${library} PRIVATE <algorithm> <cmath> <experimental/simd> <memory> <vector>)
    target_compile_definitions(${library} PRIVATE KVK_LEVEL=${level} KVK_LEVEL_NAME="${${level}_name}")
    target_compile_options(${library} PRIVATE ${${level}_flags} -fno-math-errno -fno-trapping-math)
    if(level STREQUAL "base" AND levels MATCHES ";" AND NOT KVK_SANITIZE)
      # The kernels are vectorized by hand. Few machines run this level, and every build waits for it: -O3 takes half as long again.
      target_compile_options(${library} PRIVATE $<$<CONFIG:Release>:-O2>)
    endif()
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      target_compile_options(${library} PRIVATE -fno-gnu-unique)  # unique symbols cannot be made local
    endif()
    if(KVK_SANITIZE)
      # The sanitizers' records do not survive localising. So here inline functions of the standard library may merge
      # across levels, which is no harm as long as the machine has every level of the build: `make sanitize` sees to it.
      list(APPEND objects $<FILTER:$<TARGET_OBJECTS:${library}>,EXCLUDE,${KVK_PRECOMPILED}>)
      continue()
    endif()
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${library}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_LINKER} -r --force-group-allocation -o ${object}.all $<FILTER:$<TARGET_OBJECTS:${library}>,EXCLUDE,${KVK_PRECOMPILED}>
      COMMAND ${CMAKE_OBJCOPY} --keep-global-symbol=kvk_cpu_kernels_${level} ${object}.all ${object}
      DEPENDS ${library} $<TARGET_OBJECTS:${library}>
      COMMAND_EXPAND_LISTS VERBATIM COMMENT "Localising the symbols of ${${level}_name}")
    set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
    list(APPEND objects ${object})
  endforeach()
  set(${out} ${objects} PARENT_SCOPE)
  set(${out}_NAMES ${names} PARENT_SCOPE)
endfunction()
