// What a device says of itself: processors, clusters, temperatures, clocks. All of it is optional, and nothing of it needs privileges.
#ifndef TICKETKIT_DEVICE_MACHINE_H_
#define TICKETKIT_DEVICE_MACHINE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace tk::device {

// Reads below `root` instead of "/" ($TICKETKIT_SYSFS, or --sysfs): root/proc/cpuinfo, root/sys/devices/system/cpu, root/sys/class/thermal.
class Machine {
 public:
  explicit Machine(std::string root);

  // The event "device": machine, processors with their highest clock, capacity and part number, kernel; and, null where empty,
  // the instruction set that our kernels use, the version of ONNX Runtime and that of ticketkit.
  void say(const std::string& isa, const std::string& runtime, const std::string& version) const;

  // The event "state": thermal zones in thousandths of a degree, clocks in kHz, governors. `when` is "before" or "after".
  void say_state(const char* when) const;

 private:
  std::string root_;
};

// Binds the calling thread, and those it starts, to these processors; throws std::runtime_error where the system refuses.
void pin(const std::vector<int>& cpus);

// Peak resident bytes of this process, 0 where the system does not tell.
int64_t peak_rss_bytes();

// Whole content of a small file, at most 1 MiB, without white space at its end; empty if it cannot be read.
std::string content(const std::string& path);

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_MACHINE_H_
