#include "decoder/memory.h"

#include <sys/resource.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <mach/mach.h>
#endif

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>

#include "base/error.h"
#include "base/text.h"

namespace phi4edge {
namespace {

constexpr uint64_t kUnknown = UINT64_MAX;

uint64_t minus(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

#if defined(__linux__)
// The first word of a file as a number; none when it is missing or is a word, such as "max".
std::optional<uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t number = 0;
  if (file >> number) return number;
  return std::nullopt;
}

// The number after `name` in a file of lines "name number ..." (/proc/meminfo, memory.stat).
std::optional<uint64_t> read_entry(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word;
    uint64_t number = 0;
    if (words >> word && word == name && words >> number) return number;
  }
  return std::nullopt;
}

// What is left of the limit of one cgroup.  File pages that can be dropped do not count as used.
uint64_t left_in_cgroup(const std::string& folder, const char* limit_file, const char* usage_file, const char* inactive) {
  const auto limit = read_number(folder + limit_file);
  const auto usage = read_number(folder + usage_file);
  if (!limit || !usage) return kUnknown;
  const uint64_t inactive_bytes = read_entry(folder + "/memory.stat", inactive).value_or(0);
  return minus(*limit, minus(*usage, inactive_bytes));
}

// A group is limited by all of its parents too.  Inside a container the path of the host may not exist; its own group is then
// the root of the mount, where the walk ends.
uint64_t left_in_cgroups(const std::string& root) {
  std::ifstream file(root + "/proc/self/cgroup");
  std::string line;
  uint64_t left = kUnknown;
  while (std::getline(file, line)) {  // "hierarchy:controllers:path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool is_v2 = controllers == ",,";
    if (!is_v2 && controllers.find(",memory,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    for (;;) {
      while (path.ends_with('/')) path.pop_back();
      left = std::min(left,
                      is_v2 ? left_in_cgroup(root + "/sys/fs/cgroup" + path, "/memory.max", "/memory.current", "inactive_file")
                            : left_in_cgroup(root + "/sys/fs/cgroup/memory" + path, "/memory.limit_in_bytes",
                                             "/memory.usage_in_bytes", "total_inactive_file"));
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return left;
}

uint64_t left_in_address_space(const std::string& root) {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnknown;
  const uint64_t pages = read_number(root + "/proc/self/statm").value_or(0);  // its first number is the virtual size
  return minus(uint64_t(limit.rlim_cur), pages * uint64_t(sysconf(_SC_PAGESIZE)));
}
#endif

std::string size_text(uint64_t n_bytes) {
  const uint64_t mib = (n_bytes + (1 << 20) - 1) >> 20;
  return mib < 10240 ? text(mib, " MiB") : text(mib >> 10, ".", (mib & 1023) * 10 >> 10, " GiB");
}

}  // namespace

#if defined(__linux__)
uint64_t available_memory(const std::string& root) {
  const auto kib = read_entry(root + "/proc/meminfo", "MemAvailable:");
  const uint64_t machine = kib ? *kib * 1024 : kUnknown;
  return std::min({machine, left_in_cgroups(root), left_in_address_space(root)});
}
#elif defined(__APPLE__)
uint64_t available_memory(const std::string&) {
  vm_statistics64_data_t statistics{};
  mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
  const auto status = host_statistics64(mach_host_self(), HOST_VM_INFO64, reinterpret_cast<host_info64_t>(&statistics), &count);
  if (status != KERN_SUCCESS) return kUnknown;
  const uint64_t pages = uint64_t(statistics.free_count) + statistics.inactive_count + statistics.purgeable_count;
  return pages * uint64_t(sysconf(_SC_PAGESIZE));
}
#else
uint64_t available_memory(const std::string&) { return kUnknown; }
#endif

void require_memory(const MemoryNeed& need, uint64_t available) {
  if (need.total() <= available) return;
  const std::string problem =
      text("the model needs ", size_text(need.total()), " of memory (weights ", size_text(need.weights), ", KV cache ",
           size_text(need.kv_cache), ", scratch ", size_text(need.scratch), "), but ", size_text(available), " are available");
  const uint64_t fixed = need.weights + need.scratch;
  if (fixed >= available || need.kv_cache == 0) {
    throw OutOfMemoryError(problem, "use a model that is quantized to fewer bits, or close other programs");
  }
  const int percent = int(double(available - fixed) / double(need.kv_cache) * 100.0);
  throw OutOfMemoryError(problem, percent > 0 ? text("use a smaller context; ", percent, "% of this one would fit")
                                              : "use a much smaller context, or a model that is quantized to fewer bits");
}

void require_adapter_memory(uint64_t n_bytes, uint64_t available) {
  if (n_bytes <= available) return;
  throw OutOfMemoryError(
      text("the adapter needs ", size_text(n_bytes), " of memory, but ", size_text(available), " are available"),
      "unload another adapter, or use one that is quantized to fewer bits");
}

}  // namespace phi4edge
