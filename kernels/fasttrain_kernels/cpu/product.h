// Matrix products in fp32 with AVX2, from which operations on a CPU are made: see __init__.py.
//
// Six rows and sixteen columns of C are summed up in twelve registers. B comes in panels: sixteen
// of its columns, one row after the other, so that a panel of 256 rows stays in the first cache
// while the rows of A pass by. Source: Goto and van de Geijn 2008, Anatomy of High-Performance
// Matrix Multiplication.
#pragma GCC optimize("fp-contract=fast")
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef const float* In;

static inline Lanes& at(float* p) { return *(Lanes*)p; }
static inline Lanes at(In p) { return *(const Lanes*)p; }

static inline float total(Lanes x) {
  float sum = 0;
  for (int i = 0; i < 8; i++) sum += x[i];
  return sum;
}

// 0 below −87, and e⁸⁷ above 87; NaN stays NaN, and nothing is denormal. The polynomial is within
// 3e-9, relatively, where |r| <= ln 2 / 2.
static inline Lanes exponential(Lanes given) {
  const float shift = 12582912;  // 1.5·2²³: what is added to it is rounded to a whole number
  Lanes x = __builtin_ia32_maxps256(Lanes{} - 87.f, __builtin_ia32_minps256(Lanes{} + 87.f, given));
  Lanes n = x * 1.44269504f + shift, f = n - shift;
  Lanes r = (x - f * 0.693359375f) + f * 2.12194440e-4f;
  Lanes p = r * 1.3814320555e-3f + 8.3688516170e-3f;
  p = p * r + 4.1668400168e-2f;
  p = p * r + 1.6666519642e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * (r * r) + r + 1.f;
  p *= (Lanes)(((Ints)n << 23) + (127 << 23));
  return given < -87.f ? Lanes{} : p;
}

static const int PANEL = 16, DEPTH = 256;  // columns of a panel; its rows that are used at a time

template <int R>
static inline void put(const Lanes (&sums)[R][2], float* c, long c_row, bool add) {
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
      Lanes& to = at(c + i * c_row + 8 * k);
      to = add ? to + sums[i][k] : sums[i][k];
    }
}

// (R, 16) of C = A · B, or added to it. A by rows, or PACKED: R of its rows interleaved.
template <int R, bool PACKED>
static void tile(int depth, In a, long a_row, In b, float* c, long c_row, bool add) {
  Lanes s[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
    __builtin_prefetch(c + i * c_row, 1);
    s[i][0] = s[i][1] = Lanes{};
  }
  for (int k = 0; k < depth; k++) {
    Lanes low = at(b + k * PANEL), high = at(b + k * PANEL + 8);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      float x = PACKED ? a[k * R + i] : a[i * a_row + k];
      s[i][0] += x * low;
      s[i][1] += x * high;
    }
  }
  put(s, c, c_row, add);
}

typedef decltype(&tile<1, false>) Tile;

template <bool PACKED>
static Tile tile_of(int rows) {
  static const Tile tiles[] = {tile<1, PACKED>, tile<2, PACKED>, tile<3, PACKED>,
                               tile<4, PACKED>, tile<5, PACKED>, tile<6, PACKED>};
  return tiles[std::min(rows, 6) - 1];
}

// C (m, n) = A (m, depth) · B (depth, n) of panels; n is a multiple of 16
static void product(int m, int n, int depth, In a, long a_row, In panels, float* c, long c_row,
                    bool add = false) {
  for (int k = 0; k < depth; k += DEPTH)
    for (int j = 0; j < n; j += PANEL)
      for (int i = 0; i < m; i += 6)
        tile_of<false>(m - i)(std::min(DEPTH, depth - k), a + i * a_row + k, a_row,
                              panels + (long)j * depth + k * PANEL, c + i * c_row + j, c_row,
                              add || k);
}

// Rows of A (depth, n), from the first on, as those of strips: six columns of A (of the last strip
// those that are left), one row after the other. Eight rows at a time stay in the cache meanwhile.
static void to_strips(In a, int rows, int n, long first, long depth, float* strips) {
  for (int from = 0; from < rows; from += 8) {
    const int end = std::min(rows, from + 8);
    for (int i = 0; i < n; i += 6) {
      int width = std::min(6, n - i), wide = width == 6 ? std::min(end, rows - 1) : from;
      float* to = strips + i * depth + first * width;
      for (int r = from; r < wide; r++) at(to + r * 6) = at(a + (long)r * n + i);  // two too many
      for (int r = wide; r < end; r++) std::copy_n(a + (long)r * n + i, width, to + r * width);
    }
  }
}

// C (m, n) = Aᵀ · B of A (depth, m) in strips and B (depth, n) in panels
static void product_of_turned(int m, int n, int depth, In strips, In panels, float* c, long c_row) {
  for (int k = 0; k < depth; k += DEPTH)
    for (int j = 0; j < n; j += PANEL)
      for (int i = 0; i < m; i += 6)
        tile_of<true>(m - i)(std::min(DEPTH, depth - k),
                             strips + (long)i * depth + k * std::min(6, m - i), 0,
                             panels + (long)j * depth + k * PANEL, c + i * c_row + j, c_row, k > 0);
}

// Panel j of B (depth, n) by rows
static void pack(In b, long row, int depth, int j, float* panels) {
  float* to = panels + (long)j * PANEL * depth;
  In from = b + j * PANEL;
  for (int k = 0; k < depth; k++) {
    at(to + k * PANEL) = at(from + k * row);
    at(to + k * PANEL + 8) = at(from + k * row + 8);
  }
}

#define MIX(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})

// (8, 8) of the panel from eight rows of w
static void turn_eight(In w, long row, float* to) {
  Lanes r[8], s[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) r[j] = at(w + j * row);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j += 2) {
    s[j] = MIX(r[j], r[j + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[j + 1] = MIX(r[j], r[j + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j += 4)
#pragma GCC unroll 8
    for (int i = 0; i < 2; i++) {
      r[j + 2 * i] = MIX(s[j + i], s[j + 2 + i], 0, 1, 8, 9, 4, 5, 12, 13);
      r[j + 2 * i + 1] = MIX(s[j + i], s[j + 2 + i], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 4; j++) {
    at(to + j * PANEL) = MIX(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    at(to + (j + 4) * PANEL) = MIX(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Panel j of B = wᵀ, w (n, depth) by rows; depth is a multiple of 8
static void pack_turned(In w, long row, int depth, int j, float* panels) {
  float* to = panels + (long)j * PANEL * depth;
  In from = w + (long)j * PANEL * row;
  for (int k = 0; k < depth; k += 8) {
    turn_eight(from + k, row, to + k * PANEL);
    turn_eight(from + 8 * row + k, row, to + k * PANEL + 8);
  }
}

// Space of this thread's own, in lines of the cache
static float* scratch(size_t size) {
  static thread_local std::vector<float> space;
  if (space.size() < size + 16) space.resize(size + 16);
  return (float*)(((uintptr_t)space.data() + 63) & ~(uintptr_t)63);
}
