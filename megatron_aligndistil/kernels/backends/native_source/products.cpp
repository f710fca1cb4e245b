// The kernels' products for CPUs: fp32 or bf16 factors, fp32 results. PyTorch's own bf16 products round their results.

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>
#include <torch/library.h>

using at::Tensor;
using c10::BFloat16;

namespace {

// out [M, N] fp32 = a [M, K] b, or += with add. b is [K, N] in fp32; in bf16 its rows are interleaved in pairs,
// [K / 2, N, 2]. The accumulators are fp32 in both, and are written out as they are.
template <class Scalar>
void product_of(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
  constexpr int64_t kRows = 64, kColumns = 128;
  constexpr bool paired = std::is_same_v<Scalar, BFloat16>;
  const int64_t m = out.size(0), n = out.size(1), k = paired ? 2 * b.size(0) : b.size(0);
  const int64_t row_tiles = (m + kRows - 1) / kRows, tiles = row_tiles * ((n + kColumns - 1) / kColumns);
  const auto *pa = a.const_data_ptr<Scalar>(), *pb = b.const_data_ptr<Scalar>();
  float* po = out.mutable_data_ptr<float>();
  const int64_t lda = a.stride(0), ldb = paired ? b.stride(0) / 2 : b.stride(0), ldc = out.stride(0);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t i = tile % row_tiles * kRows, j = tile / row_tiles * kColumns;
      at::native::cpublas::brgemm(std::min(kRows, m - i), std::min(kColumns, n - j), k, lda, ldb, ldc, add,
                                  pa + i * lda, pb + (paired ? 2 : 1) * j, po + i * ldc + j, paired);
    }
    at::native::cpublas::brgemm_release(paired);
  });
}

void product(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
  TORCH_CHECK(a.stride(1) == 1 && out.stride(1) == 1 && out.scalar_type() == at::kFloat);
  if (a.scalar_type() == at::kBFloat16)
    product_of<BFloat16>(a, b, out, add);
  else
    product_of<float>(a, b, out, add);
}

// Rows of x [K, N] bf16 interleaved in pairs, [ceil(K / 2), N, 2]; a missing last row is zero.
Tensor paired_rows(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.stride(1) == 1);
  const int64_t k = x.size(0), n = x.size(1), stride = x.stride(0);
  Tensor out = at::empty({(k + 1) / 2, n, 2}, x.options());
  const auto* in = reinterpret_cast<const uint16_t*>(x.const_data_ptr());
  auto* to = reinterpret_cast<uint32_t*>(out.mutable_data_ptr());
  at::parallel_for(0, out.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const uint16_t* first = in + 2 * pair * stride;
      const uint16_t* second = first + stride;
      uint32_t* row = to + pair * n;
      if (2 * pair + 1 < k)
        for (int64_t j = 0; j < n; ++j) row[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
      else
        for (int64_t j = 0; j < n; ++j) row[j] = first[j];
    }
  });
  return out;
}

// Vectors of 16 bytes, and the low and high halves of two of them interleaved.
typedef uint16_t Words16 __attribute__((vector_size(16)));
typedef uint32_t Words32 __attribute__((vector_size(16)));
inline Words16 low(Words16 a, Words16 b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Words16 high(Words16 a, Words16 b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline Words32 low(Words32 a, Words32 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Words32 high(Words32 a, Words32 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

// A square of lanes x lanes: interleaving row i with row i + lanes / 2, log2(lanes) times, transposes it.
template <class Vector, class Word>
void transpose_square(const Word* in, int64_t from, Word* to, int64_t ld) {
  constexpr int lanes = sizeof(Vector) / sizeof(Word);
  Vector rows[lanes], next[lanes];
  for (int i = 0; i < lanes; ++i) __builtin_memcpy(&rows[i], in + i * from, sizeof(Vector));
  for (int stage = 1; stage < lanes; stage *= 2) {
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = low(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = high(rows[i], rows[i + lanes / 2]);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < lanes; ++i) __builtin_memcpy(to + i * ld, &rows[i], sizeof(Vector));
}

// out [N, K] = x [K, N] transposed, in bands of rows that fill whole cache lines of the output.
template <class Vector, class Word>
void transpose_of(const Tensor& x, const Tensor& out) {
  constexpr int64_t lanes = sizeof(Vector) / sizeof(Word), kBand = 64 / sizeof(Word);
  const auto* in = reinterpret_cast<const Word*>(x.const_data_ptr());
  auto* to = reinterpret_cast<Word*>(out.mutable_data_ptr());
  const int64_t rows = x.size(0), columns = x.size(1), from = x.stride(0), ld = out.stride(0);
  at::parallel_for(0, (rows + kBand - 1) / kBand, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      const int64_t first = band * kBand, last = std::min(first + kBand, rows);
      for (int64_t j = 0; j < columns; j += lanes)
        for (int64_t i = first; i < last; i += lanes)
          if (i + lanes <= last && j + lanes <= columns)
            transpose_square<Vector>(in + i * from + j, from, to + j * ld + i, ld);
          else
            for (int64_t b = j; b < std::min(j + lanes, columns); ++b)
              for (int64_t a = i; a < std::min(i + lanes, last); ++a) to[b * ld + a] = in[a * from + b];
    }
  });
}

void transpose_into(const Tensor& x, const Tensor& out) {
  TORCH_CHECK(x.stride(1) == 1 && out.stride(1) == 1 && x.scalar_type() == out.scalar_type());
  if (x.element_size() == 2)
    transpose_of<Words16, uint16_t>(x, out);
  else
    transpose_of<Words32, uint32_t>(x, out);
}

// Large pages for memory that has not been touched: faults of 4 KiB cost as much as a sweep. Advice, so it can't fail.
void advise_large_pages(const Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 12;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + x.storage().nbytes()) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligndistil, library) {
  library.def("product(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()");
  library.def("paired_rows(Tensor x) -> Tensor");
  library.def("transpose_into(Tensor x, Tensor(a!) out) -> ()");
  library.def("advise_large_pages(Tensor x) -> ()");
}

TORCH_LIBRARY_IMPL(aligndistil, CPU, library) {
  library.impl("product", &product);
  library.impl("paired_rows", &paired_rows);
  library.impl("transpose_into", &transpose_into);
  library.impl("advise_large_pages", &advise_large_pages);
}
