// ticketkit-network: whole models in ONNX Runtime on the device it runs on, engine against engine, in alternating rounds.
//
// Every engine is a model file with or without ticketkit's operators, in a process of its own that is stopped while others have their turn.
// The first engine that runs is the reference: outputs of the others must agree with its own to half of float32's digits, or they are not
// timed. Events go to standard output (events.h).
#include <dlfcn.h>
#include <sys/stat.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../ort/session.h"
#include "child.h"
#include "events.h"
#include "machine.h"
#include "options.h"
#include "program.h"
#include "turns.h"

namespace tk::device {
namespace {

const char* const kUsage =
    "ticketkit-network --library LIBONNXRUNTIME [--operators LIBTICKETKIT] --engine NAME=MODEL.onnx [--engine ...] --input FILE.f32\n"
    "  --engine NAME=FILE  an engine named ticketkit (or ticketkit-...) gets the operators, every other one is plain ONNX Runtime\n"
    "  --input FILE        little-endian float32, the model's one input; its size says what the model's free dimension is\n"
    "  --shape N,C,H,W     of the input, where the model leaves more than one dimension free\n"
    "  --threads T         within one operator; default 1\n"
    "  --rounds N          default 10; --seconds S timed in each, default 0.5; --warmup S, default 1; --settle N untimed runs at the\n"
    "                      start of a turn, default 2; --least N timed runs of a turn, default 3\n"
    "  --cpus LIST         bind to these processors, such as 4-7\n"
    "  --timeout S         for one answer of an engine; default 600\n"
    "  --outputs DIR       write every engine's outputs to DIR/NAME.f32\n"
    "  --check-only        load, run once, compare; time nothing\n"
    "  --sysfs ROOT        read temperatures and clocks below ROOT instead of / ($TICKETKIT_SYSFS)\n"
    "One JSON object a line goes to standard output. The exit status is 0 if an engine was measured, else 1.\n";

struct Engine {
  std::string name, model;
  bool sparse() const { return name == "ticketkit" || name.compare(0, 10, "ticketkit-") == 0; }
};

struct Settings : CommonSettings {
  Settings() : CommonSettings(Protocol{}) {}

  std::string library, operators, input, outputs;
  std::vector<Engine> engines;
  std::vector<int64_t> shape;
  int threads = 1;
  double timeout = 600;
};

Engine engine(const std::string& word, const std::vector<Engine>& before) {
  const size_t at = word.find('=');
  const std::string name = word.substr(0, at);
  const char* const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  if (at == std::string::npos || name.empty() || at + 1 == word.size() || name.find_first_not_of(letters) != std::string::npos ||
      name[0] == '.')
    throw std::runtime_error("--engine: expected NAME=MODEL.onnx with letters, digits, '.', '_' and '-' in the name, got '" + word + "'");
  for (const Engine& other : before) {
    if (other.name == name) throw std::runtime_error("--engine: expected different names, got " + name + " twice");
  }
  return {name, word.substr(at + 1)};
}

std::vector<int64_t> sizes(Options& options) {
  std::vector<int64_t> shape;
  for (const std::string& word : options.list()) {
    char* end = nullptr;
    const long long size = std::strtoll(word.c_str(), &end, 10);
    if (*end || size < 1 || size > (1 << 24)) throw std::runtime_error("--shape: expected sizes such as 1,3,224,224, got '" + word + "'");
    shape.push_back(size);
  }
  return shape;
}

Settings settings(Options& options) {
  Settings s;
  while (options.next()) {
    if (s.take(options)) continue;
    if (options.is("--library")) {
      s.library = options.text();
    } else if (options.is("--operators")) {
      s.operators = options.text();
    } else if (options.is("--engine")) {
      s.engines.push_back(engine(options.text(), s.engines));
    } else if (options.is("--input")) {
      s.input = options.text();
    } else if (options.is("--shape")) {
      s.shape = sizes(options);
    } else if (options.is("--threads")) {
      s.threads = options.whole(1, 1024);
    } else if (options.is("--timeout")) {
      s.timeout = options.seconds();
    } else if (options.is("--outputs")) {
      s.outputs = options.text();
    } else {
      options.unknown();
    }
  }
  if (s.library.empty() || s.input.empty() || s.engines.empty())
    throw std::runtime_error("expected --library, --input and at least one --engine; --help says more");
  for (const Engine& each : s.engines) {
    if (each.sparse() && s.operators.empty())
      throw std::runtime_error("--operators: expected the path of libticketkit for the engine " + each.name);
  }
  return s;
}

std::vector<float> read_floats(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw std::runtime_error(path + ": " + std::strerror(errno));
  struct stat about {};
  if (fstat(fileno(file.get()), &about) || !S_ISREG(about.st_mode) || about.st_size < 4 || about.st_size % 4 ||
      about.st_size > (int64_t{1} << 32))
    throw std::runtime_error(path + ": expected a file of float32 numbers, got " + std::to_string(about.st_size) + " bytes");
  std::vector<float> all(static_cast<size_t>(about.st_size) / 4);
  if (std::fread(all.data(), 4, all.size(), file.get()) != all.size()) throw std::runtime_error(path + ": cannot be read whole");
  return all;
}

void write_floats(const std::string& path, const std::vector<float>& all) {
  FILE* const file = std::fopen(path.c_str(), "wb");
  const bool wrote = file && std::fwrite(all.data(), 4, all.size(), file) == all.size();
  const int reason = errno;
  if ((file && std::fclose(file)) || !wrote) throw std::runtime_error(path + ": " + std::strerror(wrote ? errno : reason));
}

// The declared shape with numbers for its free dimensions, so that it holds `count` floats.
std::vector<int64_t> fitted(std::vector<int64_t> declared, const std::vector<int64_t>& asked, size_t count) {
  std::string text;
  size_t known = 1, free = 0;
  for (size_t i = 0; i < declared.size(); ++i) {
    text += (i ? "," : "") + (declared[i] < 0 ? std::string("?") : std::to_string(declared[i]));
    if (!asked.empty() && asked.size() == declared.size() && (declared[i] < 0 || declared[i] == asked[i])) declared[i] = asked[i];
    free += declared[i] < 0;
    if (declared[i] >= 0) known *= static_cast<size_t>(declared[i]);
  }
  if (!asked.empty() && declared != asked) throw std::runtime_error("--shape: expected one that fits the model's input [" + text + "]");
  if (free > 1) throw std::runtime_error("the model's input [" + text + "] has several free dimensions: say its shape with --shape");
  if (known == 0 || count % known || (!free && count != known))
    throw std::runtime_error("--input: expected floats for an input of [" + text + "], got " + std::to_string(count));
  for (int64_t& size : declared) {
    if (size < 0) size = static_cast<int64_t>(count / known);
  }
  return declared;
}

// What one engine's process does: "load" gives [rss, load_s] and the outputs of a first run, "turn SECONDS SETTLE LEAST" gives [rss, ms ...].
Child::Server serve(const Settings& s, const Engine& e, std::vector<float>& x) {
  pin(s.cpus);
  const auto runtime = std::make_shared<ort::Runtime>(s.library);
  const double start = now_ms();
  const auto program = std::make_shared<ort::Program>(*runtime, e.model, s.threads, e.sparse() ? s.operators : "");
  const double seconds = (now_ms() - start) / 1e3;
  program->bind(x.data(), fitted(program->shape(), s.shape, x.size()));
  return [runtime, program, seconds](const std::string& question) {
    double duration = 0;
    int settle = 0, least = 0;
    if (std::sscanf(question.c_str(), "turn %lf %d %d", &duration, &settle, &least) == 3) {
      std::vector<double> all = turn([&] { program->run(); }, duration, settle, least);
      all.insert(all.begin(), static_cast<double>(peak_rss_bytes()));
      return Answer{all, {}, ""};
    }
    program->run();
    std::vector<float> outputs = program->outputs();
    return Answer{{static_cast<double>(peak_rss_bytes()), seconds}, std::move(outputs), ""};
  };
}

// Versions and instruction set, told by a process of its own: a broken library ends that one only.
Answer probe(const Settings& s) {
  Child child([&s]() -> Child::Server {
    return [&s](const std::string&) {
      Answer answer;
      std::string isa, version;
      if (!s.operators.empty()) {
        void* const handle = dlopen(s.operators.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!handle) throw std::runtime_error(std::string("--operators: ") + dlerror());
        const auto active = reinterpret_cast<int (*)(int32_t*)>(dlsym(handle, "tk_isa_active"));
        const auto name = reinterpret_cast<const char* (*)(int32_t)>(dlsym(handle, "tk_isa_name"));
        const auto number = reinterpret_cast<const char* (*)()>(dlsym(handle, "tk_version"));
        if (!active || !name || !number) throw std::runtime_error("--operators: expected libticketkit, got " + s.operators);
        int32_t index = 0;
        if (active(&index)) throw std::runtime_error("TICKETKIT_ISA names an instruction set that is unknown or cannot run here");
        isa = name(index);
        version = number();
      }
      const ort::Runtime runtime(s.library);
      answer.text = isa + "\n" + version + "\n" + runtime.version();
      return answer;
    };
  });
  try {
    return child.ask("", s.timeout);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("the libraries cannot be used on this device: ") + error.what());
  }
}

struct Contender {
  Engine engine;
  std::unique_ptr<Child> child;
  int64_t peak_rss_bytes = 0;
};

class Run {
 public:
  Run(Settings s, std::vector<float> x) : s_(std::move(s)), x_(std::move(x)), machine_(s_.root) {}

  // Whether an engine came through.
  bool all() {
    const std::string said = probe(s_).text;
    const size_t first = said.find('\n'), second = said.find('\n', first + 1);
    machine_.say(said.substr(0, first), said.substr(second + 1), said.substr(first + 1, second - first - 1));
    for (const Engine& each : s_.engines) load(each);
    if (!s_.check_only && !contenders_.empty()) take_turns();
    bool any = false;
    for (Contender& c : contenders_) {
      if (!c.child) continue;
      any = true;
      Event("finished").field("engine", c.engine.name).field("peak_rss_bytes", c.peak_rss_bytes).emit();
    }
    Event("end").emit();
    return any;
  }

 private:
  void load(const Engine& each) {
    Contender c{each, nullptr, 0};
    try {
      c.child = std::make_unique<Child>([this, &each] { return serve(s_, each, x_); });
      const Answer answer = c.child->ask("load", s_.timeout);
      c.peak_rss_bytes = static_cast<int64_t>(answer.numbers.at(0));
      Event("loaded").field("engine", each.name).field("load_s", answer.numbers.at(1)).emit();
      if (!s_.outputs.empty()) write_floats(s_.outputs + "/" + each.name + ".f32", answer.floats);
      check(each, answer.floats);
    } catch (const std::exception& error) {
      fail(each, error);
      return;
    }
    contenders_.push_back(std::move(c));
  }

  void check(const Engine& each, const std::vector<float>& got) {
    if (expected_.empty()) {
      bool finite = !got.empty();
      for (const float y : got) {
        finite = finite && std::isfinite(y);
        scale_ = std::fmax(scale_, std::fabs(static_cast<double>(y)));
      }
      if (!finite) throw std::runtime_error("expected finite outputs, got none, NaN or infinity");
      expected_ = got;
    }
    double off = got.size() == expected_.size() ? 0 : INFINITY;
    for (size_t i = 0; i < got.size() && i < expected_.size(); ++i) {
      const double d = std::fabs(static_cast<double>(got[i]) - static_cast<double>(expected_[i]));
      off = d <= off ? off : d;  // NaN stays
    }
    const double allowed = std::sqrt(static_cast<double>(std::numeric_limits<float>::epsilon())) * scale_;
    const bool ok = off <= allowed;
    Event("checked").field("engine", each.name).field("max_abs_diff", off).field("max_abs_output", scale_).field("ok", ok).emit();
    if (!ok) {
      throw std::runtime_error("expected the outputs of the first engine within " + number(allowed) + ", got a difference of " +
                               number(off) + "; a wrong answer has no speed");
    }
  }

  void take_turns() {
    const Protocol& p = s_.protocol;
    machine_.say_state("before");
    for (Contender& c : contenders_) record(c, p.warmup, -1);
    for (int i = 0; i < p.rounds; ++i) {
      for (size_t k = 0; k < contenders_.size(); ++k) record(contenders_[i % 2 ? contenders_.size() - 1 - k : k], p.seconds, i);
    }
    machine_.say_state("after");
  }

  void record(Contender& c, double seconds, int round) {
    if (!c.child) return;
    try {
      char question[64];
      std::snprintf(question, sizeof(question), "turn %.9g %d %d", seconds, s_.protocol.settle, s_.protocol.least);
      std::vector<double> times = c.child->ask(question, s_.timeout + seconds).numbers;
      c.peak_rss_bytes = static_cast<int64_t>(times.at(0));
      times.erase(times.begin());
      if (round >= 0) Event("round").field("engine", c.engine.name).field("round", round).field("ms", times).emit();
    } catch (const std::exception& error) {
      fail(c.engine, error);
      c.child.reset();
    }
  }

  static void fail(const Engine& each, const std::exception& error) {
    Event("failed").field("engine", each.name).field("message", error.what()).emit();
  }

  const Settings s_;
  std::vector<float> x_;
  const Machine machine_;
  std::vector<Contender> contenders_;
  std::vector<float> expected_;
  double scale_ = 0;
};

bool measure(Options& options) {
  Settings s = settings(options);
  if (!s.outputs.empty() && mkdir(s.outputs.c_str(), 0777) && errno != EEXIST)
    throw std::runtime_error("--outputs: " + s.outputs + ": " + std::strerror(errno));
  std::vector<float> x = read_floats(s.input);
  return Run(std::move(s), std::move(x)).all();
}

}  // namespace
}  // namespace tk::device

int main(int count, char** words) {
  using namespace tk::device;
  return run_program(count, words, kUsage, measure);
}
