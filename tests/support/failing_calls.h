// System calls about files that fail on request, for tests that name failing_calls.cc among their
// sources: it defines them, and passes them on.
#pragma once

#include <string>
#include <vector>

namespace dsv3::test {

// The names of what can fail: "open", "pread", ...
const std::vector<std::string>& failing_calls();

// The calls of this function from now on, on whatever thread, number `which` (from 0) of them fails
// with `error`, or does half of what it is asked for where `error` is 0 (a read or a write).
void fail_call(const std::string& function, int which, int error);
// Nothing fails any more. How many calls of that function there were.
int stop_failing();

}  // namespace dsv3::test
