// Dropout by a mask that torch has drawn, on activations that are still in the cache.

// Element by element: how the work is divided changes nothing.
template <typename T>
static void dropout(const Dropout<T>& p, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  T* __restrict__ const h = p.h;
  const uint8_t* __restrict__ const kept = p.kept;
  const A scale = p.scale;
  int64_t i = begin;
  if constexpr (kConverted<T> > 0) {
    constexpr int L = kConverted<T>;
    for (; i + L <= end; i += L) {
      A part[L];
      convert(h + i, part);
      for (int l = 0; l < L; ++l) part[l] *= kept[i + l] ? scale : A(0);
      convert(part, h + i);
    }
  }
  for (; i < end; ++i) h[i] = narrow<T>(widen(h[i]) * (kept[i] ? scale : A(0)));
}
