// What the runners say: one JSON object a line on standard output, written whole and at once, so that a run that is cut off leaves every
// line it had finished. Standard error is free text. The events and their fields are listed in ../README.md, "Device".
#ifndef TICKETKIT_DEVICE_EVENTS_H_
#define TICKETKIT_DEVICE_EVENTS_H_

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace tk::device {

// `text` as a JSON string. What is not UTF-8 becomes "?".
inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (size_t i = 0; i < text.size();) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += text[i++];
    } else if (c < 0x20 || c == 0x7f) {
      char code[8];
      std::snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned>(c));
      out += code;
      ++i;
    } else if (c < 0x80) {
      out += text[i++];
    } else {
      const size_t length = c >= 0xf0 && c < 0xf5 ? 4 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xc2 && c < 0xe0 ? 2 : 0;
      bool whole = length > 0 && i + length <= text.size();
      for (size_t k = 1; whole && k < length; ++k) whole = (static_cast<unsigned char>(text[i + k]) & 0xc0) == 0x80;
      // overlong forms, surrogates and what lies beyond U+10FFFF
      const unsigned char next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0;
      if ((c == 0xe0 && next < 0xa0) || (c == 0xed && next > 0x9f) || (c == 0xf0 && next < 0x90) || (c == 0xf4 && next > 0x8f))
        whole = false;
      out += whole ? text.substr(i, length) : "?";
      i += whole ? length : 1;
    }
  }
  return out + "\"";
}

// A number, null where it is not finite.
inline std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

inline std::string numbers(const std::vector<double>& values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? "," : "") + number(values[i]);
  return out + "]";
}

// One event, built field by field and written by emit().
class Event {
 public:
  explicit Event(const char* kind) : text_("{\"event\":" + quoted(kind)) {}

  Event& field(const char* key, const std::string& value) { return raw(key, quoted(value)); }
  Event& field(const char* key, const char* value) { return raw(key, quoted(value)); }
  Event& field(const char* key, double value) { return raw(key, number(value)); }
  Event& field(const char* key, int64_t value) { return raw(key, std::to_string(value)); }
  Event& field(const char* key, int value) { return raw(key, std::to_string(value)); }
  Event& field(const char* key, bool value) { return raw(key, value ? "true" : "false"); }
  Event& field(const char* key, const std::vector<double>& values) { return raw(key, numbers(values)); }
  // null where the text is empty: what the system does not tell
  Event& known(const char* key, const std::string& value) { return raw(key, value.empty() ? "null" : quoted(value)); }
  // `json` as it is
  Event& raw(const char* key, const std::string& json) {
    text_ += "," + quoted(key) + ":" + json;
    return *this;
  }

  // Ends the process where nobody reads any more.
  void emit() const {
    const std::string line = text_ + "}\n";
    for (size_t done = 0; done < line.size();) {
      const ssize_t wrote = write(STDOUT_FILENO, line.data() + done, line.size() - done);
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote < 0 && errno == EAGAIN) {  // a connection that somebody made non-blocking, and that is full
        pollfd room = {STDOUT_FILENO, POLLOUT, 0};
        poll(&room, 1, 1000);
        continue;
      }
      if (wrote <= 0) std::_Exit(1);
      done += static_cast<size_t>(wrote);
    }
  }

 private:
  std::string text_;
};

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_EVENTS_H_
