// The arena: people compare answers without knowing whose they are, and their votes are kept.
//
//     POST /arena/battle   a prompt -> two models' answers (compare), or K answers of one (collect)
//     POST /arena/vote     which is better; only now the reply names the models
//
// Before the vote no byte that is sent tells which model wrote what: no name, no fingerprint, no
// count of tokens, and the text of all answers is released at one pace. See serve_arena.cpp for the
// bodies of requests and replies.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cake/http.h"
#include "cake/json.h"
#include "cake/serve.h"

namespace cake {

class BattleArena {
 public:
  // Opens the votes and reads the prompts. Error: a file that is none, no model that answers
  // conversations, one model for "compare". The models and the engine must outlive it.
  BattleArena(const ArenaOptions&, std::span<const ServedModel> models, Engine&, const ApiLimits&);
  ~BattleArena();
  // Each of these answers a request of that path, from any thread, and throws ApiError.
  void battle(const httplib::Request&, httplib::Response&);  // POST /arena/battle
  OrderedJson vote(const OrderedJson& body);                 // POST /arena/vote
  OrderedJson stop(const OrderedJson& body);         // POST /arena/stop: all answers end now
  OrderedJson undo(const OrderedJson& body);         // POST /arena/undo: takes the vote back
  OrderedJson leaderboard(const OrderedJson& body);  // POST /arena/leaderboard
  // For GET /props: {"mode", "answers", "prompts"}: how many prompts are left, null where voters
  // write their own.
  OrderedJson state() const;

  struct State;  // in serve_arena.cpp

 private:
  std::unique_ptr<State> state_;
};

}  // namespace cake
