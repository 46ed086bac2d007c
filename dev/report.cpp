// A run on one page: report.html and report.md, beside what they tell.
//
//     RUN/corpus/summary.json, truth.json     -> what was kept of the raw pages, and whether
//     rightly RUN/STAGE/summary.json, metrics.jsonl   -> the funnel of stages; curves, as pictures
//     RUN/STAGE/evaluation.json               -> the table, a column a stage, with intervals
//     RUN/STAGE/answers.jsonl                 -> what each stage answers to the same questions
//     RUN/results.json                        -> how long each stage took
//
// (chat eval --json writes evaluations, chat eval -o answers.) A stage is a folder of RUN that has
// a summary.json; what a stage lacks is left out. Stages of the same kind, two runs of grpo for
// instance, share their pictures, a line each. The page needs nothing but itself: pictures are SVG
// within it, and every text is escaped.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "cake/flags.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// What a run holds

struct Point {
  double step, value;
};
using Curve = std::vector<Point>;

struct Cell {  // of the evaluation
  std::string metric;
  double value = 0, low = 0, high = 0;
  int64_t n = 0;
};

struct Answered {
  std::string task, question, answer, mark;
};

struct Stage {
  std::string name, kind;  // kind: of the program that made it, "grpo"; else the name
  OrderedJson summary;
  std::map<std::string, Curve> curves;  // by the key in metrics.jsonl
  std::vector<std::string> tasks;       // in the file's order
  std::map<std::string, Cell> cells;
  std::map<std::string, Answered> answers;  // by the item
  std::vector<std::string> items;           // in the file's order
};

// What ./corpus clean kept, and how right that was where the truth is known (world score-corpus).
struct CorpusPart {
  bool there = false, has_report = false;
  int64_t documents = 0, kept = 0, html_bytes = 0, kept_bytes = 0;
  std::vector<std::pair<std::string, int64_t>> reasons;  // of what was dropped, most first
  OrderedJson truth;                                     // null: not known
};

struct Report {
  std::string title;
  CorpusPart corpus;
  std::vector<Stage> stages;
  OrderedJson seconds = OrderedJson::object();  // by stage, as the clock of the run had it
  Json world;                                   // world.json's "preferences", or null
  std::map<std::string, int64_t> rows;          // of files in world/
};

OrderedJson read_ordered(const std::filesystem::path& path) {
  return parse_json<OrderedJson>(read_file(path), path.string());
}

template <class Read>
void for_each_line(const std::filesystem::path& path, Read read) {
  std::istringstream lines(read_file(path));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = concat(path.string(), ":", ++number);
    if (line.empty()) continue;
    const Json json = parse_json(line, where);
    if (!json.is_object()) fail(where, ": found ", json_text(json), ", expected an object");
    read(json, where);
  }
}

// A prompt as its asker wrote it: the last user's turn of a template, or a document's text.
std::string question_in(std::string prompt) {
  static const std::string kTurn = "<|im_start|>user\n", kEnd = "<|im_end|>",
                           kDocument = "<|endoftext|>";
  const size_t turn = prompt.rfind(kTurn);
  if (turn != std::string::npos) {
    prompt = prompt.substr(turn + kTurn.size());
    return prompt.substr(0, prompt.find(kEnd));
  }
  return prompt.starts_with(kDocument) ? prompt.substr(kDocument.size()) : prompt;
}

void read_evaluation(const std::filesystem::path& path, Stage& stage) {
  const OrderedJson evaluation = read_ordered(path);
  for (const auto& [task, from] : evaluation.items()) {
    const Json json = Json::parse(from.dump());
    const std::string where = path.string() + ": " + task;
    Cell cell{json_get<std::string>(json, "metric", where), json_get<double>(json, "value", where)};
    cell.n = json_get<int64_t>(json, "n", where);
    if (!json.contains("ci95") || json["ci95"].size() != 2) fail(where, ": ci95 is missing");
    cell.low = json_as<double>(json["ci95"][0], "ci95", where);
    cell.high = json_as<double>(json["ci95"][1], "ci95", where);
    stage.tasks.push_back(task);
    stage.cells[task] = cell;
  }
}

void read_answers(const std::filesystem::path& path, Stage& stage) {
  for_each_line(path, [&](const Json& line, const std::string& where) {
    const auto item = json_get<std::string>(line, "item", where);
    if (stage.answers.count(item)) return;  // a further sample
    Answered a{json_get<std::string>(line, "task", where),
               question_in(json_get<std::string>(line, "prompt", where)),
               json_get<std::string>(line, "answer", where), ""};
    if (line.contains("reward")) {
      a.mark = format("reward %.2f", json_get<double>(line, "reward", where));
    } else {
      a.mark = json_get<bool>(line, "right", where) ? "right" : "wrong";
    }
    stage.items.push_back(item);
    stage.answers[item] = std::move(a);
  });
}

Stage read_stage(const std::filesystem::path& dir) {
  Stage stage{.name = dir.filename().string(), .summary = read_ordered(dir / "summary.json")};
  const auto kind = stage.summary.find("stage");
  stage.kind =
      kind != stage.summary.end() && kind->is_string() ? kind->get<std::string>() : stage.name;
  if (std::filesystem::exists(dir / "metrics.jsonl")) {
    for_each_line(dir / "metrics.jsonl", [&](const Json& line, const std::string& where) {
      const auto step = json_get<double>(line, "step", where);
      for (const auto& [key, value] : line.items())
        if (key != "step" && value.is_number())
          stage.curves[key].push_back({step, value.get<double>()});
    });
  }
  if (std::filesystem::exists(dir / "evaluation.json"))
    read_evaluation(dir / "evaluation.json", stage);
  if (std::filesystem::exists(dir / "answers.jsonl")) read_answers(dir / "answers.jsonl", stage);
  return stage;
}

CorpusPart read_corpus(const std::filesystem::path& dir) {
  const std::string where = (dir / "summary.json").string();
  const Json summary = read_json(where);
  CorpusPart corpus{.there = true, .has_report = std::filesystem::exists(dir / "report.html")};
  corpus.documents = json_get<int64_t>(summary, "documents", where);
  corpus.kept = json_get<int64_t>(summary, "kept", where);
  corpus.html_bytes = json_get<int64_t>(summary, "html_bytes", where);
  corpus.kept_bytes = json_get<int64_t>(summary, "kept_bytes", where);
  const Json reasons = json_get<Json>(summary, "reasons", where);
  for (const auto& [reason, count] : reasons.items())
    if (reason != "kept")
      corpus.reasons.emplace_back(reason, json_as<int64_t>(count, reason, where));
  std::stable_sort(corpus.reasons.begin(), corpus.reasons.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  if (std::filesystem::exists(dir / "truth.json")) {
    corpus.truth = read_ordered(dir / "truth.json");
    const std::string path = (dir / "truth.json").string();
    const Json truth = Json::parse(corpus.truth.dump());
    for (const char* key : {"dirt_found", "clean_kept", "f1"}) json_get<double>(truth, key, path);
    for (const Json& row : json_get<Json>(truth, "kinds", path)) {
      json_get<std::string>(row, "kind", path), json_get<int64_t>(row, "pages", path);
      for (const char* key : {"found", "kept", "f1"}) json_get_or<double>(row, key, 0, path);
    }
  }
  return corpus;
}

int64_t count_lines(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  return std::count(text.begin(), text.end(), '\n');
}

Report read_run(const std::filesystem::path& run, const std::string& title) {
  namespace fs = std::filesystem;
  Report report{.title = title};
  if (!fs::is_directory(run)) fail(run.string(), ": found no directory, expected one of a run");
  static const std::vector<std::string> kOrder = {"base", "sft", "reward", "dpo", "ppo", "grpo"};
  std::vector<std::pair<size_t, std::string>> names;
  for (const auto& entry : fs::directory_iterator(run)) {
    if (!fs::exists(entry.path() / "summary.json")) continue;
    const std::string name = entry.path().filename().string();
    if (name == "corpus") {
      report.corpus = read_corpus(entry.path());
      continue;
    }
    names.emplace_back(std::find(kOrder.begin(), kOrder.end(), name) - kOrder.begin(), name);
  }
  std::sort(names.begin(), names.end());
  if (names.empty()) {
    fail(run.string(), ": found no stage, expected folders with a summary.json");
  }
  for (const auto& [place, name] : names) report.stages.push_back(read_stage(run / name));
  if (fs::exists(run / "results.json")) {
    const OrderedJson results = read_ordered(run / "results.json");
    if (results.contains("seconds")) report.seconds = results["seconds"];
  }
  if (fs::exists(run / "world/world.json")) {
    const Json truth = read_json(run / "world/world.json");
    if (truth.contains("preferences")) report.world = truth["preferences"];
  }
  for (const char* file : {"documents", "conversations", "preferences", "prompts", "problems_rl"}) {
    const fs::path path = run / "world" / (std::string(file) + ".jsonl");
    if (fs::exists(path)) report.rows[file] = count_lines(path);
  }
  if (report.corpus.there) report.rows["documents"] = report.corpus.kept;
  return report;
}

// ---------------------------------------------------------------------------------------------
// Text

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// A cell of a table in Markdown, on one line; nothing in it is markup.
std::string escape_markdown(std::string_view text) {
  const auto letter = [&](size_t i) {
    return i < text.size() && std::isalnum(static_cast<unsigned char>(text[i]));
  };
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    const char c = text[i];
    if (c == '_' && letter(i - 1) && letter(i + 1)) {  // within a word: no markup
      out += c;
      continue;
    }
    if (std::string_view("\\`*_{}[]<>#|&~").find(c) != std::string_view::npos) out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

// Text as it is, in Markdown: fenced by more backticks than it has in a row.
std::string fenced(const std::string& text) {
  size_t most = 2, row = 0;
  for (const char c : text) {
    row = c == '`' ? row + 1 : 0;
    most = std::max(most, row);
  }
  const std::string fence(most + 1, '`');
  return fence + "text\n" + text + "\n" + fence + "\n";
}

std::string cell_text(const Cell& cell) {
  if (cell.metric == "bits_per_byte" || cell.metric == "reward")
    return format("%.3f (%.3f to %.3f)", cell.value, cell.low, cell.high);
  return format("%.1f %% (%.1f to %.1f)", 100 * cell.value, 100 * cell.low, 100 * cell.high);
}

std::optional<double> number(const OrderedJson& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number()) return std::nullopt;
  return it->get<double>();
}

// ---------------------------------------------------------------------------------------------
// What the page says, before it is HTML or Markdown

struct FunnelRow {
  std::string stage, reads;
  double rows = 0, tokens = 0, seconds = 0;  // 0: not known
};

std::vector<FunnelRow> funnel(const Report& r) {
  std::vector<FunnelRow> all;
  const auto rows_of = [&](const char* file) {
    const auto it = r.rows.find(file);
    return it == r.rows.end() ? 0. : double(it->second);
  };
  if (r.corpus.there)
    all.push_back({"corpus", "raw pages", double(r.corpus.documents), 0,
                   number(r.seconds, "corpus").value_or(0)});
  for (const Stage& s : r.stages) {
    FunnelRow row{.stage = s.name};
    row.tokens = number(s.summary, "tokens").value_or(0);
    if (s.kind == "base" || s.kind == "pretraining") {
      row.reads = "documents", row.rows = rows_of("documents");
    } else if (s.kind == "sft" || s.kind == "fine-tuning") {
      row.reads = "conversations", row.rows = rows_of("conversations");
    } else if (s.kind == "reward" || s.kind == "dpo") {
      row.reads = "comparisons", row.rows = number(s.summary, "prompts").value_or(0);
    } else {
      row.reads = "rollouts", row.rows = number(s.summary, "rollouts").value_or(0);
    }
    // A reward model's summary has no tokens; its steps have.
    if (const auto steps = s.curves.find("tokens"); row.tokens == 0 && steps != s.curves.end())
      for (const Point& p : steps->second) row.tokens += p.value;
    row.seconds =
        number(r.seconds, s.name.c_str()).value_or(number(s.summary, "seconds").value_or(0));
    all.push_back(row);
  }
  return all;
}

// What was to be shown, in a sentence each, where the figures are there.
std::vector<std::string> in_short(const Report& r) {
  std::vector<std::string> all;
  const auto stage = [&](const char* name) -> const Stage* {
    for (const Stage& s : r.stages)
      if (s.name == name) return &s;
    return nullptr;
  };
  const auto change = [&](const char* from, const char* to, const char* task, const char* what) {
    const Stage *a = stage(from), *b = stage(to);
    if (!a || !b || !a->cells.count(task) || !b->cells.count(task)) return;
    all.push_back(format("%s, %s to %s: %s, then %s.", what, from, to,
                         cell_text(a->cells.at(task)).c_str(),
                         cell_text(b->cells.at(task)).c_str()));
  };
  if (const Stage* s = stage("reward")) {
    std::string text;
    if (const auto accuracy = number(s->summary, "accuracy"))
      text = format("The reward model orders %.1f %% of the held-out pairs as the labellers did",
                    100 * *accuracy);
    if (!text.empty() && r.world.is_object() && r.world.contains("best_possible"))
      text += format("; their noise allows %.1f %%", 100 * r.world["best_possible"].get<double>());
    if (const auto longer = number(s->summary, "longer_wins"); longer && !text.empty())
      text += format("; choosing the longer, %.1f %%", 100 * *longer);
    if (!text.empty()) all.push_back(text + ".");
  }
  change("sft", "ppo", "true_reward", "True reward of open requests");
  if (const Stage* s = stage("ppo"))
    if (const auto kl = number(s->summary, "kl"))
      all.push_back(format("PPO went %.1f nats an answer away from the assistant (KL).", *kl));
  change("sft", "grpo", "word_problems_pass1", "Word problems solved, of 8 samples each");
  change("sft", "grpo", "word_problems_greedy", "The same, greedily");
  change("sft", "grpo", "share_with_steps", "Answers that show their steps");
  return all;
}

// The corpus in sentences, and its table of kinds of pages: a row a kind.
std::vector<std::string> corpus_sentences(const CorpusPart& c) {
  if (!c.there) return {};
  std::string dropped;
  for (const auto& [reason, count] : c.reasons)
    dropped += (dropped.empty() ? "" : ", ") + reason + " " + count_text(double(count));
  std::vector<std::string> all = {
      format("Of %s pages (%s of HTML) %s were kept, %s.", count_text(double(c.documents)).c_str(),
             bytes_text(double(c.html_bytes)).c_str(), count_text(double(c.kept)).c_str(),
             bytes_text(double(c.kept_bytes)).c_str())};
  if (!dropped.empty()) all.push_back("Dropped: " + dropped + ".");
  if (!c.truth.is_null()) {
    all.push_back(
        format("Against the truth: %.2f %% of the dirt was found, %.2f %% of the clean "
               "pages were kept, and the text of the kept pages has a word F1 of %.4f.",
               100 * c.truth["dirt_found"].get<double>(), 100 * c.truth["clean_kept"].get<double>(),
               c.truth["f1"].get<double>()));
  }
  return all;
}

std::vector<std::vector<std::string>> corpus_rows(const CorpusPart& c) {
  std::vector<std::vector<std::string>> rows;
  if (c.truth.is_null()) return rows;
  const auto percent = [](const OrderedJson& row, const char* key) {
    const auto share = number(row, key);
    return share ? format("%.2f %%", 100 * *share) : std::string("-");
  };
  for (const OrderedJson& row : c.truth["kinds"]) {
    const auto f1 = number(row, "f1");
    rows.push_back({row["kind"].get<std::string>(), count_text(row["pages"].get<double>()),
                    percent(row, "found"), percent(row, "kept"),
                    f1 ? format("%.4f", *f1) : std::string("-")});
  }
  return rows;
}

// Which curves are drawn, those that a kind of stage has. The first of a picture is drawn as a
// line, smoothed, the others as what was held out, with dots.
struct Picture {
  const char* title;
  std::vector<const char*> keys;
};
const std::vector<Picture> kPictures = {
    {"loss", {"loss", "val_loss"}},
    {"accuracy", {"accuracy", "val_accuracy"}},
    {"reward", {"reward", "val_reward"}},
    {"true reward, held out", {"val_gold"}},
    {"pass@1, held out", {"pass1"}},
    {"KL to the start, nats an answer", {"kl", "val_kl"}},
    {"tokens an answer", {"length", "val_length"}},
    {"entropy, nats a token", {"entropy"}},
};

struct Line {
  std::string label;
  Curve curve;
  bool dots = false;  // few points, held out
  size_t colour = 0;
};
struct Drawing {
  std::string kind, title;
  std::vector<Line> lines;
};

std::vector<Drawing> drawings(const Report& r) {
  std::vector<Drawing> all;
  std::vector<std::string> kinds;
  for (const Stage& s : r.stages)
    if (std::find(kinds.begin(), kinds.end(), s.kind) == kinds.end()) kinds.push_back(s.kind);
  for (const std::string& kind : kinds) {
    for (const Picture& picture : kPictures) {
      Drawing d{kind, picture.title, {}};
      size_t colour = 0;
      for (const Stage& s : r.stages) {
        if (s.kind != kind) continue;
        // The loss of a policy says nothing: its gradient alone is meant.
        if (std::string_view(picture.title) == "loss" && s.curves.count("reward")) continue;
        for (const char* key : picture.keys) {
          const auto curve = s.curves.find(key);
          if (curve == s.curves.end() || curve->second.size() < 2) continue;
          const bool held_out =
              std::string_view(key).starts_with("val_") || std::string_view(key) == "pass1";
          d.lines.push_back(
              {s.name + (held_out ? ", held out" : ""), curve->second, held_out, colour++});
        }
      }
      if (!d.lines.empty()) all.push_back(std::move(d));
    }
  }
  return all;
}

// Answers of each stage to the same questions, a few of a task.
struct Sample {
  std::string task, question;
  std::vector<std::pair<std::string, Answered>> answers;  // by stage
};
constexpr size_t kSamplesOfTask = 2;
const std::vector<std::string> kSampled = {
    "true_reward", "word_problems_pass1", "facts_often", "refuse_unknown", "context", "tools"};

std::vector<Sample> samples(const Report& r) {
  std::vector<Sample> all;
  const Stage* last = nullptr;
  for (const Stage& s : r.stages)
    if (!s.items.empty()) last = &s;
  if (!last) return all;
  for (const std::string& task : kSampled) {
    size_t taken = 0;
    for (const std::string& item : last->items) {
      const Answered& of_last = last->answers.at(item);
      if (of_last.task != task || taken == kSamplesOfTask) continue;
      Sample sample{task, of_last.question, {}};
      for (const Stage& s : r.stages)
        if (const auto a = s.answers.find(item); a != s.answers.end())
          sample.answers.emplace_back(s.name, a->second);
      all.push_back(std::move(sample)), taken++;
    }
  }
  return all;
}

// All tasks: the order of the first stage that has one, then what later stages add.
std::vector<std::string> all_tasks(const Report& r) {
  std::vector<std::string> tasks;
  for (auto s = r.stages.rbegin(); s != r.stages.rend(); ++s)
    for (const std::string& task : s->tasks)
      if (std::find(tasks.begin(), tasks.end(), task) == tasks.end()) tasks.push_back(task);
  return tasks;
}
std::vector<const Stage*> evaluated(const Report& r) {
  std::vector<const Stage*> stages;
  for (const Stage& s : r.stages)
    if (!s.cells.empty()) stages.push_back(&s);
  return stages;
}

// ---------------------------------------------------------------------------------------------
// Pictures

// Exponentially, over a twentieth of the curve; each value counts as much as it has weight left.
Curve smoothed(const Curve& curve) {
  const double keep = 1 - 1 / std::max(1., double(curve.size()) / 20);
  Curve out;
  double sum = 0, weight = 0;
  for (const Point& p : curve) {
    sum = keep * sum + p.value, weight = keep * weight + 1;
    out.push_back({p.step, sum / weight});
  }
  return out;
}

// At most `most` points: the mean of each stretch.
Curve thinned(const Curve& curve, size_t most) {
  if (curve.size() <= most) return curve;
  Curve out;
  for (size_t i = 0; i < most; i++) {
    const size_t begin = i * curve.size() / most, end = (i + 1) * curve.size() / most;
    Point mean{0, 0};
    for (size_t j = begin; j < end; j++)
      mean.step += curve[j].step / double(end - begin),
          mean.value += curve[j].value / double(end - begin);
    out.push_back(mean);
  }
  return out;
}

// The step between ticks, 1, 2 or 5 times a power of ten, for about four of them.
double tick_step(double range) {
  const double raw = range / 4, power = std::pow(10, std::floor(std::log10(raw)));
  const double times = raw / power;
  return power * (times < 1.5 ? 1 : times < 3.5 ? 2 : times < 7.5 ? 5 : 10);
}

constexpr double kWidth = 380, kHeight = 230, kLeft = 48, kRight = 8, kTop = 28, kBottom = 42;
const char* const kColours[] = {"#1f6fb2", "#d1662a", "#2d8a4e", "#8a4fb0", "#a2862a", "#444444"};

std::string svg(const Drawing& d) {
  double x0 = 1e300, x1 = -1e300, y0 = 1e300, y1 = -1e300;
  std::vector<Curve> curves;
  for (const Line& line : d.lines) {
    curves.push_back(line.dots ? line.curve : thinned(smoothed(line.curve), 300));
    for (const Point& p : curves.back()) {
      x0 = std::min(x0, p.step), x1 = std::max(x1, p.step);
      y0 = std::min(y0, p.value), y1 = std::max(y1, p.value);
    }
  }
  if (!(x1 > x0)) x1 = x0 + 1;
  if (!(y1 > y0)) y0 -= .5, y1 += .5;
  const double tick = tick_step(y1 - y0);
  y0 = std::floor(y0 / tick) * tick, y1 = std::ceil(y1 / tick) * tick;
  const auto x = [&](double step) {
    return kLeft + (step - x0) / (x1 - x0) * (kWidth - kLeft - kRight);
  };
  const auto y = [&](double value) {
    return kHeight - kBottom - (value - y0) / (y1 - y0) * (kHeight - kTop - kBottom);
  };
  const std::string name = escape_html(d.kind + ": " + d.title);
  std::string out = format(
      "<svg viewBox=\"0 0 %g %g\" width=\"%g\" height=\"%g\" role=\"img\" "
      "aria-label=\"%s\">\n<text x=\"0\" y=\"14\" class=\"title\">%s</text>\n",
      kWidth, kHeight, kWidth, kHeight, name.c_str(), name.c_str());
  for (double v = y0; v <= y1 + tick / 2; v += tick) {
    out += format(
        "<line x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\" class=\"grid\"/>"
        "<text x=\"%g\" y=\"%.1f\" class=\"tick\" text-anchor=\"end\">%.4g</text>\n",
        kLeft, kWidth - kRight, y(v), y(v), kLeft - 5, y(v) + 4,
        std::fabs(v) < tick / 1e6 ? 0. : v);
  }
  for (const double step : {x0, x1}) {
    out += format("<text x=\"%.1f\" y=\"%g\" class=\"tick\" text-anchor=\"%s\">%s %.0f</text>\n",
                  x(step), kHeight - kBottom + 15, step == x0 ? "start" : "end", "step", step);
  }
  double label_x = kLeft;
  for (size_t i = 0; i < curves.size(); i++) {
    const Line& line = d.lines[i];
    const char* colour = kColours[line.colour % std::size(kColours)];
    std::string points;
    for (const Point& p : curves[i]) points += format("%.1f,%.1f ", x(p.step), y(p.value));
    out += format("<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\"%s/>\n",
                  points.c_str(), colour, line.dots ? " stroke-dasharray=\"3 3\"" : "");
    for (const Point& p : curves[i])
      if (line.dots)
        out += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.6\" fill=\"%s\"/>", x(p.step),
                      y(p.value), colour);
    const std::string label = escape_html(line.label);
    out += format("\n<text x=\"%.0f\" y=\"%g\" class=\"tick\" fill=\"%s\">%s</text>\n", label_x,
                  kHeight - 8, colour, label.c_str());
    label_x += 14 + 6.2 * double(line.label.size());
  }
  return out + "</svg>\n";
}

// A curve as a row of blocks, for Markdown.
std::string sparkline(const Curve& curve) {
  static const char* const kBlocks[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  const Curve few = thinned(smoothed(curve), 24);
  double low = 1e300, high = -1e300;
  for (const Point& p : few) low = std::min(low, p.value), high = std::max(high, p.value);
  std::string out;
  for (const Point& p : few)
    out += kBlocks[high > low ? size_t(7.999 * (p.value - low) / (high - low)) : 0];
  return out;
}

// ---------------------------------------------------------------------------------------------
// HTML

constexpr const char* kStyle = R"(
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 62em;
       margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td small { color: #777; }
.bar { background: #1f6fb2; height: .7em; min-width: 1px; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2em; }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg .title { font-size: 13px; font-weight: 600; fill: #222; }
svg .grid { stroke: #e4e4e4; } svg .tick { font-size: 10.5px; }
pre { white-space: pre-wrap; margin: 0; font: 13px/1.4 ui-monospace, monospace; }
.right { color: #2d8a4e; } .wrong { color: #b03030; }
)";

std::string html_table(const Report& r) {
  const std::vector<const Stage*> stages = evaluated(r);
  if (stages.empty()) return "";
  std::string out =
      "<h2>What each stage can do</h2>\n<p>95 % intervals in brackets.</p>\n<table>\n<tr>"
      "<th>task</th><th>metric</th>";
  for (const Stage* s : stages) out += "<th>" + escape_html(s->name) + "</th>";
  out += "<th>items</th></tr>\n";
  for (const std::string& task : all_tasks(r)) {
    std::string metric, cells;
    int64_t n = 0;
    for (const Stage* s : stages) {
      const auto cell = s->cells.find(task);
      if (cell == s->cells.end()) {
        cells += "<td class=\"number\">-</td>";
        continue;
      }
      metric = cell->second.metric, n = cell->second.n;
      const std::string text = cell_text(cell->second);
      const size_t interval = text.find('(');
      cells += "<td class=\"number\">" + text.substr(0, interval) + "<small>" +
               text.substr(interval) + "</small></td>";
    }
    out += "<tr><td>" + escape_html(task) + "</td><td>" + escape_html(metric) + "</td>" + cells +
           format("<td class=\"number\">%lld</td></tr>\n", (long long)n);
  }
  return out + "</table>\n";
}

std::string html_samples(const Report& r) {
  std::string out;
  for (const Sample& sample : samples(r)) {
    out += "<h3>" + escape_html(sample.task) + "</h3>\n<pre>" + escape_html(sample.question) +
           "</pre>\n<table>\n";
    for (const auto& [stage, answer] : sample.answers) {
      out +=
          "<tr><th>" + escape_html(stage) + "</th><td><pre>" + escape_html(answer.answer) +
          "</pre></td><td class=\"" +
          (answer.mark == "right" || answer.mark == "wrong" ? answer.mark : std::string("number")) +
          "\">" + escape_html(answer.mark) + "</td></tr>\n";
    }
    out += "</table>\n";
  }
  return out.empty() ? out : "<h2>Before and after</h2>\n" + out;
}

std::string html_corpus(const CorpusPart& c) {
  if (!c.there) return "";
  std::string out = "<h2>The corpus</h2>\n";
  for (const std::string& sentence : corpus_sentences(c))
    out += "<p>" + escape_html(sentence) + "</p>\n";
  const auto rows = corpus_rows(c);
  if (!rows.empty()) {
    out +=
        "<table>\n<tr><th>pages</th><th>number</th><th>dirt found</th><th>kept</th>"
        "<th>word F1</th></tr>\n";
    for (const auto& row : rows) {
      out += "<tr>";
      for (const std::string& cell : row)
        out += (&cell == &row[0] ? "<td>" : "<td class=\"number\">") + escape_html(cell) + "</td>";
      out += "</tr>\n";
    }
    out += "</table>\n";
  }
  if (c.has_report)
    out += "<p><a href=\"corpus/report.html\">What each rule dropped and kept</a></p>\n";
  return out;
}

std::string html(const Report& r) {
  std::string out =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width\">\n<title>" +
      escape_html(r.title) + "</title>\n<style>" + kStyle + "</style>\n</head>\n" + "<body>\n<h1>" +
      escape_html(r.title) + "</h1>\n";
  std::string list;
  for (const std::string& sentence : in_short(r))
    list += "<li>" + escape_html(sentence) + "</li>\n";
  if (!list.empty()) out += "<ul>\n" + list + "</ul>\n";

  const std::vector<FunnelRow> rows = funnel(r);
  double most = 0;
  for (const FunnelRow& row : rows) most = std::max(most, row.tokens);
  out +=
      "<h2>The stages</h2>\n<table>\n<tr><th>stage</th><th>learns from</th><th>tokens</th>"
      "<th></th><th>seconds</th></tr>\n";
  for (const FunnelRow& row : rows) {
    out += "<tr><td>" + escape_html(row.stage) + "</td><td>" +
           (row.rows > 0 ? escape_html(count_text(row.rows)) + " " : "") + escape_html(row.reads) +
           "</td><td class=\"number\">" + (row.tokens > 0 ? count_text(row.tokens) : "-") +
           format(
               "</td><td style=\"width: 14em\"><div class=\"bar\" style=\"width: %.1f%%\"></div>"
               "</td><td class=\"number\">%.0f</td></tr>\n",
               most > 0 ? 100 * row.tokens / most : 0, row.seconds);
  }
  out += "</table>\n" + html_corpus(r.corpus);

  const std::vector<Drawing> all = drawings(r);
  if (!all.empty()) {
    out += "<h2>Curves</h2>\n<div class=\"pictures\">\n";
    for (const Drawing& d : all) out += svg(d);
    out += "</div>\n";
  }
  return out + html_table(r) + html_samples(r) + "</body>\n</html>\n";
}

// ---------------------------------------------------------------------------------------------
// Markdown

std::string markdown(const Report& r) {
  std::string out = "# " + escape_markdown(r.title) + "\n\n";
  for (const std::string& sentence : in_short(r)) out += "- " + escape_markdown(sentence) + "\n";
  out +=
      "\n## The stages\n\n| stage | learns from | tokens | seconds |\n| --- | --- | ---: | ---: "
      "|\n";
  for (const FunnelRow& row : funnel(r)) {
    out += "| " + escape_markdown(row.stage) + " | " +
           (row.rows > 0 ? count_text(row.rows) + " " : "") + row.reads + " | " +
           (row.tokens > 0 ? count_text(row.tokens) : "-") + format(" | %.0f |\n", row.seconds);
  }
  if (r.corpus.there) out += "\n## The corpus\n";
  for (const std::string& sentence : corpus_sentences(r.corpus))
    out += "\n" + escape_markdown(sentence) + "\n";
  if (const auto rows = corpus_rows(r.corpus); !rows.empty()) {
    out +=
        "\n| pages | number | dirt found | kept | word F1 |\n| --- | ---: | ---: | ---: | ---: |\n";
    for (const auto& row : rows) {
      for (const std::string& cell : row) out += "| " + escape_markdown(cell) + " ";
      out += "|\n";
    }
  }
  if (r.corpus.has_report) out += "\n[What each rule dropped and kept](corpus/report.html)\n";
  const std::vector<Drawing> all = drawings(r);
  if (!all.empty()) {
    out += "\n## Curves\n\n| stage | | first | | last |\n| --- | --- | ---: | --- | ---: |\n";
    for (const Drawing& d : all) {
      for (const Line& line : d.lines) {
        const Curve curve = line.dots ? line.curve : smoothed(line.curve);
        if (curve.empty()) continue;
        out += "| " + escape_markdown(line.label) + " | " + escape_markdown(d.title) +
               format(" | %.4g | ", curve.front().value) + sparkline(line.curve) +
               format(" | %.4g |\n", curve.back().value);
      }
    }
  }
  const std::vector<const Stage*> stages = evaluated(r);
  if (!stages.empty()) {
    std::string head = "| task |", rule = "| --- |";
    for (const Stage* s : stages) head += " " + escape_markdown(s->name) + " |", rule += " ---: |";
    out += "\n## What each stage can do\n\n95 % intervals in brackets.\n\n" + head + "\n" + rule +
           "\n";
    for (const std::string& task : all_tasks(r)) {
      out += "| " + escape_markdown(task) + " |";
      for (const Stage* s : stages) {
        const auto cell = s->cells.find(task);
        out += cell == s->cells.end() ? " - |" : " " + cell_text(cell->second) + " |";
      }
      out += "\n";
    }
  }
  const std::vector<Sample> asked = samples(r);
  if (!asked.empty()) out += "\n## Before and after\n";
  for (const Sample& sample : asked) {
    out += "\n### " + escape_markdown(sample.task) + "\n\n" + fenced(sample.question);
    for (const auto& [stage, answer] : sample.answers)
      out += "\n" + escape_markdown(stage) + " (" + answer.mark + "):\n\n" + fenced(answer.answer);
  }
  return out;
}

// ---------------------------------------------------------------------------------------------
// The command line

int report_main(int argc, char** argv) {
  CLI::App app("Tells a run on one page, RUN/report.html, and the same as RUN/report.md.");
  std::string run, title;
  app.add_option("RUN", run, "folder of a run: its stages are the folders with a summary.json")
      ->required();
  app.add_option("--title", title, "of the page (default: the folder's name)");
  if (!parse_flags(app, argc, argv, {{&app, {"RUN", "--title"}}})) return 0;
  const std::filesystem::path dir = run;
  if (title.empty()) title = std::filesystem::absolute(dir / ".").parent_path().filename().string();
  const Report report = read_run(dir, title);
  write_file(dir / "report.html", html(report));
  write_file(dir / "report.md", markdown(report));
  std::printf("%s and report.md: %zu stages\n", (dir / "report.html").c_str(),
              report.stages.size());
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::report_main(argc, argv); });
}
