namespace attention {

#pragma GCC optimize("fp-contract=fast")
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef const float* In;
typedef const long* Strides;  // of B, T and heads; that of K is 1

static Lanes& at(float* p) { return *(Lanes*)p; }
static Lanes at(In p) { return *(const Lanes*)p; }

// of x <= 0; NaN stays NaN, and nothing is denormal
static Lanes exponential(Lanes given) {
  Lanes x = given < -87.f ? Lanes{} - 87.f : given;
  Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  Lanes f = __builtin_convertvector(n, Lanes);
  Lanes r = (x - f * 0.693359375f) + f * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  p *= (Lanes)((n + 127) << 23);
  return given < -87.f ? Lanes{} : p;
}

// R rows of 16 columns of C, in registers
template <int R>
static void tile(int depth, In a, long a_row, long a_col, In b, long b_row, float* c, long c_row,
                 bool add) {
  Lanes s[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
    s[i][0] = add ? at(c + i * c_row) : Lanes{};
    s[i][1] = add ? at(c + i * c_row + 8) : Lanes{};
  }
  for (int k = 0; k < depth; k++) {
    Lanes low = at(b + k * b_row), high = at(b + k * b_row + 8);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      float x = a[i * a_row + k * a_col];
      s[i][0] += x * low;
      s[i][1] += x * high;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
    at(c + i * c_row) = s[i][0];
    at(c + i * c_row + 8) = s[i][1];
  }
}

// C (m, n) = A (m, depth) · B (depth, n), or added to it; n is a multiple of 16
static void product(int m, int n, int depth, In a, long a_row, long a_col, In b, long b_row,
                    float* c, long c_row, bool add = false) {
  typedef decltype(&tile<1>) Tile;
  static const Tile tiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  for (int j = 0; j < n; j += 16)
    for (int i = 0; i < m; i += 6)
      tiles[std::min(m - i, 6) - 1](depth, a + i * a_row, a_row, a_col, b + j, b_row,
                                    c + i * c_row + j, c_row, add);
}

static constexpr int ROWS = 32;  // queries at a time

// out (dim, ROWS) = scale · xᵀ of x (n, dim); columns beyond n are zero
static void turn(In x, long row, int n, int dim, float scale, float* out) {
  for (int k = 0; k < dim; k++) {
    for (int i = 0; i < n; i++) out[k * ROWS + i] = x[i * row + k] * scale;
    for (int i = n; i < ROWS; i++) out[k * ROWS + i] = 0;
  }
}

// What a block needs first lies in another core's cache, in rows too short and too far apart for
// the processor to foresee: without this, forward takes 1.25 times as long at T=64.
static void fetch(In x, long row, int n, int dim) {
  for (int i = 0; i < n; i++)
    for (int k = 0; k < dim; k += 16) __builtin_prefetch(x + i * row + k);
}

// p (end, ROWS): of query first + i hide the keys behind it
static void hide(float* p, int first, int end) {
  for (int j = first; j < end; j++)
    for (int i = 0; i < j - first; i++) p[j * ROWS + i] = -INFINITY;
}

static float* scratch(size_t size) {
  static thread_local std::vector<float> space;
  if (space.size() < size) space.resize(size);
  return space.data();
}

extern "C" void forward(In q, In k, In v, float* y, float* lse, Strides qs, Strides ks, Strides vs,
                        int n_batch, int t, int n_heads, int n_kv, int dim, int n_threads) {
  const float scale = 1 / std::sqrt((float)dim);
  const long y_row = (long)n_heads * dim;
  const int n_blocks = (t + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
  for (long task = (long)n_batch * n_heads * n_blocks - 1; task >= 0; task--) {
    long unit = task / n_blocks, b = unit / n_heads, h = unit % n_heads, g = h / (n_heads / n_kv);
    int first = task % n_blocks * ROWS, rows = std::min(ROWS, t - first), end = first + rows;
    float *qt = scratch((size_t)(dim + t) * ROWS), *p = qt + dim * ROWS;
    In q1 = q + b * qs[0] + h * qs[2] + first * qs[1];
    In k1 = k + b * ks[0] + g * ks[2], v1 = v + b * vs[0] + g * vs[2];
    fetch(q1, qs[1], rows, dim);
    fetch(k1, ks[1], end, dim);
    turn(q1, qs[1], rows, dim, scale, qt);
    product(end, ROWS, dim, k1, ks[1], 1, qt, ROWS, p, ROWS);
    fetch(v1, vs[1], end, dim);
    hide(p, first, end);
    for (int i = 0; i < ROWS; i += 8) {
      Lanes most = at(p + i), sum{};
      for (int j = 1; j < end; j++) {
        Lanes x = at(p + j * ROWS + i);
        most = most > x ? most : x;
      }
      for (int j = 0; j < end; j++) {
        Lanes& x = at(p + j * ROWS + i);
        x = exponential(x - most);
        sum += x;
      }
      for (int j = 0; j < end; j++) at(p + j * ROWS + i) /= sum;
      for (int r = 0; r < std::min(8, rows - i); r++)
        lse[unit * t + first + i + r] = most[r] + std::log(sum[r]);
    }
    product(rows, dim, end, p, 1, ROWS, v1, vs[1], y + (b * t + first) * y_row + h * dim, y_row);
  }
}

extern "C" void backward(In q, In k, In v, In y, In lse, In dy, float* dq, float* dk, float* dv,
                         Strides qs, Strides ks, Strides vs, Strides ds, int n_batch, int t,
                         int n_heads, int n_kv, int dim, int n_threads) {
  const int group = n_heads / n_kv;
  const float scale = 1 / std::sqrt((float)dim);
  const long q_row = (long)n_heads * dim, k_row = (long)n_kv * dim;
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
  for (int unit = 0; unit < n_batch * n_kv; unit++) {
    float *qt = scratch((size_t)2 * (dim + t) * ROWS), *dyt = qt + dim * ROWS;
    float *p = dyt + dim * ROWS, *dp = p + (size_t)t * ROWS;
    long b = unit / n_kv, g = unit % n_kv;
    In k1 = k + b * ks[0] + g * ks[2], v1 = v + b * vs[0] + g * vs[2];
    float *dk1 = dk + b * t * k_row + g * dim, *dv1 = dv + b * t * k_row + g * dim;
    for (int i = 0; i < t; i++) {
      std::fill_n(dk1 + i * k_row, dim, 0.f);
      std::fill_n(dv1 + i * k_row, dim, 0.f);
    }
    for (long h = g * group; h < (g + 1) * group; h++)
      for (int first = 0; first < t; first += ROWS) {
        int rows = std::min(ROWS, t - first), end = first + rows;
        In q1 = q + b * qs[0] + h * qs[2] + first * qs[1];
        In dy1 = dy + b * ds[0] + h * ds[2] + first * ds[1];
        long offset = (b * t + first) * q_row + h * dim;  // of y and dq
        fetch(dy1, ds[1], rows, dim);
        fetch(y + offset, q_row, rows, dim);
        fetch(q1, qs[1], rows, dim);
        if (h == g * group) {
          fetch(k1 + first * ks[1], ks[1], rows, dim);
          fetch(v1 + first * vs[1], vs[1], rows, dim);
        }
        float delta[ROWS] = {}, lse1[ROWS] = {};
        for (int i = 0; i < rows; i++) {
          Lanes sum{};
          for (int j = 0; j < dim; j += 8)
            sum += at(dy1 + i * ds[1] + j) * at(y + offset + i * q_row + j);
          for (int j = 0; j < 8; j++) delta[i] += sum[j];
          lse1[i] = lse[(b * n_heads + h) * t + first + i];
        }
        turn(q1, qs[1], rows, dim, scale, qt);
        turn(dy1, ds[1], rows, dim, 1, dyt);
        product(end, ROWS, dim, k1, ks[1], 1, qt, ROWS, p, ROWS);
        product(end, ROWS, dim, v1, vs[1], 1, dyt, ROWS, dp, ROWS);
        hide(p, first, end);
        for (int j = 0; j < end; j++)
          for (int i = 0; i < ROWS; i += 8) {
            Lanes &e = at(p + j * ROWS + i), &d = at(dp + j * ROWS + i);
            e = exponential(e - at(lse1 + i));
            d = e * (d - at(delta + i)) * scale;
          }
        product(rows, dim, end, dp, 1, ROWS, k1, ks[1], dq + offset, q_row);
        product(end, dim, rows, dp, ROWS, 1, q1, qs[1], dk1, k_row, true);
        product(end, dim, rows, p, ROWS, 1, dy1, ds[1], dv1, k_row, true);
      }
  }
}

}
using attention::forward; using attention::backward;
