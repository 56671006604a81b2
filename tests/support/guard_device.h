// A device whose memory can be touched inside table calls only: between them every buffer is
// mprotect'ed, so that any access from runtime/ ends the test. Weights are copied into such memory
// too. The work itself is done by another device.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace dsv3::test {

std::unique_ptr<kernels::Device> make_guard_device(std::unique_ptr<kernels::Device> inner);

}  // namespace dsv3::test
