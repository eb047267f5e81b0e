// One step of SGD or Adam on a run of numbers: the operations of torch's optimizers in their order, each rounded as
// torch rounds it, in one pass over memory instead of one for each operation. (torch/optim/sgd.py and adam.py,
// `_single_tensor_sgd` and `_single_tensor_adam`. A few results differ: torch's square root of floats may be MKL's,
// which is not always the nearest number.)
//
// Half types are widened to float, and each stored tensor is rounded once, where torch rounds after every operation.

// A number in every lane of V, a vector or a number itself.
template <typename V, typename A>
MBP_INLINE V all_lanes(A x) {
  return x - V{};  // of -0 too, which 0 + x would lose
}

// The gradient g of the parameter p as a step sees it.
template <typename V, typename A>
MBP_INLINE V prepared(V g, V p, const UpdateScalars<A>& s) {
  if (s.scales) g = rounded<V>(g * s.gradient_scale);
  if (s.maximize) g = -g;
  return s.decays ? multiply_add(p, all_lanes<V>(s.weight_decay), g) : g;
}

//   b <- momentum b + (1 - dampening) g, or g in the first step    g <- g + momentum b (Nesterov), or b    p <- p - lr g
template <bool with_momentum, typename V, typename A>
MBP_INLINE void sgd_step(V& p, V g, V& b, bool fresh, const UpdateScalars<A>& s) {
  g = prepared(g, p, s);
  if (with_momentum) {
    b = fresh ? g : multiply_add(g, all_lanes<V>(s.gain), rounded<V>(b * s.momentum));
    g = s.nesterov ? multiply_add(b, all_lanes<V>(s.momentum), g) : b;
  }
  p = multiply_add(g, all_lanes<V>(-s.step_size), p);
}

// As torch.lerp does, from the nearer end.
template <typename V, typename A>
MBP_INLINE V interpolated(V from, V to, A weight) {
  const bool near = weight < A(0.5) && weight > A(-0.5);
  return multiply_add(all_lanes<V>(near ? weight : weight - A(1)), to - from, near ? from : to);
}

//   m <- m + (1 - beta1) (g - m)    v <- beta2 v + (1 - beta2) g^2    l <- max(l, v), or v itself
//   p <- p - lr / (1 - beta1^t) m / (sqrt(l) / sqrt(1 - beta2^t) + eps)
template <bool amsgrad, typename V, typename A>
MBP_INLINE void adam_step(V& p, V g, V& m, V& v, V& l, const UpdateScalars<A>& s) {
  g = prepared(g, p, s);
  if (s.shrinks) p = rounded<V>(p * s.shrink);
  m = interpolated(m, g, s.weight1);
  v = multiply_add(rounded<V>(g * s.weight2), g, rounded<V>(v * s.beta2));
  if (amsgrad) l = ((l < v) | (v != v)) ? v : l;  // NaN stays
  const V denominator = square_root(amsgrad ? l : v) / s.correction2 + s.eps;
  p += m * -s.step_size / denominator;
}

template <typename A>
MBP_INLINE A load_as(const A* p, A) {
  return *p;
}
template <typename A>
MBP_INLINE vec<A> load_as(const A* p, vec<A>) {
  return load<A>(p);
}
template <typename A>
MBP_INLINE void store_as(A* p, A x) {
  *p = x;
}
template <typename A>
MBP_INLINE void store_as(A* p, vec<A> x) {
  store<A>(p, x);
}

// Runs f(j, V{}) over n numbers: whole vectors, then single numbers.
template <typename A, typename F>
MBP_INLINE void for_lanes(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) f(j, vec<A>{});
  for (; j < n; ++j) f(j, A{});
}

template <typename A>
MBP_INLINE void update_run(A* p, const A* g, A* first, A* second, A* largest, bool fresh, int64_t n,
                           const UpdateScalars<A> s) {  // a copy, which no store to p can change
  if (!second && !first) {
    for_lanes<A>(n, [&](int64_t j, auto zero) __attribute__((always_inline)) {
      auto x = load_as<A>(p + j, zero), none = zero;
      sgd_step<false>(x, load_as<A>(g + j, zero), none, false, s);
      store_as<A>(p + j, x);
    });
  } else if (!second) {
    for_lanes<A>(n, [&](int64_t j, auto zero) __attribute__((always_inline)) {
      auto x = load_as<A>(p + j, zero), b = fresh ? zero : load_as<A>(first + j, zero);
      sgd_step<true>(x, load_as<A>(g + j, zero), b, fresh, s);
      store_as<A>(p + j, x), store_as<A>(first + j, b);
    });
  } else if (!largest) {
    for_lanes<A>(n, [&](int64_t j, auto zero) __attribute__((always_inline)) {
      auto x = load_as<A>(p + j, zero), m = load_as<A>(first + j, zero), v = load_as<A>(second + j, zero), none = zero;
      adam_step<false>(x, load_as<A>(g + j, zero), m, v, none, s);
      store_as<A>(p + j, x), store_as<A>(first + j, m), store_as<A>(second + j, v);
    });
  } else {
    for_lanes<A>(n, [&](int64_t j, auto zero) __attribute__((always_inline)) {
      auto x = load_as<A>(p + j, zero), m = load_as<A>(first + j, zero), v = load_as<A>(second + j, zero),
           l = load_as<A>(largest + j, zero);
      adam_step<true>(x, load_as<A>(g + j, zero), m, v, l, s);
      store_as<A>(p + j, x), store_as<A>(first + j, m), store_as<A>(second + j, v), store_as<A>(largest + j, l);
    });
  }
}

MBP_INLINE const UpdateScalars<double>& scalars_of(const AllUpdateScalars& all, double) { return all.f64; }
MBP_INLINE const UpdateScalars<float>& scalars_of(const AllUpdateScalars& all, float) { return all.f32; }

template <typename T>
static void update(const Update& u, const AllUpdateScalars& all, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  const auto at = [](void* data, int64_t i)
                      __attribute__((always_inline)) { return data ? static_cast<T*>(data) + i : nullptr; };
  if constexpr (sizeof(T) == sizeof(A)) {
    update_run<A>(at(u.parameter, begin), static_cast<const T*>(u.gradient) + begin, at(u.first, begin),
                  at(u.second, begin), at(u.largest, begin), u.fresh, end - begin, scalars_of(all, A{}));
  } else {
    constexpr int64_t kBlock = 256;
    A p[kBlock], g[kBlock], first[kBlock], second[kBlock], largest[kBlock];
    UpdateScalars<A> s = scalars_of(all, A{});
    const bool scales = s.scales;
    s.scales = false;  // below, as T
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = min_i64(kBlock, end - i);
      widen_run(at(u.parameter, i), p, n);
      widen_run(static_cast<const T*>(u.gradient) + i, g, n);
      for (int64_t j = 0; scales && j < n; ++j) g[j] = widen(narrow<T>(g[j] * s.gradient_scale));
      if (u.first && !u.fresh) widen_run(at(u.first, i), first, n);
      if (u.second) widen_run(at(u.second, i), second, n);
      if (u.largest) widen_run(at(u.largest, i), largest, n);
      update_run<A>(p, g, u.first ? first : nullptr, u.second ? second : nullptr, u.largest ? largest : nullptr,
                    u.fresh, n, s);
      narrow_run(p, at(u.parameter, i), n);
      if (u.first) narrow_run(first, at(u.first, i), n);
      if (u.second) narrow_run(second, at(u.second, i), n);
      if (u.largest) narrow_run(largest, at(u.largest, i), n);
    }
  }
}
