// Matrix products on a CPU, and what operations around them share; other sources are compiled
// behind this. T is the operands' type: fp32, or bf16 where BF16 is defined. All else is fp32.
//
// C = A · B by tiles of AMX, or by oneDNN's micro-kernels, which libtorch_cpu exports. A lies by
// rows. B (depth, n) is packed in panels of PANEL columns, one row behind the other; of bf16, PAIR
// rows are interleaved, and rows that only one of them has are zeros up to WHOLE. Operands begin
// with a line of the cache: else products of bf16 take twice the time.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16 {
  uint16_t bits;
};
}  // namespace c10
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row, int64_t c_row, bool add,
            const float* a, const float* b, float* c, bool interleaved);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row, int64_t c_row, bool add,
            const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool interleaved);
void brgemm_release(bool interleaved);
}  // namespace at::native::cpublas
using namespace at::native::cpublas;
typedef c10::BFloat16 Bf16;

#ifdef BF16
typedef Bf16 T;
#else
typedef float T;
#endif
static const long PAIR = 4 / sizeof(T), PANEL = 32, DEPTH = 256, WHOLE = PAIR == 1 ? 1 : 32;
typedef const float* In;

static long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Numbers of a vector, as element-wise work takes them
#ifdef __AVX512F__
static const long LANES = 16;
#else
static const long LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// Of two numbers the second where one is NaN. g++ 12 makes more instructions of the plain forms.
#ifdef __AVX512F__
static inline Lanes larger(Lanes x, Lanes y) { return (Lanes)_mm512_max_ps((__m512)x, (__m512)y); }
static inline Lanes smaller(Lanes x, Lanes y) { return (Lanes)_mm512_min_ps((__m512)x, (__m512)y); }
static inline Bits widened(Halves x) { return (Bits)_mm512_cvtepu16_epi32((__m256i)x); }
static inline Lanes inverse(Lanes x) {  // 1/x within an ulp or two, x from 1 to 2¹²⁶
  const Lanes y = (Lanes)_mm512_rcp14_ps((__m512)x);
  return y * (2 - x * y);
}
static inline float sum(Lanes x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float largest(Lanes x) { return _mm512_reduce_max_ps((__m512)x); }
#else
#ifdef __AVX2__
static inline Lanes larger(Lanes x, Lanes y) { return (Lanes)_mm256_max_ps((__m256)x, (__m256)y); }
static inline Lanes smaller(Lanes x, Lanes y) { return (Lanes)_mm256_min_ps((__m256)x, (__m256)y); }
#else
static inline Lanes larger(Lanes x, Lanes y) { return x > y ? x : y; }
static inline Lanes smaller(Lanes x, Lanes y) { return x < y ? x : y; }
#endif
static inline Bits widened(Halves x) { return __builtin_convertvector(x, Bits); }
static inline Lanes inverse(Lanes x) { return 1 / x; }
static inline float sum(Lanes x) {
  for (long half = LANES / 2; half; half /= 2)
    for (long i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
static inline float largest(Lanes x) { return *std::max_element((float*)&x, (float*)(&x + 1)); }
#endif

static inline Lanes get(const float* x) {
  Lanes y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

static inline Lanes get(const Bf16* x) {
  Halves y;
  std::memcpy(&y, x, sizeof y);
  return (Lanes)(widened(y) << 16);
}

static inline void set(float* y, Lanes x) { std::memcpy(y, &x, sizeof x); }

static inline Halves rounded(Lanes x) {  // to the nearest bf16, ties to even
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Bits bits = (Bits)x, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = Bits{} + 0x7fc00000;
  return __builtin_convertvector((x != x ? nan : rounded) >> 16, Halves);
#endif
}

static inline void set(Bf16* y, Lanes x) {
  const Halves halves = rounded(x);
  std::memcpy(y, &halves, sizeof halves);
}

// Numbers of PAIR rows, one behind the other in x, as they lie in a panel; and by rows, or to null
static inline void set_rows(T* panel, T* rows, long row, const Lanes* x) {
#ifndef BF16
  set(panel, x[0]);
  if (rows) set(rows, x[0]);
#elif defined(__AVX512BF16__)
  typedef uint16_t Pairs __attribute__((vector_size(64)));
  const Pairs order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
  _mm512_storeu_si512(panel, _mm512_permutexvar_epi16((__m512i)order, halves));
  if (!rows) return;
  _mm256_storeu_si256((__m256i*)rows, _mm512_castsi512_si256(halves));
  _mm256_storeu_si256((__m256i*)(rows + row), _mm512_extracti64x4_epi64(halves, 1));
#else
  const Bits words = widened(rounded(x[0])) | widened(rounded(x[1])) << 16;
  std::memcpy(panel, &words, sizeof words);
  for (long p = 0; rows && p < PAIR; p++) set(rows + p * row, x[p]);
#endif
}

template <class From, class To>
static void convert(const From* x, long n, To* y) {  // n is a multiple of 16
  for (long i = 0; i < n; i += LANES) set(y + i, get(x + i));
}

// Rows of n numbers into the second cache, to be read or written by tiles: these wait for each line
template <int WRITE = 0, class X>
static inline void fetch(const X* x, long rows, long n, long row) {
  for (; rows > 0; rows--, x += row)
    for (const char* line = (const char*)x; line < (const char*)(x + n); line += 64)
      __builtin_prefetch(line, WRITE, 2);
}

// 0 below −87, e⁸⁷ above 87; NaN stays NaN, nothing is denormal. Within 4e-7, relatively.
static inline Lanes exponential(Lanes given) {
  const Lanes zero = {}, most = zero + 87.f, least = zero - 87.f;
  const float shift = 12582912;  // 1.5·2²³: what is added to it is rounded to a whole number
  const Lanes x = smaller(most, larger(least, given)), n = x * 1.44269504f + shift;
  const Lanes r = x - (n - shift) * 0.693147182f;
  Lanes p = r * 8.3125250522e-3f + 4.1890113829e-2f;
  p = p * r + 1.6667114466e-1f;
  p = p * r + 4.9999231787e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return given < least ? zero : (Lanes)((Bits)p + ((Bits)n << 23));
}

struct alignas(64) Line {  // of the cache
  char bytes[64];
};

// Memory of a thread, kept from call to call; each use of the macro in the code has its own. It is
// a function of the number of elements.
#define SCRATCH(Element)                                                \
  [](long n) {                                                          \
    static thread_local std::vector<Line> own;                          \
    own.resize(std::max(own.size(), n * sizeof(Element) / 64 + 1));     \
    return (Element*)own.data();                                        \
  }

// Parts of one buffer, in lines of the cache; from null, next is behind all
struct Parts {
  char* next;
  long lines() const { return (uintptr_t)next / sizeof(Line); }
  template <class Element>
  Element* take(long n) {
    char* part = next;
    next += round_up(n * sizeof(Element), 64);
    return (Element*)part;
  }
};

#ifdef __AMX_BF16__
// The tiles of AMX, each 16 rows of 64 bytes, for as long as a thread has this
struct Tiles {
  Tiles() { configure(); }
  ~Tiles() { _tile_release(); }
  static void configure() {
    alignas(64) char shape[64] = {1};
    for (int tile = 0; tile < 8; tile++) shape[16 + 2 * tile] = 64, shape[48 + tile] = 16;
    asm volatile("" ::"r"(shape) : "memory");  // the intrinsics do not say what they read
    _tile_loadconfig(shape);
  }
};

// C (32, 32); distances of rows, and of pairs of rows of B, are in bytes
static inline void multiply_tiles(long k, const char* a, long a_row, const char* b, long b_row,
                                  char* c, long c_row, const char* add) {
#define EACH(DO, c)              \
  DO(0, c, c_row);               \
  DO(1, c + 64, c_row);          \
  DO(2, c + 16 * c_row, c_row);  \
  DO(3, c + 16 * c_row + 64, c_row)
#define ZERO(tile, at, row) _tile_zero(tile)
  asm volatile("" ::: "memory");
  if (add) {
    EACH(_tile_loadd, add);
  } else {
    EACH(ZERO, add);
  }
  for (; k > 0; k -= 32, a += 64, b += 16 * b_row) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, b_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 64, b_row);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_row, a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  EACH(_tile_stored, c);
}
#else
struct Tiles { Tiles() {} };
#endif

// C (m, n) = A (m, k) · B (k, n), added to what `add` has, whose rows lie as those of C, or to null
static void multiply(long m, long n, long k, const T* a, long a_row, const T* b, long b_row,
                     float* c, long c_row, In add = nullptr) {
#ifdef __AMX_BF16__
  // Small products are faster without oneDNN's overhead of a call.
  const bool tiled = m % 32 == 0 && n % 32 == 0 && k % 32 == 0;
  for (long j = 0; tiled && j < n; j += 32)
    for (long i = 0; i < m; i += 32)
      multiply_tiles(k, (const char*)(a + i * a_row), 2 * a_row, (const char*)(b + 2 * j),
                     4 * b_row, (char*)(c + i * c_row + j), 4 * c_row,
                     add ? (const char*)(add + i * c_row + j) : nullptr);
  if (tiled) return;
#endif
  for (long i = 0; add && add != c && i < m; i++) std::copy_n(add + i * c_row, n, c + i * c_row);
#if defined(BF16) && !defined(__AVX512BF16__)
  // Without instructions for bf16 its products are those of fp32: slow, for tests.
  float *wide_a = SCRATCH(float)(m * k), *wide_b = SCRATCH(float)(k * n);
  for (long i = 0; i < m; i++) convert(a + i * a_row, k, wide_a + i * k);
  for (long i = 0; i < k; i++)
    for (long j = 0; j < n; j++) {
      const uint32_t bits = (uint32_t)b[(i / 2 * b_row + j) * 2 + i % 2].bits << 16;
      std::memcpy(wide_b + i * n + j, &bits, 4);
    }
  brgemm(m, n, k, k, n, c_row, add, wide_a, wide_b, c, false);
#else
  brgemm(m, n, k, a_row, b_row, c_row, add, a, b, c, PAIR == 2);
#endif
#ifdef __AMX_BF16__
  brgemm_release(true);  // it would take its tiles for still configured
  Tiles::configure();
#endif
}

// The same for B (depth, n) of panels; depth is a multiple of PAIR
static void product(long m, long n, long depth, const T* a, long a_row, const T* panels, float* c,
                    long c_row, In add = nullptr) {
  for (long k = 0; k < depth; k += DEPTH)
    for (long j = 0; j < n; j += PANEL) {
      const long width = std::min(PANEL, n - j);
      multiply(m, width, std::min(DEPTH, depth - k), a + k, a_row, panels + j * depth + k * width,
               width, c + j, c_row, k ? c + j : add ? add + j : nullptr);
    }
}

// Numbers of 32 bits: of fp32, or pairs of bf16
typedef float Word __attribute__((may_alias));
typedef float Words __attribute__((vector_size(32), aligned(4), may_alias));

// (8, 8) of yᵀ = x, or to add to
static inline void transpose_eight(const Word* x, long x_row, Word* y, long y_row, bool add) {
  Words r[8], s[8];
#define MIX __builtin_shufflevector
  for (int j = 0; j < 8; j++) r[j] = *(const Words*)(x + j * x_row);
  for (int j = 0; j < 8; j += 2) {
    s[j] = MIX(r[j], r[j + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[j + 1] = MIX(r[j], r[j + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int j = 0; j < 8; j += 4)
    for (int i = 0; i < 2; i++) {
      r[j + 2 * i] = MIX(s[j + i], s[j + 2 + i], 0, 1, 8, 9, 4, 5, 12, 13);
      r[j + 2 * i + 1] = MIX(s[j + i], s[j + 2 + i], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; j++) {
    Words &low = *(Words*)(y + j * y_row), &high = *(Words*)(y + (j + 4) * y_row);
    const Words top = MIX(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Words bottom = MIX(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    low = add ? low + top : top;
    high = add ? high + bottom : bottom;
  }
}

// y (n, m) = xᵀ of words x (m, n), which of fp32 may be added to what is there
static void transpose(const void* from, long x_row, long m, long n, void* to, long y_row,
                      bool add = false) {
  const Word* x = (const Word*)from;
  Word* y = (Word*)to;
  for (long j = 0; j < n; j += 8)  // a line of y is written at once
    for (long i = 0; i < m; i += 8)
      if (i + 8 <= m && j + 8 <= n)
        transpose_eight(x + i * x_row + j, x_row, y + j * y_row + i, y_row, add);
      else
        for (long r = i; r < std::min(i + 8, m); r++)
          for (long c = j; c < std::min(j + 8, n); c++)
            y[c * y_row + r] = add ? y[c * y_row + r] + x[r * x_row + c] : x[r * x_row + c];
}

// `rows` rows of B as they lie in a panel of `width` columns, behind them zeros up to `end` rows, a
// multiple of PAIR
static void pack_rows(const T* b, long row, long rows, long end, long width, T* panel) {
  for (long k = 0; k < end; k += PAIR, panel += width * PAIR) {
#ifdef BF16
    const T *low = b + k * row, *high = low + row;
    uint32_t* words = (uint32_t*)panel;
    if (k + 1 < rows) {
#pragma omp simd
      for (long i = 0; i < width; i++) words[i] = low[i].bits | (uint32_t)high[i].bits << 16;
    } else
      for (long i = 0; i < width; i++) words[i] = k < rows ? low[i].bits : 0;
#else
    k < rows ? convert(b + k * row, width, panel) : (void)std::fill_n(panel, width, 0.f);
#endif
  }
}

// Rows of B (depth, n), from the first on, into the panels of all, behind them zeros up to `end`
// rows. A few rows at a time: of a narrow strip of many, each row begins a page of its own.
static void pack(const T* b, long row, long rows, long end, long n, long first, long depth,
                 T* panels) {
  for (long k = 0; k < end; k += 16)
    for (long j = 0; j < n; j += PANEL) {
      const long width = std::min(PANEL, n - j);
      pack_rows(b + k * row + j, row, rows - k, std::min(16L, end - k), width,
                panels + j * depth + (first + k) * width);
    }
}

// Columns of B = wᵀ, up to PANEL, from n rows of w (n, depth), behind them zeros up to the width
static void pack_turned(const T* w, long row, long n, long depth, T* panel, long width) {
  transpose(w, row / PAIR, n, depth / PAIR, panel, width);
  for (long k = 0; n < width && k < depth / PAIR; k++)
    std::fill_n(panel + (k * width + n) * PAIR, (width - n) * PAIR, T{});
}

// y (n, rows) = xᵀ of x (rows, n); in bf16 zeros follow up to WHOLE columns
static void turn(const T* x, long row, long rows, long n, T* y, long y_row) {
  if (PAIR == 1) return transpose(x, row, rows, n, y, y_row);
  const long end = round_up(rows, WHOLE);
  T* pairs = SCRATCH(T)(end * n);
  pack_rows(x, row, rows, end, n, pairs);
  transpose(pairs, n, end / PAIR, n, y, y_row / PAIR);
}

// Threads share the tasks of an operation. Each begins with a part of the tasks that is its own,
// the same in each operation, so that what it made before lies in its cache; then it helps the
// others. That is faster than OpenMP's guided schedule.
template <class Task>
static void share(long n_tasks, long n_threads, Task task) {
  struct alignas(64) Part {
    std::atomic<long> next;
  };
  std::vector<Part> parts(n_threads);
  const auto begin = [=](long part) { return n_tasks * part / n_threads; };
  for (long part = 0; part < n_threads; part++) parts[part].next = begin(part);
#pragma omp parallel num_threads(n_threads)
  {
    const Tiles tiles;
    for (long k = 0; k < n_threads; k++) {
      const long part = (omp_get_thread_num() + k) % n_threads, end = begin(part + 1);
      long i;
      while ((i = parts[part].next.fetch_add(1, std::memory_order_relaxed)) < end) task(i);
    }
  }
}
