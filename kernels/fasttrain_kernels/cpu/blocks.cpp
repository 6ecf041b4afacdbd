// Blocks of the Transformer on a CPU, both ways. Compiled behind product.h and attention.cpp.
//
// A task is some rows, of a token each, taken through norm, product and activation in the cache.
// Gradients of weights are tasks of their own, each of a part that it alone writes; those of norms
// are left as one sum for each task. So results do not depend on the number of threads.
// The residual stream, norms and activations are fp32; in T is what products take, and is saved.

// Null where the model has none: value and mix, q_norm and k_norm, cos and sin; last_norm, behind
// the block, but for the last block
struct Inputs {
  In x, value, norm, weight, q_norm, k_norm, out, mlp_norm, up, down, mix, last_norm, cos, sin;
  bool keeps_raw() const { return q_norm || mix; }
};

struct Gradients {  // of Inputs, in their order; of all blocks x may be the same
  float *x, *value, *norm, *weight, *q_norm, *k_norm, *out, *mlp_norm, *up, *down, *mix, *last_norm;
};

struct Weights : Parts {  // packed
  const Shape* s;
  T* qkv = take<T>(s->qkv() * s->dim);
  T* out = take<T>(s->q() * s->dim);
  T* up = take<T>(s->up() * s->dim);
  T* down = take<T>(s->hidden * s->dim);
};

struct Saved : Weights {  // what forward leaves for backward
  const Inputs* p;
  T* heads = take<T>(s->m * s->qkv());
  T* raw = take<T>(p->keeps_raw() ? s->m * s->qkv() : 0);  // before they are normalised or mixed
  T* attended = take<T>(s->m * s->q());
  T* hidden = take<T>(s->m * s->up());
  float* lse = take<float>(s->m * s->heads);
  float* stat = take<float>(2 * s->m);
  float* middle = take<float>(s->m * s->dim);
  float* mlp_stat = take<float>(2 * s->m);
  float* left = take<float>(p->last_norm ? s->m * s->dim : 0);  // what is before the last norm
  float* last_stat = take<float>(p->last_norm ? 2 * s->m : 0);
};

struct Backward : Parts {  // what it needs of memory while it runs
  const Shape* s;
  float* sums = take<float>(s->chunks() * s->vectors());
  float* dmiddle = take<float>(s->m * s->dim);
  T* dattended = take<T>(s->m * s->q());
  T* dheads = take<T>(s->m * s->qkv());
  // Operands of the gradients of weights: packed (M, n), and turned (n, M): see WeightGradient
  T* attended = take<T>(s->even() * s->q());
  T* normed = take<T>(s->turned() * s->dim);  // of mlp_norm, then of norm
  T* acts = take<T>(s->even() * s->hidden);
  T* dqkv = take<T>(s->even() * s->qkv());
  T* dmid = take<T>(s->turned() * s->dim);
  T* dhidden = take<T>(s->even() * s->up());
  T* dy = take<T>(s->turned() * s->dim);
};

template <class To>
static void normalised_again(In x, In stat, In w, long n, To* y) {
  for (long i = 0; i < n; i += LANES) set(y + i, (get(x + i) - stat[0]) * stat[1] * get(w + i));
}

// y = w·(x − μ)/σ of rows, where μ is 0 unless centred; stat is μ and 1/σ of each
template <class To>
static void normalise(long rows, In x, long n, bool centred, float eps, In w, float* stat, To* y) {
  for (long r = 0; r < rows; r++, x += n, y += n, stat += 2) {
    Lanes sums = {}, squares = {};
    for (long i = 0; centred && i < n; i += LANES) sums += get(x + i);
    stat[0] = sum(sums) / n;
    for (long i = 0; i < n; i += LANES) squares += (get(x + i) - stat[0]) * (get(x + i) - stat[0]);
    stat[1] = 1 / std::sqrt(sum(squares) / n + eps);
    normalised_again(x, stat, w, n, y);
  }
}

// dx = given + the gradient of x; dw is added to. dx may be given or dy.
template <class Dy, class From>
static void normalise_back(const Dy* dy, const From* x, In stat, In w, long n, bool centred,
                           In given, float* dx, float* dw) {
  const float mean = stat[0], scale = stat[1];
  Lanes sums = {}, dots = {};
  for (long i = 0; i < n; i += LANES) {
    const Lanes unit = (get(x + i) - mean) * scale, g = get(dy + i) * get(w + i);
    sums += g;
    dots += g * unit;
    set(dw + i, get(dw + i) + get(dy + i) * unit);
  }
  const float shift = centred ? sum(sums) / n : 0, slope = sum(dots) / n;
  for (long i = 0; i < n; i += LANES) {
    const Lanes unit = (get(x + i) - mean) * scale;
    const Lanes d = (get(dy + i) * get(w + i) - shift - unit * slope) * scale;
    set(dx + i, given ? get(given + i) + d : d);
  }
}

// x of one head turned by the angles of its position, or back
static void rotate(float* x, In cos, In sin, long dim, float sign) {
  float* other = x + dim / 2;
#pragma omp simd
  for (long i = 0; i < dim / 2; i++) {
    const float low = x[i], high = other[i], s = sin[i] * sign;
    x[i] = low * cos[i] - high * s;
    other[i] = high * cos[i] + low * s;
  }
}

enum { GELU, RELU2, SWIGLU };
static const long STRIP = 64;  // hidden columns that are activated while they are in the cache

// The activation of x, of SwiGLU times `factor`; its derivatives by both
template <int MLP>
static inline Lanes activation(Lanes x, Lanes factor, Lanes* dx, Lanes* dfactor) {
  if (MLP == RELU2) {
    const Lanes positive = larger(Lanes{}, x);  // NaN where x is NaN
    *dx = 2 * positive;
    return positive * positive;
  }
  const float slope = 2 * std::sqrt(2 / (float)M_PI);
  const Lanes square = x * x;
  const Lanes z = MLP == GELU ? x * (slope + slope * 0.044715f * square) : x;
  const Lanes s = inverse(1 + exponential(-z)), y = x * s;
  if (MLP == GELU) {
    *dx = s + (y - y * s) * (slope + slope * 0.134145f * square);
    return y;
  }
  *dx = factor * (s + y - y * s);
  *dfactor = y;
  return y * factor;
}

// Activations a, in rows of F, of a strip of n columns of the hidden states h (rows, n), behind
// which lie SwiGLU's factors (rows, n); all are kept for backward.
template <int MLP>
static void activate(const Shape* s, long rows, long n, In h, T* kept, T* a) {
  for (long r = 0; r < rows; r++)
    for (long i = 0, at = r * n; i < n; i += LANES, at += LANES) {
      const Lanes x = get(h + at), factor = MLP == SWIGLU ? get(h + rows * n + at) : x;
      Lanes dx, dfactor;
      set(kept + at, x);
      if (MLP == SWIGLU) set(kept + rows * n + at, factor);
      set(a + r * s->hidden + i, activation<MLP>(x, factor, &dx, &dfactor));
    }
}

// Of da (rows, n) the gradients dh of the strip, in rows of E, and these and the activations from
// the first row on of panels (M, n); behind them zeros up to `end` rows
template <int MLP>
static void activate_back(const Shape* s, long rows, long n, long first, long end, const T* kept,
                          In da, T* dh, T* acts, T* packed) {
  const long m = s->even(), f = s->hidden, e = s->up();
  for (long r = 0; r < end; r += PAIR)
    for (long panel = 0; panel < n; panel += PANEL) {
      const long width = std::min(PANEL, n - panel);
      long to = panel * m + (first + r) * width;
      for (long i = panel; i < panel + width; i += LANES, to += LANES * PAIR) {
        Lanes a[PAIR] = {}, dx[PAIR] = {}, dfactor[PAIR] = {};
        for (long p = 0; p < PAIR && r + p < rows; p++) {
          const long at = (r + p) * n + i;
          const Lanes x = get(kept + at), d = get(da + at);
          a[p] = activation<MLP>(x, MLP == SWIGLU ? get(kept + rows * n + at) : x, dx + p,
                                 dfactor + p);
          dx[p] *= d;
          dfactor[p] *= d;
        }
        T* row = dh + r * e + i;
        set_rows(acts + to, nullptr, 0, a);
        set_rows(packed + to, row, e, dx);
        if (MLP == SWIGLU) set_rows(packed + f * m + to, row + f, e, dfactor);
      }
    }
}

#define OF_MLP(s, function) \
  (s->mlp == GELU ? function<GELU> : s->mlp == RELU2 ? function<RELU2> : function<SWIGLU>)

// What is to be the gradient of a weight, or if turned its transpose: aᵀ·b of a turned (n_rows, M)
// and b packed (M, n). The narrower operand is the one to be turned.
struct WeightGradient {
  const T *a, *b;
  long n_rows, n;
  float* dw;
  bool turned = false;
  static const long HEIGHT = 256;  // of a task
  long n_down() const { return (n_rows + HEIGHT - 1) / HEIGHT; }
  long n_tasks(long columns) const { return (n + columns - 1) / columns * n_down(); }
};

static void weight_gradients(const Shape* s, std::initializer_list<WeightGradient> all) {
  // Columns of a task: of small models, of which there are few tasks, fewer, to share them evenly
  const long columns = s->dim > 128 ? 128 : 64;
  long n_tasks = 0;
  for (const WeightGradient& g : all) n_tasks += g.n_tasks(columns);
  share(n_tasks, s->threads, [=](long i) {
    const WeightGradient* g = all.begin();
    while (i >= g->n_tasks(columns)) i -= g++->n_tasks(columns);
    const long row = i % g->n_down() * g->HEIGHT, column = i / g->n_down() * columns;
    const long rows = std::min(g->HEIGHT, g->n_rows - row);
    const long n = std::min(columns, g->n - column);
    float* to = g->turned ? SCRATCH(float)(rows * n) : g->dw + row * g->n + column;
    if (!g->turned) fetch<1>(to, rows, n, g->n);
    product(rows, n, s->even(), g->a + row * s->turned(), s->turned(), g->b + column * s->even(),
            to, g->turned ? n : g->n);
    if (g->turned) transpose(to, n, rows, n, g->dw + column * g->n_rows + row, g->n_rows);
  });
}

// A weight (n_out, n_in) as products x·wᵀ take it, and in training as dy·w does, there from the
// first row on of `depth`. Called by all threads.
static void pack_weight(const Shape* s, In w, long n_out, long n_in, T* panels, T* back, long first,
                        long depth) {
#pragma omp for schedule(static) nowait
  for (long j = 0; j < n_out; j += PANEL) {
    const long width = std::min(PANEL, n_out - j);
    T* part = SCRATCH(T)(width * n_in);
    convert(w + j * n_in, width * n_in, part);
    pack_turned(part, n_in, width, n_in, panels + j * n_in, width);
    if (s->trains) pack(part, n_in, width, width, n_in, first + j, depth, back);
  }
}

static void pack_weights(const Shape* s, const Inputs* p, const Weights& to, const Weights& back) {
  const long d = s->dim, f = s->hidden;
#pragma omp parallel num_threads(s->threads)
  {
    pack_weight(s, p->weight, s->qkv(), d, to.qkv, back.qkv, 0, s->qkv());
    pack_weight(s, p->out, d, s->q(), to.out, back.out, 0, d);
    for (long from = 0; from < s->up(); from += f)
      pack_weight(s, p->up + from * d, f, d, to.up + from * d, back.up, from, s->up());
    pack_weight(s, p->down, d, f, to.down, back.down, 0, d);
  }
}

// heads (M, Q) of x (M, D): queries, keys and values as attention takes them
static void enter(const Shape* s, const Inputs* p, const Saved& made, const Weights& space) {
  const long d = s->dim, n = s->qkv(), k = s->head_dim, n_turned = s->heads + s->kv;
  share(s->chunks(), s->threads, [&](long chunk) {
    const long rows = s->rows(chunk), first = chunk * s->most();
    T* normed = SCRATCH(T)(rows * d);
    float* raw = SCRATCH(float)(rows * n);
    normalise(rows, p->x + first * d, d, s->centred, s->eps, p->norm, made.stat + 2 * first,
              normed);
    product(rows, n, d, normed, d, space.qkv, raw, n);
    if (p->keeps_raw()) convert(raw, rows * n, made.raw + first * n);
    for (long r = 0; r < rows; r++) {
      const long row = first + r, at_angle = row % s->t * (k / 2);
      float *head = raw + r * n, stat[2];
      for (long h = 0; h < n_turned; h++, head += k) {
        if (p->q_norm)
          normalise(1, head, k, false, s->eps, h < s->heads ? p->q_norm : p->k_norm, stat, head);
        if (p->cos) rotate(head, p->cos + at_angle, p->sin + at_angle, k, 1);
      }
      for (long i = 0; p->mix && i < s->kv * k; i++)
        head[i] = p->mix[0] * head[i] + p->mix[1] * p->value[row * s->kv * k + i];
      convert(raw + r * n, n, made.heads + row * n);
    }
  });
}

static void enter_back(const Shape* s, const Inputs* p, const Saved& made, const Gradients* o,
                       const Backward& space) {
  const long d = s->dim, n = s->qkv(), k = s->head_dim;
  share(s->chunks(), s->threads, [&](long chunk) {
    const long rows = s->rows(chunk), first = chunk * s->most(), end = round_up(rows, WHOLE);
    T *dqkv = SCRATCH(T)(rows * n), *normed = SCRATCH(T)(rows * d);
    float *dnormed = SCRATCH(float)(rows * d), *wide = SCRATCH(float)(n);
    float *sums = space.sums + chunk * s->vectors(), *mix_sums = sums + 3 * d + 2 * k;
    for (long r = 0; r < rows; r++) {
      const long row = first + r, at_angle = row % s->t * (k / 2), start = row * s->kv * k;
      float* to = wide;
      const T* raw = made.raw + row * n;
      convert(space.dheads + row * n, n, to);
      for (long h = 0; h < s->heads + s->kv; h++, to += k, raw += k) {
        if (p->cos) rotate(to, p->cos + at_angle, p->sin + at_angle, k, -1);
        if (!p->q_norm) continue;
        const bool query = h < s->heads;
        Lanes squares = {};
        for (long i = 0; i < k; i += LANES) squares += get(raw + i) * get(raw + i);
        const float stat[2] = {0, 1 / std::sqrt(sum(squares) / k + s->eps)};
        normalise_back(to, raw, stat, query ? p->q_norm : p->k_norm, k, false, nullptr, to,
                       sums + 3 * d + (query ? 0 : k));
      }
      if (p->mix) {
        Lanes own = {}, other = {};
        for (long i = 0; i < s->kv * k; i += LANES) {
          const Lanes g = get(to + i);
          own += g * get(raw + i);
          other += g * get(p->value + start + i);
          set(o->value + start + i, p->mix[1] * g);
          set(to + i, p->mix[0] * g);
        }
        mix_sums[0] += sum(own);
        mix_sums[1] += sum(other);
      }
      convert(wide, n, dqkv + r * n);
    }
    pack(dqkv, n, rows, end, n, first, s->even(), space.dqkv);
    product(rows, d, n, dqkv, n, made.qkv, dnormed, d);
    for (long r = 0; r < rows; r++) {
      const long row = first + r;
      In x = p->x + row * d, stat = made.stat + 2 * row;
      normalise_back(dnormed + r * d, x, stat, p->norm, d, s->centred, space.dmiddle + row * d,
                     o->x + row * d, sums);
      normalised_again(x, stat, p->norm, d, normed + r * d);
    }
    turn(normed, d, rows, d, space.normed + first, s->turned());
  });
  weight_gradients(s, {{space.normed, space.dqkv, d, n, o->weight, true}});
}

// middle = x + attended·outᵀ, y = middle + activation(hidden)·downᵀ
static void leave(const Shape* s, const Inputs* p, const Saved& made, float* y,
                  const Weights& space) {
  const long d = s->dim, q = s->q(), e = s->up(), f = s->hidden;
  share(s->chunks(), s->threads, [&](long chunk) {
    const long rows = s->rows(chunk), first = chunk * s->most();
    T *normed = SCRATCH(T)(rows * d), *acts = SCRATCH(T)(rows * f);
    float *middle = made.middle + first * d, *hidden = SCRATCH(float)(rows * 2 * STRIP);
    float* left = (p->last_norm ? made.left : y) + first * d;
    fetch(made.attended + first * q, rows, q, q);
    fetch(p->x + first * d, rows, d, d);
    fetch<1>(middle, rows, d, d);
    product(rows, d, q, made.attended + first * q, q, space.out, middle, d, p->x + first * d);
    normalise(rows, middle, d, s->centred, s->eps, p->mlp_norm, made.mlp_stat + 2 * first, normed);
    for (long j = 0; j < f; j += STRIP) {
      const long width = std::min(STRIP, f - j);
      for (long half = 0; half < s->halves(); half++)
        product(rows, width, d, normed, d, space.up + (half * f + j) * d,
                hidden + half * rows * width, width);
      OF_MLP(s, activate)(s, rows, width, hidden,
                          made.hidden + first * e + j * rows * s->halves(), acts + j);
    }
    fetch<1>(left, rows, d, d);
    product(rows, d, f, acts, f, space.down, left, d, middle);
    if (p->last_norm)
      normalise(rows, left, d, s->centred, s->eps, p->last_norm, made.last_stat + 2 * first,
                (T*)y + first * d);
  });
}

static void leave_back(const Shape* s, const Inputs* p, const Saved& made, const Gradients* o,
                       In dy, const Backward& space) {
  const long d = s->dim, q = s->q(), e = s->up(), f = s->hidden, m = s->turned();
  share(s->chunks(), s->threads, [&](long chunk) {
    const long rows = s->rows(chunk), first = chunk * s->most(), end = round_up(rows, WHOLE);
    T *narrow = SCRATCH(T)(rows * d), *dhidden = SCRATCH(T)(end * e);
    float *wide = SCRATCH(float)(rows * std::max({d, q, STRIP})), *dx = o->x + first * d;
    float *dmid = space.dmiddle + first * d, *sums = space.sums + chunk * s->vectors();
    In dleft = p->last_norm ? dx : dy + first * d;
    std::fill_n(sums, s->vectors(), 0.f);
    for (long r = 0; p->last_norm && r < rows; r++)
      normalise_back((const T*)dy + (first + r) * d, made.left + (first + r) * d,
                     made.last_stat + 2 * (first + r), p->last_norm, d, s->centred, nullptr,
                     dx + r * d, sums + 2 * d);
    convert(dleft, rows * d, narrow);
    turn(narrow, d, rows, d, space.dy + first, m);
    for (long j = 0; j < f; j += STRIP) {
      const long width = std::min(STRIP, f - j);
      product(rows, width, d, narrow, d, made.down + j * d, wide, width);
      OF_MLP(s, activate_back)(s, rows, width, first, end,
                               made.hidden + first * e + j * rows * s->halves(), wide, dhidden + j,
                               space.acts + j * s->even(), space.dhidden + j * s->even());
    }
    product(rows, d, e, dhidden, e, made.up, wide, d);
    for (long r = 0; r < rows; r++) {
      In x = made.middle + (first + r) * d, stat = made.mlp_stat + 2 * (first + r);
      normalise_back(wide + r * d, x, stat, p->mlp_norm, d, s->centred, dleft + r * d, dmid + r * d,
                     sums + d);
      normalised_again(x, stat, p->mlp_norm, d, narrow + r * d);
    }
    turn(narrow, d, rows, d, space.normed + first, m);
    pack(made.attended + first * q, q, rows, end, q, first, s->even(), space.attended);
    convert(dmid, rows * d, narrow);
    turn(narrow, d, rows, d, space.dmid + first, m);
    product(rows, q, d, narrow, d, made.out, wide, q);
    convert(wide, rows * q, space.dattended + first * q);
  });
  const long factors = (s->halves() - 1) * f;  // columns, whose panels begin anew
  weight_gradients(
      s, {{space.dy, space.acts, d, f, o->down},
          {space.normed, space.dhidden, d, f, o->up, true},
          {space.normed, space.dhidden + f * s->even(), d, factors, o->up + f * d, true},
          {space.dmid, space.attended, d, q, o->out}});
}

// Lines of the cache that forward saves of a block
extern "C" int block_saved(const Shape* s, const Inputs* p, long block) {
  return Saved{{{nullptr}, s}, p + block}.lines();
}

// Of n blocks, each of whose x is y of the one before
extern "C" void blocks_forward(const Shape* s, long n, const Inputs* p, char* const* saved,
                               float* y) {
  const std::unique_ptr<Line[]> memory(new Line[Weights{{nullptr}, s}.lines()]);
  const Weights space{{memory[0].bytes}, s};
  for (long i = 0; i < n; i++, p++) {
    const Saved made{{{saved[i]}, s}, p};
    pack_weights(s, p, space, made);
    enter(s, p, made, space);
    attend(s, made.heads, made.attended, made.lse);
    leave(s, p, made, i + 1 < n ? (float*)p[1].x : y, space);
  }
}

// The gradient of x may be written where dy is.
extern "C" void blocks_backward(const Shape* s, long n, const Inputs* p, char* const* saved,
                                const Gradients* o, In dy) {
  const std::unique_ptr<Line[]> memory(new Line[Backward{{nullptr}, s}.lines()]);
  const Backward space{{memory[0].bytes}, s};
  const long d = s->dim, k = s->head_dim, sizes[] = {d, d, d, k, k, 2};
  for (long i = n - 1; i >= 0; dy = o[i--].x) {
    const Saved made{{{saved[i]}, s}, p + i};
    leave_back(s, p + i, made, o + i, dy, space);
    attend_back(s, made.heads, made.attended, made.lse, space.dattended, space.dheads);
    enter_back(s, p + i, made, o + i, space);
    float* sums = space.sums;
    float* vectors[] = {o[i].norm,   o[i].mlp_norm, o[i].last_norm,
                        o[i].q_norm, o[i].k_norm,   o[i].mix};
    for (int v = 0; v < 6; sums += sizes[v++])
      for (long chunk = 0; vectors[v] && chunk < s->chunks(); chunk++)
        for (long j = 0; j < sizes[v]; j++)
          vectors[v][j] = (chunk ? vectors[v][j] : 0) + sums[chunk * s->vectors() + j];
  }
}
