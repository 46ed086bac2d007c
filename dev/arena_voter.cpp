// A voter that prefers by a rubric, over HTTP: what people do in the arena's page, by a program
// whose taste is known. dev/arena_test.sh trains on its votes.
//
//     arena_voter vote PORT --prompts FILE    POST /arena/battle -> answers to the next prompt
//                                             -> their true rewards (cake/rubric.h) -> ranks
//                                             -> POST /arena/vote
//     arena_voter table DIR                   what was learned from the votes, beside the targets
//
// It ranks answers by their true rewards without an error; equal rewards are a tie. An answer is
// good from a true reward of .75 on.
#include <httplib.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cake/flags.h"
#include "cake/json.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/verify.h"

namespace cake {
namespace {

constexpr double kGood = .75;
constexpr double kAccuracyAbove = .55;  // the lower end of the interval of the reward model's

// ---------------------------------------------------------------------------------------------
// Votes

struct VoteOptions {
  int port = 0, votes = 400, answers = 4, max_tokens = 160;
  std::string prompts, voter = "rubric";
};

// By the user's message.
std::map<std::string, Rubric> read_rubrics(const std::string& path) {
  std::map<std::string, Rubric> rubrics;
  std::istringstream lines(read_file(path));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = concat(path, ":", ++number);
    const Json json = parse_json(line, where);
    const Json messages = json_get<Json>(json, "messages", where);
    require(messages.is_array() && messages.size() == 1, where, ": messages: found ",
            json_text(messages), ", expected one message");
    rubrics[json_get<std::string>(messages[0], "content", where)] =
        parse_rubric(json_get<Json>(json, "rubric", where), where + ": rubric");
  }
  return rubrics;
}

Json post(httplib::Client& client, const std::string& path, const Json& body) {
  const httplib::Result reply = client.Post(path, body.dump(), "application/json");
  require(bool(reply), path, ": no reply: ", httplib::to_string(reply.error()));
  require(reply->status == 200, path, ": found status ", reply->status,
          ", expected 200: ", reply->body);
  return parse_json(reply->body, path);
}

int vote(const VoteOptions& o) {
  const std::map<std::string, Rubric> rubrics = read_rubrics(o.prompts);
  httplib::Client client("127.0.0.1", o.port);
  client.set_keep_alive(true);
  client.set_read_timeout(600);
  int votes = 0, same = 0;
  int64_t answers = 0, pairs = 0, decided = 0;
  double sum = 0;
  ProgressLine line;
  while (votes < o.votes) {
    const Json battle =
        post(client, "/arena/battle",
             {{"voter", o.voter}, {"answers", o.answers}, {"max_tokens", o.max_tokens}});
    if (battle.value("same", false)) {
      same++;
      continue;
    }
    const std::string prompt = battle.at("prompt").at(0).at("content");
    const auto rubric = rubrics.find(prompt);
    require(rubric != rubrics.end(), o.prompts, ": found no prompt ", json_text(Json(prompt)),
            ", which the arena asked for");
    std::vector<double> rewards;
    for (const Json& answer : battle.at("answers"))
      rewards.push_back(true_reward(rubric->second, answer.at("text").get<std::string>(),
                                    answer.at("finish") == "stop"));
    Json ranking = Json::array(), good = Json::array();
    for (const double r : rewards) {
      const auto better =
          std::count_if(rewards.begin(), rewards.end(), [&](double other) { return other > r; });
      ranking.push_back(1 + better), good.push_back(r >= kGood);
      sum += r, answers++, decided += better;
    }
    pairs += int64_t(rewards.size() * (rewards.size() - 1) / 2);
    post(client, "/arena/vote",
         {{"battle", battle.at("battle")},
          {"token", battle.at("token")},
          {"ranking", ranking},
          {"good", good}});
    votes++;
    line.show(format("vote %d/%d", votes, o.votes), votes == o.votes);
  }
  std::printf("%d votes on %s answers: %s of %s pairs decided; mean true reward %.3f\n", votes,
              count_text(double(answers)).c_str(), count_text(double(decided)).c_str(),
              count_text(double(pairs)).c_str(), sum / double(answers));
  if (same > 0) std::printf("%d prompts were left out: all answers were equal\n", same);
  return 0;
}

// ---------------------------------------------------------------------------------------------
// The table

struct Measured {
  double value = 0, low = 0, high = 0;
  int64_t n = 0;
};

// "true_reward" of ./chat eval's results.
Measured read_reward(const std::filesystem::path& path) {
  const std::string where = path.string();
  const Json task = json_get<Json>(read_json(path), "true_reward", where);
  const Json interval = json_get<Json>(task, "ci95", where);
  return {json_get<double>(task, "value", where), json_as<double>(interval.at(0), "ci95", where),
          json_as<double>(interval.at(1), "ci95", where), json_get<int64_t>(task, "n", where)};
}

bool print_row(const char* what, const Measured& m, const std::string& target, bool reached) {
  std::printf("%-44s %6.3f  %.3f to %.3f  %5lld  %-22s %s\n", what, m.value, m.low, m.high,
              (long long)m.n, target.c_str(),
              target.empty() ? ""
              : reached      ? "yes"
                             : "NO");
  return target.empty() || reached;
}

int table(const std::filesystem::path& dir) {
  const std::string where = (dir / "reward/summary.json").string();
  const Json summary = read_json(where);
  Measured accuracy{.value = json_get<double>(summary, "accuracy", where),
                    .n = json_get<int64_t>(summary, "pairs", where)};
  const Interval interval = wilson(accuracy.value, accuracy.n);
  accuracy.low = interval.low, accuracy.high = interval.high;
  const Measured before = read_reward(dir / "assistant.json"),
                 after = read_reward(dir / "dpo.json");
  std::printf("\n%-44s  value  95 %% interval      n  target                 reached\n", "");
  bool all =
      print_row("reward model: accuracy on held-out pairs", accuracy,
                format("lower end above %.2f", kAccuracyAbove), accuracy.low > kAccuracyAbove);
  print_row("assistant: true reward of held-out prompts", before, "", true);
  all &= print_row("DPO policy: the same", after, format("lower end above %.3f", before.high),
                   after.low > before.high);
  if (all) return 0;
  std::printf("\nerror: a target was missed\n");
  return 1;
}

// ---------------------------------------------------------------------------------------------
// Command line

int voter_main(int argc, char** argv) {
  CLI::App app(
      "A voter of the arena that prefers by a rubric, and what was learned from its votes");
  app.option_defaults()->always_capture_default();
  app.require_subcommand(1);
  VoteOptions o;
  CLI::App* voting = app.add_subcommand("vote", "ask for battles, and vote");
  voting->add_option("PORT", o.port, "of ./serve, on this machine")->required();
  voting->add_option("--prompts", o.prompts, "the file that ./serve has: messages and rubrics")
      ->required();
  voting->add_option("--votes", o.votes, "to cast");
  voting->add_option("--answers", o.answers, "to rank in each");
  voting->add_option("--max-tokens", o.max_tokens, "of an answer");
  voting->add_option("--voter", o.voter, "the name under which the votes are stored");
  std::string dir;
  CLI::App* telling =
      app.add_subcommand("table", "what was learned; status 1: a target was missed");
  telling->add_option("DIR", dir, "of dev/arena_test.sh")->required();
  if (!parse_flags(app, argc, argv,
                   {{voting, {"PORT", "--prompts", "--votes", "--answers"}}, {telling, {"DIR"}}}))
    return 0;
  return *voting ? vote(o) : table(dir);
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::voter_main(argc, argv); });
}
