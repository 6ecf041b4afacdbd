// The norm of gradients, and AdamW, on a CPU in fp32. Compiled behind product.h. A task is ROW
// elements of a tensor, so that sums do not depend on the number of threads.

static const long ROW = 1 << 14;

struct Shape {
  double lr, beta1, beta2, eps, decay, scale;  // of gradients
  long threads, n, sizes[];
};

// Returns the sum of what task(tensor, first, end) returns.
template <class Task>
static double share_rows(const Shape* s, Task task) {
  std::vector<std::pair<long, long>> rows;
  for (long i = 0; i < s->n; i++)
    for (long first = 0; first < s->sizes[i]; first += ROW) rows.push_back({i, first});
  std::vector<double> sums(rows.size());
  share(rows.size(), s->threads, [&](long row) {
    const auto [i, first] = rows[row];
    sums[row] = task(i, first, std::min(s->sizes[i], first + ROW));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.);
}

extern "C" void sum_of_squares(const Shape* s, const float** tensors, double* result) {
  *result = share_rows(s, [&](long tensor, long first, long end) {
    const float* x = tensors[tensor];
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = first; i < end; i++) sum += (double)x[i] * x[i];
    return sum;
  });
}

// Tensors are n parameters, then n gradients, first moments, second moments and step counts.
extern "C" void adamw(const Shape* s, float** tensors) {
  share_rows(s, [&](long tensor, long first, long end) {
    float** of = tensors + tensor;
    float *p = of[0], *g = of[s->n], *m = of[2 * s->n], *v = of[3 * s->n], step = *of[4 * s->n];
    const float rate = s->lr / (1 - std::pow(s->beta1, step)), kept = 1 - s->lr * s->decay;
    const float root = 1 / std::sqrt(1 - std::pow(s->beta2, step)), eps = s->eps, scale = s->scale;
    const float beta1 = s->beta1, beta2 = s->beta2, new1 = 1 - s->beta1, new2 = 1 - s->beta2;
#pragma omp simd
    for (long i = first; i < end; i++) {
      const float d = g[i] * scale;
      m[i] = m[i] * beta1 + d * new1;
      v[i] = v[i] * beta2 + d * d * new2;
      p[i] = p[i] * kept - rate * m[i] / (std::sqrt(v[i]) * root + eps);
    }
    return 0;
  });
}
