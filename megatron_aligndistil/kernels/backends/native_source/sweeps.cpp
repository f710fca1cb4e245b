// The kernels' elementwise loops for CPUs. Tiles of logits are stored vocabulary first: V rows of C tokens, tokens contiguous,
// so that a product reads the head's weight as it lies, and every loop over tokens is a vector loop.
//
// Shapes: V vocabulary entries of a tile, C tokens of a chunk, P parts of the vocabulary (one a thread).

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

using at::Tensor;

namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
// Tiles and words never overlap, which the compiler can't see.
#define VECTORIZE _Pragma("GCC ivdep")

// Rows between two updates of the running maxima. They are summed by themselves first: long fp32 sums lose digits.
constexpr int64_t kRowBlock = 16;

// exp for x <= 0 to 2 ulp: 2^n * p(r), |r| <= ln(2) / 2. Branch-free, so that the loops around it become vector code.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Rounded to nearest even in bf16, as bits; NaN stays one.
inline uint16_t bf16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? static_cast<uint16_t>(rounded) : 0x7fc0;
}

struct Tile {
  float* data = nullptr;
  int64_t rows = 0, tokens = 0, stride = 0;

  explicit Tile(const Tensor& vc) {
    TORCH_CHECK(vc.scalar_type() == at::kFloat && vc.dim() == 2 && (vc.stride(1) == 1 || vc.size(1) <= 1));
    data = vc.mutable_data_ptr<float>();
    rows = vc.size(0), tokens = vc.size(1), stride = vc.stride(0);
  }
  float* row(int64_t v) const { return data + v * stride; }
};

const float* values(const Tensor& c) {
  TORCH_CHECK(c.scalar_type() == at::kFloat && c.is_contiguous());
  return c.const_data_ptr<float>();
}

// body(part, first row, last row) over P parts of the rows, whose number depends on the number of threads alone.
template <class Body>
void over_parts(int64_t rows, int64_t parts, Body body) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part, rows * part / parts, rows * (part + 1) / parts);
  });
}

Tensor empty_words(int64_t words, const Tensor& vc) {
  return at::zeros({at::get_num_threads(), words, vc.size(1)}, vc.options());
}

// A running softmax of C tokens: m, s = sum exp(z - m) and sums of exp(z - m) * value.
struct Running {
  int64_t tokens;
  float *max, *sum;
  std::vector<float> previous;

  Running(float* max_C, float* sum_C, int64_t tokens) : tokens(tokens), max(max_C), sum(sum_C), previous(tokens) {
    std::fill(max, max + tokens, kNegativeInfinity);
  }
  void raise(const float* z) {
    for (int64_t c = 0; c < tokens; ++c) max[c] = z[c] > max[c] ? z[c] : max[c];
  }
  void keep() { std::copy(max, max + tokens, previous.begin()); }
  // After raise: brings the sums to the new maxima. moved: values were taken relative to the maximum and move with it.
  void rescale(float* weighted, bool moved) const {
    for (int64_t c = 0; c < tokens; ++c) {
      const bool first = previous[c] == kNegativeInfinity;
      const float shift = first ? 0.0f : previous[c] - max[c];
      weighted[c] = exp_of(shift) * (moved ? weighted[c] + sum[c] * shift : weighted[c]);
    }
  }
  void rescale_sum() const {
    for (int64_t c = 0; c < tokens; ++c) {
      const float shift = previous[c] == kNegativeInfinity ? 0.0f : previous[c] - max[c];
      sum[c] *= exp_of(shift);
    }
  }
};

// Sums of one block of rows, which are then added to the running ones.
struct BlockSums {
  int64_t tokens;
  std::vector<float> values;

  BlockSums(int64_t count, int64_t tokens) : tokens(tokens), values(count * tokens) {}
  void clear() { std::fill(values.begin(), values.end(), 0.0f); }
  float* operator[](int64_t index) { return values.data() + index * tokens; }
  void add_to(int64_t index, float* total) {
    const float* from = (*this)[index];
    for (int64_t c = 0; c < tokens; ++c) total[c] += from[c];
  }
};

// (m, s, sum e x) of a tile: [P, 3, C].
Tensor softmax_sums(const Tensor& logits) {
  const Tile z(logits);
  Tensor words = empty_words(3, logits);
  over_parts(z.rows, words.size(0), [&](int64_t part, int64_t begin, int64_t end) {
    float* out = words.mutable_data_ptr<float>() + part * 3 * z.tokens;
    float *m = out, *s = out + z.tokens, *a = out + 2 * z.tokens;
    Running running(m, s, z.tokens);
    BlockSums sums(2, z.tokens);
    float *bs = sums[0], *ba = sums[1];
    for (int64_t block = begin; block < end; block += kRowBlock) {
      const int64_t last = std::min(block + kRowBlock, end);
      running.keep();
      for (int64_t v = block; v < last; ++v) running.raise(z.row(v));
      running.rescale(a, true), running.rescale_sum();
      sums.clear();
      for (int64_t v = block; v < last; ++v) {
        const float* p = z.row(v);
        VECTORIZE for (int64_t c = 0; c < z.tokens; ++c) {
          const float x = p[c] - m[c], e = exp_of(x);
          bs[c] += e, ba[c] += e * x;
        }
      }
      sums.add_to(0, s), sums.add_to(1, a);
    }
  });
  return words;
}

// (t, D) with D = log pi_d - log pi_r, t = log pi_d + alpha D. The multiply-add is written out, so that log Z* and the
// KL are of the very same t: its rounding then cancels between them.
struct Target {
  float t, gap;
};
inline Target target_of(float z_d, float z_r, float log_z_d, float log_z_r, float alpha) {
  const float logprob = z_d - log_z_d, gap = logprob - (z_r - log_z_r);
  return {__builtin_fmaf(alpha, gap, logprob), gap};
}

// d becomes t, and r becomes D.
void target_and_gap(const Tensor& d_, const Tensor& r_, const Tensor& log_z_d, const Tensor& log_z_r,
                    const Tensor& alpha) {
  const Tile d(d_), r(r_);
  const float *lzd = values(log_z_d), *lzr = values(log_z_r), *al = values(alpha);
  at::parallel_for(0, d.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      float *dv = d.row(v), *rv = r.row(v);
      VECTORIZE for (int64_t c = 0; c < d.tokens; ++c) {
        const Target target = target_of(dv[c], rv[c], lzd[c], lzr[c], al[c]);
        dv[c] = target.t, rv[c] = target.gap;
      }
    }
  });
}

// 1/2 sum |pi_d - pi_r| of a tile: [P, 1, C].
Tensor total_variation(const Tensor& d_, const Tensor& r_, const Tensor& max_d, const Tensor& sum_d,
                       const Tensor& max_r, const Tensor& sum_r) {
  const Tile d(d_), r(r_);
  const float *md = values(max_d), *sd = values(sum_d), *mr = values(max_r), *sr = values(sum_r);
  Tensor words = empty_words(1, d_);
  over_parts(d.rows, words.size(0), [&](int64_t part, int64_t begin, int64_t end) {
    float* out = words.mutable_data_ptr<float>() + part * d.tokens;
    BlockSums sums(1, d.tokens);
    float* sum = sums[0];
    for (int64_t block = begin; block < end; block += kRowBlock) {
      sums.clear();
      for (int64_t v = block; v < std::min(block + kRowBlock, end); ++v) {
        const float *dv = d.row(v), *rv = r.row(v);
        VECTORIZE for (int64_t c = 0; c < d.tokens; ++c)
          sum[c] += 0.5f * std::abs(exp_of(dv[c] - md[c]) / sd[c] - exp_of(rv[c] - mr[c]) / sr[c]);
      }
      sums.add_to(0, out);
    }
  });
  return words;
}

// (m, s, sum e w, sum e D) with x = p - m, w = x - t: [P, 4, C]. d becomes t.
Tensor extrapolated_sums(const Tensor& p_, const Tensor& d_, const Tensor& r_, const Tensor& log_z_d,
                         const Tensor& log_z_r, const Tensor& alpha) {
  const Tile p(p_), d(d_), r(r_);
  const float *lzd = values(log_z_d), *lzr = values(log_z_r), *al = values(alpha);
  Tensor words = empty_words(4, p_);
  over_parts(p.rows, words.size(0), [&](int64_t part, int64_t begin, int64_t end) {
    float* out = words.mutable_data_ptr<float>() + part * 4 * p.tokens;
    float *m = out, *s = out + p.tokens, *a = out + 2 * p.tokens, *b = out + 3 * p.tokens;
    Running running(m, s, p.tokens);
    BlockSums sums(3, p.tokens);
    float *bs = sums[0], *ba = sums[1], *bb = sums[2];
    for (int64_t block = begin; block < end; block += kRowBlock) {
      const int64_t last = std::min(block + kRowBlock, end);
      running.keep();
      for (int64_t v = block; v < last; ++v) running.raise(p.row(v));
      running.rescale(a, true), running.rescale(b, false), running.rescale_sum();
      sums.clear();
      for (int64_t v = block; v < last; ++v) {
        const float *pv = p.row(v), *rv = r.row(v);
        float* dv = d.row(v);
        VECTORIZE for (int64_t c = 0; c < p.tokens; ++c) {
          const Target target = target_of(dv[c], rv[c], lzd[c], lzr[c], al[c]);
          const float x = pv[c] - m[c], e = exp_of(x);
          dv[c] = target.t;
          bs[c] += e, ba[c] += e * (x - target.t), bb[c] += e * target.gap;
        }
      }
      sums.add_to(0, s), sums.add_to(1, a), sums.add_to(2, b);
    }
  });
  return words;
}

// Two running softmaxes x, y and sum e (x - y), e of the first, or of the second: (m, s, sum, m', s') [P, 5, C].
Tensor token_kl_sums(const Tensor& p_, const Tensor& q_, bool weight_by_second) {
  const Tile p(p_), q(q_);
  Tensor words = empty_words(5, p_);
  const float first_weight = weight_by_second ? 0.0f : 1.0f;
  over_parts(p.rows, words.size(0), [&](int64_t part, int64_t begin, int64_t end) {
    float* out = words.mutable_data_ptr<float>() + part * 5 * p.tokens;
    float *m = out, *s = out + p.tokens, *a = out + 2 * p.tokens, *n = out + 3 * p.tokens, *u = out + 4 * p.tokens;
    Running first(m, s, p.tokens), second(n, u, p.tokens);
    BlockSums sums(3, p.tokens);
    float *bs = sums[0], *bu = sums[1], *ba = sums[2];
    for (int64_t block = begin; block < end; block += kRowBlock) {
      const int64_t last = std::min(block + kRowBlock, end);
      first.keep(), second.keep();
      for (int64_t v = block; v < last; ++v) first.raise(p.row(v)), second.raise(q.row(v));
      for (int64_t c = 0; c < p.tokens; ++c) {  // a holds sum e (x - y): both maxima move it
        const bool start = first.previous[c] == kNegativeInfinity;
        const float dx = start ? 0.0f : first.previous[c] - m[c], dy = start ? 0.0f : second.previous[c] - n[c];
        a[c] = weight_by_second ? exp_of(dy) * (a[c] + u[c] * (dx - dy)) : exp_of(dx) * (a[c] + s[c] * (dx - dy));
      }
      first.rescale_sum(), second.rescale_sum();
      sums.clear();
      for (int64_t v = block; v < last; ++v) {
        const float *pv = p.row(v), *qv = q.row(v);
        VECTORIZE for (int64_t c = 0; c < p.tokens; ++c) {
          const float x = pv[c] - m[c], y = qv[c] - n[c], e = exp_of(x), f = exp_of(y);
          bs[c] += e, bu[c] += f, ba[c] += (first_weight * e + (1.0f - first_weight) * f) * (x - y);
        }
      }
      sums.add_to(0, s), sums.add_to(1, u), sums.add_to(2, a);
    }
  });
  return words;
}

// Apart from the loops around it, where the compiler would give up making a vector loop of it.
template <class Row>
[[gnu::noinline]] void write_row(const Row& row, int64_t v, float* out) {
  row(v, out);
}

// row(v, out) writes row v of the gradient in fp32; it is rounded to the type of out.
template <class Row>
void write_rows(const Tensor& out, const Row& row) {
  TORCH_CHECK(out.stride(1) == 1 || out.size(1) <= 1);
  const int64_t stride = out.stride(0), tokens = out.size(1);
  const bool narrow = out.scalar_type() == at::kBFloat16;
  void* data = out.mutable_data_ptr();
  at::parallel_for(0, out.size(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(narrow ? tokens : 0);
    for (int64_t v = begin; v < end; ++v) {
      if (!narrow) {
        write_row(row, v, static_cast<float*>(data) + v * stride);
        continue;
      }
      write_row(row, v, wide.data());
      const float* from = wide.data();
      uint16_t* to = static_cast<uint16_t*>(data) + v * stride;
      VECTORIZE for (int64_t c = 0; c < tokens; ++c) to[c] = bf16_bits(from[c]);
    }
  });
}

// pi (w - mean), pi = exp(p - max) / sum, w = (p - max) - t.
void extrapolated_gradient(const Tensor& p_, const Tensor& t_, const Tensor& max_C, const Tensor& sum_C,
                           const Tensor& mean_C, const Tensor& out) {
  const Tile p(p_), t(t_);
  const Tensor inverse_C = sum_C.reciprocal();
  const float *max = values(max_C), *inverse = values(inverse_C), *mean = values(mean_C);
  write_rows(out, [=](int64_t v, float* row) {
    const float *pv = p.row(v), *tv = t.row(v);
    VECTORIZE for (int64_t c = 0; c < p.tokens; ++c) {
      const float x = pv[c] - max[c];
      row[c] = exp_of(x) * inverse[c] * (x - tv[c] - mean[c]);
    }
  });
}

// to_other: pi (x - y - mean); otherwise pi - pi'. state: m, s, mean, m', s'.
void token_kl_gradient(const Tensor& p_, const Tensor& q_, at::TensorList state, bool to_other, const Tensor& out) {
  const Tile p(p_), q(q_);
  const Tensor inverse_C = state[1].reciprocal(), other_inverse_C = state[4].reciprocal();
  const float *m = values(state[0]), *inverse = values(inverse_C), *mean = values(state[2]), *n = values(state[3]),
              *other_inverse = values(other_inverse_C);
  if (to_other)
    write_rows(out, [=](int64_t v, float* row) {
      const float *pv = p.row(v), *qv = q.row(v);
      VECTORIZE for (int64_t c = 0; c < p.tokens; ++c) {
        const float x = pv[c] - m[c];
        row[c] = exp_of(x) * inverse[c] * (x - (qv[c] - n[c]) - mean[c]);
      }
    });
  else
    write_rows(out, [=](int64_t v, float* row) {
      const float *pv = p.row(v), *qv = q.row(v);
      VECTORIZE for (int64_t c = 0; c < p.tokens; ++c)
        row[c] = exp_of(pv[c] - m[c]) * inverse[c] - exp_of(qv[c] - n[c]) * other_inverse[c];
    });
}

// -pi; the label's one is added by the caller.
void softmax_gradient(const Tensor& p_, const Tensor& max_C, const Tensor& sum_C, const Tensor& out) {
  const Tile p(p_);
  const float *max = values(max_C), *sum = values(sum_C);
  write_rows(out, [=](int64_t v, float* row) {
    const float* pv = p.row(v);
    VECTORIZE for (int64_t c = 0; c < p.tokens; ++c) row[c] = -exp_of(pv[c] - max[c]) / sum[c];
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligndistil, library) {
  library.def("softmax_sums(Tensor logits) -> Tensor");
  library.def("target_and_gap(Tensor(a!) d, Tensor(b!) r, Tensor log_z_d, Tensor log_z_r, Tensor alpha) -> ()");
  library.def("total_variation(Tensor d, Tensor r, Tensor max_d, Tensor sum_d, Tensor max_r, Tensor sum_r) -> Tensor");
  library.def(
      "extrapolated_sums(Tensor p, Tensor(a!) d, Tensor r, Tensor log_z_d, Tensor log_z_r, Tensor alpha) -> Tensor");
  library.def("extrapolated_gradient(Tensor p, Tensor t, Tensor max, Tensor sum, Tensor mean, Tensor(a!) out) -> ()");
  library.def("token_kl_sums(Tensor p, Tensor q, bool weight_by_second) -> Tensor");
  library.def("token_kl_gradient(Tensor p, Tensor q, Tensor[] state, bool to_other, Tensor(a!) out) -> ()");
  library.def("softmax_gradient(Tensor p, Tensor max, Tensor sum, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(aligndistil, CPU, library) {
  library.impl("softmax_sums", &softmax_sums);
  library.impl("target_and_gap", &target_and_gap);
  library.impl("total_variation", &total_variation);
  library.impl("extrapolated_sums", &extrapolated_sums);
  library.impl("extrapolated_gradient", &extrapolated_gradient);
  library.impl("token_kl_sums", &token_kl_sums);
  library.impl("token_kl_gradient", &token_kl_gradient);
  library.impl("softmax_gradient", &softmax_gradient);
}
