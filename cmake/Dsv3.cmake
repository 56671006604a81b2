# Compiler flags and the helpers every folder's CMakeLists.txt uses.
include(GNUInstallDirs)

find_program(DSV3_CCACHE ccache)
if(DSV3_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER "${DSV3_CCACHE}")
  set(CMAKE_CXX_COMPILER_LAUNCHER "${DSV3_CCACHE}")
endif()

set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_UNITY_BUILD OFF)  # files have names of their own that others have as well

# Contraction off: a*b+c is fused only where a kernel says so, so that results do not depend on
# what the optimiser felt like. Kernels call std::fma or the intrinsic.
add_library(dsv3_flags INTERFACE)
target_compile_options(dsv3_flags INTERFACE -Wall -Wextra -Wpedantic -Wshadow
                       -ffp-contract=off -fno-math-errno)
target_include_directories(dsv3_flags INTERFACE "${PROJECT_SOURCE_DIR}"
                           "${PROJECT_SOURCE_DIR}/include")
if(DSV3_SANITIZE)
  target_compile_options(dsv3_flags INTERFACE -fsanitize=${DSV3_SANITIZE} -fno-omit-frame-pointer
                         -fno-sanitize-recover=all -g1)
  target_link_options(dsv3_flags INTERFACE -fsanitize=${DSV3_SANITIZE})
  target_compile_definitions(dsv3_flags INTERFACE DSV3_SANITIZED=1)
endif()
if(DSV3_FUZZ)
  target_compile_options(dsv3_flags INTERFACE -fsanitize=fuzzer-no-link)
  target_compile_definitions(dsv3_flags INTERFACE DSV3_FUZZED=1)
endif()

# Linked after dsv3_flags, these take back some of a sanitizer's build. dsv3_unsanitized: all of it.
# dsv3_memory_only: what stands beside every access and AddressSanitizer sees anyway.
# dsv3_program_flags, for tests and the tool, in every build: what is looked at and has to be fast is
# the library; assertions and option parsers would take most of the build's time.
foreach(name unsanitized memory_only program_flags)
  add_library(dsv3_${name} INTERFACE)
endforeach()
if(DSV3_SANITIZE)
  target_compile_options(dsv3_unsanitized INTERFACE -fno-sanitize=all)
  target_compile_options(dsv3_memory_only
                         INTERFACE -fno-sanitize=null,alignment,pointer-overflow,object-size)
  target_compile_options(dsv3_program_flags INTERFACE -fno-sanitize=undefined)
endif()
target_compile_options(dsv3_program_flags INTERFACE $<$<NOT:$<CONFIG:Debug>>:-O1>)

# dsv3_floor(name SOURCES ... LINKS ...): one floor of the house as a static library. LINKS names
# the floors below; a floor cannot include what it does not link.
function(dsv3_floor name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS" ${ARGN})
  add_library(dsv3_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(dsv3_${name} PUBLIC dsv3_flags ${ARG_LINKS})
endfunction()

# dsv3_test(kind file LINKS ... [TIMEOUT s] [LABELS ...]): one doctest program per test file, named
# <kind>.<file without _test>.
function(dsv3_test kind file)
  cmake_parse_arguments(ARG "" "TIMEOUT" "LINKS;LABELS;SOURCES" ${ARGN})
  get_filename_component(stem ${file} NAME_WE)
  string(REGEX REPLACE "_test$" "" stem ${stem})
  set(target test_${kind}_${stem})
  add_executable(${target} ${file} ${ARG_SOURCES} $<TARGET_OBJECTS:dsv3_test_main>)
  target_link_libraries(${target} PRIVATE dsv3_flags dsv3_program_flags dsv3_test_support
                        ${ARG_LINKS})
  target_compile_definitions(${target} PRIVATE DSV3_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  add_test(NAME ${kind}.${stem} COMMAND ${target})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  set(cost ${ARG_TIMEOUT})  # the longest run first, so that no core waits for one at the end
  if(CMAKE_CROSSCOMPILING)
    set(ARG_TIMEOUT 1800)  # an emulator takes its time
  endif()
  set_tests_properties(${kind}.${stem} PROPERTIES LABELS "${kind};${ARG_LABELS}"
                       TIMEOUT ${ARG_TIMEOUT} COST ${cost})
  if(CMAKE_CROSSCOMPILING AND NOT kind MATCHES "^(kernels|golden)$")
    # Not about arithmetic: on a processor without the dot products, whose emulation takes thrice
    # as long.
    set_tests_properties(${kind}.${stem} PROPERTIES ENVIRONMENT QEMU_CPU=cortex-a57)
  endif()
endfunction()
