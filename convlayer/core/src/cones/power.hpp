// The power cone K = {(x, y, z) : x, y >= 0, x^alpha y^beta >= |z|}, beta = 1 - alpha: the
// projection onto its dual and the derivative of that, as in cones/power.py, and the scaling by the
// barrier of its dual.
#pragma once

#include <algorithm>
#include <cmath>

#include "exponential.hpp"

namespace convlayer {
namespace power {

// |z| below this share of |v| is 0.
constexpr double FLAT = 1e-60;
// The least distance of the root from its anchor, relative to |z|.
constexpr double NEAREST = 1e-160;
// x or y below this share of |v| is 0 beside what it becomes.
constexpr double TINY = 1e-100;
// Steps of Newton's method in its bracket, at most.
constexpr int ITERATIONS = 100;

// p = (x, y, sign(z) w) and p - v = (x', y', -sign(z) q), q = |z| - w.
struct Root {
    double x, y, w, q;
    double polar_x, polar_y;
};

// p_x and p_x - x, whose product is weight area, and their sum.
inline void branch(double x, double weight, double area, double& p_x, double& wide,
                   double& polar_x) {
    wide = std::sqrt(x * x + 4 * weight * area);
    const double sum = (std::abs(x) + wide) * 0.5, rest = weight * area / sum;
    p_x = x >= 0 ? sum : rest;
    polar_x = x >= 0 ? rest : sum;
}

// Solve  f = alpha log p_x + beta log p_y - log w = 0  for w in (0, height), outside K and -K*.
//
// f falls from w = 0 to w = height. Either end may be so near that only the distance d from it is a
// number, so the unknown is d, from the nearer end. f is nearly linear in log d where it is
// infinite at that end, and else in d; Newton's method uses that, inside a bracket. From a finite
// end, whose p_i is x_i at w = height and 0 at w = 0, with the excess u_i = |p_i - x_i|/|x_i| or
// p_i/|x_i|,
//
//     |f(d)| = |f(0)| + log(1 - d/height) - sum_i weight_i log(1 + u_i),
//
// so that d is accurate however near it is.
inline Root solve(double alpha, double x, double y, double height) {
    const double beta = 1 - alpha, half = height * 0.5, floor = height * NEAREST;
    double p_x, p_y, wide_x, wide_y, polar_x, polar_y;
    const auto surface = [&](double d) {
        const double area = d * (height - d);
        branch(x, alpha, area, p_x, wide_x, polar_x);
        branch(y, beta, area, p_y, wide_y, polar_y);
    };
    surface(half);
    // then the unknown is q, else w
    const bool from_top = alpha * std::log(p_x) + beta * std::log(p_y) > std::log(half);
    // f is finite at the anchor
    const bool bounded = from_top ? x > TINY && y > TINY : x < -TINY && y < -TINY;
    const double width_x = std::abs(x), width_y = std::abs(y);
    double d = half * 0.5, limit = 0.0;  // limit: |f(0)|
    if (bounded) {
        const double share_x = from_top ? 1.0 : alpha, share_y = from_top ? 1.0 : beta;
        limit = threefold::positive_part(alpha * std::log(height * share_x / width_x) +
                                         beta * std::log(height * share_y / width_y));
        const double by_x = std::min(limit / alpha, 300.0), by_y = std::min(limit / beta, 300.0);
        d = std::min(-std::expm1(-limit) * height, half);
        d = std::min(d, x * x / alpha * std::exp(by_x) * std::expm1(by_x) / height);
        d = std::min(d, y * y / beta * std::exp(by_y) * std::expm1(by_y) / height);
    }
    d = d > floor ? d : floor;
    const double sign = from_top ? -1.0 : 1.0;  // f falls in w and rises in q
    double least = floor, most = half;
    for (int iteration = 0; iteration < ITERATIONS; ++iteration) {
        surface(d);
        const double rest = height - d;
        const double growth_x = d * (height - 2 * d) * alpha * alpha / wide_x;
        const double growth_y = d * (height - 2 * d) * beta * beta / wide_y;
        double value, slope, settled = 0.0;  // slope: of value, in log d, negative
        if (bounded) {
            const double large_x = from_top ? p_x : polar_x, large_y = from_top ? p_y : polar_y;
            const double small_x = from_top ? polar_x : p_x, small_y = from_top ? polar_y : p_y;
            value = limit + std::log1p(-d / height) - alpha * std::log1p(small_x / width_x) -
                    beta * std::log1p(small_y / width_y);
            slope = -(growth_x / large_x + growth_y / large_y) - d / rest;
        } else {
            const double log_x = alpha * std::log(p_x), log_y = beta * std::log(p_y);
            const double log_w = std::log(from_top ? rest : d);
            value = (log_x + log_y - log_w) * sign;
            slope = (growth_x / p_x + growth_y / p_y) * sign - (from_top ? d / rest : 1.0);
            // the rounding of f
            settled = 1e-15 * (1 + std::abs(log_x) + std::abs(log_y) + std::abs(log_w));
        }
        const double step = -value / slope;
        (value > 0 ? least : most) = d;
        const double next =
            bounded ? d + d * step : d * std::exp(std::max(std::min(step, 400.0), -400.0));
        const bool done = std::abs(step) <= 1e-8 || std::abs(value) <= settled;
        const bool trusted = done || (next > least && next < most);  // never where it is NaN
        d = trusted ? next : std::sqrt(least) * std::sqrt(most);
        if (done || d <= 2 * floor) break;
    }
    surface(d);
    const double rest = height - d;
    return {p_x, p_y, from_top ? rest : d, from_top ? d : rest, polar_x, polar_y};
}

// How far v in K is from the surface of K, within a factor of sqrt 3: the least of the distances
// along the axes, since K is convex and so holds the octahedron they span. 0 where it is NaN.
inline double depth(double alpha, double x, double y, double height) {
    if (!(x > 0 && y > 0)) return 0.0;
    const double beta = 1 - alpha, power_x = std::pow(x, alpha), power_y = std::pow(y, beta);
    const double along_x = x - std::pow(height / power_y, 1 / alpha);
    const double along_y = y - std::pow(height / power_x, 1 / beta);
    const double along_z = power_x * power_y - height;
    return std::min(threefold::positive_part(along_z),
                    std::min(threefold::positive_part(along_x), threefold::positive_part(along_y)));
}

// The same for (-x, -y, z) in K*: (x/alpha, y/beta, z) is then in K.
inline double polar_depth(double alpha, double x, double y, double height) {
    if (!(x > 0 && y > 0)) return 0.0;
    const double beta = 1 - alpha;
    const double power_x = std::pow(x / alpha, alpha), power_y = std::pow(y / beta, beta);
    const double along_x = x - alpha * std::pow(height / power_y, 1 / alpha);
    const double along_y = y - beta * std::pow(height / power_x, 1 / beta);
    const double along_z = power_x * power_y - height;
    return std::min(threefold::positive_part(along_z),
                    std::min(threefold::positive_part(along_x), threefold::positive_part(along_y)));
}

// The eigenvectors of DPi where p is along (x, y, +-w): columns along p, along v - p, that is along
// M = (-alpha y, -beta x, +-x y/w), and their cross product. And the third eigenvalue of I - DPi,
//
//     1 - 1/(1 + |v - p| kappa),   |v - p| kappa = alpha beta q |p|^2 / (w |M|^2).
inline double frame(double alpha, const Root& root, double sign, double* U) {
    const double beta = 1 - alpha, large = std::max(root.x, root.y);
    const double slope = std::min(root.x, root.y) / root.w;
    const double x = root.x / large, y = root.y / large, w = root.w / large;
    const double ray_square = x * x + y * y + w * w;
    const double m[3] = {-alpha * y, -beta * x, sign * slope};
    const double normal_square = threefold::inner(m, m);
    const double over_ray = 1 / std::sqrt(ray_square), over_normal = 1 / std::sqrt(normal_square);
    const double ray[3] = {x * over_ray, y * over_ray, sign * w * over_ray};
    const double normal[3] = {m[0] * over_normal, m[1] * over_normal, m[2] * over_normal};
    double across[3];
    threefold::cross(ray, normal, across);
    for (int i = 0; i < 3; ++i)
        U[3 * i] = ray[i], U[3 * i + 1] = normal[i], U[3 * i + 2] = across[i];
    const double free = root.w * normal_square, bent = alpha * beta * root.q * ray_square;
    return bent / (free + bent);
}

// I - DPi_K at (x, y, 0) outside K: diag(x < 0, y < 0, c). At x < 0 <= y, c is 0, 1 or
// -2x/(y - 2x) as alpha is below, above or at 1/2, and likewise at y < 0 <= x.
inline void flat_values(double alpha, double x, double y, double* d) {
    const bool free_x = x >= 0, free_y = y >= 0;
    const double own = free_x ? 1 - alpha : alpha;  // the exponent of the negative coordinate
    const double positive = std::max(std::max(x, y), 0.0), negative = std::min(x, y);
    d[0] = free_x ? 0.0 : 1.0;
    d[1] = free_y ? 0.0 : 1.0;
    d[2] = free_x || free_y ? 0.0 : 1.0;
    if (free_x != free_y)
        d[2] = own < 0.5 ? 0.0 : own > 0.5 ? 1.0 : -2 * negative / (positive - 2 * negative);
}

// s = Pi_K(-v), y = Pi_K*(v) = v + s, DPi_K*(v) = U diag(d) U' = I - DPi_K(-v), and how far v is
// from the nearest kink.
inline void project_dual(double alpha, const double* v, double* y, double* s, double* d, double* U,
                         double* margin) {
    if (!threefold::finite(v)) return threefold::undefined(y, s, d, U, margin);
    const double size = std::max(std::abs(v[0]), std::max(std::abs(v[1]), std::abs(v[2])));
    const double safe = size > 0 ? size : 1.0, beta = 1 - alpha;
    const double p[3] = {0.0 - v[0], 0.0 - v[1], 0.0 - v[2]};  // -v, and no -0
    const double first = p[0] / safe, last = p[1] / safe, height = std::abs(p[2]) / safe;
    threefold::identity(U);
    if (first >= 0 && last >= 0 && std::pow(first, alpha) * std::pow(last, beta) >= height) {
        for (int i = 0; i < 3; ++i) s[i] = p[i], y[i] = 0.0, d[i] = 0.0;
        *margin = depth(alpha, first, last, height) * size;
    } else if (height <= FLAT) {
        for (int i = 0; i < 2; ++i) s[i] = std::max(p[i], 0.0), y[i] = std::max(v[i], 0.0);
        s[2] = y[2] = 0.0;
        flat_values(alpha, first, last, d);
        *margin = first < 0 && last < 0 ? polar_depth(alpha, -first, -last, height)
                                        : std::min(std::abs(first), std::abs(last));
        *margin *= size;
    } else if (first <= 0 && last <= 0 &&
               std::pow(-first / alpha, alpha) * std::pow(-last / beta, beta) >= height) {
        for (int i = 0; i < 3; ++i) s[i] = 0.0, y[i] = v[i], d[i] = 1.0;
        *margin = polar_depth(alpha, -first, -last, height) * size;
    } else {
        const Root root = solve(alpha, first, last, height);
        const double sign = p[2] < 0 ? -1.0 : 1.0;
        s[0] = root.x * size, s[1] = root.y * size, s[2] = sign * root.w * size;
        y[0] = root.polar_x * size, y[1] = root.polar_y * size, y[2] = -sign * root.q * size;
        d[0] = 0.0, d[1] = 1.0, d[2] = frame(alpha, root, sign, U);
        *margin = std::min(threefold::length(root.polar_x, root.polar_y, root.q),
                           threefold::length(root.x, root.y, root.w)) *
                  size;
    }
}

// f* = -log psi - b log x - a log y,  psi = phi - z^2,  phi = (x/a)^2a (y/b)^2b, with a = alpha and
// b = 1 - alpha. In p = d_1 / x, q = d_2 / y the derivatives of phi are phi times polynomials;
// r = phi / psi.
struct Barrier {
    double a, b, x, y, z, root, phi, psi, over, r;

    Barrier(double alpha, const double* point)
        : a(alpha), b(1 - alpha), x(point[0]), y(point[1]), z(point[2]) {
        root = std::exp(a * std::log(x / a) + b * std::log(y / b));
        phi = root * root;
        psi = (root - z) * (root + z);
        over = 1 / psi;
        r = phi * over;
    }

    Barrier() = default;

    double value() const { return -(std::log(psi) + b * std::log(x) + a * std::log(y)); }

    void gradient(double* out) const {
        out[0] = -(2 * a * r + b) / x;
        out[1] = -(2 * b * r + a) / y;
        out[2] = 2 * z * over;
    }

    // (f*'')^-1 v, z first: what is left of f*'' is diag(2ar + b, 2br + a) - c (2a, 2b)(2a, 2b)',
    // c = r (r - 1)/(2r - 1).
    void solve(const double* v, double* out) const {
        const double both = 2 * phi - psi, carried = 2 * z * phi / both * v[2];
        double p = a * carried + x * v[0], q = b * carried + y * v[1];
        const double first = 2 * a * r + b, last = 2 * b * r + a, product = a * b;
        // c / (1 - c (2a, 2b) D^-1 (2a, 2b)'), whose denominator tends to 0 near the boundary,
        // expanded
        const double factor = r * (z * z * over) * first * last /
                              (8 * product * r * r + (2 - 6 * product) * r - product);
        const double total = 4 * (p * a / first + q * b / last) * factor;
        p = (p + a * total) / first;
        q = (q + b * total) / last;
        out[0] = x * p;
        out[1] = y * q;
        out[2] = (v[2] * psi * psi / 2 + 2 * z * phi * (a * p + b * q)) / both;
    }

    // f*'''[c, d]
    void third(const double* c, const double* d, double* out) const {
        const double left = 2 * a, right = 2 * b;
        const double p_c = c[0] / x, q_c = c[1] / y, p_d = d[0] / x, q_d = d[1] / y;
        const double l_c = left * p_c + right * q_c, l_d = left * p_d + right * q_d;
        const double pp = p_c * p_d, qq = q_c * q_d;
        const double second = l_c * l_d - left * pp - right * qq;  // of phi, over phi
        // of psi, over psi
        const double g_c = r * l_c - 2 * z * c[2] * over, g_d = r * l_d - 2 * z * d[2] * over;
        const double along = r * second - 2 * c[2] * d[2] * over - 2 * g_c * g_d;
        const double by_x = (l_c - p_c) * g_d + (l_d - p_d) * g_c + along -
                            (second - l_c * p_d - l_d * p_c + 2 * pp);
        const double by_y = (l_c - q_c) * g_d + (l_d - q_d) * g_c + along -
                            (second - l_c * q_d - l_d * q_c + 2 * qq);
        out[0] = (left * r * by_x - 2 * b * pp) / x;
        out[1] = (right * r * by_y - 2 * a * qq) / y;
        out[2] = -2 * over * (c[2] * g_d + d[2] * g_c + z * along);
    }

    // H += mu (f*'' - s' s''/3): with w = sqrt phi, h = (a/x, b/y, 0) and e = (0, 0, 1), G =
    // (w h - e)/(w - z), U = (w h + e)/(w + z), e_x = (1/x, 0, 0) and e_y = (0, 1/y, 0) have inner
    // product 1 with y each, s' = -(G + U + b e_x + a e_y) and
    //
    //     f*'' = G G' + U U' + b e_x e_x' + a e_y e_y' + 2 a b r (e_x - e_y) (e_x - e_y)'.
    void add_central(double mu, double* H) const {
        const double down = 1 / (root - z), up = 1 / (root + z);
        const double h_x = root * a / x, h_y = root * b / y;
        const double below[3] = {h_x * down, h_y * down, -down};
        const double above[3] = {h_x * up, h_y * up, up};
        const double e_x[3] = {1 / x, 0.0, 0.0}, e_y[3] = {0.0, 1 / y, 0.0};
        const double third = mu / 3;
        threefold::add_difference(H, third, below, above);
        threefold::add_difference(H, third * b, below, e_x);
        threefold::add_difference(H, third * a, below, e_y);
        threefold::add_difference(H, third * b, above, e_x);
        threefold::add_difference(H, third * a, above, e_y);
        threefold::add_difference(H, a * b * (third + 2 * mu * r), e_x, e_y);
    }
};

// s = y on the central path.
inline void unit(double alpha, double* point) {
    point[0] = std::sqrt(1 + alpha), point[1] = std::sqrt(2 - alpha), point[2] = 0.0;
}

inline bool within(double alpha, double x, double y, double z) {
    return x > 0 && y > 0 &&
           std::exp(alpha * std::log(x) + (1 - alpha) * std::log(y)) - std::abs(z) > 0;
}

// s in the interior of K and y in that of K*. False for anything not finite.
inline bool inside(double alpha, const double* s, const double* y) {
    return threefold::finite(s) && threefold::finite(y) && within(alpha, s[0], s[1], s[2]) &&
           within(alpha, y[0] / alpha, y[1] / (1 - alpha), y[2]);
}

// f*(y); NaN or infinite where y is not inside.
inline double barrier_dual(double alpha, const double* y) { return Barrier(alpha, y).value(); }

// y' with f*'(-y') = -s. With t = y'_3 z,
//
//     2a log(t + (1+a)/a) + 2b log(t + (1+b)/b) - log(t (t + 2)) = log(x^2a y^2b / z^2),
//
// convex in log t, which is solved for; t is near 4 / expm1 of the right-hand side at both ends.
inline void conjugate_gradient(double alpha, const double* s, double* out) {
    const double a = alpha, b = 1 - alpha, x = s[0], y = s[1], z = s[2];
    const double log_phi = 2 * (a * std::log(x) + b * std::log(y));
    const double height = std::max(std::abs(z), 1e-120 * std::exp(log_phi / 2));
    const double depth = std::min(std::max(log_phi - 2 * std::log(height), 1e-300), 600.0);
    const double at_a = (1 + a) / a, at_b = (1 + b) / b;
    double t = 4 / std::expm1(depth);
    for (int count = 0; count < threefold::NEWTON; ++count) {
        const double left = t + at_a, right = t + at_b;
        const double value = 2 * (a * std::log(left) + b * std::log(right)) -
                             std::log(t * (t + 2)) - depth;
        const double slope = 2 * t * (a / left + b / right) - (2 * t + 2) / (t + 2);
        const double step = std::max(std::min(-value / slope, 3.0), -3.0);
        t *= std::exp(step);
        if (std::abs(step) <= threefold::QUADRATIC) break;
    }
    out[0] = -(a * t + 1 + a) / x;
    out[1] = -(b * t + 1 + b) / y;
    out[2] = z == 0 ? 0.0 : std::copysign(t / height, z);
}

struct Scaling {
    double H[9];         // H y = s, by rows
    double gradient[3];  // f*'(y)
    Barrier barrier;
};

// H and f*'(y); false where s or y is not inside, or something is not finite.
inline bool scale(double alpha, const double* s, const double* y, Scaling& out) {
    if (!inside(alpha, s, y)) return false;
    double shadow[3];
    out.barrier = Barrier(alpha, y);
    out.barrier.gradient(out.gradient);
    conjugate_gradient(alpha, s, shadow);
    return threefold::scale(out.barrier, out.gradient, shadow, s, y, out.H);
}

// The shift of the corrector, H dy + ds = -(s + shift), from the predictor's step.
inline void correct(double, const Scaling& at, const double* ds, const double* dy, double sigma_mu,
                    double* shift) {
    threefold::correct(at.barrier, at.gradient, ds, dy, sigma_mu, shift);
}

}  // namespace power
}  // namespace convlayer
