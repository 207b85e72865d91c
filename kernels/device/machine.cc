#include "machine.h"

#include <dirent.h>
#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>

#include "events.h"

namespace tk::device {
namespace {

// Numbers N of the entries `stem`N of a folder, ascending.
std::vector<int> numbered(const std::string& folder, const std::string& stem) {
  std::vector<int> found;
  if (DIR* const open = opendir(folder.c_str())) {
    while (const dirent* const entry = readdir(open)) {
      const std::string name = entry->d_name, tail = name.substr(std::min(stem.size(), name.size()));
      const bool digits = !tail.empty() && tail.size() < 6 && tail.find_first_not_of("0123456789") == std::string::npos;
      if (digits && name.compare(0, stem.size(), stem) == 0) found.push_back(std::atoi(tail.c_str()));
    }
    closedir(open);
  }
  std::sort(found.begin(), found.end());
  return found;
}

// A whole number as the system writes it, "null" for anything else.
std::string whole(const std::string& text) {
  const size_t sign = !text.empty() && text[0] == '-';
  const bool digits = text.size() > sign && text.size() < 19 && text.find_first_not_of("0123456789", sign) == std::string::npos;
  return digits ? std::to_string(std::atoll(text.c_str())) : "null";
}

// The lines `key : value` of cpuinfo: those of every processor by its number, those outside under -1.
std::map<int, std::map<std::string, std::string>> cpuinfo(const std::string& text) {
  std::map<int, std::map<std::string, std::string>> found;
  std::istringstream lines(text);
  std::string line;
  int cpu = -1;
  while (std::getline(lines, line)) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) {
      cpu = -1;
      continue;
    }
    const size_t end = line.find_last_not_of(" \t", colon ? colon - 1 : 0), start = line.find_first_not_of(" \t", colon + 1);
    const std::string key = end == std::string::npos ? "" : line.substr(0, end + 1);
    const std::string value = start == std::string::npos ? "" : line.substr(start);
    if (key == "processor") {
      const std::string number = whole(value);
      cpu = number == "null" ? -1 : std::atoi(number.c_str());
    } else {
      found[cpu][key] = value;
    }
  }
  return found;
}

}  // namespace

Machine::Machine(std::string root) : root_(std::move(root)) {}

void Machine::say(const std::string& isa, const std::string& runtime, const std::string& version) const {
  const auto info = cpuinfo(content(root_ + "/proc/cpuinfo"));
  const auto value = [&info](int cpu, const char* key) {
    const auto found = info.find(cpu);
    if (found == info.end()) return std::string();
    const auto field = found->second.find(key);
    return field == found->second.end() ? std::string() : field->second;
  };
  const std::string folder = root_ + "/sys/devices/system/cpu";
  std::string cpus;
  for (const int cpu : numbered(folder, "cpu")) {
    const std::string at = folder + "/cpu" + std::to_string(cpu), part = value(cpu, "CPU part");
    cpus += (cpus.empty() ? "" : ",") + std::string("{\"cpu\":") + std::to_string(cpu);
    cpus += ",\"max_khz\":" + whole(content(at + "/cpufreq/cpuinfo_max_freq"));
    cpus += ",\"capacity\":" + whole(content(at + "/cpu_capacity"));
    cpus += ",\"part\":" + (part.empty() ? "null" : quoted(part)) + "}";
  }
  std::string name = value(0, "model name");
  if (name.empty()) name = value(-1, "Hardware");
  if (name.empty()) name = content(root_ + "/proc/device-tree/model");
  name.erase(std::remove(name.begin(), name.end(), '\0'), name.end());
  utsname system{};
  uname(&system);
  Event("device")
      .field("machine", system.machine)
      .known("isa", isa)
      .known("cpu", name)
      .raw("cpus", "[" + cpus + "]")
      .field("kernel", std::string(system.sysname) + " " + system.release)
      .known("runtime", runtime)
      .known("ticketkit", version)
      .emit();
}

void Machine::say_state(const char* when) const {
  const std::string zones = root_ + "/sys/class/thermal", folder = root_ + "/sys/devices/system/cpu";
  std::string temperatures, clocks, governor;
  std::set<std::string> seen, governors;
  for (const int zone : numbered(zones, "thermal_zone")) {
    const std::string at = zones + "/thermal_zone" + std::to_string(zone), degrees = whole(content(at + "/temp"));
    if (degrees == "null") continue;
    std::string name = content(at + "/type");
    if (name.empty() || !seen.insert(name).second) name += "#" + std::to_string(zone);
    temperatures += (temperatures.empty() ? "" : ",") + quoted(name) + ":" + degrees;
  }
  for (const int cpu : numbered(folder, "cpu")) {
    const std::string at = folder + "/cpu" + std::to_string(cpu) + "/cpufreq/", khz = whole(content(at + "scaling_cur_freq"));
    if (khz != "null") clocks += (clocks.empty() ? "\"" : ",\"") + std::to_string(cpu) + "\":" + khz;
    const std::string own = content(at + "scaling_governor");
    if (!own.empty() && governors.insert(own).second) governor += (governor.empty() ? "" : ",") + own;
  }
  Event("state")
      .field("at", when)
      .raw("temperatures", "{" + temperatures + "}")
      .raw("khz", "{" + clocks + "}")
      .known("governor", governor)
      .emit();
}

void pin(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  std::string names;
  for (const int cpu : cpus) {
    CPU_SET(cpu, &set);
    names += (names.empty() ? "" : ",") + std::to_string(cpu);
  }
  if (sched_setaffinity(0, sizeof(set), &set))
    throw std::runtime_error("cannot be bound to processors " + names + " (" + std::strerror(errno) +
                             "); name some that this device has and this user may use");
}

int64_t peak_rss_bytes() {
  std::istringstream lines(content("/proc/self/status"));  // ru_maxrss would remember the parent this process was forked from
  std::string line;
  while (std::getline(lines, line)) {
    if (line.compare(0, 6, "VmHWM:") == 0) return std::atoll(line.c_str() + 6) * 1024;
  }
  return 0;
}

std::string content(const std::string& path) {
  std::string text;
  if (FILE* const file = std::fopen(path.c_str(), "rb")) {
    text.resize(size_t{1} << 20);
    text.resize(std::fread(&text[0], 1, text.size(), file));
    std::fclose(file);
  }
  const size_t end = text.find_last_not_of(" \t\r\n\f\v");
  return text.substr(0, end == std::string::npos ? 0 : end + 1);
}

}  // namespace tk::device
