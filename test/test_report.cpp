// The page that tells a run: what it says is what the run's files say, and nothing in them is
// markup.
#include <doctest/doctest.h>

#include <filesystem>
#include <regex>
#include <string>

#include "cake/json.h"
#include "cake/run.h"
#include "test/support.h"

using namespace cake;

namespace {

void write_stage(const std::filesystem::path& dir, const OrderedJson& summary,
                 const std::string& metrics, const OrderedJson& evaluation,
                 const std::string& answers) {
  std::filesystem::create_directories(dir);
  write_json(dir / "summary.json", summary);
  write_file(dir / "metrics.jsonl", metrics);
  if (!evaluation.empty()) write_json(dir / "evaluation.json", evaluation);
  if (!answers.empty()) write_file(dir / "answers.jsonl", answers);
}

OrderedJson cell(const char* metric, double value, double low, double high) {
  return {{"metric", metric}, {"value", value}, {"n", 500}, {"ci95", {low, high}}};
}

std::string answer(const char* prompt, const char* text, double reward) {
  return Json{{"task", "true_reward"}, {"item", "eval.jsonl:1"}, {"prompt", prompt},
              {"answer", text},        {"tools", Json::array()}, {"finish", "stop"},
              {"reward", reward}}
             .dump() +
         "\n";
}

// Two stages, whose texts would be markup in HTML and in Markdown.
void write_run(const std::filesystem::path& run) {
  const char* prompt =
      "<|im_start|>user\n<script>alert(1)</script>?<|im_end|>\n<|im_start|>assistant\n";
  write_stage(run / "sft", {{"steps", 3}, {"tokens", 4000}, {"seconds", 7}},
              "{\"step\":0,\"val_loss\":3}\n{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":1.5}\n"
              "{\"step\":2,\"val_loss\":2}\n",
              {{"true_reward", cell("reward", .5, .45, .55)},
               {"facts_often", cell("accuracy", .874, .842, .9)}},
              answer(prompt, "I & <b>you</b> ```", .25));
  write_stage(run / "grpo", {{"stage", "grpo"}, {"rollouts", 128}, {"tokens", 900}},
              "{\"step\":1,\"kind\":\"step\",\"reward\":0.25,\"loss\":1}\n"
              "{\"step\":2,\"kind\":\"step\",\"reward\":null,\"loss\":1}\n"
              "{\"step\":3,\"reward\":0.75,\"loss\":1}\n",
              {{"true_reward", cell("reward", .875, .86, .89)}},
              answer(prompt, "Once & for all", 1) + answer(prompt, "another sample", 0));
  write_json(run / "results.json", {{"seconds", {{"sft", 12.5}, {"grpo", 33.}}}});
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) n++;
  return n;
}

}  // namespace

TEST_CASE("a report says what the run's files say, on one page without other files") {
  const TempDir dir;
  write_run(dir.path());
  const Output out = shell("build/report " + dir.path().string() + " --title 'A <run>'");
  CAPTURE(out.text);
  REQUIRE(out.status == 0);
  const std::string html = read_file(dir / "report.html"), md = read_file(dir / "report.md");

  CHECK(contains(html, "<h1>A &lt;run&gt;</h1>"));
  CHECK(contains(html, "0.875 <small>(0.860 to 0.890)</small>"));
  CHECK(contains(html, "87.4 % <small>(84.2 to 90.0)</small>"));
  CHECK(contains(html, "<td class=\"number\">-</td>"));  // facts_often was not asked after grpo
  CHECK(contains(html, "128 rollouts"));
  CHECK(contains(html, "True reward") == false);  // there is no ppo to compare with sft
  CHECK(contains(md, "| grpo | 128 rollouts | 900 | 33 |"));
  CHECK(contains(md, "| true_reward | 0.500 (0.450 to 0.550) | 0.875 (0.860 to 0.890) |"));
  CHECK(contains(md, "| facts_often | 87.4 % (84.2 to 90.0) | - |"));

  // Texts are texts.
  CHECK(!contains(html, "<script"));
  CHECK(contains(html, "&lt;script&gt;alert(1)&lt;/script&gt;?</pre>"));
  CHECK(contains(html, "I &amp; &lt;b&gt;you&lt;/b&gt; ```"));
  CHECK(!contains(html, "im_start"));
  CHECK(contains(html, "reward 0.25"));
  CHECK(!contains(html, "another sample"));
  CHECK(contains(md, "````text\nI & <b>you</b> ```\n````\n"));
  CHECK(contains(md, "# A \\<run\\>\n"));
  // Nothing is fetched.
  for (const char* from : {"http", "src=", "href=", "url(", "@import"})
    CHECK(!contains(html, from));

  // Pictures: the loss of sft with what was held out, the reward of grpo and not its loss.
  CHECK(count(html, "<svg") == 2);
  CHECK(count(html, "</svg>") == 2);
  CHECK(contains(html, "sft: loss"));
  CHECK(contains(html, "grpo: reward"));
  CHECK(!contains(html, "grpo: loss"));
  CHECK(count(html, "<polyline") == 3);
  CHECK(count(html, "<circle") == 2);
  const std::regex points("points=\"([-0-9., ]+)\"");
  int lines = 0;
  for (std::sregex_iterator it(html.begin(), html.end(), points), end; it != end; ++it) lines++;
  CHECK(lines == 3);  // numbers alone: no nan
}

TEST_CASE("a report tells what was kept of the raw pages, and links to the corpus's own report") {
  const TempDir dir;
  write_run(dir.path());
  write_stage(dir / "base", {{"stage", "pretraining"}, {"tokens", 4096}}, "", {}, "");
  std::filesystem::create_directories(dir / "corpus");
  OrderedJson summary{{"documents", 12345},
                      {"kept", 9000},
                      {"html_bytes", 5'000'000},
                      {"kept_bytes", 812'000},
                      {"reasons", {{"kept", 9000}, {"min-words", 45}}}};
  summary["reasons"]["language-share"] = 3300;
  write_json(dir / "corpus/summary.json", summary);
  write_file(dir / "corpus/metrics.jsonl", "{\"step\":1,\"loss\":1}\n{\"step\":2,\"loss\":1}\n");
  REQUIRE(shell("build/report " + dir.path().string()).status == 0);
  std::string html = read_file(dir / "report.html");
  CHECK(contains(html, "Of 12,345 pages (5.0 MB of HTML) 9,000 were kept, 812.0 KB."));
  CHECK(contains(html, "Dropped: language-share 3,300, min-words 45."));
  CHECK(contains(html, "<td>corpus</td><td>12,345 raw pages</td>"));
  CHECK(contains(html, "<td>base</td><td>9,000 documents</td>"));
  CHECK(!contains(html, "Against the truth"));
  CHECK(!contains(html, "href="));  // there is no such file yet
  CHECK(!contains(html, "corpus: loss"));

  write_file(dir / "corpus/report.html", "<!doctype html>");
  OrderedJson truth{{"dirt_found", .9912}, {"clean_kept", .9965}, {"f1", .998}, {"kinds", {}}};
  truth["kinds"].push_back({{"kind", "<spam>"}, {"pages", 1416}, {"found", 1.}, {"kept", nullptr}});
  truth["kinds"].push_back({{"kind", "clean"}, {"pages", 22211}, {"kept", .9965}, {"f1", .998}});
  write_json(dir / "corpus/truth.json", truth);
  REQUIRE(shell("build/report " + dir.path().string()).status == 0);
  html = read_file(dir / "report.html");
  CHECK(contains(html,
                 "99.12 % of the dirt was found, 99.65 % of the clean pages were kept, and the "
                 "text of the kept pages has a word F1 of 0.9980."));
  CHECK(contains(html,
                 "<tr><td>&lt;spam&gt;</td><td class=\"number\">1,416</td><td class=\"number\">"
                 "100.00 %</td><td class=\"number\">-</td><td class=\"number\">-</td></tr>"));
  CHECK(contains(html, "<a href=\"corpus/report.html\">"));
  const std::string md = read_file(dir / "report.md");
  CHECK(contains(md, "| clean | 22,211 | - | 99.65 % | 0.9980 |\n"));
  CHECK(contains(md, "(corpus/report.html)"));

  truth.erase("f1");
  write_json(dir / "corpus/truth.json", truth);
  const Output out = shell("build/report " + dir.path().string());
  CHECK(out.status == 1);
  CHECK(contains(out.text, "corpus/truth.json: f1 is missing"));
}

TEST_CASE("runs of one kind share their pictures") {
  const TempDir dir;
  for (const char* name : {"from_base", "from_assistant"})
    write_stage(dir / name, {{"stage", "grpo"}},
                "{\"step\":1,\"reward\":0.25}\n{\"step\":2,\"reward\":0.5}\n", {}, "");
  REQUIRE(shell("build/report " + dir.path().string()).status == 0);
  const std::string html = read_file(dir / "report.html");
  CHECK(count(html, "<svg") == 1);
  CHECK(count(html, "<polyline") == 2);
  CHECK(contains(html, ">from_base</text>"));
  CHECK(contains(html, ">from_assistant</text>"));
}

TEST_CASE("a report of no run, or of damaged files, says which and why") {
  const TempDir dir;
  const std::string run = dir.path();
  const auto error = [&] {
    const Output out = shell("build/report " + run);
    CHECK(out.status == 1);
    CHECK(!std::filesystem::exists(dir / "report.html"));
    return out.text;
  };
  CHECK(contains(shell("build/report " + run + "/none").text, "none: found no directory"));
  CHECK(contains(error(), "found no stage, expected folders with a summary.json"));
  write_run(dir.path());
  write_file(dir / "sft/metrics.jsonl", "{\"step\": 1}\n{\"step\"\n");
  CHECK(contains(error(), "sft/metrics.jsonl:2: not JSON"));
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  write_file(dir / "sft/metrics.jsonl", "{\"step\": 1}\n" + deep + "\n");
  CHECK(contains(error(), "sft/metrics.jsonl:2: found more than 512 levels of brackets"));
  write_run(dir.path());
  write_file(dir / "grpo/evaluation.json", "{\"a\": {\"metric\": \"x\"}}");
  CHECK(contains(error(), "grpo/evaluation.json: a: value is missing"));
  write_run(dir.path());
  write_file(dir / "sft/answers.jsonl", "{\"item\": 1}\n");
  CHECK(contains(error(), "sft/answers.jsonl:1: item: found 1, expected a string"));
}
