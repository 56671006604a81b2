# What a user touches: the header, the shared library, the installed tree, the `dsv3` tool.
add_library(dsv3_tool_test_support STATIC process.cc)
target_link_libraries(dsv3_tool_test_support PUBLIC dsv3_flags dsv3_test_support
                      nlohmann_json::nlohmann_json)
string(REPLACE ";" "|" emulator "${CMAKE_CROSSCOMPILING_EMULATOR}")
target_compile_definitions(dsv3_tool_test_support PRIVATE DSV3_TOOL="$<TARGET_FILE:dsv3_tool>"
                           DSV3_EMULATOR="${emulator}")
add_dependencies(dsv3_tool_test_support dsv3_tool)

dsv3_test(api header_test.cc SOURCES header_c11.c LINKS dsv3)
dsv3_test(api exports_test.cc LINKS dsv3_tool_test_support)
dsv3_test(api cli_test.cc LINKS dsv3_tool_test_support TIMEOUT 600)
dsv3_test(api cli_generate_test.cc LINKS dsv3_tool_test_support TIMEOUT 600)
dsv3_test(api install_test.cc LINKS dsv3_tool_test_support TIMEOUT 300)
target_compile_definitions(test_api_exports PRIVATE DSV3_LIBRARY="$<TARGET_FILE:dsv3>")
add_dependencies(test_api_exports dsv3)
target_compile_definitions(test_api_install PRIVATE
  DSV3_CMAKE="${CMAKE_COMMAND}" DSV3_CC="${CMAKE_C_COMPILER}" DSV3_BUILD_DIR="${PROJECT_BINARY_DIR}"
  DSV3_LIBDIR="${CMAKE_INSTALL_LIBDIR}" DSV3_SANITIZERS="${DSV3_SANITIZE}"
  DSV3_TOOLCHAIN="${CMAKE_TOOLCHAIN_FILE}")
