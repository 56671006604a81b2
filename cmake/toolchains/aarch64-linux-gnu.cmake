# Cross-compiles for aarch64 on Debian: g++-aarch64-linux-gnu, and qemu to run what comes out.
# `scripts/install-packages aarch64` gets what is used here. PCRE2 for that machine lies in
# build/aarch64-root, unpacked and not installed; another folder or a root file system with
# -DDSV3_AARCH64_ROOT=..., and a libpcre2-dev:arm64 that is installed is found by itself.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

get_filename_component(dsv3_source "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
set(DSV3_AARCH64_ROOT "${dsv3_source}/build/aarch64-root" CACHE PATH
    "Where libraries for aarch64 lie, and what an emulator takes for /")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES DSV3_AARCH64_ROOT)

# Programs run here (flatc); libraries are that machine's; headers without code are anybody's.
set(CMAKE_FIND_ROOT_PATH "${DSV3_AARCH64_ROOT}")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)

if(NOT DEFINED CMAKE_CROSSCOMPILING_EMULATOR)
  find_program(DSV3_QEMU NAMES qemu-aarch64-static qemu-aarch64)
  if(DSV3_QEMU)
    set(CMAKE_CROSSCOMPILING_EMULATOR "${DSV3_QEMU};-L;${DSV3_AARCH64_ROOT}")
  endif()
endif()
