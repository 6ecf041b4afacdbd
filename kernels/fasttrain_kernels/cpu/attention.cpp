// Causal attention on a CPU, forward and backward. Compiled behind product.h.
//
//   P = softmax(Q·Kᵀ/√K, causal)   O = P·V   lse = the logarithm of the softmax's denominator
//   dV = Pᵀ·dO   dS = P∘(dO·Vᵀ − rowsum(dO∘O))/√K   dQ = dS·K   dK = dSᵀ·Q
//
// A task is a key-value head of a row of the batch, with the query heads that share it: keys and
// values are packed once, and nothing is reduced over threads. Queries and keys are taken SIDE at a
// time. Backward keeps scores as (keys, queries), so that they are an operand of the gradients of
// keys and values as they lie.

namespace attention {

static const long SIDE = 64;

struct Shape {
  long n_batch, t, n_heads, n_kv, dim, n_threads;
  long q() const { return n_heads * dim; }
  long qkv() const { return (n_heads + 2 * n_kv) * dim; }
  // Of rows (M, n) the numbers of a token and a head
  template <class Element>
  Element* at(Element* x, long n, long b, long token, long head) const {
    return x + (b * t + token) * n + head * dim;
  }
  long blocks() const { return (t + SIDE - 1) / SIDE; }
  long count(long block) const { return std::min(SIDE, t - block * SIDE); }
};

// Blocks of keys or values, each (SIDE, K) packed as it is, or TURNED, with zeros behind the last
template <bool TURNED>
static void pack_blocks(const Shape& s, const T* x, long row, T* packed) {
  for (long j = 0; j < s.blocks(); j++, packed += SIDE * s.dim)
    if (TURNED)
      pack_turned(x + j * SIDE * row, row, s.count(j), s.dim, packed, SIDE);
    else
      pack_rows(x + j * SIDE * row, row, s.count(j), SIDE, s.dim, packed);
}

// p = exp(scale · (x - max)) of n scores, and zeros up to the end; returns sum and maximum. Loops
// run over whole vectors: of scores that end, or begin, within one, the rest is hidden.
static float soften(float* x, long n, long end, float scale, T* p, float& most) {
  const long whole = round_up(n, LANES);
  std::fill(x + n, x + whole, -INFINITY);
  Lanes peaks = get(x), sums = {};
  for (long i = LANES; i < whole; i += LANES) peaks = larger(get(x + i), peaks);
  most = largest(peaks);
  for (long i = 0; i < whole; i += LANES) {
    const Lanes e = exponential(get(x + i) * scale - most * scale);
    sums += e;
    set(p + i, e);
  }
  std::fill(p + whole, p + end, T{});
  return sum(sums);
}

// y (M, Q) and lse of queries, keys and values side by side in heads (M, (H + 2G)·K)
static void forward(const Shape& s, const T* heads, T* y, float* lse) {
  const float scale = 1 / std::sqrt((float)s.dim);
  const long n_group = s.n_heads / s.n_kv, t_end = s.blocks() * SIDE, n = s.qkv();
  share(s.n_batch * s.n_kv, s.n_threads, nullptr, [&](long task) {
    const long b = task / s.n_kv, g = task % s.n_kv;
    T *keys = SCRATCH(T)(t_end * s.dim), *values = SCRATCH(T)(t_end * s.dim);
    T* p = SCRATCH(T)(SIDE * t_end);
    float *scores = SCRATCH(float)(SIDE * t_end), *out = SCRATCH(float)(SIDE * s.dim);
    for (long head : {s.n_heads + g, s.n_heads + s.n_kv + g})
      fetch(s.at(heads, n, b, 0, head), s.t, s.dim, n);
    fetch(s.at(heads, n, b, 0, g * n_group), s.t, s.dim * n_group, n);
    pack_blocks<true>(s, s.at(heads, n, b, 0, s.n_heads + g), n, keys);
    pack_blocks<false>(s, s.at(heads, n, b, 0, s.n_heads + s.n_kv + g), n, values);
    for (long h = g * n_group; h < (g + 1) * n_group; h++)
      for (long block = 0; block < s.blocks(); block++) {
        const long first = block * SIDE, rows = s.count(block), end = first + SIDE;
        const T* queries = s.at(heads, n, b, first, h);
        for (long j = 0; j <= block; j++)
          multiply(rows, SIDE, s.dim, queries, n, keys + j * SIDE * s.dim, SIDE, scores + j * SIDE,
                   t_end, nullptr);
        float sums[SIDE], peak;
        for (long i = 0; i < rows; i++) {
          sums[i] = soften(scores + i * t_end, first + i + 1, end, scale, p + i * t_end, peak);
          lse[(b * s.n_heads + h) * s.t + first + i] = peak * scale + std::log(sums[i]);
        }
        multiply(rows, s.dim, end, p, t_end, values, s.dim, out, s.dim, nullptr);
        for (long i = 0; i < rows; i++) {
          T* to = s.at(y, s.q(), b, first + i, h);
          const float factor = 1 / sums[i];
          for (long c = 0; c < s.dim; c += LANES) set(to + c, get(out + i * s.dim + c) * factor);
        }
      }
  });
}

// Of the scores of a key, those of the queries from the first on that see it, and zeros before:
// p = exp(scale·x - lse), d = p·(dp - delta)·scale
static void differentiate(In x, In dp, In lse, In delta, long first, float scale, T* p, T* d) {
  for (long i = first / LANES * LANES; i < SIDE; i += LANES) {
    const Lanes e = exponential(get(x + i) * scale - get(lse + i));
    set(p + i, e);
    set(d + i, e * (get(dp + i) - get(delta + i)) * scale);
  }
  std::fill(p, p + first, T{});
  std::fill(d, d + first, T{});
}

// dheads of dy (M, Q)
static void backward(const Shape& s, const T* heads, const T* y, In lse, const T* dy, T* dheads) {
  const float scale = 1 / std::sqrt((float)s.dim);
  const long n_group = s.n_heads / s.n_kv, side = SIDE * s.dim, n = s.qkv(), q = s.q();
  share(s.n_batch * s.n_kv, s.n_threads, nullptr, [&](long task) {
    const long b = task / s.n_kv, g = task % s.n_kv, key = s.n_heads + g, value = key + s.n_kv;
    T *packed_keys = SCRATCH(T)(s.blocks() * side), *qt = SCRATCH(T)(4 * side + 3 * SIDE * SIDE);
    T *dyt = qt + side, *q_packed = dyt + side, *dy_packed = q_packed + side, *p = dy_packed + side;
    T *d = p + SIDE * SIDE, *d_turned = d + SIDE * SIDE;
    float *dkeys = SCRATCH(float)((2 * s.blocks() + 1) * side),
          *x = SCRATCH(float)(2 * SIDE * SIDE);
    float *dvalues = dkeys + s.blocks() * side, *dqueries = dvalues + s.blocks() * side;
    float *dp = x + SIDE * SIDE, delta[SIDE], lse1[SIDE];
    for (long head : {key, value}) fetch(s.at(heads, n, b, 0, head), s.t, s.dim, n);
    fetch(s.at(heads, n, b, 0, g * n_group), s.t, s.dim * n_group, n);
    for (const T* x : {y, dy}) fetch(s.at(x, q, b, 0, g * n_group), s.t, s.dim * n_group, q);
    pack_blocks<false>(s, s.at(heads, n, b, 0, key), n, packed_keys);
    std::fill_n(dkeys, 2 * s.blocks() * side, 0.f);
    for (long h = g * n_group; h < (g + 1) * n_group; h++)
      for (long block = 0; block < s.blocks(); block++) {
        const long first = block * SIDE, rows = s.count(block);
        const T *queries = s.at(heads, n, b, first, h), *dys = s.at(dy, q, b, first, h);
        pack_turned(queries, n, rows, s.dim, qt, SIDE);
        pack_turned(dys, q, rows, s.dim, dyt, SIDE);
        pack_rows(queries, n, rows, SIDE, s.dim, q_packed);
        pack_rows(dys, q, rows, SIDE, s.dim, dy_packed);
        std::fill_n(delta, SIDE, 0.f);
        std::fill_n(lse1, SIDE, INFINITY);  // queries that are not there weigh nothing
        for (long i = 0; i < rows; i++) {
          const T *to = dys + i * q, *of = s.at(y, q, b, first + i, h);
          Lanes dot = {};
          for (long c = 0; c < s.dim; c += LANES) dot += get(to + c) * get(of + c);
          delta[i] = sum(dot);
          lse1[i] = lse[(b * s.n_heads + h) * s.t + first + i];
        }
        for (long j = 0; j <= block; j++) {
          const long n_keys = s.count(j);
          multiply(n_keys, SIDE, s.dim, s.at(heads, n, b, j * SIDE, key), n, qt, SIDE, x, SIDE,
                   nullptr);
          multiply(n_keys, SIDE, s.dim, s.at(heads, n, b, j * SIDE, value), n, dyt, SIDE, dp, SIDE,
                   nullptr);
          for (long i = 0; i < n_keys; i++)
            differentiate(x + i * SIDE, dp + i * SIDE, lse1, delta, j < block ? 0 : i, scale,
                          p + i * SIDE, d + i * SIDE);
          std::fill(d + n_keys * SIDE, d + SIDE * SIDE, T{});
          turn(d, SIDE, SIDE, SIDE, d_turned, SIDE);
          multiply(rows, s.dim, SIDE, d_turned, SIDE, packed_keys + j * side, s.dim, dqueries,
                   s.dim, j ? dqueries : nullptr);
          float *dk = dkeys + j * side, *dv = dvalues + j * side;
          multiply(n_keys, s.dim, SIDE, d, SIDE, q_packed, s.dim, dk, s.dim, dk);
          multiply(n_keys, s.dim, SIDE, p, SIDE, dy_packed, s.dim, dv, s.dim, dv);
        }
        for (long i = 0; i < rows; i++)
          convert(dqueries + i * s.dim, s.dim, s.at(dheads, n, b, first + i, h));
      }
    for (long i = 0; i < s.t; i++) {
      convert(dkeys + i * s.dim, s.dim, s.at(dheads, n, b, i, key));
      convert(dvalues + i * s.dim, s.dim, s.at(dheads, n, b, i, value));
    }
  });
}

}  // namespace attention
