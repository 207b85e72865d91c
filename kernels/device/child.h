// A function in a process of its own, awake only while it is asked something: a pool of threads that idles may spin, and would slow
// whoever is timed. Dies with its parent, and its death is a result, not the end of the run.
#ifndef TICKETKIT_DEVICE_CHILD_H_
#define TICKETKIT_DEVICE_CHILD_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace tk::device {

// What a child answers: floats, and numbers whose meaning the question gives.
struct Answer {
  std::vector<double> numbers;
  std::vector<float> floats;
  std::string text;
};

class Child {
 public:
  // Answers a question in the child; what it throws (std::exception) becomes an exception of ask().
  using Server = std::function<Answer(const std::string& question)>;

  // Forks, and stops the child before its first question. `start` runs in the child and makes its server.
  explicit Child(const std::function<Server()>& start);
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child();

  // Wakes the child, has it answer, stops it again. Throws std::runtime_error when the server threw, when the child has died (naming its
  // signal or exit code), or when it gave no answer within `seconds`; in the last two cases it is gone.
  Answer ask(const std::string& question, double seconds);

 private:
  bool read_all(void* to, size_t bytes, double deadline_ms);
  void stop();
  std::string epitaph();

  pid_t pid_ = -1;
  int questions_ = -1, answers_ = -1;
  int status_ = 0;
  bool dead_ = false;
};

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_CHILD_H_
