// The units in which a row is worked: rows of A, costs and right-hand sides of size one; then those
// in which a point has size one. As in conic/residual.py.

#pragma once

#include "row.hpp"

namespace convlayer {

constexpr double NO_BOUND = 1e100, INFINITE = 1e15, BALANCED = 1e3, PRESENT = 1e-14, MILD = 1e2;
constexpr int EQUILIBRATIONS = 20;

inline double reciprocal(double value) { return value > 0 ? 1 / value : 1.0; }

// The largest entry of each row of |A|, the same within a curved cone.
inline void row_sizes(const Plan& plan, const double* A, const uint8_t* skip, const double* row,
                      const double* column, double* sizes) {
  std::fill(sizes, sizes + plan.m, 0.0);
  for (int k = 0; k < plan.nnz_A; ++k) {
    const int i = plan.A_rows[k];
    if (skip && skip[i]) continue;
    double size = std::fabs(A[k]);
    if (row) size *= row[i] * column[plan.A_cols[k]];
    double& most = sizes[plan.group[i]];
    most = std::max(most, size);
  }
  for (int i = 0; i < plan.m; ++i) sizes[i] = sizes[plan.group[i]];
}

// Row and column scales; A' = e A c.
inline void equilibrate(Row& r) {
  const Plan& plan = r.plan;
  const int n = plan.n, m = plan.m;
  std::vector<double>& sizes = r.sizes_y;
  row_sizes(plan, r.A, nullptr, nullptr, nullptr, sizes.data());
  std::vector<double>& sums = r.F2;
  std::fill(sums.begin(), sums.end(), 0.0);
  for (int k = 0; k < plan.nnz_A; ++k) sums[plan.A_rows[k]] += std::fabs(r.A[k]);
  // A row with one entry, a bound, takes any scale: it says nothing about its column's.
  std::vector<uint8_t> bounds(m);
  for (int i = 0; i < m; ++i) {
    r.e[i] = reciprocal(sizes[i]);
    bounds[i] = plan.alone[i] && sums[i] <= sizes[i];
  }
  std::vector<double>& columns = r.sizes_x;
  std::fill(columns.begin(), columns.end(), 0.0);
  for (int k = 0; k < plan.nnz_A; ++k) {
    const int i = plan.A_rows[k];
    if (bounds[i]) continue;
    double& most = columns[plan.A_cols[k]];
    most = std::max(most, std::fabs(r.A[k]) * r.e[i]);
  }
  double least = HUGE_NUMBER, most = 0;
  for (double size : columns) {
    if (size > 0) least = std::min(least, size);
    most = std::max(most, size);
  }
  std::fill(r.c, r.c + n, 1.0);
  if (most <= BALANCED * least) return;
  // Ruiz's iteration; P counts relative to its largest entry.
  const double P = reciprocal(largest(r.P, plan.nnz_P));
  std::fill(r.e, r.e + m, 1.0);
  std::vector<double> alone(n);
  for (int step = 0; step < EQUILIBRATIONS; ++step) {
    row_sizes(plan, r.A, bounds.data(), r.e, r.c, sizes.data());
    std::fill(columns.begin(), columns.end(), 0.0);
    std::fill(alone.begin(), alone.end(), 0.0);
    for (int k = 0; k < plan.nnz_A; ++k) {
      const int i = plan.A_rows[k], j = plan.A_cols[k];
      if (!bounds[i]) columns[j] = std::max(columns[j], std::fabs(r.A[k]) * r.e[i] * r.c[j]);
    }
    for (int k = 0; k < plan.nnz_P; ++k) {
      const int i = plan.P_rows[k], j = plan.P_cols[k];
      const double size = std::fabs(r.P[k]) * P * r.c[i] * r.c[j];
      alone[i] = std::max(alone[i], size), alone[j] = std::max(alone[j], size);
    }
    for (int i = 0; i < m; ++i) r.e[i] *= std::sqrt(reciprocal(sizes[i]));
    for (int j = 0; j < n; ++j) r.c[j] *= std::sqrt(reciprocal(std::max(columns[j], alone[j])));
  }
  row_sizes(plan, r.A, nullptr, r.e, r.c, sizes.data());
  for (int i = 0; i < m; ++i) r.e[i] *= reciprocal(sizes[i]);
}

// Whether the variables under a logarithm want units of their own, which the core does not give.
inline bool wants_units_of_logarithms(const Row& r) {
  const Plan& plan = r.plan;
  if (plan.logs.empty()) return false;
  std::vector<double> curvature(plan.n, 0.0), cost(plan.n, 0.0);
  for (int k = 0; k < plan.nnz_P; ++k) {
    const double size = std::fabs(r.P[k]);
    for (int j : {plan.P_rows[k], plan.P_cols[k]}) curvature[j] = std::max(curvature[j], size);
  }
  double value = 0;
  for (int j = 0; j < plan.n; ++j)
    if (plan.log_valued[j]) value = std::max(value, std::fabs(r.q[j]));
  if (!(value > 0)) value = 1;
  for (int j = 0; j < plan.n; ++j) {
    const double mine = std::max(std::sqrt(curvature[j] / value), std::fabs(r.q[j]) / value);
    double& most = cost[plan.log_group[j]];
    most = std::max(most, mine);
  }
  for (int j = 0; j < plan.n; ++j) {
    const double mine = cost[plan.log_group[j]];
    if (plan.log_seen[j] && mine > 0 && !(mine <= MILD && mine >= 1 / MILD)) return true;
  }
  return false;
}

// x' = rho x, y' = tau y: the same program in other units.
inline void rescale(Row& r, double rho, double tau) {
  const double curvature = tau / rho;
  for (int k = 0; k < r.plan.nnz_P; ++k) r.P[k] *= curvature;
  for (double& value : r.q) value *= tau;
  for (double& value : r.b) value *= rho;
  *r.rho *= rho, *r.tau *= tau;
}

// The data of a row, read into the row and brought to size one; false where that is not the core's.
inline bool normalise(Row& r, const double* P, const double* q, const double* A, const double* b) {
  const Plan& plan = r.plan;
  const int n = plan.n, m = plan.m;
  std::copy(P, P + plan.nnz_P, r.P);
  std::copy(q, q + n, r.q.data());
  std::copy(A, A + plan.nnz_A, r.A);
  std::copy(b, b + m, r.b.data());
  for (int i = 0; i < m; ++i)
    r.none[i] = plan.ignored[i] || (b[i] >= NO_BOUND && plan.group[i] == i);
  for (const Cone& cone : plan.cones)
    if (cone.kind != NONNEGATIVE)
      for (int i = cone.start; i < cone.start + cone.size; ++i) r.none[i] = 0;
  for (int k = 0; k < plan.nnz_A; ++k)
    if (r.none[plan.A_rows[k]]) r.A[k] = 0;
  for (int i = 0; i < m; ++i)
    if (r.none[i]) r.b[i] = 0;
  const double sums = largest(r.P, plan.nnz_P) + largest(r.q.data(), n) +
                      largest(r.A, plan.nnz_A) + largest(r.b.data(), m);
  if (!std::isfinite(sums) || wants_units_of_logarithms(r)) return false;
  equilibrate(r);
  for (int k = 0; k < plan.nnz_A; ++k) r.A[k] *= r.e[plan.A_rows[k]] * r.c[plan.A_cols[k]];
  for (int k = 0; k < plan.nnz_P; ++k) r.P[k] *= r.c[plan.P_rows[k]] * r.c[plan.P_cols[k]];
  for (int j = 0; j < n; ++j) r.q[j] *= r.c[j];
  for (int i = 0; i < m; ++i) r.b[i] *= r.e[i];

  // rho b, and tau (q, P / rho), of size one
  const double top = largest(r.b.data(), m), costs = largest(r.q.data(), n),
               curvature = largest(r.P, plan.nnz_P);
  if (top >= INFINITE) return false;
  double rho = 1;
  if (top > 0) {
    double sum = 0;
    int count = 0;
    for (double value : r.b)
      if (std::fabs(value) > PRESENT * top) sum += std::log(std::fabs(value)), ++count;
    rho = std::exp(-sum / count);
  } else if (curvature > 0 && costs > 0) {
    rho = curvature / costs;
  }
  *r.rho = *r.tau = 1;
  rescale(r, rho, reciprocal(std::max(costs, curvature / rho)));
  for (int i = 0; i < m; ++i)
    if (r.none[i]) r.b[i] = 1;
  return std::isfinite(*r.rho) && std::isfinite(*r.tau);
}

// Units in which a point has |x| and |y| near one.
inline void recentre(Row& r) {
  const Plan& plan = r.plan;
  const double q = largest(r.q.data(), plan.n), P = largest(r.P, plan.nnz_P);
  double felt = 0;
  bool some = false;
  for (int j = 0; j < plan.n; ++j) some = some || plan.seen_x[j];
  for (int j = 0; j < plan.n; ++j)
    if (!some || plan.seen_x[j]) felt = std::max(felt, std::fabs(r.x[j]));
  double size = std::min(std::max(felt, 1e-2), 1e8), natural = q;
  if (plan.nnz_P) {
    const double by_costs = q > 0 && P > 0 ? std::min(std::max(q / P, 1e-6), 1.0) : 1e-2;
    size = std::max(std::min(felt, 1e8), by_costs);
    natural = std::max(q, P * size);
  }
  const double rho = 1 / size;
  if (!(natural > 0)) natural = 1;
  const double tau = 1 / std::max(std::min(largest(r.y.data(), plan.m), 1e8), natural);
  rescale(r, rho, tau);
  for (double& value : r.x) value *= rho;
  for (double& value : r.s) value *= rho;
  for (double& value : r.y) value *= tau;
}

// A point into these units, and out of them.
inline void enter(Row& r, const double* x, const double* s, const double* y) {
  for (int j = 0; j < r.plan.n; ++j) r.x[j] = x[j] / r.c[j] * *r.rho;
  for (int i = 0; i < r.plan.m; ++i) {
    r.s[i] = s[i] * *r.rho * r.e[i], r.y[i] = y[i] * *r.tau / r.e[i];
    if (r.none[i]) r.s[i] = r.b[i], r.y[i] = 0;
  }
}

inline void leave(const Row& r, double* x, double* s, double* y) {
  for (int j = 0; j < r.plan.n; ++j) x[j] = r.x[j] * r.c[j] / *r.rho;
  for (int i = 0; i < r.plan.m; ++i) {
    s[i] = r.s[i] / (*r.rho * r.e[i]);
    y[i] = r.none[i] ? 0.0 : r.y[i] * r.e[i] / *r.tau;
  }
}

}  // namespace convlayer
