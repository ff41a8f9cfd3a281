// The plain C interface of the compiled core.

#include <atomic>
#include <map>
#include <thread>

#include "maps.hpp"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace convlayer;

EXPORT int core_version(void) { return 2; }

// 3 where the processor has what x86-64-v3 asks for.
EXPORT int core_level(void) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("bmi2")
             ? 3
             : 0;
#else
  return 0;
#endif
}

extern "C" struct Pattern {
  int32_t n, m, nnz_P, nnz_A, cones, parts, logs;
  const int32_t *P_rows, *P_cols, *A_rows, *A_cols;
  const int32_t *kinds, *sizes, *orders;  // of the cones
  const double* parameters;
  const int32_t *part_x, *part_y, *log_group;
  const uint8_t *seen_x, *seen_y, *ignored, *log_seen, *log_valued;
};

EXPORT void* core_plan(const Pattern* p) {
  auto* plan = new Plan;
  plan->n = p->n, plan->m = p->m, plan->nnz_P = p->nnz_P, plan->nnz_A = p->nnz_A;
  plan->P_rows.assign(p->P_rows, p->P_rows + p->nnz_P);
  plan->P_cols.assign(p->P_cols, p->P_cols + p->nnz_P);
  plan->A_rows.assign(p->A_rows, p->A_rows + p->nnz_A);
  plan->A_cols.assign(p->A_cols, p->A_cols + p->nnz_A);
  plan->P_runs = runs_of(plan->P_rows, plan->P_cols, true);
  plan->A_runs = runs_of(plan->A_rows, plan->A_cols, false);
  for (int k = 0; k < p->nnz_P; ++k)
    if (p->P_rows[k] == p->P_cols[k]) plan->P_diagonal.push_back(k);
  plan->seen_x.assign(p->seen_x, p->seen_x + p->n);
  plan->seen_y.assign(p->seen_y, p->seen_y + p->m);
  plan->ignored.assign(p->ignored, p->ignored + p->m);
  plan->part_x.assign(p->part_x, p->part_x + p->n);
  plan->part_y.assign(p->part_y, p->part_y + p->m);
  plan->parts = p->parts;
  if (p->logs) {
    plan->logs.assign(1, 1);
    plan->log_group.assign(p->log_group, p->log_group + p->n);
    plan->log_seen.assign(p->log_seen, p->log_seen + p->n);
    plan->log_valued.assign(p->log_valued, p->log_valued + p->n);
  }
  plan->group.resize(p->m);
  plan->alone.assign(p->m, 0);
  int start = 0;
  plan->diagonal_x = p->nnz_P + p->nnz_A;
  plan->block_values = plan->values = plan->diagonal_x + p->n;
  for (int k = 0; k < p->cones; ++k) {
    Cone cone{};
    cone.kind = Kind(p->kinds[k]), cone.size = p->sizes[k], cone.order = p->orders[k];
    cone.parameter = p->parameters[k], cone.start = start;
    cone.values = plan->values, cone.basis = plan->basis_size, cone.scaling = plan->scaling_size;
    const int size = cone.size;
    for (int i = start; i < start + size; ++i) {
      plan->group[i] = cone.elementwise() ? i : start;
      plan->alone[i] = cone.elementwise();
    }
    start += size;
    plan->values += cone.elementwise() ? size : size * (size + 1) / 2;
    switch (cone.kind) {
      case ZERO: break;
      case NONNEGATIVE: plan->degree += size; break;
      case SECOND_ORDER:
        plan->degree += 1;
        plan->basis_size += second_order::basis_size(size);
        plan->scaling_size += second_order::scaling_size(size);
        plan->work_size = std::max(plan->work_size, 2 * size);
        break;
      case PSD:
        plan->degree += cone.order;
        plan->basis_size += cone.order * cone.order;
        plan->scaling_size += psd::scaling_size(cone.order);
        plan->work_size = std::max(
            {plan->work_size, psd::work_size(cone.order), psd::matrix_work(cone.order)});
        break;
      default:
        plan->degree += 3;
        plan->basis_size += 9;
        plan->symmetric = false;
    }
    plan->polyhedral = plan->polyhedral && cone.elementwise();
    plan->cones.push_back(cone);
  }
  plan_elimination(*plan);
  plan->reduction = reduction_of(*plan);
  return plan;
}

EXPORT void core_free(void* plan) { delete static_cast<Plan*>(plan); }

// Doubles a row that are kept between a solution and its derivative.
EXPORT int64_t core_kept(const void* plan) { return Layout(*static_cast<const Plan*>(plan)).size; }

// Multiplications of a factorisation.
EXPORT double core_flops(const void* plan) { return static_cast<const Plan*>(plan)->flops; }

// One cone at v, for the tests: y, s, D = DPi_K*(v) (size, size), and the margin.
EXPORT void core_cone(int32_t kind, int32_t size, int32_t order, double parameter, const double* v,
                      double* y, double* s, double* D, double* margin) {
  std::vector<double> d(size), U(size * size), work(16 * size * size + 64), x(size, 0.0),
      column(size);
  for (int j = 0; j < size; ++j) {
    x.assign(size, 0.0), x[j] = 1;
    switch (Kind(kind)) {
      case SECOND_ORDER:
        if (!j) second_order::project(v, size, y, s, d.data(), U.data(), margin);
        second_order::apply(U.data(), d.data(), x.data(), column.data(), size);
        break;
      case PSD:
        if (!j) psd::project(v, order, y, s, d.data(), U.data(), margin, work.data());
        psd::apply(U.data(), d.data(), x.data(), column.data(), order, work.data());
        break;
      default:
        if (!j && Kind(kind) == EXPONENTIAL)
          exponential::project_dual(v, y, s, d.data(), U.data(), margin);
        if (!j && Kind(kind) == POWER)
          power::project_dual(parameter, v, y, s, d.data(), U.data(), margin);
        for (int i = 0; i < 3; ++i) {
          column[i] = 0;
          for (int k = 0; k < 3; ++k) column[i] += U[3 * i + k] * d[k] * U[3 * j + k];
        }
    }
    for (int i = 0; i < size; ++i) D[i * size + j] = column[i];
  }
}

extern "C" struct Options {
  double tolerance;
  int32_t limit, threads, polish;
};

// Strides are 0 for what the batch shares.
extern "C" struct Values {
  const double *P, *q, *A, *b;
  int64_t P_stride, q_stride, A_stride, b_stride;
};

// Row by row (x, s, y), the report (outcome, residual, judged, error, margin, steps, iterations)
// and what is kept. polish: x, s, y hold points to start from.
constexpr int REPORT = 7;

namespace {

void solve_row(Row& row, ActiveSet& active, const Options& options, const double* P,
               const double* q, const double* A, const double* b, double* x, double* s, double* y,
               double* report, double* kept) {
  const Plan& plan = row.plan;
  row.keep_at(kept);
  InteriorPoint method(row);
  Polish polish(row);
  Outcome outcome = FOREIGN;
  int iterations = 0;
  if (normalise(row, P, q, A, b)) {
    const double rho = *row.rho, tau = *row.tau;
    // Back to the units in which the data are of size one.
    auto reset = [&] { rescale(row, rho / *row.rho, tau / *row.tau); };
    if (options.polish) {
      enter(row, x, s, y);
      recentre(row);
      outcome = polish.run(options.tolerance, rho);
    } else if (plan.reduction.worth) {
      if (active.run()) {
        recentre(row);
        outcome = polish.run(options.tolerance, rho);
        if (outcome != SETTLED_WELL) reset();
      }
      iterations = active.iterations;
    }
    if (outcome != SETTLED_WELL && !options.polish) {
      // Near enough for Newton's method at first; nearer where that was not enough.
      for (double tolerance : {1e-6, 1e-9}) {
        if (!method.run(tolerance, options.limit)) {
          outcome = UNSOLVED;
          break;
        }
        std::vector<double> point;
        point.insert(point.end(), row.x.begin(), row.x.end());
        point.insert(point.end(), row.s.begin(), row.s.end());
        point.insert(point.end(), row.y.begin(), row.y.end());
        recentre(row);
        outcome = polish.run(options.tolerance, rho);
        if (outcome == SETTLED_WELL || outcome == SINGULAR_SYSTEM || tolerance == 1e-9) break;
        reset();
        std::copy_n(point.begin(), plan.n, row.x.begin());
        std::copy_n(point.begin() + plan.n, plan.m, row.s.begin());
        std::copy_n(point.begin() + plan.n + plan.m, plan.m, row.y.begin());
      }
      iterations += method.iterations;
    }
  }
  const double found[REPORT] = {double(outcome),      polish.report.residual, polish.report.judged,
                                polish.report.error,  polish.report.margin,
                                double(polish.report.steps), double(iterations)};
  std::copy_n(found, REPORT, report);
  if (outcome != SETTLED_WELL) return;
  leave(row, x, s, y);
  for (int i = 0; i < plan.m; ++i)
    if (row.none[i]) s[i] = b[i];
  for (int j = 0; j < plan.nnz_A; ++j)
    if (row.none[plan.A_rows[j]]) s[plan.A_rows[j]] -= A[j] * x[plan.A_cols[j]];
}

// Work that takes the next of `count` numbers until there is none, on so many threads.
template <class F>
void deal(int threads, int64_t count, F work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] { work([&] { return next++; }); };
  std::vector<std::thread> helpers;
  for (int t = 1; t < std::min<int64_t>(threads, count); ++t) helpers.emplace_back(loop);
  loop();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

EXPORT void core_solve(const void* handle, const Options* options, int64_t batch,
                       const Values* data, double* x, double* s, double* y, double* report,
                       double* kept) {
  const Plan& plan = *static_cast<const Plan*>(handle);
  const int64_t size = Layout(plan).size;
  deal(options->threads, batch, [&](auto next) {
    Row row(plan);
    ActiveSet active(row, plan.reduction);
    for (int64_t k; (k = next()) < batch;)
      solve_row(row, active, *options, data->P + k * data->P_stride, data->q + k * data->q_stride,
                data->A + k * data->A_stride, data->b + k * data->b_stride, x + k * plan.n,
                s + k * plan.m, y + k * plan.m, report + k * REPORT, kept + k * size);
  });
}

// Cotangents (gx, gy) of some rows that were solved, by their places in `kept` -> (w, u); good
// (batch,) where the solve is exact.
EXPORT void core_adjoint(const void* handle, int32_t threads, int64_t batch, const int64_t* places,
                         const double* gx, const double* gy, double* w, double* u, uint8_t* good,
                         double* kept) {
  const Plan& plan = *static_cast<const Plan*>(handle);
  const int64_t size = Layout(plan).size;
  deal(threads, batch, [&](auto next) {
    Row row(plan);
    for (int64_t k; (k = next()) < batch;) {
      row.keep_at(kept + places[k] * size);
      good[k] = adjoint(row, gx + k * plan.n, gy + k * plan.m, w + k * plan.n, u + k * plan.m);
    }
  });
}

// The maps of a plan, which must live as long: coefficients by (value, entry), the values being
// P, q, A, b, d one after the other.
extern "C" struct MapsPattern {
  int32_t parameters, outputs, nonzeros, bounds, tied, ties, empty, objective_exp;
  double sign;
  const int32_t *sizes, *domains, *orders;
  const uint8_t *logs, *limits;
  const double* constant;
  const int32_t *rows, *columns;
  const double* coefficients;
  const int32_t* output_sizes;
  const uint8_t* output_exps;
  const int32_t* positions;
  const double* weights;
  const int32_t *bound_rows, *bound_columns;
  const double* bound_coefficients;
  const int32_t *tied_rows, *tie_groups;
  const double* tie_basis;
  const int32_t* empty_rows;
};

EXPORT void* core_maps(const void* handle, const MapsPattern* p) {
  const Plan& plan = *static_cast<const Plan*>(handle);
  auto* maps = new Maps(plan);
  std::vector<int> owner;
  for (int k = 0; k < p->parameters; ++k) {
    maps->parameters.push_back(
        {maps->entries, p->sizes[k], p->domains[k], p->orders[k], bool(p->logs[k])});
    maps->entries += p->sizes[k];
    owner.insert(owner.end(), p->sizes[k], k);
  }
  maps->limits.assign(p->limits, p->limits + maps->entries);
  maps->constant.assign(p->constant, p->constant + maps->d_at() + 1);
  // C comes row by row: the places of the numbers that are moved, and the terms of each.
  std::vector<int> values, from;
  for (int k = 0; k < p->nonzeros; ++k)
    if (!k || p->rows[k] != p->rows[k - 1]) values.push_back(p->rows[k]), from.push_back(k);
  from.push_back(p->nonzeros);
  maps->moved = int(values.size());
  std::vector<int> mixture(values.size());
  std::map<std::vector<int>, int> numbers;
  size_t most = 0;
  for (int r = 0; r < maps->moved; ++r) {
    std::vector<int> mixed;
    for (int k = from[r]; k < from[r + 1]; ++k) mixed.push_back(owner[p->columns[k]]);
    most = std::max(most, mixed.size());
    std::sort(mixed.begin(), mixed.end());
    mixed.erase(std::unique(mixed.begin(), mixed.end()), mixed.end());
    const auto [place, isnew] = numbers.insert({mixed, int(maps->mixtures.size())});
    if (isnew) maps->mixtures.push_back(mixed);
    mixture[r] = place->second;
    // The block that it goes on, or begins.
    const int value = values[r];
    Block block{Block::d, r, 0, 0, 1};
    if (value < maps->q_at())
      block = {Block::P, r, plan.P_rows[value], plan.P_cols[value], 1};
    else if (value < maps->A_at())
      block = {Block::q, r, 0, value - maps->q_at(), 1};
    else if (value < maps->b_at())
      block = {Block::A, r, plan.A_rows[value - maps->A_at()], plan.A_cols[value - maps->A_at()], 1};
    else if (value < maps->d_at())
      block = {Block::b, r, value - maps->b_at(), 0, 1};
    if (!maps->blocks.empty()) {
      Block& last = maps->blocks.back();
      const bool across = block.part == Block::q;
      const bool diagonal = block.part == Block::P && (block.row == block.column ||
                                                       last.row == last.column);
      if (last.part == block.part && block.part != Block::d && !diagonal &&
          block.row == last.row + (across ? 0 : last.length) &&
          block.column == last.column + (across ? last.length : 0)) {
        ++last.length;
        continue;
      }
    }
    maps->blocks.push_back(block);
  }
  for (size_t term = 0; term < most; ++term) {
    bool open = false;  // whether the last run may go on
    for (int r = 0; r < maps->moved; ++r) {
      const int k = from[r] + int(term);
      if (k >= from[r + 1]) {
        open = false;
        continue;
      }
      const int parameter = owner[p->columns[k]];
      const int entry = p->columns[k] - maps->parameters[parameter].first;
      if (open) {
        Strand& last = maps->strands.back();
        const int end = last.entry + last.stride * (last.length - 1);
        if (values[r] == last.value + last.length && parameter == last.parameter &&
            p->coefficients[k] == last.coefficient && mixture[r] == last.mixture &&
            entry > end && (last.length == 1 || entry - end == last.stride)) {
          last.stride = entry - end;
          ++last.length;
          continue;
        }
      }
      maps->strands.push_back(
          {r, values[r], 1, parameter, entry, 1, mixture[r], p->coefficients[k]});
      open = true;
    }
  }
  int first = 0;
  for (int k = 0; k < p->outputs; ++k) {
    maps->outputs.push_back({first, p->output_sizes[k], bool(p->output_exps[k])});
    first += p->output_sizes[k];
  }
  maps->position.assign(p->positions, p->positions + first);
  maps->weight.assign(p->weights, p->weights + first);
  maps->sign = p->sign, maps->exp = p->objective_exp;
  maps->bound_row.assign(p->bound_rows, p->bound_rows + p->bounds);
  maps->bound_column.assign(p->bound_columns, p->bound_columns + p->bounds);
  maps->bound_coefficient.assign(p->bound_coefficients, p->bound_coefficients + p->bounds);
  maps->tied.assign(p->tied_rows, p->tied_rows + p->tied);
  maps->tie_group.assign(p->tie_groups, p->tie_groups + p->tied);
  maps->tie_basis.assign(p->tie_basis, p->tie_basis + int64_t(p->tied) * p->ties);
  maps->ties = p->ties;
  maps->empty.assign(p->empty_rows, p->empty_rows + p->empty);
  return maps;
}

EXPORT void core_maps_free(void* maps) { delete static_cast<Maps*>(maps); }

// A call: `count` rows from `first` on. Where nothing is kept for a derivative, `kept` is for these
// rows alone. Outputs are the variables, then the objective.
extern "C" struct Call {
  Options options;
  int32_t validate, keep;
  int64_t first, count;
  Tensors thetas, outputs;
  double *x, *s, *y, *value, *report, *kept;
};

// Returns how many rows were not settled; their outputs hold anything.
EXPORT int64_t core_call(const void* handle, const Call* call) {
  const Maps& maps = *static_cast<const Maps*>(handle);
  const Plan& plan = maps.plan;
  const int64_t size = Layout(plan).size, first = call->first;
  const int parameters = int(maps.parameters.size());
  // What the batch shares is read once.
  Room shared(maps);
  std::vector<uint8_t> own(parameters);
  bool good = true;
  for (int k = 0; k < parameters; ++k) {
    own[k] = call->thetas.strides[k] != 0;
    if (!own[k]) good = good && read(maps, call->thetas, k, 0, call->validate, shared);
  }
  std::vector<uint8_t> mine(maps.mixtures.size(), 0);
  for (size_t k = 0; k < mine.size(); ++k)
    for (int parameter : maps.mixtures[k]) mine[k] = mine[k] || own[parameter];
  if (good) evaluate(maps, mine, 0, shared);
  std::atomic<int64_t> left{0};
  auto work = [&](Row& row, ActiveSet& active, Room& room, int64_t k) {
    double* report = call->report + k * REPORT;
    bool taken = good;
    for (int j = 0; taken && j < parameters; ++j)
      if (own[j]) taken = read(maps, call->thetas, j, k, call->validate, room);
    if (taken) {
      room.values = shared.values;
      evaluate(maps, mine, 1, room);
      taken = agree(maps, room);
    }
    std::fill_n(report, REPORT, double(UNREAD));
    if (taken) {
      const double* P = room.values.data();
      double *x = call->x + k * plan.n, *s = call->s + k * plan.m, *y = call->y + k * plan.m;
      solve_row(row, active, call->options, P, P + maps.q_at(), P + maps.A_at(), P + maps.b_at(), x, s, y,
                report, call->kept + (call->keep ? k : k - first) * size);
      if (report[0] == double(SETTLED_WELL))
        finish(maps, room, k, x, s, y, call->value + k, call->outputs);
    }
    if (report[0] != double(SETTLED_WELL)) ++left;
  };
  deal(call->options.threads, call->count, [&](auto next) {
    Row row(plan);
    ActiveSet active(row, plan.reduction);
    Room room(shared);
    for (int64_t k; (k = next()) < call->count;) work(row, active, room, first + k);
  });
  return left;
}

// Cotangents of the outputs, null where there is none, back to those of the parameters, null where
// they are not wanted: for each row, or, at a stride of 0, their sum over the batch. Of each row:
// 1 where the solve is not good, 2 where a cotangent is not finite; and if they are asked for, the
// largest entries of x_bar, x and q. Returns how many rows have a flag.
EXPORT int64_t core_pull(const void* handle, const Call* call, const Tensors* bars,
                         const Tensors* theta_bars, uint8_t* flags, double* sizes) {
  const Maps& maps = *static_cast<const Maps*>(handle);
  const Plan& plan = maps.plan;
  const int64_t size = Layout(plan).size, batch = call->count;
  const int parameters = int(maps.parameters.size());
  // The sums are of parts, in their order: whatever the threads, the same bits.
  const int64_t parts = std::min<int64_t>(batch, 32);
  std::vector<int64_t> place(parameters, -1);
  int64_t summed = 0;
  for (int k = 0; k < parameters; ++k)
    if (theta_bars->at[k] && !theta_bars->strides[k]) {
      place[k] = summed;
      summed += maps.parameters[k].size;
    }
  std::vector<double> sums(parts * summed, 0.0);
  const std::vector<uint8_t> all(maps.mixtures.size(), 1);
  std::atomic<int64_t> flagged{0};
  auto work = [&](Row& row, Room& room, std::vector<double*>& into, int64_t k, double* sum) {
    const double *x = call->x + k * plan.n, *y = call->y + k * plan.m;
    double v;
    flags[k] = 0;
    if (!enter_cotangents(maps, k, *bars, x, y, call->value[k], room, &v)) {
      flags[k] = 2;
      room.w.assign(plan.n, NAN), room.u.assign(plan.m, NAN);
      if (bars->at[maps.outputs.size()]) v = NAN;
    } else {
      room.w.assign(plan.n, 0.0), room.u.assign(plan.m, 0.0);
      row.keep_at(call->kept + k * size);
      if ((largest(room.x_bar.data(), plan.n) > 0 || largest(room.y_bar.data(), plan.m) > 0) &&
          !adjoint(row, room.x_bar.data(), room.y_bar.data(), room.w.data(), room.u.data()))
        flags[k] = 1;
    }
    if (flags[k]) ++flagged;
    if (sizes) {
      bool known = true;
      for (int j = 0; j < parameters; ++j)
        known = read(maps, call->thetas, j, k, false, room) && known;
      room.values = maps.constant;
      if (known) evaluate(maps, all, 1, room);
      const double found[] = {largest(room.x_bar.data(), plan.n), largest(x, plan.n),
                              largest(room.values.data() + maps.q_at(), plan.n)};
      std::copy_n(found, 3, sizes + 3 * k);
    }
    data_cotangents(maps, x, y, v, room);
    // Straight into the sum, or the tensor, or by way of the room where it is not what stands there.
    for (int j = 0; j < parameters; ++j) {
      const Parameter& parameter = maps.parameters[j];
      const bool is_summed = place[j] >= 0;
      into[j] = nullptr;
      if (!theta_bars->at[j]) continue;
      if (parameter.log || (theta_bars->single[j] && !is_summed))
        into[j] = room.entries.data() + parameter.first;
      else if (is_summed)
        into[j] = sum + place[j];
      else
        into[j] = static_cast<double*>(theta_bars->at[j]) + k * theta_bars->strides[j];
      if (parameter.log || !is_summed) std::fill_n(into[j], parameter.size, 0.0);
    }
    add_entries(maps, room, into.data());
    for (int j = 0; j < parameters; ++j) {
      const Parameter& parameter = maps.parameters[j];
      if (!into[j] || into[j] != room.entries.data() + parameter.first) continue;
      for (int i = 0; i < parameter.size; ++i) {
        double bar = into[j][i];
        if (parameter.log && bar != 0) bar /= call->thetas.get(j, k, i);  // nothing from nothing
        if (place[j] >= 0)
          sum[place[j] + i] += bar;
        else
          theta_bars->put(j, k, i, bar);
      }
    }
  };
  deal(call->options.threads, parts, [&](auto next) {
    Row row(plan);
    Room room(maps);
    std::vector<double*> into(parameters);
    for (int64_t part; (part = next()) < parts;)
      for (int64_t k = part * batch / parts; k < (part + 1) * batch / parts; ++k)
        work(row, room, into, k, sums.data() + part * summed);
  });
  for (int k = 0; k < parameters; ++k) {
    if (place[k] < 0) continue;
    for (int i = 0; i < maps.parameters[k].size; ++i) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * summed + place[k] + i];
      theta_bars->put(k, 0, i, total);
    }
  }
  return flagged;
}
