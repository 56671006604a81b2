# What the library is built from, all of it Debian 12's packages. Everything is header-only or linked
# statically: the installed library needs libc and libstdc++ alone.
find_package(Threads REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)

find_program(DSV3_FLATC flatc REQUIRED)
find_path(DSV3_FLATBUFFERS_INCLUDE flatbuffers/flatbuffers.h REQUIRED)
add_library(dsv3_flatbuffers INTERFACE)
target_include_directories(dsv3_flatbuffers SYSTEM INTERFACE "${DSV3_FLATBUFFERS_INCLUDE}")

find_path(DSV3_XXHASH_INCLUDE xxhash.h REQUIRED)
add_library(dsv3_xxhash INTERFACE)
target_include_directories(dsv3_xxhash SYSTEM INTERFACE "${DSV3_XXHASH_INCLUDE}")
target_compile_definitions(dsv3_xxhash INTERFACE XXH_INLINE_ALL=1)

find_path(DSV3_PCRE2_INCLUDE pcre2.h REQUIRED)
find_library(DSV3_PCRE2_LIBRARY NAMES libpcre2-8.a REQUIRED)
add_library(dsv3_pcre2 INTERFACE)
target_include_directories(dsv3_pcre2 SYSTEM INTERFACE "${DSV3_PCRE2_INCLUDE}")
target_link_libraries(dsv3_pcre2 INTERFACE "${DSV3_PCRE2_LIBRARY}")
target_compile_definitions(dsv3_pcre2 INTERFACE PCRE2_CODE_UNIT_WIDTH=8)
