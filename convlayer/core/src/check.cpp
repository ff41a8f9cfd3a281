// Random programs through the core, for the sanitizers: `make core-check` compiles and runs it.
//
//     minimise 1/2 x'Px + q'x  subject to  Ax + s = b,  s in K
//
// A program is made from its number. Settled rows must have the same bits alone, in a batch and on
// three threads, whatever was in the memory before; satisfy the KKT conditions; be the solution that
// was planted; and have the derivative that differences have. Rows without a solution, with more
// than one, or at a kink must not be settled. `check NUMBER` makes one program and prints it,
// `check FIRST COUNT` so many.

#define _GLIBCXX_ASSERTIONS
#define _GLIBCXX_SANITIZE_VECTOR 1

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

#include "core.cpp"

namespace {

using Vector = std::vector<double>;
using Indices = std::vector<int32_t>;
using Flags = std::vector<uint8_t>;

constexpr int PROGRAMS = 400, LIMIT = 60;
constexpr double TOLERANCE = 1e-8, DIFFERENCES = 1e-4, STEP = 1e-5, PLANTED = 1e-5, IN_CONE = 1e-12;
constexpr double INFINITY_ = std::numeric_limits<double>::infinity();

// splitmix64
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return double(next() >> 11) / 9007199254740992.0; }
  double normal() {
    const double length = std::sqrt(-2 * std::log(1 - uniform()));
    return length * std::cos(6.283185307179586 * uniform());
  }
  double positive() { return std::exp(normal()); }
  double power(double digits) { return std::pow(10.0, digits * (2 * uniform() - 1)); }
  int below(int n) { return int(next() % uint64_t(n)); }
  int between(int least, int most) { return least + below(most - least + 1); }
  bool chance(double share) { return uniform() < share; }
  Indices shuffled(Indices list) {
    for (int k = int(list.size()) - 1; k > 0; --k) std::swap(list[k], list[below(k + 1)]);
    return list;
  }
};

enum Manner {
  ORDINARY, ON_CONE, INFEASIBLE, UNBOUNDED, DEGENERATE, EMPTY, SCALED, NOT_FINITE, BARE, VEILED,
  MANNERS
};
const char* const NAMES[MANNERS] = {"ordinary", "on the cone", "infeasible", "unbounded",
                                    "degenerate", "empty", "scaled", "not finite", "bare",
                                    "veiled"};
// Of so many programs one of each, and ordinary ones.
constexpr int CYCLE = 16;

// The numbers of a row, dense, and the point that they were made from.
struct Numbers {
  Vector P, q, A, b, x, s, y;
  bool never = false;  // is it to be settled
};

struct Program {
  int number = 0, n = 0, m = 0, batch = 1, zeros = 0;
  Manner manner = ORDINARY;
  std::vector<Cone> cones;
  Flags P_mask, A_mask;  // (n, n) its upper triangle, (m, n)
  Flags seen_x, seen_y, ignored;
  std::vector<Indices> factors;  // P = sum of g g', g on these, and a diagonal on those
  Flags diagonal;
  bool whole_P = false, known = false, logs = false;
  bool one_P = false, one_q = false, one_A = false, one_b = false;  // for the batch
  std::pair<int, int> twins{-1, -1};                               // equal rows
  std::vector<Numbers> rows;
  Vector unit_x, unit_s, unit_q, unit_y;
  // As the core takes them.
  Indices P_rows, P_cols, A_rows, A_cols;
  Vector P, q, A, b;
  Values values{};

  void add_cone(Kind kind, int size, int order = 0, double parameter = 0) {
    Cone cone{};
    cone.kind = kind, cone.start = m, cone.size = size, cone.order = order;
    cone.parameter = parameter;
    cones.push_back(cone);
    m += size;
  }

  Kind kind_of(int row) const {
    for (const Cone& cone : cones)
      if (row < cone.start + cone.size) return cone.kind;
    return ZERO;
  }

  bool none(int k, int i) const {
    return ignored[i] || (rows[k].b[i] >= NO_BOUND && kind_of(i) == NONNEGATIVE);
  }
};

// P x or |P| |x|, A x, A'y of the dense numbers.
Vector times_P(const Program& p, const Vector& P, const Vector& x) {
  Vector out(p.n, 0.0);
  for (int i = 0; i < p.n; ++i)
    for (int j = i; j < p.n; ++j) {
      if (!p.P_mask[i * p.n + j]) continue;
      out[i] += P[i * p.n + j] * x[j];
      if (i != j) out[j] += P[i * p.n + j] * x[i];
    }
  return out;
}

Vector times_A(const Program& p, const Vector& A, const Vector& x) {
  Vector out(p.m, 0.0);
  for (int i = 0; i < p.m; ++i)
    for (int j = 0; j < p.n; ++j)
      if (p.A_mask[i * p.n + j]) out[i] += A[i * p.n + j] * x[j];
  return out;
}

Vector times_At(const Program& p, const Vector& A, const Vector& y) {
  Vector out(p.n, 0.0);
  for (int i = 0; i < p.m; ++i)
    for (int j = 0; j < p.n; ++j)
      if (p.A_mask[i * p.n + j]) out[j] += A[i * p.n + j] * y[i];
  return out;
}

Vector absolute(Vector v) {
  for (double& value : v) value = std::fabs(value);
  return v;
}

// A point inside the cone, or its dual.
void inside(const Cone& cone, bool dual, Random& random, double* v) {
  const double a = cone.parameter;
  switch (cone.kind) {
    case ZERO:
      for (int i = 0; i < cone.size; ++i) v[i] = dual ? random.normal() : 0.0;
      break;
    case NONNEGATIVE:
      for (int i = 0; i < cone.size; ++i) v[i] = random.positive();
      break;
    case SECOND_ORDER:
      for (int i = 1; i < cone.size; ++i) v[i] = random.normal();
      v[0] = std::sqrt(dot(v + 1, v + 1, cone.size - 1)) + random.positive();
      break;
    case PSD: {
      const int n = cone.order;
      Vector G(n * n), X(n * n);
      for (double& value : G) value = random.normal() / std::sqrt(double(n));
      multiply_by_transposed(G.data(), G.data(), X.data(), n);
      for (int i = 0; i < n; ++i) X[i * n + i] += 0.2;
      psd::svec(X.data(), v, n);
      break;
    }
    case EXPONENTIAL: {
      // (r, s, t) in K is (-s, r - s, t) in K*
      const double s = 0.5 + random.uniform(), r = random.normal();
      const double t = s * std::exp(r / s) + random.positive();
      v[0] = dual ? -s : r, v[1] = dual ? -s - r : s, v[2] = t;
      break;
    }
    case POWER: {
      const double x = random.positive(), y = random.positive();
      v[0] = dual ? a * x : x, v[1] = dual ? (1 - a) * y : y;
      v[2] = std::pow(x, a) * std::pow(y, 1 - a) * (1.8 * random.uniform() - 0.9);
    }
  }
}

// s in K and y in K* with s'y = 0, of a random v = y - s; `kink`: of v = 0.
void complementary(const Cone& cone, bool kink, Random& random, double* s, double* y) {
  Vector v(cone.size), D(cone.size * cone.size);
  for (double& value : v) value = kink ? 0.0 : random.normal();
  double margin = 0;
  if (cone.elementwise()) {
    for (int i = 0; i < cone.size; ++i) {
      const bool on = cone.kind == ZERO || v[i] > 0;
      y[i] = on ? v[i] : 0.0, s[i] = on ? 0.0 : -v[i];
    }
  } else {
    core_cone(cone.kind, cone.size, cone.order, cone.parameter, v.data(), y, s, D.data(), &margin);
  }
}

// Whether v is in the exponential cone, to rounding of its size.
bool in_exponential(double r, double s, double t, double slack) {
  if (!(s >= -slack && t >= -slack)) return false;
  if (s <= 0 || t <= 0) return r <= slack;
  const double rise = s * std::log(t / s);
  return r <= slack || rise - r >= -slack - IN_CONE * std::fabs(rise);
}

bool in_power(double a, double x, double y, double z, double slack) {
  if (!(x >= -slack && y >= -slack)) return false;
  return std::pow(std::max(x, 0.0), a) * std::pow(std::max(y, 0.0), 1 - a) + slack >= std::fabs(z);
}

bool in_cone(const Cone& cone, bool dual, const double* v) {
  const double a = cone.parameter, size = largest(v, cone.size), slack = IN_CONE * size;
  if (!std::isfinite(size)) return false;
  switch (cone.kind) {
    case ZERO: return dual || size == 0;
    case NONNEGATIVE: return *std::min_element(v, v + cone.size) >= 0;
    case SECOND_ORDER: return v[0] + slack >= std::sqrt(dot(v + 1, v + 1, cone.size - 1));
    case PSD: {
      const int n = cone.order;
      Vector X(n * n);
      psd::smat(v, X.data(), n);
      for (int i = 0; i < n; ++i) X[i * n + i] += slack;
      return size == 0 || cholesky(X.data(), n);
    }
    case EXPONENTIAL:
      return dual ? in_exponential(v[0] - v[1], -v[0], v[2], slack)
                  : in_exponential(v[0], v[1], v[2], slack);
    case POWER:
      return dual ? in_power(a, v[0] / a, v[1] / (1 - a), v[2], slack / std::min(a, 1 - a))
                  : in_power(a, v[0], v[1], v[2], slack);
  }
  return false;
}

void draw_cones(Program& p, Random& random) {
  const int target = p.whole_P ? random.between(1, 30) : p.n + random.between(0, 15);
  const int palette = random.chance(0.3) ? 3 : random.between(1, 63);
  while (p.m < target) {
    const Kind kind = Kind(random.below(6));
    if (!(palette >> kind & 1)) continue;
    const int size = random.between(1, 3);
    switch (kind) {
      case ZERO:
        if (p.zeros + size <= p.n / 2) {
          p.add_cone(ZERO, size);
          p.zeros += size;
          break;
        }
        [[fallthrough]];
      case NONNEGATIVE: p.add_cone(NONNEGATIVE, random.between(1, 6)); break;
      case SECOND_ORDER: p.add_cone(SECOND_ORDER, random.between(2, 8)); break;
      case PSD: {
        const int order = random.between(2, 5);
        p.add_cone(PSD, psd::rows(order), order);
        break;
      }
      case EXPONENTIAL: p.add_cone(EXPONENTIAL, 3); break;
      case POWER:
        p.add_cone(POWER, 3, 0, random.chance(0.2) ? 0.5 : 0.02 + 0.96 * random.uniform());
    }
  }
}

// Where P and A have entries: A of full rank, by a matching of rows and columns.
void draw_masks(Program& p, Random& random) {
  const int n = p.n, m = p.m;
  p.P_mask.assign(n * n, 0), p.A_mask.assign(m * n, 0), p.diagonal.assign(n, p.whole_P);
  const bool no_P = !p.whole_P && random.chance(0.5);
  if (!no_P) {
    for (uint8_t& own : p.diagonal) own = own || random.chance(0.3);
    for (int k = random.below(4); k > 0; --k) {
      Indices all(n);
      for (int j = 0; j < n; ++j) all[j] = j;
      all = random.shuffled(all);
      all.resize(random.between(1, std::min(n, random.chance(0.2) ? n : 4)));
      p.factors.push_back(all);
    }
  }
  const double densities[] = {0.05, 0.2, 0.5, 1.0}, density = densities[random.below(4)];
  for (uint8_t& entry : p.A_mask) entry = random.chance(density);
  Indices first, rest, columns(n);
  for (int i = 0; i < m; ++i) (p.kind_of(i) == ZERO ? first : rest).push_back(i);
  rest = random.shuffled(rest);
  first.insert(first.end(), rest.begin(), rest.end());
  for (int j = 0; j < n; ++j) columns[j] = j;
  columns = random.shuffled(columns);
  for (int k = 0; k < m; ++k) p.A_mask[first[k] * n + columns[k % n]] = 1;
}

void fill_P_mask(Program& p) {
  for (int j = 0; j < p.n; ++j) p.P_mask[j * p.n + j] = p.diagonal[j];
  for (const Indices& factor : p.factors)
    for (int i : factor)
      for (int j : factor)
        if (i <= j) p.P_mask[i * p.n + j] = 1;
}

// A variable that only `row` holds; -1: that none holds.
void release(Program& p, int column, int row) {
  for (int i = 0; i < p.m; ++i) p.A_mask[i * p.n + column] = i == row;
  p.diagonal[column] = 0;
  for (Indices& factor : p.factors)
    factor.erase(std::remove(factor.begin(), factor.end(), column), factor.end());
}

Numbers draw(const Program& p, Random& random) {
  const int n = p.n, m = p.m;
  Numbers out;
  out.P.assign(n * n, 0.0), out.A.assign(m * n, 0.0);
  for (int j = 0; j < n; ++j)
    if (p.diagonal[j]) out.P[j * n + j] = 0.1 + random.uniform();
  for (const Indices& factor : p.factors) {
    Vector g(n, 0.0);
    for (int j : factor) g[j] = random.normal();
    for (int i : factor)
      for (int j : factor)
        if (i <= j) out.P[i * n + j] += g[i] * g[j];
  }
  for (int k = 0; k < m * n; ++k)
    if (p.A_mask[k]) out.A[k] = random.normal();
  if (p.one_P && !p.rows.empty()) out.P = p.rows[0].P;
  if (p.one_A && !p.rows.empty()) out.A = p.rows[0].A;
  out.x.resize(n), out.s.resize(m), out.y.resize(m);
  for (double& value : out.x) value = random.normal();
  for (const Cone& cone : p.cones) {
    double *s = out.s.data() + cone.start, *y = out.y.data() + cone.start;
    if (p.known) {
      const bool kink = cone.kind != ZERO && random.chance(0.02);
      out.never = out.never || kink;
      complementary(cone, kink, random, s, y);
    } else {
      inside(cone, false, random, s);
      inside(cone, true, random, y);
    }
  }
  out.b = times_A(p, out.A, out.x);
  for (int i = 0; i < m; ++i) out.b[i] += out.s[i];
  const Vector Px = times_P(p, out.P, out.x), Aty = times_At(p, out.A, out.y);
  out.q.resize(n);
  for (int j = 0; j < n; ++j) out.q[j] = -Px[j] - Aty[j];
  if (p.one_q && !p.rows.empty()) out.q = p.rows[0].q;
  if (p.one_b && !p.rows.empty()) out.b = p.rows[0].b;
  return out;
}

int random_row(const Program& p, Random& random, Kind kind) {
  Indices found;
  for (int i = 0; i < p.m; ++i)
    if (p.kind_of(i) == kind) found.push_back(i);
  return found.empty() ? -1 : found[random.below(int(found.size()))];
}

// x' = x rho / c, s' = rho e s, y' = y tau / e, e the same within a cone.
void scale(Program& p, Random& random) {
  const double digits[] = {0, 1, 3}, wide = digits[random.below(3)];
  const double rho = random.power(random.chance(0.5) ? 3 : 25), tau = random.power(6);
  Vector c(p.n), e(p.m);
  for (double& value : c) value = random.power(wide);
  for (const Cone& cone : p.cones)
    for (int i = 0; i < cone.size; ++i)
      e[cone.start + i] = i && !cone.elementwise() ? e[cone.start] : random.power(wide);
  for (int j = 0; j < p.n; ++j) p.unit_x[j] = rho / c[j], p.unit_q[j] = tau * c[j];
  for (int i = 0; i < p.m; ++i) p.unit_s[i] = rho * e[i], p.unit_y[i] = tau / e[i];
  for (Numbers& row : p.rows) {
    for (int i = 0; i < p.n; ++i)
      for (int j = 0; j < p.n; ++j) row.P[i * p.n + j] *= tau / rho * c[i] * c[j];
    for (int i = 0; i < p.m; ++i)
      for (int j = 0; j < p.n; ++j) row.A[i * p.n + j] *= e[i] * c[j];
    for (int j = 0; j < p.n; ++j) row.q[j] *= p.unit_q[j];
    for (int i = 0; i < p.m; ++i) row.b[i] *= p.unit_s[i];
  }
}

// One number of one row, or of all where they share it, that is not finite, or nearly not.
void spoil(Program& p, Random& random) {
  const double bad[] = {NAN, INFINITY_, -INFINITY_, 1e140}, value = bad[random.below(4)];
  const int part = random.below(4), victim = random.below(p.batch);
  Indices places;
  const Flags& mask = part == 0 ? p.P_mask : p.A_mask;
  for (int k = 0; k < (part == 1 ? p.n : part == 3 ? p.m : int(mask.size())); ++k)
    if (part == 1 || part == 3 || mask[k]) places.push_back(k);
  if (places.empty()) return;
  const int place = places[random.below(int(places.size()))];
  const bool one = part == 0 ? p.one_P : part == 1 ? p.one_q : part == 2 ? p.one_A : p.one_b;
  for (int k = 0; k < p.batch; ++k) {
    if (!one && k != victim) continue;
    Numbers& row = p.rows[k];
    (part == 0 ? row.P : part == 1 ? row.q : part == 2 ? row.A : row.b)[place] = value;
    const bool no_bound = part == 3 && value > 0 && p.kind_of(place) == NONNEGATIVE;
    row.never = !std::isfinite(value) && !no_bound;
  }
}

void pack(Program& p) {
  const int n = p.n, m = p.m;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i <= j; ++i)
      if (p.P_mask[i * n + j]) p.P_rows.push_back(i), p.P_cols.push_back(j);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i)
      if (p.A_mask[i * n + j]) p.A_rows.push_back(i), p.A_cols.push_back(j);
  for (int k = 0; k < p.batch; ++k) {
    const Numbers& row = p.rows[k];
    if (!k || !p.one_P)
      for (size_t e = 0; e < p.P_rows.size(); ++e)
        p.P.push_back(row.P[p.P_rows[e] * n + p.P_cols[e]]);
    if (!k || !p.one_A)
      for (size_t e = 0; e < p.A_rows.size(); ++e)
        p.A.push_back(row.A[p.A_rows[e] * n + p.A_cols[e]]);
    if (!k || !p.one_q) p.q.insert(p.q.end(), row.q.begin(), row.q.end());
    if (!k || !p.one_b) p.b.insert(p.b.end(), row.b.begin(), row.b.end());
  }
  p.values = {p.P.data(), p.q.data(), p.A.data(), p.b.data(),
              p.one_P ? 0 : int64_t(p.P_rows.size()), p.one_q ? 0 : n,
              p.one_A ? 0 : int64_t(p.A_rows.size()), p.one_b ? 0 : m};
  // A variable that is seen and held by nothing is not settled.
  for (int k = 0; k < p.batch; ++k) {
    Numbers& row = p.rows[k];
    Flags held(n, 0);
    for (int i = 0; i < n; ++i)
      for (int j = i; j < n; ++j)
        if (p.P_mask[i * n + j] && row.P[i * n + j] != 0) held[i] = held[j] = 1;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j)
        if (p.A_mask[i * n + j] && row.A[i * n + j] != 0 && !p.none(k, i)) held[j] = 1;
    for (int j = 0; j < n; ++j) row.never = row.never || (p.seen_x[j] && !held[j]);
  }
}

void make(Program& p, int number) {
  Random random{uint64_t(number) * 7919 + 1};
  p.number = number;
  const int turn = number % CYCLE;
  p.manner = turn < MANNERS ? Manner(turn) : ORDINARY;
  const Manner manner = p.manner;
  p.n = random.between(1, random.chance(0.5) ? 6 : 25);
  p.whole_P = random.chance(0.6);
  const bool no_rows = manner == BARE && random.chance(0.5);
  if (manner == BARE && !no_rows) p.whole_P = false;
  if (!no_rows) draw_cones(p, random);
  // Rows for what the manner plants.
  const int extra = p.m, column = random.below(p.n);
  const bool equal = random.chance(0.5);
  if (manner == INFEASIBLE) p.add_cone(equal ? ZERO : NONNEGATIVE, 2);
  if (manner == UNBOUNDED) p.add_cone(NONNEGATIVE, 1);
  draw_masks(p, random);
  const int n = p.n, m = p.m;
  for (Vector* unit : {&p.unit_x, &p.unit_q}) unit->assign(n, 1.0);
  for (Vector* unit : {&p.unit_s, &p.unit_y}) unit->assign(m, 1.0);
  p.seen_x.assign(n, 1), p.seen_y.assign(m, 1), p.ignored.assign(m, 0);
  const auto copy_mask = [&](int from, int to) {
    std::copy_n(p.A_mask.begin() + from * n, n, p.A_mask.begin() + to * n);
  };
  int head = -1, below_it = -1;
  if (manner == INFEASIBLE) copy_mask(extra, extra + 1);
  if (manner == UNBOUNDED) {
    std::fill_n(p.A_mask.begin() + extra * n, n, uint8_t(0));
    release(p, column, extra);
  }
  if (manner == DEGENERATE) {
    const Kind kind = equal ? ZERO : NONNEGATIVE;
    const int one = random_row(p, random, kind), other = random_row(p, random, kind);
    if (one >= 0 && one != other) {
      p.twins = {one, other};
      copy_mask(one, other);
    }
  }
  if (manner == EMPTY) {
    if (random.chance(0.5)) {
      release(p, column, -1);
      p.seen_x[column] = random.chance(0.5);
    }
    for (int k = m ? random.below(3) : 0; k > 0; --k) {
      const int row = random.below(m);
      std::fill_n(p.A_mask.begin() + row * n, n, uint8_t(0));
      p.seen_y[row] = random.chance(0.5);
    }
  }
  if (manner == VEILED) {
    for (uint8_t& seen : p.seen_x) seen = random.chance(0.5);
    for (uint8_t& seen : p.seen_y) seen = random.chance(0.5);
    p.logs = random.chance(0.3);
    below_it = random_row(p, random, NONNEGATIVE);
    for (const Cone& cone : p.cones)
      if (cone.kind == SECOND_ORDER) head = cone.start;
    if (head >= 0 && below_it >= 0) {
      p.ignored[below_it] = 1;
      copy_mask(head, below_it);
    }
  }
  if (manner == BARE && !no_rows) p.diagonal.assign(n, 0), p.factors.clear();
  fill_P_mask(p);
  p.known = manner == ON_CONE;
  p.batch = random.chance(0.3) ? 1 : random.between(2, 9);
  p.one_P = random.chance(0.5), p.one_A = random.chance(0.5);
  // A row stays feasible with another's q where P and A are the same, and with its b where A is.
  p.one_q = p.one_P && p.one_A && !p.known && random.chance(0.4);
  p.one_b = p.one_A && !p.known && random.chance(0.4);
  for (int k = 0; k < p.batch; ++k) p.rows.push_back(draw(p, random));
  const bool tie = random.chance(0.3), no_bound = random.chance(0.3);
  const int tied = m ? random.below(m) : 0;
  for (Numbers& row : p.rows) {
    const auto copy_row = [&](int from, int to, double sign) {
      for (int j = 0; j < n; ++j) row.A[to * n + j] = sign * row.A[from * n + j];
      row.b[to] = sign * row.b[from];
    };
    if (manner == INFEASIBLE) {  // a'x = b = b + 1, or b + 1 <= a'x <= b
      copy_row(extra, extra + 1, equal ? 1 : -1);
      row.b[extra + 1] += equal ? 1 : -1;
      row.never = true;
    }
    if (manner == UNBOUNDED) {
      row.A[extra * n + column] = -1, row.b[extra] = no_bound ? INFINITY_ : 0.0;
      row.q[column] = -1;
      row.never = true;
    }
    if (manner == DEGENERATE && p.twins.first >= 0) {
      copy_row(p.twins.first, p.twins.second, 1);
      row.never = equal;
    }
    if (manner == DEGENERATE && m && tie)
      for (int j = 0; j < n; ++j) row.q[j] = -row.A[tied * n + j];
    if (head >= 0 && below_it >= 0) copy_row(head, below_it, 1);
  }
  if (manner == EMPTY) {  // zeros in the pattern
    const int from = random.below(5);
    for (Numbers& row : p.rows)
      for (int k = from; k < m * n; k += 5) row.A[k] = 0;
  }
  if (manner == SCALED) scale(p, random);
  if (manner == NOT_FINITE) spoil(p, random);
  pack(p);
}

// The first of its part, of each unknown: what entries and curved cones join.
int root(Indices& parent, int k) {
  while (parent[k] != k) k = parent[k] = parent[parent[k]];
  return k;
}

void* plan_of(const Program& p) {
  const int n = p.n, m = p.m;
  Indices parent(n + m), part(n + m, -1), kinds, sizes, orders;
  for (int k = 0; k < n + m; ++k) parent[k] = k;
  const auto join = [&](int i, int j) { parent[root(parent, i)] = root(parent, j); };
  for (size_t k = 0; k < p.P_rows.size(); ++k) join(p.P_rows[k], p.P_cols[k]);
  for (size_t k = 0; k < p.A_rows.size(); ++k) join(n + p.A_rows[k], p.A_cols[k]);
  Vector parameters;
  for (const Cone& cone : p.cones) {
    kinds.push_back(cone.kind), sizes.push_back(cone.size), orders.push_back(cone.order);
    parameters.push_back(cone.parameter);
    for (int i = 1; i < cone.size && !cone.elementwise(); ++i)
      join(n + cone.start, n + cone.start + i);
  }
  int parts = 0;
  for (int k = 0; k < n + m; ++k) {
    int32_t& mine = part[root(parent, k)];
    if (mine < 0) mine = parts++;
    part[k] = mine;
  }
  Random random{uint64_t(p.number) + 5};
  Indices group(n);
  Flags under(n), valued(n);
  for (int j = 0; j < n; ++j)
    group[j] = random.below(n), under[j] = random.chance(0.3), valued[j] = random.chance(0.3);
  const Pattern pattern{n, m, int32_t(p.P_rows.size()), int32_t(p.A_rows.size()),
                        int32_t(p.cones.size()), parts, p.logs,
                        p.P_rows.data(), p.P_cols.data(), p.A_rows.data(), p.A_cols.data(),
                        kinds.data(), sizes.data(), orders.data(), parameters.data(),
                        part.data(), part.data() + n, group.data(),
                        p.seen_x.data(), p.seen_y.data(), p.ignored.data(), under.data(),
                        valued.data()};
  return core_plan(&pattern);
}

struct Found {
  Vector x, s, y, report, kept;
  bool settled(int k) const { return report[k * REPORT] == SETTLED_WELL; }
};

// Into memory that holds `before`.
Found solved(const void* plan, const Values& values, int n, int m, int batch, int threads,
             double before) {
  const int kept = int(core_kept(plan));
  Found out{Vector(batch * n, before), Vector(batch * m, before), Vector(batch * m, before),
            Vector(batch * REPORT, before), Vector(batch * kept, before)};
  const Options options{TOLERANCE, LIMIT, threads, 0};
  core_solve(plan, &options, batch, &values, out.x.data(), out.s.data(), out.y.data(),
             out.report.data(), out.kept.data());
  return out;
}

Values from(const Values& all, int k) {
  Values one = all;
  one.P += k * all.P_stride, one.q += k * all.q_stride;
  one.A += k * all.A_stride, one.b += k * all.b_stride;
  return one;
}

bool same_bits(const Vector& a, int i, const Vector& b, int j, int count) {
  return !count || !std::memcmp(a.data() + i * count, b.data() + j * count, count * sizeof(double));
}

bool same_row(const Program& p, const Found& a, int i, const Found& b, int j) {
  return same_bits(a.report, i, b.report, j, REPORT) &&
         (!a.settled(i) || (same_bits(a.x, i, b.x, j, p.n) && same_bits(a.s, i, b.s, j, p.m) &&
                            same_bits(a.y, i, b.y, j, p.m)));
}

struct Counts {
  int rows = 0, settled = 0, compared = 0, sharp = 0, failures = 0;
};

struct Check {
  const Program& p;
  Counts& counts;
  int row = 0;

  void that(bool good, const char* what, double number) {
    if (good) return;
    ++counts.failures;
    std::printf("FAILED program %d (%s, n %d, m %d), row %d of %d: %s (%.3g)\n", p.number,
                NAMES[p.manner], p.n, p.m, row, p.batch, what, number);
  }

  // The KKT conditions, each entry beside the terms that it is the sum of.
  void kkt(const Vector& x, const Vector& s, const Vector& y) {
    constexpr double WITHIN = 1e-6;
    const int n = p.n, m = p.m;
    const Numbers& data = p.rows[row];
    Vector A = data.A, b = data.b, given = s, finite = s;
    for (int i = 0; i < m; ++i) {
      if (!p.none(row, i)) continue;
      that(y[i] == 0, "a multiplier of a row that is none", y[i]);
      if (!std::isfinite(b[i])) b[i] = given[i] = finite[i] = 0;
      if (b[i] == 0 && data.b[i] != 0) std::fill_n(A.begin() + i * n, n, 0.0);
    }
    const double sum = largest(x.data(), n) + largest(finite.data(), m) + largest(y.data(), m);
    that(std::isfinite(sum), "not finite", sum);
    Vector F1 = times_P(p, data.P, x), F2 = times_A(p, A, x);
    const Vector Aty = times_At(p, A, y);
    Vector size_1 = times_P(p, absolute(data.P), absolute(x)),
           size_2 = times_A(p, absolute(A), absolute(x));
    const Vector sizes = times_At(p, absolute(A), absolute(y));
    double most_1 = 0, most_2 = 0, dual = 0, primal = 0;
    for (int j = 0; j < n; ++j) {
      F1[j] = (F1[j] + data.q[j] + Aty[j]) / p.unit_q[j];
      size_1[j] = (size_1[j] + std::fabs(data.q[j]) + sizes[j]) / p.unit_q[j];
      most_1 = std::max(most_1, size_1[j]);
    }
    for (int i = 0; i < m; ++i) {
      F2[i] = (F2[i] + given[i] - b[i]) / p.unit_s[i];
      size_2[i] = (size_2[i] + std::fabs(given[i]) + std::fabs(b[i])) / p.unit_s[i];
    }
    for (const Cone& cone : p.cones) {
      double* own = size_2.data() + cone.start;
      if (!cone.elementwise()) std::fill_n(own, cone.size, largest(own, cone.size));
      most_2 = std::max(most_2, largest(own, cone.size));
    }
    for (int j = 0; j < n; ++j)
      if (F1[j] != 0) dual = std::max(dual, std::fabs(F1[j]) / (size_1[j] + WITHIN * most_1));
    for (int i = 0; i < m; ++i)
      if (F2[i] != 0) primal = std::max(primal, std::fabs(F2[i]) / (size_2[i] + WITHIN * most_2));
    that(dual < TOLERANCE, "|Px + q + A'y|", dual);
    that(primal < TOLERANCE, "|Ax + s - b|", primal);
    for (const Cone& cone : p.cones) {
      const double *mine = given.data() + cone.start, *other = y.data() + cone.start;
      const double both = largest(mine, cone.size) * largest(other, cone.size);
      const double gap = std::fabs(dot(mine, other, cone.size));
      that(gap <= TOLERANCE * both, "s'y", gap / both);
      bool whole = true;
      for (int i = 0; i < cone.size; ++i) whole = whole && !p.none(row, cone.start + i);
      that(!whole || in_cone(cone, false, mine), "s is not in its cone", cone.kind);
      that(in_cone(cone, true, other), "y is not in its dual cone", cone.kind);
    }
  }

  // The solution that was planted is the only one, if the row is settled.
  void planted(const Vector& x, const Vector& y) {
    const Numbers& data = p.rows[row];
    double error = 0;
    const double size_x = 1 + largest(data.x.data(), p.n), size_y = 1 + largest(data.y.data(), p.m);
    for (int j = 0; j < p.n; ++j) error = std::max(error, std::fabs(x[j] - data.x[j]) / size_x);
    for (int i = 0; i < p.m; ++i) error = std::max(error, std::fabs(y[i] - data.y[i]) / size_y);
    that(error <= PLANTED, "not the solution that was planted", error);
  }

  // <g, dx> + <h, dy> = -w'dq + u'db, as differences have it: the second ones, of kinks and
  // curvature, are what they may be wrong by.
  void differences(const void* plan, const Vector& x, const Vector& y, const double* g,
                   const double* h, const double* w, const double* u, Random& random) {
    const int n = p.n, m = p.m;
    Vector dq(n), db(m), q(2 * n), b(2 * m);
    for (int j = 0; j < n; ++j) dq[j] = p.seen_x[j] ? random.normal() * p.unit_q[j] : 0.0;
    for (int i = 0; i < m; ++i)
      db[i] = p.seen_y[i] && !p.none(row, i) ? random.normal() * p.unit_s[i] : 0.0;
    for (int side = 0; side < 2; ++side) {
      const double move = side ? -STEP : STEP;
      for (int j = 0; j < n; ++j) q[side * n + j] = p.rows[row].q[j] + move * dq[j];
      for (int i = 0; i < m; ++i) b[side * m + i] = p.rows[row].b[i] + move * db[i];
    }
    Values values = from(p.values, row);
    values.P_stride = values.A_stride = 0;
    values.q = q.data(), values.b = b.data(), values.q_stride = n, values.b_stride = m;
    const Found two = solved(plan, values, n, m, 2, 1, NAN);
    if (!two.settled(0) || !two.settled(1)) return;
    double found = 0, expected = 0, size = 0, second = 0;
    const auto add = [&](double weight, double plus, double minus, double here) {
      const double first = weight * (plus - minus) / (2 * STEP);
      found += first, size += std::fabs(first);
      second += std::fabs(weight * (plus - 2 * here + minus)) / STEP;
    };
    for (int j = 0; j < n; ++j) {
      add(g[j], two.x[j], two.x[n + j], x[j]);
      expected -= w[j] * dq[j], size += std::fabs(w[j] * dq[j]);
    }
    for (int i = 0; i < m; ++i) {
      add(h[i], two.y[i], two.y[m + i], y[i]);
      expected += u[i] * db[i], size += std::fabs(u[i] * db[i]);
    }
    const double error = std::fabs(found - expected);
    ++counts.compared;
    counts.sharp += second <= DIFFERENCES * size;
    that(error <= DIFFERENCES * size + second, "the derivative", error / size);
  }
};

// A call whose parameters are the data themselves, and whose outputs are x and y: it finds what
// core_solve finds, and its way back is core_adjoint's.
void through_maps(const Program& p, const void* plan, const Found& found, Check& check) {
  const int n = p.n, m = p.m, batch = p.batch;
  const int32_t sizes[] = {int32_t(p.P_rows.size()), n, int32_t(p.A_rows.size()), m};
  const int total = sizes[0] + n + sizes[2] + m;
  const int32_t domains[] = {0, 0, 0, 0}, orders[] = {0, 0, 0, 0}, output_sizes[] = {n, m};
  const Flags logs(4), limits(total, 1), exps(2);
  Indices entries(total), positions(n + m);
  for (int k = 0; k < total; ++k) entries[k] = k;
  for (int k = 0; k < n + m; ++k) positions[k] = k;
  const Vector constant(total + 1, 0.0), ones(total, 1.0), weights(n + m, 1.0);
  const MapsPattern pattern{4, 2, total, 0, 0, 0, 0, 0, 1.0, sizes, domains, orders,
                            logs.data(), limits.data(), constant.data(), entries.data(),
                            entries.data(), ones.data(), output_sizes, exps.data(),
                            positions.data(), weights.data(), nullptr, nullptr, nullptr,
                            nullptr, nullptr, nullptr, nullptr};
  void* maps = core_maps(plan, &pattern);
  void* thetas[] = {const_cast<double*>(p.values.P), const_cast<double*>(p.values.q),
                    const_cast<double*>(p.values.A), const_cast<double*>(p.values.b)};
  const int64_t strides[] = {p.values.P_stride, p.values.q_stride, p.values.A_stride,
                             p.values.b_stride};
  const int64_t output_strides[] = {n, m, 1};
  const Flags single(4);
  Vector at_x[2], at_y[2], x[2], s[2], y[2], value[2], report[2], kept[2];
  Call calls[2];
  for (int way = 0; way < 2; ++way) {
    at_x[way].assign(batch * n, NAN), at_y[way].assign(batch * m, NAN);
    x[way].assign(batch * n, NAN), s[way].assign(batch * m, NAN), y[way].assign(batch * m, NAN);
    value[way].assign(batch, NAN), report[way].assign(batch * REPORT, NAN);
    kept[way].assign(batch * core_kept(plan), NAN);
    void* outputs[] = {at_x[way].data(), at_y[way].data(), nullptr};
    calls[way] = {{TOLERANCE, LIMIT, way ? 3 : 1, 0}, 1, 1, 0, batch,
                  {thetas, strides, single.data()}, {outputs, output_strides, single.data()},
                  x[way].data(), s[way].data(), y[way].data(), value[way].data(),
                  report[way].data(), kept[way].data()};
    const int64_t left = core_call(maps, &calls[way]);
    int settled = 0;
    for (int k = 0; k < batch; ++k) {
      const bool good = report[way][k * REPORT] == SETTLED_WELL;
      settled += good;
      check.row = k;
      check.that(good == found.settled(k), "a call settles otherwise", 0);
      if (!good || !found.settled(k)) continue;
      check.that(same_bits(at_x[way], k, found.x, k, n) && same_bits(at_y[way], k, found.y, k, m),
                 "other bits by a call", 0);
    }
    check.that(left == batch - settled, "the rows that are left", double(left));
    if (left) {
      core_maps_free(maps);
      return;
    }
  }
  Random random{uint64_t(p.number) + 17};
  Vector g(batch * n), h(batch * m), w(batch * n), u(batch * m);
  for (int j = 0; j < batch * n; ++j) g[j] = p.seen_x[j % n] ? random.normal() / p.unit_x[j % n] : 0;
  for (int i = 0; i < batch * m; ++i) h[i] = p.seen_y[i % m] ? random.normal() / p.unit_y[i % m] : 0;
  std::vector<int64_t> places(batch);
  for (int k = 0; k < batch; ++k) places[k] = k;
  Flags good(batch), flags(batch);
  core_adjoint(plan, 1, batch, places.data(), g.data(), h.data(), w.data(), u.data(), good.data(),
               kept[0].data());
  Vector back[2][4];
  for (int way = 0; way < 2; ++way) {
    void *bars[] = {g.data(), h.data(), nullptr}, *into[4];
    for (int k = 0; k < 4; ++k) {
      back[way][k].assign(strides[k] ? batch * sizes[k] : sizes[k], NAN);
      into[k] = back[way][k].data();
    }
    const Tensors given{bars, output_strides, single.data()}, taken{into, strides, single.data()};
    core_pull(maps, &calls[way], &given, &taken, flags.data(), nullptr);
  }
  for (int k = 0; k < 4; ++k)
    check.that(same_bits(back[0][k], 0, back[1][k], 0, int(back[0][k].size())),
               "other bits of the way back on three threads", k);
  for (int k = 0; k < batch; ++k) {
    check.row = k;
    check.that(good[k] == (flags[k] != 1), "the way back is flagged otherwise", flags[k]);
    for (int j = 0; j < n && strides[1]; ++j)
      check.that(back[0][1][k * n + j] == -w[k * n + j], "the cotangent of q", j);
    for (int i = 0; i < m && strides[3]; ++i)
      check.that(back[0][3][k * m + i] == u[k * m + i], "the cotangent of b", i);
    for (int e = 0; e < sizes[2] && strides[2]; ++e) {
      const int i = p.A_rows[e], j = p.A_cols[e];
      const double *own_w = &w[k * n], *own_u = &u[k * m];
      const double expected = -(y[0][k * m + i] * own_w[j] + own_u[i] * x[0][k * n + j]);
      const double error = std::fabs(back[0][2][k * sizes[2] + e] - expected);
      check.that(error <= 1e-14 * (std::fabs(y[0][k * m + i] * own_w[j]) +
                                   std::fabs(own_u[i] * x[0][k * n + j])),
                 "the cotangent of A", error);
    }
  }
  core_maps_free(maps);
}

void check(const Program& p, Counts& counts) {
  const int n = p.n, m = p.m, batch = p.batch;
  Check check{p, counts};
  void* plan = plan_of(p);
  const int kept = int(core_kept(plan));
  Found found = solved(plan, p.values, n, m, batch, 1, NAN);
  Found dealt = solved(plan, p.values, n, m, batch, 3, 7e7);
  through_maps(p, plan, found, check);
  std::vector<int64_t> places;
  for (int k = 0; k < batch; ++k) {
    check.row = k;
    const Found alone = solved(plan, from(p.values, k), n, m, 1, 1, -3.0);
    check.that(same_row(p, found, k, dealt, k), "other bits on three threads", 0);
    check.that(same_row(p, found, k, alone, 0), "other bits alone", 0);
    ++counts.rows;
    if (!found.settled(k)) continue;
    ++counts.settled;
    check.that(!p.rows[k].never, "settled", found.report[k * REPORT + 2]);
    const Vector x(found.x.begin() + k * n, found.x.begin() + (k + 1) * n),
        s(found.s.begin() + k * m, found.s.begin() + (k + 1) * m),
        y(found.y.begin() + k * m, found.y.begin() + (k + 1) * m);
    check.kkt(x, s, y);
    if (p.known) check.planted(x, y);
    if (p.twins.first >= 0)
      check.that(y[p.twins.first] + y[p.twins.second] == 0, "settled with equal rows active", 0);
    places.push_back(k), places.push_back(k);
  }
  // Cotangents, two a row.
  Random random{uint64_t(p.number) + 11};
  const int count = int(places.size());
  Vector g(count * n), h(count * m);
  for (int t = 0; t < count; ++t) {
    for (int j = 0; j < n; ++j) g[t * n + j] = p.seen_x[j] ? random.normal() / p.unit_x[j] : 0.0;
    for (int i = 0; i < m; ++i)
      h[t * m + i] = t % 2 && p.seen_y[i] ? random.normal() / p.unit_y[i] : 0.0;
  }
  Vector w[2], u[2];
  Flags good[2];
  for (int way = 0; way < 2; ++way) {
    w[way].assign(count * n, NAN), u[way].assign(count * m, NAN), good[way].assign(count, 7);
    core_adjoint(plan, way ? 3 : 1, count, places.data(), g.data(), h.data(), w[way].data(),
                 u[way].data(), good[way].data(), way ? dealt.kept.data() : found.kept.data());
  }
  for (int t = 0; t < count; ++t) {
    const int k = check.row = int(places[t]);
    check.that(good[0][t] == good[1][t] && same_bits(w[0], t, w[1], t, n) &&
                   same_bits(u[0], t, u[1], t, m),
               "other bits of the adjoint on three threads", 0);
    if (!good[0][t]) continue;
    const double sum = largest(&w[0][0] + t * n, n) + largest(u[0].data() + t * m, m);
    check.that(std::isfinite(sum), "the adjoint is not finite", sum);
    const Vector x(found.x.begin() + k * n, found.x.begin() + (k + 1) * n),
        y(found.y.begin() + k * m, found.y.begin() + (k + 1) * m);
    check.differences(plan, x, y, g.data() + t * n, h.data() + t * m, &w[0][0] + t * n,
                      u[0].data() + t * m, random);
  }
  check.that(dealt.kept.size() == size_t(kept) * batch, "kept", kept);
  core_free(plan);
}

void print(const Program& p) {
  std::printf("program %d (%s): n %d, m %d, batch %d, shared %s%s%s%s\n", p.number,
              NAMES[p.manner], p.n, p.m, p.batch, p.one_P ? "P" : "", p.one_q ? "q" : "",
              p.one_A ? "A" : "", p.one_b ? "b" : "");
  for (const Cone& cone : p.cones)
    std::printf("cone %d, size %d, order %d, parameter %.17g\n", cone.kind, cone.size, cone.order,
                cone.parameter);
  const auto line = [](const char* name, const Vector& values) {
    std::printf("%s", name);
    for (double value : values) std::printf(" %.17g", value);
    std::printf("\n");
  };
  const auto places = [](const char* name, const Indices& rows, const Indices& columns) {
    std::printf("%s", name);
    for (size_t k = 0; k < rows.size(); ++k) std::printf(" (%d, %d)", rows[k], columns[k]);
    std::printf("\n");
  };
  places("P at", p.P_rows, p.P_cols), places("A at", p.A_rows, p.A_cols);
  line("P", p.P), line("q", p.q), line("A", p.A), line("b", p.b);
  void* plan = plan_of(p);
  const Found found = solved(plan, p.values, p.n, p.m, p.batch, 1, NAN);
  line("report", found.report), line("x", found.x), line("s", found.s), line("y", found.y);
  for (const Numbers& row : p.rows) line("made from x", row.x), line("and y", row.y);
  core_free(plan);
}

}  // namespace

int main(int count, char** arguments) {
  const int first = count > 1 ? std::atoi(arguments[1]) : 0;
  const int programs = count > 2 ? std::atoi(arguments[2]) : count > 1 ? 1 : PROGRAMS;
  Counts counts[MANNERS], all;
  for (int number = first; number < first + programs; ++number) {
    Program p;
    make(p, number);
    if (count == 2) print(p);
    check(p, counts[p.manner]);
  }
  for (const Counts& own : counts) {
    all.rows += own.rows, all.settled += own.settled, all.compared += own.compared;
    all.sharp += own.sharp, all.failures += own.failures;
  }
  for (int manner = 0; manner < MANNERS; ++manner)
    if (std::getenv("VERBOSE"))
      std::printf("%s: %d rows, %d settled, %d differences, %d sharp\n", NAMES[manner],
                  counts[manner].rows, counts[manner].settled, counts[manner].compared,
                  counts[manner].sharp);
  // Nine in ten ordinary rows are settled, and their derivatives compared without allowances.
  const Counts& ordinary = counts[ORDINARY];
  const bool enough = ordinary.settled >= 0.9 * ordinary.rows;
  if (!enough)
    std::printf("FAILED: %d of %d ordinary rows settled\n", ordinary.settled, ordinary.rows);
  std::printf("%d programs, %d rows, %d settled, %d of %d ordinary ones; %d derivatives compared, "
              "%d to %.0e; %d failures\n", programs, all.rows, all.settled, ordinary.settled,
              ordinary.rows, all.compared, all.sharp, DIFFERENCES, all.failures);
  return all.failures || !enough;
}
