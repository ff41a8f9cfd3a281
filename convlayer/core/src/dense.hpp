// Small dense matrices, row by row: what the cones and the factor share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace convlayer {

constexpr double HUGE_NUMBER = 1e300;

// In four parts: one sum would wait for itself.
inline double long_dot(const double* a, const double* b, int n) {
  const int part = n / 16 * 4;
  const double *a1 = a + part, *a2 = a1 + part, *a3 = a2 + part;
  const double *b1 = b + part, *b2 = b1 + part, *b3 = b2 + part;
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int i = 0; i < part; ++i) {
    s0 += a[i] * b[i], s1 += a1[i] * b1[i];
    s2 += a2[i] * b2[i], s3 += a3[i] * b3[i];
  }
  for (int i = 4 * part; i < n; ++i) s0 += a[i] * b[i];
  return (s0 + s1) + (s2 + s3);
}

inline double dot(const double* a, const double* b, int n) {
  if (n >= 32) return long_dot(a, b, n);
  double sum = 0;
  int i = 0;
  for (; i + 4 <= n; i += 4)
    sum += (a[i] * b[i] + a[i + 1] * b[i + 1]) + (a[i + 2] * b[i + 2] + a[i + 3] * b[i + 3]);
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// The largest |a_i|; NaN where one is NaN.
inline double largest(const double* a, int n) {
  double most = 0, sum = 0;
#pragma omp simd reduction(max : most) reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const double size = std::fabs(a[i]);
    most = size > most ? size : most;
    sum += size * 0;
  }
  return most + sum;
}

// LL' of a symmetric n x n matrix, in its lower triangle; false where a pivot is not positive.
inline bool cholesky(double* a, int n) {
  for (int j = 0; j < n; ++j) {
    double* row = a + j * n;
    for (int i = 0; i < j; ++i) {
      row[i] = (row[i] - dot(row, a + i * n, i)) / a[i * n + i];
    }
    const double pivot = row[j] - dot(row, row, j);
    if (!(pivot > 0)) return false;
    row[j] = std::sqrt(pivot);
  }
  return true;
}

// Eigenvalues of a symmetric n x n matrix, which is destroyed, and where `vectors` is given the
// eigenvectors in its columns: Jacobi's method, cyclic, to rounding.
inline void eigen(double* a, int n, double* values, double* vectors) {
  constexpr int SWEEPS = 30;
  if (vectors) {
    std::fill(vectors, vectors + n * n, 0.0);
    for (int i = 0; i < n; ++i) vectors[i * n + i] = 1;
  }
  for (int sweep = 0; sweep < SWEEPS; ++sweep) {
    double off = 0, all = 0;
    for (int i = 0; i < n; ++i)
      for (int j = i; j < n; ++j) {
        const double square = a[i * n + j] * a[i * n + j];
        all += square;
        if (j > i) off += square;
      }
    if (!(off > 1e-34 * all)) break;
    for (int p = 0; p < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        const double apq = a[p * n + q];
        const double scale = std::sqrt(std::fabs(a[p * n + p] * a[q * n + q]));
        if (std::fabs(apq) <= 1e-18 * scale || apq == 0) continue;
        // The rotation that zeroes a_pq:  t^2 + 2 theta t - 1 = 0
        const double theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
        const double t = std::copysign(1.0, theta) / (std::fabs(theta) + std::hypot(1.0, theta));
        const double c = 1 / std::hypot(1.0, t), s = t * c;
        for (int k = 0; k < n; ++k) {
          const double kp = a[k * n + p], kq = a[k * n + q];
          a[k * n + p] = c * kp - s * kq;
          a[k * n + q] = s * kp + c * kq;
        }
        double *rp = a + p * n, *rq = a + q * n;
        for (int k = 0; k < n; ++k) {
          const double pk = rp[k], qk = rq[k];
          rp[k] = c * pk - s * qk;
          rq[k] = s * pk + c * qk;
        }
        rp[q] = rq[p] = 0;
        if (vectors)
          for (int k = 0; k < n; ++k) {
            const double kp = vectors[k * n + p], kq = vectors[k * n + q];
            vectors[k * n + p] = c * kp - s * kq;
            vectors[k * n + q] = s * kp + c * kq;
          }
      }
    }
  }
  for (int i = 0; i < n; ++i) values[i] = a[i * n + i];
}

// c = a b, n x n each.
inline void multiply(const double* a, const double* b, double* c, int n) {
  std::fill(c, c + n * n, 0.0);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < n; ++k) {
      const double f = a[i * n + k];
      for (int j = 0; j < n; ++j) c[i * n + j] += f * b[k * n + j];
    }
}

// c = a' b
inline void multiply_transposed(const double* a, const double* b, double* c, int n) {
  std::fill(c, c + n * n, 0.0);
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < n; ++i) {
      const double f = a[k * n + i];
      for (int j = 0; j < n; ++j) c[i * n + j] += f * b[k * n + j];
    }
}

// c = a b'
inline void multiply_by_transposed(const double* a, const double* b, double* c, int n) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) c[i * n + j] = dot(a + i * n, b + j * n, n);
}

}  // namespace convlayer
