// ticketkit-layers: every layer of a bundle on the device it runs on, one thread, engine against engine in alternating rounds. Needs no
// library. Every result is first compared with one in double precision; a wrong answer is not timed. Events go to standard output.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "events.h"
#include "job.h"
#include "machine.h"
#include "options.h"
#include "program.h"
#include "reference.h"
#include "turns.h"

namespace tk::device {
namespace {

const char* const kUsage =
    "ticketkit-layers BUNDLE\n"
    "  --engines LIST      of sparse, dense, xnnpack-dense, xnnpack-sparse; default: all that this program was built with\n"
    "  --only TEXT         only layers whose name holds TEXT\n"
    "  --rounds N          default 5; --seconds S timed in each, for each layer and engine, default 0.05; --warmup S, default 0.05;\n"
    "                      --settle N untimed runs at the start of a turn, default 1; --least N timed runs of a turn, default 1\n"
    "  --cpu LIST          bind to these processors, such as 7\n"
    "  --plain             leave out residuals and activations but the clip, which XNNPACK's operators do not have\n"
    "  --check-only        compare with the reference; time nothing\n"
    "  --unchecked         compare nothing, which may take longer than all the rest: to count instructions of what was compared before\n"
    "  --spoil ENGINE      a negative control: makes one output of that engine wrong, which must be found\n"
    "  --sysfs ROOT        read temperatures and clocks below ROOT instead of / ($TICKETKIT_SYSFS)\n"
    "One JSON object a line goes to standard output. The exit status is 0 if every layer was right in every engine, else 1.\n";

struct Kind {
  const char* name;
  Engine (*make)(const Job&, int32_t isa);
};

const Kind kKinds[] = {
    {"sparse", sparse_engine},
    {"dense", [](const Job& job, int32_t) { return dense_engine(job); }},
#ifdef TICKETKIT_XNNPACK
    {"xnnpack-dense", [](const Job& job, int32_t) { return xnnpack_dense_engine(job); }},
    {"xnnpack-sparse", [](const Job& job, int32_t) { return xnnpack_sparse_engine(job); }},
#endif
};

struct Settings : CommonSettings {
  Settings() : CommonSettings({5, 0.05, 0.05, 1, 1}) {}

  std::string bundle, only, spoil;
  std::vector<const Kind*> kinds;
  bool unchecked = false, plain = false;
};

const Kind* kind(const std::string& name) {
  std::string known;
  for (const Kind& each : kKinds) {
    if (name == each.name) return &each;
    known += (known.empty() ? "" : ", ") + std::string(each.name);
  }
  throw std::runtime_error("engine '" + name + "': this program was built with " + known);
}

Settings settings(Options& options) {
  Settings s;
  while (options.next()) {
    if (s.take(options)) continue;
    if (options.is("--engines")) {
      for (const std::string& name : options.list()) s.kinds.push_back(kind(name));
    } else if (options.is("--only")) {
      s.only = options.text();
    } else if (options.is("--plain")) {
      s.plain = true;
    } else if (options.is("--unchecked")) {
      s.unchecked = true;
    } else if (options.is("--spoil")) {
      s.spoil = kind(options.text())->name;
    } else if (s.bundle.empty() && options.name()[0] != '-') {
      s.bundle = options.name();
    } else {
      options.unknown();
    }
  }
  if (s.check_only && s.unchecked) throw std::runtime_error("--check-only and --unchecked: expected one of them");
  if (s.bundle.empty()) throw std::runtime_error("expected the path of a bundle; --help says more");
  if (s.kinds.empty()) {
    for (const Kind& each : kKinds) s.kinds.push_back(&each);
  }
  return s;
}

// Standard normal numbers from a fixed seed, by xorshift and the sum of uniform ones.
void fill(Aligned<float>& to, uint64_t seed) {
  uint64_t state = seed * 2654435761u + 88172645463325252u;
  for (size_t i = 0; i < to.size(); ++i) {
    double sum = -6;
    for (int k = 0; k < 12; ++k) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      sum += static_cast<double>(state >> 11) / 9007199254740992.0;
    }
    to[i] = static_cast<float>(sum);
  }
}

void describe(const BundleLayer& l) {
  const tk_conv2d& s = l.shape;
  std::string shape = "[" + std::to_string(l.batch);
  const int64_t numbers[] = {s.in_channels, s.in_h, s.in_w, s.out_channels, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.groups};
  for (const int64_t number : numbers) shape += "," + std::to_string(number);
  const char* const layouts[] = {"planes", "csr", "bsr"};
  const int64_t nnz = static_cast<int64_t>(l.values.size()), uses = l.batch * l.out_h * l.out_w;
  Event("layer")
      .field("layer", l.name)
      .field("op", l.product            ? "gemm"
                   : l.shape.groups > 1 ? "depthwise"
                                        : "conv2d")
      .raw("shape", shape + "]")  // batch, in_channels, in_h, in_w, out_channels, kernel_h, kernel_w, stride_h, stride_w, groups
      .raw("layouts", "[" + quoted(layouts[s.x_layout]) + "," + quoted(layouts[s.y_layout]) + "]")
      .field("weights", l.rows() * l.cols())
      .field("nnz", nnz)
      .field("multiply_adds", nnz * uses)
      .field("multiply_adds_dense", l.rows() * l.cols() * uses)
      .emit();
}

class Run {
 public:
  explicit Run(Settings s) : s_(std::move(s)), machine_(s_.root) {}

  bool all() {
    int32_t isa = 0;
    if (tk_isa_active(&isa) != TK_OK) throw std::runtime_error("TICKETKIT_ISA names an instruction set that is unknown or cannot run here");
    std::vector<BundleLayer> layers = read_bundle(s_.bundle);
    for (BundleLayer& l : layers) {
      l.residual = l.residual && !s_.plain;
      if (s_.plain) l.activation = TK_IDENTITY;
    }
    pin(s_.cpus);
    machine_.say(tk_isa_name(isa), "", tk_version());
    if (!s_.check_only) machine_.say_state("before");
    size_t taken = 0;
    bool right = true;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i].name.find(s_.only) == std::string::npos) continue;
      right = one(layers[i], isa, i) && right;
      ++taken;
    }
    if (!taken) throw std::runtime_error("--only " + s_.only + ": no layer of this bundle has that in its name");
    if (!s_.check_only) machine_.say_state("after");
    for (const Kind* const each : s_.kinds) Event("finished").field("engine", each->name).field("peak_rss_bytes", peak_rss_bytes()).emit();
    Event("end").emit();
    return right;
  }

 private:
  struct Contender {
    const char* name;
    Engine engine;
  };

  // Whether every engine was right.
  bool one(const BundleLayer& l, int32_t isa, size_t index) {
    describe(l);
    Job job{l, Aligned<float>(static_cast<size_t>(l.x_count())), Aligned<float>(l.residual ? static_cast<size_t>(l.y_count()) : 0)};
    fill(job.x, 2 * index);
    fill(job.residual, 2 * index + 1);
    const Reference wanted = s_.unchecked ? Reference{} : reference(job);
    std::vector<Contender> contenders;
    bool right = true;
    for (const Kind* const each : s_.kinds) {
      if (l.dense && each->make == sparse_engine) continue;
      try {
        Contender c{each->name, each->make(job, isa)};
        if (!c.engine.run) continue;
        c.engine.run();
        if (s_.unchecked || check(wanted, job, c)) {
          contenders.push_back(std::move(c));
        } else {
          right = false;
        }
      } catch (const std::exception& error) {
        Event("failed").field("engine", each->name).field("layer", l.name).field("message", error.what()).emit();
        right = false;
      }
    }
    if (!s_.check_only) take_turns(l, contenders);
    return right;
  }

  bool check(const Reference& wanted, const Job& job, const Contender& c) const {
    const BundleLayer& l = job.layer;
    std::vector<float> y = c.engine.y();
    // how much an activation can widen a difference, and what its own rounding may add
    const bool curved = c.engine.activation && l.activation != TK_IDENTITY;
    const double slope = curved ? std::max(1.5, std::fabs(static_cast<double>(l.slope))) : 1.0;
    const double own = curved ? 16 * static_cast<double>(std::numeric_limits<float>::epsilon()) : 0.0;
    double largest = 0, off = 0;
    for (size_t i = 0; i < y.size(); ++i) largest = std::max(largest, std::fabs(expected(wanted, job, c.engine, i)));
    const double tolerance = slope * (c.engine.half ? wanted.half_tolerance : wanted.tolerance) + own * largest;
    if (s_.spoil == c.name) y[y.size() / 2] += static_cast<float>(4 * tolerance + 1e-6 * (largest + 1));
    for (size_t i = 0; i < y.size(); ++i) {
      const double d = std::fabs(static_cast<double>(y[i]) - expected(wanted, job, c.engine, i));
      off = d <= off ? off : d;  // NaN stays
    }
    const bool ok = off <= tolerance;
    std::string without;
    if (!c.engine.residual && l.residual) without = "residual";
    if (!c.engine.activation && l.activation != TK_IDENTITY) without += without.empty() ? "activation" : ", activation";
    Event("checked")
        .field("layer", l.name)
        .field("engine", c.name)
        .field("format", c.engine.format)
        .known("without", without)
        .field("max_abs_diff", off)
        .field("max_abs_output", largest)
        .field("tolerance", tolerance)
        .field("ok", ok)
        .emit();
    return ok;
  }

  void take_turns(const BundleLayer& l, std::vector<Contender>& contenders) const {
    const Protocol& p = s_.protocol;
    for (Contender& c : contenders) turn(c.engine.run, p.warmup, 0, 1);
    for (int i = 0; i < p.rounds; ++i) {
      for (size_t k = 0; k < contenders.size(); ++k) {
        const Contender& c = contenders[i % 2 ? contenders.size() - 1 - k : k];
        const std::vector<double> ms = turn(c.engine.run, p.seconds, p.settle, p.least);
        Event("round")
            .field("layer", l.name)
            .field("engine", c.name)
            .field("format", c.engine.format)
            .field("round", i)
            .field("ms", ms)
            .emit();
      }
    }
  }

  const Settings s_;
  const Machine machine_;
};

}  // namespace
}  // namespace tk::device

int main(int count, char** words) {
  using namespace tk::device;
  return run_program(count, words, kUsage, [](Options& options) { return Run(settings(options)).all(); });
}
