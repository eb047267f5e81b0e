// Sums of sums, each in a fixed order: over the slices of a batch, and from chunk to chunk (see Sums in backward.h).

template <typename T, typename Partial>
static void reduce(const Reduce<T, Partial>& p, int64_t begin, int64_t end) {
  // Runs so short that their sums stay in the first-level cache, over all slices, four at a time.
  constexpr int64_t kRun = 512;
  double sum[kRun];
  for (int64_t i0 = begin; i0 < end; i0 += kRun) {
    const int64_t n = min_i64(kRun, end - i0);
    const Partial* slice = p.partial + i0;
    for (int64_t i = 0; i < n; ++i) sum[i] = 0;
    for (int64_t left = p.slices; left > 0;) {
      if (left >= 4) {
        const Partial *second = slice + p.stride, *third = second + p.stride, *fourth = third + p.stride;
        for (int64_t i = 0; i < n; ++i) sum[i] += double((slice[i] + second[i]) + (third[i] + fourth[i]));
        slice = fourth + p.stride;
        left -= 4;
      } else {
        for (int64_t i = 0; i < n; ++i) sum[i] += double(slice[i]);
        slice += p.stride;
        left -= 1;
      }
    }
    for (int64_t i = 0; i < n; ++i) p.out[i0 + i] = narrow<T>(accumulator_t<T>(sum[i]));
  }
}

template <typename A>
static void add_up(const AddUp<A>& p, int64_t begin, int64_t end) {
  if (p.last) {
    for (int64_t i = begin; i < end; ++i) p.sum[i] = A(p.total[i] + double(p.sum[i]));
  } else if (p.first) {
    for (int64_t i = begin; i < end; ++i) p.total[i] = double(p.sum[i]);
  } else {
    for (int64_t i = begin; i < end; ++i) p.total[i] += double(p.sum[i]);
  }
}

template <typename T>
static void narrow_numbers(const accumulator_t<T>* in, T* out, int64_t n) {
  narrow_run<T>(in, out, n);
}
