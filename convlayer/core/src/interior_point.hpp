// Mehrotra's primal-dual interior point for a row: from outside the constraints to near a solution.
//
//     Px + q + A'y = 0,   Ax + s = b,   s on the central path of y at mu,   mu -> 0
//
// Newton's system, with H y = s the scaling of each cone, 0 for equalities:
//
//     K = [ P   A' ]     K (dx, dy) = (-rd, -rp + s + shift),   ds = -rp - A dx
//         [ A  -H  ]
//
// ds is read off the primal row: through H the residual would rise near the end. Rows that have no
// solution do not converge, and are another's.

#pragma once

#include "units.hpp"

namespace convlayer {

// Added to K's diagonal, with the signs that make it quasidefinite.
constexpr double SHIFT = 1e-8;
// Relative residual of a solve at which it is not refined further, and refinements at most.
constexpr double SOLVED = 1e-8;
constexpr int REFINEMENTS = 3;
constexpr double BOUNDARY = 0.99;
constexpr double SHORTER[] = {1.0,  0.98, 0.95, 0.9,  0.85, 0.8,  0.72, 0.64,
                              0.55, 0.45, 0.35, 0.25, 0.15, 0.07, 0.02, 0.003};

struct InteriorPoint {
  Row& r;
  const Plan& plan;
  const int n, m;
  int iterations = 0;
  bool started = false;

  explicit InteriorPoint(Row& row) : r(row), plan(row.plan), n(plan.n), m(plan.m) {}

  // K x for K with these values, without its shift: into = right - K x.
  void residual(const double* x, const double* right, double* into) {
    for (int i = 0; i < n + m; ++i) into[i] = -right[i];
    r.add_P(x, into);
    r.add_At(x + n, into);
    r.add_A(x, into + n);
    for (const Cone& cone : plan.cones) {
      const double* block = r.values.data() + cone.values;
      const double* y = x + n + cone.start;
      double* out = into + n + cone.start;
      if (cone.elementwise()) {
        for (int i = 0; i < cone.size; ++i) out[i] += block[i] * y[i];
      } else {
        for (int i = 0; i < cone.size; ++i) {
          out[i] += *block++ * y[i];
          for (int j = i + 1; j < cone.size; ++j, ++block)
            out[i] += *block * y[j], out[j] += *block * y[i];
        }
      }
    }
    for (int i = 0; i < n + m; ++i) into[i] = -into[i];
  }

  void load() {
    std::copy(r.P, r.P + plan.nnz_P, r.values.data());
    std::copy(r.A, r.A + plan.nnz_A, r.values.data() + plan.nnz_P);
    std::fill_n(r.values.data() + plan.diagonal_x, n, 0.0);
  }

  // The blocks hold H; K has -H.
  void factorise() {
    double* values = r.values.data();
    std::fill_n(values + plan.diagonal_x, n, SHIFT);
    for (int k = plan.block_values; k < plan.values; ++k) values[k] = -values[k];
    shift_rows(-SHIFT);
    convlayer::factorise(plan, values, r.factor, r.factor_work);
    shift_rows(SHIFT);
    std::fill_n(values + plan.diagonal_x, n, 0.0);
  }

  void shift_rows(double amount) {
    for (const Cone& cone : plan.cones) {
      double* block = r.values.data() + cone.values;
      for (int i = 0; i < cone.size; ++i) {
        *block += amount;
        block += cone.elementwise() ? 1 : cone.size - i;
      }
    }
  }

  // r.solution of K . = r.right; the blocks hold -H.
  void solve() {
    double *x = r.solution.data(), *left = r.left.data();
    convlayer::solve(plan, r.factor, r.right.data(), x, r.buffer.data());
    const double goal = SOLVED * largest(r.right.data(), n + m);
    double before = HUGE_NUMBER;
    for (int step = 0; step < REFINEMENTS; ++step) {
      residual(x, r.right.data(), left);
      const double error = largest(left, n + m);
      if (!(error > goal) || !(error < 0.5 * before)) break;
      before = error;
      convlayer::solve(plan, r.factor, left, r.trial.data(), r.buffer.data());
      for (int i = 0; i < n + m; ++i) x[i] += r.trial[i];
    }
  }

  void start() {
    started = true;
    std::fill(r.x.begin(), r.x.end(), 0.0);
    if (plan.symmetric) {
      // The least-squares start: K with H = I, then both inside.
      load();
      double* values = r.values.data();
      std::fill(values + plan.block_values, values + plan.values, 0.0);
      for (const Cone& cone : plan.cones) {
        double* block = values + cone.values;
        for (int i = 0; i < cone.size; ++i) {
          *block = cone.kind == ZERO ? 0.0 : 1.0;
          block += cone.elementwise() ? 1 : cone.size - i;
        }
      }
      factorise();
      for (int j = 0; j < n; ++j) r.right[j] = -r.q[j];
      for (int i = 0; i < m; ++i) r.right[n + i] = r.b[i];
      solve();
      std::copy_n(r.solution.data(), n, r.x.data());
      for (int i = 0; i < m; ++i) r.y[i] = r.solution[n + i], r.s[i] = -r.y[i];
      inside(r.s.data());
      inside(r.y.data());
    }
    for (const Cone& cone : plan.cones) {
      double *s = r.s.data() + cone.start, *y = r.y.data() + cone.start;
      if (cone.kind == ZERO) {
        std::fill_n(s, cone.size, 0.0);
        if (!plan.symmetric) std::fill_n(y, cone.size, 0.0);
      } else if (!plan.symmetric) {
        unit(cone, s);
        std::copy_n(s, cone.size, y);
      }
    }
  }

  // s = y on the central path at mu = 1
  static void unit(const Cone& cone, double* point) {
    switch (cone.kind) {
      case EXPONENTIAL: exponential::unit(point); break;
      case POWER: power::unit(cone.parameter, point); break;
      case NONNEGATIVE: std::fill_n(point, cone.size, 1.0); break;
      case SECOND_ORDER:
        std::fill_n(point, cone.size, 0.0);
        point[0] = 1;
        break;
      case PSD:
        std::fill_n(point, cone.size, 0.0);
        for (int k = 0; k < cone.order; ++k) point[k * (k + 3) / 2] = 1;
        break;
      default: break;
    }
  }

  double depth(const Cone& cone, const double* v) {
    switch (cone.kind) {
      case SECOND_ORDER: return second_order::depth(v, cone.size);
      case PSD: return psd::depth(v, cone.order, r.work.data());
      case NONNEGATIVE: return *std::min_element(v, v + cone.size);
      default: return HUGE_NUMBER;
    }
  }

  // v (m) moved along the unit into the inside of symmetric cones.
  void inside(double* v) {
    double least = HUGE_NUMBER;
    for (const Cone& cone : plan.cones) least = std::min(least, depth(cone, v + cone.start));
    if (!(least < 1e-1)) return;
    std::vector<double> one(m, 0.0);
    for (const Cone& cone : plan.cones) unit(cone, one.data() + cone.start);
    const double move = 1 - std::min(least, 0.0);
    for (int i = 0; i < m; ++i) v[i] += move * one[i];
  }

  bool scale() {
    for (size_t k = 0; k < plan.cones.size(); ++k) {
      const Cone& cone = plan.cones[k];
      const double *s = r.s.data() + cone.start, *y = r.y.data() + cone.start;
      double* block = r.values.data() + cone.values;
      double* scaling = r.scaling.data() + cone.scaling;
      switch (cone.kind) {
        case ZERO: std::fill_n(block, cone.size, 0.0); break;
        case NONNEGATIVE:
          for (int i = 0; i < cone.size; ++i) {
            if (!(s[i] > 0 && y[i] > 0)) return false;
            block[i] = s[i] / y[i];
          }
          break;
        case SECOND_ORDER:
          if (!second_order::scale(s, y, cone.size, scaling, block)) return false;
          break;
        case PSD:
          if (!psd::scale(s, y, cone.order, scaling, block, r.work.data())) return false;
          break;
        case EXPONENTIAL:
        case POWER: {
          double* H;
          if (cone.kind == EXPONENTIAL) {
            if (!exponential::scale(s, y, r.exponentials[k])) return false;
            H = r.exponentials[k].H;
          } else {
            if (!power::scale(cone.parameter, s, y, r.powers[k])) return false;
            H = r.powers[k].H;
          }
          for (int i = 0; i < 3; ++i)
            for (int j = i; j < 3; ++j) *block++ = H[3 * i + j];
          break;
        }
      }
    }
    return true;
  }

  void correct(double sigma_mu) {
    for (size_t k = 0; k < plan.cones.size(); ++k) {
      const Cone& cone = plan.cones[k];
      const int at = cone.start;
      const double *ds = r.ds_a.data() + at, *dy = r.dy_a.data() + at;
      double *shift = r.shift.data() + at, *scaling = r.scaling.data() + cone.scaling;
      switch (cone.kind) {
        case ZERO: std::fill_n(shift, cone.size, 0.0); break;
        case NONNEGATIVE:
          for (int i = 0; i < cone.size; ++i) shift[i] = (ds[i] * dy[i] - sigma_mu) / r.y[at + i];
          break;
        case SECOND_ORDER:
          second_order::correct(scaling, ds, dy, sigma_mu, shift, cone.size, r.work.data());
          break;
        case PSD:
          psd::correct(scaling, ds, dy, sigma_mu, shift, cone.order, r.work.data());
          break;
        case EXPONENTIAL: exponential::correct(r.exponentials[k], ds, dy, sigma_mu, shift); break;
        case POWER:
          power::correct(cone.parameter, r.powers[k], ds, dy, sigma_mu, shift);
          break;
      }
    }
  }

  // The longest step that stays inside, at most 1.
  double step(const double* ds, const double* dy) {
    double worst = 0;
    for (const Cone& cone : plan.cones) {
      const int at = cone.start;
      const double* scaling = r.scaling.data() + cone.scaling;
      switch (cone.kind) {
        case NONNEGATIVE:
          for (int i = at; i < at + cone.size; ++i) {
            worst = std::max(worst, -ds[i] / r.s[i]);
            worst = std::max(worst, -dy[i] / r.y[i]);
          }
          break;
        case SECOND_ORDER:
          worst = std::max(worst, second_order::worst(scaling, ds + at, dy + at, cone.size,
                                                      r.work.data()));
          break;
        case PSD:
          worst = std::max(worst, psd::worst(scaling, ds + at, dy + at, cone.order,
                                             r.work.data()));
          break;
        default: break;
      }
    }
    double length = worst > 1 ? 1 / worst : 1.0;
    if (plan.symmetric) return length;
    double s[3], y[3];
    for (double share : SHORTER) {
      bool good = true;
      for (const Cone& cone : plan.cones) {
        if (cone.kind != EXPONENTIAL && cone.kind != POWER) continue;
        const int at = cone.start;
        for (int i = 0; i < 3; ++i) {
          s[i] = r.s[at + i] + share * length * ds[at + i];
          y[i] = r.y[at + i] + share * length * dy[at + i];
        }
        good = cone.kind == EXPONENTIAL ? exponential::inside(s, y)
                                        : power::inside(cone.parameter, s, y);
        if (!good) break;
      }
      if (good) return share * length;
    }
    return 0;
  }

  void residuals() {
    for (int j = 0; j < n; ++j) r.F1[j] = r.q[j];
    r.add_P(r.x.data(), r.F1.data());
    r.add_At(r.y.data(), r.F1.data());
    for (int i = 0; i < m; ++i) r.F2[i] = r.s[i] - r.b[i];
    r.add_A(r.x.data(), r.F2.data());
  }

  // dx, dy, ds towards the target; the right-hand sides' residuals are met to a share.
  void direct(double share, bool corrected, std::vector<double>& dx, std::vector<double>& dy,
              std::vector<double>& ds) {
    for (int j = 0; j < n; ++j) r.right[j] = -share * r.F1[j];
    for (int i = 0; i < m; ++i)
      r.right[n + i] = -share * r.F2[i] + r.s[i] + (corrected ? r.shift[i] : 0.0);
    solve();
    std::copy_n(r.solution.data(), n, dx.data());
    std::copy_n(r.solution.data() + n, m, dy.data());
    for (int i = 0; i < m; ++i) ds[i] = -share * r.F2[i];
    std::fill(r.left.begin(), r.left.end(), 0.0);
    r.add_A(dx.data(), r.left.data());
    for (int i = 0; i < m; ++i) ds[i] -= r.left[i];
    for (const Cone& cone : plan.cones)
      if (cone.kind == ZERO) std::fill_n(ds.data() + cone.start, cone.size, 0.0);
  }

  // Until residuals and gap are below the tolerance, relative to a point of size one: whether they
  // are. It may be asked again, for less.
  bool run(double tolerance, int limit) {
    if (!started) start();
    int idle = 0;
    double best = HUGE_NUMBER, least[] = {HUGE_NUMBER, HUGE_NUMBER, HUGE_NUMBER};
    load();
    while (true) {
      residuals();
      const double gap = dot(r.s.data(), r.y.data(), m);
      const double size_x = 1 + largest(r.x.data(), n), size_y = 1 + largest(r.y.data(), m);
      const double primal = largest(r.F2.data(), m) / size_x,
                   dual = largest(r.F1.data(), n) / size_y;
      const double cost = std::fabs(dot(r.q.data(), r.x.data(), n));
      const double errors[] = {primal, dual, std::fabs(gap) / (1 + cost)};
      const double error = std::max({errors[0], errors[1], errors[2]});
      if (!std::isfinite(error) || size_x > 1e12 || size_y > 1e12) return false;
      if (error <= tolerance) return true;
      if (iterations >= limit) return false;
      // A row that gains in none of the three for some steps does not converge.
      bool gains = false;
      for (int k = 0; k < 3; ++k)
        if (errors[k] < 0.9 * least[k]) least[k] = errors[k], gains = true;
      idle = gains ? 0 : idle + 1;
      best = std::min(best, error);
      if (idle > 12 || (idle > 5 && best < 1e-5)) return false;
      ++iterations;
      if (!scale()) return false;
      factorise();
      const double mu = plan.degree ? gap / plan.degree : 0.0;
      direct(1, false, r.dx_a, r.dy_a, r.ds_a);
      const double affine = step(r.ds_a.data(), r.dy_a.data());
      const double rest = 1 - affine, sigma = rest * rest * rest;
      correct(sigma * mu);
      direct(1 - sigma, true, r.dx, r.dy, r.ds);
      double length = BOUNDARY * step(r.ds.data(), r.dy.data());
      if (!(length > 1e-8)) return false;
      for (int j = 0; j < n; ++j) r.x[j] += length * r.dx[j];
      for (int i = 0; i < m; ++i) r.s[i] += length * r.ds[i], r.y[i] += length * r.dy[i];
    }
  }
};

}  // namespace convlayer
