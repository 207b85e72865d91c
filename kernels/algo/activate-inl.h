// What follows the clip: the activations that are no bounds. Included by isa/*.cc inside the ISA's namespace, after `Vec`.

// 1 + exp(-x) for x in [-88, 87], to 3 units in the last place: exp(-x) = 2^n exp(-r) with |r| <= log(2) / 2, where exp(-r) =
// 1 - r + r^2 q(r) and q is the polynomial of degree 3 with the least relative error there, 1e-7.
static inline Vec one_plus_exp_minus(const Vec& x) {
  constexpr float kQ[] = {0.499992013f, -0.166671336f, 0.0418944992f, -0.00831205118f};
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, which then are the low bits of the sum
  const Vec shifted = fma(x, Vec::set(-1.44269504f), Vec::set(kMagic)), n = shifted + Vec::set(-kMagic);
  const Vec most = fma(n, Vec::set(0.693359375f), x);  // log(2) in two parts, the first exact in 10 bits
  const Vec r = fma(n, Vec::set(-2.12194440e-4f), most), one = Vec::set(1.0f);
  const Vec low = fma(r, Vec::set(kQ[1]), Vec::set(kQ[0])), high = fma(r, Vec::set(kQ[3]), Vec::set(kQ[2])), square = r * r;
  const Vec power = fma(fma(square, high, low), square, fma(r, Vec::set(-1.0f), one));  // in few steps: it waits for each of them
  return fma(power, Vec::power_of_two(shifted), one);
}

static inline Vec leaky_relu(const Vec& z, const Vec& slope) {
  const Vec zero = Vec::set(0.0f), infinity = Vec::set(__builtin_inff());
  return fma(slope, clip(z, Vec::set(-__builtin_inff()), zero), clip(z, zero, infinity));
}

static inline Vec hard_swish(const Vec& z) {
  return z * clip(fma(z, Vec::set(1.0f / 6.0f), Vec::set(0.5f)), Vec::set(0.0f), Vec::set(1.0f));
}

static inline Vec silu(const Vec& z) {
  const Vec bounded = clip(z, Vec::set(-88.0f), Vec::set(__builtin_inff()));  // below, the result is less than 1e-36
  return bounded / one_plus_exp_minus(clip(bounded, Vec::set(-88.0f), Vec::set(87.0f)));
}

template <class F>
static inline void each(float* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) f(Vec::load(y + i)).store(y + i);
  if (const int32_t left = static_cast<int32_t>(n - i); left > 0) f(Vec::load_first(y + i, left)).store_first(y + i, left);
}

// Apart, to keep it out of the callers' loops.
__attribute__((noinline)) static void activate_each(int32_t activation, float slope, float* y, int64_t n) {
  switch (activation) {
    case TK_LEAKY_RELU:
      return each(y, n, [slope](const Vec& z) { return leaky_relu(z, Vec::set(slope)); });
    case TK_HARD_SWISH:
      return each(y, n, [](const Vec& z) { return hard_swish(z); });
    case TK_SILU:
      return each(y, n, [](const Vec& z) { return silu(z); });
  }
}

// y[0 … n) to its activation, in place: by those who have just written it, so that it is in L1.
static inline void activate(int32_t activation, float slope, float* y, int64_t n) {
  if (activation != TK_IDENTITY) activate_each(activation, slope, y, n);
}
