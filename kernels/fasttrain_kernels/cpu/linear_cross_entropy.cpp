// A linear layer and its cross-entropy, gradients included. Compiled behind product.h.
//
// Logits lie in blocks of `width` columns, each (chunk, width). A task makes those of a block for a
// group of rows, with maximum and sum of exponentials of each row. When those of all blocks are
// joined, the gradient takes the place of the logits, in T. That of the hidden states is summed up
// over a fixed number of parts of the blocks, so that nothing depends on the number of threads.

static const long AT_A_TIME = 128;  // rows for which operands stay in the second cache
static const long TASKS = 16;       // at least, of a chunk that has 64 rows for each

struct Shape {
  long n, dim, vocab, hidden_row, weight_row, ignored, chunk, width, parts, threads;
  float smoothing, z_loss, softcap, scale;
  long blocks() const { return (vocab + width - 1) / width; }
  long columns(long block) const { return std::min(width, vocab - block * width); }
  long group() const { return std::max(64L, round_up(chunk * parts / TASKS, 16)); }
  long groups(long rows) const { return (rows + group() - 1) / group(); }
  long ranges() const { return std::clamp(TASKS / blocks(), 1L, (dim + PANEL - 1) / PANEL); }
};

struct Tensors {
  const T *hidden, *weight;
  const int64_t* targets;
  In token_weight, upstream;  // null: 1
  float *losses, *lse, *correct;
  T* dhidden;
  float* dweight;  // the last three null where not wanted
};

struct Stat {
  float peak, sum, total;  // sum of exp(x - peak); of x
};

struct Row {
  long of;      // its number among all
  long target;  // -1: none
  float peak, slope, base, hit;  // gradient: slope·exp(x - peak) - base, less hit at the target
};

struct Space : Parts {
  const Shape* s;
  const Tensors* t;
  Row* rows = take<Row>(s->chunk);
  Stat* stats = take<Stat>(s->blocks() * s->chunk);
  float* logits = take<float>(s->blocks() * s->chunk * s->width);
  T* hidden = take<T>(s->chunk * s->dim);
  T* packed = take<T>(t->dweight ? round_up(s->chunk, WHOLE) * s->dim : 0);
  // The weight, packed block by block
  T* turned_weight = take<T>(s->blocks() * s->width * s->dim);
  T* weight = take<T>(t->dhidden ? s->blocks() * s->width * s->dim : 0);
  float* sums = take<float>(t->dhidden ? s->parts * s->chunk * s->dim : 0);
};

// Of n logits, behind which there is space up to a whole vector
static Stat measure(float* x, long n, const Shape* s) {
  const long end = round_up(n, LANES);
  if (s->softcap)
    for (long i = 0; i < end; i += LANES) {
      const Lanes y = get(x + i), size = y < 0 ? -y : y, e = exponential(-2 * size / s->softcap);
      const Lanes capped = s->softcap * (1 - e) / (1 + e);
      set(x + i, y < 0 ? -capped : capped);
    }
  std::fill(x + n, x + end, 0.f);
  Lanes totals = {}, sums = {};
  for (long i = 0; s->smoothing && i < end; i += LANES) totals += get(x + i);
  std::fill(x + n, x + end, -INFINITY);
  Lanes peaks = get(x);
  for (long i = LANES; i < end; i += LANES) peaks = larger(get(x + i), peaks);
  const float peak = largest(peaks), from = peak == -INFINITY ? 0 : peak;
  for (long i = 0; i < end; i += LANES) sums += exponential(get(x + i) - from);
  return {peak, sum(sums), sum(totals)};
}

// Writes the gradient of n logits over them, in T, and zeros behind it up to the end
template <bool CAPPED>
static void differentiate(float* x, long n, long end, Row row, float softcap, long first) {
  const auto gradient = [=](Lanes x, float hit) {
    const Lanes g = row.slope * exponential(x - row.peak) - row.base - hit;
    return CAPPED ? g * (1 - x / softcap * (x / softcap)) : g;
  };
  const long target = row.target - first;
  const bool hits = target >= 0 && target < n;
  T at_target[LANES], *d = (T*)x;  // never ahead of what is still to be read
  if (hits) set(at_target, gradient(Lanes{} + x[target], row.hit));
  for (long i = 0; i < n; i += LANES) set(d + i, gradient(get(x + i), 0));
  std::fill(d + n, d + end, T{});
  if (hits) d[target] = at_target[0];
}

// The weight of a block of columns, as logits and as gradients of hidden states take it
static void pack_weight(const Shape* s, const Tensors* t, const Space& made, long block) {
  const long d = s->dim, n = s->columns(block), end = round_up(n, 16), start = block * s->width * d;
  const T* weight = t->weight + block * s->width * s->weight_row;
  for (long j = 0; j < end; j += PANEL)
    pack_turned(weight + j * s->weight_row, s->weight_row, std::min(PANEL, n - j), d,
                made.turned_weight + start + j * d, std::min(PANEL, end - j));
  if (t->dhidden)
    pack(weight, s->weight_row, n, round_up(n, 32), d, 0, round_up(n, 32), made.weight + start);
}

// Logits of a block of columns for rows from the first on, and what is known of each from them
static void enter(const Shape* s, const Space& made, long block, long first, long end_row) {
  const long d = s->dim, n = s->columns(block);
  const T* panels = made.turned_weight + block * s->width * d;
  for (; first < end_row; first += AT_A_TIME) {
    const long some = std::min(AT_A_TIME, end_row - first);
    float* logits = made.logits + (block * s->chunk + first) * s->width;
    product(some, round_up(n, 16), d, made.hidden + first * d, d, panels, logits, s->width);
    for (long r = 0; r < some; r++)
      made.stats[block * s->chunk + first + r] = measure(logits + r * s->width, n, s);
  }
}

static bool is_first_largest(const Shape* s, const Space& made, long r, long target, float value) {
  for (long i = 0; i < target; i++) {
    float x = made.logits[(i / s->width * s->chunk + r) * s->width + i % s->width];
    if (std::isnan(value) ? std::isnan(x) : !(x < value)) return false;
  }
  return true;
}

// The loss of a row, and what its gradient is made of
static void join(const Shape* s, const Tensors* t, const Space& made, long r) {
  Stat all = {-INFINITY, 0, 0};
  for (long b = 0; b < s->blocks(); b++)
    all.peak = std::max(all.peak, made.stats[b * s->chunk + r].peak);
  for (long b = 0; b < s->blocks(); b++) {
    Stat stat = made.stats[b * s->chunk + r];
    const bool as_it_is = stat.peak == all.peak || stat.peak == -INFINITY;
    all.sum += as_it_is ? stat.sum : stat.sum * std::exp(stat.peak - all.peak);
    all.total += stat.total;
  }
  const long of = made.rows[r].of, target = t->targets[of], block = target / s->width;
  const bool valid = target >= 0 && target < s->vocab;
  const float x = valid ? made.logits[(block * s->chunk + r) * s->width + target % s->width] : NAN;
  const float share = s->smoothing / s->vocab, log_sum = std::log(all.sum);
  const float lse = all.peak + log_sum, nll = log_sum - (x - all.peak);
  float loss = nll * (1 - s->smoothing), slope = 1;
  if (s->z_loss) loss += s->z_loss * lse * lse, slope += 2 * s->z_loss * lse;
  if (s->smoothing) loss += s->smoothing * lse - share * all.total;
  const float weight = (t->token_weight ? t->token_weight[of] : 1) * s->scale;
  const float factor = valid ? weight * (t->upstream ? t->upstream[of] : 1) : NAN;
  t->losses[of] = loss * weight;
  t->lse[of] = lse;
  made.rows[r] = {of, valid ? target : -1, all.peak, factor * slope / all.sum, factor * share,
                  factor * (1 - s->smoothing)};
  const bool is_largest = valid && (x == all.peak || std::isnan(x));
  if (t->correct) t->correct[of] = is_largest && is_first_largest(s, made, r, target, x);
}

// Gradients of the logits of one part of the blocks in rows from the first on, and what they add to
// those of the hidden states
static void leave(const Shape* s, const Tensors* t, const Space& made, long part, long start,
                  long end_row) {
  const long d = s->dim, from = s->blocks() * part / s->parts;
  const long to = s->blocks() * (part + 1) / s->parts, x_row = s->width * sizeof(float) / sizeof(T);
  for (long block = from; block < to; block++) {
    const long n = s->columns(block), end = round_up(n, 32), column = block * s->width;
    for (long first = start; first < end_row; first += AT_A_TIME) {
      const long some = std::min(AT_A_TIME, end_row - first);
      float* x = made.logits + (block * s->chunk + first) * s->width;
      for (long r = 0; r < some; r++)
        (s->softcap ? differentiate<true> : differentiate<false>)(
            x + r * s->width, n, end, made.rows[first + r], s->softcap, column);
      float* sums = made.sums + (part * s->chunk + first) * d;
      if (t->dhidden)
        product(some, d, end, (const T*)x, x_row, made.weight + column * d, sums, d,
                block > from ? sums : nullptr);
    }
  }
}

// The gradient of a block of the weight, or of a range of its columns, from the rows of a chunk
static void weigh(const Shape* s, const Tensors* t, const Space& made, long block, long range,
                  long rows, bool add) {
  const long d = s->dim, n = s->columns(block), n_panels = (d + PANEL - 1) / PANEL;
  const long from = n_panels * range / s->ranges() * PANEL, depth = round_up(rows, WHOLE);
  const long to = std::min(d, n_panels * (range + 1) / s->ranges() * PANEL), row = depth + 32;
  T* turned = SCRATCH(T)(n * row);
  turn((const T*)(made.logits + block * s->chunk * s->width), s->width * sizeof(float) / sizeof(T),
       rows, n, turned, row);
  float* dweight = t->dweight + block * s->width * d + from;
  product(n, to - from, depth, turned, row, made.packed + from * depth, dweight, d,
          add ? dweight : nullptr);
}

// Of the rows that are kept
static void compute(const Space& made, const Shape* s, const Tensors* t,
                    const std::vector<long>& kept) {
  const long d = s->dim, n = kept.size();
#pragma omp parallel num_threads(s->threads)
  {
    const Tiles tiles;
#pragma omp for schedule(static)
    for (long block = 0; block < s->blocks(); block++) pack_weight(s, t, made, block);
    for (long start = 0; start < n; start += s->chunk) {
      const long rows = std::min(s->chunk, n - start), depth = round_up(rows, WHOLE);
      const long groups = s->groups(rows), group = s->group();
#pragma omp for schedule(static)
      for (long r = 0; r < rows; r++) {
        made.rows[r].of = kept[start + r];
        std::copy_n(t->hidden + made.rows[r].of * s->hidden_row, d, made.hidden + r * d);
      }
      if (t->dweight) {
#pragma omp for schedule(static) nowait
        for (long j = 0; j < d; j += PANEL)
          pack_rows(made.hidden + j, d, rows, depth, std::min(PANEL, d - j),
                    made.packed + j * depth);
      }
#pragma omp for schedule(dynamic)
      for (long i = 0; i < s->blocks() * groups; i++) {
        const long first = i % groups * group;
        enter(s, made, i / groups, first, std::min(rows, first + group));
      }
#pragma omp for schedule(static)
      for (long r = 0; r < rows; r++) join(s, t, made, r);
      if (!t->dhidden && !t->dweight) continue;
#pragma omp for schedule(dynamic)
      for (long i = 0; i < s->parts * groups; i++) {
        const long first = i % groups * group;
        leave(s, t, made, i / groups, first, std::min(rows, first + group));
      }
      if (t->dweight) {
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < s->blocks() * s->ranges(); i++)
          weigh(s, t, made, i / s->ranges(), i % s->ranges(), rows, start > 0);
      }
      if (t->dhidden) {
#pragma omp for schedule(static) nowait
        for (long r = 0; r < rows; r++) {
          float* sum = made.sums + r * d;
          for (long p = 1; p < s->parts; p++) {
            In more = sum + p * s->chunk * d;
            for (long i = 0; i < d; i++) sum[i] += more[i];
          }
          convert(sum, d, t->dhidden + made.rows[r].of * d);
        }
      }
#pragma omp barrier
    }
  }
}

extern "C" long linear_cross_entropy_space(const Shape* s, const Tensors* t) {  // in bytes
  return Space{{nullptr}, s, t}.next - (char*)nullptr;
}

extern "C" void linear_cross_entropy(const Shape* s, const Tensors* t, char* space) {
  std::vector<long> kept;
  for (long r = 0; r < s->n; r++) {
    if (t->targets[r] != s->ignored) kept.push_back(r);
    if (t->targets[r] != s->ignored) continue;
    t->losses[r] = t->lse[r] = 0;
    if (t->correct) t->correct[r] = 0;
    if (t->dhidden) std::fill_n(t->dhidden + r * s->dim, s->dim, T{});
  }
  if (kept.empty() && t->dweight) std::fill_n(t->dweight, s->vocab * s->dim, 0.f);
  if (!kept.empty()) compute({{space}, s, t}, s, t, kept);
}
