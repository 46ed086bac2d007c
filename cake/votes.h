// People's votes on answers, in a SQLite file: what the arena collects, and what training reads.
//
//     BattleArena (serve_arena.cpp) --Vote--> Votes::add --SQL transaction, fdatasync--> VOTES.db
//     VOTES.db --./serve export--> preferences.jsonl --> ./reward train, ./reward dpo
//
// A vote is stored as what was shown: answers by their place on the screen, each with the model
// that wrote it, and the ranks that the voter gave. Who won follows from that. Nothing is
// rewritten: a vote that was taken back stays, and a row of its own says so.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "cake/json.h"

namespace cake {

struct VotedAnswer {
  std::string model;    // the id under which it was served
  std::string weights;  // ServedModel::fingerprint: a model that was trained on is another player
  std::string text;
  int tokens = 0;
  std::string finish;  // "stop", "length" (cut off by a limit) or "stopped" (by the voter)
  uint64_t seed = 0, stream = 0;
  int rank = 1;      // 1 is the best; equal ranks are a tie
  bool good = true;  // whether the answer is good at all; "both are bad": equal ranks, both false
};

struct Vote {
  std::string battle;  // 128 random bits, in hexadecimal
  std::string time;    // of the vote: "2026-11-26T10:00:00Z"
  std::string mode;    // "compare": two models, "collect": answers of one model
  std::string voter;   // random name that the voter's browser chose
  OrderedJson prompt;  // array of messages
  OrderedJson sampling;
  std::vector<VotedAnswer> answers;  // as they were shown: [0] left, [1] right
  bool anonymous = true;             // no model's name was shown before the vote
  bool leaked = false;               // an answer names a model: not counted in the leaderboard
  bool same = false;  // equal answers, that nobody was shown: not counted, not exported
  bool undone = false;
  double seconds = 0;  // from the last answer's end to the vote
};

// Text that is not valid UTF-8 is stored as pages show it: with U+FFFD.
class Votes {
 public:
  enum class Access { write, read };
  // Opens the file, and makes it with Access::write where there is none. Error: no file of votes,
  // one of a newer version, or one that is not readable. Several processes may have it open.
  explicit Votes(const std::string& path, Access = Access::write);
  ~Votes();
  // Returns once the vote is on the disk, so that it survives a kill -9 and a power cut. Error:
  // the disk is full, the file is gone, another program has locked it for 10 s, or the battle has
  // a vote; then the vote is not stored. From any thread.
  void add(const Vote&);
  // Marks the vote as taken back, as safely; false: there is none of this name, or it was taken
  // back before.
  bool undo(const std::string& battle);
  int64_t count() const;                             // of votes that were not taken back
  int64_t count_of(const std::string& voter) const;  // of these, one voter's, without `same`
  // In the order in which they were cast; those that were taken back too. The file is not locked
  // while the callback runs: votes may be added, and those that come late are seen too.
  void for_each(const std::function<void(const Vote&)>&) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// {"version", "battle", "time", ...}: a line of --raw.
OrderedJson vote_json(const Vote&);

// ---------------------------------------------------------------------------------------------
// ./serve export

struct VoteExportOptions {
  bool raw = false;       // every vote, as it is stored, a line each
  bool keep_cut = false;  // answers that a limit or the voter cut off, too
  uint64_t seed = 0;      // of the order of the records
};

// votes = records + merged + undone + same + ties + empty + cut + refused: each vote is counted
// once, for the first reason that holds.
struct VoteExport {
  int64_t votes = 0, records = 0;
  int64_t merged = 0;          // into a record that has votes of the same prompt and answers
  int64_t undone = 0;          // taken back
  int64_t same = 0;            // the answers are equal, but for white space at their ends
  int64_t ties = 0;            // nothing is better than anything, by all votes together
  int64_t empty = 0, cut = 0;  // fewer than two answers are left without such ones
  int64_t refused = 0;         // training cannot read the prompt: `reason`, of the first
  std::string reason;
  int64_t dropped_answers = 0;  // empty or cut, of rankings whose other answers are written
};

// Preferences as ./reward and TRL read them, of conversations: {"prompt", "chosen", "rejected"} of
// two answers, and {"prompt", "responses", "ranking"} of more. Votes on the same prompt and answers
// become one record: an answer's score is how often it was placed above another, minus how often
// below; of two answers, the majority decides. The order follows from the seed and the records
// alone. With `raw` only `votes` and `records` are counted.
VoteExport export_votes(const Votes&, std::ostream&, const VoteExportOptions&);
// A copy of the file, whole although votes are being cast. It replaces `copy`.
void backup_votes(const std::string& path, const std::string& copy);

struct ExportVotesOptions {
  std::string votes;   // SQLite file
  std::string output;  // JSON lines; "": standard output, unless there is a backup
  std::string backup;  // file for a copy; "": none
  VoteExportOptions records;
};
// The command: says on stderr what it wrote and what it left out. Returns the exit status.
int export_votes_command(const ExportVotesOptions&);

}  // namespace cake
