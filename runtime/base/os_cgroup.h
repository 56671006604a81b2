// What the control groups that this process is in leave it of the machine.
#pragma once

#include <string>

namespace dsv3 {

struct CgroupLimits {
  double cpus = 0;    // of time, 1.5 for one and a half; 0: no limit
  double memory = 0;  // bytes; 0: no limit
  // Bytes until the first of these limits is met, what files have in memory not counted: they give
  // way. 0: no limit, 1: nothing is left.
  double memory_left = 0;
};

// The smallest limits of the groups and their parents: of version 2, and of version 1, whose
// controllers have trees of their own. `root` is where the trees are mounted, `self` a file as
// /proc/self/cgroup. In a container that does not hide its place in the host's tree the groups that
// `self` names are not there, but the root of what is mounted is the container's own group.
CgroupLimits cgroup_limits(const std::string& root, const std::string& self);

}  // namespace dsv3
