// Which model people prefer, and how sure that is: Bradley-Terry with intervals.
//
//     votes -> games: each pair of answers of two players, won, lost or tied
//           -> the largest set of players that decided games connect; the others get no rating
//           -> fit_bradley_terry: a strength for each player, by Newton's method
//           -> its covariance -> intervals of ratings, ranks, and whether the top pair is settled
//
// Bradley and Terry (1952): a player of strength theta_i wins against one of theta_j with the
// probability s(theta_i - theta_j), where s(x) = 1 / (1 + exp(-x)). A tie is half a win for each.
// The rating is 1000 + 400 / ln 10 (theta - mean): Elo's scale, on which 400 points more are odds
// of 10 to 1. The order of the votes does not matter, as it does in Elo's own updates. Sides
// are drawn by chance, so a voter's bias for the left side does not favour a player. It only blurs
// the outcomes: of .3, it draws strengths together by 2 %. It is fitted apart, and reported.
//
// Intervals are the larger of three (variance()). The sandwich (Huber 1967; Chiang et al., arXiv
// 2403.04132) takes the spread of the votes as it is, but it is far too narrow where a player has
// won nearly everything: five wins in a row have no spread. The model's own covariance takes the
// spread that the strengths predict. And one person's votes are alike: with 20 voters or more, a
// sandwich over voters says how much that matters.
#pragma once

#include <span>
#include <vector>

#include "cake/json.h"
#include "cake/votes.h"

namespace cake {

struct Game {
  int left = 0, right = 0;  // players
  double score = 0;         // of the left one: 1 won, .5 tie, 0 lost
  int vote = 0, voter = 0;  // numbers: games of one vote, and votes of one voter, are alike
};

struct BradleyTerry {
  int players = 0;
  std::vector<double> theta;  // (players): natural logarithms of strengths, their mean is 0
  double bias = 0;            // added to theta_left - theta_right; 0 unless asked for
  // Covariances of theta and bias, (players + 1, players + 1). `model`: as if no game could end in
  // a tie. `ties`: less what ties take away. `votes`, `voters`: sandwiches; voters: empty where
  // they are fewer than 20.
  std::vector<double> model, ties, votes, voters;
  // Of the sum of weights[i] theta[i], weights[players] for bias: the largest of ties, votes and
  // voters. (players + 1)
  double variance(std::span<const double> weights) const;
  double difference_variance(int a, int b) const;  // of theta[a] - theta[b]
};

// The strengths that make the games likeliest, less prior / 2 |theta|^2 (and bias^2). The prior
// keeps strengths finite where one has won everything: .5 is worth a standard deviation of 246
// points. Error: a prior of 0 or more where strengths have no finite maximum.
BradleyTerry fit_bradley_terry(int players, std::span<const Game>, double prior, bool with_bias);

// Numbers of the sets of players that are connected by games that one side won. (players)
std::vector<int> connected_sets(int players, std::span<const Game>);

// All of it. Shares are from 0 to 1, intervals are 95 % ones, a and b are places in "players".
//
//   {"votes": not taken back, "counted": those that compare two players,
//    "players": [{"model", "weights", "rating", "low", "high", "rank", "wins", "losses", "ties"}],
//    "pairs": [{"a", "b", "wins", "losses", "ties", "beats", "low", "high"}],
//    "not_connected": [{"model", "weights", "wins", "losses", "ties"}],
//    "left": {"share", "low", "high", "votes", "bias", "bias_low", "bias_high"},
//    "longer": {"share", "low", "high", "votes"},
//    "top": {"a", "b", "difference", "low", "high", "settled", "more_votes"}, "prior": .5}
//
// A player is a model with its weights. Players are in the order of their ratings; rank is 1 and
// the number of players whose interval lies above this one's whole interval. `beats`: probability
// that a is preferred to b. `left`: how often the left one of two answers won, of decided votes,
// and the bias in units of theta. `longer`: how often the one of more tokens won; each vote counts
// once. `more_votes`: on the top pair alone, until its interval leaves out 0, if the difference
// stays what it is. left, longer, top, bias and more_votes are null where there is nothing to tell.
// Votes that were taken back, of equal answers, and of answers that name a model are left out.
OrderedJson leaderboard(std::span<const Vote> votes);

}  // namespace cake
