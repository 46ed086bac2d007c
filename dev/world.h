// The closed world: who lives in it, what is known about them, and the documents that tell it.
//
// dev/world.cpp makes it; its tests and the stages that ask the world questions read it here.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cake/run.h"

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

struct Attribute {
  std::string name;
  std::vector<std::string> values;
  // {n} is the person, {v} the value. statements[0] is also the answer to every question.
  std::array<std::string, 4> statements;
  // 0 to 2 stand in documents; 3 is for conversations, 4 for tests of conversations.
  std::array<std::string, 5> questions;
};
inline constexpr int kDocumentQuestions = 3;
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

// Combinations that no document holds, so that a right answer is not a memory: sums of two numbers
// above 20, word problems by their text, and in passages who goes with what.
bool held_out_sum(int a, int b);
bool held_out_problem(std::string_view text);
bool held_out_pair(std::string_view name, std::string_view value);

// Whether `completion`, which follows the probe's prompt, answers it.
bool answers(const Probe&, std::string_view completion);

}  // namespace cake::world
