// Blocks of the Transformer on a CPU, both ways. Built behind cpu/product.h of the kernels,
// turns.h, the attention and rows.h.
//
// A task is ROWS tokens, taken through norm, product and activation while they are in the cache.
// Gradients of weights are tasks of their own, each of a part that it alone writes; those of norms
// are left as one sum for each ROWS tokens. So results do not depend on the number of threads.
// Legend as in model.py; M = B·T, Q = (H + 2G)·K, E = F or, with SwiGLU, 2F.

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

// heads (M, Q) of x (M, D): queries, keys and values as attention takes them
static void enter(const Shape* s, const Inputs* p, const Saved& made, Parts space) {
  const long d = s->dim, n = s->qkv(), k = s->head_dim, n_turned = s->heads + s->kv;
  const bool changes = p->q_norm || p->cos || p->mix;
  float* panels = space.take(n * d);
  Turns turns(s->chunks(), s->threads);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static)
    for (long j = 0; j < n / PANEL; j++) pack_turned(p->weight, d, d, j, panels);
    turns.take([&](long chunk) {
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
    });
  }
}

static void enter_back(const Shape* s, const Inputs* p, const Saved& made, const Gradients* o,
                       float* sums_of_chunks, In given, In dq, In dk, In dv, Parts space) {
  const long d = s->dim, n = s->qkv(), k = s->head_dim;
  float *panels = space.take(n * d), *normed = space.take(s->m * d);
  float* strips = space.take(s->m * n);
  Turns turns(s->chunks(), s->threads);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static)
    for (long j = 0; j < d / PANEL; j++) pack(p->weight, d, n, j, panels);
    turns.take([&](long chunk) {
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
    });
#pragma omp barrier
    weight_gradients({{strips, normed, n, d, o->weight}}, s->m);
  }
}

// middle = x + attended·outᵀ, y = middle + activation(hidden)·downᵀ
static void leave(const Shape* s, const Inputs* p, const Saved& made, float* y, Parts space) {
  const long d = s->dim, q = s->q(), e = s->up(), f = s->hidden;
  float *out = space.take(q * d), *up = space.take(d * e), *down = space.take(f * d);
  Turns turns(s->chunks(), s->threads);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static) nowait
    for (long j = 0; j < d / PANEL; j++) pack_turned(p->out, q, q, j, out);
#pragma omp for schedule(static) nowait
    for (long j = 0; j < e / PANEL; j++) pack_turned(p->up, d, d, j, up);
#pragma omp for schedule(static)
    for (long j = 0; j < d / PANEL; j++) pack_turned(p->down, f, f, j, down);
    turns.take([&](long chunk) {
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
    });
  }
}

static void leave_back(const Shape* s, const Inputs* p, const Saved& made, const Gradients* o,
                       In dy, float* sums_of_chunks, float* dmiddle, float* dattended, Parts space) {
  const long m = s->m, d = s->dim, q = s->q(), e = s->up(), f = s->hidden;
  float *out = space.take(q * d), *up = space.take(d * e), *down = space.take(f * d);
  float *acts_panels = space.take(m * f), *normed = space.take(m * d);
  float *attended = space.take(m * q), *y_strips = space.take(m * d);
  float *middle_strips = space.take(m * d), *hidden_strips = space.take(m * e);
  Turns turns(s->chunks(), s->threads);
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(static) nowait
    for (long j = 0; j < q / PANEL; j++) pack(p->out, q, d, j, out);
#pragma omp for schedule(static) nowait
    for (long j = 0; j < d / PANEL; j++) pack(p->up, d, e, j, up);
#pragma omp for schedule(static)
    for (long j = 0; j < f / PANEL; j++) pack(p->down, f, d, j, down);
    turns.take([&](long chunk) {
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
    });
#pragma omp barrier
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
    if (vectors[v]) add_up(sums, s->chunks(), s->vectors(), sizes[v], vectors[v]);
}

// The norm behind the last block, or null: of what it left, y, also the gradients
struct Last {
  In norm, dy;
  float *y, *normed, *dnorm;
};

extern "C" void blocks_forward(const Shape* s, long n, const Inputs* p, float* const* saved,
                               float* space, float* const* y, const Last* last) {
  const long d = s->dim;
  for (long i = 0; i < n; i++) forward(s, p + i, saved[i], space, y[i]);
  if (!last->norm) return;
#pragma omp parallel for schedule(static) num_threads(s->threads)
  for (long row = 0; row < s->m; row++) {
    float stat[2];
    normalise(last->y + row * d, d, s->centred, s->eps, last->norm, stat, last->normed + row * d);
  }
}

extern "C" void blocks_backward(const Shape* s, long n, const Inputs* p, float* const* saved,
                                float* space, const Gradients* o, const Last* last) {
  const long d = s->dim;
  In dy = last->dy;
  if (last->norm) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (long chunk = 0; chunk < s->chunks(); chunk++) {
      float *sums = space + chunk * d, *normed = scratch(d), stat[2];
      std::fill_n(sums, d, 0.f);
      for (long at = chunk * ROWS * d, r = 0; r < s->rows(chunk); r++, at += d) {
        normalise(last->y + at, d, s->centred, s->eps, last->norm, stat, normed);
        normalise_back(dy + at, last->y + at, stat, last->norm, d, s->centred, nullptr,
                       o[n - 1].x + at, sums);
      }
    }
    add_up(space, s->chunks(), d, d, last->dnorm);
    dy = o[n - 1].x;
  }
  for (long i = n - 1; i >= 0; i--) {
    backward(s, p + i, saved[i], space, dy, o + i);
    dy = o[i].x;
  }
}
