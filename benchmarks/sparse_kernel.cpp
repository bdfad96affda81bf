// Products of a matrix and a vector in float32, for benchmarks/sparse_products.py (AVX2, OpenMP).
//
// A row of the sparse matrices is stored as its kept values, and one bit per weight. Eight weights
// at a time are expanded: a table gives, for each of the 256 patterns of 8 bits, where each weight
// is among the values that follow. Rows have a multiple of 64 weights. Values are padded by 32.

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kAhead = 2048;  // bytes to fetch ahead

struct Tables {
  alignas(32) int32_t lanes[256][8];    // for 8 floats; negative where the weight is zero
  alignas(16) uint8_t bytes[256][16];   // for 8 16-bit values; the highest bit set likewise

  Tables() {
    for (int pattern = 0; pattern < 256; ++pattern) {
      int next = 0;
      for (int weight = 0; weight < 8; ++weight) {
        const bool kept = pattern >> weight & 1;
        lanes[pattern][weight] = kept ? next : INT32_MIN;
        bytes[pattern][2 * weight] = kept ? 2 * next : 0x80;
        bytes[pattern][2 * weight + 1] = kept ? 2 * next + 1 : 0x80;
        next += kept;
      }
    }
  }
};

const Tables tables;

inline void fetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kAhead, _MM_HINT_T0);
}

inline __m256 load(const float* values) { return _mm256_loadu_ps(values); }

inline __m256 widen(__m128i bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16), 16));
}

inline __m256 load(const uint16_t* values) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

// The 8 weights that a pattern describes, of which the kept ones begin at `values`.
inline __m256 expand(const float* values, unsigned pattern) {
  const __m256i lanes =
      _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.lanes[pattern]));
  const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
  return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}

inline __m256 expand(const uint16_t* values, unsigned pattern) {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(tables.bytes[pattern]));
  return widen(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), bytes));
}

inline float sum(const __m256 (&parts)[4]) {
  const __m256 eight = _mm256_add_ps(_mm256_add_ps(parts[0], parts[1]),
                                     _mm256_add_ps(parts[2], parts[3]));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_hadd_ps(four, four);
  return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}

template <typename T>
void dense(const T* weights, const float* x, float* y, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* next = weights + row * columns;
    __m256 parts[4] = {};
    for (int64_t column = 0; column < columns; column += 32) {
      for (int byte = 0; byte < static_cast<int>(32 * sizeof(T)); byte += 64)
        fetch(reinterpret_cast<const char*>(next + column) + byte);
      for (int k = 0; k < 4; ++k)
        parts[k] = _mm256_fmadd_ps(load(next + column + 8 * k), load(x + column + 8 * k), parts[k]);
    }
    y[row] = sum(parts);
  }
}

template <typename T>
void sparse(const T* values, const uint64_t* masks, const int64_t* starts, const float* x, float* y,
            int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* next = values + starts[row];
    const uint64_t* mask = masks + row * (columns / 64);
    __m256 parts[4] = {};
    for (int64_t column = 0; column < columns; column += 64, ++mask) {
      fetch(next);
      if (sizeof(T) == 4) fetch(next + 16);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const unsigned pattern = *mask >> (8 * k) & 255;
        parts[k & 3] =
            _mm256_fmadd_ps(expand(next, pattern), load(x + column + 8 * k), parts[k & 3]);
        next += __builtin_popcount(pattern);
      }
    }
    y[row] = sum(parts);
  }
}

}  // namespace

extern "C" {

void dense_float32(const float* weights, const float* x, float* y, int64_t rows, int64_t columns,
                   int threads) {
  dense(weights, x, y, rows, columns, threads);
}

void dense_bfloat16(const uint16_t* weights, const float* x, float* y, int64_t rows,
                    int64_t columns, int threads) {
  dense(weights, x, y, rows, columns, threads);
}

void sparse_float32(const float* values, const uint64_t* masks, const int64_t* starts,
                    const float* x, float* y, int64_t rows, int64_t columns, int threads) {
  sparse(values, masks, starts, x, y, rows, columns, threads);
}

void sparse_bfloat16(const uint16_t* values, const uint64_t* masks, const int64_t* starts,
                     const float* x, float* y, int64_t rows, int64_t columns, int threads) {
  sparse(values, masks, starts, x, y, rows, columns, threads);
}

}  // extern "C"
