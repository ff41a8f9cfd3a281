// LDL' of the KKT matrix, front by front, and solves with it.
//
// The matrix is quasidefinite: with a shift its pivots are positive for variables and negative for
// rows in any order, and so that order is fixed. The factor is of K + shift; what uses it refines.

#pragma once

#include <cmath>

#include "plan.hpp"

namespace convlayer {

// A pivot of the wrong sign, or below this, is replaced: what it stands for is rounding.
constexpr double LEAST_PIVOT = 1e-13;

// target -= f0 a + f1 b + f2 c + f3 d
inline void subtract(double* __restrict target, const double* __restrict a,
                     const double* __restrict b, const double* __restrict c,
                     const double* __restrict d, double f0, double f1, double f2, double f3,
                     int from, int to) {
  for (int j = from; j < to; ++j)
    target[j] -= f0 * a[j] + f1 * b[j] + f2 * c[j] + f3 * d[j];
}

// Two rows at a time: half the loads.
inline void subtract(double* __restrict t, double* __restrict u, const double* __restrict a,
                     const double* __restrict b, const double* __restrict c,
                     const double* __restrict d, const double* f, const double* g, int from,
                     int to) {
  const double f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3];
  const double g0 = g[0], g1 = g[1], g2 = g[2], g3 = g[3];
  for (int j = from; j < to; ++j) {
    const double aj = a[j], bj = b[j], cj = c[j], dj = d[j];
    t[j] -= f0 * aj + f1 * bj + f2 * cj + f3 * dj;
    u[j] -= g0 * aj + g1 * bj + g2 * cj + g3 * dj;
  }
}

// The first `width` pivots of the upper triangle of a front: rows become d l', the rest what is
// left. `inverse` gets 1/d.
inline void eliminate(double* F, const Front& front, const int8_t* signs, double* inverse) {
  const int width = front.width, order = width + front.rows;
  for (int k = 0; k < width; k += 4) {
    const int end = std::min(k + 4, width);
    for (int p = k; p < end; ++p) {
      double* row = F + front.row(p);
      if (!front.diagonal)
        for (int q = k; q < p; ++q) {
          const double* other = F + front.row(q);
          const double f = other[p] * inverse[q];
          for (int j = p; j < order; ++j) row[j] -= f * other[j];
        }
      double pivot = F[front.pivot(p)];
      if (!(pivot * signs[p] > LEAST_PIVOT)) pivot = signs[p] * LEAST_PIVOT;
      inverse[p] = 1 / pivot;
    }
    if (end == k + 1) {  // as of most small fronts
      const double* row = F + front.row(k);
      for (int i = front.diagonal ? width : end; i < order; ++i) {
        const double f = row[i] * inverse[k];
        double* t = F + front.row(i);
        for (int j = i; j < order; ++j) t[j] -= f * row[j];
      }
      continue;
    }
    const double* rows[4];
    double scale[4];
    for (int q = 0; q < 4; ++q) {
      rows[q] = F + front.row(std::min(k + q, end - 1));
      scale[q] = k + q < end ? inverse[k + q] : 0.0;
    }
    int i = front.diagonal ? width : end;
    double f[4], g[4];
    for (; i + 1 < order; i += 2) {
      for (int q = 0; q < 4; ++q) f[q] = rows[q][i] * scale[q], g[q] = rows[q][i + 1] * scale[q];
      double *t = F + front.row(i), *u = F + front.row(i + 1);
      t[i] -= f[0] * rows[0][i] + f[1] * rows[1][i] + f[2] * rows[2][i] + f[3] * rows[3][i];
      subtract(t, u, rows[0], rows[1], rows[2], rows[3], f, g, i + 1, order);
    }
    if (i < order) {
      for (int q = 0; q < 4; ++q) f[q] = rows[q][i] * scale[q];
      subtract(F + front.row(i), rows[0], rows[1], rows[2], rows[3], f[0], f[1], f[2], f[3], i,
               order);
    }
  }
}

struct Factor {
  double* panels;   // L', its rows without the unit diagonal
  double* inverse;  // 1/D
};

inline int64_t factor_size(const Plan& plan) { return plan.factor_size + plan.unknowns(); }

inline Factor factor_at(const Plan& plan, double* storage) {
  return {storage, storage + plan.factor_size};
}

struct FactorWork {
  std::vector<double> front, updates;
  std::vector<int8_t> signs;
  explicit FactorWork(const Plan& plan)
      : front(plan.front_size), updates(plan.update_size), signs(plan.unknowns()) {
    for (int i = 0; i < plan.unknowns(); ++i) signs[plan.position[i]] = i < plan.n ? 1 : -1;
  }
};

// Of K with these values.
inline void factorise(const Plan& plan, const double* values, Factor factor, FactorWork& work) {
  for (const Front& front : plan.fronts) {
    const int order = front.width + front.rows;
    double* F = work.front.data();
    std::fill(F, F + order * front.stride, 0.0);
    const int *source = plan.entry_source.data() + front.entries,
              *target = plan.entry_target.data() + front.entries;
    for (int k = 0; k < front.count; ++k) F[target[k]] += values[source[k]];
    for (int child : front.children) {
      const Front& part = plan.fronts[child];
      const double* update = work.updates.data() + part.update;
      const int* place = plan.relative.data() + part.relative;
      for (int i = 0; i < part.rows; ++i) {
        double* into = F + front.row(place[i]);
        const double* row = update + i * part.rows;
        F[front.pivot(place[i])] += row[i];
        for (int j = i + 1; j < part.rows; ++j) into[place[j]] += row[j];
      }
    }
    double* inverse = factor.inverse + front.first;
    eliminate(F, front, work.signs.data() + front.first, inverse);
    double* panels = factor.panels + front.panel;
    for (int k = 0; k < front.width; ++k) {
      double* panel = panels + front.row(k);
      const double* row = F + front.row(k);
      for (int j = front.diagonal ? front.width : k + 1; j < order; ++j)
        panel[j] = row[j] * inverse[k];
    }
    double* update = work.updates.data() + front.update;
    for (int i = 0; i < front.rows; ++i) {
      const double* row = F + front.row(front.width + i) + front.width;
      for (int j = i; j < front.rows; ++j) update[i * front.rows + j] = row[j];
    }
  }
}

// K x = right, in the order of the unknowns; `buffer` holds unknowns + longest.
inline void solve(const Plan& plan, Factor factor, const double* right, double* x, double* buffer) {
  const int size = plan.unknowns();
  double *z = buffer, *own = buffer + size;
  for (int i = 0; i < size; ++i) z[plan.position[i]] = right[i];
  for (const Front& front : plan.fronts) {
    const double* panel = factor.panels + front.panel;
    const int* rows = plan.row_list.data() + front.row_list;
    double* part = z + front.first;
    const int w = front.width, r = front.rows;
    if (front.is_small()) {
      for (int k = 0; k < w; ++k) {
        const double f = part[k], *row = panel + front.row(k) + w;
        if (!front.diagonal)
          for (int j = k + 1; j < w; ++j) part[j] -= f * row[j - w];
        for (int j = 0; j < r; ++j) z[rows[j]] -= f * row[j];
      }
      continue;
    }
    std::fill(own, own + r, 0.0);
    int k = 0;
    for (; k + 4 <= w; k += 4) {  // four columns at a time
      const double* c[4];
      double g[4] = {part[k], 0, 0, 0};
      for (int q = 0; q < 4; ++q) c[q] = panel + front.row(k + q);
      for (int q = 1; q < 4; ++q) {
        g[q] = part[k + q];
        if (!front.diagonal)
          for (int p = 0; p < q; ++p) g[q] -= g[p] * c[p][k + q];
        part[k + q] = g[q];
      }
      if (!front.diagonal) subtract(part, c[0], c[1], c[2], c[3], g[0], g[1], g[2], g[3], k + 4, w);
      subtract(own - w, c[0], c[1], c[2], c[3], -g[0], -g[1], -g[2], -g[3], w, w + r);
    }
    for (; k < w; ++k) {
      const double f = part[k], *row = panel + front.row(k);
      if (!front.diagonal)
        for (int j = k + 1; j < w; ++j) part[j] -= f * row[j];
      for (int j = 0; j < r; ++j) own[j] += f * row[w + j];
    }
    for (int j = 0; j < r; ++j) z[rows[j]] -= own[j];
  }
  for (int i = 0; i < size; ++i) z[i] *= factor.inverse[i];
  for (size_t f = plan.fronts.size(); f-- > 0;) {
    const Front& front = plan.fronts[f];
    const double* panel = factor.panels + front.panel;
    const int* rows = plan.row_list.data() + front.row_list;
    double* part = z + front.first;
    const int w = front.width, r = front.rows;
    if (front.is_small()) {
      for (int k = w - 1; k >= 0; --k) {
        const double* row = panel + front.row(k) + w;
        double sum = 0;
        for (int j = 0; j < r; ++j) sum += row[j] * z[rows[j]];
        if (!front.diagonal)
          for (int j = k + 1; j < w; ++j) sum += row[j - w] * part[j];
        part[k] -= sum;
      }
      continue;
    }
    for (int j = 0; j < r; ++j) own[j] = z[rows[j]];
    for (int k = w - 1; k >= 0;) {
      if (k < 3) {
        const double* row = panel + front.row(k);
        double sum = dot(row + w, own, r);
        if (!front.diagonal) sum += dot(row + k + 1, part + k + 1, w - k - 1);
        part[k--] -= sum;
        continue;
      }
      const double *c0 = panel + front.row(k), *c1 = panel + front.row(k - 1),
                   *c2 = panel + front.row(k - 2), *c3 = panel + front.row(k - 3);
      double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int j = 0; j < r; ++j) {
        const double z = own[j];
        s0 += c0[w + j] * z, s1 += c1[w + j] * z, s2 += c2[w + j] * z, s3 += c3[w + j] * z;
      }
      if (!front.diagonal) {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int j = k + 1; j < w; ++j) {
          const double z = part[j];
          s0 += c0[j] * z, s1 += c1[j] * z, s2 += c2[j] * z, s3 += c3[j] * z;
        }
        part[k] -= s0;
        part[k - 1] -= s1 + c1[k] * part[k];
        part[k - 2] -= s2 + c2[k] * part[k] + c2[k - 1] * part[k - 1];
        part[k - 3] -= s3 + c3[k] * part[k] + c3[k - 1] * part[k - 1] + c3[k - 2] * part[k - 2];
      } else {
        part[k] -= s0, part[k - 1] -= s1, part[k - 2] -= s2, part[k - 3] -= s3;
      }
      k -= 4;
    }
  }
  for (int i = 0; i < size; ++i) x[i] = z[plan.position[i]];
}

}  // namespace convlayer
