// Votes on the disk: what a crash, a full disk, a second process and odd texts do to them, and what
// ./reward reads of them.
#include "cake/votes.h"

#include <sqlite3.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cake/preferences.h"
#include "test/serve_support.h"

using namespace cake;

namespace {

using Access = Votes::Access;

OrderedJson asked(const std::string& text) { return {{{"role", "user"}, {"content", text}}}; }

// A vote on these answers, with the rank of each.
Vote vote_on(const std::string& battle, const std::string& prompt,
             const std::vector<std::pair<std::string, int>>& answers) {
  Vote vote{.battle = battle,
            .time = "2026-11-26T10:00:00Z",
            .mode = answers.size() == 2 ? "compare" : "collect",
            .voter = "v1",
            .prompt = asked(prompt),
            .sampling = {{"temperature", 1}}};
  int place = 0;
  for (const auto& [text, rank] : answers) {
    vote.answers.push_back({.model = concat("m", place),
                            .weights = concat("fp_", place),
                            .text = text,
                            .tokens = int(text.size()),
                            .finish = "stop",
                            .seed = ~uint64_t(place),
                            .stream = uint64_t(place),
                            .rank = rank,
                            .good = rank == 1});
    place++;
  }
  return vote;
}
Vote vote_on(const std::string& battle) { return vote_on(battle, "hi", {{"a", 1}, {"b", 2}}); }

std::vector<Vote> all_of(const Votes& votes) {
  std::vector<Vote> list;
  votes.for_each([&](const Vote& vote) { list.push_back(vote); });
  return list;
}
std::vector<Vote> all_of(const std::string& path) { return all_of(Votes(path, Access::read)); }

std::string battles_of(const std::string& path) {
  std::string names;
  for (const Vote& vote : all_of(path)) names += (names.empty() ? "" : " ") + vote.battle;
  return names;
}

// Runs SQL of the test's own on the file: the first column of the last row.
std::string sql(const std::string& path, const std::string& text) {
  sqlite3* db = nullptr;
  REQUIRE(sqlite3_open(path.c_str(), &db) == SQLITE_OK);
  std::string value;
  char* error = nullptr;
  sqlite3_exec(
      db, text.c_str(),
      [](void* out, int, char** columns, char**) {
        *static_cast<std::string*>(out) = columns[0] ? columns[0] : "NULL";
        return 0;
      },
      &value, &error);
  const std::string what = error ? error : "";
  sqlite3_free(error);
  sqlite3_close(db);
  REQUIRE_MESSAGE(what.empty(), what);
  return value;
}

void check_whole(const std::string& path) {
  CHECK(sql(path, "PRAGMA integrity_check") == "ok");
  CHECK(sql(path, "PRAGMA foreign_key_check") == "");
  CHECK(sql(path,
            "SELECT count(*) FROM votes WHERE (SELECT count(*) FROM answers WHERE "
            "vote = number) <> 2") == "0");
}

// Runs `body` in a process of its own; its status as waitpid has it. 0: no error.
template <class Body>
int in_child(Body&& body) {
  const pid_t child = fork();
  if (child == 0) {
    int status = 1;
    try {
      body();
      status = 0;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "child: %s\n", e.what());
    }
    _exit(status);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  return status;
}

// ---------------------------------------------------------------------------------------------
// SQLite lets a program replace the system calls that it makes. These do what the real ones do, up
// to a change of a file that is counted; then the process dies, or the disk is full.

enum class Fault { none, kill, kill_half_way, full };
Fault fault = Fault::none;
int changes_left = 0;  // before the fault

// Whether this change is the one with the fault. A disk that is full stays so.
bool is_due() {
  if (fault == Fault::none) return false;
  if (changes_left > 0) return changes_left--, false;
  return true;
}

template <class Write>
ssize_t faulty_write(size_t bytes, Write&& write) {
  if (!is_due()) return write(bytes);
  if (fault == Fault::full) return errno = ENOSPC, -1;
  if (fault == Fault::kill_half_way) write(bytes / 2);
  raise(SIGKILL);
  return -1;
}
ssize_t faulty_pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  return faulty_write(bytes, [&](size_t n) { return pwrite(fd, data, n, offset); });
}
ssize_t faulty_plain_write(int fd, const void* data, size_t bytes) {
  return faulty_write(bytes, [&](size_t n) { return write(fd, data, n); });
}
int faulty_unlink(const char* path) {
  if (fault != Fault::full && is_due()) raise(SIGKILL);
  return unlink(path);
}
int faulty_ftruncate(int fd, off_t size) {
  if (fault != Fault::full && is_due()) raise(SIGKILL);
  return ftruncate(fd, size);
}

// SQLite's own calls are there again when this ends.
class FaultyDisk {
 public:
  FaultyDisk() {
    replace("write", reinterpret_cast<sqlite3_syscall_ptr>(faulty_plain_write));
    replace("pwrite", reinterpret_cast<sqlite3_syscall_ptr>(faulty_pwrite));
    replace("pwrite64", reinterpret_cast<sqlite3_syscall_ptr>(faulty_pwrite));
    replace("unlink", reinterpret_cast<sqlite3_syscall_ptr>(faulty_unlink));
    replace("ftruncate", reinterpret_cast<sqlite3_syscall_ptr>(faulty_ftruncate));
  }
  FaultyDisk(const FaultyDisk&) = delete;
  FaultyDisk& operator=(const FaultyDisk&) = delete;
  ~FaultyDisk() {
    fault = Fault::none;
    sqlite3_vfs* vfs = sqlite3_vfs_find(nullptr);
    vfs->xSetSystemCall(vfs, nullptr, nullptr);
  }
  void set(Fault what, int changes) { fault = what, changes_left = changes; }

 private:
  static void replace(const char* name, sqlite3_syscall_ptr call) {
    sqlite3_vfs* vfs = sqlite3_vfs_find(nullptr);
    if (vfs->xGetSystemCall(vfs, name)) REQUIRE(vfs->xSetSystemCall(vfs, name, call) == SQLITE_OK);
  }
};

// ---------------------------------------------------------------------------------------------
// Export

struct Exported {
  VoteExport counts;
  std::vector<std::string> lines;
};
Exported exported(const Votes& votes, const VoteExportOptions& options = {}) {
  std::ostringstream out;
  Exported e{export_votes(votes, out, options), {}};
  std::istringstream in(out.str());
  for (std::string line; std::getline(in, line);) e.lines.push_back(line);
  const VoteExport& c = e.counts;
  CHECK(c.records == int64_t(e.lines.size()));
  if (!options.raw) {
    CHECK(c.votes ==
          c.records + c.merged + c.undone + c.same + c.ties + c.empty + c.cut + c.refused);
  }
  return e;
}

std::string content(const OrderedJson& messages) {
  REQUIRE(messages.size() == 1);
  REQUIRE(messages[0].at("role") == "assistant");
  return messages[0].at("content");
}

// "prompt: best > worst" or "prompt: best=1 other=2 ...", the texts in order.
std::string brief(const std::string& line) {
  const auto json = parse_json<OrderedJson>(line, "a record");
  std::string text = json.at("prompt").back().at("content").get<std::string>() + ":";
  if (json.contains("chosen")) {
    CHECK(json.size() == 3);
    return concat(text, " ", content(json.at("chosen")), " > ", content(json.at("rejected")));
  }
  CHECK(json.size() == 3);
  std::map<std::string, int> ranks;
  for (size_t i = 0; i < json.at("responses").size(); i++) {
    ranks[content(json.at("responses")[i])] = json.at("ranking")[i];
  }
  CHECK(ranks.size() == json.at("ranking").size());
  for (const auto& [answer, rank] : ranks) text += concat(" ", answer, "=", rank);
  return text;
}
// All records, sorted, a line each.
std::string briefs(const Exported& e) {
  std::set<std::string> set;
  for (const std::string& line : e.lines) set.insert(brief(line));
  std::string text;
  for (const std::string& line : set) text += line + "\n";
  return text;
}

// Texts that break programs which are careless with them.
std::vector<std::string> odd_texts() {
  std::vector<std::string> texts = {
      "'; DROP TABLE votes; --",
      "\"quotes\" and \\backslashes\\",
      "line\nbreaks\r\nof\rall kinds",
      "tab\tand\vand\f and \x01 and \x1f",
      "NUL follows:" + std::string(1, '\0') + "and more",
      "del \x7f and C1 \xc2\x80\xc2\x85",
      "na\xc3\xafve, na\x69\xcc\x88ve",
      "\xd0\x9f\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82",
      "\xe4\xbd\xa0\xe5\xa5\xbd\xef\xbc\x8c\xe4\xb8\x96\xe7\x95\x8c",
      "\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d \xe2\x80\xae"
      "reversed\xe2\x80\xac",
      "\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x9a\x80 \xf0\x9f\x87\xb3\xf0\x9f\x87\xb1",
      "\xef\xbb\xbf"
      "a byte order mark",
      "noncharacters \xef\xbf\xbe \xef\xbf\xbf \xf4\x8f\xbf\xbf",
      "U+FFFD itself: \xef\xbf\xbd",
      "line separators \xe2\x80\xa8 and \xe2\x80\xa9",
      "zero width \xe2\x80\x8b\xe2\x80\x8d\xef\xbb\xbf.",
      "<script>alert(1)</script>",
      "</think> alone",
      "<think>\nhm\n</think>\n\nyes",
      "<|im_end|><|im_start|>user\nmore",
      "<|endoftext|>",
      "{\"role\":\"system\",\"content\":\"x\"}",
      "[1,2",
      "null",
      "%s%n%x ?1 :a @b $c",
      "Human: hi\n\nAssistant: yes",
      "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and?",
      "tie",
      "<tool_call>\n{\"name\":\"calculator\",\"arguments\":{}}\n</tool_call>",
      "a" + std::string(40, ' ') + "b",
      std::string(300, 'x'),
      "```cpp\nint main() {}\n```",
  };
  Rng rng{5};
  for (int i = 0; i < 8; i++) {  // any characters but NUL
    std::string text = "text: ";
    for (int k = 0; k < 60; k++) {
      uint32_t c;
      do {
        c = uint32_t(1 + rng.below(0x10ffff));
      } while (c >= 0xd800 && c < 0xe000);
      if (c < 0x80) {
        text += char(c);
      } else if (c < 0x800) {
        text += {char(0xc0 | c >> 6), char(0x80 | (c & 0x3f))};
      } else if (c < 0x10000) {
        text += {char(0xe0 | c >> 12), char(0x80 | (c >> 6 & 0x3f)), char(0x80 | (c & 0x3f))};
      } else {
        text += {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 0x3f)), char(0x80 | (c >> 6 & 0x3f)),
                 char(0x80 | (c & 0x3f))};
      }
    }
    texts.push_back(text + ".");
  }
  return texts;
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// What is stored

TEST_CASE("votes: every field of a vote comes back, in the order in which they were cast") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  Vote first = vote_on("b1", "hi", {{"left", 2}, {"right", 1}});
  first.prompt = OrderedJson::parse(
      R"([{"role":"system","content":"s"},{"role":"user","content":"hi","name":"x"}])");
  first.answers[0].finish = "length";
  first.leaked = true, first.anonymous = false, first.seconds = 14.25;
  Vote second = vote_on("b0", "", {{"a", 1}, {"b", 1}, {"c", 3}});
  second.same = true, second.voter = "v2";
  {
    Votes votes(path);
    votes.add(first);
    votes.add(second);
    CHECK(votes.count() == 2);
    CHECK(votes.count_of("v1") == 1);
    CHECK(votes.count_of("v2") == 0);  // nobody saw equal answers
    CHECK(votes.count_of("v3") == 0);
  }
  const auto list = all_of(path);
  REQUIRE(list.size() == 2);
  CHECK(vote_json(list[0]) == vote_json(first));
  CHECK(vote_json(list[1]) == vote_json(second));
  CHECK(vote_json(list[0]).dump() ==
        R"({"version":1,"battle":"b1","time":"2026-11-26T10:00:00Z","mode":"compare",)"
        R"("voter":"v1","prompt":[{"role":"system","content":"s"},)"
        R"({"role":"user","content":"hi","name":"x"}],"sampling":{"temperature":1},"answers":[)"
        R"({"model":"m0","weights":"fp_0","text":"left","tokens":4,"finish":"length",)"
        R"("seed":18446744073709551615,"stream":0,"rank":2,"good":false},)"
        R"({"model":"m1","weights":"fp_1","text":"right","tokens":5,"finish":"stop",)"
        R"("seed":18446744073709551614,"stream":1,"rank":1,"good":true}],)"
        R"("anonymous":false,"leaked":true,"same":false,"undone":false,"seconds":14.25})");
  // One file, whole, that any program can read.
  CHECK(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
}

TEST_CASE("votes: a vote is taken back once, and stays in the file") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  Votes votes(path);
  votes.add(vote_on("b1"));
  votes.add(vote_on("b2"));
  CHECK(votes.undo("b1"));
  CHECK(!votes.undo("b1"));
  CHECK(!votes.undo("b3"));
  CHECK(votes.count() == 1);
  CHECK(votes.count_of("v1") == 1);
  const auto list = all_of(votes);
  REQUIRE(list.size() == 2);
  CHECK((list[0].undone && !list[1].undone));
  CHECK(sql(path, "SELECT time LIKE '20__-__-__T__:__:__Z' FROM undone") == "1");
}

TEST_CASE("votes: a battle has one vote, and a vote two answers") {
  const TempDir dir;
  Votes votes(dir / "votes.db");
  votes.add(vote_on("b1"));
  CHECK(error_of([&] {
          votes.add(vote_on("b1", "other", {{"c", 1}, {"d", 1}}));
        }) == "battle b1: found a vote already");
  CHECK(error_of([&] {
          votes.add(vote_on("b2", "hi", {{"a", 1}}));
        }) == "a vote: answers: found 1, expected at least 2");
  CHECK(contains(error_of([&] { votes.add(vote_on("b2", "hi", {{"a", 0}, {"b", 1}})); }), "rank"));
  REQUIRE(votes.count() == 1);
  CHECK(all_of(votes)[0].answers[0].text == "a");
  votes.add(vote_on("b2"));  // what was refused left nothing open
  CHECK(votes.count() == 2);
}

TEST_CASE("votes: any text comes back as it was, and what is not UTF-8 as U+FFFD") {
  const TempDir dir;
  Votes votes(dir / "votes.db");
  auto texts = odd_texts();
  CHECK(texts.size() >= 30);
  texts.push_back(std::string(1'000'000, 'y'));
  for (size_t i = 0; i < texts.size(); i++) {
    Vote vote =
        vote_on(concat("b'\"?", i), texts[i], {{texts[i], 1}, {texts[(i + 1) % texts.size()], 2}});
    vote.voter = texts[i];
    votes.add(vote);
  }
  const auto list = all_of(votes);
  REQUIRE(list.size() == texts.size());
  for (size_t i = 0; i < texts.size(); i++) {
    CAPTURE(i);
    CHECK(list[i].prompt == asked(texts[i]));
    CHECK(list[i].answers[0].text == texts[i]);
    CHECK(list[i].answers[1].text == texts[(i + 1) % texts.size()]);
    CHECK(list[i].voter == texts[i]);
    CHECK(votes.count_of(texts[i]) == 1);
    CHECK(parse_json<OrderedJson>(json_line(vote_json(list[i])), "a line") == vote_json(list[i]));
  }
  votes.add(vote_on("bad", "\xff", {{"a\x80\xf0\x9f", 1}, {"", 2}}));
  const Vote bad = all_of(votes).back();
  CHECK(bad.answers[0].text == "a\xef\xbf\xbd\xef\xbf\xbd");
  CHECK(bad.answers[1].text == "");
  CHECK(bad.prompt == asked("\xef\xbf\xbd"));
}

TEST_CASE("votes: names that mean something to SQLite are names of files") {
  const TempDir dir;
  const auto here = std::filesystem::current_path();
  std::filesystem::current_path(dir.path());
  for (const std::string name : {":memory:", "file:x?mode=memory", "a ?#%20.db", "-o"}) {
    CAPTURE(name);
    Votes(name).add(vote_on("b1"));
    CHECK(std::filesystem::is_regular_file(dir / name));
    CHECK(battles_of(name) == "b1");
  }
  std::filesystem::current_path(here);
}

TEST_CASE("votes: more votes than are read at once, and others that come meanwhile") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  Votes votes(path);
  votes.add(vote_on("b1"));
  sql(path,
      "WITH RECURSIVE n(i) AS (VALUES(2) UNION ALL SELECT i + 1 FROM n WHERE i < 600) "
      "INSERT INTO votes SELECT i, 'b' || i, time, mode, voter, prompt, sampling, anonymous, "
      "leaked, same, seconds FROM votes, n WHERE number = 1");
  sql(path,
      "INSERT INTO answers SELECT number, place, model, weights, text, tokens, finish, seed, "
      "stream, rank, good FROM votes, answers WHERE vote = 1 AND number > 1");
  int64_t seen = 0;
  Votes other(path);
  votes.for_each([&](const Vote& vote) {
    seen++;
    CHECK(vote.battle == concat("b", seen));
    CHECK(vote.answers.size() == 2);
    // No lock is held here: this process and another may add.
    if (seen == 10) votes.add(vote_on("b601"));
    if (seen == 300) other.add(vote_on("b602"));
  });
  CHECK(seen == 602);
  CHECK(votes.count() == 602);
}

// -------------------------------------------------------------------------------------------------
// Files that are something else

TEST_CASE("votes: a file that has no votes is refused by what it is, and stays as it is") {
  const TempDir dir;
  const std::string d = dir.path().string() + "/", path = d + "votes.db";
  const auto both = [&](const std::string& file, const std::string& expected) {
    CAPTURE(file);
    for (const Access access : {Access::write, Access::read}) {
      CHECK(error_of([&] { Votes(file, access); }) == file + ": " + expected);
    }
  };
  const auto unchanged = [&](const std::string& file, const std::string& expected) {
    const std::string before = read_file(file);
    both(file, expected);
    CHECK(read_file(file) == before);
  };
  write_file(d + "text", std::string(5000, 'x'));
  unchanged(d + "text", "found no SQLite file, expected a file of votes");
  write_file(d + "short", "{}\n");
  unchanged(d + "short", "found no SQLite file, expected a file of votes");
  both(d.substr(0, d.size() - 1), "found a directory, expected a file of votes");
  both(d + "none/votes.db", "cannot open: No such file or directory");
  for (const char* more : {"", "PRAGMA journal_mode = WAL;", "PRAGMA user_version = 1;"}) {
    remove_path(d + "other.db");
    sql(d + "other.db", concat(more, "CREATE TABLE votes (x)"));
    unchanged(d + "other.db", "found a SQLite file of another program, expected a file of votes");
  }
  CHECK(error_of([&] { Votes(d + "none.db", Access::read); }) ==
        d + "none.db: cannot open: No such file or directory");
  CHECK(!std::filesystem::exists(d + "none.db"));
  CHECK(error_of([&] { Votes("", Access::write); }) == "the file of votes: found an empty name");

  Votes(path).add(vote_on("b1"));
  std::filesystem::copy_file(path, d + "newer.db");
  sql(d + "newer.db", "PRAGMA user_version = 2");
  unchanged(d + "newer.db", "user_version: found 2, expected 1: a newer ./serve wrote this file");
  sql(d + "newer.db", "PRAGMA user_version = 0");
  unchanged(d + "newer.db", "user_version: found 0, expected 1");

  // An empty file: a new one to write, and none to read.
  write_file(d + "empty.db", "");
  CHECK(error_of([&] { Votes(d + "empty.db", Access::read); }) ==
        d + "empty.db: found an empty SQLite file, expected a file of votes");
  Votes(d + "empty.db").add(vote_on("b1"));
  CHECK(battles_of(d + "empty.db") == "b1");
}

TEST_CASE("votes: a damaged file is an error that says so") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  {
    Votes votes(path);
    for (int i = 0; i < 3; i++) {
      votes.add(vote_on(concat("b", i), "hi", {{std::string(9000, 'a'), 1}, {"b", 2}}));
    }
  }
  const std::string whole = read_file(path);
  int refused = 0;
  for (size_t page = 0; page < whole.size() / 4096; page++) {
    CAPTURE(page);
    std::string bytes = whole;
    bytes.replace(page * 4096, 4096, 4096, '\xa5');
    write_file(path, bytes);
    const std::string error = error_of([&] { all_of(path); });
    if (error == "no error") continue;  // a page of an index, or the inside of a text
    refused++;
    CHECK_MESSAGE((error.starts_with(path) && !contains(error, "\n")), error);
  }
  CHECK(refused > 1);
  write_file(path, whole.substr(0, 4096));
  CHECK(contains(error_of([&] { all_of(path); }), "the file is damaged"));
  write_file(path, whole);
  sql(path, "UPDATE votes SET prompt = '[' WHERE number = 2");
  CHECK(contains(error_of([&] { all_of(path); }), "vote 2: prompt: not JSON"));
}

TEST_CASE("votes: a file that was removed or replaced takes no vote") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  Votes votes(path);
  votes.add(vote_on("b1"));
  const std::string bytes = read_file(path);
  remove_path(path);
  const std::string expected =
      path + ": cannot write: the file was removed or replaced since it was opened";
  CHECK(error_of([&] { votes.add(vote_on("b2")); }) == expected);
  CHECK(error_of([&] { votes.undo("b1"); }) == expected);
  write_file(path, bytes);
  CHECK(error_of([&] { votes.add(vote_on("b2")); }) == expected);
  CHECK(battles_of(path) == "b1");
}

// -------------------------------------------------------------------------------------------------
// Crashes

TEST_CASE("votes: a process that is killed at any change of the disk leaves a whole file") {
  const TempDir dir;
  const std::string begun = dir / "begun.db", path = dir / "votes.db";
  Votes(begun).add(vote_on("b1"));
  for (const bool is_new : {true, false}) {
    for (const Fault what : {Fault::kill, Fault::kill_half_way}) {
      for (int change = 0;; change++) {
        CAPTURE(is_new);
        CAPTURE(change);
        for (const std::string suffix : {"", "-journal"}) remove_path(path + suffix);
        if (!is_new) std::filesystem::copy_file(begun, path);
        const int status = in_child([&] {
          FaultyDisk disk;
          disk.set(what, change);
          Votes(path).add(vote_on("b2", "hi", {{std::string(6000, 'a'), 1}, {"b", 2}}));
        });
        if (status == 0) {
          CHECK(change > 5);
          CHECK(battles_of(path) == (is_new ? "b2" : "b1 b2"));
          break;
        }
        REQUIRE((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
        // Who reads first restores what was before.
        if (!is_new) {
          const std::string found = battles_of(path);
          CHECK((found == "b1" || found == "b1 b2"));
        }
        Votes(path).add(vote_on("b3"));
        const std::string found = battles_of(path), old = is_new ? "" : "b1 ";
        CHECK((found == old + "b3" || found == old + "b2 b3"));
        check_whole(path);
      }
    }
  }
}

TEST_CASE("votes: an acknowledged vote survives kill -9") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  std::set<std::string> acknowledged;
  int number = 0;
  for (int round = 0; round < 10; round++) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    const pid_t child = fork();
    if (child == 0) {
      close(ends[0]);
      try {
        Votes votes(path);
        for (int i = number;; i++) {
          votes.add(vote_on(concat("b", i)));
          if (write(ends[1], &i, sizeof i) != sizeof i) _exit(1);
        }
      } catch (const std::exception& e) {
        std::fprintf(stderr, "child: %s\n", e.what());
      }
      _exit(1);
    }
    close(ends[1]);
    int last = -1;
    for (int i = 0; i < 2 + round; i++) {
      REQUIRE(read(ends[0], &last, sizeof last) == sizeof last);
      acknowledged.insert(concat("b", last));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(700 * round));
    kill(child, SIGKILL);
    while (read(ends[0], &last, sizeof last) == sizeof last) {
      acknowledged.insert(concat("b", last));
    }
    close(ends[0]);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
    std::set<std::string> found;
    for (const Vote& vote : all_of(path)) found.insert(vote.battle);
    for (const std::string& battle : acknowledged) CHECK_MESSAGE(found.count(battle), battle);
    CHECK(found.size() <= acknowledged.size() + size_t(round) + 1);  // stored, and not yet said
    number = int(found.size()) + 1000 * (round + 1);
  }
  check_whole(path);
}

// The calls of a process, as strace tells them, from its line "write(PIPE, "begin"...)".
TEST_CASE("votes: a vote is on the disk before it is acknowledged, by the system calls") {
  const bool wanted = std::getenv("CAKE_TEST_ALL") != nullptr;
  if (!wanted || shell("strace -o /dev/null true").status != 0) {
    skipped_tests().insert(doctest::getContextOptions()->currentTest->m_name);
    MESSAGE("skipped: strace is not there, or CAKE_TEST_ALL is not set");
    return;
  }
  const TempDir dir;
  const std::string path = dir / "votes.db", log = dir / "log";
  int begin[2], end[2];
  REQUIRE(pipe(begin) == 0);
  REQUIRE(pipe(end) == 0);
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    Votes votes(path);
    char go = 0;
    for (int i = 0; read(begin[0], &go, 1) == 1 && go == 'g'; i++) {
      if (write(end[1], "begin", 5) != 5) _exit(1);
      i == 3 ? void(votes.undo("b0")) : votes.add(vote_on(concat("b", i)));
      if (write(end[1], "answer", 6) != 6) _exit(1);
    }
    _exit(0);
  }
  std::thread tracer([&] {
    shell(concat("exec strace -y -e trace=write,pwrite64,fdatasync,fsync,unlink -o ", log, " -p ",
                 child));
  });
  const auto is_traced = [&] {
    return !contains(read_file(concat("/proc/", child, "/status")), "TracerPid:\t0");
  };
  const bool traced = wait_until(is_traced, 10);
  for (int i = 0; i < 4 && traced; i++) {
    char said[11] = {};
    REQUIRE(write(begin[1], "g", 1) == 1);
    for (ssize_t n = 0; n < 11;) n += read(end[0], said + n, size_t(11 - n));
  }
  REQUIRE(write(begin[1], "e", 1) == 1);
  int status = -1;
  waitpid(child, &status, 0);
  tracer.join();
  REQUIRE(traced);
  CHECK(status == 0);
  // One letter for each call: j, d writes to journal and file; J, D, P syncs of these and of the
  // directory; u removes the journal.
  std::string calls;
  std::vector<std::string> votes;
  std::istringstream lines(read_file(log));
  for (std::string line; std::getline(lines, line);) {
    const bool journal = contains(line, path + "-journal"), file = contains(line, path + ">");
    const bool sync = line.starts_with("fdatasync(") || line.starts_with("fsync(");
    if (contains(line, "\"begin\"")) {
      calls.clear();
    } else if (contains(line, "\"answer\"")) {
      votes.push_back(calls);
    } else if (sync) {
      calls += journal ? 'J' : file ? 'D' : contains(line, dir.path().string() + ">") ? 'P' : '?';
    } else if (line.starts_with("unlink(")) {
      calls += journal ? 'u' : '?';
    } else {
      calls += journal ? 'j' : file ? 'd' : '?';
    }
    CHECK_MESSAGE(!contains(line, "= -1"), line);
  }
  REQUIRE(votes.size() == 4);
  for (const std::string& made : votes) {
    CAPTURE(made);
    CHECK(std::count_if(made.begin(), made.end(), [](char c) { return c < 'a' && c != '?'; }) >= 4);
    const size_t journal = made.rfind('J'), change = made.find('d');
    CHECK(made.rfind('j') < journal);          // the old pages are on the disk
    CHECK(journal < change);                   // before the file changes,
    CHECK(made.rfind('d') < made.rfind('D'));  // and the change is
    CHECK(made.rfind('D') < made.find('u'));   // before the journal goes;
    CHECK(made.ends_with("uP"));               // that, too, is on the disk before the answer
    CHECK(!contains(made, "?"));
  }
}

// -------------------------------------------------------------------------------------------------
// The same over HTTP: ./serve as a process

namespace {

// Two models whose answers differ, for the arena of a server.
std::string arena_models(const ScriptedModel& scripted) {
  return "one=" + save_random_model(scripted, "one") +
         " two=" + save_random_model(scripted, "two", 256, .35);
}

OrderedJson battle(int port) {
  const Reply reply = ask(
      port,
      http_post("/arena/battle", {{"voter", "v1"}, {"messages", asked("hi")}, {"max_tokens", 12}}));
  require(reply.status == 200, "battle: found ", reply.status, " ", reply.body);
  return reply.json();
}
Reply cast(int port, const OrderedJson& battle) {
  return ask(port, http_post("/arena/vote", {{"battle", battle.at("battle")},
                                             {"token", battle.at("token")},
                                             {"vote", "left"},
                                             {"good", {true, false}}}));
}

}  // namespace

TEST_CASE("./serve: a vote that was answered survives kill -9") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  const ScriptedModel scripted;
  const std::string models = arena_models(scripted);
  std::mutex mutex;
  std::set<std::string> answered;
  for (int round = 1; round <= 3; round++) {
    ServeBinary serve(models, "--votes " + path);
    std::vector<std::thread> voters;
    std::atomic<int> votes{0};
    for (int i = 0; i < 3; i++) {
      voters.emplace_back([&] {
        try {
          for (;;) {
            const OrderedJson drawn = battle(serve.port());
            if (cast(serve.port(), drawn).status != 200) continue;
            const std::lock_guard lock(mutex);
            answered.insert(drawn.at("battle"));
            votes++;
          }
        } catch (const std::exception&) {  // the server is gone
        }
      });
    }
    CHECK(wait_until([&] { return votes >= 4 * round; }, 60));
    serve.signal(SIGKILL);
    for (std::thread& voter : voters) voter.join();
    CHECK(wait_until([&] { return serve.ended(); }));
    CHECK(serve.status() == 128 + SIGKILL);
    std::set<std::string> stored;
    for (const Vote& vote : all_of(path)) stored.insert(vote.battle);
    for (const std::string& name : answered) CHECK_MESSAGE(stored.count(name), name);
    check_whole(path);
  }
}

TEST_CASE("./serve: a vote is synced to the disk before its answer is sent") {
  if (!std::getenv("CAKE_TEST_ALL") || shell("strace -o /dev/null true").status != 0) {
    skipped_tests().insert(doctest::getContextOptions()->currentTest->m_name);
    MESSAGE("skipped: strace is not there, or CAKE_TEST_ALL is not set");
    return;
  }
  const TempDir dir;
  const std::string log = dir / "log";
  const ScriptedModel scripted;
  {
    ServeBinary serve(arena_models(scripted), "--votes " + (dir / "votes.db").string(),
                      "strace -D -f -s 60 -e trace=fdatasync,fsync,recvfrom,sendto,sendmsg,write "
                      "-o " +
                          log);
    for (int i = 0; i < 3; i++) {
      const Reply reply = cast(serve.port(), battle(serve.port()));
      CHECK_MESSAGE(reply.status == 200, reply.body);
    }
    serve.signal(SIGTERM);
    CHECK(wait_until([&] { return serve.ended(); }));
  }
  // Of the thread that has the vote's request: the syncs from its arrival to the answer.
  std::map<std::string, int> syncs;  // of a thread that has a vote to answer
  std::vector<int> answered;
  std::istringstream lines(read_file(log));
  for (std::string line; std::getline(lines, line);) {
    const std::string thread = line.substr(0, line.find(' '));
    if (contains(line, "POST /arena/vote")) {
      syncs[thread] = 0;
    } else if (!syncs.count(thread)) {
      continue;
    } else if (contains(line, "HTTP/1.1 200")) {
      answered.push_back(syncs[thread]);
      syncs.erase(thread);
    } else if (contains(line, "sync(") || contains(line, "sync resumed>")) {
      if (contains(line, "= 0")) syncs[thread]++;
    }
  }
  REQUIRE(answered.size() == 3);
  for (const int n : answered) CHECK(n >= 4);  // the journal, the file, the directory twice
}

// -------------------------------------------------------------------------------------------------
// The disk is full

TEST_CASE("votes: a full disk refuses the vote, and takes the next one when there is room") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  int refused = 0;
  {
    FaultyDisk disk;
    Votes votes(path);
    for (int change = 0;; change++) {
      CAPTURE(change);
      const int64_t before = votes.count();
      const Vote vote = vote_on(concat("b", change), "hi", {{std::string(9000, 'a'), 1}, {"b", 2}});
      disk.set(Fault::full, change);
      const std::string error = error_of([&] { votes.add(vote); });
      disk.set(Fault::none, 0);
      if (error == "no error") break;
      refused++;
      CHECK(error == path + ": cannot write: the disk is full");
      CHECK(votes.count() == before);
      votes.add(vote);
      CHECK(votes.count() == before + 1);
    }
    CHECK(refused > 5);
  }
  CHECK(all_of(path).size() == size_t(refused) + 1);
  check_whole(path);

  // A new file on a full disk, and a directory that is full later.
  FaultyDisk disk;
  disk.set(Fault::full, 0);
  const std::string late = dir / "new.db";
  CHECK(error_of([&] { Votes votes(late); }) == late + ": cannot write: the disk is full");
  disk.set(Fault::none, 0);
  Votes(late).add(vote_on("b1"));
  CHECK(battles_of(late) == "b1");
}

TEST_CASE("votes: a limit of the file's size refuses the vote") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  Votes(path).add(vote_on("b1"));
  const int status = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    Votes votes(path);
    rlimit limit{};
    getrlimit(RLIMIT_FSIZE, &limit);
    const rlim_t before = limit.rlim_cur;
    limit.rlim_cur = 20'000;
    setrlimit(RLIMIT_FSIZE, &limit);
    const Vote large = vote_on("b2", "hi", {{std::string(60'000, 'a'), 1}, {"b", 2}});
    const std::string error = error_of([&] { votes.add(large); });
    require(error == path + ": cannot read or write: disk I/O error", error);
    require(votes.count() == 1, "count: found ", votes.count());
    limit.rlim_cur = before;
    setrlimit(RLIMIT_FSIZE, &limit);
    votes.add(large);
  });
  CHECK(status == 0);
  CHECK(battles_of(path) == "b1 b2");
  check_whole(path);
}

// -------------------------------------------------------------------------------------------------
// Several at once

TEST_CASE("votes: threads and two processes add at once, while others read") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  constexpr int kThreads = 3, kVotes = 12;
  const auto add_all = [&](const std::string& name) {
    Votes votes(path);  // all of them make the file
    std::vector<std::thread> threads;
    std::atomic<int> failed{0};
    for (int t = 0; t < kThreads; t++) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kVotes; i++) {
          try {
            votes.add(vote_on(concat(name, "-", t, "-", i)));
          } catch (const Error& e) {
            std::fprintf(stderr, "%s\n", e.what());
            failed++;
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    require(failed == 0, "votes: found ", failed, " that failed");
  };
  const pid_t child = fork();
  if (child == 0) {
    try {
      add_all("child");
      _exit(0);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "child: %s\n", e.what());
    }
    _exit(1);
  }
  std::thread adder([&] { CHECK(error_of([&] { add_all("parent"); }) == "no error"); });
  // What is read meanwhile is whole, and what was there stays.
  size_t seen = 0, backups = 0;
  int status = -1;
  for (bool over = false; !over;) {
    over = waitpid(child, &status, WNOHANG) == child;
    if (!std::filesystem::exists(path)) continue;
    std::vector<Vote> list;
    const std::string error = error_of([&] { list = all_of(path); });
    if (contains(error, "found an empty SQLite file") && seen == 0) continue;
    CHECK(error == "no error");
    CHECK(list.size() >= seen);
    seen = list.size();
    for (const Vote& vote : list) CHECK(vote.answers.size() == 2);
    if (seen > backups * 10) {
      backups++;
      const std::string copy = dir / "copy.db";
      backup_votes(path, copy);
      check_whole(copy);
      CHECK(all_of(copy).size() >= seen);
    }
  }
  adder.join();
  CHECK(status == 0);
  CHECK(backups > 0);
  CHECK(all_of(path).size() == 2 * kThreads * kVotes);
  check_whole(path);
}

TEST_CASE("votes: processes that make the file at the same moment find it whole") {
  const TempDir dir;
  for (int round = 0; round < 10; round++) {
    const std::string path = dir / concat("votes", round, ".db");
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    std::vector<pid_t> children;
    for (int i = 0; i < 3; i++) {
      children.push_back(fork());
      if (children.back() != 0) continue;
      close(ends[1]);
      char end = 0;
      const ssize_t none = read(ends[0], &end, 1);  // all begin when the pipe is closed
      const std::string error = error_of([&] { Votes(path).add(vote_on(concat("b", i))); });
      if (error != "no error") std::fprintf(stderr, "child: %s\n", error.c_str());
      _exit(none == 0 && error == "no error" ? 0 : 1);
    }
    close(ends[0]);
    close(ends[1]);
    for (const pid_t child : children) {
      int status = -1;
      waitpid(child, &status, 0);
      CHECK(status == 0);
    }
    CHECK(all_of(path).size() == 3);
  }
}

TEST_CASE("votes: a vote waits for another program's lock, and not for ever") {
  const TempDir dir;
  const std::string path = dir / "votes.db";
  Votes votes(path);
  votes.add(vote_on("b1"));
  sqlite3* other = nullptr;
  REQUIRE(sqlite3_open(path.c_str(), &other) == SQLITE_OK);
  const auto run = [&](const char* text) {
    return sqlite3_exec(other, text, nullptr, nullptr, nullptr);
  };
  for (const char* lock : {"BEGIN EXCLUSIVE", "BEGIN; SELECT * FROM votes"}) {
    CAPTURE(std::string(lock));
    REQUIRE(run(lock) == SQLITE_OK);
    std::atomic<bool> added{false};
    std::thread adder([&] {
      votes.add(vote_on(lock));
      added = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(!added);
    REQUIRE(run("COMMIT") == SQLITE_OK);
    adder.join();
    CHECK(added);
  }
  if (std::getenv("CAKE_TEST_ALL")) {
    REQUIRE(run("BEGIN; SELECT * FROM votes") == SQLITE_OK);
    CHECK(error_of([&] { votes.add(vote_on("b4")); }) ==
          path + ": another program has locked the file for 10 s");
    REQUIRE(run("COMMIT") == SQLITE_OK);
    votes.add(vote_on("b4"));
  }
  sqlite3_close(other);
}

// -------------------------------------------------------------------------------------------------
// Export

TEST_CASE("export of votes: each vote is a record or is counted under why it is none") {
  const TempDir dir;
  Votes votes(dir / "votes.db");
  const auto add = [&](const std::string& battle, const std::string& prompt,
                       const std::vector<std::pair<std::string, int>>& answers,
                       const std::vector<std::string>& finishes = {}) {
    Vote vote = vote_on(battle, prompt, answers);
    for (size_t i = 0; i < finishes.size(); i++) vote.answers[i].finish = finishes[i];
    votes.add(vote);
  };
  add("left", "p1", {{"a", 1}, {"b", 2}});
  add("right", "p2", {{"a", 2}, {"b", 1}});
  add("tie", "p3", {{"a", 1}, {"b", 1}});
  add("equal", "p4", {{"a", 1}, {" a\n", 2}});  // a template writes both as one
  add("empty", "p5", {{"a", 1}, {" \n\xc2\xa0", 2}});
  add("cut", "p6", {{"a", 1}, {"b", 2}}, {"stop", "length"});
  add("stopped", "p7", {{"a", 1}, {"b", 2}}, {"stopped", "stop"});
  add("undone", "p8", {{"a", 1}, {"b", 2}});
  votes.undo("undone");
  Vote same = vote_on("same", "p9", {{"a", 1}, {"b", 2}});
  same.same = true;
  votes.add(same);
  Vote leaked = vote_on("leaked", "p10", {{"a", 1}, {"b", 2}});
  leaked.leaked = true;
  votes.add(leaked);
  add("list", "p11", {{"a", 1}, {"b", 2}, {"c", 2}, {"d", 4}});
  add("list of ties", "p12", {{"a", 1}, {"b", 1}, {"c", 1}});
  add("list of two", "p13", {{"a", 2}, {"", 1}, {"c", 3}});
  add("list of one", "p14", {{"a", 2}, {"b", 1}, {"c", 3}}, {"stop", "length", "stopped"});
  add("list with equals", "p15", {{"a", 1}, {"b", 2}, {"a", 3}, {"c", 4}});
  add("list of equals", "p16", {{"a", 1}, {"a", 2}, {"a", 3}});
  add("list with a cut one", "p17", {{"a", 2}, {"b", 1}, {"c", 4}, {"d", 2}},
      {"stop", "stop", "length", "stop"});
  add("no prompt", "", {{"a", 1}, {"b", 2}});

  const Exported e = exported(votes);
  CHECK(briefs(e) ==
        "p10: a > b\np11: a=1 b=2 c=2 d=4\np13: a > c\np15: a=1 b=1 c=3\np17: a=2 b=1 d=2\n"
        "p1: a > b\np2: b > a\n");
  const VoteExport& c = e.counts;
  CHECK(c.votes == 18);
  CHECK(c.undone == 1);
  CHECK(c.same == 3);
  CHECK(c.ties == 2);
  CHECK(c.empty == 1);
  CHECK(c.cut == 3);
  CHECK(c.merged == 0);
  CHECK(c.refused == 1);
  CHECK_MESSAGE(contains(c.reason, "content: found nothing"), c.reason);
  CHECK(c.dropped_answers == 2);

  const Exported cut = exported(votes, {.keep_cut = true});
  CHECK(cut.counts.cut == 0);
  CHECK(cut.counts.empty == 1);
  CHECK(cut.lines.size() == 10);
  CHECK(contains(briefs(cut), "p6: a > b\n"));
  CHECK(contains(briefs(cut), "p14: a=2 b=1 c=3\n"));
  CHECK(contains(briefs(cut), "p17: a=2 b=1 c=4 d=2\n"));

  const Exported raw = exported(votes, {.raw = true});
  REQUIRE(raw.lines.size() == 18);
  CHECK(raw.counts.votes == 18);
  const auto list = all_of(votes);
  for (size_t i = 0; i < 18; i++) CHECK(raw.lines[i] + "\n" == json_line(vote_json(list[i])));
}

TEST_CASE("export of votes: votes on the same answers are merged by majority") {
  const TempDir dir;
  Votes votes(dir / "votes.db");
  int number = 0;
  const auto add = [&](const std::string& prompt,
                       const std::vector<std::pair<std::string, int>>& answers) {
    votes.add(vote_on(concat("b", number++), prompt, answers));
  };
  add("p1", {{"a", 1}, {"b", 2}});
  add("p1", {{"b", 2}, {"a", 1}});  // the same, the other way round on the screen
  add("p1", {{"b", 1}, {"a", 2}});
  add("p2", {{"a", 1}, {"b", 2}});  // one against one
  add("p2", {{"a", 2}, {"b", 1}});
  add("p3", {{"a", 2}, {"b", 1}});  // a tie beside a vote decides nothing against it
  add("p3", {{"a ", 1}, {"\nb", 1}});
  add("p4", {{"a", 1}, {"b", 2}});
  add("p4", {{"a", 1}, {"c", 2}});  // another answer: another record
  add("p5", {{"a", 1}, {"b", 2}, {"c", 3}});
  add("p5", {{"c", 2}, {"a", 1}, {"b", 3}});
  add("p5", {{"b", 1}, {"c", 1}, {"a", 1}});
  add("p6", {{"a", 1}, {"b", 2}, {"c", 3}});  // a circle
  add("p6", {{"a", 3}, {"b", 1}, {"c", 2}});
  add("p6", {{"a", 2}, {"b", 3}, {"c", 1}});
  const Exported e = exported(votes);
  CHECK(briefs(e) == "p1: a > b\np3: b > a\np4: a > b\np4: a > c\np5: a=1 b=2 c=2\n");
  CHECK(e.counts.merged == 2 + 1 + 2);
  CHECK(e.counts.ties == 2 + 3);
}

TEST_CASE("export of votes: the order is the seed's, whatever order the votes came in") {
  const TempDir dir;
  Votes forth(dir / "forth.db"), back(dir / "back.db");
  for (int i = 0; i < 20; i++) {
    const auto vote = [](int k) {
      const std::vector<std::pair<std::string, int>> list = {
          {concat("a", k), 1}, {"b", 2}, {"c", 3}, {"d", 4}};
      return vote_on(concat("b", k), concat("p", 10 + k),
                     {list.begin(), list.begin() + (k % 2 ? 2 : 4)});
    };
    forth.add(vote(i));
    back.add(vote(19 - i));
  }
  const auto lines = exported(forth).lines;
  CHECK(exported(back).lines == lines);
  CHECK(exported(forth, {.seed = 1}).lines == exported(back, {.seed = 1}).lines);
  CHECK(exported(forth, {.seed = 1}).lines != lines);
  std::vector<std::string> prompts, sorted;
  for (const std::string& line : lines) prompts.push_back(brief(line).substr(0, 3));
  sorted = prompts;
  std::sort(sorted.begin(), sorted.end());
  CHECK(sorted != prompts);
  // A new vote moves no other record.
  forth.add(vote_on("new", "new", {{"x", 1}, {"y", 2}}));
  auto more = exported(forth).lines;
  CHECK(more.size() == 21);
  std::erase_if(more, [](const std::string& line) { return contains(line, "new"); });
  CHECK(more == lines);
  // The places of answers in rankings say nothing.
  std::set<int> places;
  for (const std::string& line : lines) {
    const auto json = OrderedJson::parse(line);
    if (json.contains("ranking")) places.insert(json.at("ranking")[0].get<int>());
  }
  CHECK(places.size() > 1);
}

TEST_CASE("export of votes: an answer that went on with a begun turn is that whole turn") {
  const TempDir dir;
  Votes votes(dir / "votes.db");
  Vote vote = vote_on("b1", "hi", {{" end.", 1}, {" stop.", 2}});
  vote.prompt.push_back({{"role", "assistant"}, {"content", "The \n"}});
  votes.add(vote);
  const auto lines = exported(votes).lines;
  REQUIRE(lines.size() == 1);
  CHECK(brief(lines[0]) == "hi: The end. > The stop.");
}

namespace {

// A preference as ./reward reads it from a line.
Preference read_preference(const std::string& line) {
  simdjson::dom::parser parser;
  simdjson::dom::object object;
  const simdjson::padded_string padded(line);
  REQUIRE(parser.parse(padded).get(object) == simdjson::SUCCESS);
  return parse_preference({object, "line"});
}

}  // namespace

TEST_CASE("export of votes: ./reward reads every record as it was voted, whatever the texts") {
  const TempDir dir;
  const std::string path = dir / "votes.db", out = dir / "preferences.jsonl";
  const auto texts = odd_texts();
  {
    Votes votes(path);
    for (size_t i = 0; i < texts.size(); i++) {
      const auto text = [&](size_t k) { return texts[(i + k) % texts.size()]; };
      votes.add(vote_on(concat("pair", i), text(0), {{text(1), 2}, {text(2), 1}}));
      votes.add(vote_on(concat("list", i), text(0), {{text(1), 2}, {text(2), 1}, {text(3), 3}}));
      Vote longer = vote_on(concat("long", i), text(0), {{text(1), 1}, {text(2), 2}});
      longer.prompt = {{{"role", "system"}, {"content", text(3)}},
                       {{"role", "user"}, {"content", text(0)}},
                       {{"role", "assistant"}, {"content", text(1)}},
                       {{"role", "user"}, {"content", text(2)}}};
      votes.add(longer);
    }
  }
  const Output o = shell("./serve export " + path + " -o " + out);
  CHECK(o.status == 0);
  CHECK(o.text ==
        concat(out, ": ", 3 * texts.size(), " records of ", 3 * texts.size(), " votes\n"));
  size_t pairs = 0;
  std::istringstream lines(read_file(out));
  for (std::string line; std::getline(lines, line);) {
    const Preference p = read_preference(line);
    CHECK(p.is_chat);
    CHECK(!p.left_out);
    const OrderedJson json = OrderedJson::parse(line);
    REQUIRE(p.prompt.messages.size() == json.at("prompt").size());
    for (size_t i = 0; i < json.at("prompt").size(); i++) {
      CHECK(p.prompt.messages[i].role == json.at("prompt")[i].at("role"));
    }
    const std::vector<int> ranking = json.contains("ranking")
                                         ? json.at("ranking").get<std::vector<int>>()
                                         : std::vector<int>{1, 2};
    CHECK(p.ranking == ranking);
    REQUIRE(p.answers.size() == ranking.size());
    for (const auto& answer : p.answers) CHECK(answer.size() == 1);
    pairs += ranking.size() == 2;
  }
  CHECK(pairs == 2 * texts.size());

  ScriptedModel scripted(2048);
  const std::string model = save_random_model(scripted, "random", 2048);
  for (const char* command : {"train", "dpo"}) {
    CAPTURE(std::string(command));
    const Output trained =
        shell(concat("./reward ", command, " --data ", out, " --model ", model,
                     " --steps 1 --batch 2 --val-fraction 0 -o ", (dir / command).string()));
    CHECK_MESSAGE(trained.status == 0, trained.text);
    CHECK_MESSAGE(contains(trained.text, concat(3 * texts.size(), " prompts")), trained.text);
    CHECK_MESSAGE(!contains(trained.text, "left out"), trained.text);
  }
}

// -------------------------------------------------------------------------------------------------
// The command

TEST_CASE("./serve export writes records, every vote, or a copy, and never over the votes") {
  const TempDir dir;
  const std::string d = dir.path().string() + "/", path = d + "votes.db";
  {
    Votes votes(path);
    votes.add(vote_on("b1", "hi", {{"a", 1}, {"b", 2}}));
    votes.add(vote_on("b2", "hi", {{"b", 2}, {"a", 1}}));
    votes.add(vote_on("b3", "ho", {{"a", 1}, {"b", 1}}));
  }
  const std::string record = R"({"prompt":[{"role":"user","content":"hi"}],)"
                             R"("chosen":[{"role":"assistant","content":"a"}],)"
                             R"("rejected":[{"role":"assistant","content":"b"}]})"
                             "\n";
  const std::string counts =
      "1 records of 3 votes; not written: 1 tied; merged: 1 on the prompt and answers of another\n";
  Output o = shell("./serve export " + path + " 2>/dev/null");
  CHECK(o.status == 0);
  CHECK(o.text == record);
  o = shell("./serve export " + path + " -o " + d + "out.jsonl");
  CHECK(o.text == d + "out.jsonl: " + counts);
  CHECK(read_file(d + "out.jsonl") == record);
  o = shell("./serve export --raw " + path + " -o " + d + "raw.jsonl");
  CHECK(o.text == d + "raw.jsonl: 3 lines of 3 votes\n");
  const std::string raw = read_file(d + "raw.jsonl");
  CHECK(std::count(raw.begin(), raw.end(), '\n') == 3);

  o = shell("./serve export " + path + " --backup " + d + "copy.db");
  CHECK(o.status == 0);
  CHECK(o.text == d + "copy.db: a copy of " + path + "\n");
  CHECK(battles_of(d + "copy.db") == "b1 b2 b3");
  o = shell("./serve export " + d + "copy.db --backup " + d + "copy2.db -o " + d + "out2.jsonl");
  CHECK(o.status == 0);
  CHECK(read_file(d + "out2.jsonl") == record);
  Votes(d + "copy2.db").add(vote_on("b4"));  // a copy is a file of votes
  CHECK(shell("./serve export " + path + " --backup " + d + "copy2.db").status == 0);
  CHECK(battles_of(d + "copy2.db") == "b1 b2 b3");
  check_whole(d + "copy2.db");

  const auto refused = [&](const std::string& words, const std::string& error) {
    const Output r = shell("./serve export " + words);
    CHECK(r.status == 1);
    CHECK(r.text == "error: " + error + "\n");
  };
  std::filesystem::create_hard_link(path, d + "link.db");
  for (const std::string name : {"votes.db", "./votes.db", "link.db"}) {
    const std::string error = ": found the file of votes, expected another file to write";
    refused(path + " -o " + d + name, d + name + error);
    refused(path + " --backup " + d + name, d + name + error);
  }
  refused(path + " -o " + d + "x --backup " + d + "./x",
          "--backup: found " + d + "./x, the file of --output too, expected another one");
  refused(path + " -o " + d + "copy.db",
          d + "copy.db: found a SQLite file, expected another file to write records to");
  refused(d + "none.db", d + "none.db: cannot open: No such file or directory");
  refused(d + "none.db --backup " + d + "x.db",
          d + "none.db: cannot open: No such file or directory");
  refused(d + "raw.jsonl", d + "raw.jsonl: found no SQLite file, expected a file of votes");
  refused("", "votes is required (see --help)");
  CHECK(!std::filesystem::exists(d + "x.db"));
  CHECK(battles_of(path) == "b1 b2 b3");
  CHECK(contains(shell("./serve --help").text, "export"));
  CHECK(contains(shell("./serve export --help").text, "--backup"));
}
