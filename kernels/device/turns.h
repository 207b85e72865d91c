// A turn: some runs untimed, because caches and clocks have to come back, then timed ones for a while.
#ifndef TICKETKIT_DEVICE_TURNS_H_
#define TICKETKIT_DEVICE_TURNS_H_

#include <time.h>

#include <vector>

namespace tk::device {

// How long and how often. Seconds are for each engine.
struct Protocol {
  int rounds = 10;
  double seconds = 0.5;  // timed, in each round
  double warmup = 1.0;
  int settle = 2;  // untimed runs at the start of a turn
  int least = 3;   // timed runs of a turn, however slow
};

inline double now_ms() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) / 1e6;
}

// Milliseconds of each timed run.
template <class Run>
std::vector<double> turn(Run&& run, double seconds, int settle, int least) {
  constexpr size_t kMost = 100000;  // one line of times, which the other end takes whole
  for (int i = 0; i < settle; ++i) run();
  std::vector<double> times;
  double sum = 0;
  while (times.size() < static_cast<size_t>(least) || (sum < seconds * 1e3 && times.size() < kMost)) {
    const double start = now_ms();
    run();
    times.push_back(now_ms() - start);
    sum += times.back();
  }
  return times;
}

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_TURNS_H_
