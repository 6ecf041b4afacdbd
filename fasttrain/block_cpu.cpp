// Blocks of the Transformer on a CPU, both ways. Built behind _cpu_product.h and the attention.
//
// A task is ROWS tokens, taken through norm, product and activation while they are in the cache.
// Gradients of weights are tasks of their own, each of a part that it alone writes; those of norms
// are left as one sum for each ROWS tokens. So results do not depend on the number of threads.
// Legend as in model.py; M = B·T, Q = (H + 2G)·K, E = F or, with SwiGLU, 2F.

static const int ROWS = 24;

struct Shape {
  long m, t, dim, heads, kv, head_dim, hidden, centred, mlp, threads;
  float eps;
  long q() const { return heads * head_dim; }
  long qkv() const { return (heads + 2 * kv) * head_dim; }
  long up() const { return mlp == 2 ? 2 * hidden : hidden; }
  long vectors() const { return 2 * dim + 2 * head_dim + 2; }  // norm, q_norm, k_norm, mix, mlp_norm
  long chunks() const { return (m + ROWS - 1) / ROWS; }
  int rows(long chunk) const { return std::min<long>(ROWS, m - chunk * ROWS); }
};

struct Inputs {  // null where the model has none: value and mix, q_norm and k_norm, cos and sin
  In x, value, norm, weight, q_norm, k_norm, out, mlp_norm, up, down, mix, cos, sin;
  bool keeps_raw() const { return q_norm || mix; }
};

struct Gradients {  // of Inputs, in their order; of all blocks x may be the same
  float *x, *value, *norm, *weight, *q_norm, *k_norm, *out, *mlp_norm, *up, *down, *mix;
};

// Parts of a buffer, one behind the other
struct Parts {
  float* next;
  float* take(long n) { return next += n, next - n; }
};

struct Saved {  // what forward leaves for backward
  float *heads, *raw, *attended, *lse, *stat, *middle, *mlp_stat, *hidden, *end;
  Saved(const Shape* s, const Inputs* p, float* start) {
    Parts parts{start};
    heads = parts.take(s->m * s->qkv());
    raw = parts.take(p->keeps_raw() ? s->m * s->qkv() : 0);  // before they are normalised or mixed
    attended = parts.take(s->m * s->q());
    lse = parts.take(s->m * s->heads);
    stat = parts.take(2 * s->m);
    middle = parts.take(s->m * s->dim);
    mlp_stat = parts.take(2 * s->m);
    hidden = parts.take(s->m * s->up());
    end = parts.next;
  }
};

// y = w·(x − μ)/σ, where μ is 0 unless centred; stat is μ and 1/σ
static void normalise(In x, int n, bool centred, float eps, In w, float* stat, float* y) {
  Lanes sum{}, squares{};
  if (centred)
    for (int i = 0; i < n; i += 8) sum += at(x + i);
  float mean = total(sum) / n;
  for (int i = 0; i < n; i += 8) squares += (at(x + i) - mean) * (at(x + i) - mean);
  float scale = 1 / std::sqrt(total(squares) / n + eps);
  for (int i = 0; i < n; i += 8) at(y + i) = (at(x + i) - mean) * scale * at(w + i);
  stat[0] = mean, stat[1] = scale;
}

// dx = given + the gradient of x; dw is added to. dx may be given or dy.
static void normalise_back(In dy, In x, In stat, In w, int n, bool centred, In given, float* dx,
                           float* dw) {
  const float mean = stat[0], scale = stat[1];
  Lanes sum{}, dot{};
  for (int i = 0; i < n; i += 8) {
    Lanes unit = (at(x + i) - mean) * scale, g = at(dy + i) * at(w + i);
    sum += g;
    dot += g * unit;
    at(dw + i) += at(dy + i) * unit;
  }
  const float shift = centred ? total(sum) / n : 0, slope = total(dot) / n;
  for (int i = 0; i < n; i += 8) {
    Lanes unit = (at(x + i) - mean) * scale;
    Lanes d = (at(dy + i) * at(w + i) - shift - unit * slope) * scale;
    at(dx + i) = given ? at(given + i) + d : d;
  }
}

static void normalised_again(In x, In stat, In w, int n, float* y) {
  for (int i = 0; i < n; i += 8) at(y + i) = (at(x + i) - stat[0]) * stat[1] * at(w + i);
}

// Rows of (M, n), from the first on, as those of the panels of a product that sums over M
static void to_panels(In x, int rows, int n, long first, long m, float* panels) {
  for (int j = 0; j < n; j += PANEL) pack(x, n, rows, 0, panels + j * m + first * PANEL), x += PANEL;
}

// x of one head turned by the angles of its position, or back; K is a multiple of 16
static void rotate(float* x, In cos, In sin, int dim, float sign) {
  for (int i = 0; i < dim / 2; i += 8) {
    Lanes low = at(x + i), high = at(x + dim / 2 + i), c = at(cos + i), s = at(sin + i) * sign;
    at(x + i) = low * c - high * s;
    at(x + dim / 2 + i) = high * c + low * s;
  }
}

static Lanes sigmoid(Lanes x) {
  Lanes s = 1 / (1 + exponential(-x));
  return x < -87 ? Lanes{} : s;
}

enum { GELU, RELU2, SWIGLU };

// a (F) of h (E); BACK: of da and h also dh, and a in place of da
template <int MLP, bool BACK>
static void activate(int n, In h, float* a, float* dh) {
  const float slope = 2 * std::sqrt(2 / (float)M_PI);
  for (int i = 0; i < n; i += 8) {
    Lanes x = at(h + i), d = BACK ? at(a + i) : Lanes{};
    if (MLP == RELU2) {
      Lanes r = x < 0 ? Lanes{} : x;
      at(a + i) = r * r;
      if (BACK) at(dh + i) = 2 * d * r;
    } else if (MLP == GELU) {
      Lanes square = x * x, s = sigmoid(x * (slope + slope * 0.044715f * square)), y = x * s;
      at(a + i) = y;
      if (BACK) at(dh + i) = d * (s + (y - y * s) * (slope + slope * 0.134145f * square));
    } else {
      Lanes up = at(h + n + i), s = sigmoid(x), y = x * s;
      at(a + i) = y * up;
      if (BACK) at(dh + i) = d * up * (s + y - y * s), at(dh + n + i) = d * y;
    }
  }
}

template <bool BACK>
static void activate(long mlp, int n, In h, float* a, float* dh = nullptr) {
  (mlp == GELU    ? activate<GELU, BACK>
   : mlp == RELU2 ? activate<RELU2, BACK>
                  : activate<SWIGLU, BACK>)(n, h, a, dh);
}

// What is to be the gradient (n_out, n_in) of a weight: dyᵀ·x of dy in strips and x in panels
struct WeightGradient {
  In strips, panels;
  long n_out, n_in;
  float* dw;
};

static const int COLUMNS = 256;  // with ROWS: the part of a gradient that is one task

// Called by all threads of a team
static void weight_gradients(std::initializer_list<WeightGradient> all, long m) {
  long n_tasks = 0;
  for (const WeightGradient& g : all)
    n_tasks += (g.n_out + ROWS - 1) / ROWS * ((g.n_in + COLUMNS - 1) / COLUMNS);
#pragma omp for schedule(dynamic)
  for (long task = 0; task < n_tasks; task++) {
    const WeightGradient* g = all.begin();
    long i = task;
    for (;; g++) {
      long n = (g->n_out + ROWS - 1) / ROWS * ((g->n_in + COLUMNS - 1) / COLUMNS);
      if (i < n) break;
      i -= n;
    }
    long n_parts = (g->n_in + COLUMNS - 1) / COLUMNS;
    long row = i / n_parts * ROWS, column = i % n_parts * COLUMNS;
    product_of_turned(std::min<long>(ROWS, g->n_out - row),
                      std::min<long>(COLUMNS, g->n_in - column), m, g->strips + row * m,
                      g->panels + column * m, g->dw + row * g->n_in + column, g->n_in);
  }
}

// heads (M, Q) of x (M, D): queries, keys and values as attention takes them
static void enter(const Shape* s, const Inputs* p, const Saved& made, Parts space) {
  const long d = s->dim, n = s->qkv(), k = s->head_dim, n_turned = s->heads + s->kv;
  const bool changes = p->q_norm || p->cos || p->mix;
  float* panels = space.take(n * d);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static)
    for (long j = 0; j < n / PANEL; j++) pack_turned(p->weight, d, d, j, panels);
#pragma omp for schedule(guided)
    for (long chunk = 0; chunk < s->chunks(); chunk++) {
      const int rows = s->rows(chunk);
      const long first = chunk * ROWS;
      float *normed = scratch(ROWS * (d + n)), *heads = made.heads + first * n;
      float* raw = p->keeps_raw() ? made.raw + first * n : changes ? normed + ROWS * d : heads;
      for (int r = 0; r < rows; r++)
        normalise(p->x + (first + r) * d, d, s->centred, s->eps, p->norm,
                  made.stat + 2 * (first + r), normed + r * d);
      product(rows, n, d, normed, d, panels, raw, n);
      for (int r = 0; changes && r < rows; r++) {
        const long row = first + r, at_angle = row % s->t * (k / 2);
        In from = raw + r * n;
        float *to = heads + r * n, stat[2];
        for (long h = 0; h < n_turned; h++, from += k, to += k) {
          if (p->q_norm)
            normalise(from, k, false, s->eps, h < s->heads ? p->q_norm : p->k_norm, stat, to);
          else
            std::copy_n(from, k, to);
          if (p->cos) rotate(to, p->cos + at_angle, p->sin + at_angle, k, 1);
        }
        const long start = row * s->kv * k;
        for (long i = 0; i < s->kv * k; i += 8)
          at(to + i) = p->mix ? p->mix[0] * at(from + i) + p->mix[1] * at(p->value + start + i)
                              : at(from + i);
      }
    }
  }
}

static void enter_back(const Shape* s, const Inputs* p, const Saved& made, const Gradients* o,
                       float* sums_of_chunks, In given, In dq, In dk, In dv, Parts space) {
  const long d = s->dim, n = s->qkv(), k = s->head_dim;
  float *panels = space.take(n * d), *normed = space.take(s->m * d);
  float* strips = space.take(s->m * n);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static)
    for (long j = 0; j < d / PANEL; j++) pack(p->weight, d, n, j, panels);
#pragma omp for schedule(guided)
    for (long chunk = 0; chunk < s->chunks(); chunk++) {
      const int rows = s->rows(chunk);
      const long first = chunk * ROWS;
      float *dnormed = scratch(ROWS * (d + n)), *dqkv = dnormed + ROWS * d;
      float* sums = sums_of_chunks + chunk * s->vectors();
      std::fill_n(sums, s->vectors() - d, 0.f);
      for (int r = 0; r < rows; r++) {
        const long row = first + r, at_angle = row % s->t * (k / 2), start = row * s->kv * k;
        float* to = dqkv + r * n;
        In raw = made.raw + row * n;
        std::copy_n(dq + row * s->q(), s->q(), to);
        std::copy_n(dk + start, s->kv * k, to + s->q());
        for (long h = 0; h < s->heads + s->kv; h++, to += k, raw += k) {
          if (p->cos) rotate(to, p->cos + at_angle, p->sin + at_angle, k, -1);
          if (!p->q_norm) continue;
          const bool query = h < s->heads;
          Lanes squares{};
          for (int i = 0; i < k; i += 8) squares += at(raw + i) * at(raw + i);
          float stat[2] = {0, 1 / std::sqrt(total(squares) / k + s->eps)};
          normalise_back(to, raw, stat, query ? p->q_norm : p->k_norm, k, false, nullptr, to,
                         sums + d + (query ? 0 : k));
        }
        Lanes own{}, other{};
        for (long i = 0; i < s->kv * k; i += 8) {
          Lanes g = at(dv + start + i);
          at(to + i) = p->mix ? p->mix[0] * g : g;
          if (!p->mix) continue;
          own += g * at(raw + i);
          other += g * at(p->value + start + i);
          at(o->value + start + i) = p->mix[1] * g;
        }
        sums[d + 2 * k] += total(own);
        sums[d + 2 * k + 1] += total(other);
      }
      to_strips(dqkv, rows, n, first, s->m, strips);
      product(rows, d, n, dqkv, n, panels, dnormed, d);
      for (int r = 0; r < rows; r++) {
        const long row = first + r;
        In x = p->x + row * d, stat = made.stat + 2 * row;
        normalise_back(dnormed + r * d, x, stat, p->norm, d, s->centred, given + row * d,
                       o->x + row * d, sums);
        normalised_again(x, stat, p->norm, d, dnormed + r * d);
      }
      to_panels(dnormed, rows, d, first, s->m, normed);
    }
    weight_gradients({{strips, normed, n, d, o->weight}}, s->m);
  }
}

// middle = x + attended·outᵀ, y = middle + activation(hidden)·downᵀ
static void leave(const Shape* s, const Inputs* p, const Saved& made, float* y, Parts space) {
  const long d = s->dim, q = s->q(), e = s->up(), f = s->hidden;
  float *out = space.take(q * d), *up = space.take(d * e), *down = space.take(f * d);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static) nowait
    for (long j = 0; j < d / PANEL; j++) pack_turned(p->out, q, q, j, out);
#pragma omp for schedule(static) nowait
    for (long j = 0; j < e / PANEL; j++) pack_turned(p->up, d, d, j, up);
#pragma omp for schedule(static)
    for (long j = 0; j < d / PANEL; j++) pack_turned(p->down, f, f, j, down);
#pragma omp for schedule(guided)
    for (long chunk = 0; chunk < s->chunks(); chunk++) {
      const int rows = s->rows(chunk);
      const long first = chunk * ROWS;
      float *normed = scratch(ROWS * (d + f)), *acts = normed + ROWS * d;
      float *middle = made.middle + first * d, *hidden = made.hidden + first * e;
      std::copy_n(p->x + first * d, rows * d, middle);
      product(rows, d, q, made.attended + first * q, q, out, middle, d, true);
      for (int r = 0; r < rows; r++)
        normalise(middle + r * d, d, s->centred, s->eps, p->mlp_norm,
                  made.mlp_stat + 2 * (first + r), normed + r * d);
      product(rows, e, d, normed, d, up, hidden, e);
      for (int r = 0; r < rows; r++) activate<false>(s->mlp, f, hidden + r * e, acts + r * f);
      std::copy_n(middle, rows * d, y + first * d);
      product(rows, d, f, acts, f, down, y + first * d, d, true);
    }
  }
}

static void leave_back(const Shape* s, const Inputs* p, const Saved& made, const Gradients* o,
                       In dy, float* sums_of_chunks, float* dmiddle, float* dattended, Parts space) {
  const long m = s->m, d = s->dim, q = s->q(), e = s->up(), f = s->hidden;
  float *out = space.take(q * d), *up = space.take(d * e), *down = space.take(f * d);
  float *acts_panels = space.take(m * f), *normed = space.take(m * d);
  float *attended = space.take(m * q), *y_strips = space.take(m * d);
  float *middle_strips = space.take(m * d), *hidden_strips = space.take(m * e);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static) nowait
    for (long j = 0; j < q / PANEL; j++) pack(p->out, q, d, j, out);
#pragma omp for schedule(static) nowait
    for (long j = 0; j < d / PANEL; j++) pack(p->up, d, e, j, up);
#pragma omp for schedule(static)
    for (long j = 0; j < f / PANEL; j++) pack(p->down, f, d, j, down);
#pragma omp for schedule(guided)
    for (long chunk = 0; chunk < s->chunks(); chunk++) {
      const int rows = s->rows(chunk);
      const long first = chunk * ROWS;
      float *acts = scratch(ROWS * (d + f + e)), *dnormed = acts + ROWS * f;  // acts: first dacts
      float *dhidden = dnormed + ROWS * d, *dmid = dmiddle + first * d;
      float* sums = sums_of_chunks + (chunk + 1) * s->vectors() - d;
      std::fill_n(sums, d, 0.f);
      to_strips(dy + first * d, rows, d, first, m, y_strips);
      product(rows, f, d, dy + first * d, d, down, acts, f);
      for (int r = 0; r < rows; r++)
        activate<true>(s->mlp, f, made.hidden + (first + r) * e, acts + r * f, dhidden + r * e);
      to_panels(acts, rows, f, first, m, acts_panels);
      to_strips(dhidden, rows, e, first, m, hidden_strips);
      product(rows, d, e, dhidden, e, up, dnormed, d);
      for (int r = 0; r < rows; r++) {
        const long row = first + r;
        In x = made.middle + row * d, stat = made.mlp_stat + 2 * row;
        normalise_back(dnormed + r * d, x, stat, p->mlp_norm, d, s->centred, dy + row * d,
                       dmid + r * d, sums);
        normalised_again(x, stat, p->mlp_norm, d, dnormed + r * d);
      }
      to_panels(dnormed, rows, d, first, m, normed);
      to_panels(made.attended + first * q, rows, q, first, m, attended);
      to_strips(dmid, rows, d, first, m, middle_strips);
      product(rows, q, d, dmid, d, out, dattended + first * q, q);
    }
    weight_gradients({{y_strips, acts_panels, d, f, o->down},
                      {hidden_strips, normed, e, d, o->up},
                      {middle_strips, attended, d, q, o->out}},
                     m);
  }
}

// How many numbers forward saves, and how many more each direction needs while it runs
extern "C" long block_saved(const Shape* s, const Inputs* p) {
  return Saved(s, p, nullptr).end - (float*)nullptr;
}

extern "C" long block_space(const Shape* s, int back) {
  const long m = s->m, d = s->dim, q = s->q(), n = s->qkv(), e = s->up(), f = s->hidden;
  const long enter = n * d, leave = d * (q + e + f);
  return back ? s->chunks() * s->vectors() + m * (d + q + n) +
                    std::max(enter + m * (d + n), leave + m * (f + 3 * d + q + e))
              : std::max(enter, leave);
}

static void forward(const Shape* s, const Inputs* p, float* saved, float* space, float* y) {
  Saved made(s, p, saved);
  const long n = s->qkv(), k = s->head_dim, strides[] = {s->t * n, n, k};
  In key = made.heads + s->q();
  enter(s, p, made, {space});
  forward(made.heads, key, key + s->kv * k, made.attended, made.lse, strides, strides, strides,
          s->m / s->t, s->t, s->heads, s->kv, k, s->threads);
  leave(s, p, made, y, {space});
}

// What dy holds may be overwritten by o->x
static void backward(const Shape* s, const Inputs* p, float* saved, float* space, In dy,
                     const Gradients* o) {
  Saved made(s, p, saved);
  Parts parts{space};
  const long n = s->qkv(), k = s->head_dim, q = s->q(), kv = s->kv * k;
  const long strides[] = {s->t * n, n, k}, dense[] = {s->t * q, q, k};
  float* sums = parts.take(s->chunks() * s->vectors());
  float *dmiddle = parts.take(s->m * s->dim), *dattended = parts.take(s->m * q);
  float *dq = parts.take(s->m * q), *dk = parts.take(s->m * kv), *dv = parts.take(s->m * kv);
  In key = made.heads + q;
  leave_back(s, p, made, o, dy, sums, dmiddle, dattended, parts);
  backward(made.heads, key, key + kv, made.attended, made.lse, dattended, dq, dk, dv, strides,
           strides, strides, dense, s->m / s->t, s->t, s->heads, s->kv, k, s->threads);
  enter_back(s, p, made, o, sums, dmiddle, dq, dk, dv, parts);
  float* vectors[] = {o->norm, o->q_norm, o->k_norm, o->mix, o->mlp_norm};
  const long sizes[] = {s->dim, k, k, 2, s->dim};
  for (int v = 0; v < 5; sums += sizes[v++])
    for (long i = 0; vectors[v] && i < sizes[v]; i++) {
      float sum = 0;
      for (long chunk = 0; chunk < s->chunks(); chunk++) sum += sums[chunk * s->vectors() + i];
      vectors[v][i] = sum;
    }
}

extern "C" void blocks_forward(const Shape* s, long n, const Inputs* p, float* const* saved,
                               float* space, float* const* y) {
  for (long i = 0; i < n; i++) forward(s, p + i, saved[i], space, y[i]);
}

extern "C" void blocks_backward(const Shape* s, long n, const Inputs* p, float* const* saved,
                                float* const* space_and_dy, const Gradients* o) {
  In dy = space_and_dy[1];
  for (long i = n - 1; i >= 0; i--) {
    backward(s, p + i, saved[i], space_and_dy[0], dy, o + i);
    dy = o[i].x;
  }
}
