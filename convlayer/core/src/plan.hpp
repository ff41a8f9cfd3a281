// What is worked out once for a program: its patterns, its cones, and the elimination of its KKT
// matrix.
//
//     K = [ P   A' ]      unknowns: n variables, then m rows; M a block for each curved cone
//         [ A  -M  ]
//
// The order of elimination is of minimum degree. Columns of the factor with the same pattern are
// one front, a small dense matrix; fronts form a tree, and pass what is left of them to the parent.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace convlayer {

enum Kind { ZERO, NONNEGATIVE, SECOND_ORDER, PSD, EXPONENTIAL, POWER };

struct Cone {
  Kind kind;
  int start, size;   // its rows
  int order;         // of a psd cone's matrices
  double parameter;  // of a power cone
  int values;        // where its block stands among the values of K
  int basis;         // where the basis of its projection's derivative stands,
  int scaling;       // and its scaling in the interior point
  bool elementwise() const { return kind == ZERO || kind == NONNEGATIVE; }
};

struct Front {
  int first, width;     // its columns, in the order of elimination
  int rows;             // that it has below them
  bool diagonal;        // its columns do not see each other
  int parent;           // -1: a root
  int stride;           // of its matrix, a multiple of four
  int entries, count;   // of K in it
  int row_list;         // its rows below, in the order of elimination
  int relative;         // where these are in the parent's matrix
  int64_t panel;        // its part of the factor
  int64_t update;       // what it leaves to its parent
  std::vector<int> children;
  // Where row i of its matrix stands, by columns from 0 on, and its entry on the diagonal. Columns
  // that do not see each other have the diagonal before the columns below, and none between.
  int row(int i) const { return i * stride - (!diagonal ? 0 : i < width ? width - 1 : width); }
  // Solves with it do without vectors, whose beginnings and ends would take longer.
  bool is_small() const { return rows <= 8 && (diagonal || width <= 3); }
  int pivot(int i) const { return diagonal && i < width ? i * stride : row(i) + i; }
};

// Entries of a matrix one after the other, in consecutive rows of a column.
struct Run {
  int column, row, first, length;
};

inline std::vector<Run> runs_of(const std::vector<int>& rows, const std::vector<int>& columns,
                                bool off_diagonal) {
  std::vector<Run> runs;
  for (int k = 0; k < int(rows.size()); ++k) {
    if (off_diagonal && rows[k] == columns[k]) continue;
    if (!runs.empty()) {
      Run& last = runs.back();
      if (last.column == columns[k] && last.first + last.length == k &&
          last.row + last.length == rows[k]) {
        ++last.length;
        continue;
      }
    }
    runs.push_back({columns[k], rows[k], k, 1});
  }
  return runs;
}

// Variables that one equality alone has, written by the others; see active_set.hpp.
struct Defined {
  int variable, row, entry;  // of A
};

struct Reduction {
  bool worth = false;
  std::vector<Defined> defined;
  std::vector<int> place;  // of each variable among those that are kept; -1 - k of the k-th defined
  std::vector<int> kept;
  std::vector<int> rows;  // the equalities that are left, then the inequalities
  int equalities = 0;
  std::vector<std::vector<int>> row_entries;  // of A
};

struct Plan {
  int n = 0, m = 0, nnz_P = 0, nnz_A = 0;
  std::vector<int> P_rows, P_cols, A_rows, A_cols;
  std::vector<Run> P_runs, A_runs;  // of P those off the diagonal
  std::vector<int> P_diagonal;      // its entries
  std::vector<Cone> cones;
  std::vector<uint8_t> seen_x, seen_y;  // by an output or a parameter
  std::vector<uint8_t> ignored;         // rows that a cone implies
  std::vector<int> group;               // of each row: the first of its cone, or itself
  std::vector<uint8_t> alone;           // rows that are a cone by themselves
  std::vector<int> part_x, part_y;      // of the program, that nothing couples to the others
  int parts = 1, degree = 0;
  bool polyhedral = true, symmetric = true;
  // Logarithms: their first rows, and of the variables the group, whether seen, whether valued.
  std::vector<int> logs, log_group;
  std::vector<uint8_t> log_seen, log_valued;

  int basis_size = 0, scaling_size = 0, work_size = 0;

  // Values of K: those of P and A, the variables' diagonal, the rows' diagonal or blocks.
  int diagonal_x = 0, block_values = 0, values = 0;

  std::vector<int> position;  // in the order of elimination, of each unknown
  std::vector<Front> fronts;
  std::vector<int> entry_source, entry_target, row_list, relative;
  int64_t factor_size = 0, update_size = 0;
  int front_size = 0, longest = 0;
  double flops = 0;

  Reduction reduction;

  int unknowns() const { return n + m; }
};

namespace planning {

// Sets of unknowns as words of bits.
struct Bits {
  int words;
  std::vector<uint64_t> data;
  explicit Bits(int n) : words((n + 63) / 64), data(size_t(n) * ((n + 63) / 64), 0) {}
  uint64_t* row(int i) { return data.data() + size_t(i) * words; }
  void set(int i, int j) { row(i)[j >> 6] |= uint64_t(1) << (j & 63); }
};

inline int count(const uint64_t* row, int words) {
  int total = 0;
  for (int w = 0; w < words; ++w) total += __builtin_popcountll(row[w]);
  return total;
}

template <class F>
inline void each(const uint64_t* row, int words, F f) {
  for (int w = 0; w < words; ++w)
    for (uint64_t left = row[w]; left; left &= left - 1) f(w * 64 + __builtin_ctzll(left));
}

// The pattern of each column of the factor below its diagonal, in the order of elimination, which
// it returns: at every step an unknown with the fewest neighbours.
inline std::vector<int> minimum_degree(Bits& graph, int size, std::vector<std::vector<int>>& below) {
  std::vector<int> order, degree(size);
  std::vector<uint8_t> gone(size, 0);
  below.assign(size, {});
  for (int i = 0; i < size; ++i) degree[i] = count(graph.row(i), graph.words);
  for (int step = 0; step < size; ++step) {
    int best = -1;
    // of equal degree the rows first, from the last
    for (int i = size - 1; i >= 0; --i)
      if (!gone[i] && (best < 0 || degree[i] < degree[best])) best = i;
    gone[best] = 1;
    order.push_back(best);
    uint64_t* mine = graph.row(best);
    each(mine, graph.words, [&](int j) { below[best].push_back(j); });
    for (int j : below[best]) {
      uint64_t* row = graph.row(j);
      for (int w = 0; w < graph.words; ++w) row[w] |= mine[w];
      row[j >> 6] &= ~(uint64_t(1) << (j & 63));
      row[best >> 6] &= ~(uint64_t(1) << (best & 63));
      degree[j] = count(row, graph.words);
    }
  }
  return order;
}

}  // namespace planning

// What a front costs in multiplications: its pivots, its assembly, what it leaves, and itself.
inline double front_cost(double width, double rows) {
  const double order = width + rows;
  return width * rows * rows + width * width * rows + width * width * width / 3 +
         order * order / 2 + 1.5 * rows * rows + 100;
}

inline void plan_elimination(Plan& plan) {
  using namespace planning;
  const int n = plan.n, size = plan.unknowns();
  Bits graph(size);
  auto connect = [&](int i, int j) {
    if (i != j) graph.set(i, j), graph.set(j, i);
  };
  for (int k = 0; k < plan.nnz_P; ++k) connect(plan.P_rows[k], plan.P_cols[k]);
  for (int k = 0; k < plan.nnz_A; ++k) connect(n + plan.A_rows[k], plan.A_cols[k]);
  for (const Cone& cone : plan.cones)
    if (!cone.elementwise())
      for (int i = 0; i < cone.size; ++i)
        for (int j = i + 1; j < cone.size; ++j) connect(n + cone.start + i, n + cone.start + j);
  std::vector<std::vector<int>> below;
  const std::vector<int> order = minimum_degree(graph, size, below);
  std::vector<int> when(size);
  for (int k = 0; k < size; ++k) when[order[k]] = k;

  // The tree: a column's parent is the first of its rows; leaves with equal rows stand together.
  std::vector<int> parent(size, -1);
  std::vector<std::vector<int>> children(size);
  std::vector<int> roots;
  for (int j = 0; j < size; ++j)
    std::sort(below[j].begin(), below[j].end(), [&](int a, int b) { return when[a] < when[b]; });
  for (int j : order) {
    parent[j] = below[j].empty() ? -1 : below[j][0];
    (parent[j] < 0 ? roots : children[parent[j]]).push_back(j);
  }
  // Siblings with the same rows, under which there is no more than columns of their own, stand
  // together: they are one front.
  auto is_plain = [&](int j) {
    for (int child : children[j])
      if (below[child].size() > 1) return false;
    return true;
  };
  struct Siblings {
    std::vector<int> members;
    std::vector<std::vector<int>> under;
    size_t next = 0;
  };
  auto gathered = [&](const std::vector<int>& nodes) {
    std::vector<std::vector<int>> groups;
    std::vector<int> plain, others;
    for (int j : nodes) (is_plain(j) ? plain : others).push_back(j);
    std::stable_sort(plain.begin(), plain.end(),
                     [&](int a, int b) { return below[a] < below[b]; });
    for (int j : plain)
      if (!groups.empty() && below[groups.back()[0]] == below[j] && !below[j].empty())
        groups.back().push_back(j);
      else
        groups.push_back({j});
    for (int j : others) groups.push_back({j});
    return groups;
  };

  // Children before parents, the tree in depth.
  std::vector<int> sorted, family(size);  // of each column: the first of its siblings
  std::vector<uint8_t> single(size);
  std::vector<Siblings> stack;
  auto enter = [&](const std::vector<int>& members) {
    std::vector<int> all;
    for (int j : members) all.insert(all.end(), children[j].begin(), children[j].end());
    stack.push_back({members, gathered(all)});
  };
  for (const std::vector<int>& tops : gathered(roots)) {
    enter(tops);
    while (!stack.empty()) {
      Siblings& top = stack.back();
      if (top.next < top.under.size()) {
        const std::vector<int> members = top.under[top.next++];
        enter(members);
      } else {
        for (int j : top.members) {
          family[j] = top.members[0], single[j] = top.members.size() == 1;
          sorted.push_back(j);
        }
        stack.pop_back();
      }
    }
  }
  plan.position.assign(size, 0);
  for (int k = 0; k < size; ++k) plan.position[sorted[k]] = k;
  std::vector<std::vector<int>> pattern(size);  // below[.], in the new order
  for (int k = 0; k < size; ++k) {
    for (int i : below[sorted[k]]) pattern[k].push_back(plan.position[i]);
    std::sort(pattern[k].begin(), pattern[k].end());
  }

  // Fronts: of columns each of which is the next one's child with one row more; of siblings.
  struct Group {
    int first, width;
    bool diagonal;
    std::vector<int> rows;
  };
  std::vector<Group> groups;
  for (int k = 0; k < size; ++k) {
    if (!groups.empty()) {
      Group& last = groups.back();
      const bool nested = single[sorted[k]] && !last.rows.empty() && last.rows[0] == k && !last.diagonal &&
                          last.rows.size() == pattern[k].size() + 1;
      if (nested) {
        ++last.width;
        last.rows = pattern[k];
        continue;
      }
      if (family[sorted[k]] == family[sorted[k - 1]]) {
        ++last.width;
        last.diagonal = true;
        continue;
      }
    }
    groups.push_back({k, 1, false, pattern[k]});
  }
  // Small ones join their parent, where they stand directly before it.
  std::vector<Group> joined;
  for (Group& group : groups) {
    while (!joined.empty()) {
      Group& last = joined.back();
      const bool before = !last.rows.empty() && !last.diagonal && !group.diagonal &&
                          last.rows[0] >= group.first && last.rows[0] < group.first + group.width;
      if (!before) break;
      const double apart = front_cost(last.width, double(last.rows.size())) +
                           front_cost(group.width, double(group.rows.size()));
      if (front_cost(last.width + group.width, double(group.rows.size())) > apart) break;
      group.first = last.first;
      group.width += last.width;
      joined.pop_back();
    }
    joined.push_back(group);
  }

  // The fronts, their tree, and where everything stands.
  std::vector<int> front_of(size);
  for (size_t f = 0; f < joined.size(); ++f)
    for (int k = 0; k < joined[f].width; ++k) front_of[joined[f].first + k] = int(f);
  for (size_t f = 0; f < joined.size(); ++f) {
    const Group& group = joined[f];
    Front front{};
    front.first = group.first, front.width = group.width, front.diagonal = group.diagonal;
    front.rows = int(group.rows.size());
    front.parent = front.rows ? front_of[group.rows[0]] : -1;
    const int order_of = front.width + front.rows;
    front.stride = ((front.diagonal ? front.rows + 1 : order_of) + 3) / 4 * 4;
    front.row_list = int(plan.row_list.size());
    front.panel = plan.factor_size;
    front.update = plan.update_size;
    plan.row_list.insert(plan.row_list.end(), group.rows.begin(), group.rows.end());
    plan.factor_size += int64_t(front.width) * front.stride;
    plan.update_size += int64_t(front.rows) * front.rows;
    plan.front_size = std::max(plan.front_size, order_of * front.stride);
    plan.longest = std::max(plan.longest, front.rows);
    const double r = front.rows, w = front.width;
    plan.flops += w * r * r + (front.diagonal ? 0.0 : w * w * r + w * w * w / 3);
    plan.fronts.push_back(front);
  }
  plan.relative.resize(plan.row_list.size());
  for (size_t f = 0; f < plan.fronts.size(); ++f) {
    Front& front = plan.fronts[f];
    if (front.parent < 0) continue;
    Front& into = plan.fronts[front.parent];
    into.children.push_back(int(f));
    const int* rows = plan.row_list.data() + into.row_list;
    for (int k = 0; k < front.rows; ++k) {
      const int row = plan.row_list[front.row_list + k];
      plan.relative[front.row_list + k] =
          row < into.first + into.width
              ? row - into.first
              : into.width + int(std::lower_bound(rows, rows + into.rows, row) - rows);
    }
    front.relative = front.row_list;
  }

  // The entries of K, each in the front of the earlier of its unknowns.
  std::vector<std::vector<std::pair<int, int>>> entries(plan.fronts.size());
  auto place = [&](int i, int j, int source) {
    int a = plan.position[i], b = plan.position[j];
    if (a > b) std::swap(a, b);
    const Front& front = plan.fronts[front_of[a]];
    const int* rows = plan.row_list.data() + front.row_list;
    const int column = b < front.first + front.width
                           ? b - front.first
                           : front.width + int(std::lower_bound(rows, rows + front.rows, b) - rows);
    const int at = a - front.first;
    entries[front_of[a]].push_back({a == b ? front.pivot(at) : front.row(at) + column, source});
  };
  for (int k = 0; k < plan.nnz_P; ++k) place(plan.P_rows[k], plan.P_cols[k], k);
  for (int k = 0; k < plan.nnz_A; ++k) place(n + plan.A_rows[k], plan.A_cols[k], plan.nnz_P + k);
  for (int j = 0; j < n; ++j) place(j, j, plan.diagonal_x + j);
  for (const Cone& cone : plan.cones) {
    int source = cone.values;
    for (int i = 0; i < cone.size; ++i)
      for (int j = i; j < (cone.elementwise() ? i + 1 : cone.size); ++j)
        place(n + cone.start + i, n + cone.start + j, source++);
  }
  for (size_t f = 0; f < plan.fronts.size(); ++f) {
    std::sort(entries[f].begin(), entries[f].end());
    plan.fronts[f].entries = int(plan.entry_source.size());
    plan.fronts[f].count = int(entries[f].size());
    for (const auto& [target, source] : entries[f]) {
      plan.entry_target.push_back(target);
      plan.entry_source.push_back(source);
    }
  }
}

}  // namespace convlayer
