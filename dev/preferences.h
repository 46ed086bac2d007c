// The world's preferences: open requests, answers of every quality, and labellers who compare them
// by a true reward that is known. The third part of dev/world.cpp, which alone includes it.
//
//     a cast, a phrasing -> OpenRequest: the request and its rubric (cake/rubric.h)
//                        -> answers, as an assistant gives them that was taught stories of every
//                           quality, and as reinforcement learning may ruin them
//                        -> utility = true reward + length bias * words / 10
//                        -> ranking: utility + noise * Gumbel, the largest first
//
//     DIR/prompts.jsonl, prompts_heldout.jsonl   {"messages","rubric"}
//     DIR/preferences.jsonl           pairs, {"prompt","chosen","rejected"}, and of four,
//                                     {"prompt","responses","ranking"}
//     DIR/preferences_heldout.jsonl   pairs with their "chance": how likely it was that the
//                                     labellers chose so
//     DIR/world.json                  "preferences": the noise, and the best possible accuracy
//
// Rankings by utilities with Gumbel noise are Plackett and Luce's (Plackett 1975), and any two of a
// ranking's answers are ordered as Bradley and Terry have it (1952): P(a before b) =
// s((U_a - U_b) / noise), s the logistic function. Who knows every utility, and answers by the
// larger, agrees with the labellers in the mean of max(P, 1 - P): no reward model does better.
//
// A cast (a name and an animal) is in training or held out, never both.
#pragma once

namespace cake::world {
namespace {

// ---------------------------------------------------------------------------------------------
// Requests

bool held_out_cast(const std::string& name, const std::string& animal) {
  return mix64(0xca57, hash64(name), hash64(animal)) % 3 == 0;
}

// Weights: what was asked for counts most. A story with three to six events has 30 to 60 words.
Rubric story_rubric(const Slots& asked) {
  using Kind = Criterion::Kind;
  Words manners;
  for (const std::string& m : kStoryManners) manners.push_back(m.substr(0, m.size() - 1));
  return {{Kind::mentions, 3, {asked.at('n'), asked.at('b')}},
          {Kind::begins, 1, manners},
          {Kind::ends, 2, {"in the end", "they went home", "are friends"}},
          {Kind::varied, 2, {}},
          {Kind::length, 2, {}, 30, 60}};
}

struct CastRequest {
  Slots asked;
  OpenRequest request;
};

// Every cast of the part in every phrasing, shuffled.
std::vector<CastRequest> all_requests(Rng& rng, bool held_out, const Words& phrasings) {
  std::vector<CastRequest> all;
  for (const std::string& name : kFirstNames) {
    for (const std::string& animal : kAnimals) {
      if (held_out_cast(name, animal) != held_out) continue;
      const Slots asked{{'n', name}, {'b', animal}};
      for (const std::string& phrasing : phrasings)
        all.push_back({asked, {fill(phrasing, asked), story_rubric(asked)}});
    }
  }
  shuffle(rng, all);
  return all;
}

std::vector<OpenRequest> requests_of(const std::vector<CastRequest>& all) {
  std::vector<OpenRequest> requests;
  for (const CastRequest& r : all) requests.push_back(r.request);
  return requests;
}

// ---------------------------------------------------------------------------------------------
// Answers

constexpr double kRuined = .2;  // of the answers

std::string first_sentence(const std::string& text) { return text.substr(0, text.find('.') + 1); }

// What a policy in training does to a story sooner or later.
std::string ruin(Rng& rng, const std::string& story) {
  switch (rng.below(4)) {
    case 0:  // cut off within a word or behind one
      return story.substr(0, size_t(between(rng, 8, int(story.size()) - 2)));
    case 1: {  // one sentence without end
      std::string text = first_sentence(story);
      for (int i = between(rng, 2, 8); i > 0; i--) text += " " + first_sentence(story);
      return text;
    }
    case 2:  // the same again
      return story + " " + story;
    default:  // no story at all
      return chance(rng, .5) ? kDontKnow : first_sentence(story);
  }
}

std::string draw_answer(Rng& rng, const Slots& asked) {
  const int quality = int(rng.below(kVirtues.size() + 1));
  const std::string story = tell_story(rng, asked, draw_virtues(rng, quality));
  return chance(rng, kRuined) ? ruin(rng, story) : story;
}

// `count` answers to the request of which no two are the same, and their ranks.
Judgement judge(Rng& rng, const CastRequest& of, int count, const PreferenceOptions& options) {
  Judgement j{of.request, {}, {}};
  std::vector<double> felt;
  while (int(j.answers.size()) < count) {
    const std::string answer = draw_answer(rng, of.asked);
    if (std::count(j.answers.begin(), j.answers.end(), answer)) continue;
    felt.push_back(labellers_utility(of.request, answer, options.length_bias) -
                   options.noise * std::log(-std::log(rng.uniform())));
    j.answers.push_back(answer);
  }
  for (const double mine : felt)
    j.ranking.push_back(
        1 + int(std::count_if(felt.begin(), felt.end(), [&](double x) { return x > mine; })));
  return j;
}

std::vector<Judgement> judge_all(Rng& rng, const std::vector<CastRequest>& requests, int pairs,
                                 int rankings, const PreferenceOptions& options) {
  std::vector<Judgement> all;
  for (int i = 0; i < pairs + rankings; i++)
    all.push_back(judge(rng, pick(rng, requests), i < pairs ? 2 : kRanked, options));
  shuffle(rng, all);
  return all;
}

}  // namespace

double labellers_utility(const OpenRequest& request, const std::string& answer,
                         double length_bias) {
  return true_reward(request.rubric, answer, true) +
         length_bias * double(words_in(lower_ascii(answer), "'").size()) / 10;
}

double chance_of_preference(double utility, double other, double noise) {
  return 1 / (1 + std::exp((other - utility) / noise));
}

Preferences make_preferences(const World& world, const PreferenceOptions& options) {
  if (!(options.noise > 0)) fail("--noise: found ", options.noise, ", expected more than 0");
  if (!(options.length_bias >= 0)) {
    fail("--length-bias: found ", options.length_bias, ", expected 0 or more");
  }
  // The same requests and answers for any noise and bias: labellers alone differ.
  Rng rng{mix64(world.options.seed, hash64("preferences"))};
  const std::vector<CastRequest> training = all_requests(rng, false, kStoryRequests.training),
                                 held_out = all_requests(rng, true, kStoryRequests.training);
  Preferences p;
  p.prompts = requests_of(training);
  p.prompts_held_out = requests_of(all_requests(rng, true, kStoryRequests.tests));
  p.held_out = judge_all(rng, held_out, kHeldOutPairs, 0, options);
  p.training = judge_all(rng, training, options.pairs, options.rankings, options);
  for (const Judgement& j : p.held_out) {
    const auto utility = [&](size_t i) {
      return labellers_utility(j.request, j.answers[i], options.length_bias);
    };
    const double chosen = chance_of_preference(utility(0), utility(1), options.noise);
    p.best_possible += std::max(chosen, 1 - chosen) / double(p.held_out.size());
  }
  return p;
}

// ---------------------------------------------------------------------------------------------
// Evaluations of what reinforcement learning is for. The problems are asked plainly: whether the
// answer has steps is the model's choice.

constexpr const char* kStepsMark = "Steps:";  // what an answer with steps has

std::vector<Item> make_open_items(const World& world, const std::vector<WordProblem>& problems) {
  std::vector<Item> items;
  const Preferences p = make_preferences(world, {.pairs = 0, .rankings = 0});
  for (size_t i = 0; i < std::min(p.prompts_held_out.size(), kItems); i++) {
    Item item = item_of({p.prompts_held_out[i].user, "", {}, "", {}});
    item.task = "true_reward", item.rubric = p.prompts_held_out[i].rubric;
    items.push_back(std::move(item));
  }
  for (const int samples : {8, 0}) {
    for (size_t i = 0; i < std::min(problems.size(), kItems); i++) {
      const auto& [question, answer, difficulty] = problems[i];
      Item item = item_of(
          {question, "Answer: " + answer + ".", number(answer), question + "\n", {kAnswerEnd}});
      item.task = samples > 0 ? "word_problems_pass1" : "word_problems_greedy";
      item.samples = samples;
      items.push_back(std::move(item));
    }
  }
  return items;
}

}  // namespace cake::world
