# Two components: `python` (libkvk.so, what the wheel carries) and `cpp` (headers, library, CMake package).
include(CMakePackageConfigHelpers)

if(KVK_BUILD_TORCH)
  install(TARGETS kvk_torch LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
endif()

install(TARGETS kvk_core EXPORT kvkTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
install(DIRECTORY include/kvk DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT kvkTargets NAMESPACE kvk:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvk COMPONENT cpp)
configure_package_config_file(cmake/kvkConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/kvkConfig.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvk)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/kvkConfigVersion.cmake COMPATIBILITY SameMinorVersion)
# The prefix is known when it is installed: cmake --install may name another.
install(CODE "
  set(CMAKE_INSTALL_LIBDIR ${CMAKE_INSTALL_LIBDIR})
  set(CMAKE_INSTALL_INCLUDEDIR ${CMAKE_INSTALL_INCLUDEDIR})
  set(PROJECT_DESCRIPTION \"${PROJECT_DESCRIPTION}\")
  set(PROJECT_VERSION ${PROJECT_VERSION})
  get_filename_component(CMAKE_INSTALL_PREFIX \"\${CMAKE_INSTALL_PREFIX}\" ABSOLUTE)
  configure_file(\"${PROJECT_SOURCE_DIR}/cmake/kvk.pc.in\"
    \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/pkgconfig/kvk.pc\" @ONLY)" COMPONENT cpp)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvkConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvkConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvk COMPONENT cpp)
