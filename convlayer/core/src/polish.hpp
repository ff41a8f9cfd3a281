// Newton's method on the residual map, and what it says of the row. As in conic/polish.py.
//
//     v = y - s,  y = Pi_K*(v),  s = Pi_K(-v),     F = [ Px + q + A'y ;  Ax + s - b ]
//
//     P dx + A'e = -F1,   A dx - (D^-1 - I) e = -F2,   dv = A dx + F2 + e,   e = D dv
//
// Where d is below CLAMP it counts as that in the factor; what is left is refined away.

#pragma once

#include "interior_point.hpp"

namespace convlayer {

constexpr double CLAMP = 1e-7;
constexpr double TARGET = 1e-13, SETTLED = 1e-11, STUCK = 1e-9, REUSE = 1e-3;
constexpr int STEPS = 20, PATIENCE = 4;
constexpr double MARGIN = 1e-7, SMALLEST_X = 1e-3, ROUNDING = 2e-16, FARTHEST = 1e3, UNSURE = 1e-10;
// A random right-hand side that grows by more than this may have met a null vector, which inverse
// iteration then finds: K makes of it less than NULL_IMAGE, and it touches what is above TOUCHED.
constexpr double GROWTH = 1e2, NULL_IMAGE = 1e-6, TOUCHED = 1e-7;
constexpr int INVERSE_ITERATIONS = 4;

// What came of a row.
enum Outcome {
  SETTLED_WELL, FOREIGN, UNSOLVED, UNPOLISHED, INEXACT, KINK, SINGULAR_SYSTEM, UNREAD
};

struct Report {
  double residual = 0, judged = 0, error = 0, margin = HUGE_NUMBER;
  int steps = 0;
};

struct Polish {
  Row& r;
  const Plan& plan;
  const int n, m;
  std::vector<double> f;
  Report report;
  bool of_point = false;  // the factor belongs to the faces of the point in hand
  bool foreign = false;   // a variable that is seen is held by nothing

  explicit Polish(Row& row)
      : r(row), plan(row.plan), n(plan.n), m(plan.m), f(plan.m) {}

  // y, s and D at v, and F at (x, v).
  void evaluate() {
    report.margin = HUGE_NUMBER;
    for (const Cone& cone : plan.cones) {
      const int k = cone.start;
      const double* v = r.v.data() + k;
      double *y = r.y.data() + k, *s = r.s.data() + k, *d = r.d + k, *U = r.basis + cone.basis;
      double margin = HUGE_NUMBER;
      switch (cone.kind) {
        case ZERO:
          for (int i = 0; i < cone.size; ++i) y[i] = v[i], s[i] = 0, d[i] = 1;
          break;
        case NONNEGATIVE:
          for (int i = 0; i < cone.size; ++i) {
            const bool on = v[i] > 0;
            y[i] = on ? v[i] : 0.0, s[i] = on ? 0.0 : -v[i], d[i] = on;
            margin = std::min(margin, std::fabs(v[i]));
          }
          break;
        case SECOND_ORDER: second_order::project(v, cone.size, y, s, d, U, &margin); break;
        case PSD: psd::project(v, cone.order, y, s, d, U, &margin, r.work.data()); break;
        case EXPONENTIAL: exponential::project_dual(v, y, s, d, U, &margin); break;
        case POWER: power::project_dual(cone.parameter, v, y, s, d, U, &margin); break;
      }
      // a NaN stays
      if (!(margin >= report.margin)) report.margin = margin;
    }
    for (int j = 0; j < n; ++j) r.F1[j] = r.q[j];
    r.add_P(r.x.data(), r.F1.data());
    r.add_At(r.y.data(), r.F1.data());
    for (int i = 0; i < m; ++i) r.F2[i] = r.s[i] - r.b[i];
    r.add_A(r.x.data(), r.F2.data());
  }

  // The largest entry of F relative to its right-hand side and the size of x or y.
  double relative_residual() const {
    const double x = std::min(std::max(largest(r.x.data(), n), 1e-6), 1.0);
    const double y = std::min(std::max(largest(r.y.data(), m), 1e-6), 1.0);
    return relative([&](int j) { return std::fabs(r.q[j]) + y; },
                    [&](int i) { return std::fabs(r.b[i]) + x; });
  }

  template <class G, class H>
  double relative(G of_x, H of_y) const {
    double most = 0, sum = 0;
    for (int j = 0; j < n; ++j) {
      const double size = std::fabs(r.F1[j]) / of_x(j);
      most = std::max(most, size), sum += size * 0;
    }
    for (int i = 0; i < m; ++i) {
      const double size = std::fabs(r.F2[i]) / of_y(i);
      most = std::max(most, size), sum += size * 0;
    }
    return most + sum;
  }

  // The factor at D.
  void factorise() {
    InteriorPoint system(r);
    system.load();
    double* values = r.values.data();
    for (int i = 0; i < m; ++i) f[i] = 1 - 1 / std::max(r.d[i], CLAMP);
    r.spectral_blocks(f.data());
    // A variable that nothing holds stays where it is.
    r.hold();
    foreign = false;
    for (int j = 0; j < n; ++j) {
      values[plan.diagonal_x + j] = r.held[j] ? SHIFT : 1.0;
      foreign = foreign || (!r.held[j] && plan.seen_x[j]);
    }
    system.shift_rows(-SHIFT);
    convlayer::factorise(plan, values, r.factor, r.factor_work);
  }

  // (dx, e) of K (dx, e) = (right, of F's size), to the accuracy of the factor.
  void step(const double* F1, const double* F2) {
    for (int j = 0; j < n; ++j) r.right[j] = r.held[j] ? -F1[j] : 0.0;
    for (int i = 0; i < m; ++i) r.right[n + i] = -F2[i];
    convlayer::solve(plan, r.factor, r.right.data(), r.solution.data(), r.buffer.data());
    // e is in the range of D
    for (int i = 0; i < m; ++i) f[i] = r.d[i] > 0;
    r.spectral(f.data(), r.solution.data() + n, r.dy.data());
    // dv = A dx + F2 + e
    std::copy_n(r.solution.data(), n, r.dx.data());
    for (int i = 0; i < m; ++i) r.ds[i] = F2[i] + r.dy[i];
    r.add_A(r.dx.data(), r.ds.data());
  }

  bool same_faces(const std::vector<double>& d) const {
    for (int i = 0; i < m; ++i)
      if ((d[i] > 0) != (r.d[i] > 0) || (d[i] < 1) != (r.d[i] < 1)) return false;
    return true;
  }

  // From (x, s, y): the best point that full steps find.
  void settle() {
    for (int i = 0; i < m; ++i) r.v[i] = r.y[i] - r.s[i];
    evaluate();
    double now = relative_residual(), best = now;
    std::vector<double> d(m, -1.0);
    std::copy(r.x.begin(), r.x.end(), r.best.begin());
    std::copy(r.v.begin(), r.v.end(), r.best.begin() + n);
    int patience = PATIENCE;
    bool factored = false, gains = false;
    while (report.steps < STEPS && !(best <= TARGET) && patience > 0) {
      if (!(factored && gains)) {
        factorise();
        std::copy_n(r.d, m, d.data());
        factored = true;
      }
      step(r.F1.data(), r.F2.data());
      for (int j = 0; j < n; ++j) r.x[j] += r.dx[j];
      for (int i = 0; i < m; ++i) r.v[i] += r.ds[i];
      ++report.steps;
      evaluate();
      const double old = best;
      const double before = now;
      now = relative_residual();
      gains = now <= std::max(REUSE * before, TARGET) && same_faces(d);
      if (now < best) {
        best = now;
        std::copy(r.x.begin(), r.x.end(), r.best.begin());
        std::copy(r.v.begin(), r.v.end(), r.best.begin() + n);
        patience = old < SETTLED && now > 0.1 * old ? 0 : PATIENCE;
      } else {
        patience = old < SETTLED ? 0 : patience - 1;
      }
    }
    if (now != best) {
      std::copy_n(r.best.begin(), n, r.x.begin());
      std::copy_n(r.best.begin() + n, m, r.v.begin());
      evaluate();
    }
    report.residual = best;
    if (!factored || !same_faces(d)) factorise();
  }

  // What each entry of F is measured against: the sizes of the terms that it is the sum of.
  void term_sizes() {
    std::vector<double>&dual = r.sizes_x, &primal = r.sizes_y;
    auto size = [](double value) { return std::min(std::fabs(value), FARTHEST); };
    for (int j = 0; j < n; ++j) dual[j] = std::fabs(r.q[j]);
    for (int i = 0; i < m; ++i) primal[i] = std::fabs(r.b[i]) + size(r.s[i]);
    for (int k = 0; k < plan.nnz_A; ++k) {
      const int i = plan.A_rows[k], j = plan.A_cols[k];
      dual[j] += std::fabs(r.A[k]) * size(r.y[i]);
      primal[i] += std::fabs(r.A[k]) * size(r.x[j]);
    }
    if (!plan.polyhedral) {
      for (int i = 0; i < m; ++i)
        primal[plan.group[i]] = std::max(primal[plan.group[i]], primal[i]);
      for (int i = 0; i < m; ++i) primal[i] = primal[plan.group[i]];
    }
    raise(primal, plan.part_y, nullptr);
    std::vector<double> least(plan.parts, 0.0), x(plan.parts, 0.0);
    for (int j = 0; j < n; ++j) {
      least[plan.part_x[j]] = std::max(least[plan.part_x[j]], dual[j]);
      x[plan.part_x[j]] = std::max(x[plan.part_x[j]], size(r.x[j]));
    }
    if (plan.nnz_P) {
      const double P = largest(r.P, plan.nnz_P);
      for (int p = 0; p < plan.parts; ++p) least[p] = std::max(least[p], P * x[p]);
      for (int k = 0; k < plan.nnz_P; ++k) {
        const int i = plan.P_rows[k], j = plan.P_cols[k];
        dual[i] += std::fabs(r.P[k]) * size(r.x[j]);
        if (i != j) dual[j] += std::fabs(r.P[k]) * size(r.x[i]);
      }
    }
    raise(dual, plan.part_x, &least);
  }

  // An entry counts for at least a share of the largest one of its part of the program.
  void raise(std::vector<double>& sizes, const std::vector<int>& part,
             const std::vector<double>* given) const {
    constexpr double WITHIN = 1e-6, APART = 1e-8;
    std::vector<double> least(plan.parts, 0.0);
    if (given) {
      least = *given;
    } else {
      for (size_t k = 0; k < sizes.size(); ++k)
        least[part[k]] = std::max(least[part[k]], sizes[k]);
    }
    double all = 1;
    for (double size : least) all = std::max(all, size);
    const double apart = plan.parts == 1 ? APART : APART * all;
    for (size_t k = 0; k < sizes.size(); ++k) sizes[k] += std::max(WITHIN * least[part[k]], apart);
  }

  double judged_residual() {
    term_sizes();
    return relative([&](int j) { return r.sizes_x[j]; }, [&](int i) { return r.sizes_y[i]; });
  }

  // One more step, from a residual of which no more is known than rounding leaves.
  void uncertainty() {
    std::vector<double> F1(r.F1), F2(r.F2), edge(m, 0.0);
    for (const Cone& cone : plan.cones) {
      if (cone.elementwise()) continue;
      const double s = largest(r.s.data() + cone.start, cone.size),
                   y = largest(r.y.data() + cone.start, cone.size);
      if (s > 0 && y > 0) std::fill_n(edge.data() + cone.start, cone.size, std::max(s, y));
    }
    uint32_t state = 12345;
    auto sign = [&] {
      state = state * 1664525u + 1013904223u;
      return state >> 31 ? 1.0 : -1.0;
    };
    std::vector<double> moved(n, 0.0);
    for (int k = 0; k < plan.nnz_A; ++k)
      moved[plan.A_cols[k]] += std::fabs(r.A[k]) * edge[plan.A_rows[k]];
    for (int j = 0; j < n; ++j) F1[j] += ROUNDING * sign() * (r.sizes_x[j] + moved[j]);
    for (int i = 0; i < m; ++i) F2[i] += ROUNDING * sign() * (r.sizes_y[i] + edge[i]);
    step(F1.data(), F2.data());
    std::vector<double> seen(plan.parts, SMALLEST_X);
    for (int j = 0; j < n; ++j)
      if (plan.seen_x[j])
        seen[plan.part_x[j]] = std::max(seen[plan.part_x[j]], std::fabs(r.x[j]));
    double error = 0, sum = 0;
    for (int j = 0; j < n; ++j)
      if (plan.seen_x[j]) {
        const double size = std::fabs(r.dx[j]) / seen[plan.part_x[j]];
        error = std::max(error, size), sum += size * 0;
      }
    report.error = error + sum;
  }

  // Whether a null vector of K touches what is seen: inverse iteration on a random vector, where the
  // factor enlarges one by much.
  bool singular() {
    uint32_t state = 6789;
    std::vector<double>&x = r.solution, &Kx = r.trial;
    for (int i = 0; i < n + m; ++i) {
      state = state * 1664525u + 1013904223u;
      const double random = double(state >> 8) / double(1 << 23) - 1;
      r.right[i] = i < n ? (r.held[i] ? random : 0.0) : random * (r.d[i - n] > 0);
    }
    double growth = 0, image = 0;
    std::vector<double>& range = r.shift;
    for (int i = 0; i < m; ++i) range[i] = r.d[i] > 0;
    for (int step = 0; step < INVERSE_ITERATIONS; ++step) {
      convlayer::solve(plan, r.factor, r.right.data(), x.data(), r.buffer.data());
      // u is in the range of D
      std::copy_n(x.data() + n, m, r.ds.data());
      r.spectral(range.data(), r.ds.data(), x.data() + n);
      const double size = largest(x.data(), n + m);
      growth = size / largest(r.right.data(), n + m);
      if (!std::isfinite(growth)) return true;
      // Not at the first step: a null vector may have little of the random one.
      if (step == 1 && growth <= GROWTH) return false;
      for (double& value : x) value /= size;
      // K x = (P w + A'u,  D A w - (I - D) u)
      std::fill(Kx.begin(), Kx.end(), 0.0);
      r.add_P(x.data(), Kx.data());
      r.add_At(x.data() + n, Kx.data());
      std::fill(r.ds.begin(), r.ds.end(), 0.0);
      r.add_A(x.data(), r.ds.data());
      for (int i = 0; i < m; ++i) r.ds[i] += x[n + i];
      r.spectral(r.d, r.ds.data(), Kx.data() + n);
      for (int i = 0; i < m; ++i) Kx[n + i] -= x[n + i];
      for (int j = 0; j < n; ++j)
        if (!r.held[j]) Kx[j] = 0;
      image = largest(Kx.data(), n + m);
      // K of the shifted factor is symmetric: the shift's signs are taken back
      for (int i = 0; i < n + m; ++i) r.right[i] = i < n ? x[i] : -x[i];
    }
    // the factor may be of a point nearby, whose null vector is not quite one here
    if (image > NULL_IMAGE && growth < 1 / NULL_IMAGE) return false;
    double seen = 0;
    for (int j = 0; j < n; ++j)
      if (plan.seen_x[j]) seen = std::max(seen, std::fabs(x[j]));
    for (int i = 0; i < m; ++i)
      if (plan.seen_y[i]) seen = std::max(seen, std::fabs(x[n + i]));
    return seen > TOUCHED;
  }

  // Newton's method, then what is known of the point. rho: of the units before `recentre`.
  Outcome run(double tolerance, double outer_rho) {
    report = Report();
    settle();
    if (!(report.residual <= SETTLED)) return UNPOLISHED;
    report.judged = judged_residual();
    if (!(report.judged <= STUCK)) {
      step(r.F1.data(), r.F2.data());
      for (int j = 0; j < n; ++j) r.x[j] += r.dx[j];
      for (int i = 0; i < m; ++i) r.v[i] += r.ds[i];
      ++report.steps;
      evaluate();
      report.residual = relative_residual();
      report.judged = judged_residual();
      if (!(report.judged <= STUCK && report.residual <= SETTLED)) return UNPOLISHED;
      factorise();
    }
    if (foreign) return SINGULAR_SYSTEM;
    uncertainty();
    // A tenth of what torch allows: the shift blunts the estimate, and what is near is judged there.
    const double sensitive = 0.1 * std::min(std::max(3e-8, 10 * tolerance), 1e-2);
    if (!(report.judged <= tolerance && report.error <= sensitive)) return INEXACT;
    // Near a curved cone that far off, the derivative may be another one.
    if (!plan.polyhedral && !(report.error <= UNSURE)) return INEXACT;
    if (!(report.margin >= std::max(largest(r.ds.data(), m), MARGIN))) return KINK;
    if (singular()) return SINGULAR_SYSTEM;
    // Beside multipliers so large the costs are not seen in the residual; an x so large may be on
    // its way to infinity.
    const double costs = std::max(largest(r.q.data(), n),
                                  largest(r.P, plan.nnz_P) * largest(r.x.data(), n));
    if (costs > 0 && !(largest(r.y.data(), m) <= std::max(1e6 * costs, 1e-3))) return INEXACT;
    if (!plan.polyhedral) {
      double seen = 0;
      for (int j = 0; j < n; ++j)
        if (plan.seen_x[j]) seen = std::max(seen, std::fabs(r.x[j]));
      if (!(seen * (outer_rho / *r.rho) <= 1e6)) return INEXACT;
    }
    for (double unit : {*r.rho, *r.tau})
      if (!(unit >= 1e-100 && unit <= 1e100)) return INEXACT;
    return SETTLED_WELL;
  }
};

}  // namespace convlayer
