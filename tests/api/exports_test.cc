// The shared library as the dynamic linker sees it: it exports what dsv3.h declares and nothing
// else, needs libc and libstdc++ alone, and is never unloaded.
#include <doctest/doctest.h>

#include <regex>
#include <set>
#include <sstream>

#include "tests/api/process.h"
#include "tests/support/support.h"

namespace dsv3::test {
namespace {

// All functions that the header declares, found by another way than the build's own list.
std::set<std::string> declared() {
  std::string text = read_bytes(source_path("include/dsv3.h"));
  text = std::regex_replace(text, std::regex("/\\*[^*]*\\*+(?:[^/*][^*]*\\*+)*/"), " ");
  std::set<std::string> out;
  const std::regex declaration("DSV3_API\\s[^;]*?\\b(dsv3_\\w+)\\s*\\(");
  for (std::sregex_iterator i(text.begin(), text.end(), declaration), end; i != end; ++i) {
    out.insert((*i)[1]);
  }
  return out;
}

TEST_CASE("exactly the functions of dsv3.h are exported") {
  const Run nm = run({"nm", "-D", "--defined-only", DSV3_LIBRARY});
  REQUIRE_MESSAGE(nm.code == 0, nm.err);
  std::set<std::string> exported;
  std::istringstream lines(nm.out);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string address, kind, name;
    words >> address >> kind >> name;
    if (name == "DSV3_0") continue;  // the version's own name
    CHECK_MESSAGE(kind == "T", line);
    const size_t at = name.find("@@DSV3_0");
    CHECK_MESSAGE(at != std::string::npos, line);
    exported.insert(name.substr(0, at));
  }
  const std::set<std::string> expected = declared();
  CHECK(expected.size() > 50);
  for (const std::string& name : expected) {
    CHECK_MESSAGE(exported.count(name) == 1, name, " is declared and not exported");
  }
  for (const std::string& name : exported) {
    CHECK_MESSAGE(expected.count(name) == 1, name, " is exported and not declared");
  }
}

TEST_CASE("name, version and flags of the shared object") {
  const Run readelf = run({"readelf", "-dW", DSV3_LIBRARY});
  REQUIRE_MESSAGE(readelf.code == 0, readelf.err);
  CHECK(readelf.out.find("[libdsv3.so.0]") != std::string::npos);
  CHECK(readelf.out.find("NODELETE") != std::string::npos);
  CHECK(readelf.out.find("TEXTREL") == std::string::npos);
  CHECK(readelf.out.find("RUNPATH") == std::string::npos);
}

TEST_CASE("it needs libc and libstdc++ alone") {
  const Run readelf = run({"readelf", "-dW", DSV3_LIBRARY});
  const std::regex needed("\\(NEEDED\\)[^\\[]*\\[([^\\]]+)\\]");
  const std::regex allowed("(libc|libm|libstdc\\+\\+|libgcc_s|ld-linux-[a-z0-9-]+)\\.so\\.[0-9]+");
  for (std::sregex_iterator i(readelf.out.begin(), readelf.out.end(), needed), end; i != end; ++i) {
    const std::string name = (*i)[1];
#ifdef DSV3_SANITIZED
    if (name.rfind("libasan", 0) == 0 || name.rfind("libubsan", 0) == 0 ||
        name.rfind("libtsan", 0) == 0) {
      continue;
    }
#endif
    CHECK_MESSAGE(std::regex_match(name, allowed), name);
  }
}

}  // namespace
}  // namespace dsv3::test
