// The global norm of many tensors in fp32, in one pass on all threads: see grad_norm.py.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

// Elements of a piece, whose squares one thread sums up: by the lengths alone, so that nothing
// depends on the number of threads.
static const long PIECE = 1 << 14;

struct Piece {
  const float* start;
  long n;
};

// Writes norm, found_inf and clip_coefficient.
extern "C" void grad_norm(long n_tensors, const float* const* tensors, const long* lengths,
                          double max_norm, long threads, float* out) {
  std::vector<Piece> pieces;
  for (long i = 0; i < n_tensors; i++)
    for (long first = 0; first < lengths[i]; first += PIECE)
      pieces.push_back({tensors[i] + first, std::min(PIECE, lengths[i] - first)});
  const long n = pieces.size();
  std::vector<double> sums(n);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n; i++) {
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long j = 0; j < pieces[i].n; j++)
      squares += (double)pieces[i].start[j] * pieces[i].start[j];
    sums[i] = squares;
  }
  double sum = 0;
  for (double part : sums) sum += part;
  const double norm = sum > FLT_MAX ? INFINITY : std::sqrt(sum), ratio = max_norm / (norm + 1e-6);
  out[0] = norm;
  out[1] = !std::isfinite(norm);
  out[2] = ratio > 1 ? 1 : ratio;  // NaN stays NaN
}
