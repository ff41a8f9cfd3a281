// The exponential cone K = cl{(r, s, t) : s > 0, s exp(r/s) <= t}: the projection onto its dual and
// the derivative of that, as in cones/exponential.py, and the scaling by the barrier of its dual.
#pragma once

#include <algorithm>
#include <cmath>

namespace convlayer {

// What the scalings of the exponential and the power cone share. They are not symmetric: no one
// point scales s to y and their barriers' gradients too.
namespace threefold {

// Within this relative distance from the central path the direction of its offset is noise.
constexpr double CENTRAL = 1.5e-8;
// From a start within a factor of two, so many of Newton's steps give the conjugate gradient.
constexpr int NEWTON = 5;
// After a step of this relative size Newton's method is at rounding.
constexpr double QUADRATIC = 1e-9;

inline bool finite(const double* x) {
    return std::isfinite(x[0]) && std::isfinite(x[1]) && std::isfinite(x[2]);
}

// x where it is positive, else 0: NaN too.
inline double positive_part(double x) { return x > 0 ? x : 0.0; }

inline void fill(double* x, int count, double value) {
    for (int i = 0; i < count; ++i) x[i] = value;
}

inline void identity(double* U) {
    fill(U, 9, 0.0);
    U[0] = U[4] = U[8] = 1.0;
}

inline double inner(const double* a, const double* b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

inline double length(double a, double b, double c) { return std::sqrt(a * a + b * b + c * c); }

// a b - c d, to a rounding or two
inline double determinant(double a, double b, double c, double d) {
    const double second = c * d;
    return std::fma(a, b, -second) - std::fma(c, d, -second);
}

inline void cross(const double* a, const double* b, double* out) {
    out[0] = determinant(a[1], b[2], a[2], b[1]);
    out[1] = determinant(a[2], b[0], a[0], b[2]);
    out[2] = determinant(a[0], b[1], a[1], b[0]);
}

// H += weight x x'
inline void add_square(double* H, double weight, const double* x) {
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) H[3 * i + j] += weight * (x[i] * x[j]);
}

// H += weight (a - b) (a - b)'
inline void add_difference(double* H, double weight, const double* a, const double* b) {
    const double x[3] = {a[0] - b[0], a[1] - b[1], a[2] - b[2]};
    add_square(H, weight, x);
}

// Every NaN, where v is not finite.
inline void undefined(double* y, double* s, double* d, double* U, double* margin) {
    fill(y, 3, NAN), fill(s, 3, NAN), fill(d, 3, NAN), fill(U, 9, NAN);
    *margin = NAN;
}

// With the barrier f* of the dual cone, its gradient s' = f*'(y) and the conjugate gradient y',
// that is f*'(-y') = -s,
//
//     H = s s' / s'y + ds ds' / ds'dy + t a a',   ds = s + mu s',  dy = y + mu y',  mu = s'y / 3,
//
// with a normal to y and y', and t = mu / a'(f*'')^-1 a; at the central path, and where y' is not
// finite, the secant update of mu f*'',
//
//     H = s s' / s'y + mu (f*'' - s' s'' / 3),  as f*'' y = -s'.
template <class Barrier>
bool scale(const Barrier& barrier, const double* gradient, const double* shadow, const double* s,
           const double* y, double* H) {
    const double gap = inner(s, y), mu = gap / 3;
    if (!(gap > 0)) return false;
    double ds[3], dy[3], normal[3], solved[3];
    for (int i = 0; i < 3; ++i) {
        ds[i] = s[i] + mu * gradient[i];
        dy[i] = y[i] + mu * shadow[i];
    }
    // ds'y = 0, but for the rounding of s and mu s', which ds may be small against
    const double along = inner(ds, y) / gap;
    for (int i = 0; i < 3; ++i) ds[i] -= along * s[i];
    const double away = inner(ds, dy);
    cross(y, dy, normal);
    barrier.solve(normal, solved);
    const double t = mu / inner(normal, solved);
    fill(H, 9, 0.0);
    add_square(H, 1 / gap, s);
    if (away > CENTRAL * gap && t > 0 && std::isfinite(t)) {
        add_square(H, 1 / away, ds);
        add_square(H, t, normal);
    } else {
        barrier.add_central(mu, H);
    }
    return finite(gradient) && finite(H) && finite(H + 3) && finite(H + 6);
}

// sigma mu f*'(y) - 1/2 f*'''(y)[dy, (f*'')^-1 ds], and 0 where it is not finite
template <class Barrier>
void correct(const Barrier& barrier, const double* gradient, const double* ds, const double* dy,
             double sigma_mu, double* shift) {
    double solved[3], third[3];
    barrier.solve(ds, solved);
    barrier.third(dy, solved, third);
    for (int i = 0; i < 3; ++i) {
        const double found = sigma_mu * gradient[i] - 0.5 * third[i];
        shift[i] = std::isfinite(found) ? found : 0.0;
    }
}

}  // namespace threefold

namespace exponential {

// A positive r or s below this share of |v| is rounded up, so that ratios and their squares stay
// finite.
constexpr double TINY = 1e-100;
// The least distance of the root from its anchor.
constexpr double NEAREST = 1e-290;
// The greatest: e^rho and e^-rho are then beyond anything v can balance.
constexpr double FARTHEST = 2000.0;
// Steps of plain Newton, which nearly always suffice.
constexpr int SWEEPS = 10;
// Steps of Newton in a bracket, at most.
constexpr int ITERATIONS = 60;

// p = a (rho, 1, e^rho) and v - p = b (1, 1 - rho, -e^-rho).
struct Root {
    double a, b, rho;
    double fallen;  // 1 - rho
    double rise;    // a e^rho
    double fall;    // b e^-rho
};

// The equation of `solve` at d, with the anchor nu, and Newton's step there.
struct Equation {
    double nu, x0, d0, theta;
    double theta_square, magnitude;
    bool positive;

    void newton(double d, double& value, double& step) const {
        const double y = nu - d, quadratic = y * (y - 1) + 1, rest = d0 - nu * d;
        const double own = d / quadratic, other = rest / quadratic;
        const double wide = std::sqrt(theta_square + 4 * own * other);
        const double c = (magnitude + wide) * 0.5, tau = theta / wide;
        value = x0 - d + std::log(positive ? other / c : c / own);
        step = value / (((tau + 1) * nu / rest + (1 - tau) / d) * 0.5 + 1 +
                        tau * (1 - 2 * y) / quadratic);
    }

    // Plain Newton from d, and where that does not settle Newton's method inside a bracket, else
    // bisection of log d.
    double solve(double d, double most) const {
        if (d <= NEAREST) return d;
        const double first = d;
        const double settled = (std::abs(x0) + d + 1) * 4e-15;  // the rounding of the equation
        double value, step;
        for (int sweep = 0; sweep < SWEEPS; ++sweep) {
            newton(d, value, step);
            if (!std::isfinite(step)) break;
            d = std::min(std::max(d + step, d * 0.0625), most);
            if (std::abs(step) <= 1e-8 * d || (sweep > 2 && std::abs(value) <= settled)) return d;
        }
        double least = 1e-300;
        d = first;
        for (int iteration = 0; iteration < ITERATIONS; ++iteration) {
            newton(d, value, step);
            (value > 0 ? least : most) = d;
            const double next = d + step;
            const bool done = std::abs(step) <= 1e-8 * d || std::abs(value) <= settled;
            const bool trusted = (next > least && next < most) || done;  // never where it is NaN
            d = trusted ? next : std::sqrt(least) * std::sqrt(most);
            if (done || d <= NEAREST) break;
        }
        return d;
    }
};

// Solve a e^rho - b e^-rho = t for rho, outside K, -K* and the quadrant r <= 0, s <= 0.
//
// a = ((rho - 1) r + s)/D and b = (r - rho s)/D with D = rho^2 - rho + 1, both positive between
// 1 - s/r and r/s. The unknown is the distance d from the nearer of these ends, and the coefficient
// that vanishes there is d m/D, accurately:
//
//     from r/s:      m = s,  n = r,  theta = t/s,   x = rho  = nu - d        own = b, other = a
//     from 1 - s/r:  m = r,  n = s,  theta = -t/r,  x = -rho = nu - 1 - d    own = a, other = b
//
// with nu = n/m,  own = m d/D,  other = m (D0 - nu d)/D,  D0 = nu^2 - nu + 1, and the equation is
//
//     0 = x - asinh(theta/(2 g)) + log(other/own)/2,   g = sqrt(own other)/m.
inline Root solve(double r, double s, double t) {
    const double lower = r > 0 ? std::max(r, TINY) : r, upper = s > 0 ? std::max(s, TINY) : s;
    bool from_upper = upper > 0;
    if (from_upper && lower > 0) {
        const double ratio = lower / upper, inverse = upper / lower;
        const double centre = (ratio - inverse + 1) * 0.5, width = ratio + inverse - 1;
        const double middle = std::exp(centre);
        // NaN where t is immaterial: then from r/s
        from_upper = !(lower * middle - upper / middle >
                       2 * t * (centre * (centre - 1) + 1) / width);
    }
    const double m = from_upper ? upper : lower, n = from_upper ? lower : upper;
    Equation at;
    at.theta = (from_upper ? t : -t) / m;
    at.nu = n / m;
    at.x0 = from_upper ? at.nu : at.nu - 1;
    at.d0 = at.nu * (at.nu - 1) + 1;
    at.positive = at.theta >= 0;
    at.magnitude = std::abs(at.theta);
    at.theta_square = at.theta * at.theta;
    const double most = at.nu > 0 ? std::min(at.d0 / (2 * at.nu), FARTHEST) : FARTHEST;
    // D0 e^x (e^x - theta), a fixed-point step from d = 0
    const double power = std::exp(std::min(at.x0, 100.0));
    double d = at.d0 * power * (power - at.theta);
    d = d > NEAREST ? std::min(d, 1e290) : NEAREST;
    if (d >= 1) d = std::min(1 + 0.5 * std::log(d), most);
    d = at.solve(d, most);

    const double y = at.nu - d, quadratic = y * (y - 1) + 1;
    const double own = d / quadratic, other = (at.d0 - at.nu * d) / quadratic;
    const double product = own * other;
    const double c = (at.magnitude + std::sqrt(at.theta_square + 4 * product)) * 0.5;
    const double larger = c * m, smaller = product / c * m;
    const bool same = from_upper == at.positive;
    Root root;
    root.a = (from_upper ? other : own) * m;
    root.b = (from_upper ? own : other) * m;
    root.rho = from_upper ? y : 1 - y;
    root.fallen = from_upper ? 1 - y : y;
    root.rise = same ? larger : smaller;
    root.fall = same ? smaller : larger;
    return root;
}

// How far a point of K is from the surface of K, within a small factor: the least of two distances
// along axes and the first-order one of the concave function s log(t/s) - r. At (s - r, r, -t) it
// is that of a point of -K* from the surface of -K*. 0 where it is NaN, as at t = 0.
inline double depth(double r, double s, double t) {
    const double slope = std::log(t / s), along_r = s * slope - r, steep = slope - 1, rise = s / t;
    const double first_order = along_r / std::sqrt(1 + steep * steep + rise * rise);
    const double along_t = t - s * std::exp(r / s);
    return std::min(threefold::positive_part(first_order),
                    std::min(threefold::positive_part(along_t), threefold::positive_part(s)));
}

// The eigenvectors of DPi where p is along P = (rho, 1, e^rho): columns along P, along N = (1, 1 -
// rho, -e^-rho) and their cross product. And the third eigenvalue of I - DPi,
//
//     1 - 1/(1 + |v - p| kappa),   |v - p| kappa = (b |P|^2)/(a |N e^rho|^2).
inline double frame(const Root& root, double* U) {
    const double rho = root.rho, fallen = root.fallen, e = std::exp(-std::abs(rho));
    // 1 and e^rho, divided by the greater
    const double c = rho > 0 ? e : 1.0, k = rho > 0 ? 1.0 : e, cc = c * c, kk = k * k;
    const double ray_square = kk + (1 + rho * rho) * cc;
    const double normal_square = cc + (1 + fallen * fallen) * kk;
    const double ray = 1 / std::sqrt(ray_square), normal = 1 / std::sqrt(normal_square);
    const double both = ray * normal;
    U[0] = rho * (ray * c), U[1] = normal * k, U[2] = -both * (cc + kk * fallen);
    U[3] = ray * c, U[4] = normal * k * fallen, U[5] = both * (kk + rho * cc);
    U[6] = k * ray, U[7] = -c * normal, U[8] = -both * e * (1 - rho * fallen);
    const double free = root.a * normal_square, bent = root.b * ray_square;
    return bent / (free + bent);
}

// s = Pi_K(-v), y = Pi_K*(v) = v + s, DPi_K*(v) = U diag(d) U' = I - DPi_K(-v), and how far v is
// from the nearest kink.
inline void project_dual(const double* v, double* y, double* s, double* d, double* U,
                         double* margin) {
    if (!threefold::finite(v)) return threefold::undefined(y, s, d, U, margin);
    const double size = std::max(std::abs(v[0]), std::max(std::abs(v[1]), std::abs(v[2])));
    const double safe = size > 0 ? size : 1.0;
    const double p[3] = {0.0 - v[0], 0.0 - v[1], 0.0 - v[2]};  // -v, and no -0
    const double r = p[0] / safe, q = p[1] / safe, t = p[2] / safe;
    threefold::identity(U);
    if (r <= 0 && q <= 0) {  // (r, 0, max(t, 0))
        s[0] = p[0], s[1] = 0.0, s[2] = std::max(p[2], 0.0);
        y[0] = 0.0, y[1] = v[1], y[2] = std::max(v[2], 0.0);
        d[0] = 0.0, d[1] = q >= 0 ? 0.0 : 1.0, d[2] = t >= 0 ? 0.0 : 1.0;
        *margin = std::min(std::min(std::abs(r), std::abs(q)), std::abs(t)) * size;
    } else if (q > 0 && q * std::exp(r / q) <= t) {
        for (int i = 0; i < 3; ++i) s[i] = p[i], y[i] = 0.0, d[i] = 0.0;
        *margin = depth(r, q, t) * size;
    } else if (r > 0 && r * std::exp(q / r - 1) <= -t) {
        for (int i = 0; i < 3; ++i) s[i] = 0.0, y[i] = v[i], d[i] = 1.0;
        *margin = depth(q - r, r, -t) * size;
    } else {
        const Root root = solve(r, q, t);
        const double point[3] = {root.a * root.rho, root.a, root.rise};
        const double polar[3] = {-root.b, -root.b * root.fallen, root.fall};
        for (int i = 0; i < 3; ++i) s[i] = point[i] * size, y[i] = polar[i] * size;
        d[0] = 0.0, d[1] = 1.0, d[2] = frame(root, U);
        const double corner = threefold::length(std::max(r, 0.0), std::max(q, 0.0), 0.0);
        const double away = std::min(threefold::length(polar[0], polar[1], polar[2]),
                                     threefold::length(point[0], point[1], point[2]));
        *margin = std::min(away, corner) * size;
    }
}

// f* = -log psi - log(-u) - log w,  psi = v - u + u log(-u/w), at y = (u, v, w). In p = a_u / u and
// q = a_w / w the second derivative of psi is u (p - q)^2.
struct Barrier {
    double u, w, ratio, log, psi, over;

    explicit Barrier(const double* y) : u(y[0]), w(y[2]) {
        ratio = u / w;
        log = std::log(-ratio);
        psi = y[1] - u + u * log;
        over = 1 / psi;
    }

    Barrier() = default;

    double value() const { return -(std::log(psi) + std::log(-u) + std::log(w)); }

    void gradient(double* out) const {
        out[0] = -log * over - 1 / u;
        out[1] = -over;
        out[2] = (u * over - 1) / w;
    }

    // (f*'')^-1 x, v first: what is left of f*'' is I + (p - q)^2 (-u / psi).
    void solve(const double* x, double* out) const {
        const double p = u * (x[0] - log * x[1]), q = w * (x[2] + ratio * x[1]);
        const double share = (p - q) * (-u) / (psi - 2 * u);
        out[0] = u * (p - share);
        out[2] = w * (q + share);
        out[1] = psi * psi * x[1] - log * out[0] + ratio * out[2];
    }

    // f*'''[a, b]
    void third(const double* a, const double* b, double* out) const {
        const double p_a = a[0] / u, q_a = a[2] / w, p_b = b[0] / u, q_b = b[2] / w;
        const double r_a = (p_a - q_a) * over, r_b = (p_b - q_b) * over;
        const double g_a = (log * a[0] + a[1] - ratio * a[2]) * over;
        const double g_b = (log * b[0] + b[1] - ratio * b[2]) * over;
        // times the gradient of psi, over psi
        const double along = (u * r_a * r_b * psi - 2 * g_a * g_b) * over;
        const double bent = r_a * g_b + r_b * g_a, pp = p_a * p_b, qq = q_a * q_b;
        out[0] = (pp - qq) * over + bent + along * log - 2 * pp / u;
        out[1] = along;
        out[2] = -ratio * ((p_a * q_b + q_a * p_b - 2 * qq) * over + bent + along) - 2 * qq / w;
    }

    // H += mu (f*'' - s' s''/3): with G = psi'/psi, e_u = (1/u, 0, 0), e_w = (0, 0, 1/w), of inner
    // product 1 with y each, s' = -(G + e_u + e_w) and
    //
    //     f*'' = G G' + e_u e_u' + e_w e_w' + (-u/psi) (e_u - e_w) (e_u - e_w)'.
    void add_central(double mu, double* H) const {
        const double g[3] = {log * over, over, -ratio * over};
        const double e_u[3] = {1 / u, 0.0, 0.0}, e_w[3] = {0.0, 0.0, 1 / w};
        threefold::add_difference(H, mu / 3, g, e_u);
        threefold::add_difference(H, mu / 3, g, e_w);
        threefold::add_difference(H, mu * (1.0 / 3 - u * over), e_u, e_w);
    }
};

// s = y on the central path.
inline void unit(double* point) {
    point[0] = -1.051383945322714, point[1] = 0.556409619469370, point[2] = 1.258967884768947;
}

// s > 0 and s log(t/s) > r; u < 0 and v - u + u log(-u/w) > 0. False for anything not finite.
inline bool inside(const double* s, const double* y) {
    return threefold::finite(s) && threefold::finite(y) && s[1] > 0 &&
           s[1] * std::log(s[2] / s[1]) - s[0] > 0 && y[0] < 0 && Barrier(y).psi > 0;
}

// f*(y); NaN or infinite where y is not inside.
inline double barrier_dual(const double* y) { return Barrier(y).value(); }

// y' with f*'(-y') = -s. With 1 + d the Wright omega function, d + log(1 + d) = log(t/s) - r/s:
// positive, and small near the boundary.
inline void conjugate_gradient(const double* s, double* out) {
    const double ratio = s[0] / s[1], depth = std::log(s[2] / s[1]) - ratio;
    double d = depth - std::log1p(depth / 2);
    for (int step = 0; step < threefold::NEWTON; ++step) {
        const double last = d;
        d += (1 + d) * (depth - std::log1p(d) - d) / (2 + d);
        if (std::abs(d - last) <= threefold::QUADRATIC * d) break;
    }
    const double first = 1 / (d * s[1]);
    out[0] = first;
    out[1] = first * (1 - ratio) - 2 / s[1];
    out[2] = -(1 + d) / (d * s[2]);
}

struct Scaling {
    double H[9];         // H y = s, by rows
    double gradient[3];  // f*'(y)
    Barrier barrier;
};

// H and f*'(y); false where s or y is not inside, or something is not finite.
inline bool scale(const double* s, const double* y, Scaling& out) {
    if (!inside(s, y)) return false;
    double shadow[3];
    out.barrier = Barrier(y);
    out.barrier.gradient(out.gradient);
    conjugate_gradient(s, shadow);
    return threefold::scale(out.barrier, out.gradient, shadow, s, y, out.H);
}

// The shift of the corrector, H dy + ds = -(s + shift), from the predictor's step.
inline void correct(const Scaling& at, const double* ds, const double* dy, double sigma_mu,
                    double* shift) {
    threefold::correct(at.barrier, at.gradient, ds, dy, sigma_mu, shift);
}

}  // namespace exponential
}  // namespace convlayer
