// The corpus as its users run it: whole runs, many processes, kills, other thresholds.
#include <doctest/doctest.h>

#include <set>

#include "cake/corpus.h"
#include "test/support.h"

using namespace cake;
using namespace cake::corpus;
namespace fs = std::filesystem;

namespace {

// Made-up documents as JSON lines: most of them of 30 to 90 words, some short, some copies of
// earlier ones, some copies with a word changed.
std::vector<std::string> made_up_texts(int count, uint64_t seed) {
  static const char* const syllables[] = {"ba", "ri", "to", "len", "mo",
                                          "sa", "ku", "ne", "dol", "fi"};
  Rng rng{seed};
  std::vector<std::string> texts;
  for (int i = 0; i < count; i++) {
    const uint64_t kind = rng.below(10);
    if (kind == 0 && i > 0) {
      texts.push_back(texts[rng.below(texts.size())]);
    } else if (kind == 1 && i > 0) {
      texts.push_back("Mirrored " + texts[rng.below(texts.size())]);
    } else {
      std::string text;
      const uint64_t words = kind == 2 ? 6 : 30 + rng.below(60);
      for (uint64_t w = 0; w < words; w++) {
        if (w > 0) text += w % 12 == 0 ? ".\n" : " ";
        for (uint64_t s = 0; s < 2 + rng.below(2); s++) text += syllables[rng.below(10)];
      }
      texts.push_back(text + ".");
    }
  }
  return texts;
}

// A folder of `files` files of JSON lines.
fs::path made_up_folder(const TempDir& dir, int files, int documents) {
  const fs::path folder = dir / "pages";
  fs::create_directories(folder);
  const std::vector<std::string> texts = made_up_texts(files * documents, 7);
  for (int f = 0; f < files; f++) {
    std::string lines;
    for (int d = 0; d < documents; d++) {
      const int i = f * documents + d;
      lines += concat("{\"text\":", Json(texts[size_t(i)]).dump(), ",\"id\":\"", i,
                      "\",\"n\": [1, ", i, "]}\n");
    }
    write_file(folder / format("%03d.jsonl", f), lines);
  }
  return folder;
}

const std::string kFlags = " --preset none --min-words 10 --max-duplicate-lines .3 ";

std::string clean(const fs::path& input, const fs::path& out, const std::string& flags = kFlags) {
  return concat("./corpus clean ", input.string(), " -o ", out.string(), flags);
}

void run_clean(const fs::path& input, const fs::path& out, const std::string& flags = kFlags) {
  const Output o = shell(clean(input, out, flags));
  REQUIRE_MESSAGE(o.status == 0, o.text);
}

// What does not depend on time.
std::vector<std::string> results(const fs::path& out) {
  return {read_file(out / "documents.jsonl.zst"), read_file(out / "verdicts.jsonl.zst")};
}

std::vector<Verdict> verdicts(const fs::path& out) {
  std::vector<Verdict> list;
  LineReader lines{Input((out / "verdicts.jsonl.zst").string())};
  for (std::string_view line; lines.next(line);) list.push_back(parse_verdict(line, lines.where()));
  return list;
}

std::vector<Json> documents(const fs::path& out) {
  std::vector<Json> list;
  LineReader lines{Input((out / "documents.jsonl.zst").string())};
  for (std::string_view line; lines.next(line);) list.push_back(Json::parse(line));
  return list;
}

}  // namespace

TEST_CASE(
    "every document has a verdict, and what is kept comes out in order with its other members") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 3, 40), out = dir / "out";
  run_clean(folder, out);
  const std::vector<Verdict> all = verdicts(out);
  const std::vector<Json> kept = documents(out);
  REQUIRE(all.size() == 120);
  size_t next = 0;
  std::set<std::string> reasons;
  for (size_t i = 0; i < all.size(); i++) {
    CAPTURE(i);
    if (i > 0) CHECK(all[i - 1].place < all[i].place);
    CHECK(all[i].id == std::to_string(i));
    reasons.emplace(all[i].reason());
    if (all[i].original) CHECK(*all[i].original < all[i].place);
    if (!all[i].kept()) continue;
    REQUIRE(next < kept.size());
    CHECK(kept[next].at("id") == all[i].id);
    CHECK(kept[next].at("n") == Json({1, int(i)}));
    CHECK(std::string(kept[next].at("text")).starts_with(all[i].begins));
    next++;
  }
  CHECK(next == kept.size());
  for (const char* reason : {"kept", "min-words", "exact-duplicate", "near-duplicate"})
    CHECK_MESSAGE(reasons.count(reason), reason);
  CHECK(contains(read_file(out / "report.html"), "<html"));
}

TEST_CASE("an exact duplicate names the first copy, a near one the first of its cluster") {
  const TempDir dir;
  const std::vector<std::string> texts = made_up_texts(60, 3);
  std::string lines;
  const std::vector<std::string> given = {texts[11], "Mirrored " + texts[11], texts[11]};
  for (const std::string& text : given) lines += concat("{\"text\":", Json(text).dump(), "}\n");
  write_file(dir / "a.jsonl", lines);
  run_clean(dir / "a.jsonl", dir / "out", " --preset none");
  const std::vector<Verdict> all = verdicts(dir / "out");
  REQUIRE(all.size() == 3);
  CHECK(all[0].reason() == "kept");
  CHECK(all[1].reason() == "near-duplicate");
  CHECK(all[2].reason() == "exact-duplicate");
  for (int i : {1, 2}) CHECK(*all[size_t(i)].original == Place{0, 0});
}

TEST_CASE("threads, tasks and batches change no byte of a corpus") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 9, 30);
  run_clean(folder, dir / "one", kFlags + "--threads 1");
  const auto expected = results(dir / "one");
  const char* ways[] = {"--threads 2", "--tasks 9", "--tasks 4 --memory .01",
                        "--threads 3 --tasks 2 --save-seconds 0"};
  for (const std::string way : ways) {
    CAPTURE(way);
    fs::remove_all(dir / "other");
    run_clean(folder, dir / "other", kFlags + way);
    CHECK(results(dir / "other") == expected);
  }
}

TEST_CASE("seven ranks of fifty tasks, two of them killed, give the bytes of one process") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 50, 12);
  run_clean(folder, dir / "one", kFlags + "--threads 1");
  // Two processes end in the middle of their work, as if killed; five go on, and finish theirs. The
  // two begin a little earlier, so that there is work for them.
  std::string command;
  for (const int rank : {2, 5, 0, 1, 3, 4, 6}) {
    const char* killed = rank == 2 ? "CAKE_EXIT_AT=60 " : rank == 5 ? "CAKE_EXIT_AT=33 " : "";
    if (rank == 0) command += "sleep .05; ";
    command += concat(killed, clean(folder, dir / "many", kFlags),
                      " --tasks 50 --threads 1 --save-seconds 0 --rank ", rank,
                      " --world-size 7 & p", rank, "=$!; ");
  }
  command +=
      "for p in $p0 $p1 $p3 $p4 $p6; do wait $p || exit 1; done; wait $p2; a=$?; wait $p5; echo "
      "killed $a $?";
  const Output o = shell(command);
  REQUIRE_MESSAGE(o.status == 0, o.text);
  CHECK_MESSAGE(contains(o.text, "killed 137 137"), o.text);
  CHECK(results(dir / "many") == results(dir / "one"));
}

TEST_CASE("a run killed at any change of the disk goes on to the same bytes by the same command") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 2, 12);
  const std::string flags = kFlags + "--threads 1 --tasks 2 --save-seconds 0";
  run_clean(folder, dir / "whole", flags);
  const auto expected = results(dir / "whole");
  const int stride = std::getenv("CAKE_TEST_ALL") ? 1 : 17;
  for (int change = 1 + int(now()) % stride;; change += stride) {
    CAPTURE(change);
    const Output ended =
        shell(concat("CAKE_EXIT_AT=", change, " ", clean(folder, dir / "killed", flags)));
    if (ended.status == 0) {
      REQUIRE(change > 40);
      break;
    }
    REQUIRE_MESSAGE(ended.status == kKilled, ended.text);
    run_clean(folder, dir / "killed", flags);
    CHECK(results(dir / "killed") == expected);
    fs::remove_all(dir / "killed");
  }
}

TEST_CASE("what-if gives the verdicts of a new run, byte for byte") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 3, 60);
  run_clean(folder, dir / "run");
  const char* others[] = {"--min-words off", "--min-words 60",
                          "--max-duplicate-lines off --min-words 3 --min-mean-word-length 5.2"};
  for (const std::string other : others) {
    CAPTURE(other);
    fs::remove_all(dir / "new"), fs::remove_all(dir / "if");
    const std::string flags = concat(
        " --preset none", contains(other, "--min-words") ? "" : " --min-words 10",
        contains(other, "--max-duplicate-lines") ? "" : " --max-duplicate-lines .3", " ", other);
    run_clean(folder, dir / "new", flags);
    const Output o = shell(concat("./corpus what-if ", (dir / "run").string(), " -o ",
                                  (dir / "if").string(), " ", other));
    REQUIRE_MESSAGE(o.status == 0, o.text);
    CHECK(read_file(dir / "if" / "verdicts.jsonl.zst") ==
          read_file(dir / "new" / "verdicts.jsonl.zst"));
    CHECK(read_file(dir / "if" / "verdicts.jsonl.zst") !=
          read_file(dir / "run" / "verdicts.jsonl.zst"));
    CHECK(contains(read_file(dir / "if" / "report.html"), "<html"));
  }
}

TEST_CASE("a killed run goes on in the middle of a file, plain or compressed") {
  const TempDir dir;
  std::string lines;
  for (const std::string& text : made_up_texts(10000, 9))
    lines += concat("{\"text\":", Json(text).dump(), "}\n");
  write_file(dir / "a.jsonl", lines);
  const size_t half = lines.find('\n', lines.size() / 2) + 1;
  for (const bool first : {true, false}) {  // a frame each
    TextFile frame(dir / (first ? "1.zst" : "2.zst"), 1);
    frame.write(first ? lines.substr(0, half) : lines.substr(half));
    frame.commit();
  }
  const Output o = shell(concat("cd ", dir.path().string(), " && cat 1.zst 2.zst > a.zst",
                                " && split -n l/7 a.jsonl x",
                                " && for f in x*; do gzip -c $f; done > a.gz"));  // seven members
  REQUIRE_MESSAGE(o.status == 0, o.text);
  for (const std::string name : {"a.jsonl", "a.gz", "a.zst"}) {
    CAPTURE(name);
    const std::string flags = kFlags + "--threads 1 --save-seconds 0 --memory .001";
    run_clean(dir / name, dir / "whole", flags);
    bool in_the_middle = false;
    for (const int change : {30, 45, 60}) {
      CAPTURE(change);
      CHECK(shell(concat("CAKE_EXIT_AT=", change, " ", clean(dir / name, dir / "run", flags)))
                .status == kKilled);
      const fs::path saved = dir / "run" / "parts" / "00000.saved";
      if (fs::exists(saved)) {
        const Json state = Json::parse(read_file(saved));
        in_the_middle |= state.at("documents") > 0 && state.at("entry").at(2) > 0;
      }
      run_clean(dir / name, dir / "run", flags);
      CHECK(results(dir / "run") == results(dir / "whole"));
      fs::remove_all(dir / "run");
    }
    CHECK(in_the_middle);
    fs::remove_all(dir / "whole");
  }
}

TEST_CASE("a run that keeps nothing, and a task that keeps nothing, end well") {
  const TempDir dir;
  const std::vector<std::string> texts = made_up_texts(40, 1);
  const auto is_long = [](const std::string& text) { return text.size() > 200; };
  const std::string text = *std::find_if(texts.begin(), texts.end(), is_long);
  fs::create_directory(dir / "pages");
  write_file(dir / "pages" / "0.jsonl", "{\"text\":\"too short\"}\n");
  write_file(dir / "pages" / "1.jsonl", concat("{\"text\":", Json(text).dump(), "}\n"));
  run_clean(dir / "pages", dir / "one", kFlags + "--tasks 2");
  CHECK(documents(dir / "one").size() == 1);
  run_clean(dir / "pages", dir / "none", " --preset none --min-words 1000");
  CHECK(documents(dir / "none").empty());
  CHECK(verdicts(dir / "none").size() == 2);
}

TEST_CASE("what damage was found is counted once, however often a run is killed") {
  const TempDir dir;
  std::string lines;
  int64_t broken = 0;
  for (const std::string& text : made_up_texts(9000, 4)) {
    lines += concat("{\"text\":", Json(text).dump(), "}\n");
    if (text.size() % 50 == 0) lines += "{broken\n", broken++;
  }
  write_file(dir / "a.jsonl", lines), write_file(dir / "b.jsonl", "{broken\n{\"text\":\"b\"}\n");
  const std::string command =
      concat("./corpus clean ", (dir / "a.jsonl").string(), " ", (dir / "b.jsonl").string(), " -o ",
             (dir / "run").string(), kFlags, "--threads 1 --save-seconds 0 --memory .001");
  for (const int change : {40, 30, 30}) {
    CHECK(shell(concat("CAKE_EXIT_AT=", change, " ", command)).status == kKilled);
  }
  REQUIRE(shell(command).status == 0);
  const Json summary = Json::parse(read_file(dir / "run" / "summary.json"));
  CHECK(summary.at("problems").at("not JSON") == broken + 1);
  CHECK(broken > 20);
}

TEST_CASE("--overwrite removes what a run wrote, and nothing else") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 1, 10);
  // A directory that only looks like a run's.
  fs::create_directories(dir / "other" / "parts");
  write_file(dir / "other" / "parts" / "00000.json", "{}");
  const Output refused = shell(clean(folder, dir / "other", kFlags + "--overwrite"));
  CHECK(refused.status == 1);
  CHECK_MESSAGE(contains(refused.text, "found parts/00000.json, which no run wrote"), refused.text);
  write_file(dir / "other" / "job.json", "{\"name\":\"mine\"}");
  CHECK(shell(clean(folder, dir / "other", kFlags + "--overwrite")).status == 1);
  CHECK(read_file(dir / "other" / "parts" / "00000.json") == "{}");
  // Files of the user's in a run.
  run_clean(folder, dir / "run");
  for (const char* name :
       {"notes.txt", "parts/20261126.txt", "parts/pairs-of-shoes", "parts/00000"})
    write_file(dir / "run" / name, "mine");
  run_clean(folder, dir / "run", " --preset none --overwrite");
  for (const char* name :
       {"notes.txt", "parts/20261126.txt", "parts/pairs-of-shoes", "parts/00000"})
    CHECK(read_file(dir / "run" / name) == "mine");
  CHECK(verdicts(dir / "run").size() == 10);
  // What the run reads is never inside of it, whatever flag names it.
  write_file(dir / "run" / "words.txt", "spam\n");
  const Output reads =
      shell(clean(folder, dir / "run",
                  kFlags + "--overwrite --banned-words " + (dir / "run" / "words.txt").string()));
  CHECK(reads.status == 1);
  CHECK_MESSAGE(contains(reads.text, "is or holds"), reads.text);
}

TEST_CASE("--overwrite is refused while others work, by schedulers' ranks and by locks") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 1, 10);
  const std::string overwrite = clean(folder, dir / "run", kFlags + "--overwrite");
  const Output ranks = shell("SLURM_PROCID=1 SLURM_NTASKS=2 " + overwrite);
  CHECK(ranks.status == 1);
  CHECK_MESSAGE(contains(ranks.text, "--overwrite: several processes"), ranks.text);
  CHECK(shell("SLURM_PROCID=0 SLURM_NTASKS=1 " + overwrite).status == 0);
  const Output busy = shell(concat("flock -s ", (dir / "run").string(), " ", overwrite));
  CHECK(busy.status == 1);
  CHECK_MESSAGE(contains(busy.text, "another process works on this run"), busy.text);
  CHECK(shell(clean(folder, dir / "new", kFlags + "--rank 3 --world-size 3")).status == 1);
}

TEST_CASE("status says how far a run is") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 4, 10);
  const std::string flags = kFlags + "--tasks 4 --threads 1 --save-seconds 0";
  CHECK(shell(concat("CAKE_EXIT_AT=45 ", clean(folder, dir / "run", flags))).status == kKilled);
  const Output during = shell(concat("./corpus status ", (dir / "run").string()));
  CHECK_MESSAGE(contains(during.text, " of 4 tasks finished, 0 running"), during.text);
  run_clean(folder, dir / "run", flags);
  const Output after = shell(concat("./corpus status ", (dir / "run").string()));
  CHECK_MESSAGE(contains(after.text, "4 of 4 tasks finished"), after.text);
  CHECK_MESSAGE(contains(after.text, "documents.jsonl.zst"), after.text);
  CHECK(contains(shell(concat("./corpus status ", dir.path().string())).text, "found no job.json"));
}

TEST_CASE("extract keeps the other members of a line, and html becomes text") {
  const TempDir dir;
  write_file(
      dir / "a.jsonl",
      R"({"html":"<html><body><article><p>Once there was a fox, and it ran over the hill.</p></article></body></html>","url":"https://a.example/","k":{"a":[1,2]},"id":"x"})"
      "\n");
  const Output o = shell(
      concat("./corpus extract ", (dir / "a.jsonl").string(), " -o ", (dir / "b.jsonl").string()));
  REQUIRE_MESSAGE(o.status == 0, o.text);
  const Json line = Json::parse(read_file(dir / "b.jsonl"));
  CHECK(line.at("text") == "Once there was a fox, and it ran over the hill.");
  CHECK(line.at("k").dump() == R"({"a":[1,2]})");
  CHECK(line.at("url") == "https://a.example/");
  CHECK(!line.contains("html"));
  write_file(dir / "c.jsonl", "{broken\n" + read_file(dir / "a.jsonl"));
  const std::string to_stdout = concat("./corpus extract ", (dir / "c.jsonl").string(), " -o -");
  CHECK(shell(to_stdout + " 2>/dev/null").text == read_file(dir / "b.jsonl"));
  CHECK(contains(shell(to_stdout + " >/dev/null").text, "not JSON: 1"));
}

TEST_CASE("a run says in one line what it cannot do, and leaves what is there") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 1, 10);
  const auto error = [&](const std::string& command, const std::string& part) {
    const Output o = shell(command);
    CHECK(o.status == 1);
    CHECK_MESSAGE(contains(o.text, part), o.text);
    CHECK_MESSAGE(std::count(o.text.begin(), o.text.end(), '\n') == 1, o.text);
  };
  run_clean(folder, dir / "run");
  write_file(dir / "file", "not a directory"), fs::create_directory(dir / "other");
  write_file(dir / "other" / "notes.txt", "not a run");
  error(clean(folder, dir / "run", " --preset none --min-words 11"), "settings.thresholds.");
  error(clean(folder, folder / "out"), "lies inside the input");
  error(clean(dir / "none", dir / "out"), "none");
  error(clean(folder, dir / "out", " --min-words many"),
        "--min-words: found many, expected a number or off");
  error(clean(folder / "000.jsonl", folder / "000.jsonl"), "is or holds");
  error(clean(folder, dir / "file"), "expected a directory");
  error(clean(folder, dir / "other"), "expected a new directory");
  error(concat("./corpus what-if ", folder.string()), "found no job.json");
  CHECK(!fs::exists(dir / "out"));
  const Output again = shell(clean(folder, dir / "run"));
  CHECK(again.status == 0);
  CHECK_MESSAGE(contains(again.text, "finished before"), again.text);
}

TEST_CASE("a full disk ends a run in one line, and the run goes on once there is room") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 2, 400);
  run_clean(folder, dir / "whole");
  const Output o = shell("ulimit -f 60; trap '' XFSZ; " + clean(folder, dir / "run"));
  CHECK(o.status == 1);
  CHECK_MESSAGE(contains(o.text, "cannot write"), o.text);
  CHECK(!fs::exists(dir / "run" / "documents.jsonl.zst"));
  run_clean(folder, dir / "run");
  CHECK(results(dir / "run") == results(dir / "whole"));
}

TEST_CASE("verdicts come back from their lines as they were") {
  Verdict v;
  v.place = {3, 1ull << 40};
  v.url = "https://a.example/?q=\"\\", v.id = "\x01\n", v.language = "en", v.match = "a:1: \"b\"";
  v.values.assign(measures().size(), std::numeric_limits<double>::quiet_NaN());
  const double numbers[] = {0, 1, .1, 1. / 3, 1e-300, 123456789, -2.5};
  for (size_t i = 0; i < v.values.size(); i += 2) v.values[i] = numbers[i / 2 % 7];
  v.bytes = 5, v.private_data = 2, v.begins = "caf\xc3\xa9";
  v.original = Place{1, 2};
  const std::string line = verdict_line(v);
  CHECK(verdict_line(parse_verdict(line, "here")) == line);
  v.original.reset(), v.rule = int(rules().size()) - 1, v.empty = true;
  const std::string dropped = verdict_line(v);
  CHECK(verdict_line(parse_verdict(dropped, "here")) == dropped);
  CHECK(parse_verdict(dropped, "here").reason() == rules().back().name);
  CHECK(parse_verdict(dropped, "here").empty);
  CHECK(contains(error_of([] { parse_verdict("{\"input\":1}", "v:1"); }),
                 "v:1: \"offset\" is missing"));
}

TEST_CASE("dedup applies no rule, and removes repeated passages where asked") {
  const TempDir dir;
  const std::string passage =
      "This passage of some eighty bytes stands in two documents that are not alike.";
  std::vector<std::string> texts = made_up_texts(40, 5);
  std::erase_if(texts, [](const std::string& text) { return text.size() < 200; });
  const std::vector<Json> lines = {{{"text", passage + " " + texts[0]}},
                                   {{"text", "x"}},
                                   {{"text", texts[1]}},
                                   {{"text", "x"}},
                                   {{"text", "Before. " + passage + " " + texts[2]}, {"k", 7}}};
  std::string text;
  for (const Json& line : lines) text += line.dump() + "\n";
  write_file(dir / "a.jsonl", text);
  const std::string command =
      concat("./corpus dedup ", (dir / "a.jsonl").string(), " -o ", (dir / "out").string());
  const Output o = shell(command + " --substrings 60");
  REQUIRE_MESSAGE(o.status == 0, o.text);
  const std::vector<Verdict> all = verdicts(dir / "out");
  REQUIRE(all.size() == 5);
  CHECK(all[3].reason() == "exact-duplicate");
  CHECK(all[4].reason() == "kept");
  CHECK(all[4].repeated_bytes >= int64_t(passage.size()));
  const std::vector<Json> kept = documents(dir / "out");
  REQUIRE(kept.size() == 4);
  CHECK(kept[0].at("text") == passage + " " + texts[0]);
  CHECK(kept[1].at("text") == "x");
  CHECK(!contains(kept[3].at("text"), "eighty"));
  CHECK(contains(kept[3].at("text"), "Before."));
  CHECK(kept[3].at("k") == 7);
  const Output if_ = shell(concat("./corpus what-if ", (dir / "out").string(), " --min-words 3"));
  CHECK(if_.status == 1);
  CHECK_MESSAGE(contains(if_.text, "it takes a new run"), if_.text);
}

TEST_CASE("decontamination drops what shares thirteen words, and shows them") {
  const TempDir dir;
  const std::string question =
      "How many brown foxes jump over the lazy dog when it sleeps in the sun all day long";
  write_file(dir / "eval.jsonl", concat("{\"question\":\"", question, "\"}\n"));
  write_file(dir / "a.jsonl",
             concat("{\"text\":\"Somebody asked: ", question, ", and nobody knew.\"}\n",
                    "{\"text\":\"How many brown foxes jump over the lazy dog? Nobody knew.\"}\n"));
  run_clean(
      dir / "a.jsonl", dir / "out",
      " --preset none --max-contamination 0 --decontaminate " + (dir / "eval.jsonl").string());
  const std::vector<Verdict> all = verdicts(dir / "out");
  REQUIRE(all.size() == 2);
  CHECK(all[0].reason() == "max-contamination");
  CHECK_MESSAGE(contains(all[0].match, "eval.jsonl:1: \"how many brown foxes"), all[0].match);
  CHECK(all[1].reason() == "kept");
}

TEST_CASE("a quality classifier is trained, applied, and is a rule of clean") {
  const TempDir dir;
  std::string good, bad, mixed;
  for (int i = 0; i < 200; i++) {
    good += concat("{\"text\":\"The river rose in spring, and the village number ", i,
                   " built a wall of stone.\"}\n");
    bad +=
        concat("{\"text\":\"buy cheap offer click number ", i, " now best price click deal\"}\n");
  }
  write_file(dir / "good.jsonl", good), write_file(dir / "bad.jsonl", bad);
  write_file(dir / "a.jsonl",
             "{\"text\":\"The river built a wall of stone in spring.\"}\n{\"text\":\"click cheap "
             "best offer price now\"}\n");
  const std::string model = dir / "model.bin", in = dir / "a.jsonl";
  const Output train =
      shell(concat("./corpus classify train --good ", (dir / "good.jsonl").string(), " --bad ",
                   (dir / "bad.jsonl").string(), " -o ", model));
  REQUIRE_MESSAGE(train.status == 0, train.text);
  const Output apply = shell(concat("./corpus classify apply ", model, " ", in,
                                    " --min-score .5 -o ", (dir / "b.jsonl").string()));
  REQUIRE_MESSAGE(apply.status == 0, apply.text);
  const Json line = Json::parse(read_file(dir / "b.jsonl"));
  CHECK(contains(line.at("text"), "river"));
  CHECK(line.at("quality").get<double>() > .5);
  run_clean(in, dir / "out", " --preset none --min-quality .5 --quality-model " + model);
  const std::vector<Verdict> all = verdicts(dir / "out");
  REQUIRE(all.size() == 2);
  CHECK(all[0].reason() == "kept");
  CHECK(all[1].reason() == "min-quality");
  const Output without = shell(clean(in, dir / "other", " --min-quality .5"));
  CHECK(without.status == 1);
  CHECK_MESSAGE(contains(without.text, "--min-quality: needs --quality-model"), without.text);
}

TEST_CASE("Ctrl+C saves and stops, and the same command goes on to the same bytes") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 20, 400);
  run_clean(folder, dir / "whole");
  const std::string flags = kFlags + "--threads 1 --tasks 20 --save-seconds 0";
  int status = 0;
  REQUIRE(interrupt(clean(folder, dir / "run", flags), dir / "run", 3, SIGINT, &status));
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 130);
  CHECK(!fs::exists(dir / "run" / "documents.jsonl.zst"));
  run_clean(folder, dir / "run", flags);
  CHECK(results(dir / "run") == results(dir / "whole"));
  // Between the small files of one task, too.
  const std::string one_task = kFlags + "--threads 1 --tasks 1 --save-seconds 0";
  REQUIRE(interrupt(clean(folder, dir / "one", one_task), dir / "one", 3, SIGINT, &status));
  CHECK(WEXITSTATUS(status) == 130);
  CHECK(fs::exists(dir / "one" / "parts" / "00000.saved"));
  run_clean(folder, dir / "one", one_task);
  CHECK(results(dir / "one") == results(dir / "whole"));
}

TEST_CASE("a process finds its rank where a scheduler says it") {
  const TempDir dir;
  const fs::path folder = made_up_folder(dir, 3, 10);
  const std::pair<std::string, std::string> ways[] = {
      {"SLURM_ARRAY_TASK_ID=5 SLURM_ARRAY_TASK_MIN=4 SLURM_ARRAY_TASK_COUNT=2",
       "rank 1 of 2, 3 tasks"},
      {"SLURM_PROCID=3 SLURM_NTASKS=4", "rank 3 of 4, 3 tasks"},
      {"OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=3", "rank 2 of 3, 3 tasks"},
      {"JOB_COMPLETION_INDEX=1", "rank 1 of ?, 3 tasks"},
      {"SLURM_PROCID=3 SLURM_NTASKS=4", "rank 0 of 7, 3 tasks"}};
  for (size_t i = 0; i < std::size(ways); i++) {
    const std::string flags = kFlags + "--tasks 3" + (i == 4 ? " --rank 0 --world-size 7" : "");
    const Output o = shell(ways[i].first + " " + clean(folder, dir / concat(i), flags));
    CHECK(o.status == 0);
    CHECK_MESSAGE(o.text.starts_with(ways[i].second + "\n"), o.text);
    if (i > 0) CHECK(results(dir / concat(i)) == results(dir / "0"));
  }
}
