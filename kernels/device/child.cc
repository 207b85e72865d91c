#include "child.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>

#include "turns.h"

namespace tk::device {
namespace {

// Written before the parts of an answer or question; both ends are this program, so it is a plain struct.
struct Head {
  uint64_t failed, numbers, floats, text;
};

bool write_all(int file, const void* from, size_t bytes) {
  const char* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t wrote = write(file, at, bytes);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return false;
    at += wrote;
    bytes -= static_cast<size_t>(wrote);
  }
  return true;
}

bool read_blocking(int file, void* to, size_t bytes) {
  char* at = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = read(file, at, bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

bool send(int file, const Answer& answer, bool failed) {
  const Head head = {failed, answer.numbers.size(), answer.floats.size(), answer.text.size()};
  return write_all(file, &head, sizeof(head)) && write_all(file, answer.numbers.data(), answer.numbers.size() * sizeof(double)) &&
         write_all(file, answer.floats.data(), answer.floats.size() * sizeof(float)) &&
         write_all(file, answer.text.data(), answer.text.size());
}

[[noreturn]] void serve(int questions, int answers, const std::function<Child::Server()>& start) {
  Child::Server server;
  for (;;) {
    uint64_t length = 0;
    if (!read_blocking(questions, &length, sizeof(length))) _exit(0);  // the parent wants no more
    std::string question(length, '\0');
    if (!read_blocking(questions, &question[0], length)) _exit(0);
    Answer answer;
    bool failed = false;
    try {
      if (!server) server = start();
      answer = server(question);
    } catch (const std::exception& error) {
      answer = {};
      answer.text = error.what();
      failed = true;
    }
    if (!send(answers, answer, failed)) _exit(0);
  }
}

}  // namespace

Child::Child(const std::function<Server()>& start) {
  int to[2], from[2];
  if (pipe(to)) throw std::runtime_error(std::string("no pipe for an engine: ") + std::strerror(errno));
  if (pipe(from)) {
    close(to[0]);
    close(to[1]);
    throw std::runtime_error(std::string("no pipe for an engine: ") + std::strerror(errno));
  }
  for (const int file : {to[1], from[0]}) fcntl(file, F_SETFD, FD_CLOEXEC);
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(0);  // it died in between
    close(to[1]);
    close(from[0]);
    dup2(STDERR_FILENO, STDOUT_FILENO);  // libraries that print must not reach the events
    serve(to[0], from[1], start);
  }
  close(to[0]);
  close(from[1]);
  questions_ = to[1];
  answers_ = from[0];
  if (pid_ < 0) {
    close(questions_);
    close(answers_);
    throw std::runtime_error(std::string("no process for an engine: ") + std::strerror(errno));
  }
  stop();
}

Child::~Child() {
  if (!dead_) {
    kill(pid_, SIGKILL);
    while (waitpid(pid_, &status_, 0) < 0 && errno == EINTR) continue;
  }
  close(questions_);
  close(answers_);
}

Answer Child::ask(const std::string& question, double seconds) {
  if (dead_) throw std::runtime_error(epitaph());
  const double deadline = now_ms() + seconds * 1e3;
  kill(pid_, SIGCONT);
  const uint64_t length = question.size();
  Head head{};
  Answer answer;
  bool whole = write_all(questions_, &length, sizeof(length)) && write_all(questions_, question.data(), length) &&
               read_all(&head, sizeof(head), deadline);
  if (whole) {
    answer.numbers.resize(head.numbers);
    answer.floats.resize(head.floats);
    answer.text.resize(head.text);
    whole = read_all(answer.numbers.data(), head.numbers * sizeof(double), deadline) &&
            read_all(answer.floats.data(), head.floats * sizeof(float), deadline) && read_all(&answer.text[0], head.text, deadline);
  }
  if (!whole) {
    const bool late = now_ms() >= deadline;
    kill(pid_, SIGKILL);  // changes nothing where it has died of something else
    while (waitpid(pid_, &status_, 0) < 0 && errno == EINTR) continue;
    dead_ = true;
    if (late) throw std::runtime_error("gave no answer within " + std::to_string(static_cast<int>(seconds)) + " s and was ended");
    throw std::runtime_error(epitaph());
  }
  stop();
  if (head.failed) throw std::runtime_error(answer.text);
  return answer;
}

bool Child::read_all(void* to, size_t bytes, double deadline_ms) {
  char* at = static_cast<char*>(to);
  while (bytes > 0) {
    pollfd wait = {answers_, POLLIN, 0};
    const double left = deadline_ms - now_ms();
    if (left <= 0) return false;
    const int ready = poll(&wait, 1, left > 1e6 ? 1000000 : static_cast<int>(left) + 1);
    if (ready < 0 && errno == EINTR) continue;
    if (ready < 0) return false;
    if (ready == 0) continue;
    const ssize_t got = read(answers_, at, bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

// Stops the child, and sees it stopped: the signal takes effect a moment after it is sent.
void Child::stop() {
  kill(pid_, SIGSTOP);
  pid_t got;
  while ((got = waitpid(pid_, &status_, WUNTRACED)) < 0 && errno == EINTR) continue;
  if (got == pid_ && !WIFSTOPPED(status_)) dead_ = true;
}

std::string Child::epitaph() {
  if (WIFSIGNALED(status_)) {
    const int number = WTERMSIG(status_);
    const std::string name = strsignal(number) ? strsignal(number) : "unknown";
    const std::string guess = number == SIGKILL ? "; often that means that memory ran out" : "";
    return "its process was ended by signal " + std::to_string(number) + " (" + name + ")" + guess;
  }
  return "its process ended by itself with exit code " + std::to_string(WIFEXITED(status_) ? WEXITSTATUS(status_) : -1);
}

}  // namespace tk::device
