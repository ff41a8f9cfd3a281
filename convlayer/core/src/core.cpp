// The plain C interface of the compiled core.

#include <atomic>
#include <thread>

#include "adjoint.hpp"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace convlayer;

EXPORT int core_version(void) { return 1; }

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

void solve_row(Row& row, const Options& options, const Values& data, int64_t k, double* x,
               double* s, double* y, double* report, double* kept) {
  const Plan& plan = row.plan;
  row.keep_at(kept);
  const double *P = data.P + k * data.P_stride, *q = data.q + k * data.q_stride,
               *A = data.A + k * data.A_stride, *b = data.b + k * data.b_stride;
  InteriorPoint method(row);
  Polish polish(row);
  Outcome outcome = FOREIGN;
  if (normalise(row, P, q, A, b)) {
    const double rho = *row.rho, tau = *row.tau;
    // Near enough for Newton's method at first; nearer where that was not enough.
    for (double tolerance : {1e-6, 1e-9}) {
      if (options.polish) {
        enter(row, x, s, y);
      } else if (!method.run(tolerance, options.limit)) {
        outcome = UNSOLVED;
        break;
      }
      std::vector<double> point;
      point.insert(point.end(), row.x.begin(), row.x.end());
      point.insert(point.end(), row.s.begin(), row.s.end());
      point.insert(point.end(), row.y.begin(), row.y.end());
      recentre(row);
      outcome = polish.run(options.tolerance, rho);
      if (outcome == SETTLED_WELL || outcome == SINGULAR_SYSTEM || options.polish) break;
      if (tolerance == 1e-9) break;
      // Back to where the interior point was.
      rescale(row, rho / *row.rho, tau / *row.tau);
      std::copy_n(point.begin(), plan.n, row.x.begin());
      std::copy_n(point.begin() + plan.n, plan.m, row.s.begin());
      std::copy_n(point.begin() + plan.n + plan.m, plan.m, row.y.begin());
    }
  }
  const double found[REPORT] = {double(outcome),      polish.report.residual, polish.report.judged,
                                polish.report.error,  polish.report.margin,
                                double(polish.report.steps), double(method.iterations)};
  std::copy_n(found, REPORT, report);
  if (outcome != SETTLED_WELL) return;
  leave(row, x, s, y);
  for (int i = 0; i < plan.m; ++i)
    if (row.none[i]) s[i] = b[i];
  for (int j = 0; j < plan.nnz_A; ++j)
    if (row.none[plan.A_rows[j]]) s[plan.A_rows[j]] -= A[j] * x[plan.A_cols[j]];
}

// The rows of a batch, on so many threads.
template <class F>
void each_row(const Plan& plan, int64_t batch, int threads, F work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    Row row(plan);
    for (int64_t k = next++; k < batch; k = next++) work(row, k);
  };
  std::vector<std::thread> helpers;
  for (int t = 1; t < threads; ++t) helpers.emplace_back(loop);
  loop();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

EXPORT void core_solve(const void* handle, const Options* options, int64_t batch,
                       const Values* data, double* x, double* s, double* y, double* report,
                       double* kept) {
  const Plan& plan = *static_cast<const Plan*>(handle);
  const int64_t size = Layout(plan).size;
  each_row(plan, batch, options->threads, [&](Row& row, int64_t k) {
    solve_row(row, *options, *data, k, x + k * plan.n, s + k * plan.m, y + k * plan.m,
              report + k * REPORT, kept + k * size);
  });
}

// Cotangents (gx, gy) of some rows that were solved, by their places in `kept` -> (w, u); good
// (batch,) where the solve is exact.
EXPORT void core_adjoint(const void* handle, int32_t threads, int64_t batch, const int64_t* places,
                         const double* gx, const double* gy, double* w, double* u, uint8_t* good,
                         double* kept) {
  const Plan& plan = *static_cast<const Plan*>(handle);
  const int64_t size = Layout(plan).size;
  each_row(plan, batch, threads, [&](Row& row, int64_t k) {
    row.keep_at(kept + places[k] * size);
    good[k] = adjoint(row, gx + k * plan.n, gy + k * plan.m, w + k * plan.n, u + k * plan.m);
  });
}
