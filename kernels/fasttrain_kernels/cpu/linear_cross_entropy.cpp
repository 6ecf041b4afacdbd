// A linear layer and its cross-entropy, gradients included. Compiled behind product.h.
//
// A task makes the logits of a block of `width` columns for a group of rows, which stay in the
// cache, and keeps their exponentials, the operands of both gradients, in T: by rows, and packed.
// They are relative to a guess of the target's logit, so that none waits for the sum of its row; by
// that the gradient of the hidden states is multiplied when it is made, and for that of the weight
// the hidden states are. What the target adds is made in fp32. Where a guess is far below a logit,
// or a target is none, all is left to torch. Parts of the blocks, of a fixed number, add up to the
// gradient of the hidden states, so that nothing depends on the number of threads.

static const long GROUP = 64;  // rows of a task, for which operands stay in the second cache
static const long TASKS = 16;  // at least, of the gradient of the weight
static const long LEAST = std::max(16L, WHOLE);  // columns of logits are a multiple of it

struct Shape {
  long n, dim, vocab, hidden_row, weight_row, ignored, chunk, width, parts, threads;
  float z_loss, softcap, scale;
  long even() const { return round_up(chunk, WHOLE); }
  long blocks() const { return (vocab + width - 1) / width; }
  long columns(long block) const { return std::min(width, vocab - block * width); }
  long ranges() const { return std::clamp(TASKS / blocks(), 1L, (dim + PANEL - 1) / PANEL); }
};

struct Tensors {
  const T* hidden;
  In weight;
  const int64_t* targets;
  In token_weight, upstream;  // null: 1
  float *losses, *lse, *correct;
  T* dhidden;
  float* dweight;  // the last three null where not wanted
  bool wants_grads() const { return dhidden || dweight; }
};

struct Stat {
  float sum, peak;  // sum of exp(x - from), and the largest x
  long at;          // the column where it is first
};

struct Row {
  long of, target;   // its number among all, and a column
  float from, hit;   // a guess of the target's logit, and the logit
  float slope, own;  // the gradient is slope times what is kept, and `own` at the target
};

struct Space : Parts {
  const Shape* s;
  const Tensors* t;
  Row* rows = take<Row>(s->chunk);
  Stat* stats = take<Stat>(s->blocks() * s->chunk);
  // What is kept of a block: (chunk, width), and packed, with zeros behind the last row
  T* kept = take<T>(t->wants_grads() ? s->blocks() * s->even() * s->width : 0);
  T* packed = take<T>(t->wants_grads() ? s->blocks() * s->even() * s->width : 0);
  T* hidden = take<T>(s->chunk * s->dim);
  T* scaled = take<T>(s->chunk * s->dim);
  T* turned = take<T>(t->dweight ? (s->even() + 32) * s->dim : 0);
  // The weight, packed block by block
  T* turned_weight = take<T>(s->blocks() * s->width * s->dim);
  T* weight = take<T>(t->dhidden ? s->blocks() * s->width * s->dim : 0);
  float* sums = take<float>(t->dhidden ? s->parts * s->chunk * s->dim : 0);
};

// What is known and kept of logits of a block in PAIR rows or fewer, from the first on: of each
// exp(x - from), times the slope of its cap, by rows and packed. Behind n columns there is space up
// to a multiple of 32.
static void keep(const Shape* s, const Tensors* t, const Space& made, long block, long first,
                 long rows, long depth, float* logits) {
  const long n = s->columns(block), end = round_up(n, 32), column = block * s->width;
  const bool keeps = t->wants_grads();
  T* kept = made.kept + (block * s->even() + first) * s->width;
  T* packed = made.packed + block * s->even() * s->width + first * PANEL;
  Stat* stats = made.stats + block * s->chunk + first;
  Row* of = made.rows + first;
  for (long p = 0; p < rows; p++) {
    float* x = logits + p * s->width;
    for (long i = 0; s->softcap && i < end; i += LANES)  // softcap · tanh(x / softcap)
      set(x + i, s->softcap * (2 / (1 + exponential(-2 / s->softcap * get(x + i))) - 1));
    if (of[p].target >= column && of[p].target < column + n) of[p].hit = x[of[p].target - column];
    const long at = t->correct ? std::max_element(x, x + n) - x : 0;
    stats[p] = {0, x[at], column + at};
    std::fill(x + n, x + end, of[p].from - 200);
  }
  Lanes sums[PAIR] = {};
  for (long i = 0; i < end; i += LANES) {
    Lanes e[PAIR] = {};
#pragma GCC unroll 2
    for (long p = 0; p < PAIR && p < rows; p++) {
      const Lanes y = get(logits + p * s->width + i);
      sums[p] += e[p] = exponential(y - of[p].from);
      if (s->softcap) e[p] *= 1 - y / s->softcap * (y / s->softcap);
    }
    T* of_panel = packed + i / PANEL * PANEL * depth + i % PANEL * PAIR;
    if (keeps) set_rows(of_panel, kept + i, s->width, e);
  }
  for (long p = 0; p < rows; p++) {
    stats[p].sum = sum(sums[p]);
    const long i = of[p].target - column;
    if (keeps && i >= 0 && i < n)
      kept[p * s->width + i] = packed[i / PANEL * PANEL * depth + i % PANEL * PAIR + p] = T{};
  }
}

// The weight of a block of columns, as logits and as gradients of hidden states take it
static void pack_weight(const Shape* s, const Tensors* t, const Space& made, long block) {
  const long d = s->dim, n = s->columns(block), end = round_up(n, LEAST);
  const long start = block * s->width * d;
  T* weight = SCRATCH(T)(n * d);
  for (long j = 0; j < n; j++)
    convert(t->weight + (block * s->width + j) * s->weight_row, d, weight + j * d);
  for (long j = 0; j < end; j += PANEL)
    pack_turned(weight + j * d, d, std::min(PANEL, n - j), d,
                made.turned_weight + start + j * d, std::min(PANEL, end - j));
  if (t->dhidden)
    pack(weight, d, n, round_up(n, 32), d, 0, round_up(n, 32), made.weight + start);
}

// A row of hidden states, and a guess of its target's logit
static void begin(const Shape* s, const Tensors* t, const Space& made, long r, long of) {
  const long d = s->dim, target = std::clamp(t->targets[of], 0L, s->vocab - 1);
  const T* hidden = t->hidden + of * s->hidden_row;
  std::copy_n(hidden, d, made.hidden + r * d);
  Lanes dots = {};
  for (long i = 0; i < d; i += LANES)
    dots += get(hidden + i) * get(t->weight + target * s->weight_row + i);
  const float x = sum(dots);
  made.rows[r] = {of, target, s->softcap ? s->softcap * std::tanh(x / s->softcap) : x};
}

// Logits of a block of columns for rows from the first on, and what is kept of them; behind the
// last row of a chunk there are zeros
static void enter(const Shape* s, const Tensors* t, const Space& made, long block, long first,
                  long end_row, long rows) {
  const long d = s->dim, some = end_row - first, depth = round_up(rows, WHOLE);
  float* logits = SCRATCH(float)(some * s->width);
  product(some, round_up(s->columns(block), LEAST), d, made.hidden + first * d, d,
          made.turned_weight + block * s->width * d, logits, s->width);
  for (long r = first; r < (end_row == rows ? depth : end_row); r += PAIR)
    keep(s, t, made, block, r, std::clamp(end_row - r, 0L, PAIR), depth,
         logits + (r - first) * s->width);
}

// The loss of a row, and what its gradient is made of; returns whether they are right
static bool join(const Shape* s, const Tensors* t, const Space& made, long r) {
  Row& row = made.rows[r];
  Stat all = made.stats[r];
  for (long b = 1; b < s->blocks(); b++) {
    const Stat stat = made.stats[b * s->chunk + r];
    const float sum = all.sum + stat.sum;
    if (stat.peak > all.peak) all = stat;
    all.sum = sum;
  }
  const float x = row.hit, log_sum = std::log(all.sum), lse = row.from + log_sum;
  const float weight = (t->token_weight ? t->token_weight[row.of] : 1) * s->scale;
  const float up = weight * (t->upstream ? t->upstream[row.of] : 1);
  const float cap = s->softcap ? 1 - x / s->softcap * (x / s->softcap) : 1;
  t->losses[row.of] = (log_sum - (x - row.from) + s->z_loss * lse * lse) * weight;
  t->lse[row.of] = lse;
  if (t->correct) t->correct[row.of] = all.at == row.target;
  row.slope = up * (1 + 2 * s->z_loss * lse) / all.sum;
  row.own = (row.slope * std::exp(x - row.from) - up) * cap;
  for (long i = r * s->dim; t->dweight && i < (r + 1) * s->dim; i += LANES)
    set(made.scaled + i, row.slope * get(made.hidden + i));
  return all.sum < 1e20f && row.target == t->targets[row.of];
}

// What one part of the blocks adds to the gradient of the hidden states in rows from the first on
static void leave(const Shape* s, const Space& made, long part, long first, long end_row) {
  const long d = s->dim, some = end_row - first, from = s->blocks() * part / s->parts;
  float* sums = made.sums + (part * s->chunk + first) * d;
  fetch<1>(sums, some, d, d);
  for (long block = from; block < s->blocks() * (part + 1) / s->parts; block++) {
    const T* kept = made.kept + (block * s->even() + first) * s->width;
    fetch(kept, some, s->width, s->width);
    product(some, d, round_up(s->columns(block), 32), kept, s->width,
            made.weight + block * s->width * d, sums, d, block > from ? sums : nullptr);
  }
}

// The gradient of the hidden states of a row
static void finish(const Shape* s, const Tensors* t, const Space& made, long r) {
  const long d = s->dim;
  const Row row = made.rows[r];
  In weight = t->weight + row.target * s->weight_row;
  for (long i = 0; i < d; i += LANES) {
    Lanes all = {};
    for (long p = 0; p < s->parts; p++) all += get(made.sums + (p * s->chunk + r) * d + i);
    set(t->dhidden + row.of * d + i, row.slope * all + row.own * get(weight + i));
  }
}

// The gradient of a block of the weight, or of a range of its columns, from the rows of a chunk
static void weigh(const Shape* s, const Tensors* t, const Space& made, long block, long range,
                  long rows, bool add) {
  const long d = s->dim, n = s->columns(block), n_panels = (d + PANEL - 1) / PANEL;
  const long from = n_panels * range / s->ranges() * PANEL, depth = round_up(rows, WHOLE);
  const long to = std::min(d, n_panels * (range + 1) / s->ranges() * PANEL), row = depth + 32;
  const long end = round_up(n, 32), column = block * s->width;
  float *turned = SCRATCH(float)((to - from) * end), *dweight = t->dweight + column * d + from;
  product(to - from, end, depth, made.turned + from * row, row,
          made.packed + block * s->even() * s->width, turned, end);
  transpose(turned, end, to - from, n, dweight, d, add);
  for (long r = 0; r < rows; r++) {
    const long target = made.rows[r].target - column;
    if (target < 0 || target >= n) continue;
    for (long i = from; i < to; i += LANES) {
      float* y = dweight + target * d + i - from;
      set(y, get(y) + made.rows[r].own * get(made.hidden + r * d + i));
    }
  }
}

// Of the rows that are kept; returns whether all is right
static bool compute(const Space& made, const Shape* s, const Tensors* t,
                    const std::vector<long>& kept) {
  const long d = s->dim, n = kept.size();
  std::atomic<bool> right{true};
#pragma omp parallel num_threads(s->threads)
  {
    const Tiles tiles;
#pragma omp for schedule(static)
    for (long block = 0; block < s->blocks(); block++) pack_weight(s, t, made, block);
    for (long start = 0; start < n; start += s->chunk) {
      const long rows = std::min(s->chunk, n - start), depth = round_up(rows, WHOLE);
      const long groups = (rows + GROUP - 1) / GROUP;
#pragma omp for schedule(static)
      for (long r = 0; r < rows; r++) begin(s, t, made, r, kept[start + r]);
#pragma omp for schedule(dynamic)
      for (long i = 0; i < s->blocks() * groups; i++) {
        const long first = i % groups * GROUP;
        enter(s, t, made, i / groups, first, std::min(rows, first + GROUP), rows);
      }
#pragma omp for schedule(static)
      for (long r = 0; r < rows; r++)
        if (!join(s, t, made, r)) right = false;
      if (t->dweight) {
#pragma omp for schedule(static)
        for (long j = 0; j < d; j += PANEL)
          turn(made.scaled + j, d, rows, std::min(PANEL, d - j), made.turned + j * (depth + 32),
               depth + 32);
      }
      if (t->dhidden) {
#pragma omp for schedule(dynamic)
        for (long i = 0; i < s->parts * groups; i++) {
          const long first = i % groups * GROUP;
          leave(s, made, i / groups, first, std::min(rows, first + GROUP));
        }
#pragma omp for schedule(static) nowait
        for (long r = 0; r < rows; r++) finish(s, t, made, r);
      }
      if (t->dweight) {
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < s->blocks() * s->ranges(); i++)
          weigh(s, t, made, i / s->ranges(), i % s->ranges(), rows, start > 0);
      }
#pragma omp barrier
    }
  }
  return right;
}

extern "C" int linear_cross_entropy(const Shape* s, const Tensors* t) {
  std::vector<long> kept;
  for (long r = 0; r < s->n; r++) {
    if (t->targets[r] != s->ignored) kept.push_back(r);
    if (t->targets[r] != s->ignored) continue;
    t->losses[r] = t->lse[r] = 0;
    if (t->correct) t->correct[r] = 0;
    if (t->dhidden) std::fill_n(t->dhidden + r * s->dim, s->dim, T{});
  }
  if (kept.empty() && t->dweight) std::fill_n(t->dweight, s->vocab * s->dim, 0.f);
  const std::unique_ptr<Line[]> memory(new Line[Space{{nullptr}, s, t}.lines()]);
  return kept.empty() || compute({{memory[0].bytes}, s, t}, s, t, kept);
}
