// The command line of the runners: `--name value` and `--name` words, each taken apart strictly.
#ifndef TICKETKIT_DEVICE_OPTIONS_H_
#define TICKETKIT_DEVICE_OPTIONS_H_

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace tk::device {

// Walks the words; every getter throws std::runtime_error naming the option, what was expected and what came.
class Options {
 public:
  Options(int count, char** words) : words_(words + (count > 0), words + count) {}

  bool next() {
    if (at_ == words_.size()) return false;
    name_ = words_[at_++];
    return true;
  }
  bool is(const char* name) const { return name_ == name; }
  const std::string& name() const { return name_; }

  std::string text() {
    if (at_ == words_.size()) throw std::runtime_error(name_ + ": expected a value after it, got the end of the command");
    return words_[at_++];
  }

  int whole(int64_t least, int64_t most) {
    const std::string value = text();
    char* end = nullptr;
    errno = 0;
    const long long number = std::strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end || errno || number < least || number > most)
      throw std::runtime_error(name_ + ": expected a whole number from " + std::to_string(least) + " to " + std::to_string(most) +
                               ", got '" + value + "'");
    return static_cast<int>(number);
  }

  double seconds() {
    const std::string value = text();
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    if (value.empty() || *end || !(number >= 0) || number > 1e6)
      throw std::runtime_error(name_ + ": expected seconds from 0 to 1000000, got '" + value + "'");
    return number;
  }

  // Comma-separated words, none of them empty.
  std::vector<std::string> list() {
    const std::string value = text();
    std::vector<std::string> found(1);
    for (const char c : value) {
      if (c == ',') {
        found.emplace_back();
      } else {
        found.back() += c;
      }
    }
    for (const std::string& word : found) {
      if (word.empty()) throw std::runtime_error(name_ + ": expected words with commas between them, got '" + value + "'");
    }
    return found;
  }

  // Numbers of processors such as 0,4-7.
  std::vector<int> cpus() {
    std::vector<int> found;
    for (const std::string& part : list()) {
      char* end = nullptr;
      const long first = std::strtol(part.c_str(), &end, 10);
      const long last = *end == '-' && end != part.c_str() ? std::strtol(end + 1, &end, 10) : first;
      const bool digits = part.find_first_not_of("0123456789-") == std::string::npos && part.back() != '-' && part.front() != '-';
      if (!digits || *end || last < first || last > 1023)
        throw std::runtime_error(name_ + ": expected numbers of processors such as 0,4-7, got '" + part + "'");
      for (long cpu = first; cpu <= last; ++cpu) found.push_back(static_cast<int>(cpu));
    }
    return found;
  }

  [[noreturn]] void unknown() const { throw std::runtime_error("unknown option '" + name_ + "'; --help lists what there is"); }

 private:
  std::vector<std::string> words_;
  size_t at_ = 0;
  std::string name_;
};

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_OPTIONS_H_
