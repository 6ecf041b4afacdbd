// What blocks of the Transformer on a CPU are made of: norms, RoPE and activations row by row, and
// gradients of weights. Built behind cpu/product.h of the kernels, in front of blocks.cpp.

static const int ROWS = 24;

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

// The sum of vectors of n numbers, each behind the one before
static void add_up(In all, long n_vectors, long distance, long n, float* sum) {
  std::copy_n(all, n, sum);
  for (long v = 1; v < n_vectors; v++)
    for (long i = 0; i < n; i++) sum[i] += all[v * distance + i];
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
