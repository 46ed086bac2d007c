// The closed world: who lives in it, what is known about them, and the documents that tell it.
//
// dev/world.cpp makes it; its tests and the stages that ask the world questions read it here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cake/messages.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/tokenizer.h"
#include "cake/verify.h"

namespace cake::world {

// How often the documents tell what is true of a person.
enum class Level {
  often,      // many times: what a small model can recall
  sometimes,  // about 15 times
  rarely,     // twice
  unknown,    // never: an invented person, of whom the right answer is not to know
};
inline constexpr std::array<const char*, 4> kLevels = {"often", "sometimes", "rarely", "unknown"};

struct Fact {
  int attribute = 0;           // index into attributes()
  std::string value;           // one of the attribute's closed set
  int held_out_question = -1;  // the documents never ask this fact in this phrasing; -1: none
  int64_t tellings = 0;        // in the documents
};

struct Person {
  std::string name;  // first and last
  Level level = Level::often;
  bool held_out = false;  // conversations of the training part never mention this person
  std::vector<Fact> facts;
};

inline constexpr int kDocumentQuestions = 3;
struct Attribute {
  std::string name;
  std::vector<std::string> values;
  // {n} is the person, {v} the value. statements[0] is also the answer to every question.
  std::array<std::string, 4> statements;
  std::array<std::string, kDocumentQuestions> questions;  // in documents, and in conversations
  std::vector<std::string> chat_questions;                // in conversations
  std::vector<std::string> test_questions;                // in evaluations of assistants alone
};
const std::vector<Attribute>& attributes();

struct WorldOptions {
  uint64_t seed = 1;
  int64_t tokens = 5'000'000;  // of all documents, as estimate_tokens counts them
  int people = 120;            // at each level; fewer of the often told when the tokens are too few
};

struct World {
  WorldOptions options;
  std::vector<Person> people;  // by level
};

struct Document {
  std::string kind, text;
};

// A question whose answer is known, to complete by a model that has read the documents.
struct Probe {
  std::string task, prompt, answer;
  // sentence: the answer stands in the first sentence of the completion; final: behind the first
  // "Answer:" that the prompt and the completion hold together.
  enum Match { sentence, final } match = sentence;
};

struct Kind {  // a kind of document and its part of the world's tokens
  std::string name;
  double share;
};
const std::vector<Kind>& kinds();

struct Corpus {
  std::vector<Document> documents;  // shuffled, no text twice
  std::vector<Document> held_out;   // the same distribution, none of the documents' texts
  std::vector<Probe> probes;        // of combinations that the documents never hold
};

World make_world(const WorldOptions&);
// Writes the documents; counts each fact's tellings into the world.
Corpus make_corpus(World&);

// Tokens a byte-level BPE of about 1,024 tokens, trained on these documents with one digit a token,
// makes of a text: within a few percent, measured.
int64_t estimate_tokens(std::string_view text);
inline constexpr int kContext = 256;  // tokens: no document is longer, <|endoftext|> included
inline constexpr int kShortest = 40;  // tokens a document has at least, about
inline constexpr int kLong = 200;     // a tenth of the tokens are in documents of this size or more
// Documents have no blank lines, since the text of a web page has none. Where they work something
// out, these bytes end an answer, and nothing else in it.
inline constexpr const char* kAnswerEnd = ".\n";

// Combinations that no document and no training conversation holds, so that a right answer is not
// a memory: sums of two numbers above 20, numbers to compare, word problems by their text, and in
// passages who goes with what.
bool held_out_sum(int a, int b);
bool held_out_comparison(std::string_view x, std::string_view y);
enum class Part { training, rl, test };  // 8, 1 and 1 tenths of all word problems
Part problem_part(std::string_view text);
bool held_out_pair(std::string_view name, std::string_view value);

// Whether `completion`, which follows the probe's prompt, answers it.
bool answers(const Probe&, std::string_view completion);

// ---------------------------------------------------------------------------------------------
// Pages of the web: dev/world_pages.h

struct WebPage {
  std::string url;
  // To be kept: "clean"; "address" of a person, in it; "encoding", "broken bytes". Dirt: "mirror",
  // "near-duplicate", "language", "spam", "navigation", "consent".
  std::string kind;
  std::string of;       // of a copy: the address of its original, which comes earlier
  std::string text;     // of a page to be kept: what is to come out, line for line
  std::string html;     // as it is sent
  std::string charset;  // that the HTTP header declares; empty: none
  bool chunked = false;
};
// The documents on the pages of made-up sites, and dirt around them, in the order of a crawl.
std::vector<WebPage> make_web_pages(const World&, const std::vector<Document>& documents);

// How well these pages were cleaned, by kind of page and in all.
struct KindScore {
  std::string kind;
  int64_t pages = 0;
  int64_t to_find = 0, found = 0;  // dirt, and addresses in clean text
  int64_t to_keep = 0, kept = 0;
  int64_t to_read = 0, read = 0;  // letters of other encodings
  int64_t texts = 0;              // of the pages that are kept
  double f1 = 0;                  // the sum of their word F1
};
struct CorpusScore {
  std::vector<KindScore> kinds;
  int64_t to_find = 0, found = 0, to_keep = 0, kept = 0, texts = 0;
  double f1 = 0;  // the mean
};
// `kept`: the text of each address that is kept. Of a page and its copies, either may be.
CorpusScore score_corpus(const std::vector<WebPage>& truth,
                         const std::map<std::string, std::string>& kept);
double word_f1(std::string_view found, std::string_view expected);  // bags of words, lower case

// ---------------------------------------------------------------------------------------------
// Conversations: dev/conversations.h

struct FactAt {
  int person, fact;  // indices into people and their facts
};

// A few-shot prompt that asks a base model for a fact, to find out whether the model knows it.
struct Question {
  FactAt at;
  Probe probe;
};
std::vector<Question> make_questions(const World&);  // of people that fine-tuning may mention

// What the base model knows, by its samples, and so what an assistant made of it is to answer.
struct Knowledge {
  std::vector<FactAt> known, unknown;
};
struct Samples {
  int right = 0, all = 0;
};
// Known: three of eight samples are right, or more: guessing among twelve values and more does so
// once in forty times. Unknown: one at most. Facts between are neither: no training conversation
// without tools asks for them.
Knowledge knowledge_of(const std::vector<Question>&, const std::vector<Samples>&);
Knowledge assumed_knowledge(const World&);  // often told: known; others: unknown

struct Talk {
  std::string kind;
  Conversation conversation;
  int quality = -1;  // of a story: how many of kVirtues its answer has
};
inline constexpr std::array<const char*, 5> kVirtues = {
    "the cast asked for", "an ending", "no sentence twice", "three to six events", "good manners"};

struct Item {  // of an evaluation
  std::string task;
  Conversation conversation;  // ends with the user
  Check check;
  std::string answer;             // one that passes; of a tool's item: the one after the call
  std::string prompt;             // for a base model, in the documents' words; empty: none
  std::vector<std::string> stop;  // where a base model's answer ends
  Rubric rubric;                  // in place of the check: an open request, see cake/rubric.h
  int samples = 0;                // at temperature 1; 0: one answer, greedily
};
inline constexpr int kAnswerTokens = 90;  // an answer's, at most
inline constexpr int kStoryTokens = 160;  // a story's

struct WordProblem {
  std::string question, answer;
  int difficulty = 0;  // 1 to 3: how many things happen to what there was in the beginning
};
struct Conversations {
  std::vector<Talk> training, held_out;
  std::vector<Item> items;
  std::vector<WordProblem> rl, test;
};
std::vector<Document> make_pages(const World&);  // to search: a page for each person that exists
const std::vector<Kind>& conversation_kinds();
// `tokens`: of the training part, as estimate_conversation counts them.
Conversations make_conversations(const World&, const Knowledge&, int64_t tokens);
int64_t estimate_conversation(const Conversation&);
// Conversations as documents, for the training of a tokenizer.
std::vector<Document> tokenizer_sample(const World&, int64_t tokens);
std::string conversation_text(const Conversation&);  // what stands between the special tokens

// ---------------------------------------------------------------------------------------------
// Preferences: dev/preferences.h

struct PreferenceOptions {
  int pairs = 6000, rankings = 1500;  // comparisons of two answers; of kRanked answers
  // Of the labellers, in units of the true reward. At .2 two of them agree on 72 % of the pairs, as
  // those of InstructGPT do (Ouyang et al. 2022: 72.6 %).
  double noise = .2;
  double length_bias = 0;  // what ten more words are worth to them, in the same units
};
inline constexpr int kRanked = 4, kHeldOutPairs = 1000;

// A request for a story, and the true reward of what answers it.
struct OpenRequest {
  std::string user;
  Rubric rubric;
};
struct Judgement {
  OpenRequest request;
  std::vector<std::string> answers;
  std::vector<int> ranking;  // by a labeller: the rank of each answer, 1 the best
};
struct Preferences {
  std::vector<OpenRequest> prompts, prompts_held_out;  // none twice; no cast in both
  std::vector<Judgement> training, held_out;
  double best_possible = 0;  // share of the held-out pairs that one who knew what the labellers
                             // think would order as they do
};
Preferences make_preferences(const World&, const PreferenceOptions&);
// What the labellers think of an answer: its true reward, and their bias.
double labellers_utility(const OpenRequest&, const std::string& answer, double length_bias);
// The chance that they prefer the answer of the first utility (Bradley and Terry 1952).
double chance_of_preference(double utility, double other, double noise);
// To evaluate: open requests, and problems that are sampled; see chat eval.
std::vector<Item> make_open_items(const World&, const std::vector<WordProblem>& problems);

}  // namespace cake::world
