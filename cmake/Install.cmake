# The shared library that embedders link, and `cmake --install`: library, header, dsv3.pc, CMake
# package, the `dsv3` tool.
if(NOT TARGET dsv3_api)
  return()  # a floor is still missing
endif()
include("${CMAKE_CURRENT_LIST_DIR}/Exports.cmake")
include(CMakePackageConfigHelpers)

set(DSV3_EXPORT_MAP "${PROJECT_BINARY_DIR}/dsv3.map")
dsv3_write_exports("${PROJECT_SOURCE_DIR}/include/dsv3.h" "${DSV3_EXPORT_MAP}")

# The boundary's objects whole, of the floors below what they need. --exclude-libs hides what comes
# out of static libraries (PCRE2's symbols must not meet a host's own PCRE2), the version script
# everything else that dsv3.h does not declare.
add_library(dsv3 SHARED $<TARGET_OBJECTS:dsv3_api>)
add_library(dsv3::dsv3 ALIAS dsv3)
target_link_libraries(dsv3 PRIVATE dsv3_api)
target_include_directories(dsv3 INTERFACE
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
set_target_properties(dsv3 PROPERTIES
  LINKER_LANGUAGE CXX
  VERSION ${PROJECT_VERSION}
  SOVERSION 0
  LINK_DEPENDS "${DSV3_EXPORT_MAP}")
target_link_options(dsv3 PRIVATE
  "LINKER:--version-script=${DSV3_EXPORT_MAP}" LINKER:--no-undefined-version
  LINKER:--exclude-libs,ALL LINKER:-z,nodelete LINKER:-z,relro LINKER:-z,now LINKER:--as-needed)
if(NOT (DSV3_SANITIZE AND CMAKE_CXX_COMPILER_ID MATCHES "Clang"))
  # Clang leaves the sanitizers' functions to the program.
  target_link_options(dsv3 PRIVATE LINKER:-z,defs)
endif()

# The tool finds the library beside itself, wherever the prefix is moved to.
if(TARGET dsv3_tool)
  file(RELATIVE_PATH dsv3_lib_from_bin "${CMAKE_INSTALL_FULL_BINDIR}" "${CMAKE_INSTALL_FULL_LIBDIR}")
  set_target_properties(dsv3_tool PROPERTIES INSTALL_RPATH "$ORIGIN/${dsv3_lib_from_bin}")
  install(TARGETS dsv3_tool RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
install(TARGETS dsv3 EXPORT dsv3-targets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES "${PROJECT_SOURCE_DIR}/include/dsv3.h" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE"
        DESTINATION "${CMAKE_INSTALL_DATAROOTDIR}/doc/dsv3")

# Relative to the .pc file, so that an installed tree can be moved. The folders may be absolute.
foreach(dir PREFIX FULL_LIBDIR FULL_INCLUDEDIR)
  file(RELATIVE_PATH dsv3_${dir}_from_pc
       "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_${dir}}")
  string(REGEX REPLACE "/$" "" dsv3_${dir}_from_pc "${dsv3_${dir}_from_pc}")
endforeach()
configure_file("${PROJECT_SOURCE_DIR}/cmake/dsv3.pc.in" "${PROJECT_BINARY_DIR}/dsv3.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/dsv3.pc"
        DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")

set(dsv3_cmake_dir "${CMAKE_INSTALL_LIBDIR}/cmake/dsv3")
install(EXPORT dsv3-targets NAMESPACE dsv3:: DESTINATION "${dsv3_cmake_dir}")
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/dsv3-config.cmake.in"
  "${PROJECT_BINARY_DIR}/dsv3-config.cmake" INSTALL_DESTINATION "${dsv3_cmake_dir}")
# Until 1.0 a minor version may change what an older one promised.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/dsv3-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/dsv3-config.cmake"
              "${PROJECT_BINARY_DIR}/dsv3-config-version.cmake"
        DESTINATION "${dsv3_cmake_dir}")
