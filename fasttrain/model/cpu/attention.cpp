// Causal attention on a CPU in fp32, both ways: see attention.py. Built behind turns.h, and
// in front of what calls it.
//
// A block is SIDE queries of a head. Its scores are kept turned, (keys, queries): queries lie along
// a vector's lanes, and no sum or maximum runs across lanes. A strip is up to six rows of a
// product, and skips what is hidden from all of it. What a core fetched ahead is mostly its own
// next task (turns.h).
#pragma GCC optimize("fp-contract=fast")
#define PICK(x, y, ...) __builtin_shuffle(x, y, Ints{__VA_ARGS__})
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace attention {

typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef const float* In;
typedef const long* Strides;  // of B, T and heads; that of K is 1

static Lanes& at(float* p) { return *(Lanes*)p; }

// of x <= 0; NaN stays NaN, and nothing is denormal. Cephes's range, with a polynomial of its own:
// the best in relative error, 9e-8, of degree 5 that is 1 at 0, for powers of two from -1/2 to 1/2
static Lanes exponential(Lanes x) {
  const float log2e = 1.44269504f;
  const float round = 12582912.f + 127;  // leaves an integer, and 127, in the lowest bits of a sum
  Lanes n = x * log2e + round, f = x * log2e - (n - round), square = f * f;
  Lanes p = (f * 1.33988743e-3f + 9.61843736e-3f) + square * 1.53533619e-4f;
  p = (f * 5.55033247e-2f + 2.40226479e-1f) + square * p;
  p = (f * 6.93147203e-1f + 1.f) + square * p;
  p *= (Lanes)((Ints)n << 23);
  return x < -87.f ? Lanes{} : p;
}

// of x >= 1; NaN stays NaN: Halley's method, from what the exponent says to within 0.03
static Lanes logarithm(Lanes x) {
  Lanes y = __builtin_convertvector((Ints)x, Lanes) * 8.26295829e-8f - 88.f;
  for (int i = 0; i < 2; i++) {
    Lanes ratio = x * exponential(-y);
    y += 2 * (ratio - 1) / (ratio + 1);
  }
  return y;
}

struct Rows {  // of K numbers, or SIDE
  float* x;
  long row;
  float* operator[](long i) const { return x + i * row; }
};

// What the next block reads and writes lies in another core's cache or in none, in rows too short
// and too far apart for the processor to foresee: fetched a few at a time among the products.
// Without, at T=64 and K=32, backward takes 1.2 times as long and forward 1.1.
struct Ahead {
  int dim, left, n;
  Rows of[8];
  void fetch() {
    for (int i = 0; i < 3 && left > 0; i++, left--)
      for (Rows* r = of; r < of + n; r->x += r->row, r++)
        for (int k = 0; k < dim; k += 16) __builtin_prefetch(r->x + k);
  }
};

static constexpr int SIDE = 64;  // queries, and keys, at a time

// Some queries and some keys of a head: query i sees key j where j <= i + behind
struct Pair {
  int queries, keys, behind, dim;
  Ahead& ahead;
};

// R rows of C, 16 columns at a time in registers
template <int R>
static void strip(int column, int n, int from, int to, Rows a, long a_column, Rows b, Rows c,
                  bool add) {
  for (int j = column; j < n; j += 16) {
    Lanes s[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      s[i][0] = add ? at(c[i] + j) : Lanes{};
      s[i][1] = add ? at(c[i] + j + 8) : Lanes{};
    }
    for (int k = from; k < to; k++) {
      Lanes low = at(b[k] + j), high = at(b[k] + j + 8);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        float x = a[i][k * a_column];
        s[i][0] += x * low;
        s[i][1] += x * high;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      at(c[i] + j) = s[i][0];
      at(c[i] + j + 8) = s[i][1];
    }
  }
}

// C, or what is added to it, without what is hidden:
// SCORES      A (keys, K) · B (K, queries)
// TO_QUERIES  Aᵀ · B of A (keys, queries) and B (keys, K)
// TO_KEYS     A · B of A (keys, queries) and B (queries, K)
enum Kind { SCORES, TO_QUERIES, TO_KEYS };

template <Kind KIND>
static void product(const Pair& pair, Rows a, Rows b, Rows c, bool add) {
  static const decltype(&strip<1>) strips[] = {strip<1>, strip<2>, strip<3>,
                                               strip<4>, strip<5>, strip<6>};
  const int m = KIND == TO_QUERIES ? pair.queries : pair.keys;
  for (int i = 0, left = (m + 5) / 6, rows; left > 0; i += rows, left--) {
    rows = (m - i + left - 1) / left;
    pair.ahead.fetch();
    auto multiply = strips[rows - 1];
    Rows a1{a[i], a.row}, c1{c[i], c.row};
    int seer = std::max(0, i - pair.behind);  // of rows of keys, the first query that sees one
    if (KIND == SCORES)
      multiply(seer & ~15, (pair.queries + 15) & ~15, 0, pair.dim, a1, 1, b, c1, add);
    else if (KIND == TO_KEYS)
      multiply(0, pair.dim, seer, pair.queries, a1, 1, b, c1, add);
    else
      multiply(0, pair.dim, 0, std::min(pair.keys, i + rows + pair.behind), {a.x + i, 1}, a.row, b,
               c1, add);
  }
}

// out (dim, SIDE) = scale · xᵀ of x (n, dim); columns beyond n are of no use
static void turn(Rows x, int n, int dim, float scale, float* out) {
  for (int i = 0; i < n; i += 8)
    for (int k = 0; k < dim; k += 8) {
      Lanes a[8], b[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++)
        a[r] = at(x[std::min(i + r % 2 * 4 + r / 2, n - 1)] + k) * scale;
#pragma GCC unroll 2
      for (int stage = 0; stage < 2; stage++) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          b[2 * r] = PICK(a[r], a[r + 4], 0, 8, 1, 9, 4, 12, 5, 13);
          b[2 * r + 1] = PICK(a[r], a[r + 4], 2, 10, 3, 11, 6, 14, 7, 15);
        }
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) a[r] = b[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        at(out + (k + r) * SIDE + i) = PICK(a[r], a[r + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        at(out + (k + r + 4) * SIDE + i) = PICK(a[r], a[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
    }
}

// Of 8 queries, the first of them i, where the keys of p (keys, SIDE) end that any of them sees.
// What only some see is hidden from the others; what products read behind it, as their strips have
// up to six rows, is zero.
static int hide(float* p, const Pair& pair, int i, float with) {
  const Ints count = {0, 1, 2, 3, 4, 5, 6, 7};
  int end = std::min(pair.keys, i + 8 + pair.behind);
  for (int j = std::max(0, i + pair.behind + 1); j < end; j++) {
    Lanes& x = at(p + j * SIDE + i);
    x = count < j - i - pair.behind ? Lanes{} + with : x;
  }
  for (int j = end; j < std::min(pair.keys, end + 5); j++) at(p + j * SIDE + i) = Lanes{};
  return end;
}

// Some queries of a head; blocks are counted along T, then heads, then B
struct Block {
  long unit, b, h, g;
  int first, queries;

  Block(long index, int t, int n_heads, int n_kv) {
    const int n = (t + SIDE - 1) / SIDE;
    unit = index / n, b = unit / n_heads, h = unit % n_heads, g = h / (n_heads / n_kv);
    first = index % n * SIDE, queries = std::min(SIDE, t - first);
  }
  Rows of(In x, Strides s, long head, int i) const {  // one type, be they written or not
    return {(float*)x + b * s[0] + i * s[1] + head * s[2], s[1]};
  }
};

static float* scratch(size_t size) {
  static thread_local std::vector<float> space;
  if (space.size() < size + 16) space.resize(size + 16);
  return (float*)(((uintptr_t)space.data() + 63) / 64 * 64);
}

extern "C" void forward(In q, In k, In v, float* y, float* lse, Strides qs, Strides ks, Strides vs,
                        int n_batch, int t, int n_heads, int n_kv, int dim, int n_threads) {
  const float scale = 1 / std::sqrt((float)dim);
  const long ys[] = {(long)t * n_heads * dim, (long)n_heads * dim, dim};
  const long n_blocks = (long)n_batch * n_heads * ((t + SIDE - 1) / SIDE);
  Turns turns(n_blocks, n_threads);
#pragma omp parallel num_threads(n_threads)
  turns.take([&](long index) {
    Block now(index, t, n_heads, n_kv), next(index + 1, t, n_heads, n_kv);
    Ahead ahead{dim, index + 1 < n_blocks ? next.queries : 0, 4,
                {next.of(q, qs, next.h, next.first), next.of(k, ks, next.g, next.first),
                 next.of(v, vs, next.g, next.first), next.of(y, ys, next.h, next.first)}};
    const int end = now.first + now.queries;
    Rows y1 = now.of(y, ys, now.h, now.first);
    float *qt = scratch((size_t)SIDE * (dim + t)), *p = qt + SIDE * dim;
    turn(now.of(q, qs, now.h, now.first), now.queries, dim, scale, qt);
    Lanes most[SIDE / 8], sum[SIDE / 8];
    for (int i = 0; i < SIDE / 8; i++) most[i] = Lanes{} - INFINITY, sum[i] = Lanes{};
    for (int start = 0; start < end; start += SIDE) {
      Pair pair{now.queries, std::min(SIDE, end - start), now.first - start, dim, ahead};
      float* p1 = p + start * SIDE;
      product<SCORES>(pair, now.of(k, ks, now.g, start), {qt, SIDE}, {p1, SIDE}, false);
      for (int i = 0; i < now.queries; i += 8) {
        Lanes m = most[i / 8];
        for (int j = 0, seen = hide(p1, pair, i, -INFINITY); j < seen; j++) {
          Lanes x = at(p1 + j * SIDE + i);
          m = m > x ? m : x;
        }
        most[i / 8] = m;
      }
    }
    for (int start = 0; start < end; start += SIDE) {
      Pair pair{now.queries, std::min(SIDE, end - start), now.first - start, dim, ahead};
      float* p1 = p + start * SIDE;
      for (int i = 0; i < now.queries; i += 8) {
        Lanes m = most[i / 8], s = sum[i / 8];
        for (int j = 0, seen = std::min(pair.keys, i + 8 + pair.behind); j < seen; j++)
          s += at(p1 + j * SIDE + i) = exponential(at(p1 + j * SIDE + i) - m);
        sum[i / 8] = s;
      }
      product<TO_QUERIES>(pair, {p1, SIDE}, now.of(v, vs, now.g, start), y1, start > 0);
    }
    for (int i = 0; i < now.queries; i++) {
      if (i % 8 == 0) most[i / 8] += logarithm(sum[i / 8]), sum[i / 8] = 1 / sum[i / 8];
      lse[now.unit * t + now.first + i] = most[i / 8][i % 8];
      for (int j = 0; j < dim; j += 8) at(y1[i] + j) *= sum[i / 8][i % 8];
    }
  });
}

extern "C" void backward(In q, In k, In v, In y, In lse, In dy, float* dq, float* dk, float* dv,
                         Strides qs, Strides ks, Strides vs, Strides ds, int n_batch, int t,
                         int n_heads, int n_kv, int dim, int n_threads) {
  const float scale = 1 / std::sqrt((float)dim);
  const long ys[] = {(long)t * n_heads * dim, (long)n_heads * dim, dim};  // of y and dq
  const long gs[] = {(long)t * n_kv * dim, (long)n_kv * dim, dim};        // of dk and dv
  const int n = n_heads / n_kv * ((t + SIDE - 1) / SIDE);                 // blocks in a task
  Turns turns(n_batch * n_kv, n_threads);
#pragma omp parallel num_threads(n_threads)
  turns.take([&](long task) {
    for (long index = task * n; index < (task + 1) * n; index++) {
      Block now(index, t, n_heads, n_kv), next(index + 1, t, n_heads, n_kv);
      Ahead ahead{dim, index + 1 < (long)n_batch * n_kv * n ? next.queries : 0, 8,
                  {next.of(q, qs, next.h, next.first), next.of(k, ks, next.g, next.first),
                   next.of(v, vs, next.g, next.first), next.of(dy, ds, next.h, next.first),
                   next.of(y, ys, next.h, next.first), next.of(dq, ys, next.h, next.first),
                   next.of(dk, gs, next.g, next.first), next.of(dv, gs, next.g, next.first)}};
      const int end = now.first + now.queries;
      Rows q1 = now.of(q, qs, now.h, now.first), dy1 = now.of(dy, ds, now.h, now.first);
      Rows y1 = now.of(y, ys, now.h, now.first), dq1 = now.of(dq, ys, now.h, now.first);
      float *qt = scratch((size_t)SIDE * 2 * (dim + SIDE)), *dyt = qt + SIDE * dim;
      float *p = dyt + SIDE * dim, *dp = p + SIDE * SIDE, delta[SIDE] = {}, lse1[SIDE] = {};
      turn(q1, now.queries, dim, scale, qt);
      turn(dy1, now.queries, dim, scale, dyt);
      for (int i = 0; i < now.queries; i++) {
        Lanes sum{};
        for (int j = 0; j < dim; j += 8) sum += at(dy1[i] + j) * at(y1[i] + j);
        for (int j = 0; j < 8; j++) delta[i] += sum[j] * scale;
        lse1[i] = lse[now.unit * t + now.first + i];
      }
      for (int start = 0; start < end; start += SIDE) {
        Pair pair{now.queries, std::min(SIDE, end - start), now.first - start, dim, ahead};
        Rows k1 = now.of(k, ks, now.g, start), v1 = now.of(v, vs, now.g, start);
        product<SCORES>(pair, k1, {qt, SIDE}, {p, SIDE}, false);
        product<SCORES>(pair, v1, {dyt, SIDE}, {dp, SIDE}, false);
        for (int i = 0; i < now.queries; i += 8) {
          Lanes l = at(lse1 + i), less = at(delta + i);
          hide(dp, pair, i, 0);
          for (int j = 0, seen = hide(p, pair, i, -INFINITY); j < seen; j++) {
            Lanes &e = at(p + j * SIDE + i), &d = at(dp + j * SIDE + i);
            e = exponential(e - l);
            d = e * (d - less);
          }
        }
        bool more = now.h % (n_heads / n_kv) > 0 || pair.behind > 0;  // than the first addend
        product<TO_QUERIES>(pair, {dp, SIDE}, k1, dq1, start > 0);
        product<TO_KEYS>(pair, {dp, SIDE}, q1, now.of(dk, gs, now.g, start), more);
        product<TO_KEYS>(pair, {p, SIDE}, dy1, now.of(dv, gs, now.g, start), more);
      }
    }
  });
}

}  // namespace attention
using attention::forward, attention::backward;  // for what is built behind it
