// From parameters to a program's data, and from its solution to outputs, by constant sparse maps, so
// that a call of a layer is one call of the core, and its derivative another. As in
// declaration/maps.py.
//
//     (P, q, A, b, d) = constant + C theta,   outputs = weight (x, y)[position], or exp of that
//
// theta are the entries of all parameters one after the other, in a log-log program their logarithms.

#pragma once

#include "active_set.hpp"
#include "adjoint.hpp"

namespace convlayer {

// What is declared of a parameter, as domain.py has it.
enum Domain {
  NONNEG = 1, POS = 2, NONPOS = 4, NEG = 8, IS_SYMMETRIC = 16, IS_PSD = 32, IS_NSD = 64
};
// A relative disagreement of equalities below this is rounding; as in paths/evaluation.py.
constexpr double AGREE = 1e-12;
// What entries may be off by, relative to the largest, by the precision they were given in; as
// domain.relative.
constexpr double SLACK[] = {1e-9, 1e-5};

struct Parameter {
  int first, size;  // of its entries
  int domain;       // of Domain
  int order;        // of a square matrix
  bool log;
};

struct Output {
  int first, size;  // of its entries
  bool exp;
};

// Numbers of the data that parameters move, in consecutive rows of a column of P or A, or of a
// vector.
struct Block {
  enum Part { P, q, A, b, d } part;
  int moved, row, column, length;
};

// data[value + i] += coefficient theta[entry + stride i]
struct Strand {
  int moved, value, length;
  int parameter, entry, stride;  // of its own entries
  int mixture;                   // the parameters that these numbers depend on
  double coefficient;
};

struct Maps {
  const Plan& plan;
  int entries = 0, values = 0;
  std::vector<Parameter> parameters;
  std::vector<uint8_t> limits;  // entries for which infinity has a meaning
  std::vector<double> constant;
  int moved = 0;  // how many numbers of the data parameters move
  std::vector<Block> blocks;
  std::vector<Strand> strands;  // C; a number's terms in the order in which they are added
  std::vector<std::vector<int>> mixtures;
  std::vector<Output> outputs;
  std::vector<int> position;  // from n on of y
  std::vector<double> weight;
  double sign = 1;  // of the objective
  bool exp = false;
  std::vector<int> bound_row, bound_column;
  std::vector<double> bound_coefficient;
  std::vector<int> tied, tie_group, empty;  // as in conic/consistency.py
  std::vector<double> tie_basis;
  int ties = 0;

  explicit Maps(const Plan& p) : plan(p) {}
  int q_at() const { return plan.nnz_P; }
  int A_at() const { return plan.nnz_P + plan.n; }
  int b_at() const { return A_at() + plan.nnz_A; }
  int d_at() const { return b_at() + plan.m; }
};

// Tensors of the parameters, or of the outputs: a stride of 0 where the batch shares one.
struct Tensors {
  void* const* at;
  const int64_t* strides;
  const uint8_t* single;  // float, not double
  double get(int k, int64_t row, int i) const {
    const int64_t place = row * strides[k] + i;
    return single[k] ? double(static_cast<const float*>(at[k])[place])
                     : static_cast<const double*>(at[k])[place];
  }
  void put(int k, int64_t row, int i, double value) const {
    const int64_t place = row * strides[k] + i;
    if (single[k])
      static_cast<float*>(at[k])[place] = float(value);
    else
      static_cast<double*>(at[k])[place] = value;
  }
};

// Room for a row's entries and data, and for their cotangents.
struct Room {
  std::vector<double> entries, values, bars, x_bar, y_bar, w, u, apart, work;
  std::vector<const double*> at;  // of each parameter, as the maps read it
  explicit Room(const Maps& maps)
      : entries(maps.entries), values(maps.constant), at(maps.parameters.size()) {}
};

// Whether a symmetric matrix, times a sign, is semidefinite, but for eigenvalues of -2 shift.
inline bool is_semidefinite(const double* matrix, int order, double sign, double shift,
                            std::vector<double>& work) {
  for (double more : {0.0, shift}) {
    work.assign(matrix, matrix + size_t(order) * order);
    for (double& entry : work) entry *= sign;
    for (int i = 0; i < order; ++i) work[i * order + i] += more;
    if (cholesky(work.data(), order)) return true;
  }
  return false;
}

// Whether the entries are within their domain, as domain.py has it.
inline bool is_inside(const Maps& maps, const Parameter& parameter, const double* value, bool single,
                      bool validate, std::vector<double>& work) {
  const int size = parameter.size;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; ++i) sum += value[i];
  if (!std::isfinite(sum))
    for (int i = 0; i < size; ++i)
      if (!std::isfinite(value[i]) &&
          !(std::isinf(value[i]) && maps.limits[parameter.first + i]))
        return false;
  const int domain = validate ? parameter.domain : 0, order = parameter.order;
  if (!domain || !size) return true;
  double least = HUGE_NUMBER, most = -HUGE_NUMBER, largest = 0;
  for (int i = 0; i < size; ++i) {
    least = std::min(least, value[i]), most = std::max(most, value[i]);
    if (std::isfinite(value[i])) largest = std::max(largest, std::fabs(value[i]));
  }
  const double slack = SLACK[single] * largest;
  if (((domain & NONNEG) && least < -slack) || ((domain & POS) && least <= 0) ||
      ((domain & NONPOS) && most > slack) || ((domain & NEG) && most >= 0))
    return false;
  if (!order) return true;
  double apart = 0;
  for (int i = 0; i < order; ++i)
    for (int j = 0; j < i; ++j)
      apart = std::max(apart, std::fabs(value[i * order + j] - value[j * order + i]));
  const double shift = 5 * slack * order;
  return apart <= 10 * slack &&
         (!(domain & IS_PSD) || is_semidefinite(value, order, 1, shift, work)) &&
         (!(domain & IS_NSD) || is_semidefinite(value, order, -1, shift, work));
}

// The entries of one parameter in a row; false where they are not what was declared.
inline bool read(const Maps& maps, const Tensors& thetas, int k, int64_t row, bool validate,
                 Room& room) {
  const Parameter& parameter = maps.parameters[k];
  double* own = room.entries.data() + parameter.first;
  const double* value = own;
  if (thetas.single[k])
    for (int i = 0; i < parameter.size; ++i) own[i] = thetas.get(k, row, i);
  else
    value = static_cast<const double*>(thetas.at[k]) + row * thetas.strides[k];
  if (!is_inside(maps, parameter, value, thetas.single[k], validate, room.work)) return false;
  if (parameter.log) {
    for (int i = 0; i < parameter.size; ++i) own[i] = std::log(value[i]);
    value = own;
  }
  room.at[k] = value;
  return true;
}

// The data of a row: `values` holds its constant part, and that of the other mixtures.
inline void evaluate(const Maps& maps, const std::vector<uint8_t>& mixtures, uint8_t wanted,
                     Room& room) {
  for (const Strand& strand : maps.strands) {
    if (mixtures[strand.mixture] != wanted) continue;
    double* value = room.values.data() + strand.value;
    const double *theta = room.at[strand.parameter] + strand.entry, coefficient = strand.coefficient;
    if (strand.stride == 1)
      for (int i = 0; i < strand.length; ++i) value[i] += coefficient * theta[i];
    else
      for (int i = 0; i < strand.length; ++i) value[i] += coefficient * theta[i * strand.stride];
  }
}

// Right-hand sides: infinity is a bound that is none; equalities that depend on each other are made
// to agree. False where they do not, but for rounding.
inline bool agree(const Maps& maps, Room& room) {
  const Plan& plan = maps.plan;
  double* b = room.values.data() + maps.b_at();
  for (const Cone& cone : plan.cones)
    if (cone.kind == NONNEGATIVE)
      for (int i = cone.start; i < cone.start + cone.size; ++i)
        if (std::isinf(b[i])) b[i] = b[i] > 0 ? NO_BOUND : -NO_BOUND;
  for (int i : maps.empty)
    if (!(-b[i] <= AGREE * std::fabs(b[i]))) return false;
  const int count = int(maps.tied.size());
  if (!count) return true;
  // N N'b
  std::vector<double>& apart = room.apart;
  apart.assign(count + maps.ties, 0.0);
  double *image = apart.data(), *inner = image + count;
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < maps.ties; ++k) inner[k] += maps.tie_basis[i * maps.ties + k] * b[maps.tied[i]];
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < maps.ties; ++k) image[i] += maps.tie_basis[i * maps.ties + k] * inner[k];
  room.work.assign(count, 0.0);
  for (int i = 0; i < count; ++i) {
    double& most = room.work[maps.tie_group[i]];
    most = std::max(most, std::fabs(b[maps.tied[i]]));
  }
  for (int i = 0; i < count; ++i)
    if (!(std::fabs(image[i]) <= AGREE * room.work[maps.tie_group[i]])) return false;
  for (int i = 0; i < count; ++i) b[maps.tied[i]] -= image[i];
  return true;
}

// Bounds hold exactly; the optimal value; the outputs.
inline void finish(const Maps& maps, const Room& room, int64_t row, double* x, double* s, double* y,
                   double* value, const Tensors& outputs) {
  const Plan& plan = maps.plan;
  const double *P = room.values.data(), *q = P + maps.q_at(), *b = P + maps.b_at();
  for (size_t k = 0; k < maps.bound_row.size(); ++k) {
    const double a = maps.bound_coefficient[k], limit = b[maps.bound_row[k]] / a;
    double& entry = x[maps.bound_column[k]];
    entry = a > 0 ? std::min(entry, limit) : std::max(entry, limit);
  }
  for (int i = 0; i < plan.m; ++i)
    if (plan.ignored[i]) s[i] = std::max(s[i], 0.0);
  double total = P[maps.d_at()];
  for (int j = 0; j < plan.n; ++j) total += q[j] * x[j];
  for (int k = 0; k < plan.nnz_P; ++k) {
    const int i = plan.P_rows[k], j = plan.P_cols[k];
    total += P[k] * x[i] * x[j] * (i == j ? 0.5 : 1.0);
  }
  *value = maps.exp ? std::exp(maps.sign * total) : maps.sign * total;
  const int count = int(maps.outputs.size());
  for (int k = 0; k < count; ++k) {
    const Output& output = maps.outputs[k];
    for (int i = 0; i < output.size; ++i) {
      const int place = maps.position[output.first + i];
      const double found =
          maps.weight[output.first + i] * (place < plan.n ? x[place] : y[place - plan.n]);
      outputs.put(k, row, i, output.exp ? std::exp(found) : found);
    }
  }
  if (outputs.at[count]) outputs.put(count, row, 0, *value);
}

// Cotangents of the outputs -> those of x and y, and of the optimal value; false where one is not
// finite.
inline bool enter_cotangents(const Maps& maps, int64_t row, const Tensors& bars, const double* x,
                             const double* y, double value, Room& room, double* value_bar) {
  const Plan& plan = maps.plan;
  room.x_bar.assign(plan.n, 0.0), room.y_bar.assign(plan.m, 0.0);
  const int count = int(maps.outputs.size());
  bool finite = true;
  for (int k = 0; k < count; ++k) {
    if (!bars.at[k]) continue;
    const Output& output = maps.outputs[k];
    for (int i = 0; i < output.size; ++i) {
      const int place = maps.position[output.first + i];
      const bool dual = place >= plan.n;
      const double weight = maps.weight[output.first + i], bar = bars.get(k, row, i);
      finite = finite && std::isfinite(bar);
      double share = weight * bar;
      if (output.exp) share *= std::exp(weight * (dual ? y[place - plan.n] : x[place]));
      (dual ? room.y_bar[place - plan.n] : room.x_bar[place]) += share;
    }
  }
  *value_bar = bars.at[count] ? maps.sign * bars.get(count, row, 0) * (maps.exp ? value : 1.0) : 0.0;
  return finite && std::isfinite(*value_bar);
}

// From w and u to the cotangents of the numbers that parameters move; with v that of the optimal
// value, whose derivative is the Lagrangian's.
inline void data_cotangents(const Maps& maps, const double* x, const double* y, double v, Room& room) {
  const Plan& plan = maps.plan;
  double *w = room.w.data(), *u = room.u.data();
  for (int j = 0; j < plan.n; ++j) w[j] -= v * x[j] / 2;
  for (int i = 0; i < plan.m; ++i) u[i] -= v * y[i] / 2;
  room.bars.resize(maps.moved);
  for (const Block& at : maps.blocks) {
    double* bar = room.bars.data() + at.moved;
    const int i = at.row, j = at.column;
    switch (at.part) {
      case Block::P:
        if (i == j) {
          bar[0] = -w[i] * x[i];
          break;
        }
        for (int k = 0; k < at.length; ++k) bar[k] = -(w[i + k] * x[j] + w[j] * x[i + k]);
        break;
      case Block::q:
        for (int k = 0; k < at.length; ++k) bar[k] = v * x[j + k] / 2 - w[j + k];
        break;
      case Block::A:
        for (int k = 0; k < at.length; ++k) bar[k] = -(y[i + k] * w[j] + u[i + k] * x[j]);
        break;
      case Block::b:
        for (int k = 0; k < at.length; ++k) bar[k] = u[i + k] - v * y[i + k] / 2;
        break;
      case Block::d: bar[0] = v;
    }
  }
}

// The parameters' cotangents in a row, added to what is there; null where they are not wanted.
inline void add_entries(const Maps& maps, const Room& room, double* const* bars) {
  for (const Strand& strand : maps.strands) {
    if (!bars[strand.parameter]) continue;
    double* into = bars[strand.parameter] + strand.entry;
    const double *bar = room.bars.data() + strand.moved, coefficient = strand.coefficient;
    if (strand.stride == 1)
      for (int i = 0; i < strand.length; ++i) into[i] += coefficient * bar[i];
    else
      for (int i = 0; i < strand.length; ++i) into[i * strand.stride] += coefficient * bar[i];
  }
}

}  // namespace convlayer
