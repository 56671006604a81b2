// Whether the tests run under an emulator, which takes a hundred times as long: the longest ones
// take smaller sizes then.
#pragma once

namespace dsv3::test {

#if defined(DSV3_EMULATED)
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif

}  // namespace dsv3::test
