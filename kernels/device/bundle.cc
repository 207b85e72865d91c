#include "bundle.h"

#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace tk::device {
namespace {

constexpr char kMagic[] = "TKBUNDLE";
constexpr uint32_t kVersion = 1;
constexpr int64_t kMostBytes = int64_t{1} << 31;

static_assert(sizeof(tk_conv2d) == 17 * sizeof(int64_t) && sizeof(tk_tuning) == 3 * sizeof(int32_t), "the fields that bundle.h lists");

class Reader {
 public:
  Reader(const uint8_t* bytes, size_t size) : at_(bytes), left_(size) {}

  size_t left() const { return left_; }

  void copy(void* to, size_t bytes, const char* field) {
    if (bytes > left_) throw std::runtime_error(std::string(field) + ": the file ends within it; copy it again");
    if (bytes) std::memcpy(to, at_, bytes);
    at_ += bytes;
    left_ -= bytes;
  }
  template <class T>
  T one(const char* field) {
    T value;
    copy(&value, sizeof(value), field);
    return value;
  }
  // A count that the file itself bounds, so that no claim of it allocates more than there is.
  template <class T>
  std::vector<T> array(int64_t count, const char* field) {
    if (count < 0 || static_cast<uint64_t>(count) > left_ / sizeof(T))
      throw std::runtime_error(std::string(field) + ": the file ends within it; copy it again");
    std::vector<T> values(static_cast<size_t>(count));
    copy(values.data(), values.size() * sizeof(T), field);
    return values;
  }

 private:
  const uint8_t* at_;
  size_t left_;
};

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

// The product of positive factors, capped beyond every limit here.
int64_t product(std::initializer_list<int64_t> factors) {
  int64_t all = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(all, factor, &all) || all > (int64_t{1} << 40)) return int64_t{1} << 40;
  }
  return all;
}

void check_shape(BundleLayer& l) {
  constexpr int64_t kMostSize = 1 << 24;
  tk_conv2d& s = l.shape;
  for (const int64_t size : {l.batch, s.in_channels, s.in_h, s.in_w, s.out_channels, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w,
                             s.dilation_h, s.dilation_w, s.groups})
    expect(size >= 1 && size <= kMostSize, "shape: expected sizes from 1 to 2^24");
  for (const int64_t pad : {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right})
    expect(pad >= 0 && pad <= kMostSize, "shape: expected pads from 0 to 2^24");
  for (const int64_t layout : {s.x_layout, s.y_layout}) expect(layout >= 0 && layout <= 2, "shape: expected layouts from 0 to 2");
  expect(s.groups == 1 || (s.groups == s.in_channels && s.groups == s.out_channels), "shape: expected one group, or depthwise");
  expect(s.groups == 1 || (!s.x_layout && !s.y_layout && l.format == TK_CSR), "shape: expected planes and csr for a depthwise layer");
  if (l.product) {
    const int64_t ones[] = {s.in_h, s.in_w, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w, s.groups};
    for (const int64_t one : ones) expect(one == 1, "shape: expected a product to have no window");
    expect(!(s.pad_top | s.pad_left | s.pad_bottom | s.pad_right | s.x_layout | s.y_layout), "shape: expected a product to have no window");
    expect(!l.residual, "flags: expected no residual of a product");
  } else {
    expect(l.format != TK_BSR_1X4, "format: expected csr or bsr for a convolution");
  }
  const int64_t room_h = s.in_h + s.pad_top + s.pad_bottom - s.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t room_w = s.in_w + s.pad_left + s.pad_right - s.dilation_w * (s.kernel_w - 1) - 1;
  expect(room_h >= 0 && room_w >= 0, "shape: its window is larger than its image");
  l.out_h = room_h / s.stride_h + 1;
  l.out_w = room_w / s.stride_w + 1;
  const int64_t sizes[] = {product({l.batch, s.in_channels, s.in_h, s.in_w}), product({l.batch, s.out_channels, l.out_h, l.out_w}),
                           product({s.out_channels, s.in_channels / s.groups, s.kernel_h, s.kernel_w})};
  for (const int64_t size : sizes) expect(size <= kMostFloats, "shape: expected inputs, outputs and weights of at most 2^27 floats");
}

BundleLayer read_layer(Reader& in) {
  BundleLayer l;
  const std::vector<char> name = in.array<char>(in.one<uint32_t>("name"), "name");
  l.name.assign(name.begin(), name.end());
  const uint32_t flags = in.one<uint32_t>("flags");
  expect(flags < 8, "flags: expected the lowest three bits only");
  l.product = flags & 1;
  l.residual = flags & 2;
  l.dense = flags & 4;
  const int32_t format = in.one<int32_t>("format");
  expect(format >= TK_CSR && format <= TK_BSR_1X4, "format: expected 0, 1 or 2");
  l.format = static_cast<tk_format>(format);
  l.activation = in.one<int32_t>("activation");
  expect(l.activation >= TK_IDENTITY && l.activation <= TK_SILU, "activation: expected 0 to 3");
  l.min = in.one<float>("min");
  l.max = in.one<float>("max");
  l.slope = in.one<float>("slope");
  expect(l.min <= l.max && std::isfinite(l.slope), "min, max, slope: expected min <= max and a finite slope");
  l.lanes = in.one<int32_t>("tuning");
  l.tuning = in.one<tk_tuning>("tuning");
  expect(l.lanes >= 0 && l.tuning.tile_vectors >= 0 && l.tuning.block_channels >= 0 && l.tuning.group_tiles >= 0,
         "tuning: expected no negative numbers");
  l.batch = in.one<int64_t>("batch");
  l.shape = in.one<tk_conv2d>("shape");
  check_shape(l);
  const int64_t nnz = in.one<int64_t>("nnz");
  l.bias = in.array<float>(l.rows(), "bias");
  for (const float b : l.bias) expect(std::isfinite(b), "bias: expected finite numbers");
  l.row_ptr = in.array<int64_t>(l.rows() + 1, "row_ptr");
  l.col_indices = in.array<int32_t>(nnz, "col_indices");
  l.values = in.array<float>(nnz, "values");
  const tk_csr csr = l.csr();
  const tk_status status = tk_csr_validate(&csr);
  if (status != TK_OK) throw std::runtime_error(std::string("weight: ") + tk_status_text(status));
  return l;
}

}  // namespace

std::vector<BundleLayer> read_bundle(const uint8_t* bytes, size_t size) {
  constexpr size_t kAround = 8 + 4 + 4 + 4;
  if (size < kAround || std::memcmp(bytes, kMagic, 8) != 0)
    throw std::runtime_error("not a bundle of ticketkit, or cut off within its head");
  uint32_t version = 0, seal = 0;
  std::memcpy(&version, bytes + 8, 4);
  if (version != kVersion)
    throw std::runtime_error("version: expected " + std::to_string(kVersion) + ", got " + std::to_string(version) +
                             "; write the bundle and build this program from the same ticketkit");
  std::memcpy(&seal, bytes + size - 4, 4);
  if (seal != crc32(bytes, size - 4)) throw std::runtime_error("its checksum differs: the file is damaged or cut off, copy it again");
  Reader in(bytes + 12, size - 16);
  const uint32_t count = in.one<uint32_t>("count");
  std::vector<BundleLayer> layers;
  for (uint32_t i = 0; i < count; ++i) {
    try {
      layers.push_back(read_layer(in));
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("layer " + std::to_string(i) + ": " + error.what());
    }
  }
  if (in.left()) throw std::runtime_error("expected nothing after its last layer, got " + std::to_string(in.left()) + " bytes");
  if (layers.empty()) throw std::runtime_error("expected at least one layer, got none");
  return layers;
}

std::vector<BundleLayer> read_bundle(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  struct stat about {};
  if (!file || fstat(fileno(file.get()), &about)) throw std::runtime_error(path + ": " + std::strerror(errno));
  if (!S_ISREG(about.st_mode) || about.st_size > kMostBytes) throw std::runtime_error(path + ": expected a file of at most 2 GiB");
  std::vector<uint8_t> bytes(static_cast<size_t>(about.st_size));
  if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) throw std::runtime_error(path + ": cannot be read whole");
  try {
    return read_bundle(bytes.data(), bytes.size());
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}

uint32_t crc32(const uint8_t* bytes, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
      made[i] = c;
    }
    return made;
  }();
  uint32_t c = 0xffffffffu;
  for (size_t i = 0; i < size; ++i) c = table[(c ^ bytes[i]) & 0xff] ^ c >> 8;
  return c ^ 0xffffffffu;
}

}  // namespace tk::device
