// The psd cone in scaled upper-triangle coordinates, svec; as in cones/psd.py.

#pragma once

#include "../dense.hpp"

namespace convlayer::psd {

inline int rows(int n) { return n * (n + 1) / 2; }

inline void smat(const double* v, double* a, int n) {
  const double half = std::sqrt(0.5);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i <= j; ++i, ++v) a[i * n + j] = a[j * n + i] = i == j ? *v : *v * half;
}

inline void svec(const double* a, double* v, int n) {
  const double root = std::sqrt(2.0);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i <= j; ++i) *v++ = i == j ? a[i * n + i] : a[i * n + j] * root;
}

// out = svec(R' X R), or svec(R X R'); work holds 3 n^2.
inline void congruent(const double* R, const double* x, double* out, int n, bool transposed,
                      double* work) {
  double *X = work, *half = work + n * n, *full = half + n * n;
  smat(x, X, n);
  if (transposed) {
    multiply(R, X, half, n);
    multiply_by_transposed(half, R, full, n);
  } else {
    multiply_transposed(R, X, half, n);
    multiply(half, R, full, n);
  }
  svec(full, out, n);
}

// The upper triangle by rows of  sum_ab m_ab t_ab t_ab',  t_ab = svec((q_a q_b' + q_b q_a')/norm),
// that is of X -> Q (M o (Q'XQ)) Q'.  m is in svec's order.
inline void matrix(const double* Q, const double* m, double* out, int n, double* work) {
  const int size = rows(n);
  const double root = std::sqrt(2.0);
  double* t = work;  // (size, size) one t_ab a row
  int ab = 0;
  for (int b = 0; b < n; ++b)
    for (int a = 0; a <= b; ++a, ++ab) {
      double* row = t + ab * size;
      for (int j = 0; j < n; ++j)
        for (int i = 0; i <= j; ++i) {
          const double both = Q[i * n + a] * Q[j * n + b] + Q[i * n + b] * Q[j * n + a];
          const double scale = (i == j ? 1.0 : root) * (a == b ? 1.0 : root) / 2;
          *row++ = both * scale;
        }
    }
  double* sum = t + size * size;
  std::fill(sum, sum + size * size, 0.0);
  for (int k = 0; k < size; ++k) {
    if (m[k] == 0) continue;
    const double* row = t + k * size;
    for (int i = 0; i < size; ++i) {
      const double f = m[k] * row[i];
      double* into = sum + i * size;
      for (int j = i; j < size; ++j) into[j] += f * row[j];
    }
  }
  for (int i = 0; i < size; ++i)
    for (int j = i; j < size; ++j) *out++ = sum[i * size + j];
}

inline int matrix_work(int n) { return 2 * rows(n) * rows(n); }

// DPi(v) is X -> Q (W o (Q'XQ)) Q',  W_ij = 1/2 (1 + (l_i + l_j)/(|l_i| + |l_j|)).
inline void project(const double* v, int n, double* y, double* s, double* d, double* Q,
                    double* margin, double* work) {
  double *a = work, *above = a + n * n, *below = above + n * n, *l = below + n * n;
  smat(v, a, n);
  eigen(a, n, l, Q);
  std::fill(above, above + 2 * n * n, 0.0);
  *margin = HUGE_NUMBER;
  for (int k = 0; k < n; ++k) {
    *margin = std::min(*margin, std::fabs(l[k]));
    double* into = l[k] > 0 ? above : below;
    for (int i = 0; i < n; ++i) {
      const double f = std::fabs(l[k]) * Q[i * n + k];
      for (int j = i; j < n; ++j) into[i * n + j] += f * Q[j * n + k];
    }
  }
  svec(above, y, n);
  svec(below, s, n);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i <= j; ++i) {
      const double total = std::fabs(l[i]) + std::fabs(l[j]);
      *d++ = total > 0 ? 0.5 * (1 + (l[i] + l[j]) / total) : 0.0;
    }
}

inline void apply(const double* Q, const double* d, const double* x, double* out, int n,
                  double* work) {
  double* inner = work + 3 * n * n;
  congruent(Q, x, inner, n, false, work);
  for (int k = 0; k < rows(n); ++k) inner[k] *= d[k];
  congruent(Q, inner, out, n, true, work);
}

// R with R'YR = R^-1 S R^-T = diag(lambda); stored as R, R^-1, lambda.
inline int scaling_size(int n) { return 2 * n * n + n; }

inline bool scale(const double* s, const double* y, int n, double* scaling, double* H,
                  double* work) {
  double *R = scaling, *inverse = R + n * n, *lambda = inverse + n * n;
  double *L = work, *Y = L + n * n, *A = Y + n * n, *B = A + n * n, *V = B + n * n;
  // S = LL',  L'YL = V diag(lambda^2) V',  R = L V lambda^-1/2,  R^-1 = lambda^-1 R'Y
  smat(s, L, n);
  smat(y, Y, n);
  std::copy(Y, Y + n * n, A);
  if (!cholesky(A, n)) return false;
  if (!cholesky(L, n)) return false;
  for (int i = 0; i < n; ++i)
    for (int j = i + 1; j < n; ++j) L[i * n + j] = 0;
  multiply_transposed(L, Y, A, n);
  multiply(A, L, B, n);
  eigen(B, n, lambda, V);
  multiply(L, V, R, n);
  for (int k = 0; k < n; ++k) {
    if (!(lambda[k] > 0)) return false;
    lambda[k] = std::sqrt(lambda[k]);
  }
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < n; ++k) R[i * n + k] /= std::sqrt(lambda[k]);
  multiply_transposed(R, Y, inverse, n);
  for (int k = 0; k < n; ++k)
    for (int j = 0; j < n; ++j) inverse[k * n + j] /= lambda[k];
  // H X = G X G,  G = RR'
  multiply_by_transposed(R, R, A, n);
  const double root = std::sqrt(2.0);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i <= j; ++i) {
      const double mine = i == j ? 1.0 : root;
      for (int q = j; q < n; ++q)
        for (int p = q == j ? i : 0; p <= q; ++p) {
          const double scale = mine * (p == q ? 1.0 : root) / 2;
          *H++ = (A[i * n + p] * A[j * n + q] + A[i * n + q] * A[j * n + p]) * scale;
        }
    }
  return true;
}

// shift = R C R',  C_ij = ((d_s d_y + d_y d_s)/2 - sigma mu I)_ij 2/(lambda_i + lambda_j)
inline void correct(const double* scaling, const double* ds, const double* dy, double sigma_mu,
                    double* shift, int n, double* work) {
  const double *R = scaling, *inverse = R + n * n, *lambda = inverse + n * n;
  double *a = work + 3 * n * n, *b = a + n * n, *A = b + n * n, *B = A + n * n, *C = B + n * n;
  congruent(inverse, ds, a, n, true, work);
  congruent(R, dy, b, n, false, work);
  smat(a, A, n);
  smat(b, B, n);
  multiply(A, B, C, n);
  for (int i = 0; i < n; ++i)
    for (int j = i; j < n; ++j) {
      double c = (C[i * n + j] + C[j * n + i]) / 2 - (i == j ? sigma_mu : 0.0);
      A[i * n + j] = c * 2 / (lambda[i] + lambda[j]);
    }
  svec(A, a, n);
  congruent(R, a, shift, n, true, work);
}

inline double worst_of(const double* lambda, const double* d, int n, double* work) {
  double *A = work, *values = A + n * n;
  smat(d, A, n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) A[i * n + j] /= std::sqrt(lambda[i] * lambda[j]);
  eigen(A, n, values, nullptr);
  return -*std::min_element(values, values + n);
}

inline double worst(const double* scaling, const double* ds, const double* dy, int n,
                    double* work) {
  const double *R = scaling, *inverse = R + n * n, *lambda = inverse + n * n;
  double* a = work + 3 * n * n;
  congruent(inverse, ds, a, n, true, work);
  const double of_s = worst_of(lambda, a, n, work);
  congruent(R, dy, a, n, false, work);
  return std::max(of_s, worst_of(lambda, a, n, work));
}

inline double depth(const double* v, int n, double* work) {
  double *A = work, *values = A + n * n;
  smat(v, A, n);
  eigen(A, n, values, nullptr);
  return *std::min_element(values, values + n);
}

// Numbers that the functions above take as `work`, beside `matrix`.
inline int work_size(int n) { return 8 * n * n + 2 * n; }

}  // namespace convlayer::psd
