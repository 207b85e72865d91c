// What the runners have in common as programs: the settings both know, and what they say when they cannot go on.
#ifndef TICKETKIT_DEVICE_PROGRAM_H_
#define TICKETKIT_DEVICE_PROGRAM_H_

#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "events.h"
#include "options.h"
#include "turns.h"

namespace tk::device {

struct CommonSettings {
  Protocol protocol;
  std::vector<int> cpus;
  std::string root;  // of the files that tell temperatures and clocks
  bool check_only = false;

  explicit CommonSettings(const Protocol& defaults) : protocol(defaults) {
    if (const char* const set = std::getenv("TICKETKIT_SYSFS")) root = set;
  }

  // Whether the current option was one of these.
  bool take(Options& options) {
    if (options.is("--rounds")) {
      protocol.rounds = options.whole(1, 100000);
    } else if (options.is("--seconds")) {
      protocol.seconds = options.seconds();
    } else if (options.is("--warmup")) {
      protocol.warmup = options.seconds();
    } else if (options.is("--settle")) {
      protocol.settle = options.whole(0, 100000);
    } else if (options.is("--least")) {
      protocol.least = options.whole(1, 100000);
    } else if (options.is("--cpus") || options.is("--cpu")) {
      cpus = options.cpus();
    } else if (options.is("--check-only")) {
      check_only = true;
    } else if (options.is("--sysfs")) {
      root = options.text();
    } else {
      return false;
    }
    return true;
  }
};

// The whole program: `body` with the options, or the usage where --help is among them. Exit status 0 if it returned true. What it throws
// becomes a line on standard error and an event; a reader who has gone away ends it (see Event::emit) without a signal.
inline int run_program(int count, char** words, const char* usage, bool (*body)(Options&)) {
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(words[i], "--help") == 0) {
      std::fputs(usage, stdout);
      return 0;
    }
  }
  std::string message;
  try {
    signal(SIGPIPE, SIG_IGN);
    Options options(count, words);
    return body(options) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    message = "out of memory";
  } catch (const std::exception& error) {
    message = error.what();
  }
  std::fprintf(stderr, "error: %s\n", message.c_str());
  Event("error").field("message", message).emit();
  return 1;
}

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_PROGRAM_H_
