// The name of the JSON type, for headers that only pass it on: the parser itself costs every file
// that includes it some seconds to compile.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace dsv3 {

using Json = nlohmann::ordered_json;

}  // namespace dsv3
