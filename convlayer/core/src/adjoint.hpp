// The derivative of a solution by the factor that polished it. As in conic/adjoint.py.
//
//     P w + A'u = gx,   D (A w - gy) = (I - D) u
//
// The last Newton factor is a preconditioner; residuals are of D at the solution. Where d is small the
// second equation gives u by itself, so that the factor's own D, of a point nearby, has no say there.

#pragma once

#include "polish.hpp"

namespace convlayer {

constexpr double EXACT = 1e-15, CERTIFIED = 1e-10;
constexpr int ADJOINT_REFINEMENTS = 25, NULLS = 3;

// Cotangents of x and y in the user's units -> (w, u) in these; false where a solve is not good.
inline bool adjoint(Row& r, const double* gx, const double* gy, double* w, double* u) {
  const Plan& plan = r.plan;
  const int n = plan.n, m = plan.m;
  // The cotangents in the row's units.
  std::vector<double>&a = r.dx, &b = r.dy, &g = r.shift;
  double size = 0;
  r.hold();  // what nothing holds has no part in it
  for (int j = 0; j < n; ++j) {
    a[j] = r.held[j] ? gx[j] * r.c[j] / *r.rho : 0.0;
    size = std::max(size, std::fabs(a[j]));
  }
  for (int i = 0; i < m; ++i) g[i] = gy[i] * r.e[i] / *r.tau;
  r.spectral(r.d, g.data(), b.data());
  for (int i = 0; i < m; ++i) size = std::max(size, std::fabs(b[i]));
  double *x = r.solution.data(), *left = r.left.data(), *trial = r.trial.data();
  std::fill(r.solution.begin(), r.solution.end(), 0.0);
  std::vector<double>&Aw = r.ds, &rest = r.F2, &inverse = r.sizes_y, &direct = r.ds_a;
  for (int i = 0; i < m; ++i) {
    const bool small = r.d[i] <= 0.5;
    direct[i] = small ? -1 / (1 - r.d[i]) : 0.0;
    inverse[i] = small ? 0.0 : 1 / r.d[i];
  }
  bool good = false;
  double before = HUGE_NUMBER, error = size;
  std::vector<double>& best = r.right;
  std::fill(best.begin(), best.end(), 0.0);
  // What no solution can meet, of null vectors that nobody sees.
  std::vector<double> off(n + m, 0.0), image(n + m), part(m);
  int taken = 0;
  if (size > 0) {
    for (int step = 0; step < ADJOINT_REFINEMENTS; ++step) {
      // left = (gx - P w - A'u,  D (gy - A w) + (I - D) u)
      for (int j = 0; j < n; ++j) left[j] = 0;
      r.add_P(x, left);
      r.add_At(x + n, left);
      for (int j = 0; j < n; ++j) left[j] = a[j] - left[j] - off[j];
      for (int i = 0; i < m; ++i) Aw[i] = 0;
      r.add_A(x, Aw.data());
      for (int i = 0; i < m; ++i) Aw[i] = g[i] - Aw[i] - x[n + i];
      r.spectral(r.d, Aw.data(), rest.data());
      for (int i = 0; i < m; ++i) rest[i] += x[n + i] - off[n + i];
      error = std::max(largest(left, n), largest(rest.data(), m));
      if (!(error < 0.7 * before)) {
        if (good || taken == NULLS || !std::isfinite(error)) break;
        // The part of it that the shifted factor enlarges most, twice over,
        for (int round = 0; round < 2; ++round) {
          for (int i = 0; i < m; ++i) left[n + i] = -rest[i];
          solve(plan, r.factor, left, trial, r.buffer.data());
          for (int j = 0; j < n; ++j) left[j] = SHIFT * trial[j];
          for (int i = 0; i < m; ++i) rest[i] = SHIFT * trial[n + i];
        }
        // and is it a null vector: P w + A'u = 0,  D A w = (I - D) u?
        std::fill(image.begin(), image.end(), 0.0);
        std::fill(part.begin(), part.end(), 0.0);
        r.add_P(left, image.data());
        r.add_At(rest.data(), image.data());
        r.add_A(left, part.data());
        for (int i = 0; i < m; ++i) part[i] += rest[i];
        r.spectral(r.d, part.data(), image.data() + n);
        for (int i = 0; i < m; ++i) image[n + i] -= rest[i];
        if (!(largest(image.data(), n + m) <= NULL_IMAGE * error + 1e-13 * size)) break;
        for (int j = 0; j < n; ++j) off[j] += left[j];
        for (int i = 0; i < m; ++i) off[n + i] += rest[i];
        ++taken;
        // From the beginning: the shift had blown the null vector up.
        std::fill(r.solution.begin(), r.solution.end(), 0.0);
        std::fill(best.begin(), best.end(), 0.0);
        before = HUGE_NUMBER;
        continue;
      }
      std::copy(r.solution.begin(), r.solution.end(), best.begin());
      before = error;
      good = error <= CERTIFIED * size;
      if (error <= EXACT * size) break;
      // u of small d, and the first equation without it
      std::vector<double>&own = r.dy_a, &moved = r.dx_a;
      r.spectral(direct.data(), rest.data(), own.data());
      std::fill(moved.begin(), moved.end(), 0.0);
      r.add_At(own.data(), moved.data());
      for (int j = 0; j < n; ++j) left[j] -= moved[j];
      for (int i = 0; i < m; ++i) x[n + i] += own[i];
      r.spectral(inverse.data(), rest.data(), left + n);
      solve(plan, r.factor, left, trial, r.buffer.data());
      for (int i = 0; i < n + m; ++i) x[i] += trial[i];
    }
    std::copy(best.begin(), best.end(), r.solution.begin());
  } else {
    good = size == 0;
  }
  // What is rounding beside the largest is nothing.
  const double least = 4e-16 * std::max(largest(x, n + m), 1e-300);
  for (int i = 0; i < n + m; ++i)
    if (std::fabs(x[i]) < least) x[i] = 0;
  for (int j = 0; j < n; ++j) w[j] = *r.tau * r.c[j] * x[j];
  for (int i = 0; i < m; ++i) u[i] = *r.rho * r.e[i] * x[n + i];
  return good;
}

}  // namespace convlayer
