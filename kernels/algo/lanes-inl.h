// Multiply-adds by a lane of a register of weights, for ISAs that have them: what the inner loops of CSR and BSR unroll. Included by isa/*.cc
// after rows-inl.h.

// A fused multiply-add takes about 4 cycles and two start per cycle, so narrow tiles run several non-zeros at once.
constexpr int chains(int vectors) { return vectors >= 6 ? 1 : vectors >= 3 ? 2 : 4; }

// acc[r] += N entries, weights of kRows rows each, times their vectors of x; of one row entry e goes to acc[e % chains]. Vectors are loaded in
// pairs, some pairs before they are used: a processor that runs instructions in order then waits for none of them.
template <int kRows, int V, int N, class T, class Step>
static inline void add_lanes(const float* values, const uint16_t* offsets, const float* x, Step step, T (*acc)[V]) {
  constexpr int kChains = smaller(chains(V), N), kSums = kRows > 1 ? kRows : kChains, kPairs = (V + 1) / 2;
  constexpr int kRegisters = kRows > 1 ? N : 1;  // of weights
  constexpr int kAhead = static_cast<int>(clamp((T::kRegisters - 1 - kRegisters - kSums * V) / 2, 1, 4));
  T w[kRegisters];
  TK_UNROLL for (int i = 0; i < kRegisters; ++i) w[i] = T::template load_weights<(kRows > 1 ? kRows : N)>(values + kRows * i);
  const float* from[N];
  TK_UNROLL for (int e = 0; e < N; ++e) from[e] = T::in_register(step.of(x, offsets[e]));
  T pairs[kAhead][2];
  TK_UNROLL for (int i = 0; i < N * kPairs + kAhead; ++i) {
    if (i >= kAhead) {
      const int e = (i - kAhead) / kPairs, v = (i - kAhead) % kPairs * 2;
      TK_UNROLL for (int r = 0; r < kRows; ++r) {
        T* const sums = acc[kRows > 1 ? r : e % kChains];
        TK_UNROLL for (int j = 0; j < 2; ++j) {
          if (v + j < V) sums[v + j] = T::fma_lane(w[kRows > 1 ? e : 0], kRows > 1 ? r : e, pairs[i % kAhead][j], sums[v + j]);
        }
      }
    }
    if (i < N * kPairs) {
      const int v = i % kPairs * 2;
      TK_UNROLL for (int j = 0; j < 2; ++j) {
        if (v + j < V) pairs[i % kAhead][j] = T::load(from[i / kPairs] + (v + j) * T::kLanes);
      }
    }
  }
}
