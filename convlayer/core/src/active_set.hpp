// The dual active set for a row of a dense, strictly convex quadratic program: from the unconstrained
// minimum to the solution, a constraint at a time, in some microseconds.
//
// Variables that one equality alone defines are written by the others first, x = S z + x0, and then
//
//     minimise 1/2 z'H z + f'z  subject to  G z <= d, some of it with equality
//
// is a least distance in u = R z + R'^-1 f, H = R'R, with M = G R^-1 in place of G. Its dual is solved
// over the multipliers of a working set W: M_W M_W' l = -d_W, whose factor LDL' changes by a row at a
// time. Where all l of inequalities are positive the row that is violated most comes in; else the
// first that becomes zero on the way goes out. What does not end, or is singular, is another's.
//
// Source: Arnstrom, Bemporad and Axehill (2022), A dual active-set solver for embedded quadratic
// programming; without its heuristics, as the polish judges what comes of it.

#pragma once

#include "units.hpp"

namespace convlayer {

// A pivot of H, and of the working set's factor, relative to its diagonal, that counts as zero.
constexpr double DEFINITE = 1e-9, DEPENDENT = 1e-10;
// A violation, relative to the size of the constraint, that is none.
constexpr double VIOLATED = 1e-10;
// The coefficient of a variable in the equality that defines it, in rows of size one.
constexpr double DEFINING = 1e-2;
// Rows that are solved with a triangle at a time, four of short ones: as many sums as do not wait
// for each other.
constexpr int TOGETHER = 8;
// What an interior point takes in a step beside its factor, in multiplications an unknown.
constexpr double BESIDE = 200;

struct ActiveSet {
  Row& r;
  const Plan& plan;
  const Reduction& how;
  const int n, count;  // of z, and rows of G
  int iterations = 0;
  std::vector<double> S, x0, H, f, G, d, sizes, lengths, u, product;
  std::vector<double> L, D, l, step, next, column;
  std::vector<int> working;
  std::vector<uint8_t> in;

  explicit ActiveSet(Row& row, const Reduction& reduction)
      : r(row), plan(row.plan), how(reduction), n(int(how.kept.size())), count(int(how.rows.size())),
        S(how.defined.size() * n), x0(how.defined.size()), H(size_t(n) * n), f(n),
        G(size_t(count) * n), d(count), sizes(count), lengths(count), u(n), product(plan.n),
        L(size_t(n + 1) * (n + 1)), D(n + 1), l(n + 1), step(n + 1), next(n + 1), column(n + 1), in(count) {}

  // Whether (x, s, y) of the row is the solution now, to rounding.
  bool run() {
    if (!reduce() || !factorise()) return false;
    if (!find()) return false;
    leave();
    return true;
  }

  static void add(double* target, const double* other, double factor, int size) {
#pragma omp simd
    for (int j = 0; j < size; ++j) target[j] += factor * other[j];
  }

  // into += factor x[variable] as a function of z; its constant part is returned.
  double add_variable(int variable, double factor, double* into) const {
    const int place = how.place[variable];
    if (place >= 0) {
      into[place] += factor;
      return 0;
    }
    add(into, S.data() + size_t(-1 - place) * n, factor, n);
    return factor * x0[-1 - place];
  }

  bool reduce() {
    std::fill(S.begin(), S.end(), 0.0);
    for (size_t k = 0; k < how.defined.size(); ++k) {
      const Defined& one = how.defined[k];
      const double own = r.A[one.entry];
      if (!(std::fabs(own) >= DEFINING)) return false;
      for (int entry : how.row_entries[one.row])
        if (entry != one.entry) S[k * n + how.place[plan.A_cols[entry]]] -= r.A[entry] / own;
      x0[k] = r.b[one.row] / own;
    }
    // H = S'P S and f = S'(q + P x0), the lower triangle of H
    std::fill(H.begin(), H.end(), 0.0);
    std::copy(r.q.begin(), r.q.end(), product.begin());
    for (int k = 0; k < plan.nnz_P; ++k) {
      const double value = r.P[k];
      const int i = plan.P_rows[k], j = plan.P_cols[k], a = how.place[i], b = how.place[j];
      if (a < 0) product[j] += value * x0[-1 - a];
      if (b < 0 && i != j) product[i] += value * x0[-1 - b];
      if (a >= 0 && b >= 0) {
        H[size_t(std::max(a, b)) * n + std::min(a, b)] += value;
      } else if (a < 0 && b < 0) {
        outer(S.data() + size_t(-1 - a) * n, S.data() + size_t(-1 - b) * n, value, i != j);
      } else {
        const double* row = S.data() + size_t(-1 - (a < 0 ? a : b)) * n;
        const int z = a < 0 ? b : a;
        for (int c = 0; c < n; ++c)
          H[size_t(std::max(z, c)) * n + std::min(z, c)] += (c == z ? 2 : 1) * value * row[c];
      }
    }
    for (int c = 0; c < n; ++c) f[c] = product[how.kept[c]];
    for (size_t k = 0; k < how.defined.size(); ++k)
      add(f.data(), S.data() + k * n, product[how.defined[k].variable], n);
    std::fill(G.begin(), G.end(), 0.0);
    for (int i = 0; i < count; ++i) {
      d[i] = r.b[how.rows[i]];
      for (int entry : how.row_entries[how.rows[i]])
        d[i] -= add_variable(plan.A_cols[entry], r.A[entry], G.data() + size_t(i) * n);
    }
    return true;
  }

  // H += value (a b' + b a'), once where they are one
  void outer(const double* a, const double* b, double value, bool both) {
    for (int i = 0; i < n; ++i) {
      const double x = value * a[i], y = both ? value * b[i] : 0.0;
      double* row = H.data() + size_t(i) * n;
      if (x != 0) add(row, b, x, i + 1);
      if (y != 0) add(row, a, y, i + 1);
    }
  }

  // H = R'R, its lower triangle R'; G becomes M = G R^-1, f becomes R'^-1 f, d becomes d + M f.
  bool factorise() {
    const int together = n < 64 ? 4 : TOGETHER;
    double most = 0;
    for (int i = 0; i < n; ++i) most = std::max(most, H[size_t(i) * n + i]);
    for (int first = 0; first < n; first += together) {
      double* rows[TOGETHER];
      const int some = std::min(together, n - first);
      for (int q = 0; q < TOGETHER; ++q) rows[q] = H.data() + size_t(first + std::min(q, some - 1)) * n;
      across(rows, some, first);
      for (int q = 0; q < some; ++q) {
        const int k = first + q;
        double pivot = rows[q][k];
        for (int j = first; j < k; ++j) {
          rows[q][j] = (rows[q][j] - dot(rows[q], R(j), j)) / R(j)[j];
          pivot -= rows[q][j] * rows[q][j];
        }
        pivot -= dot(rows[q], rows[q], first);
        if (!(pivot > DEFINITE * most)) return false;
        rows[q][k] = std::sqrt(pivot);
      }
    }
    double* alone[] = {f.data()};
    across(alone, 1, n);
    for (int first = 0; first < count; first += together) {
      double* rows[TOGETHER];
      const int some = std::min(together, count - first);
      for (int q = 0; q < TOGETHER; ++q) rows[q] = G.data() + size_t(first + std::min(q, some - 1)) * n;
      across(rows, some, n);
      for (int i = first; i < first + some; ++i) {
        d[i] += dot(row_of(i), f.data(), n);
        sizes[i] = dot(row_of(i), row_of(i), n), lengths[i] = std::sqrt(sizes[i]);
      }
    }
    return true;
  }

  const double* R(int k) const { return H.data() + size_t(k) * n; }

  // The first entries of up to TOGETHER rows times R^-1, in their places.
  void across(double* const* rows, int some, int to) const {
    if (some == 1) {
      for (int k = 0; k < to; ++k) rows[0][k] = (rows[0][k] - dot(rows[0], R(k), k)) / R(k)[k];
      return;
    }
    const double *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    if (some <= 4) {
      for (int k = 0; k < to; ++k) {
        const double* own = R(k);
        double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int j = 0; j < k; ++j)
          s0 += a[j] * own[j], s1 += b[j] * own[j], s2 += c[j] * own[j], s3 += d[j] * own[j];
        const double sums[] = {s0, s1, s2, s3}, inverse = 1 / own[k];
        for (int q = 0; q < some; ++q) rows[q][k] = (rows[q][k] - sums[q]) * inverse;
      }
      return;
    }
    const double *e = rows[4], *f = rows[5], *g = rows[6], *h = rows[7];
    for (int k = 0; k < to; ++k) {
      const double* own = R(k);
      double s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7)
      for (int j = 0; j < k; ++j) {
        s0 += a[j] * own[j], s1 += b[j] * own[j], s2 += c[j] * own[j], s3 += d[j] * own[j];
        s4 += e[j] * own[j], s5 += f[j] * own[j], s6 += g[j] * own[j], s7 += h[j] * own[j];
      }
      const double sums[] = {s0, s1, s2, s3, s4, s5, s6, s7}, inverse = 1 / own[k];
      for (int q = 0; q < some; ++q) rows[q][k] = (rows[q][k] - sums[q]) * inverse;
    }
  }

  const double* row_of(int i) const { return G.data() + size_t(i) * n; }
  double* factor_row(int k) { return L.data() + size_t(k) * (n + 1); }

  // l' of a row that is to come in, into `column`, and its pivot.
  double bordered(int i) {
    const int size = int(working.size());
    double pivot = sizes[i];
    for (int k = 0; k < size; ++k) column[k] = dot(row_of(working[k]), row_of(i), n);
    for (int k = 0; k < size; ++k) column[k] -= dot(factor_row(k), column.data(), k);
    for (int k = 0; k < size; ++k) {
      const double scaled = column[k] / D[k];
      pivot -= scaled * column[k];
      column[k] = scaled;
    }
    return pivot;
  }

  void append(int i, double pivot, double multiplier) {
    const int size = int(working.size());
    std::copy_n(column.data(), size, factor_row(size));
    D[size] = pivot, l[size] = multiplier;
    working.push_back(i), in[i] = 1;
  }

  void remove(int at) {
    const int size = int(working.size());
    double weight = D[at];
    std::vector<double>& w = column;
    for (int k = at + 1; k < size; ++k) w[k] = factor_row(k)[at];
    // LDL' + weight w w' of the rows below
    for (int k = at + 1; k < size; ++k) {
      const double p = w[k], before = D[k], pivot = before + weight * p * p;
      const double beta = weight * p / pivot;
      weight *= before / pivot;
      D[k] = pivot;
      for (int i = k + 1; i < size; ++i) {
        double& entry = factor_row(i)[k];
        w[i] -= p * entry;
        entry += beta * w[i];
      }
    }
    for (int k = at + 1; k < size; ++k) {
      double *row = factor_row(k), *above = factor_row(k - 1);
      std::copy_n(row, at, above);
      std::copy_n(row + at + 1, k - at - 1, above + at);
      D[k - 1] = D[k], l[k - 1] = l[k];
    }
    in[working[at]] = 0;
    working.erase(working.begin() + at);
  }

  // L'^-1 of `next`
  void backward(int size) {
    for (int k = size - 1; k >= 0; --k)
      add(next.data(), factor_row(k), -next[k], k);
  }

  // Of inequalities with step < 0 the one whose multiplier reaches zero first, and the share of the
  // step until then.
  int blocking(double* share) const {
    int first = -1;
    for (int k = 0; k < int(working.size()); ++k) {
      if (working[k] < how.equalities || !(step[k] < 0)) continue;
      const double mine = -l[k] / step[k];
      if (first < 0 || mine < *share) first = k, *share = mine;
    }
    return first;
  }

  bool find() {
    std::fill(in.begin(), in.end(), uint8_t(0));
    working.clear();
    for (int i = 0; i < how.equalities; ++i) {
      const double pivot = bordered(i);
      if (working.size() == size_t(n) || !(pivot > DEPENDENT * sizes[i])) return false;
      append(i, pivot, 0);
    }
    const int limit = 50 + 5 * (n + count);
    for (iterations = 0; iterations < limit; ++iterations) {
      const int size = int(working.size());
      for (int k = 0; k < size; ++k)
        next[k] = -d[working[k]] - dot(factor_row(k), next.data(), k);
      for (int k = 0; k < size; ++k) next[k] /= D[k];
      backward(size);
      bool inside = true;
      for (int k = 0; k < size; ++k) {
        step[k] = next[k] - l[k];
        inside = inside && (working[k] < how.equalities || next[k] >= 0);
      }
      if (!inside) {
        double share = 1;
        const int out = blocking(&share);
        if (out < 0) return false;
        for (int k = 0; k < size; ++k) l[k] += share * (next[k] - l[k]);
        remove(out);
        continue;
      }
      std::copy_n(next.data(), size, l.data());
      std::fill(u.begin(), u.end(), 0.0);
      for (int k = 0; k < size; ++k) add(u.data(), row_of(working[k]), -l[k], n);
      int worst = -1;
      double most = 0;
      for (int i = how.equalities; i < count; ++i) {
        if (in[i] || r.none[how.rows[i]]) continue;
        const double over = dot(row_of(i), u.data(), n) - d[i], length = lengths[i];
        if (over <= VIOLATED * (length + std::fabs(d[i]))) continue;
        if (!(over <= most * length)) most = over / length, worst = i;
      }
      if (worst < 0) return true;
      if (!enter(worst)) return false;
    }
    return false;
  }

  // A violated constraint into the working set; one that depends on it takes another's place.
  bool enter(int i) {
    double carried = 0;
    for (int tries = 0; tries <= n; ++tries) {
      const double pivot = bordered(i);
      const int size = int(working.size());
      if (size < n && pivot > DEPENDENT * sizes[i]) {
        append(i, pivot, carried);
        return true;
      }
      // M_W' p + m_i = 0: along p, and 1 for i, nothing moves but the dual's value, which rises.
      for (int k = 0; k < size; ++k) next[k] = -column[k];
      backward(size);
      std::copy_n(next.data(), size, step.data());
      double share = 0;
      const int out = blocking(&share);
      if (out < 0) return false;  // no multipliers: no solution
      for (int k = 0; k < size; ++k) l[k] += share * step[k];
      carried += share;
      remove(out);
    }
    return false;
  }

  // (x, s, y) of the row
  void leave() {
    std::fill(r.y.begin(), r.y.end(), 0.0);
    for (size_t k = 0; k < working.size(); ++k) r.y[how.rows[working[k]]] = l[k];
    // R z = u - f
    for (int j = 0; j < n; ++j) u[j] -= f[j];
    for (int k = n - 1; k >= 0; --k) {
      u[k] /= R(k)[k];
      add(u.data(), R(k), -u[k], k);
    }
    for (int c = 0; c < n; ++c) r.x[how.kept[c]] = u[c];
    for (size_t k = 0; k < how.defined.size(); ++k)
      r.x[how.defined[k].variable] = x0[k] + dot(S.data() + k * n, u.data(), n);
    // The multipliers of what defines variables: (Px + q + A'y) = 0 there.
    std::copy(r.q.begin(), r.q.end(), r.F1.begin());
    r.add_P(r.x.data(), r.F1.data());
    r.add_At(r.y.data(), r.F1.data());
    for (const Defined& one : how.defined) r.y[one.row] = -r.F1[one.variable] / r.A[one.entry];
    std::fill(r.s.begin(), r.s.end(), 0.0);
    std::fill(r.left.begin(), r.left.end(), 0.0);
    r.add_A(r.x.data(), r.left.data());
    for (int i = how.equalities; i < count; ++i)
      if (!in[i]) r.s[how.rows[i]] = std::max(r.b[how.rows[i]] - r.left[how.rows[i]], 0.0);
  }
};

// Which variables are written by others, and whether the row is faster so than by interior points.
inline Reduction reduction_of(const Plan& plan) {
  Reduction how;
  if (!plan.polyhedral || !plan.nnz_P || !plan.logs.empty()) return {};
  how.row_entries.resize(plan.m);
  std::vector<int> uses(plan.n, 0);
  std::vector<uint8_t> equality(plan.m, 0), defines(plan.m, 0), curved(plan.n, 0);
  for (const Cone& cone : plan.cones)
    if (cone.kind == ZERO) std::fill_n(equality.begin() + cone.start, cone.size, uint8_t(1));
  for (int k = 0; k < plan.nnz_A; ++k) {
    how.row_entries[plan.A_rows[k]].push_back(k);
    ++uses[plan.A_cols[k]];
  }
  for (int k : plan.P_diagonal) curved[plan.P_rows[k]] = 1;
  how.place.assign(plan.n, 0);
  for (int i = 0; i < plan.m; ++i) {
    if (!equality[i]) continue;
    for (int entry : how.row_entries[i])
      if (uses[plan.A_cols[entry]] == 1) {
        how.place[plan.A_cols[entry]] = -1 - int(how.defined.size());
        how.defined.push_back({plan.A_cols[entry], i, entry});
        defines[i] = 1;
        break;
      }
  }
  for (const Defined& one : how.defined)
    for (int entry : how.row_entries[one.row])
      if (curved[one.variable]) curved[plan.A_cols[entry]] = 1;
  for (int j = 0; j < plan.n; ++j) {
    if (how.place[j] < 0) continue;
    if (!curved[j]) return {};  // H is singular
    how.place[j] = int(how.kept.size());
    how.kept.push_back(j);
  }
  for (int i = 0; i < plan.m; ++i)
    if (equality[i] && !defines[i]) how.rows.push_back(i);
  how.equalities = int(how.rows.size());
  for (int i = 0; i < plan.m; ++i)
    if (!equality[i] && !plan.ignored[i]) how.rows.push_back(i);
  // Multiplications: H of the variables that are written by others, its factor, M, the steps; and
  // of the other way.
  const double n = double(how.kept.size()), rows = double(how.rows.size());
  double work = n * n * n / 6 + rows * n * n / 2 + std::min(n, rows) / 2 * (rows * n + n * n);
  for (int k = 0; k < plan.nnz_P; ++k) {
    const bool a = how.place[plan.P_rows[k]] < 0, b = how.place[plan.P_cols[k]] < 0;
    if (a || b) work += a && b ? n * n / 2 : n;
  }
  how.worth = n > 0 && work < 10 * (plan.flops / 2 + BESIDE * (plan.n + plan.m));
  return how.worth ? how : Reduction();
}

}  // namespace convlayer
