# dsv3_write_exports(header map): a linker version script that exports exactly the functions that the
# header declares, so that there is no second list to keep. The linker refuses a name that the
# library does not define (--no-undefined-version), and tests/api compares the result with the header
# once more, by other means.
function(dsv3_write_exports header map)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${header}")
  file(READ "${header}" text)
  # Declarations begin a line with DSV3_API; the name stands before the first parenthesis.
  string(REGEX MATCHALL "\nDSV3_API[^;(]*[ *]dsv3_[a-z0-9_]+\\(" declarations "${text}")
  set(script "DSV3_0 {\n  global:\n")
  foreach(declaration IN LISTS declarations)
    string(REGEX REPLACE ".*[ *](dsv3_[a-z0-9_]+)\\($" "\\1" name "${declaration}")
    string(APPEND script "    ${name};\n")
  endforeach()
  string(APPEND script "  local:\n    *;\n};\n")
  list(LENGTH declarations count)
  if(count LESS 10)
    message(FATAL_ERROR "${header}: found ${count} declarations with DSV3_API, expected many more")
  endif()
  file(CONFIGURE OUTPUT "${map}" CONTENT "${script}" @ONLY)
endfunction()
