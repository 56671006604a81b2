#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "runtime/base/os_cgroup.h"

namespace dsv3 {
namespace {

// The first line of a file; empty when there is none.
std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// "max 100000" or "150000 100000"
double read_cpus_v2(const std::string& folder) {
  double quota = 0, period = 0;
  const std::string line = first_line(folder + "/cpu.max");
  if (std::sscanf(line.c_str(), "%lf %lf", &quota, &period) != 2 || period <= 0) return 0;
  return quota / period;
}
double read_cpus_v1(const std::string& folder) {
  const double quota = std::atof(first_line(folder + "/cpu.cfs_quota_us").c_str());
  const double period = std::atof(first_line(folder + "/cpu.cfs_period_us").c_str());
  return quota > 0 && period > 0 ? quota / period : 0;
}
double read_memory_v2(const std::string& folder) {
  return std::atof(first_line(folder + "/memory.max").c_str());  // "max" reads as 0
}
// No limit is a number just below 2^63.
double read_memory_v1(const std::string& folder) {
  const double limit = std::atof(first_line(folder + "/memory.limit_in_bytes").c_str());
  return limit < 0x1p62 ? limit : 0;
}

// A field of a file of "name value" lines, 0 without it.
double read_field(const std::string& path, const std::string& name) {
  std::ifstream in(path);
  std::string key;
  double value = 0;
  while (in >> key >> value) {
    if (key == name) return value;
  }
  return 0;
}

double left_of(double limit, double used, const std::string& stat, const std::string& prefix) {
  if (limit <= 0) return 0;
  used -= read_field(stat, prefix + "inactive_file") + read_field(stat, prefix + "active_file");
  return std::max(1.0, limit - std::max(0.0, used));
}
double read_memory_left_v2(const std::string& folder) {
  return left_of(read_memory_v2(folder), std::atof(first_line(folder + "/memory.current").c_str()),
                 folder + "/memory.stat", "");
}
double read_memory_left_v1(const std::string& folder) {
  return left_of(read_memory_v1(folder),
                 std::atof(first_line(folder + "/memory.usage_in_bytes").c_str()),
                 folder + "/memory.stat", "total_");
}

// The smallest limit that `read` finds between mount + group and the mount itself joins *least.
void add_least(const std::string& mount, const std::string& group,
               double (*read)(const std::string&), double* least) {
  std::string folder = mount + group;
  for (;;) {
    const double limit = read(folder);
    if (limit > 0 && (*least == 0 || limit < *least)) *least = limit;
    if (folder.size() <= mount.size()) return;
    folder.resize(folder.rfind('/'));
  }
}

bool has_controller(const std::string& list, const std::string& name) {
  return ("," + list + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace

CgroupLimits cgroup_limits(const std::string& root, const std::string& self) {
  CgroupLimits limits;
  std::ifstream in(self);
  std::string line;
  while (std::getline(in, line)) {  // "4:cpu,cpuacct:/a/b", of version 2 "0::/a/b"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos || line[second + 1] != '/') continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      // Beside version 1 its tree is mounted at "unified".
      for (const std::string& mount : {root, root + "/unified"}) {
        add_least(mount, group, read_cpus_v2, &limits.cpus);
        add_least(mount, group, read_memory_v2, &limits.memory);
        add_least(mount, group, read_memory_left_v2, &limits.memory_left);
      }
    }
    if (has_controller(controllers, "cpu")) {
      add_least(root + "/" + controllers, group, read_cpus_v1, &limits.cpus);
      add_least(root + "/cpu", group, read_cpus_v1, &limits.cpus);
    }
    if (has_controller(controllers, "memory")) {
      add_least(root + "/memory", group, read_memory_v1, &limits.memory);
      add_least(root + "/memory", group, read_memory_left_v1, &limits.memory_left);
    }
  }
  return limits;
}

}  // namespace dsv3
