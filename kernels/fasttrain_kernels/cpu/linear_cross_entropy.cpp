// A linear layer and its cross-entropy, gradients included. Built behind product.h.
//
// Logits lie in blocks of WIDTH columns, each (chunk, width), which one thread makes from a part of
// the weight that it packs for itself, with maximum and sum of exponentials of each row. When those
// of all blocks are joined, the gradient takes the place of the logits, and both products of it are
// made block by block. The hidden states' is summed up over a fixed number of parts of the blocks,
// so that nothing depends on the number of threads.

static const int AT_A_TIME = 256;  // rows for which operands stay in the second cache

struct Shape {
  long n, dim, vocab, hidden_row, weight_row, ignored, chunk, width, parts, threads;
  float smoothing, z_loss, softcap, scale;
  long blocks() const { return (vocab + width - 1) / width; }
  int columns(long block) const { return std::min(width, vocab - block * width); }
};

struct Tensors {
  In hidden, weight;
  const int64_t* targets;
  In token_weight, upstream;  // null: 1
  float *losses, *lse, *correct, *dhidden, *dweight;  // the last three null where not wanted
  const int64_t* kept;  // the rows that count, in order, or null: all do
  long row(long i) const { return kept ? kept[i] : i; }
};

struct Stat {
  float peak, sum, total;  // sum of exp(x - peak); of x
};

struct Row {
  long of;      // its number among all
  long target;  // -1: none
  float peak, slope, base, hit;  // gradient: slope·exp(x - peak) - base, less hit at the target
};

// Parts of one buffer
struct Space {
  float *logits, *hidden, *panels, *sums, *end;
  Stat* stats;
  Row* rows;
  Space(const Shape* s, const Tensors* t, float* start) {
    const long n = s->chunk, d = s->dim;
    rows = (Row*)start;
    stats = (Stat*)(rows + n);
    logits = (float*)(stats + s->blocks() * n);
    hidden = logits + s->blocks() * n * s->width;
    panels = hidden + n * d;
    sums = panels + (t->dweight ? n * d : 0);
    end = sums + (t->dhidden ? s->parts * n * d : 0);
  }
};

static float largest(Lanes x) {
  float most = x[0];
  for (int i = 1; i < 8; i++) most = x[i] > most ? x[i] : most;
  return most;
}

static Lanes hyperbolic_tangent(Lanes x) {
  Lanes e = exponential(x < 0 ? 2 * x : -2 * x), y = (1 - e) / (1 + e);
  return x < 0 ? -y : y;
}

// n columns, behind them zeros up to a multiple of 16
static Stat measure(float* x, int n, float softcap) {
  const int end = (n + 15) / 16 * 16;
  Lanes most[] = {Lanes{} - INFINITY, Lanes{} - INFINITY}, sum[2] = {}, all[2] = {};
  if (softcap)
    for (int i = 0; i < end; i += 8) at(x + i) = softcap * hyperbolic_tangent(at(x + i) / softcap);
  for (int i = 0; i < end; i += 16)
    for (int k = 0; k < 2; k++) all[k] += at(x + i + 8 * k);
  std::fill(x + n, x + end, -INFINITY);
  for (int i = 0; i < end; i += 16)
    for (int k = 0; k < 2; k++) {
      Lanes value = at(x + i + 8 * k);
      most[k] = value > most[k] ? value : most[k];
    }
  const float peak = std::max(largest(most[0]), largest(most[1]));
  const float from = peak == -INFINITY ? 0 : peak;
  for (int i = 0; i < end; i += 16)
    for (int k = 0; k < 2; k++) sum[k] += exponential(at(x + i + 8 * k) - from);
  return {peak, total(sum[0] + sum[1]), total(all[0] + all[1])};
}

static void differentiate(float* x, int n, const Row& row, float softcap, long first) {
  for (int i = 0; i < n; i += 8) {
    Lanes value = at(x + i), d = row.slope * exponential(value - row.peak) - row.base;
    at(x + i) = softcap ? d * (1 - value / softcap * (value / softcap)) : d;
  }
  if (row.target >= first && row.target < first + n) x[row.target - first] -= row.hit;
}

// Logits of a block of columns for all rows, and what is known of each row from them
static void enter(const Shape* s, const Tensors* t, const Space& made, long block, int rows, In h,
                  long h_row) {
  const long d = s->dim, n = s->columns(block), end = (n + 15) / 16 * 16;
  In weight = t->weight + block * s->width * s->weight_row;
  float *panels = scratch((s->width + PANEL) * d), *rest = panels + s->width * d;
  for (long j = 0; j < n / PANEL; j++) pack_turned(weight, s->weight_row, d, j, panels);
  if (n < end) {
    const long done = n / PANEL * PANEL;
    for (long i = done; i < n; i++)
      std::copy_n(weight + i * s->weight_row, d, rest + (i - done) * d);
    std::fill_n(rest + (n - done) * d, (end - n) * d, 0.f);
    pack_turned(rest, d, d, 0, panels + done * d);
  }
  for (int first = 0; first < rows; first += AT_A_TIME) {
    const int some = std::min(AT_A_TIME, rows - first);
    float* logits = made.logits + (block * s->chunk + first) * s->width;
    product(some, end, d, h + first * h_row, h_row, panels, logits, s->width);
    for (int r = 0; r < some; r++)
      made.stats[block * s->chunk + first + r] = measure(logits + r * s->width, n, s->softcap);
  }
}

static bool is_first_largest(const Shape* s, const Space& made, int r, long target, float value) {
  for (long i = 0; i < target; i++) {
    float x = made.logits[(i / s->width * s->chunk + r) * s->width + i % s->width];
    if (std::isnan(value) ? std::isnan(x) : !(x < value)) return false;
  }
  return true;
}

// The loss of row `of`, and what its gradient is made of: all but correct. x is the target's logit.
static Row conclude(const Shape* s, const Tensors* t, long of, Stat all, float x) {
  const float share = s->smoothing / s->vocab;
  const long target = t->targets[of];
  const bool valid = target >= 0 && target < s->vocab;
  const float log_sum = std::log(all.sum), lse = all.peak + log_sum, nll = log_sum - (x - all.peak);
  float loss = nll * (1 - s->smoothing), slope = 1;
  if (s->z_loss) loss += s->z_loss * lse * lse, slope += 2 * s->z_loss * lse;
  if (s->smoothing) loss += s->smoothing * lse - share * all.total;
  const float weight = (t->token_weight ? t->token_weight[of] : 1) * s->scale;
  const float factor = valid ? weight * (t->upstream ? t->upstream[of] : 1) : NAN;
  const float capped = s->softcap ? x / s->softcap : 0;
  t->losses[of] = loss * weight;
  t->lse[of] = lse;
  return {of, valid ? target : -1, all.peak, factor * slope / all.sum, factor * share,
          factor * (1 - s->smoothing) * (1 - capped * capped)};
}

static void join(const Shape* s, const Tensors* t, const Space& made, int r, long of) {
  Stat joint = {-INFINITY, 0, 0};
  for (long b = 0; b < s->blocks(); b++)
    joint.peak = std::max(joint.peak, made.stats[b * s->chunk + r].peak);
  for (long b = 0; b < s->blocks(); b++) {
    Stat stat = made.stats[b * s->chunk + r];
    const bool as_it_is = stat.peak == joint.peak || stat.peak == -INFINITY;
    joint.sum += as_it_is ? stat.sum : stat.sum * std::exp(stat.peak - joint.peak);
    joint.total += stat.total;
  }
  const long target = t->targets[of], block = target / s->width;
  const bool valid = target >= 0 && target < s->vocab;
  const float x = valid ? made.logits[(block * s->chunk + r) * s->width + target % s->width] : NAN;
  made.rows[r] = conclude(s, t, of, joint, x);
  const bool is_largest = valid && (x == joint.peak || std::isnan(x));
  if (t->correct) t->correct[of] = is_largest && is_first_largest(s, made, r, target, x);
}

// Gradients from one block of logits. Those of the hidden states are added to sums, but the first.
static void leave(const Shape* s, const Tensors* t, const Space& made, long block, int rows,
                  float* sums, bool first_of_sums, bool first_of_weight) {
  const long d = s->dim, n = s->columns(block), first = block * s->width;
  float *panels = scratch(s->width * (d + AT_A_TIME) + 8), *strips = panels + s->width * d;
  for (long j = 0; t->dhidden && j < d / PANEL; j++)
    pack(t->weight + first * s->weight_row, s->weight_row, n, j, panels);
  for (int start = 0; start < rows; start += AT_A_TIME) {
    const int some = std::min(AT_A_TIME, rows - start);
    float* x = made.logits + (block * s->chunk + start) * s->width;
    for (int r = 0; r < some; r++)
      differentiate(x + r * s->width, n, made.rows[start + r], s->softcap, first);
    if (t->dhidden)
      product(some, d, n, x, s->width, panels, sums + start * d, d, !first_of_sums);
    if (!t->dweight) continue;
    for (long i = 0; i < n; i += 6) {
      const int wide = std::min(6L, n - i);
      float* to = strips + i * some;
      for (int r = 0; r < some; r++)
        if (wide == 6)
          at(to + r * 6) = at(x + r * s->width + i);  // two too many, overwritten by what follows
        else
          std::copy_n(x + r * s->width + i, wide, to + r * wide);
    }
    for (long j = 0; j < d; j += PANEL)
      for (long i = 0; i < n; i += 6)
        tile_of<true>(n - i)(some, strips + i * some, 0, made.panels + j * rows + start * PANEL,
                             t->dweight + (first + i) * d + j, d, start || !first_of_weight);
  }
}

// Few columns: the logits of sixteen rows, turned, (V, 16), and the rows themselves lie in the
// first cache; a lane is a row. Threads share out the rows, then the columns of dweight.
static const int ROWS = PANEL;

// (R, 16) of C = A · B, or added to it. Of A, (R, parts · depth), a part is a block of its own, in
// which a row is ROW numbers from the next and a column 17 - ROW.
template <int R, int ROW>
static void tile_of_blocks(int parts, long part, int depth, In a, In b, float* c, long c_row,
                           bool add) {
  Lanes s[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) s[i][0] = s[i][1] = Lanes{};
  for (int p = 0; p < parts; p++, a += part)
    for (int k = 0; k < depth; k++, b += PANEL) {
      Lanes low = at(b), high = at(b + 8);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        float x = a[i * ROW + k * (ROWS + 1 - ROW)];
        s[i][0] += x * low;
        s[i][1] += x * high;
      }
    }
  put(s, c, c_row, add);
}

template <int ROW>
static decltype(&tile_of_blocks<1, ROW>) blocks_of(int rows) {
  static const decltype(&tile_of_blocks<1, ROW>) tiles[] = {
      tile_of_blocks<1, ROW>, tile_of_blocks<2, ROW>, tile_of_blocks<3, ROW>,
      tile_of_blocks<4, ROW>, tile_of_blocks<5, ROW>, tile_of_blocks<6, ROW>};
  return tiles[std::min(rows, 6) - 1];
}

// Statistics of sixteen rows; e = exp(x - peak)
static void measure_turned(const Shape* s, float* x, float* e, Stat* stats) {
  Lanes most[] = {Lanes{} - INFINITY, Lanes{} - INFINITY}, sum[2] = {}, all[2] = {}, from[2];
  const long end = s->vocab * ROWS;
  for (long i = 0; i < end; i += ROWS)
    for (int k = 0; k < 2; k++) {
      Lanes value = at(x + i + 8 * k);
      if (s->softcap)
        at(x + i + 8 * k) = value = s->softcap * hyperbolic_tangent(value / s->softcap);
      all[k] += value;
      most[k] = value > most[k] ? value : most[k];
    }
  for (int k = 0; k < 2; k++) from[k] = most[k] == -INFINITY ? Lanes{} : most[k];
  for (long i = 0; i < end; i += ROWS)
    for (int k = 0; k < 2; k++)
      sum[k] += at(e + i + 8 * k) = exponential(at(x + i + 8 * k) - from[k]);
  for (int r = 0; r < ROWS; r++)
    stats[r] = {most[r / 8][r % 8], sum[r / 8][r % 8], all[r / 8][r % 8]};
}

// Of up to sixteen rows from the first on: losses, the gradient of the logits in x, and dhidden
static void few(const Shape* s, const Tensors* t, long first, int rows, float* x, In panels,
                float* space) {
  const long d = s->dim, vocab = s->vocab;
  float *turned = space, *e = turned + d * ROWS, *side = e + vocab * ROWS;
  In h = t->hidden + first * s->hidden_row;
  const bool apart = t->kept || rows < ROWS;  // the rows, with zeros behind them
  if (apart) {
    for (int r = 0; r < rows; r++)
      std::copy_n(t->hidden + t->row(first + r) * s->hidden_row, d, side + r * d);
    std::fill(side + rows * d, side + ROWS * d, 0.f);
    h = side;
  }
  pack_turned(h, apart ? d : s->hidden_row, d, 0, turned);
  product(vocab, ROWS, d, t->weight, s->weight_row, turned, x, ROWS);
  Stat stats[ROWS];
  Row made[ROWS];
  measure_turned(s, x, e, stats);
  Lanes slope[2] = {}, base[2] = {};
  for (int r = 0; r < rows; r++) {
    const long of = t->row(first + r), target = t->targets[of];
    const bool valid = target >= 0 && target < vocab;
    const float value = valid ? x[target * ROWS + r] : NAN;
    made[r] = conclude(s, t, of, stats[r], value);
    slope[r / 8][r % 8] = made[r].slope, base[r / 8][r % 8] = made[r].base;
    if (!t->correct) continue;
    bool right = valid && (value == stats[r].peak || std::isnan(value));
    for (long i = 0; right && i < target; i++)
      right = std::isnan(value) ? !std::isnan(x[i * ROWS + r]) : x[i * ROWS + r] < value;
    t->correct[of] = right;
  }
  if (!t->dhidden && !t->dweight) return;
  for (long i = 0; i < vocab * ROWS; i += ROWS)
    for (int k = 0; k < 2; k++) {
      Lanes value = at(x + i + 8 * k), d = slope[k] * at(e + i + 8 * k) - base[k];
      at(x + i + 8 * k) = s->softcap ? d * (1 - value / s->softcap * (value / s->softcap)) : d;
    }
  for (int r = 0; r < rows; r++)
    if (made[r].target >= 0) x[made[r].target * ROWS + r] -= made[r].hit;
  if (!t->dhidden) return;
  float* out = apart ? side : t->dhidden + first * d;
  for (long k = 0; k < vocab; k += DEPTH)
    for (long j = 0; j < d; j += PANEL)
      for (int i = 0; i < ROWS; i += 6)
        blocks_of<1>(ROWS - i)(1, 0, std::min<long>(DEPTH, vocab - k), x + k * ROWS + i,
                               panels + j * vocab + k * PANEL, out + i * d + j, d, k);
  for (int r = 0; apart && r < rows; r++)
    std::copy_n(side + r * d, d, t->dhidden + t->row(first + r) * d);
}

// Sixteen columns of dweight, from the rows of a chunk
static void few_weights(const Shape* s, const Tensors* t, long start, int rows, long j, In x,
                        float* panel) {
  for (int from = 0; from < rows; from += DEPTH) {
    const int some = std::min(DEPTH, rows - from), groups = (some + ROWS - 1) / ROWS;
    for (int r = 0; r < some; r++) {
      In h = t->hidden + t->row(start + from + r) * s->hidden_row + j;
      at(panel + r * PANEL) = at(h), at(panel + r * PANEL + 8) = at(h + 8);
    }
    std::fill(panel + some * PANEL, panel + groups * ROWS * PANEL, 0.f);
    for (long i = 0; i < s->vocab; i += 6)
      blocks_of<ROWS>(s->vocab - i)(groups, s->vocab * ROWS, ROWS, x + (from * s->vocab + i * ROWS),
                                    panel, t->dweight + i * s->dim + j, s->dim, start || from);
  }
}

static void compute_few(const Shape* s, const Tensors* t, float* space) {
  const long d = s->dim, vocab = s->vocab;
#pragma omp parallel num_threads(s->threads)
  {
    float* own = scratch(d * vocab + (vocab + 2 * d + DEPTH) * ROWS);
    float *rest = own + d * vocab, *panel = rest + (vocab + 2 * d) * ROWS;
    for (long j = 0; t->dhidden && j < d / PANEL; j++)
      pack(t->weight, s->weight_row, vocab, j, own);
    for (long start = 0; start < s->n; start += s->chunk) {
      const int rows = std::min(s->chunk, s->n - start);
#pragma omp for schedule(dynamic)
      for (int r = 0; r < rows; r += ROWS)
        few(s, t, start + r, std::min(ROWS, rows - r), space + r * vocab, own, rest);
      if (!t->dweight) continue;
#pragma omp for schedule(dynamic)
      for (long j = 0; j < d; j += PANEL) few_weights(s, t, start, rows, j, space, panel);
    }
  }
}

static void compute(const Shape* s, const Tensors* t, float* space) {
  const Space made(s, t, space);
  const long d = s->dim;
#pragma omp parallel num_threads(s->threads)
  for (long start = 0; start < s->n; start += s->chunk) {
    const int rows = std::min(s->chunk, s->n - start);
    In h = t->kept ? made.hidden : t->hidden + start * s->hidden_row;
    const long h_row = t->kept ? d : s->hidden_row;
    if (t->kept) {
#pragma omp for schedule(static)
      for (int r = 0; r < rows; r++)
        std::copy_n(t->hidden + t->kept[start + r] * s->hidden_row, d, made.hidden + r * d);
    }
    if (t->dweight) {
#pragma omp for schedule(static) nowait
      for (long j = 0; j < d / PANEL; j++) pack(h, h_row, rows, j, made.panels);
    }
#pragma omp for schedule(dynamic)
    for (long b = 0; b < s->blocks(); b++) enter(s, t, made, b, rows, h, h_row);
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) join(s, t, made, r, t->row(start + r));
    if (!t->dhidden && !t->dweight) continue;
#pragma omp for schedule(dynamic)
    for (long p = 0; p < s->parts; p++) {
      const long from = s->blocks() * p / s->parts, to = s->blocks() * (p + 1) / s->parts;
      float* sums = made.sums + p * s->chunk * d;
      for (long b = from; b < to; b++) leave(s, t, made, b, rows, sums, b == from, start == 0);
    }
    if (!t->dhidden) continue;
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++)
      for (long i = 0; i < d; i += 8) {
        Lanes sum = at(made.sums + r * d + i);
        for (long p = 1; p < s->parts; p++) sum += at(made.sums + (p * s->chunk + r) * d + i);
        at(t->dhidden + made.rows[r].of * d + i) = sum;
      }
  }
}

// Floats of the space. A layout without parts is that of few columns.
extern "C" long linear_cross_entropy_space(const Shape* s, const Tensors* t) {
  if (!s->parts) return s->chunk * s->vocab;
  return Space(s, t, nullptr).end - (float*)nullptr;
}

extern "C" void linear_cross_entropy(const Shape* given, const Tensors* all, float* space) {
  Shape s = *given;
  Tensors t = *all;
  std::vector<int64_t> kept;
  s.n = given->n - std::count(t.targets, t.targets + given->n, given->ignored);
  if (s.n < given->n) {
    for (long r = 0; r < given->n; r++) {
      if (t.targets[r] != given->ignored) kept.push_back(r);
      if (t.targets[r] != given->ignored) continue;
      t.losses[r] = t.lse[r] = 0;
      if (t.correct) t.correct[r] = 0;
      if (t.dhidden) std::fill_n(t.dhidden + r * s.dim, s.dim, 0.f);
    }
    t.kept = kept.data();
  }
  if (!s.n && t.dweight) std::fill_n(t.dweight, s.vocab * s.dim, 0.f);
  if (s.n) (s.parts ? compute : compute_few)(&s, &t, space);
}
