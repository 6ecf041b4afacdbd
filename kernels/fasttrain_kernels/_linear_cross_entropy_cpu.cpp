// A linear layer and its cross-entropy, gradients included. Built behind _cpu_product.h.
//
// Logits lie in blocks of WIDTH columns, each (chunk, width), which one thread makes from a part of
// the weight that it packs for itself, with maximum and sum of exponentials of each row. When those
// of all blocks are joined, the gradient takes the place of the logits, and both products of it are
// made block by block. The hidden states' is summed up over a fixed number of parts of the blocks,
// so that nothing depends on the number of threads.

static const int AT_A_TIME = 256;  // rows for which operands stay in the second cache

struct Shape {
  long n, dim, vocab, hidden_row, weight_row, chunk, width, parts, threads;
  float smoothing, z_loss, softcap, scale;
  long blocks() const { return (vocab + width - 1) / width; }
  int columns(long block) const { return std::min(width, vocab - block * width); }
};

struct Tensors {
  In hidden, weight;
  const int64_t *targets, *kept;  // of all rows; those that count, in order, or null: all do
  In token_weight, upstream;      // null: 1
  float *losses, *lse, *correct, *dhidden, *dweight;  // the last three null where not wanted
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
    panels = hidden + (t->kept ? n * d : 0);
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

// The loss of a row, and what its gradient is made of
static void join(const Shape* s, const Tensors* t, const Space& made, int r, long of) {
  const float share = s->smoothing / s->vocab;
  float peak = -INFINITY, sum = 0, all = 0;
  for (long b = 0; b < s->blocks(); b++) peak = std::max(peak, made.stats[b * s->chunk + r].peak);
  for (long b = 0; b < s->blocks(); b++) {
    Stat stat = made.stats[b * s->chunk + r];
    const bool as_it_is = stat.peak == peak || stat.peak == -INFINITY;
    sum += as_it_is ? stat.sum : stat.sum * std::exp(stat.peak - peak);
    all += stat.total;
  }
  const long target = t->targets[of], block = target / s->width;
  const bool valid = target >= 0 && target < s->vocab;
  const float x = valid ? made.logits[(block * s->chunk + r) * s->width + target % s->width] : NAN;
  const float log_sum = std::log(sum), lse = peak + log_sum, nll = log_sum - (x - peak);
  float loss = nll * (1 - s->smoothing), slope = 1;
  if (s->z_loss) loss += s->z_loss * lse * lse, slope += 2 * s->z_loss * lse;
  if (s->smoothing) loss += s->smoothing * lse - share * all;
  const float weight = (t->token_weight ? t->token_weight[of] : 1) * s->scale;
  const float factor = valid ? weight * (t->upstream ? t->upstream[of] : 1) : NAN;
  const float capped = s->softcap ? x / s->softcap : 0;
  t->losses[of] = loss * weight;
  t->lse[of] = lse;
  const bool is_largest = valid && (x == peak || std::isnan(x));
  if (t->correct) t->correct[of] = is_largest && is_first_largest(s, made, r, target, x);
  made.rows[r] = {of, valid ? target : -1, peak, factor * slope / sum, factor * share,
                  factor * (1 - s->smoothing) * (1 - capped * capped)};
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

extern "C" long linear_cross_entropy_space(const Shape* s, const Tensors* t) {
  return Space(s, t, nullptr).end - (float*)nullptr;
}

extern "C" void linear_cross_entropy(const Shape* s, const Tensors* t, float* space) {
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
    for (int r = 0; r < rows; r++)
      join(s, t, made, r, t->kept ? t->kept[start + r] : start + r);
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
