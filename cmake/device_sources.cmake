# kvk_embed_device_sources(OUT): generates a C++ file that carries the text of include/kvk/device, for NVRTC, and puts its
# path in OUT.
#
# Run as a script (cmake -P), the second half of this file writes it.
if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(KVK_DEVICE_SOURCES_SCRIPT ${CMAKE_CURRENT_LIST_FILE})

  function(kvk_embed_device_sources out)
    file(GLOB_RECURSE files CONFIGURE_DEPENDS
      ${PROJECT_SOURCE_DIR}/include/kvk/device/*.h ${PROJECT_SOURCE_DIR}/include/kvk/device/*.cuh)
    set(generated ${CMAKE_CURRENT_BINARY_DIR}/device_sources.cc)
    string(MD5 list "${files}")  # part of the command, so that a file that goes away is noticed
    add_custom_command(OUTPUT ${generated}
      COMMAND ${CMAKE_COMMAND} -DINCLUDE=${PROJECT_SOURCE_DIR}/include -DOUTPUT=${generated} -DLIST=${list}
        -P ${KVK_DEVICE_SOURCES_SCRIPT}
      DEPENDS ${files} ${KVK_DEVICE_SOURCES_SCRIPT} VERBATIM COMMENT "Embedding the device sources")
    set(${out} ${generated} PARENT_SCOPE)
  endfunction()
  return()
endif()

file(GLOB_RECURSE files RELATIVE ${INCLUDE} ${INCLUDE}/kvk/device/*.h ${INCLUDE}/kvk/device/*.cuh)
list(SORT files)
file(WRITE ${OUTPUT}.new
  "// Made by cmake/device_sources.cmake.\n#include \"cuda/sources.h\"\n\nconst kvk::cuda::EmbeddedSource kvk::cuda::kEmbeddedSources[] = {\n")
foreach(name IN LISTS files)
  file(READ ${INCLUDE}/${name} text)
  file(APPEND ${OUTPUT}.new "{\"${name}\", R\"kvk_source(${text})kvk_source\"},\n")
endforeach()
file(APPEND ${OUTPUT}.new "{nullptr, nullptr}};\n")
file(RENAME ${OUTPUT}.new ${OUTPUT})
