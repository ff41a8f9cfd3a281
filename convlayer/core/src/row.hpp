// One row of a batch: its data in the units it is worked in, and room for the work.

#pragma once

#include "cones/exponential.hpp"
#include "cones/power.hpp"
#include "cones/psd.hpp"
#include "cones/second_order.hpp"
#include "factor.hpp"

namespace convlayer {

// Where the parts of a row stand that are kept from the solution to its derivative.
struct Layout {
  int64_t units, c, e, d, basis, P, A, factor, size;
  explicit Layout(const Plan& plan) {
    int64_t end = 0;
    auto take = [&](int64_t count) {
      const int64_t start = end;
      end += count;
      return start;
    };
    units = take(2);
    c = take(plan.n), e = take(plan.m), d = take(plan.m), basis = take(plan.basis_size);
    P = take(plan.nnz_P), A = take(plan.nnz_A), factor = take(factor_size(plan));
    size = end;
  }
};

struct Row {
  const Plan& plan;
  const Layout layout;
  // Kept: rho, tau; x' = rho x / c, s' = rho e s, y' = tau y / e; the derivative U diag(d) U' of
  // Pi_K*; P' and A'; the factor.
  double *rho, *tau, *c, *e, *d, *basis, *P, *A;
  Factor factor;
  std::vector<double> q, b, x, s, y, v;
  std::vector<double> F1, F2, right, solution, left, trial, buffer, values, scaling, work, shift;
  std::vector<double> dx, dy, ds, dx_a, dy_a, ds_a, sizes_x, sizes_y, best;
  FactorWork factor_work;
  std::vector<exponential::Scaling> exponentials;
  std::vector<power::Scaling> powers;
  std::vector<uint8_t> none;          // rows that are no constraint
  std::vector<uint8_t> held, active;  // variables that an active row or a quadratic term holds

  explicit Row(const Plan& p) : plan(p), layout(p), factor_work(p) {
    const int n = p.n, m = p.m, size = n + m;
    for (auto* part : {&q, &x, &F1, &dx, &dx_a, &sizes_x}) part->assign(n, 0.0);
    for (auto* part : {&b, &s, &y, &v, &F2, &dy, &ds, &dy_a, &ds_a, &sizes_y, &shift})
      part->assign(m, 0.0);
    for (auto* part : {&right, &solution, &left, &trial}) part->assign(size, 0.0);
    best.assign(n + 3 * m, 0.0);
    buffer.assign(size + p.longest, 0.0);
    values.assign(p.values, 0.0);
    scaling.assign(p.scaling_size, 0.0);
    work.assign(p.work_size, 0.0);
    none.assign(m, 0);
    held.assign(n, 0);
    active.assign(m, 0);
    exponentials.resize(p.cones.size());
    powers.resize(p.cones.size());
  }

  void keep_at(double* slab) {
    rho = slab + layout.units, tau = rho + 1;
    c = slab + layout.c, e = slab + layout.e, d = slab + layout.d, basis = slab + layout.basis;
    P = slab + layout.P, A = slab + layout.A;
    factor = factor_at(plan, slab + layout.factor);
  }

  // Which variables an active row or a quadratic term holds.
  void hold() {
    std::fill(held.begin(), held.end(), 0);
    for (const Cone& cone : plan.cones) {
      bool some = false;
      for (int i = cone.start; i < cone.start + cone.size; ++i) {
        active[i] = d[i] > 0;
        some = some || active[i];
      }
      if (!cone.elementwise())
        std::fill_n(active.data() + cone.start, cone.size, uint8_t(some));
    }
    for (int k = 0; k < plan.nnz_A; ++k)
      if (A[k] != 0 && active[plan.A_rows[k]]) held[plan.A_cols[k]] = 1;
    for (int k = 0; k < plan.nnz_P; ++k)
      if (P[k] != 0) held[plan.P_rows[k]] = held[plan.P_cols[k]] = 1;
  }

  // into += P x
  void add_P(const double* x, double* into) const {
    for (const Run& run : plan.P_runs) {
      const double *values = P + run.first, *other = x + run.row;
      const double xj = x[run.column];
      double sum = 0, *target = into + run.row;
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < run.length; ++k) {
        sum += values[k] * other[k];
        target[k] += values[k] * xj;
      }
      into[run.column] += sum;
    }
    for (int k : plan.P_diagonal) into[plan.P_rows[k]] += P[k] * x[plan.P_rows[k]];
  }

  // into += A x
  void add_A(const double* x, double* into) const {
    for (const Run& run : plan.A_runs) {
      const double *values = A + run.first, xj = x[run.column];
      double* target = into + run.row;
      for (int k = 0; k < run.length; ++k) target[k] += values[k] * xj;
    }
  }

  // into += A'y
  void add_At(const double* y, double* into) const {
    for (const Run& run : plan.A_runs)
      into[run.column] += dot(A + run.first, y + run.row, run.length);
  }

  // U f(d) U'x of the rows of all curved cones, and f(d) x of the others.
  void spectral(const double* f, const double* x, double* out) {
    for (const Cone& cone : plan.cones) {
      const int k = cone.start, size = cone.size;
      const double* U = basis + cone.basis;
      switch (cone.kind) {
        case SECOND_ORDER: second_order::apply(U, f + k, x + k, out + k, size); break;
        case PSD: psd::apply(U, f + k, x + k, out + k, cone.order, work.data()); break;
        case EXPONENTIAL:
        case POWER: {
          double inner[3];
          for (int j = 0; j < 3; ++j)
            inner[j] = f[k + j] * (U[j] * x[k] + U[3 + j] * x[k + 1] + U[6 + j] * x[k + 2]);
          for (int i = 0; i < 3; ++i)
            out[k + i] = U[3 * i] * inner[0] + U[3 * i + 1] * inner[1] + U[3 * i + 2] * inner[2];
          break;
        }
        default:
          for (int i = k; i < k + size; ++i) out[i] = f[i] * x[i];
      }
    }
  }

  // U f(d) U' as the blocks of K's values, times a sign.
  void spectral_blocks(const double* f) {
    for (const Cone& cone : plan.cones) {
      const int k = cone.start, size = cone.size;
      const double* U = basis + cone.basis;
      double* block = values.data() + cone.values;
      switch (cone.kind) {
        case SECOND_ORDER: second_order::matrix(U, f + k, block, size); break;
        case PSD: psd::matrix(U, f + k, block, cone.order, work.data()); break;
        case EXPONENTIAL:
        case POWER:
          for (int i = 0; i < 3; ++i)
            for (int j = i; j < 3; ++j)
              *block++ = f[k] * U[3 * i] * U[3 * j] + f[k + 1] * U[3 * i + 1] * U[3 * j + 1] +
                         f[k + 2] * U[3 * i + 2] * U[3 * j + 2];
          break;
        default: std::copy(f + k, f + k + size, block);
      }
    }
  }
};

}  // namespace convlayer
