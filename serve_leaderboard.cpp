// Bradley-Terry and the leaderboard: see cake/leaderboard.h.
#include "cake/leaderboard.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "cake/verify.h"

namespace cake {
namespace {

constexpr double kScale = 173.7177927613007;  // 400 / ln 10: points a unit of theta
constexpr double kNormal95 = 1.959963984540054;
constexpr double kPrior = .5;
constexpr int kFewestVoters = 20;  // for a sandwich over voters
constexpr double kMostVotes = 1e6;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// ---------------------------------------------------------------------------------------------
// Small dense matrices, (n, n), row by row

using Matrix = std::vector<double>;

// Of a symmetric positive definite matrix, by Gauss and Jordan.
Matrix inverse(Matrix a, int n) {
  Matrix out(a.size());
  for (int i = 0; i < n; i++) out[size_t(i * n + i)] = 1;
  for (int i = 0; i < n; i++) {
    const double pivot = a[size_t(i * n + i)];
    require(pivot > 1e-12, "Bradley-Terry: found no single maximum, expected a prior above 0");
    for (int c = 0; c < n; c++) a[size_t(i * n + c)] /= pivot, out[size_t(i * n + c)] /= pivot;
    for (int r = 0; r < n; r++) {
      const double f = a[size_t(r * n + i)];
      if (r == i || f == 0) continue;
      for (int c = 0; c < n; c++) {
        a[size_t(r * n + c)] -= f * a[size_t(i * n + c)];
        out[size_t(r * n + c)] -= f * out[size_t(i * n + c)];
      }
    }
  }
  return out;
}

Matrix product(const Matrix& a, const Matrix& b, int n) {
  Matrix out(a.size());
  for (int r = 0; r < n; r++)
    for (int k = 0; k < n; k++)
      for (int c = 0; c < n; c++)
        out[size_t(r * n + c)] += a[size_t(r * n + k)] * b[size_t(k * n + c)];
  return out;
}

Matrix sandwich(const Matrix& bread, const Matrix& meat, int n) {
  return product(product(bread, meat, n), bread, n);
}

// ---------------------------------------------------------------------------------------------
// Bradley-Terry: with p = s(x . parameters) and x = e_left - e_right + e_bias,
//
//     loss      = -sum [score log p + (1 - score) log(1 - p)] + prior / 2 |parameters|^2
//     gradient  =  sum (p - score) x + prior parameters
//     curvature =  sum p (1 - p) x x' + prior
//
// Nothing depends on the mean of theta but the prior, which makes it 0; ones' ones / n is added to
// the curvature so that it can be inverted without a prior too.

struct Likelihood {
  int players;
  std::span<const Game> games;
  double prior;
  bool with_bias;
  int size() const { return players + 1; }  // the last parameter is the bias

  // f(index, sign) for the places of x that are not 0.
  template <class F>
  void for_each_place(const Game& g, F f) const {
    f(g.left, 1.), f(g.right, -1.);
    if (with_bias) f(players, 1.);
  }
  void add_outer(Matrix& m, const Game& g, double weight) const {
    for_each_place(g, [&](int i, double a) {
      for_each_place(g, [&](int j, double b) { m[size_t(i * size() + j)] += weight * a * b; });
    });
  }
  double probability(const Game& g, const std::vector<double>& parameters) const {
    double x = 0;
    for_each_place(g, [&](int i, double sign) { x += sign * parameters[size_t(i)]; });
    return sigmoid(x);
  }
  double loss(const std::vector<double>& parameters) const {
    double sum = 0;
    for (const double v : parameters) sum += prior / 2 * v * v;
    for (const Game& g : games) {
      const double p = probability(g, parameters);
      if (g.score > 0) sum -= g.score * std::log(p);
      if (g.score < 1) sum -= (1 - g.score) * std::log1p(-p);
    }
    return sum;
  }
  std::vector<double> gradient(const std::vector<double>& parameters) const {
    std::vector<double> out(parameters);
    for (double& v : out) v *= prior;
    for (const Game& g : games) {
      const double error = probability(g, parameters) - g.score;
      for_each_place(g, [&](int i, double sign) { out[size_t(i)] += sign * error; });
    }
    return out;
  }
  // Of the curvature, without the direction in which all theta grow alike.
  Matrix inverse_curvature(const std::vector<double>& parameters) const {
    const int n = size();
    Matrix m(size_t(n * n));
    for (const Game& g : games) {
      const double p = probability(g, parameters);
      add_outer(m, g, p * (1 - p));
    }
    for (int i = 0; i < n; i++) m[size_t(i * n + i)] += prior;
    for (int i = 0; i < players; i++)
      for (int j = 0; j < players; j++) m[size_t(i * n + j)] += 1. / players;
    if (!with_bias) m[size_t(n * n - 1)] = 1;
    m = inverse(std::move(m), n);
    for (int i = 0; i < players; i++)
      for (int j = 0; j < players; j++) m[size_t(i * n + j)] -= 1 / (players * (1 + prior));
    if (!with_bias) m[size_t(n * n - 1)] = 0;
    return m;
  }
  // sum over groups of (sum of (p - score) x) (the same)', over groups of games that are alike.
  template <class Group>
  Matrix spread(const std::vector<double>& parameters, Group group_of, int& groups) const {
    std::map<int, std::vector<double>> sums;
    for (const Game& g : games) {
      std::vector<double>& sum = sums.try_emplace(group_of(g), size_t(size())).first->second;
      const double error = probability(g, parameters) - g.score;
      for_each_place(g, [&](int i, double sign) { sum[size_t(i)] += sign * error; });
    }
    groups = int(sums.size());
    Matrix out(size_t(size() * size()));
    for (const auto& [group, sum] : sums)
      for (size_t i = 0; i < sum.size(); i++)
        for (size_t j = 0; j < sum.size() && sum[i] != 0; j++)
          out[i * sum.size() + j] += sum[i] * sum[j];
    return out;
  }
};

void set_covariances(BradleyTerry& fit, const Likelihood& problem,
                     const std::vector<double>& parameters) {
  const int n = problem.size();
  fit.model = problem.inverse_curvature(parameters);
  // A score that is a tie in the share t of games varies by p (1 - p) - t / 4.
  Matrix expected(size_t(n * n));
  for (const Game& g : problem.games) {
    const double p = problem.probability(g, parameters);
    problem.add_outer(expected, g, p * (1 - p) - (g.score == .5 ? .25 : 0));
  }
  for (int i = 0; i < n; i++) expected[size_t(i * n + i)] += problem.prior;
  fit.ties = sandwich(fit.model, expected, n);
  int groups = 0;
  const Matrix by_vote = problem.spread(
      parameters, [](const Game& g) { return g.vote; }, groups);
  fit.votes = sandwich(fit.model, by_vote, n);
  Matrix by_voter = problem.spread(
      parameters, [](const Game& g) { return g.voter; }, groups);
  if (groups < kFewestVoters) return;
  for (double& v : by_voter) v *= double(groups) / (groups - 1);
  fit.voters = sandwich(fit.model, by_voter, n);
}

}  // namespace

BradleyTerry fit_bradley_terry(int players, std::span<const Game> games, double prior,
                               bool with_bias) {
  const Likelihood problem{players, games, prior, with_bias};
  std::vector<double> parameters(size_t(players + 1));
  double loss = problem.loss(parameters), longest = 1;
  for (int step = 0; longest > 1e-10; step++) {
    require(step < 100, "Bradley-Terry: found no finite maximum, expected a prior above 0");
    const Matrix inverted = problem.inverse_curvature(parameters);
    const std::vector<double> gradient = problem.gradient(parameters);
    std::vector<double> change(parameters.size());
    for (size_t i = 0; i < change.size(); i++)
      for (size_t j = 0; j < change.size(); j++)
        change[i] -= inverted[i * change.size() + j] * gradient[j];
    // Newton's step, halved where it is too long; rounding alone may make the loss a little larger.
    for (double share = 1;; share /= 2) {
      std::vector<double> moved(parameters);
      for (size_t i = 0; i < moved.size(); i++) moved[i] += share * change[i];
      const double after = problem.loss(moved);
      if (after > loss + 1e-9 * std::abs(loss) && share > 1e-6) continue;
      parameters = std::move(moved), loss = after;
      break;
    }
    longest = 0;
    for (const double v : change) longest = std::max(longest, std::abs(v));
  }
  BradleyTerry fit{.players = players, .bias = parameters.back()};
  fit.theta.assign(parameters.begin(), parameters.end() - 1);
  set_covariances(fit, problem, parameters);
  return fit;
}

double BradleyTerry::variance(std::span<const double> weights) const {
  double largest = 0;
  for (const Matrix* m : {&ties, &votes, &voters}) {
    if (m->empty()) continue;
    double sum = 0;
    for (size_t i = 0; i < weights.size(); i++)
      for (size_t j = 0; j < weights.size(); j++)
        sum += weights[i] * (*m)[i * weights.size() + j] * weights[j];
    largest = std::max(largest, sum);
  }
  return largest;
}

double BradleyTerry::difference_variance(int a, int b) const {
  std::vector<double> weights(size_t(players + 1));
  weights[size_t(a)] = 1, weights[size_t(b)] = -1;
  return variance(weights);
}

std::vector<int> connected_sets(int players, std::span<const Game> games) {
  std::vector<int> sets(static_cast<size_t>(players));
  std::iota(sets.begin(), sets.end(), 0);
  for (const Game& g : games) {
    if (g.score == .5) continue;
    const int from = sets[size_t(g.left)], into = sets[size_t(g.right)];
    if (from != into) std::replace(sets.begin(), sets.end(), from, into);
  }
  return sets;
}

// ---------------------------------------------------------------------------------------------
// The leaderboard

namespace {

struct Record {
  int64_t wins = 0, losses = 0, ties = 0;
  void add(double score) { (score == 1 ? wins : score == 0 ? losses : ties)++; }
  int64_t games() const { return wins + losses + ties; }
};

struct Table {                                           // votes as games
  std::vector<std::pair<std::string, std::string>> ids;  // of players: model and weights, sorted
  std::vector<Game> games;
  std::vector<Record> records;  // of players
  int64_t votes = 0, counted = 0;
  int64_t decided = 0, left_won = 0;            // of two answers
  int64_t unequal = 0;                          // votes with a decided pair of unequal lengths
  double longer_won = 0;                        // sum of shares of such pairs
  std::map<std::pair<int, int>, Record> pairs;  // a < b: of a
};

// Of the decided pairs of unequal lengths in a vote, the share that the longer answer won.
std::optional<double> longer_share(const Vote& vote) {
  double pairs = 0, won = 0;
  for (const VotedAnswer& better : vote.answers)
    for (const VotedAnswer& worse : vote.answers)
      if (better.rank < worse.rank && better.tokens != worse.tokens)
        pairs++, won += better.tokens > worse.tokens;
  if (pairs == 0) return std::nullopt;
  return won / pairs;
}

Table make_table(std::span<const Vote> votes) {
  Table t;
  std::map<std::pair<std::string, std::string>, int> numbers;
  std::map<std::string, int> voters;
  for (const Vote& vote : votes)
    if (!vote.undone && !vote.same)
      for (const VotedAnswer& a : vote.answers) numbers[{a.model, a.weights}] = 0;
  for (auto& [id, number] : numbers) number = int(t.ids.size()), t.ids.push_back(id);
  t.records.resize(t.ids.size());
  for (size_t v = 0; v < votes.size(); v++) {
    const Vote& vote = votes[v];
    if (vote.undone || vote.same) continue;
    t.votes++;
    if (vote.leaked || !vote.anonymous) continue;
    const int voter = voters.try_emplace(vote.voter, int(voters.size())).first->second;
    const auto& answers = vote.answers;
    if (answers.size() == 2 && answers[0].rank != answers[1].rank)
      t.decided++, t.left_won += answers[0].rank < answers[1].rank;
    if (const auto share = longer_share(vote)) t.unequal++, t.longer_won += *share;
    bool counts = false;
    for (size_t i = 0; i < answers.size(); i++) {
      for (size_t j = i + 1; j < answers.size(); j++) {
        const auto number = [&](size_t k) {
          return numbers[{answers[k].model, answers[k].weights}];
        };
        Game g{.left = number(i), .right = number(j), .vote = int(v), .voter = voter};
        if (g.left == g.right) continue;
        counts = true;
        g.score = answers[i].rank < answers[j].rank   ? 1
                  : answers[i].rank > answers[j].rank ? 0
                                                      : .5;
        t.games.push_back(g);
        t.records[size_t(g.left)].add(g.score), t.records[size_t(g.right)].add(1 - g.score);
        Record& pair = t.pairs[std::minmax(g.left, g.right)];
        pair.add(g.left < g.right ? g.score : 1 - g.score);
      }
    }
    t.counted += counts;
  }
  return t;
}

// Of the players that are rated: the set with the most games, of several players.
std::vector<int> largest_set(const Table& t) {
  const int players = int(t.ids.size());
  const std::vector<int> sets = connected_sets(players, t.games);
  std::map<int, std::pair<std::vector<int>, int64_t>> found;  // by the set: players and games
  for (int i = 0; i < players; i++) {
    auto& [members, games] = found[sets[size_t(i)]];
    members.push_back(i), games += t.records[size_t(i)].games();
  }
  const std::pair<std::vector<int>, int64_t>* best = nullptr;
  for (const auto& [set, one] : found) {
    if (one.first.size() < 2) continue;
    if (!best || std::make_pair(one.first.size(), one.second) >
                     std::make_pair(best->first.size(), best->second))
      best = &one;
  }
  return best ? best->first : std::vector<int>{};
}

OrderedJson player_json(const Table& t, int player) {
  const Record& r = t.records[size_t(player)];
  const auto& [model, weights] = t.ids[size_t(player)];
  return {{"model", model},
          {"weights", weights},
          {"wins", r.wins},
          {"losses", r.losses},
          {"ties", r.ties}};
}

OrderedJson share_json(double won, int64_t votes) {
  if (votes == 0) return nullptr;
  const double share = won / double(votes);
  const Interval interval = wilson(share, votes);
  return {{"share", share}, {"low", interval.low}, {"high", interval.high}, {"votes", votes}};
}

// Votes on the pair alone until 0 lies outside of the interval, if the difference d stays: each
// vote adds (p (1 - p))^2 / (the variance of its score) to 1 / variance.
OrderedJson votes_to_settle(double d, double variance, double tie_share) {
  const double p = sigmoid(d), slope = p * (1 - p);
  const double information = slope * slope / std::max(slope - tie_share / 4, slope / 10);
  const double votes = (kNormal95 * kNormal95 / (d * d) - 1 / variance) / information;
  if (!(votes < kMostVotes)) return nullptr;
  return int64_t(std::ceil(std::max(0., votes)));
}

struct Rated {              // the players of one set, the best first
  std::vector<int> order;   // players of the table
  std::vector<Game> games;  // between places in order
  BradleyTerry fit;
};

Rated rate(const Table& t, std::vector<int> players) {
  Rated r;
  r.order = std::move(players);
  const auto fit = [&] {
    std::vector<int> places(t.ids.size(), -1);
    for (size_t i = 0; i < r.order.size(); i++) places[size_t(r.order[i])] = int(i);
    r.games.clear();
    for (Game g : t.games) {
      g.left = places[size_t(g.left)], g.right = places[size_t(g.right)];
      if (g.left >= 0 && g.right >= 0) r.games.push_back(g);
    }
    return fit_bradley_terry(int(r.order.size()), r.games, kPrior, false);
  };
  const BradleyTerry first = fit();
  std::vector<size_t> sorted(r.order.size());
  std::iota(sorted.begin(), sorted.end(), size_t(0));
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](size_t a, size_t b) { return first.theta[a] > first.theta[b]; });
  std::vector<int> order;
  for (const size_t i : sorted) order.push_back(r.order[i]);
  r.order = std::move(order);
  r.fit = fit();
  return r;
}

OrderedJson ranked_players(const Table& t, const Rated& r) {
  OrderedJson players = OrderedJson::array();
  for (size_t i = 0; i < r.order.size(); i++) {
    std::vector<double> weights(r.order.size() + 1);
    weights[i] = 1;
    const double rating = 1000 + kScale * r.fit.theta[i];
    const double half = kNormal95 * kScale * std::sqrt(r.fit.variance(weights));
    OrderedJson one = player_json(t, r.order[i]);
    one["rating"] = rating, one["low"] = rating - half, one["high"] = rating + half;
    players.push_back(one);
  }
  for (OrderedJson& one : players) {
    one["rank"] = 1 + std::count_if(players.begin(), players.end(), [&](const OrderedJson& other) {
                    return other["low"].get<double>() > one["high"].get<double>();
                  });
  }
  return players;
}

OrderedJson pairs_json(const Table& t, const Rated& r) {
  OrderedJson pairs = OrderedJson::array();
  for (int a = 0; a < int(r.order.size()); a++) {
    for (int b = a + 1; b < int(r.order.size()); b++) {
      const int i = r.order[size_t(a)], j = r.order[size_t(b)];
      const auto found = t.pairs.find(std::minmax(i, j));
      Record record = found == t.pairs.end() ? Record{} : found->second;
      if (i > j) std::swap(record.wins, record.losses);
      const double d = r.fit.theta[size_t(a)] - r.fit.theta[size_t(b)];
      const double half = kNormal95 * std::sqrt(r.fit.difference_variance(a, b));
      pairs.push_back({{"a", a},
                       {"b", b},
                       {"wins", record.wins},
                       {"losses", record.losses},
                       {"ties", record.ties},
                       {"beats", sigmoid(d)},
                       {"low", sigmoid(d - half)},
                       {"high", sigmoid(d + half)}});
    }
  }
  return pairs;
}

OrderedJson top_json(const Rated& r) {
  if (r.order.empty()) return nullptr;
  const auto ties =
      std::count_if(r.games.begin(), r.games.end(), [](const Game& g) { return g.score == .5; });
  const double d = r.fit.theta[0] - r.fit.theta[1], variance = r.fit.difference_variance(0, 1);
  const double half = kNormal95 * std::sqrt(variance);
  return {{"a", 0},
          {"b", 1},
          {"difference", kScale * d},
          {"low", kScale * (d - half)},
          {"high", kScale * (d + half)},
          {"settled", d > half},
          {"more_votes", votes_to_settle(d, variance, double(ties) / double(r.games.size()))}};
}

OrderedJson left_json(const Table& t, const Rated& r) {
  OrderedJson left = share_json(double(t.left_won), t.decided);
  if (left.is_null()) return left;
  left["bias"] = left["bias_low"] = left["bias_high"] = nullptr;
  if (r.order.empty()) return left;
  std::vector<double> weights(r.order.size() + 1);
  weights.back() = 1;
  const BradleyTerry fit = fit_bradley_terry(int(r.order.size()), r.games, kPrior, true);
  const double half = kNormal95 * std::sqrt(fit.variance(weights));
  left["bias"] = fit.bias, left["bias_low"] = fit.bias - half, left["bias_high"] = fit.bias + half;
  return left;
}

}  // namespace

OrderedJson leaderboard(std::span<const Vote> votes) {
  const Table t = make_table(votes);
  Rated rated;
  if (std::vector<int> players = largest_set(t); !players.empty())
    rated = rate(t, std::move(players));
  OrderedJson not_connected = OrderedJson::array();
  for (int i = 0; i < int(t.ids.size()); i++)
    if (std::find(rated.order.begin(), rated.order.end(), i) == rated.order.end())
      not_connected.push_back(player_json(t, i));
  return {{"votes", t.votes},
          {"counted", t.counted},
          {"players", ranked_players(t, rated)},
          {"pairs", pairs_json(t, rated)},
          {"not_connected", not_connected},
          {"left", left_json(t, rated)},
          {"longer", share_json(t.longer_won, t.unequal)},
          {"top", top_json(rated)},
          {"prior", kPrior}};
}

}  // namespace cake
