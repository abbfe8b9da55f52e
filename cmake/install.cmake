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
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvkConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvkConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvk COMPONENT cpp)
