// Causal attention on a CPU, forward and backward. Compiled behind product.h.
//
//   P = softmax(Q·Kᵀ/√K, causal)   O = P·V   lse = the logarithm of the softmax's denominator
//   dV = Pᵀ·dO   dS = P∘(dO·Vᵀ − rowsum(dO∘O))/√K   dQ = dS·K   dK = dSᵀ·Q
//
// A task is a key-value head of a row of the batch, with the query heads that share it: keys and
// values are packed once, and nothing is reduced over threads. Queries and keys are taken SIDE at a
// time. Backward keeps scores as (keys, queries), so that they are an operand of the gradients of
// keys and values as they lie.

static const long SIDE = 64;

// Of blocks; legend as in blocks.py, M = B·T, Q = (H + 2G)·K, E = F or, with SwiGLU, 2F
struct Shape {
  long m, t, dim, heads, kv, head_dim, hidden, centred, mlp, threads, trains;
  float eps;
  long q() const { return heads * head_dim; }
  long qkv() const { return (heads + 2 * kv) * head_dim; }
  long halves() const { return mlp == 2 ? 2 : 1; }  // of what goes up: of SwiGLU the factors too
  long up() const { return halves() * hidden; }
  long blocks() const { return (t + SIDE - 1) / SIDE; }
  long count(long block) const { return std::min(SIDE, t - block * SIDE); }
  // Of rows (M, n) the numbers of a token and a head
  template <class Element>
  Element* at(Element* x, long n, long b, long token, long head) const {
    return x + (b * t + token) * n + head * head_dim;
  }
  // Weights of norm, mlp_norm, last_norm, q_norm, k_norm and mix, whose gradients are sums of tasks
  long vectors() const { return 3 * dim + 2 * head_dim + 2; }
  // Rows of a task: more where packed weights leave the second cache, to be read again less often
  long most() const {
    const bool large = (qkv() + q() + up() + hidden) * dim * sizeof(T) > 2 << 20;
    return large ? std::clamp(round_up(m / 16, 64), 64L, 128L) : 64;
  }
  long chunks() const { return (m + most() - 1) / most(); }
  long rows(long chunk) const { return std::min(most(), m - chunk * most()); }
  long even() const { return round_up(m, WHOLE); }
  // Of a row of a turned operand: rows whose distance is a power of two share few sets of the cache
  long turned() const { return round_up(m, 32) + 32; }
};

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
static void attend(const Shape* s, const T* heads, T* y, float* lse) {
  const long k = s->head_dim, side = SIDE * k, n = s->qkv(), t_end = s->blocks() * SIDE;
  const long n_group = s->heads / s->kv;
  const float scale = 1 / std::sqrt((float)k);
  share(s->m / s->t * s->kv, s->threads, [&](long task) {
    const long b = task / s->kv, g = task % s->kv, key = s->heads + g, value = key + s->kv;
    T *keys = SCRATCH(T)(t_end * k), *values = SCRATCH(T)(t_end * k);
    T* p = SCRATCH(T)(SIDE * t_end);
    float *scores = SCRATCH(float)(SIDE * t_end), *out = SCRATCH(float)(side);
    for (long head : {key, value}) fetch(s->at(heads, n, b, 0, head), s->t, k, n);
    fetch(s->at(heads, n, b, 0, g * n_group), s->t, k * n_group, n);
    for (long j = 0; j < s->blocks(); j++) {  // zeros behind the last
      pack_turned(s->at(heads, n, b, j * SIDE, key), n, s->count(j), k, keys + j * side, SIDE);
      pack_rows(s->at(heads, n, b, j * SIDE, value), n, s->count(j), SIDE, k, values + j * side);
    }
    for (long h = g * n_group; h < (g + 1) * n_group; h++)
      for (long block = 0; block < s->blocks(); block++) {
        const long first = block * SIDE, rows = s->count(block), end = first + SIDE;
        const T* queries = s->at(heads, n, b, first, h);
        for (long j = 0; j <= block; j++)
          multiply(rows, SIDE, k, queries, n, keys + j * side, SIDE, scores + j * SIDE, t_end);
        float sums[SIDE], peak;
        for (long i = 0; i < rows; i++) {
          sums[i] = soften(scores + i * t_end, first + i + 1, end, scale, p + i * t_end, peak);
          lse[(b * s->heads + h) * s->t + first + i] = peak * scale + std::log(sums[i]);
        }
        multiply(rows, k, end, p, t_end, values, k, out, k);
        for (long i = 0; i < rows; i++) {
          T* to = s->at(y, s->q(), b, first + i, h);
          const float factor = 1 / sums[i];
          for (long c = 0; c < k; c += LANES) set(to + c, get(out + i * k + c) * factor);
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
static void attend_back(const Shape* s, const T* heads, const T* y, In lse, const T* dy,
                        T* dheads) {
  const long k = s->head_dim, side = SIDE * k, n = s->qkv(), q = s->q(), n_group = s->heads / s->kv;
  const float scale = 1 / std::sqrt((float)k);
  share(s->m / s->t * s->kv, s->threads, [&](long task) {
    const long b = task / s->kv, g = task % s->kv, key = s->heads + g, value = key + s->kv;
    T *packed_keys = SCRATCH(T)(s->blocks() * side), *qt = SCRATCH(T)(4 * side);
    T *dyt = qt + side, *q_packed = dyt + side, *dy_packed = q_packed + side;
    float* dkeys = SCRATCH(float)((2 * s->blocks() + 1) * side);
    float *dvalues = dkeys + s->blocks() * side, *dqueries = dvalues + s->blocks() * side;
    alignas(64) T p[SIDE * SIDE], d[SIDE * SIDE], d_turned[SIDE * SIDE];
    alignas(64) float x[SIDE * SIDE], dp[SIDE * SIDE], delta[SIDE], lse1[SIDE];
    for (long head : {key, value}) fetch(s->at(heads, n, b, 0, head), s->t, k, n);
    fetch(s->at(heads, n, b, 0, g * n_group), s->t, k * n_group, n);
    for (const T* x : {y, dy}) fetch(s->at(x, q, b, 0, g * n_group), s->t, k * n_group, q);
    for (long j = 0; j < s->blocks(); j++)
      pack_rows(s->at(heads, n, b, j * SIDE, key), n, s->count(j), SIDE, k, packed_keys + j * side);
    std::fill_n(dkeys, 2 * s->blocks() * side, 0.f);
    for (long h = g * n_group; h < (g + 1) * n_group; h++)
      for (long block = 0; block < s->blocks(); block++) {
        const long first = block * SIDE, rows = s->count(block);
        const T *queries = s->at(heads, n, b, first, h), *dys = s->at(dy, q, b, first, h);
        pack_turned(queries, n, rows, k, qt, SIDE);
        pack_turned(dys, q, rows, k, dyt, SIDE);
        pack_rows(queries, n, rows, SIDE, k, q_packed);
        pack_rows(dys, q, rows, SIDE, k, dy_packed);
        std::fill_n(delta, SIDE, 0.f);
        std::fill_n(lse1, SIDE, INFINITY);  // queries that are not there weigh nothing
        for (long i = 0; i < rows; i++) {
          const T *to = dys + i * q, *of = s->at(y, q, b, first + i, h);
          Lanes dot = {};
          for (long c = 0; c < k; c += LANES) dot += get(to + c) * get(of + c);
          delta[i] = sum(dot);
          lse1[i] = lse[(b * s->heads + h) * s->t + first + i];
        }
        for (long j = 0; j <= block; j++) {
          const long n_keys = s->count(j);
          multiply(n_keys, SIDE, k, s->at(heads, n, b, j * SIDE, key), n, qt, SIDE, x, SIDE);
          multiply(n_keys, SIDE, k, s->at(heads, n, b, j * SIDE, value), n, dyt, SIDE, dp, SIDE);
          for (long i = 0; i < n_keys; i++)
            differentiate(x + i * SIDE, dp + i * SIDE, lse1, delta, j < block ? 0 : i, scale,
                          p + i * SIDE, d + i * SIDE);
          std::fill(d + n_keys * SIDE, d + SIDE * SIDE, T{});
          turn(d, SIDE, SIDE, SIDE, d_turned, SIDE);
          multiply(rows, k, SIDE, d_turned, SIDE, packed_keys + j * side, k, dqueries, k,
                   j ? dqueries : nullptr);
          float *dk = dkeys + j * side, *dv = dvalues + j * side;
          multiply(n_keys, k, SIDE, d, SIDE, q_packed, k, dk, k, dk);
          multiply(n_keys, k, SIDE, p, SIDE, dy_packed, k, dv, k, dv);
        }
        for (long i = 0; i < rows; i++)
          convert(dqueries + i * k, k, s->at(dheads, n, b, first + i, h));
      }
    for (long i = 0; i < s->t; i++) {
      convert(dkeys + i * k, k, s->at(dheads, n, b, i, key));
      convert(dvalues + i * k, k, s->at(dheads, n, b, i, value));
    }
  });
}
