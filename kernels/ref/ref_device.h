// The executable specification of the table: scalar float32, one thread, nothing rounded, every
// weight type in both layouts. Slow on purpose where speed would cost clarity; every fast kernel is
// tested against it.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace dsv3::kernels {

std::unique_ptr<Device> make_ref_device();

}  // namespace dsv3::kernels
