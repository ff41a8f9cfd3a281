// The second-order cone {(t, z) : |z| <= t}, of two rows or more; as in cones/second_order.py.

#pragma once

#include "../dense.hpp"

namespace convlayer::second_order {

// u, the unit vector of z (an axis where z = 0), is all that the basis is made of.
inline int basis_size(int size) { return size - 1; }

// y = Pi(v), s = Pi(-v) and DPi(v) = c I + (d1 - c) f f' + (d2 - c) g g',  f = (1, u)/sqrt 2,
// g = (1, -u)/sqrt 2,  of the eigenvalues l1, l2 = t +- |z| of v.
inline void project(const double* v, int size, double* y, double* s, double* d, double* u,
                    double* margin) {
  const double t = v[0], length = std::sqrt(dot(v + 1, v + 1, size - 1));
  for (int i = 0; i < size - 1; ++i) u[i] = length > 0 ? v[1 + i] / length : (i == 0);
  const double l1 = t + length, l2 = t - length;
  if (l2 >= 0) {
    std::copy(v, v + size, y);
    std::fill(s, s + size, 0.0);
  } else if (l1 <= 0) {
    std::fill(y, y + size, 0.0);
    for (int i = 0; i < size; ++i) s[i] = -v[i];
  } else {
    y[0] = l1 / 2, s[0] = -l2 / 2;
    for (int i = 0; i < size - 1; ++i) y[1 + i] = l1 / 2 * u[i], s[1 + i] = l2 / 2 * u[i];
  }
  d[0] = l1 > 0, d[1] = l2 > 0;
  const double total = std::fabs(l1) + std::fabs(l2);
  const double c = total > 0 ? 0.5 * (1 + (l1 + l2) / total) : 0.0;
  for (int i = 2; i < size; ++i) d[i] = c;
  *margin = std::fabs(std::fabs(t) - length) / std::sqrt(2.0);
}

// The numbers of c I + (d1 - c) f f' + (d2 - c) g g': its head, its arrow, its tail.
struct Arrow {
  double head, side, c, tail;
  explicit Arrow(const double* d, int size) {
    c = size > 2 ? d[2] : 0.0;
    head = (d[0] + d[1]) / 2, side = (d[0] - d[1]) / 2, tail = (d[0] + d[1]) / 2 - c;
  }
};

inline void apply(const double* u, const double* d, const double* x, double* out, int size) {
  const Arrow a(d, size);
  const double along = dot(u, x + 1, size - 1);
  const double head = a.head * x[0] + a.side * along;
  const double rest = a.side * x[0] + a.tail * along;
  for (int i = 0; i < size - 1; ++i) out[1 + i] = a.c * x[1 + i] + rest * u[i];
  out[0] = head;
}

// The upper triangle, by rows.
inline void matrix(const double* u, const double* d, double* out, int size) {
  const Arrow a(d, size);
  *out++ = a.head;
  for (int j = 0; j < size - 1; ++j) *out++ = a.side * u[j];
  for (int i = 0; i < size - 1; ++i)
    for (int j = i; j < size - 1; ++j) *out++ = a.tail * u[i] * u[j] + (i == j ? a.c : 0.0);
}

// W = eta [ w0  w1' ; w1  I + w1 w1'/(1 + w0) ],  W y = W^-1 s = lambda; stored as eta, w, lambda.
inline int scaling_size(int size) { return 1 + 2 * size; }

// sqrt(t^2 - |z|^2), as a product.
inline double hyperbolic(const double* v, int size) {
  const double length = std::sqrt(dot(v + 1, v + 1, size - 1));
  return std::sqrt((v[0] - length) * (v[0] + length));
}

inline void stretch(const double* scaling, const double* x, double* out, int size, bool inverse) {
  const double eta = scaling[0], *w = scaling + 1, sign = inverse ? -1 : 1;
  const double factor = inverse ? 1 / eta : eta;
  const double inner = sign * dot(w + 1, x + 1, size - 1), head = x[0];
  for (int i = 1; i < size; ++i)
    out[i] = factor * (x[i] + sign * w[i] * (head + inner / (1 + w[0])));
  out[0] = factor * (w[0] * head + inner);
}

// H = W'W = eta^2 (2 w w' - J), its upper triangle by rows.
inline bool scale(const double* s, const double* y, int size, double* scaling, double* H) {
  const double sn = hyperbolic(s, size), yn = hyperbolic(y, size);
  if (!(sn > 0 && yn > 0 && s[0] > 0 && y[0] > 0)) return false;
  const double gamma = std::sqrt((1 + dot(s, y, size) / (sn * yn)) / 2);
  double* w = scaling + 1;
  scaling[0] = std::sqrt(sn / yn);
  double square = 0;
  for (int i = 1; i < size; ++i) {
    w[i] = (s[i] / sn - y[i] / yn) / (2 * gamma);
    square += w[i] * w[i];
  }
  w[0] = std::sqrt(1 + square);
  stretch(scaling, y, scaling + 1 + size, size, false);
  const double eta2 = sn / yn;
  for (int i = 0; i < size; ++i)
    for (int j = i; j < size; ++j)
      *H++ = eta2 * (2 * w[i] * w[j] - (i != j ? 0.0 : i == 0 ? 1.0 : -1.0));
  return std::isfinite(eta2 * w[0]);
}

// shift = W'(lambda \ (d_s o d_y - sigma mu e)),  d_s = W^-1 ds,  d_y = W dy
inline void correct(const double* scaling, const double* ds, const double* dy, double sigma_mu,
                    double* shift, int size, double* work) {
  const double* l = scaling + 1 + size;
  double *a = work, *b = work + size;
  stretch(scaling, ds, a, size, true);
  stretch(scaling, dy, b, size, false);
  const double c0 = dot(a, b, size) - sigma_mu, length = hyperbolic(l, size);
  for (int i = 1; i < size; ++i) shift[i] = a[0] * b[i] + b[0] * a[i];
  const double first = (l[0] * c0 - dot(l + 1, shift + 1, size - 1)) / (length * length);
  for (int i = 1; i < size; ++i) a[i] = (shift[i] - first * l[i]) / l[0];
  a[0] = first;
  stretch(scaling, a, shift, size, false);
}

// 1 / (the longest step), where it is limited: seen from lambda, the least eigenvalue of a direction.
inline double worst(const double* l, double length, const double* d, int size) {
  const double h = l[0] / length;
  double first = h * d[0];
  for (int i = 1; i < size; ++i) first -= l[i] / length * d[i];
  const double share = (first + d[0]) / (h + 1);
  double square = 0;
  for (int i = 1; i < size; ++i) {
    const double rest = d[i] - share * l[i] / length;
    square += rest * rest;
  }
  return (std::sqrt(square) - first) / length;
}

inline double worst(const double* scaling, const double* ds, const double* dy, int size,
                    double* work) {
  const double* l = scaling + 1 + size;
  const double length = hyperbolic(l, size);
  stretch(scaling, ds, work, size, true);
  const double of_s = worst(l, length, work, size);
  stretch(scaling, dy, work, size, false);
  return std::max(of_s, worst(l, length, work, size));
}

// How far inside v is, along the unit (1, 0): its least eigenvalue.
inline double depth(const double* v, int size) {
  return v[0] - std::sqrt(dot(v + 1, v + 1, size - 1));
}

}  // namespace convlayer::second_order
