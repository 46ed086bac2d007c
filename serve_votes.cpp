// Votes in SQLite, and what training reads of them: see cake/votes.h.
//
// The file has three tables, to which rows are only ever added. `sqlite3 VOTES.db .schema` shows
// them with these comments; the answers' texts and the messages of prompts are stored as they are,
// so that any program that reads SQLite and JSON can go on from there.
//
// A vote is one transaction in SQLite's rollback mode (https://sqlite.org/atomiccommit.html): the
// pages that will change go to VOTES.db-journal, which is synced; then they are changed in the
// file, which is synced; then the journal is removed. Whoever finds a journal after a crash puts
// the old pages back. So the file alone holds every vote at any time but these few milliseconds.
#include "cake/votes.h"

#include <sqlite3.h>

#include <map>
#include <mutex>
#include <sstream>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cake/messages.h"
#include "cake/preferences.h"
#include "cake/run.h"

namespace cake {

namespace {

constexpr int kVersion = 1;                // user_version: of the tables
constexpr int kApplication = 0x63616b65;   // application_id: "cake" in ASCII
constexpr int kBusyMilliseconds = 10'000;  // that another program may have the file locked
constexpr int kVotesAtOnce = 256;          // read before the lock is given back
constexpr const char* kTables = R"(
CREATE TABLE votes (
  number INTEGER PRIMARY KEY,  -- in the order in which they were cast
  battle TEXT NOT NULL UNIQUE, -- 128 random bits, in hexadecimal
  time TEXT NOT NULL,          -- "2026-11-26T10:00:00Z"
  mode TEXT NOT NULL,          -- compare: two models; collect: answers of one model
  voter TEXT NOT NULL,         -- random name that the voter's browser chose
  prompt TEXT NOT NULL,        -- messages, as JSON
  sampling TEXT NOT NULL,      -- as JSON
  anonymous INTEGER NOT NULL,  -- 1: no model's name was shown before the vote
  leaked INTEGER NOT NULL,     -- 1: an answer names a model
  same INTEGER NOT NULL,       -- 1: equal answers, which nobody was shown
  seconds REAL NOT NULL        -- from the last answer's end to the vote
) STRICT;
CREATE TABLE answers (
  vote INTEGER NOT NULL REFERENCES votes (number),
  place INTEGER NOT NULL,      -- on the screen, from the left: 0, 1, ...
  model TEXT NOT NULL,
  weights TEXT NOT NULL,       -- fingerprint of the model
  text TEXT NOT NULL,
  tokens INTEGER NOT NULL,
  finish TEXT NOT NULL,        -- stop, length (cut off by a limit), stopped (by the voter)
  seed INTEGER NOT NULL,       -- 64 bits, as a signed number
  stream INTEGER NOT NULL,     -- the same
  rank INTEGER NOT NULL CHECK (rank >= 1), -- 1 is the best; equal ranks are a tie
  good INTEGER NOT NULL,       -- 0: the voter finds it bad, whatever its rank
  PRIMARY KEY (vote, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE undone (          -- votes that were taken back
  vote INTEGER PRIMARY KEY REFERENCES votes (number),
  time TEXT NOT NULL
) STRICT;
)";

// ---------------------------------------------------------------------------------------------
// SQLite: calls whose failures are Errors

struct CloseDatabase {
  void operator()(sqlite3* db) const { sqlite3_close(db); }
};
struct FinalizeStatement {
  void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
};

class Database {
 public:
  // Without `create` the file must be there. A program that cannot write the file can still read
  // it.
  Database(const std::string& path, bool create) : path_(path) {
    if (path.empty()) fail("the file of votes: found an empty name");
    // Absolute, since SQLite reads meaning into ":memory:" and "file:...".
    const std::string file = std::filesystem::absolute(path).lexically_normal().string();
    std::error_code ec;
    if (std::filesystem::is_directory(file, ec)) {
      fail(path, ": found a directory, expected a file of votes");
    }
    sqlite3* db = nullptr;
    const int code = sqlite3_open_v2(file.c_str(), &db,
                                     SQLITE_OPEN_READWRITE | (create ? SQLITE_OPEN_CREATE : 0) |
                                         SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE,
                                     nullptr);
    db_.reset(db);
    check(code);
    check(sqlite3_busy_timeout(db, kBusyMilliseconds));
  }

  sqlite3* get() const { return db_.get(); }
  const std::string& path() const { return path_; }

  void check(int code) const {
    if (code == SQLITE_OK) return;
    const std::string what = db_ ? sqlite3_errmsg(db_.get()) : "out of memory";
    switch (code & 0xff) {  // above it: what the error is exactly
      case SQLITE_NOTADB:
        fail(path_, ": found no SQLite file, expected a file of votes");
      case SQLITE_FULL:
        fail(path_, ": cannot write: the disk is full");
      case SQLITE_BUSY:
      case SQLITE_LOCKED:
        fail(path_, ": another program has locked the file for ", kBusyMilliseconds / 1000, " s");
      case SQLITE_READONLY:
        if (code == SQLITE_READONLY_DBMOVED) {
          fail(path_, ": cannot write: the file was removed or replaced since it was opened");
        }
        fail(path_, ": cannot write: the file or its directory is read-only");
      case SQLITE_CANTOPEN:
        fail(path_, ": cannot open: ", std::strerror(sqlite3_system_errno(db_.get())));
      case SQLITE_IOERR:
        fail(path_, ": cannot read or write: ", what);
      case SQLITE_CORRUPT:
        fail(path_, ": the file is damaged: ", what);
      default:
        fail(path_, ": SQLite: ", what);
    }
  }

  void run(const char* sql) const {
    check(sqlite3_exec(db_.get(), sql, nullptr, nullptr, nullptr));
  }

 private:
  std::string path_;
  std::unique_ptr<sqlite3, CloseDatabase> db_;
};

// A statement with a value for each ?, in their order; then its rows.
class Statement {
 public:
  template <class... Values>
  explicit Statement(const Database& db, const char* sql, const Values&... values) : db_(db) {
    sqlite3_stmt* statement = nullptr;
    db.check(sqlite3_prepare_v2(db.get(), sql, -1, &statement, nullptr));
    statement_.reset(statement);
    int number = 0;
    (db.check(bind(++number, values)), ...);
  }
  bool next() {  // whether there is a row
    const int code = sqlite3_step(statement_.get());
    if (code == SQLITE_ROW) return true;
    db_.check(code == SQLITE_DONE ? SQLITE_OK : code);
    return false;
  }
  void run() {
    while (next()) {
    }
  }
  int64_t integer(int column) const { return sqlite3_column_int64(statement_.get(), column); }
  double real(int column) const { return sqlite3_column_double(statement_.get(), column); }
  std::string text(int column) const {  // a NUL inside is a character as any other
    const auto* bytes = sqlite3_column_text(statement_.get(), column);
    if (!bytes) return "";
    return {reinterpret_cast<const char*>(bytes),
            size_t(sqlite3_column_bytes(statement_.get(), column))};
  }

 private:
  template <class T>
  int bind(int number, const T& value) {
    if constexpr (std::is_floating_point_v<T>) {
      return sqlite3_bind_double(statement_.get(), number, value);
    } else if constexpr (std::is_integral_v<T>) {
      return sqlite3_bind_int64(statement_.get(), number, int64_t(value));
    } else {  // the statement runs while the value is there
      const std::string_view text = value;
      return sqlite3_bind_text64(statement_.get(), number, text.data(), text.size(), SQLITE_STATIC,
                                 SQLITE_UTF8);
    }
  }
  const Database& db_;
  std::unique_ptr<sqlite3_stmt, FinalizeStatement> statement_;
};

int64_t integer_of(const Database& db, const char* sql) {
  Statement statement(db, sql);
  return statement.next() ? statement.integer(0) : 0;
}

// All or nothing: what is not committed is taken back. IMMEDIATE takes the lock at once: a
// transaction that first reads and then writes could find that another program wrote in between.
class Transaction {
 public:
  explicit Transaction(const Database& db) : db_(db) { db.run("BEGIN IMMEDIATE"); }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  ~Transaction() {
    const bool open = sqlite3_get_autocommit(db_.get()) == 0;  // some errors have ended it already
    if (open) sqlite3_exec(db_.get(), "ROLLBACK", nullptr, nullptr, nullptr);
  }
  void commit() { db_.run("COMMIT"); }

 private:
  const Database& db_;
};

// Whether the file is new, or else has votes of this version. One statement reads all, so that it
// sees another process's new file whole or not at all.
bool is_new(const Database& db) {
  Statement row(db,
                "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema) "
                "FROM pragma_user_version, pragma_application_id");
  row.next();
  const int64_t version = row.integer(0), application = row.integer(1), tables = row.integer(2);
  if (version == 0 && application == 0 && tables == 0) return true;
  if (application != kApplication) {
    fail(db.path(), ": found a SQLite file of another program, expected a file of votes");
  }
  if (version != kVersion) {
    fail(db.path(), ": user_version: found ", version, ", expected ", kVersion,
         version > kVersion ? ": a newer ./serve wrote this file" : "");
  }
  return false;
}

void prepare_to_write(const Database& db) {
  if (sqlite3_db_readonly(db.get(), "main") == 1) {
    fail(db.path(), ": cannot write: the file is read-only");
  }
  const bool empty = is_new(db);  // an Error for a file of another program, before it is changed
  Statement mode(db, "PRAGMA journal_mode = DELETE");
  if (!mode.next() || mode.text(0) != "delete") {
    fail(db.path(), ": journal_mode: found ", mode.text(0), ", expected delete");
  }
  mode.run();
  // FULL, and the directory is synced when the journal has been removed: otherwise the journal
  // could be there again after a power cut, and the vote be taken back.
  db.run("PRAGMA synchronous = EXTRA");
  if (!empty) return;
  Transaction transaction(db);
  if (is_new(db)) {  // no other process was faster
    db.run(kTables);
    db.run(concat("PRAGMA user_version = ", kVersion).c_str());
    db.run(concat("PRAGMA application_id = ", kApplication).c_str());
  }
  transaction.commit();
}

std::string compact(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

std::string in_quotes(std::string_view text) {
  std::string json;
  append_json_string(json, text);
  return json;
}

// The text with U+FFFD for what is not UTF-8.
std::string valid_text(const std::string& text) {
  return Json::parse(in_quotes(text)).get<std::string>();
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Votes

struct Votes::State {
  State(const std::string& path, bool create) : db(path, create) {}
  Database db;
  std::mutex mutex;  // one thread at a time uses the database
};

Votes::Votes(const std::string& path, Access access)
    : state_(std::make_unique<State>(path, access == Access::write)) {
  const Database& db = state_->db;
  db.run("PRAGMA trusted_schema = OFF");  // the file may come from anywhere
  if (access == Access::write) {
    prepare_to_write(db);
  } else {
    if (is_new(db)) fail(path, ": found an empty SQLite file, expected a file of votes");
    db.run("PRAGMA query_only = ON");
  }
}
Votes::~Votes() = default;

void Votes::add(const Vote& vote) {
  if (vote.answers.size() < 2) {
    fail("a vote: answers: found ", vote.answers.size(), ", expected at least 2");
  }
  const std::lock_guard lock(state_->mutex);
  const Database& db = state_->db;
  Transaction transaction(db);
  if (Statement(db, "SELECT 1 FROM votes WHERE battle = ?", vote.battle).next()) {
    fail("battle ", vote.battle, ": found a vote already");
  }
  const std::string prompt = compact(vote.prompt), sampling = compact(vote.sampling);
  Statement(db,
            "INSERT INTO votes (battle, time, mode, voter, prompt, sampling, anonymous, leaked, "
            "same, seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            vote.battle, vote.time, vote.mode, vote.voter, prompt, sampling, vote.anonymous,
            vote.leaked, vote.same, vote.seconds)
      .run();
  const int64_t number = sqlite3_last_insert_rowid(db.get());
  int place = 0;
  for (const VotedAnswer& a : vote.answers) {
    const std::string text = valid_text(a.text);
    Statement(db, "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", number, place++,
              a.model, a.weights, text, a.tokens, a.finish, a.seed, a.stream, a.rank, a.good)
        .run();
  }
  if (vote.undone) {
    Statement(db, "INSERT INTO undone VALUES (?, ?)", number, vote.time).run();
  }
  transaction.commit();
}

bool Votes::undo(const std::string& battle) {
  const std::lock_guard lock(state_->mutex);
  const Database& db = state_->db;
  Transaction transaction(db);
  Statement(db,
            "INSERT INTO undone SELECT number, strftime('%Y-%m-%dT%H:%M:%SZ') FROM votes "
            "WHERE battle = ? AND number NOT IN (SELECT vote FROM undone)",
            battle)
      .run();
  const bool found = sqlite3_changes(db.get()) > 0;
  transaction.commit();
  return found;
}

int64_t Votes::count() const {
  const std::lock_guard lock(state_->mutex);
  return integer_of(state_->db, "SELECT (SELECT count(*) FROM votes) - count(*) FROM undone");
}

int64_t Votes::count_of(const std::string& voter) const {
  const std::lock_guard lock(state_->mutex);
  Statement statement(state_->db,
                      "SELECT count(*) FROM votes WHERE voter = ? AND NOT same AND number NOT IN "
                      "(SELECT vote FROM undone)",
                      voter);
  statement.next();
  return statement.integer(0);
}

namespace {

std::vector<VotedAnswer> read_answers(const Database& db, int64_t vote) {
  Statement row(db,
                "SELECT model, weights, text, tokens, finish, seed, stream, rank, good "
                "FROM answers WHERE vote = ? ORDER BY place",
                vote);
  std::vector<VotedAnswer> answers;
  while (row.next()) {
    answers.push_back({.model = row.text(0),
                       .weights = row.text(1),
                       .text = row.text(2),
                       .tokens = int(row.integer(3)),
                       .finish = row.text(4),
                       .seed = uint64_t(row.integer(5)),
                       .stream = uint64_t(row.integer(6)),
                       .rank = int(row.integer(7)),
                       .good = row.integer(8) != 0});
  }
  return answers;
}

// The next votes behind that of this number, which becomes the last one's.
std::vector<Vote> read_votes(const Database& db, int64_t& number) {
  Statement row(db,
                "SELECT number, battle, votes.time, mode, voter, prompt, sampling, anonymous, "
                "leaked, same, seconds, undone.vote IS NOT NULL FROM votes "
                "LEFT JOIN undone ON undone.vote = number "
                "WHERE number > ? ORDER BY number LIMIT ?",
                number, kVotesAtOnce);
  std::vector<Vote> votes;
  while (row.next()) {
    number = row.integer(0);
    const auto json = [&](int column, const char* name) {
      return parse_json<OrderedJson>(row.text(column),
                                     concat(db.path(), ": vote ", number, ": ", name));
    };
    votes.push_back({.battle = row.text(1),
                     .time = row.text(2),
                     .mode = row.text(3),
                     .voter = row.text(4),
                     .prompt = json(5, "prompt"),
                     .sampling = json(6, "sampling"),
                     .answers = read_answers(db, number),
                     .anonymous = row.integer(7) != 0,
                     .leaked = row.integer(8) != 0,
                     .same = row.integer(9) != 0,
                     .undone = row.integer(11) != 0,
                     .seconds = row.real(10)});
  }
  return votes;
}

}  // namespace

void Votes::for_each(const std::function<void(const Vote&)>& visit) const {
  for (int64_t number = 0;;) {
    std::vector<Vote> votes;
    {
      const std::lock_guard lock(state_->mutex);
      votes = read_votes(state_->db, number);
    }
    for (const Vote& vote : votes) visit(vote);
    if (votes.size() < kVotesAtOnce) return;
  }
}

OrderedJson vote_json(const Vote& vote) {
  OrderedJson answers = OrderedJson::array();
  for (const VotedAnswer& a : vote.answers) {
    answers.push_back({{"model", a.model},
                       {"weights", a.weights},
                       {"text", a.text},
                       {"tokens", a.tokens},
                       {"finish", a.finish},
                       {"seed", a.seed},
                       {"stream", a.stream},
                       {"rank", a.rank},
                       {"good", a.good}});
  }
  return {{"version", kVersion},       {"battle", vote.battle}, {"time", vote.time},
          {"mode", vote.mode},         {"voter", vote.voter},   {"prompt", vote.prompt},
          {"sampling", vote.sampling}, {"answers", answers},    {"anonymous", vote.anonymous},
          {"leaked", vote.leaked},     {"same", vote.same},     {"undone", vote.undone},
          {"seconds", vote.seconds}};
}

void backup_votes(const std::string& path, const std::string& copy) {
  const Votes votes(path, Votes::Access::read);  // an Error for a file of another program
  const Database source(path, false);
  const std::string partial = copy + ".partial";
  remove_path(partial);
  // One transaction reads the whole file. The copy has no unused pages.
  Statement(source, "VACUUM INTO ?", std::filesystem::absolute(partial).string()).run();
  sync_path(partial);
  rename_path(partial, copy);
  sync_path(std::filesystem::absolute(copy).parent_path());
}

// ---------------------------------------------------------------------------------------------
// Export

namespace {

// Votes on the same prompt and answers. Texts are JSON strings, in quotes.
struct Ballot {
  std::string prompt;                     // JSON
  std::map<std::string, int64_t> scores;  // of each text
  int64_t votes = 0;
};

// What training reads of a vote: the prompt, and the answers that count.
struct Candidate {
  std::string prompt;  // JSON
  struct Answer {
    std::string text;  // as JSON
    int rank;
  };
  std::vector<Answer> answers;
  int empty = 0, cut = 0;  // that do not count
};

Candidate read_candidate(const Vote& vote, const VoteExportOptions& options) {
  Candidate candidate;
  OrderedJson prompt = vote.prompt;
  // The answers went on with a message of the assistant: the turn is that and the answer. White
  // space at its end was not shown to the model.
  std::string begun;
  if (!prompt.empty() && prompt.is_array() && prompt.back().is_object() &&
      prompt.back().value("role", OrderedJson()) == "assistant" &&
      prompt.back().value("content", OrderedJson()).is_string()) {
    const std::string content = prompt.back().at("content");
    if (const std::string_view text = strip(content); !text.empty()) {
      begun = content.substr(0, size_t(text.data() + text.size() - content.data()));
    }
    prompt.erase(prompt.size() - 1);
  }
  candidate.prompt = compact(prompt);
  for (const VotedAnswer& a : vote.answers) {
    // Templates write an answer without white space at its ends.
    const std::string whole = begun + a.text;
    if (strip(a.text).empty()) {
      candidate.empty++;
    } else if (a.finish != "stop" && !options.keep_cut) {
      candidate.cut++;
    } else {
      candidate.answers.push_back({in_quotes(strip(whole)), a.rank});
    }
  }
  return candidate;
}

// Adds a vote to the ballot of its prompt and answers, or counts why it is left out.
void add_vote(const Vote& vote, const VoteExportOptions& options,
              std::map<std::string, Ballot>& ballots, VoteExport& counts) {
  if (vote.undone) return void(counts.undone++);
  if (vote.same) return void(counts.same++);
  const Candidate candidate = read_candidate(vote, options);
  if (candidate.answers.size() < 2) {
    return void(candidate.empty > 0 ? counts.empty++ : counts.cut++);
  }
  struct Place {
    int64_t ranks = 0, answers = 0;  // the mean rank of equal answers is ranks / answers
  };
  std::map<std::string, Place> places;
  for (const auto& a : candidate.answers) {
    places[a.text].ranks += a.rank;
    places[a.text].answers++;
  }
  if (places.size() < 2) return void(counts.same++);
  counts.dropped_answers += candidate.empty + candidate.cut;
  std::string key = candidate.prompt;
  for (const auto& [text, place] : places) key += "\n" + text;
  Ballot& ballot = ballots[key];
  ballot.prompt = candidate.prompt;
  ballot.votes++;
  for (const auto& [text, a] : places) {
    int64_t& score = ballot.scores[text];
    for (const auto& [other, b] : places) {
      const int64_t own = a.ranks * b.answers, others = b.ranks * a.answers;
      score += (own < others) - (own > others);
    }
  }
}

std::string assistant_turn(const std::string& text) {
  return concat(R"([{"role":"assistant","content":)", text, "}]");
}

// The record as a line, without its end; "": a tie.
std::string record_line(const Ballot& ballot, uint64_t seed) {
  struct Answer {
    uint64_t order;
    std::string text;
    int64_t score;
  };
  std::vector<Answer> answers;
  for (const auto& [text, score] : ballot.scores) {
    answers.push_back({mix64(seed, hash64(text)), text, score});
  }
  // By chance: where an answer stood on the screen must not matter.
  std::sort(answers.begin(), answers.end(), [](const Answer& a, const Answer& b) {
    return std::tie(a.order, a.text) < std::tie(b.order, b.text);
  });
  const auto worse = [](const Answer& a, const Answer& b) { return a.score < b.score; };
  const auto [worst, best] = std::minmax_element(answers.begin(), answers.end(), worse);
  if (worst->score == best->score) return "";
  std::string line = R"({"prompt":)" + ballot.prompt;
  if (answers.size() == 2) {
    return line + R"(,"chosen":)" + assistant_turn(best->text) + R"(,"rejected":)" +
           assistant_turn(worst->text) + "}";
  }
  std::string responses, ranking;
  for (const Answer& a : answers) {
    const auto better =
        std::count_if(answers.begin(), answers.end(), [&](const Answer& b) { return worse(a, b); });
    responses += (responses.empty() ? "" : ",") + assistant_turn(a.text);
    ranking += concat(ranking.empty() ? "" : ",", 1 + better);
  }
  return concat(line, R"(,"responses":[)", responses, R"(],"ranking":[)", ranking, "]}");
}

// Why ./reward would not learn from the record; "": it does. Its own reader says so.
std::string refusal(const std::string& line) {
  try {
    simdjson::dom::parser parser;
    simdjson::dom::object object;
    const simdjson::padded_string padded(line);
    if (const auto error = parser.parse(padded).get(object)) {
      return simdjson::error_message(error);
    }
    const Preference preference = parse_preference({object, "vote"});
    return preference.left_out ? preference.left_out : "";
  } catch (const Error& e) {
    return e.what();
  }
}

VoteExport write_raw(const Votes& votes, std::ostream& out) {
  VoteExport counts;
  votes.for_each([&](const Vote& vote) {
    out << json_line(vote_json(vote));
    counts.votes++, counts.records++;
  });
  return counts;
}

}  // namespace

VoteExport export_votes(const Votes& votes, std::ostream& out, const VoteExportOptions& options) {
  if (options.raw) return write_raw(votes, out);
  VoteExport counts;
  std::map<std::string, Ballot> ballots;  // by prompt and answers
  votes.for_each([&](const Vote& vote) {
    counts.votes++;
    add_vote(vote, options, ballots, counts);
  });
  std::map<std::pair<uint64_t, std::string>, int64_t> lines;  // in a random order; votes of each
  for (const auto& [key, ballot] : ballots) {
    const std::string line = record_line(ballot, options.seed);
    if (line.empty()) {
      counts.ties += ballot.votes;
    } else if (const std::string why = refusal(line); !why.empty()) {
      counts.refused += ballot.votes;
      if (counts.reason.empty()) counts.reason = why;
    } else {
      lines[{mix64(options.seed, hash64(key)), line}] = ballot.votes;
    }
  }
  for (const auto& [line, number] : lines) {
    out << line.second << '\n';
    counts.records++;
    counts.merged += number - 1;
  }
  return counts;
}

// ---------------------------------------------------------------------------------------------
// The command

namespace {

// An output that is the file of votes, or any SQLite file, is a mistake: votes would be lost.
void refuse_output(const std::string& path, const ExportVotesOptions& o, bool is_backup) {
  std::error_code ec;
  if (path.empty()) return;
  if (std::filesystem::equivalent(path, o.votes, ec)) {
    fail(path, ": found the file of votes, expected another file to write");
  }
  if (is_backup || !std::filesystem::is_regular_file(path, ec)) return;
  std::string head(15, '\0');
  std::ifstream(path, std::ios::binary).read(head.data(), std::streamsize(head.size()));
  if (head == "SQLite format 3") {
    fail(path, ": found a SQLite file, expected another file to write records to");
  }
}

std::string summary(const VoteExport& counts, const VoteExportOptions& options) {
  std::string text =
      concat(counts.records, options.raw ? " lines of " : " records of ", counts.votes, " votes");
  std::string left_out;
  const auto add = [&](int64_t n, const std::string& what) {
    if (n > 0) left_out += concat(left_out.empty() ? "; not written: " : ", ", n, " ", what);
  };
  add(counts.undone, "taken back");
  add(counts.same, "with equal answers");
  add(counts.empty, "with an empty answer");
  add(counts.cut, "with an answer that was cut off (--cut keeps them)");
  add(counts.ties, "tied");
  add(counts.refused, concat("that training cannot read (", counts.reason, ")"));
  if (counts.merged > 0) {
    left_out += concat("; merged: ", counts.merged, " on the prompt and answers of another");
  }
  if (counts.dropped_answers > 0) {
    left_out +=
        concat("; rankings without ", counts.dropped_answers, " answers that are empty or cut off");
  }
  return text + left_out;
}

}  // namespace

int export_votes_command(const ExportVotesOptions& o) {
  refuse_output(o.output, o, false);
  refuse_output(o.backup, o, true);
  const auto whole = [](const std::string& path) {
    return std::filesystem::absolute(path).lexically_normal();
  };
  if (!o.output.empty() && !o.backup.empty() && whole(o.output) == whole(o.backup)) {
    fail("--backup: found ", o.backup, ", the file of --output too, expected another one");
  }
  if (!o.backup.empty()) {
    backup_votes(o.votes, o.backup);
    std::fprintf(stderr, "%s: a copy of %s\n", o.backup.c_str(), o.votes.c_str());
  }
  if (o.output.empty() && !o.backup.empty()) return 0;
  const Votes votes(o.votes, Votes::Access::read);
  std::ostringstream lines;
  const VoteExport counts = export_votes(votes, lines, o.records);
  if (o.output.empty()) {
    write_bytes(stdout, lines.view().data(), lines.view().size(), "standard output");
    if (std::fflush(stdout) != 0) fail("standard output: cannot write: ", errno_text());
  } else {
    write_file(o.output, lines.view());
  }
  std::fprintf(stderr, "%s%s%s\n", o.output.c_str(), o.output.empty() ? "" : ": ",
               summary(counts, o.records).c_str());
  return 0;
}

}  // namespace cake
