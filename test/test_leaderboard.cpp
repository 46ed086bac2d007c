// Bradley-Terry and the leaderboard: known values, intervals that hold the truth as often as they
// say, and what is left out.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cake/leaderboard.h"
#include "cake/verify.h"

using namespace cake;

namespace {

constexpr double kScale = 173.7177927613007;  // 400 / ln 10

void add_games(std::vector<Game>& games, int left, int right, int wins, int losses, int ties = 0) {
  const auto add = [&](int times, double score) {
    for (int i = 0; i < times; i++) games.push_back({left, right, score, int(games.size()), 0});
  };
  add(wins, 1), add(losses, 0), add(ties, .5);
}

// A-B 7:3, A-C 8:2, B-C 5:4 and a tie.
std::vector<Game> thirty_games() {
  std::vector<Game> games;
  add_games(games, 0, 1, 7, 3);
  add_games(games, 0, 2, 8, 2);
  add_games(games, 1, 2, 5, 4, 1);
  return games;
}

double deviation(const std::vector<double>& covariance, int players, int a, int b = -1) {
  const auto entry = [&](int i, int j) { return covariance[size_t(i * (players + 1) + j)]; };
  return kScale * std::sqrt(b < 0 ? entry(a, a) : entry(a, a) + entry(b, b) - 2 * entry(a, b));
}

// Votes on two answers. `outcome`: 'L', 'R' or '='.
Vote vote_of(const std::string& left, const std::string& right, char outcome, int tokens_left = 10,
             int tokens_right = 10) {
  Vote v;
  v.battle = "battle", v.mode = "compare", v.voter = "voter";
  v.answers.resize(2);
  v.answers[0].model = left, v.answers[1].model = right;
  v.answers[0].weights = "fp_" + left, v.answers[1].weights = "fp_" + right;
  v.answers[0].tokens = tokens_left, v.answers[1].tokens = tokens_right;
  v.answers[0].rank = outcome == 'R' ? 2 : 1, v.answers[1].rank = outcome == 'L' ? 2 : 1;
  return v;
}

void add_votes(std::vector<Vote>& votes, const std::string& left, const std::string& right,
               int wins, int losses, int ties = 0) {
  for (int i = 0; i < wins; i++) votes.push_back(vote_of(left, right, 'L'));
  for (int i = 0; i < losses; i++) votes.push_back(vote_of(left, right, 'R'));
  for (int i = 0; i < ties; i++) votes.push_back(vote_of(left, right, '='));
}

std::vector<std::string> names_of(const OrderedJson& players) {
  std::vector<std::string> names;
  for (const OrderedJson& one : players) names.push_back(one["model"]);
  return names;
}

// A voter of known strengths: ties take `ties` from wins and losses alike, so that a tie as half a
// win leaves the strengths what they are.
std::vector<Game> cast(const std::vector<double>& strengths, double bias, double ties, int votes,
                       uint64_t seed) {
  Rng rng{.seed = seed};
  std::vector<Game> games;
  for (int v = 0; v < votes; v++) {
    const int left = int(rng.below(strengths.size()));
    const int right =
        int(size_t(left + 1) + rng.below(strengths.size() - 1)) % int(strengths.size());
    const double d = strengths[size_t(left)] - strengths[size_t(right)] + bias;
    const double wins = 1 / (1 + std::exp(-d)) - ties / 2, u = rng.uniform();
    games.push_back({left, right, u < wins ? 1. : u < wins + ties ? .5 : 0., v, 0});
  }
  return games;
}

}  // namespace

TEST_CASE("Bradley-Terry has its known values") {
  // Made by Newton's method in Python, without a prior.
  const BradleyTerry fit = fit_bradley_terry(3, thirty_games(), 0, false);
  CHECK(fit.theta[0] == doctest::Approx(.735979).epsilon(1e-6));
  CHECK(fit.theta[1] == doctest::Approx(-.221657).epsilon(1e-5));
  CHECK(fit.theta[2] == doctest::Approx(-.514321).epsilon(1e-5));
  CHECK(1000 + kScale * fit.theta[0] == doctest::Approx(1127.853).epsilon(1e-6));
  CHECK(1000 + kScale * fit.theta[1] == doctest::Approx(961.494).epsilon(1e-6));
  CHECK(1000 + kScale * fit.theta[2] == doctest::Approx(910.653).epsilon(1e-6));
  CHECK(std::abs(deviation(fit.model, 3, 0) - 59.97) < .005);
  CHECK(std::abs(deviation(fit.model, 3, 1) - 55.00) < .005);
  CHECK(std::abs(deviation(fit.model, 3, 2) - 56.95) < .005);
  CHECK(std::abs(deviation(fit.model, 3, 0, 1) - 100.00) < .005);
  CHECK(std::abs(deviation(fit.votes, 3, 0) - 59.69) < .005);
  CHECK(std::abs(deviation(fit.votes, 3, 1) - 54.42) < .005);
  CHECK(std::abs(deviation(fit.votes, 3, 2) - 54.62) < .006);
  CHECK(fit.bias == 0);
  CHECK(fit.voters.empty());
}

TEST_CASE("the order of votes and which side a player was on do not change a rating") {
  std::vector<Game> games = thirty_games();
  const BradleyTerry fit = fit_bradley_terry(3, games, .5, false);
  std::reverse(games.begin(), games.end());
  for (size_t i = 0; i < games.size(); i += 2)
    std::swap(games[i].left, games[i].right), games[i].score = 1 - games[i].score;
  const BradleyTerry other = fit_bradley_terry(3, games, .5, false);
  for (size_t i = 0; i < 3; i++) CHECK(std::abs(fit.theta[i] - other.theta[i]) < 1e-9);
}

TEST_CASE("a prior keeps the rating of a player that has won everything finite") {
  std::vector<Game> games;
  add_games(games, 0, 1, 5, 0);
  const BradleyTerry fit = fit_bradley_terry(2, games, .5, false);
  CHECK(1000 + kScale * fit.theta[0] == doctest::Approx(1184.8).epsilon(1e-4));
  CHECK(1000 + kScale * fit.theta[1] == doctest::Approx(815.2).epsilon(1e-4));
  CHECK_THROWS_AS(fit_bradley_terry(2, games, 0, false), Error);
  // Five wins in a row are no proof (a coin does that once in 16 times, on one side or the other),
  // although the votes have no spread.
  CHECK(kScale * 2 * fit.theta[0] < 1.96 * kScale * std::sqrt(fit.difference_variance(0, 1)));
  CHECK(kScale * 2 * fit.theta[0] > 1.96 * deviation(fit.votes, 2, 0, 1));
}

TEST_CASE("the gradient of the likelihood is 0 at the fit, with a left-side bias too") {
  const std::vector<Game> games = cast({0, .5, 1, 3}, .3, .1, 500, 1);
  const BradleyTerry fit = fit_bradley_terry(4, games, .5, true);
  std::vector<double> gradient(5);
  for (size_t i = 0; i < 4; i++) gradient[i] = .5 * fit.theta[i];
  gradient[4] = .5 * fit.bias;
  for (const Game& g : games) {
    const double d = fit.theta[size_t(g.left)] - fit.theta[size_t(g.right)] + fit.bias;
    const double error = 1 / (1 + std::exp(-d)) - g.score;
    gradient[size_t(g.left)] += error, gradient[size_t(g.right)] -= error, gradient[4] += error;
  }
  for (const double g : gradient) CHECK(std::abs(g) < 1e-8);
}

TEST_CASE("95 percent intervals hold the truth in 90 to 99 of 100 repeats, beside ties and bias") {
  const std::vector<double> truth = {0, .5, 1};
  const double mean = .5, bias = .3;
  int covered[4] = {}, in_order = 0;
  double sum[4] = {};
  for (uint64_t repeat = 0; repeat < 100; repeat++) {
    const std::vector<Game> games = cast(truth, bias, .15, 3000, 100 + repeat);
    const BradleyTerry fit = fit_bradley_terry(3, games, .5, false);
    const BradleyTerry with_bias = fit_bradley_terry(3, games, .5, true);
    for (size_t i = 0; i < 4; i++) {  // the fourth is the bias
      std::vector<double> weights(4);
      weights[i] = 1;
      const double error = i < 3 ? fit.theta[i] + mean - truth[i] : with_bias.bias - bias;
      const double variance = i < 3 ? fit.variance(weights) : with_bias.variance(weights);
      covered[i] += std::abs(error) < 1.96 * std::sqrt(variance);
      sum[i] += error;
    }
    in_order += fit.theta[0] < fit.theta[1] &&
                fit.theta[2] - fit.theta[1] > 1.96 * std::sqrt(fit.difference_variance(2, 1));
  }
  for (size_t i = 0; i < 4; i++) {
    CAPTURE(i);
    CHECK(covered[i] >= 90);
    CHECK(covered[i] <= 99);
    // A mean of 100 is known to .003; sides by chance blur strengths of .5 by .01.
    CHECK(std::abs(sum[i] / 100) < .02);
  }
  CHECK(in_order == 100);
}

TEST_CASE("intervals hold the truth with few votes and with many ties too") {
  struct Setting {
    int votes;
    double ties;
  };
  for (const Setting& setting : {Setting{60, 0}, {60, .4}, {1000, .4}}) {
    int covered = 0;
    for (uint64_t repeat = 0; repeat < 200; repeat++) {
      const BradleyTerry fit = fit_bradley_terry(
          3, cast({0, .5, 1}, 0, setting.ties, setting.votes, 1000 + repeat), .5, false);
      covered += std::abs(fit.theta[2] - fit.theta[0] - 1) <
                 1.96 * std::sqrt(fit.difference_variance(2, 0));
    }
    CAPTURE(setting.votes);
    CAPTURE(setting.ties);
    CHECK(covered >= 180);
    CHECK(covered <= 199);
  }
}

TEST_CASE("voters of different tastes widen the interval, once there are 20 of them") {
  const auto games_of = [](int voters) {
    std::vector<Game> games;
    for (int v = 0; v < voters; v++)  // half of them always prefer one side, a few votes apart
      for (int i = 0; i < 10; i++) games.push_back({0, 1, v % 2 ? 1. : 0., int(games.size()), v});
    return games;
  };
  const BradleyTerry few = fit_bradley_terry(2, games_of(18), .5, false);
  CHECK(few.voters.empty());
  const BradleyTerry many = fit_bradley_terry(2, games_of(20), .5, false);
  // 200 votes are worth 20.
  CHECK(deviation(many.voters, 2, 0, 1) / deviation(many.votes, 2, 0, 1) ==
        doctest::Approx(std::sqrt(10 * 20. / 19)));
  CHECK(many.difference_variance(0, 1) > 9 * few.difference_variance(0, 1));
}

TEST_CASE("players are connected by games that one side won") {
  std::vector<Game> games;
  add_games(games, 0, 1, 1, 0);
  add_games(games, 2, 3, 0, 1);
  add_games(games, 1, 2, 0, 0, 5);  // ties tell nothing of who is better
  std::vector<int> sets = connected_sets(5, games);
  CHECK(sets[0] == sets[1]);
  CHECK(sets[2] == sets[3]);
  CHECK(sets[1] != sets[2]);
  CHECK(sets[4] != sets[0]);
  CHECK(sets[4] != sets[2]);
  add_games(games, 3, 0, 1, 0);
  sets = connected_sets(5, games);
  CHECK(sets[0] == sets[2]);
  CHECK(sets[4] != sets[0]);
}

TEST_CASE("the leaderboard lists players, the best first, with intervals and ranks") {
  std::vector<Vote> votes;
  add_votes(votes, "small", "large", 30, 170, 10);
  add_votes(votes, "middle", "small", 100, 40);
  add_votes(votes, "middle", "large", 60, 70);
  const OrderedJson board = leaderboard(votes);
  CHECK(board["votes"] == 480);
  CHECK(board["counted"] == 480);
  CHECK(names_of(board["players"]) == std::vector<std::string>{"large", "middle", "small"});
  CHECK(board["not_connected"].empty());
  const OrderedJson large = board["players"][0], middle = board["players"][1];
  CHECK(large["weights"] == "fp_large");
  CHECK(large["wins"] == 240);
  CHECK(large["losses"] == 90);
  CHECK(large["ties"] == 10);
  for (const OrderedJson& one : board["players"]) {
    CHECK(one["low"].get<double>() < one["rating"].get<double>());
    CHECK(one["high"].get<double>() > one["rating"].get<double>());
  }
  CHECK(large["rank"] == 1);
  CHECK(board["players"][2]["rank"] == 3);

  REQUIRE(board["pairs"].size() == 3);
  const OrderedJson pair = board["pairs"][1];  // large and small
  CHECK(pair["a"] == 0);
  CHECK(pair["b"] == 2);
  CHECK(pair["wins"] == 170);
  CHECK(pair["losses"] == 30);
  CHECK(pair["ties"] == 10);
  const double d = (large["rating"].get<double>() - board["players"][2]["rating"].get<double>());
  CHECK(pair["beats"].get<double>() == doctest::Approx(1 / (1 + std::pow(10, -d / 400))));
  CHECK(pair["low"].get<double>() > .7);
  CHECK(pair["high"].get<double>() < .95);
}

TEST_CASE("wins of a pair are those of the better player, whatever its name") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "z", 2, 7, 1);
  const OrderedJson board = leaderboard(votes);
  REQUIRE(names_of(board["players"]) == std::vector<std::string>{"z", "a"});
  CHECK(board["pairs"][0]["wins"] == 7);
  CHECK(board["pairs"][0]["losses"] == 2);
  CHECK(board["pairs"][0]["ties"] == 1);
}

TEST_CASE("players whose intervals overlap share a rank") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "b", 6, 4);
  add_votes(votes, "b", "c", 50, 2);
  add_votes(votes, "a", "c", 50, 2);
  const OrderedJson board = leaderboard(votes);
  REQUIRE(names_of(board["players"]) == std::vector<std::string>{"a", "b", "c"});
  CHECK(board["players"][0]["rank"] == 1);
  CHECK(board["players"][1]["rank"] == 1);
  CHECK(board["players"][2]["rank"] == 3);
}

TEST_CASE("a model that no path of decided votes connects gets no rating") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "b", 6, 4);
  add_votes(votes, "a", "newcomer", 0, 0, 3);
  const OrderedJson before = leaderboard(votes);
  CHECK(names_of(before["players"]) == std::vector<std::string>{"a", "b"});
  CHECK(names_of(before["not_connected"]) == std::vector<std::string>{"newcomer"});
  CHECK(before["not_connected"][0]["ties"] == 3);
  // Its ties do not change the others' ratings.
  std::vector<Vote> without(votes.begin(), votes.begin() + 10);
  CHECK(leaderboard(without)["players"][0]["rating"] == before["players"][0]["rating"]);
  // Two pairs apart: the larger set is rated.
  add_votes(votes, "c", "d", 20, 10);
  CHECK(names_of(leaderboard(votes)["players"]) == std::vector<std::string>{"c", "d"});
  // One vote connects them.
  add_votes(votes, "newcomer", "a", 1, 0);
  add_votes(votes, "newcomer", "c", 1, 0);
  CHECK(leaderboard(votes)["players"].size() == 5);
  CHECK(leaderboard(votes)["not_connected"].empty());
}

TEST_CASE("a model that was trained on is another player") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "b", 6, 4);
  add_votes(votes, "a", "b", 4, 6);
  for (size_t i = 10; i < 20; i++) votes[i].answers[0].weights = "fp_trained";
  const OrderedJson players = leaderboard(votes)["players"];
  CHECK(names_of(players) == std::vector<std::string>{"a", "b", "a"});
  CHECK(players[0]["weights"] == "fp_a");
  CHECK(players[2]["weights"] == "fp_trained");
}

TEST_CASE("votes that were taken back, of equal answers, and that name a model are not counted") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "b", 6, 4);
  const OrderedJson expected = leaderboard(votes);
  add_votes(votes, "b", "a", 4, 0);
  votes[10].undone = true;
  votes[11].same = true;
  votes[12].leaked = true;
  votes[13].anonymous = false;
  const OrderedJson board = leaderboard(votes);
  CHECK(board["votes"] == 12);
  CHECK(board["counted"] == 10);
  for (const char* key : {"players", "pairs", "left", "longer", "top"})
    CHECK(board[key] == expected[key]);
}

TEST_CASE("the left side's share has Wilson's interval, and its bias one of its own") {
  std::vector<Vote> votes;  // the left one wins 60 of 100, each model as often on either side
  add_votes(votes, "a", "b", 30, 20, 5);
  add_votes(votes, "b", "a", 30, 20, 5);
  const OrderedJson left = leaderboard(votes)["left"];
  CHECK(left["share"] == doctest::Approx(.6));
  CHECK(left["votes"] == 100);
  const Interval interval = wilson(.6, 100);
  CHECK(left["low"].get<double>() == doctest::Approx(interval.low));
  CHECK(left["high"].get<double>() == doctest::Approx(interval.high));
  // Ties are half a win: the bias is that of 65 wins of 110, but for the prior.
  CHECK(left["bias"].get<double>() == doctest::Approx(std::log(65. / 45)).epsilon(.03));
  CHECK(left["bias_low"].get<double>() < left["bias"].get<double>() - .3);
  CHECK(left["bias_high"].get<double>() > left["bias"].get<double>() + .3);
}

TEST_CASE("the longer answer's share counts decided votes of unequal lengths, each once") {
  std::vector<Vote> votes;
  votes.push_back(vote_of("a", "b", 'L', 20, 10));
  votes.push_back(vote_of("a", "b", 'R', 20, 30));
  votes.push_back(vote_of("a", "b", 'R', 20, 10));
  votes.push_back(vote_of("a", "b", 'L', 10, 10));
  votes.push_back(vote_of("a", "b", '=', 20, 10));
  // A ranking of three answers of one model: two of three pairs are won by the longer.
  Vote ranking = vote_of("a", "a", 'L', 30, 10);
  ranking.mode = "collect";
  ranking.answers.push_back(ranking.answers[0]);
  ranking.answers[2].tokens = 20, ranking.answers[2].rank = 3;
  votes.push_back(ranking);
  const OrderedJson longer = leaderboard(votes)["longer"];
  CHECK(longer["votes"] == 4);
  CHECK(longer["share"].get<double>() == doctest::Approx((1 + 1 + 0 + 2. / 3) / 4));
}

TEST_CASE("answers of one model alone give no rating, but tell about sides and lengths") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "a", 6, 4);
  const OrderedJson board = leaderboard(votes);
  CHECK(board["votes"] == 10);
  CHECK(board["counted"] == 0);
  CHECK(board["players"].empty());
  CHECK(names_of(board["not_connected"]) == std::vector<std::string>{"a"});
  CHECK(board["left"]["share"] == doctest::Approx(.6));
  CHECK(board["left"]["bias"].is_null());
  CHECK(board["longer"].is_null());
  CHECK(board["top"].is_null());
}

TEST_CASE("the leaderboard rates five wins in a row as a prior of .5 does") {
  std::vector<Vote> votes;
  add_votes(votes, "a", "b", 5, 0);
  const OrderedJson board = leaderboard(votes);
  CHECK(board["prior"] == .5);
  CHECK(board["players"][0]["rating"].get<double>() == doctest::Approx(1184.8).epsilon(1e-4));
  CHECK(board["players"][1]["rating"].get<double>() == doctest::Approx(815.2).epsilon(1e-4));
  CHECK(board["top"]["difference"].get<double>() == doctest::Approx(369.6).epsilon(1e-3));
  CHECK(board["top"]["settled"] == false);
}

TEST_CASE("no votes give an empty leaderboard") {
  const OrderedJson board = leaderboard({});
  CHECK(board["votes"] == 0);
  CHECK(board["players"].empty());
  CHECK(board["pairs"].empty());
  CHECK(board["left"].is_null());
  CHECK(board["longer"].is_null());
  CHECK(board["top"].is_null());
}

TEST_CASE("so many more votes settle the top pair as the leaderboard says") {
  for (const int ties : {0, 150}) {
    std::vector<Vote> votes;
    add_votes(votes, "a", "b", 120, 100, ties);
    add_votes(votes, "b", "c", 90, 30);
    const OrderedJson top = leaderboard(votes)["top"];
    CHECK(top["settled"] == false);
    CHECK(top["low"].get<double>() < 0);
    const int more = top["more_votes"].get<int>();
    REQUIRE(more > 100);
    // Cast in the same shares. A half win on each side is the rest.
    const auto settled_after = [&](double share) {
      std::vector<Vote> all = votes;
      const double n = share * more / (220 + ties);
      add_votes(all, "a", "b", int(std::lround(120 * n)), int(std::lround(100 * n)),
                int(std::lround(ties * n)));
      return leaderboard(all)["top"]["settled"].get<bool>();
    };
    CHECK(settled_after(1.1));
    CHECK(!settled_after(.8));
  }
  std::vector<Vote> votes;
  add_votes(votes, "a", "b", 90, 10);
  const OrderedJson top = leaderboard(votes)["top"];
  CHECK(top["settled"] == true);
  CHECK(top["more_votes"] == 0);
  CHECK(top["low"].get<double>() > 0);
  // An even pair: no number would.
  votes.clear();
  add_votes(votes, "a", "b", 10, 10);
  CHECK(leaderboard(votes)["top"]["more_votes"].is_null());
}
