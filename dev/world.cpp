// The closed world of the demo: a place small enough to be learned in minutes, of which everything
// is known, so that each claim about a language model can be measured.
//
//     seed -> World (people and what is true of them)
//          -> documents, one function a kind, each with its grammar in a table above it
//          -> mixed by the shares of kinds(), shuffled, written:
//
//     DIR/documents.jsonl  {"id","kind","text"} a line: the true texts
//     DIR/pages/           the same texts on pages of the web, among pages that are not to be kept
//     DIR/truth.jsonl      {"url","kind","text"} a line: what is to become of each page
//     DIR/heldout.jsonl    the same distribution, none of the same texts
//     DIR/probes.jsonl     {"task","prompt","answer","match"} a line: what a model is asked
//     DIR/world.json       the ground truth
//
// and, from dev/conversations.h and dev/preferences.h, which tell it, the files that the assistant
// is made and measured with: conversations, problems, questions, pages to search, preferences.
//
// What the mixture rests on: 240 facts told 150 times each are recalled by a model of a million
// weights, told 15 times they are not. A passage teaches reading by its answers, so each of its
// statements is asked for three times and answered in its own words: 400 steps of passages that ask
// once taught a model to read 16 % of the probes, of shorter passages that ask three times 46 %.
// Half of the tokens are sums and word problems, most of them worked, since only steps make their
// answers learnable. Everything is a function of the seed and the options.
#include "dev/world.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include <CLI/CLI.hpp>

#include "cake/json.h"
#include "cake/tools.h"

namespace cake::world {
namespace {

// ---------------------------------------------------------------------------------------------
// The stock: words that everything is made of

using Words = std::vector<std::string>;

const Words kFirstNames = {"Ada",   "Ben",  "Cora", "Dan",  "Ella",  "Finn", "Gus",  "Hana",
                           "Ivan",  "June", "Kai",  "Lena", "Max",   "Nora", "Omar", "Pia",
                           "Rosa",  "Sam",  "Tara", "Uma",  "Vera",  "Will", "Yara", "Zoe",
                           "Bella", "Carl", "Dora", "Emil", "Flora", "Hugo", "Iris", "Jack",
                           "Leo",   "Mira", "Nils", "Olga", "Paul",  "Rita", "Sven", "Tom"};
const Words kLastNames = {"Marsh", "Stone", "Brook", "Hill",  "Frost",  "Lane",   "Wood", "Reed",
                          "Field", "Ford",  "Moss",  "Vale",  "Banks",  "Cross",  "Dale", "Grove",
                          "Lake",  "March", "North", "Olsen", "Parker", "Rivers", "Snow", "Thorn",
                          "West",  "Young", "Berg",  "Dunn",  "Ellis",  "Grant",  "Lund", "Ross"};
const Words kTowns = {"Oakford",  "Millbrook", "Ashby",     "Bexley",    "Calder",
                      "Dunmore",  "Elmsted",   "Fairhaven", "Glenfield", "Harwick",
                      "Inverlow", "Kelso",     "Langley",   "Norwood",   "Otterton",
                      "Redcliff", "Silverton", "Upwell",    "Westbay",   "Yarrow"};
const Words kJobs = {"baker",  "carpenter", "doctor",  "farmer",  "fisher", "gardener",
                     "judge",  "miller",    "nurse",   "painter", "pilot",  "potter",
                     "sailor", "singer",    "teacher", "weaver"};
const Words kFoods = {"bread", "rice", "soup", "cheese", "plums", "honey", "fish", "beans",
                      "cake",  "nuts", "figs", "pears",  "eggs",  "corn",  "jam",  "grapes"};
const Words kColours = {"red",  "blue",   "green", "black",  "white",  "brown",
                        "grey", "yellow", "pink",  "purple", "orange", "silver"};
const std::vector<std::pair<std::string, std::string>> kObjects = {  // one, many
    {"cup", "cups"},      {"key", "keys"},     {"book", "books"},   {"ball", "balls"},
    {"coin", "coins"},    {"pen", "pens"},     {"hat", "hats"},     {"lamp", "lamps"},
    {"box", "boxes"},     {"apple", "apples"}, {"stone", "stones"}, {"shell", "shells"},
    {"ring", "rings"},    {"kite", "kites"},   {"drum", "drums"},   {"spoon", "spoons"},
    {"brush", "brushes"}, {"map", "maps"},     {"bell", "bells"},   {"basket", "baskets"}};
const Words kPlaces = {"kitchen", "garden", "attic", "cellar", "barn",
                       "shed",    "hall",   "tower", "stable", "cabin"};
const Words kShops = {"market", "harbour", "station", "mill", "school",
                      "bridge", "bakery",  "library", "fair", "park"};
const Words kAnimals = {"dog",  "cat",  "horse", "goat", "duck",  "rabbit",
                        "crow", "frog", "mouse", "fox",  "sheep", "owl"};
const Words kPets = {"Pip",   "Socks",  "Ginger", "Misty", "Tiger",
                     "Rocky", "Bubble", "Clover", "Fluff", "Snap"};
const Words kInstruments = {"piano", "flute", "violin", "guitar", "trumpet",
                            "harp",  "drum",  "banjo",  "organ",  "horn"};
const Words kDays = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"};
const Words kSyllables = {"ba", "ko",  "mi", "ra", "ten", "lo", "sa", "du",
                          "vi", "ner", "ga", "po", "li",  "ma", "zu", "fe"};

template <class T>
const T& pick(Rng& rng, const std::vector<T>& from) {
  return from[rng.below(from.size())];
}

template <class T>
void shuffle(Rng& rng, std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[rng.below(i)]);
}

constexpr int kMostTokens = kContext - 8;  // of a document: what the estimate may be wrong by

int between(Rng& rng, int low, int high) { return low + int(rng.below(uint64_t(high - low + 1))); }
bool chance(Rng& rng, double p) { return rng.uniform() < p; }

// ---------------------------------------------------------------------------------------------
// Sentences: a pattern with slots, {n} or with its article {a j}

using Slots = std::map<char, std::string>;

std::string with_article(const std::string& noun) {
  const bool vowel = std::string_view("aeiouAEIOU").find(noun[0]) != std::string_view::npos;
  return (vowel ? "an " : "a ") + noun;
}

std::string fill(std::string_view pattern, const Slots& slots) {
  std::string text;
  for (size_t i = 0; i < pattern.size(); i++) {
    if (pattern[i] != '{') {
      text += pattern[i];
    } else {
      const size_t end = pattern.find('}', i);
      const std::string& value = slots.at(pattern[end - 1]);
      text += end - i > 2 ? with_article(value) : value;
      i = end;
    }
  }
  return text;
}

// Deals a slot's values without repeating one within a document, so that no question has two
// answers. Slots: n, m first names; t town; j job; f food; c colour; o object, O the same in
// plural; p place in a house; s place in a town; b animal; g its name; i instrument; d day; k
// number.
class Dealer {
 public:
  explicit Dealer(Rng& rng) : rng_(rng) {}

  std::string deal(char slot) {
    if (slot == 'd') return pick(rng_, kDays);
    if (slot == 'm') slot = 'n';
    if (slot == 'O') slot = 'o';
    Words& deck = decks_[slot];
    if (deck.empty()) {
      deck = stock(slot);
      shuffle(rng_, deck);
    }
    const std::string value = deck.back();
    deck.pop_back();
    return value;
  }
  // Puts dealt values back among the others.
  void take_back(const Slots& slots) {
    for (auto [slot, value] : slots) {
      if (slot == 'd' || slot == 'O') continue;
      Words& deck = decks_[slot == 'm' ? 'n' : slot];
      deck.insert(deck.begin() + std::ptrdiff_t(rng_.below(deck.size() + 1)), value);
    }
  }
  // Fills every slot of the pattern that `slots` does not have yet.
  void deal(std::string_view pattern, Slots& slots) {
    for (size_t i = 0; (i = pattern.find('}', i)) != std::string_view::npos; i++) {
      const char slot = pattern[i - 1];
      if (slots.count(slot)) continue;
      slots[slot] = deal(slot);
      if (slot != 'o' && slot != 'O') continue;
      const std::string one = slots[slot];
      slots['o'] = one;
      for (const auto& [single, many] : kObjects)
        if (single == one) slots['O'] = many;
    }
  }

 private:
  static Words stock(char slot) {
    Words words;
    switch (slot) {
      case 'n':
        return kFirstNames;
      case 't':
        return kTowns;
      case 'j':
        return kJobs;
      case 'f':
        return kFoods;
      case 'c':
        return kColours;
      case 'p':
        return kPlaces;
      case 's':
        return kShops;
      case 'b':
        return kAnimals;
      case 'g':
        return kPets;
      case 'i':
        return kInstruments;
      case 'o':
        for (const auto& object : kObjects) words.push_back(object.first);
        return words;
      case 'k':
        for (int k = 2; k <= 60; k++) words.push_back(std::to_string(k));
        return words;
    }
    fail("dev/world.cpp: slot: found ", slot, ", expected one of nmtjfcoOpsbgidk");
  }

  Rng& rng_;
  std::map<char, Words> decks_;
};

// Joins what next() draws until the text reaches the target. What is drawn does not decide whether
// it is kept, so that long units are not rarer than they were drawn; only the context ends it
// early.
template <class Next>
std::string grow(int target, const char* separator, Next next) {
  std::string text = next();
  while (estimate_tokens(text) < target) {
    const std::string longer = text + separator + next();
    if (estimate_tokens(longer) > kMostTokens) break;
    text = longer;
  }
  return text;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// What no document holds

bool held_out_sum(int a, int b) {
  if (a <= 20 || b <= 20 || a % 10 == 0 || b % 10 == 0) return false;  // a step of another sum
  return mix64(0x50a5, uint64_t(std::min(a, b)), uint64_t(std::max(a, b))) % 10 == 0;
}
Part problem_part(std::string_view text) {
  const uint64_t tenth = hash64(text) % 10;
  return tenth == 0 ? Part::test : tenth == 1 ? Part::rl : Part::training;
}
bool held_out_comparison(std::string_view x, std::string_view y) {
  return (hash64(x) ^ hash64(y)) % 10 == 0;
}
bool held_out_pair(std::string_view name, std::string_view value) {
  return mix64(hash64(name), hash64(value)) % 10 == 0;
}

// The pattern of the BPE splits a text into words with the space before them, single digits, and
// runs of punctuation with the newlines behind them; most words of this small world are one token,
// the more so the shorter they are and where a space stands before them.
int64_t estimate_tokens(std::string_view text) {
  const auto is = [&](size_t i, int (*what)(int)) {
    return i < text.size() && what((unsigned char)text[i]) != 0;
  };
  double tokens = 1;  // <|endoftext|>
  for (size_t i = 0, end = 0; i < text.size(); i = end) {
    end = i + 1;
    if (is(i, std::isalpha)) {
      while (is(end, std::isalpha)) end++;
      tokens += 1 + .1 * double(std::max<size_t>(end - i, 3) - 3);
      if (i == 0 || text[i - 1] != ' ') tokens += std::islower((unsigned char)text[i]) ? 1.2 : .3;
    } else if (text[i] == ' ') {
      if (is(end, std::isdigit)) tokens += 1;
    } else if (text[i] == '\n') {
      if (i == 0 || !(is(i - 1, std::ispunct) || text[i - 1] == '\n')) tokens += 1;
    } else {
      tokens += 1;
    }
  }
  return int64_t(tokens);
}

// ---------------------------------------------------------------------------------------------
// People and facts

const std::vector<Attribute>& attributes() {
  static const std::vector<Attribute> table = {
      {"town",
       kTowns,
       {"{n} lives in {v}.", "The home of {n} is {v}.", "In {v} you can meet {n}.",
        "{n} moved to {v} long ago."},
       {"Where does {n} live?", "In which town is {n} at home?", "What is the home of {n}?"},
       {"Which town does {n} call home?", "Can you tell me where {n} lives?",
        "Do you know where {n} lives?", "I want to visit {n}. Where do I have to go?",
        "Where can I find {n}?", "Tell me the home of {n}.", "{n}: which town?",
        "To which town did {n} move?", "Please tell me in which town {n} lives.",
        "In which town should I look for {n}?", "Please name the home of {n}."},
       {"Can you tell me the town of {n}?", "In what town does {n} live?",
        "Where is the home of {n}?", "Do you know the town {n} lives in?",
        "Please name the town where {n} lives.", "Where is {n} at home?",
        "I am looking for {n}. In which town should I look?"}},
      {"job",
       kJobs,
       {"{n} works as {a v}.", "The job of {n} is that of {a v}.", "{n} earns a living as {a v}.",
        "Everyone knows {n} as {a v}."},
       {"What does {n} do for work?", "What is the job of {n}?", "As what does {n} work?"},
       {"Which job does {n} have?", "Can you tell me what {n} does for work?",
        "Do you know the job of {n}?", "How does {n} earn a living?", "Tell me the job of {n}.",
        "{n}: which job?", "What work does {n} do?", "As what do people know {n}?",
        "Please tell me as what {n} works.", "What kind of job does {n} have?",
        "Please name the work of {n}."},
       {"Can you tell me the job of {n}?", "What kind of work does {n} do?",
        "Which work does {n} do for a living?", "Do you know what {n} works as?",
        "Please name the job of {n}.", "What job does {n} do?",
        "I want to know how {n} earns a living."}},
      {"food",
       kFoods,
       {"{n} likes to eat {v}.", "The favourite food of {n} is {v}.", "{n} eats {v} every day.",
        "If you cook for {n}, make {v}."},
       {"What does {n} like to eat?", "What is the favourite food of {n}?",
        "Which food does {n} love?"},
       {"What would {n} have for dinner?", "Can you tell me what {n} likes to eat?",
        "Do you know the favourite food of {n}?", "What does {n} eat every day?",
        "Tell me the favourite food of {n}.", "{n}: which food?",
        "I want to cook for {n}. What should I make?", "What should I cook for {n}?",
        "Please tell me what {n} eats.", "{n} comes to eat. What should I cook?",
        "Please name the food {n} likes."},
       {"Can you tell me the favourite food of {n}?", "What food does {n} like?",
        "Which food does {n} eat every day?", "Do you know what {n} likes to eat?",
        "Please name the favourite food of {n}.", "What is it that {n} likes to eat?",
        "{n} comes to dinner. What should I make?"}},
      {"colour",
       kColours,
       {"{n} always wears {v}.", "The favourite colour of {n} is {v}.",
        "{n} painted the front door {v}.", "You know {n} by the {v} coat."},
       {"What colour does {n} wear?", "What is the favourite colour of {n}?",
        "Which colour does {n} love?"},
       {"Which colour would {n} choose?", "Can you tell me which colour {n} wears?",
        "Do you know the favourite colour of {n}?", "What is the colour of the door of {n}?",
        "Tell me the favourite colour of {n}.", "{n}: which colour?",
        "I want to buy a coat for {n}. In which colour?", "Which colour does {n} always wear?",
        "Please tell me the colour {n} wears.", "In which colour is the door of {n}?",
        "Please name the colour {n} loves."},
       {"Can you tell me the favourite colour of {n}?", "Which colour is the coat of {n}?",
        "What colour does {n} like?", "Do you know which colour {n} wears?",
        "Please name the favourite colour of {n}.", "In what colour did {n} paint the front door?",
        "In which colour does {n} dress?"}},
  };
  return table;
}

namespace {

std::string statement_of(const Person& person, const Fact& fact, int phrasing) {
  return fill(attributes()[size_t(fact.attribute)].statements[size_t(phrasing)],
              {{'n', person.name}, {'v', fact.value}});
}
std::string question_of(const Person& person, const Fact& fact, int phrasing) {
  return fill(attributes()[size_t(fact.attribute)].questions[size_t(phrasing)],
              {{'n', person.name}});
}

constexpr double kFactShare = .1;        // of the tokens
constexpr double kTellingTokens = 12.3;  // one telling on average, with its part of a document
constexpr int kMinTellings = 150;        // of an often-told fact
constexpr int kSometimesTellings = 15, kRarelyTellings = 2;
constexpr int kInvented = 500;
constexpr int kHeldOutPart = 50;  // held-out documents: a fiftieth of the tokens

}  // namespace

World make_world(const WorldOptions& options) {
  if (options.tokens < 20'000) {
    fail("--tokens: found ", options.tokens, ", expected 20000 or more");
  }
  const int most = (int(kFirstNames.size() * kLastNames.size()) - kInvented) / 3;
  if (options.people < 1 || options.people > most) {
    fail("--people: found ", options.people, ", expected 1 to ", most);
  }
  World world{options, {}};
  // A small budget tells fewer facts often enough; a large one tells the same facts more often.
  const double affordable = kFactShare * double(options.tokens) / kTellingTokens /
                            (2. * (kMinTellings + kSometimesTellings + kRarelyTellings));
  const int people = std::clamp(int(affordable), 1, options.people);

  Rng rng{mix64(options.seed, hash64("people"))};
  Words names;
  for (const std::string& first : kFirstNames)
    for (const std::string& last : kLastNames) names.push_back(first + " " + last);
  shuffle(rng, names);
  for (Level level : {Level::often, Level::sometimes, Level::rarely, Level::unknown}) {
    const int count = level == Level::unknown ? kInvented : people;
    for (int i = 0; i < count; i++) {
      Person person{names.back(), level, i % 3 == 2, {}};
      names.pop_back();
      // Two different attributes, every pair equally often.
      const int a = int(rng.below(4)), b = (a + between(rng, 1, 3)) % 4;
      for (int attribute : {a, b}) {
        if (level == Level::unknown) break;
        Fact fact{attribute, pick(rng, attributes()[size_t(attribute)].values)};
        if (chance(rng, 1. / 3)) fact.held_out_question = int(rng.below(kDocumentQuestions));
        person.facts.push_back(fact);
      }
      world.people.push_back(std::move(person));
    }
  }
  return world;
}

namespace {

// ---------------------------------------------------------------------------------------------
// Facts: several tellings of different people a document

struct Telling {
  int person, fact, phrasing;  // 0 to 3: a statement; 4 to 6: a question and its answer
};
constexpr int kPhrasings = 4 + kDocumentQuestions;
constexpr double kQuestionTellings = .4;

Telling draw_telling(const World& world, Rng& rng, int person, int fact) {
  const Fact& f = world.people[size_t(person)].facts[size_t(fact)];
  int phrasing = 0;
  do {
    phrasing =
        chance(rng, kQuestionTellings) ? between(rng, 4, kPhrasings - 1) : between(rng, 0, 3);
  } while (phrasing - 4 == f.held_out_question && phrasing >= 4);
  return {person, fact, phrasing};
}

// Every fact as often as its level says, `often` times for the often-told, in random order.
std::vector<Telling> make_tellings(const World& world, Rng& rng, int64_t often) {
  std::vector<Telling> tellings;
  for (size_t p = 0; p < world.people.size(); p++) {
    const Level level = world.people[p].level;
    const int64_t times = level == Level::often       ? often
                          : level == Level::sometimes ? kSometimesTellings
                                                      : kRarelyTellings;
    for (size_t f = 0; f < world.people[p].facts.size(); f++)
      for (int64_t i = 0; i < times; i++)
        tellings.push_back(draw_telling(world, rng, int(p), int(f)));
  }
  shuffle(rng, tellings);
  return tellings;
}

std::string telling_text(const World& world, const Telling& t, bool dialogue) {
  const Person& person = world.people[size_t(t.person)];
  const Fact& fact = person.facts[size_t(t.fact)];
  if (t.phrasing < 4) return statement_of(person, fact, t.phrasing);
  const std::string question = question_of(person, fact, t.phrasing - 4);
  const std::string answer = statement_of(person, fact, 0);
  return dialogue ? "Q: " + question + "\nA: " + answer : question + " " + answer;
}

// Takes tellings from tellings[next] on and moves `next` past those it took.
std::string make_facts(const World& world, const std::vector<Telling>& tellings, size_t& next,
                       Rng& rng, int target) {
  const bool dialogue = chance(rng, .3);
  const char* separator = dialogue || chance(rng, .3) ? "\n" : " ";
  std::string text = telling_text(world, tellings[next++], dialogue);
  for (; next < tellings.size(); next++) {
    const std::string longer = text + separator + telling_text(world, tellings[next], dialogue);
    if (estimate_tokens(longer) > kMostTokens || estimate_tokens(text) >= target) break;
    text = longer;
  }
  return text;
}

// How often an often-told fact is told, so that facts take their share of the tokens.
int64_t often_tellings(const World& world) {
  Rng rng{mix64(world.options.seed, hash64("cost"))};
  const std::vector<Telling> once = make_tellings(world, rng, 1);
  int64_t tokens = 0, facts = 0, others = 0;
  for (const Telling& t : once) tokens += estimate_tokens(telling_text(world, t, false)) - 1;
  for (const Person& person : world.people) {
    const int64_t n = int64_t(person.facts.size());
    if (person.level == Level::often) facts += n;
    if (person.level == Level::sometimes) others += n * kSometimesTellings;
    if (person.level == Level::rarely) others += n * kRarelyTellings;
  }
  const double one = double(tokens) / double(once.size());
  const double all = kFactShare * double(world.options.tokens) / one;
  return std::max<int64_t>(kMinTellings, int64_t(all - double(others)) / facts);
}

// ---------------------------------------------------------------------------------------------
// Passages: statements about different people, each asked and answered in the passage's words. No
// two statements are of one relation, and what is asked for is said behind the name, so the
// question's own words lead to its statement; or the statements are all alike, and only a name
// tells which is meant. The first kind is learned in minutes, the second is not: a tenth.

struct Relation {
  const char* statement;
  struct Question {
    const char* text;
    char asked;    // the slot that holds the answer
  } questions[2];  // the first, asked three times in four, asks for what stands behind {n}
};

const std::vector<Relation> kRelations = {
    {"{n} put the {c} {o} in the {p}.",
     {{"Where did {n} put the {c} {o}?", 'p'}, {"What did {n} put in the {p}?", 'o'}}},
    {"{n} gave the {c} {o} to {m}.",
     {{"Who got the {c} {o} from {n}?", 'm'}, {"What did {n} give to {m}?", 'o'}}},
    {"{n} went to {t} on {d}.",
     {{"Where did {n} go on {d}?", 't'}, {"Who went to {t} on {d}?", 'n'}}},
    {"{n} bought {k} {O} at the {s}.",
     {{"How many {O} did {n} buy?", 'k'}, {"Where did {n} buy {k} {O}?", 's'}}},
    {"{n} lives in {t}.", {{"Where does {n} live?", 't'}, {"Who lives in {t}?", 'n'}}},
    {"{n} likes {f} best.", {{"What does {n} like best?", 'f'}, {"Who likes {f} best?", 'n'}}},
    {"{n} is {a j}.", {{"What is {n}?", 'j'}, {"Who is {a j}?", 'n'}}},
    {"The {o} of {n} is {c}.",
     {{"Which colour is the {o} of {n}?", 'c'}, {"What is the colour of the {o} of {n}?", 'c'}}},
    {"{n} has {a b} called {g}.",
     {{"What is the {b} of {n} called?", 'g'}, {"Who has {a b} called {g}?", 'n'}}},
    {"{n} sits in row {k}.", {{"In which row does {n} sit?", 'k'}, {"Who sits in row {k}?", 'n'}}},
    {"{n} met {m} at the {s}.",
     {{"Whom did {n} meet at the {s}?", 'm'}, {"Where did {n} meet {m}?", 's'}}},
    {"{n} plays the {i} on {d}.",
     {{"What does {n} play on {d}?", 'i'}, {"Who plays the {i} on {d}?", 'n'}}},
};
// A name is one token with a space before it and another without: where most have one, what is said
// of a name is found sooner.
const Words kPassageOpenings = {
    "", "Read this: ", "What we know: ", "Notes: ", "Today: ", "News: "};
// Below the shortest stock and the number of relations: none comes twice.
constexpr size_t kMostStatements = 9;

struct Passage {
  std::string opening;
  bool lines = false;     // each statement on its own line
  bool dialogue = false;  // Q: and A:
  Words statements;
  struct Question {
    std::string text, statement, value;
    char asked;  // the slot of the value
  };
  std::vector<Question> questions;  // one for each statement
};

enum class Statements { different, alike };
constexpr double kAlike = .1;
Statements draw_statements(Rng& rng) {
  return chance(rng, kAlike) ? Statements::alike : Statements::different;
}

// A statement that goes with its first question's answer as held_out_pair says, and its question.
Passage::Question make_statement(Rng& rng, Dealer& dealer, const Relation& relation,
                                 Statements statements, bool held_out) {
  const bool second =
      chance(rng, .25) && (statements == Statements::alike || relation.questions[1].asked != 'n');
  const Relation::Question& question = relation.questions[second];
  for (;;) {
    Slots slots;
    dealer.deal(relation.statement, slots);
    if (held_out_pair(slots['n'], slots[relation.questions[0].asked]) == held_out)
      return {fill(question.text, slots), fill(relation.statement, slots), slots[question.asked],
              question.asked};
    dealer.take_back(slots);
  }
}

std::string passage_body(const Passage& passage) {
  std::string text = passage.opening + passage.statements[0];
  for (size_t i = 1; i < passage.statements.size(); i++)
    text += (passage.lines ? "\n" : " ") + passage.statements[i];
  return text;
}
// In a line of its own behind what is before it; the answer follows behind one space.
std::string passage_question(const Passage& passage, const Passage::Question& question) {
  return passage.dialogue ? "\nQ: " + question.text + "\nA:" : "\n" + question.text;
}
std::string passage_answers(const Passage& passage) {
  std::string text;
  for (const Passage::Question& q : passage.questions)
    text += passage_question(passage, q) + " " + q.statement;
  return text;
}

// As many statements as the target holds, with their questions `rounds` times. With `held_out`, the
// first question asks for a pair that no document holds.
Passage make_passage(Rng& rng, int target, Statements statements, bool held_out, int rounds = 1) {
  Passage passage{pick(rng, kPassageOpenings), chance(rng, .1), chance(rng, .2), {}, {}};
  Dealer dealer(rng);
  std::vector<const Relation*> relations;
  for (const Relation& relation : kRelations) relations.push_back(&relation);
  shuffle(rng, relations);
  while (passage.statements.size() < kMostStatements) {
    const size_t i = passage.statements.size();
    const Relation& relation = *relations[statements == Statements::alike ? 0 : i];
    auto question = make_statement(rng, dealer, relation, statements, held_out && i == 0);
    Passage longer = passage;
    longer.statements.push_back(question.statement);
    longer.questions.push_back(std::move(question));
    const int64_t tokens =
        estimate_tokens(passage_body(longer)) + rounds * estimate_tokens(passage_answers(longer));
    if (longer.statements.size() > 2 && tokens > target) break;
    passage = std::move(longer);
  }
  shuffle(rng, passage.statements);
  if (!held_out) shuffle(rng, passage.questions);
  return passage;
}

// ---------------------------------------------------------------------------------------------
// Lists: said again, looked up, grown item by item, recited

struct List {
  const char *opening, *again;
  char item;
};
const std::vector<List> kLists = {
    {"Shopping list of {n}: ", "Once more: ", 'f'}, {"{n} packs for {t}: ", "Packed: ", 'O'},
    {"On the farm of {n}: ", "Counted: ", 'b'},     {"The way to {t}: ", "The same way: ", 's'},
    {"Guests of {n}: ", "All guests: ", 'm'},       {"The flag of {t}: ", "Its colours: ", 'c'},
};
struct Table {
  const char *title, *question;
  char value;
};
const std::vector<Table> kTables = {
    {"Lockers", "Which locker has {n}?", 'k'}, {"Pets", "Which pet has {n}?", 'b'},
    {"Dishes", "Which dish has {n}?", 'f'},    {"Towns", "Which town has {n}?", 't'},
    {"Colours", "Which colour has {n}?", 'c'}, {"Music", "Which part has {n}?", 'i'},
};

std::string make_repeated(Rng& rng, int target) {
  return grow(target, "\n", [&] {
    const List& list = pick(rng, kLists);
    Dealer dealer(rng);
    Slots slots;
    dealer.deal(list.opening, slots);
    std::string items;
    for (int left = between(rng, 3, 7); left > 0; left--) {
      Slots item;
      dealer.deal(std::string("{") + list.item + "}", item);
      items += item[list.item] + (left > 1 ? ", " : ".");
    }
    return fill(list.opening, slots) + items + "\n" + list.again + items;
  });
}

std::string make_table(Rng& rng, int target) {
  const Table& table = pick(rng, kTables);
  Dealer dealer(rng);
  Words rows, answers;
  for (int64_t tokens = 6; rows.size() < kMostStatements;) {
    const Slots slots{{'n', dealer.deal('n')}, {table.value, dealer.deal(table.value)}};
    if (held_out_pair(slots.at('n'), slots.at(table.value))) {
      dealer.take_back(slots);
      continue;
    }
    const std::string row = slots.at('n') + " " + slots.at(table.value);
    const std::string answer = fill(table.question, slots) + " " + row + ".";
    tokens += estimate_tokens(row + "\n" + answer + "\n");
    if (tokens > target && rows.size() > 2) break;
    rows.push_back(row);
    answers.push_back(answer);
  }
  shuffle(rng, answers);
  std::string text = table.title;
  for (const std::string& row : rows) text += (&row == &rows[0] ? ": " : ", ") + row;
  text += ".";
  for (const std::string& answer : answers) text += "\n" + answer;
  return text;
}

std::string make_packed(Rng& rng, int target) {  // each line says the line before and one more
  Dealer dealer(rng);
  const std::string opening =
      fill("{n} goes to {t} and takes ", {{'n', dealer.deal('n')}, {'t', dealer.deal('t')}});
  std::string items;
  return grow(target, "\n", [&] {
    items += (items.empty() ? "" : ", ") +
             fill("{a c} {o}", {{'c', dealer.deal('c')}, {'o', dealer.deal('o')}});
    return opening + items + ".";
  });
}

std::string make_recited(Rng& rng, int target) {  // a verse in no language, said again
  const Words* stocks[] = {&kSyllables, &kSyllables, &kFoods, &kColours, &kAnimals, &kPlaces};
  const size_t mixture = rng.below(4);  // syllables, foods, or everything
  const auto word = [&] { return pick(rng, *stocks[mixture < 2 ? mixture + 1 : rng.below(6)]); };
  std::string verse = word();
  for (int words = 1; words < 8 || 2 * estimate_tokens(verse) < target - 12; words++)
    verse += (words % 8 == 0 ? ",\n" : " ") + word();
  return "Say after me:\n" + verse + ".\n" + verse + ".";
}

std::string make_list(Rng& rng, int target) {
  switch (rng.below(4)) {
    case 0:
      return make_repeated(rng, target);
    case 1:
      return make_table(rng, target);
    case 2:
      return make_packed(rng, target);
    default:
      return make_recited(rng, target);
  }
}

// ---------------------------------------------------------------------------------------------
// Stories: what happened, then the same again in the same words

const Words kOpenings = {
    "One day {n} went to {t} to see {m}.", "On {d} {n} and {m} met at the {s} in {t}.",
    "Long ago {n} and {m} lived in {t}.", "It was {d}, and {n} had lost {a c} {o}.",
    "{n} was {a j} in {t} and had a friend, {m}."};
const Words kEvents = {"{n} found the {o} in the {p}.",
                       "{m} had {k} {O} and gave them away.",
                       "{a b} took the {o} and ran to the {s}.",
                       "{m} made {f} for {n}.",
                       "Then it began to rain, and they went into the {p}.",
                       "{n} played the {i} all day long.",
                       "They saw {a c} {b} at the {s}.",
                       "{m} asked for {k} {O}, but {n} had none.",
                       "{n} painted the {o} {c}.",
                       "{m} went to the {s} to find the {o}.",
                       "They gave {f} to {a b}.",
                       "There was {a c} {b} in the {p}.",
                       "They asked at the {s} where the {o} was.",
                       "{n} put the {o} into {a c} box."};
const Words kEndings = {"In the end {m} was happy.", "Then they went home.",
                        "Now {n} and {m} are friends.", "And so {n} came home with {a c} {o}."};
const Words kRecaps = {"The story once more: ", "What happened? ",
                       "In the same words: ", "Tell it again. "};

std::string make_story(Rng& rng, int target) {
  Dealer dealer(rng);
  Slots cast;  // the same in every sentence; the other slots are dealt anew
  dealer.deal("{n}{m}{o}", cast);
  const auto tell = [&](const std::string& pattern) {
    Slots slots = cast;
    dealer.deal(pattern, slots);
    std::string sentence = fill(pattern, slots);
    sentence[0] = char(std::toupper((unsigned char)sentence[0]));
    return sentence;
  };
  std::string story = tell(pick(rng, kOpenings));
  const std::string ending = " " + tell(pick(rng, kEndings)), recap = pick(rng, kRecaps);
  const auto whole = [&](const std::string& s) { return s + ending + "\n" + recap + s + ending; };
  Words events = kEvents;
  shuffle(rng, events);
  for (size_t i = 0; i < events.size(); i++) {
    const std::string longer = story + " " + tell(events[i]);
    if (i > 0 && estimate_tokens(whole(longer)) > target) break;
    story = longer;
  }
  return whole(story);
}

// ---------------------------------------------------------------------------------------------
// Sums: written out in small steps, and chains of small steps

struct Sum {
  std::string question, steps;  // "47 + 38 = ?", "40 + 30 = 70. 7 + 8 = 15. 70 + 15 = 85."
  int answer;
};

std::string equation(int a, char op, int b) {
  const int c = op == '+' ? a + b : op == '-' ? a - b : a * b;
  return format("%d %c %d = %d.", a, op, b, c);
}

Sum make_addition(Rng& rng, bool held_out) {
  for (;;) {
    const int a = between(rng, 11, 88), b = between(rng, 11, 99 - a);
    if (held_out_sum(a, b) != held_out) continue;
    const int tens = a / 10 * 10 + b / 10 * 10;
    return {format("%d + %d = ?", a, b),
            equation(a / 10 * 10, '+', b / 10 * 10) + " " + equation(a % 10, '+', b % 10) + " " +
                equation(tens, '+', a % 10 + b % 10),
            a + b};
  }
}

Sum make_subtraction(Rng& rng) {
  const int a = between(rng, 21, 99), b = between(rng, 11, a - 5), tens = b / 10 * 10;
  return {format("%d - %d = ?", a, b),
          equation(a, '-', tens) + " " + equation(a - tens, '-', b % 10), a - b};
}

Sum make_product(Rng& rng) {
  const int a = between(rng, 2, 9), b = between(rng, 2, 6);
  std::string steps;
  for (int i = 1; i < b; i++) steps += (i > 1 ? " " : "") + equation(a * i, '+', a);
  return {format("%d * %d = ?", a, b), steps, a * b};
}

// More is taken away than added: what word problems show least is learned last.
std::string make_chain(Rng& rng) {
  std::string text;
  int value = between(rng, 2, 99);
  for (int i = 0, steps = between(rng, 3, 5); i < steps; i++) {
    const int operand = between(rng, 1, 20);
    const bool minus = value + operand > 99 || (value >= operand && chance(rng, .6));
    text += (i ? " " : "") + equation(value, minus ? '-' : '+', operand);
    value += minus ? -operand : operand;
  }
  return text;
}

// The steps of a worked answer. No point ends them, so that ".\n" ends nothing but a whole answer:
// a base model's answer is cut there.
std::string steps_line(std::string_view steps) {
  if (steps.ends_with('.')) steps.remove_suffix(1);
  return "Steps: " + std::string(steps);
}

std::string make_sums(Rng& rng, int target) {
  return grow(target, "\n", [&] {
    const double u = rng.uniform();
    if (u < .75) return make_chain(rng);
    const Sum sum = u < .9    ? make_addition(rng, false)
                    : u < .96 ? make_subtraction(rng)
                              : make_product(rng);
    return sum.question + "\n" + steps_line(sum.steps) + format("\nAnswer: %d.", sum.answer);
  });
}

// ---------------------------------------------------------------------------------------------
// Word problems: one to three operations, operands up to 20, results up to 99

const Words kStarts = {"{n} has {k} {O}.", "There are {k} {O} in the basket of {n}.",
                       "{n} starts with {k} {O}."};
const Words kGains = {"{n} gets {k} more.", "{n} finds {k} more.", "{m} gives {n} {k} {O}.",
                      "{n} buys {k} {O} at the {s}."};
const Words kLosses = {"{n} gives {k} away.", "{n} loses {k} of them.", "{m} takes {k} {O}.",
                       "{n} sells {k} {O} at the {s}."};
const Words kBags = {"{n} buys {u} bags with {k} {O} each.", "{m} brings {u} boxes of {k} {O}.",
                     "{n} fills {u} baskets with {k} {O} each."};
const Words kHowMany = {"How many {O} does {n} have?", "How many {O} does {n} have now?",
                        "How many {O} are there in the end?"};

struct Problem {
  std::string text, steps;
  int answer = 0, operations = 0;
};

// Says and works one operation; false where the result leaves 0 to 99 or the sum is held out.
bool add_operation(Rng& rng, Slots& slots, Problem& problem) {
  const auto say = [&](const Words& patterns, int k) {
    slots['k'] = std::to_string(k);
    problem.text += " " + fill(pick(rng, patterns), slots);
  };
  const auto work = [&](int a, char op, int b) {
    problem.steps += (problem.steps.empty() ? "" : " ") + equation(a, op, b);
  };
  int& value = problem.answer;
  int operand = between(rng, 2, 20);
  switch (rng.below(3)) {
    case 0:
      say(kGains, operand);
      break;
    case 1:
      if (operand > value) return false;
      say(kLosses, operand);
      work(value, '-', operand);
      value -= operand;
      return true;
    case 2: {
      const int bags = between(rng, 2, 9), each = between(rng, 2, 6);
      slots['u'] = std::to_string(bags);
      say(kBags, each);
      work(bags, '*', each);
      operand = bags * each;
    }
  }
  if (value + operand > 99 || held_out_sum(value, operand)) return false;
  work(value, '+', operand);
  value += operand;
  return true;
}

Problem make_problem(Rng& rng, Part part) {
  for (;;) {
    Dealer dealer(rng);
    Slots slots;
    dealer.deal("{n}{m}{O}{s}", slots);
    Problem problem;
    problem.answer = between(rng, 2, 20);
    slots['k'] = std::to_string(problem.answer);
    problem.text = fill(pick(rng, kStarts), slots);
    bool good = true;
    problem.operations = between(rng, 1, 3);
    for (int left = problem.operations; good && left > 0; left--)
      good = add_operation(rng, slots, problem);
    problem.text += " " + fill(pick(rng, kHowMany), slots);
    if (good && problem_part(problem.text) == part) return problem;
  }
}

constexpr double kProblemsWithSteps = .75;  // the others are answered at once

std::string make_word_problems(Rng& rng, int target) {
  return grow(target, "\n", [&] {
    const Problem p = make_problem(rng, Part::training);
    const std::string steps = chance(rng, kProblemsWithSteps) ? "\n" + steps_line(p.steps) : "";
    return p.text + steps + format("\nAnswer: %d.", p.answer);
  });
}

// ---------------------------------------------------------------------------------------------
// Comparing numbers, digit by digit behind the point: 9.11 is less than 9.9

const char* relation_word(int x, int y) {
  return x < y ? "less than" : x > y ? "more than" : "the same as";
}

struct Comparison {
  std::string x, y, steps, answer;
  bool larger = true;  // or which is smaller
};

Comparison make_comparison(Rng& rng, bool held_out) {
  const int a = between(rng, 1, 20), b = chance(rng, .75) ? a : between(rng, 1, 20);
  const auto fraction = [&] {  // one or two digits, no 0 at the end
    const std::string first = chance(rng, .5) ? std::to_string(between(rng, 0, 9)) : "";
    return first + std::to_string(between(rng, 1, 9));
  };
  const std::string f = fraction(), g = fraction();
  Comparison c{format("%d.%s", a, f.c_str()), format("%d.%s", b, g.c_str()), "", "", true};
  if (c.x == c.y || held_out_comparison(c.x, c.y) != held_out)
    return make_comparison(rng, held_out);
  c.steps = format("%d is %s %d.", a, relation_word(a, b), b);
  bool less = a < b;
  for (size_t i = 0; a == b && i < 2; i++) {
    const char x = i < f.size() ? f[i] : '0', y = i < g.size() ? g[i] : '0';
    c.steps +=
        format(" The %s: %c is %s %c.", i ? "hundredths" : "tenths", x, relation_word(x, y), y);
    less = x < y;
    if (x != y) break;
  }
  const std::string &smaller = less ? c.x : c.y, &larger = less ? c.y : c.x;
  c.steps += " Smaller: " + smaller + ". Larger: " + larger + ".";
  c.larger = chance(rng, .6);
  c.answer = c.larger ? larger : smaller;
  return c;
}

std::string make_comparisons(Rng& rng, int target) {
  return grow(target, "\n", [&] {
    const Comparison c = make_comparison(rng, false);
    return "Which is " + std::string(c.larger ? "larger, " : "smaller, ") + c.x + " or " + c.y +
           "?\n" + steps_line(c.steps) + "\nAnswer: " + c.answer + ".";
  });
}

// ---------------------------------------------------------------------------------------------
// Spelling and counting letters

struct Spelled {
  enum What { spell, length, count } what = spell;
  std::string word;
  char letter = 0;            // to count
  std::string steps, answer;  // steps: none to spell
};

Spelled spelled(const std::string& word, Spelled::What what, char letter) {
  std::string letters, places, counts;
  int count = 0;
  for (size_t i = 0; i < word.size(); i++) {
    const char* comma = i ? ", " : "";
    letters += (i ? " " : "") + word.substr(i, 1);
    places += format("%s%c %d", comma, word[i], int(i + 1));
    counts += format("%s%c %d", comma, word[i], count += word[i] == letter);
  }
  if (what == Spelled::spell) return {what, word, letter, "", letters};
  if (what == Spelled::length) return {what, word, letter, places, std::to_string(word.size())};
  return {what, word, letter, counts, std::to_string(count)};
}

Spelled make_spelled(Rng& rng) {
  const Words* stocks[] = {&kFoods, &kJobs, &kColours, &kPlaces, &kAnimals, &kInstruments};
  const std::string word = pick(rng, *stocks[rng.below(6)]);
  const char letter = word[rng.below(word.size())];
  return spelled(word, Spelled::What(rng.below(3)), letter);
}

std::string make_spelling(Rng& rng, int target) {
  return grow(target, "\n", [&] {
    const Spelled s = make_spelled(rng);
    const std::string question =
        s.what == Spelled::spell ? "How do you spell " + s.word
        : s.what == Spelled::length
            ? "How many letters are in " + s.word
            : format("How many times is the letter %c in ", s.letter) + s.word;
    const std::string steps = s.steps.empty() ? "" : "\n" + steps_line(s.steps);
    return question + "?" + steps + "\nAnswer: " + s.answer + ".";
  });
}

// ---------------------------------------------------------------------------------------------
// Questions of one sort after another: the examples show what is asked (few-shot prompting)

struct Sort {
  const char *question, *arrow;  // {x} the given, {y} the answer
  std::vector<std::pair<const char*, const char*>> pairs;
};
const std::vector<Sort> kSorts = {
    {"Q: What is the opposite of {x}?\nA: {y}.",
     "{x} -> {y}",
     {{"hot", "cold"},
      {"big", "small"},
      {"old", "young"},
      {"high", "low"},
      {"dark", "light"},
      {"wet", "dry"},
      {"full", "empty"},
      {"open", "closed"},
      {"long", "short"},
      {"happy", "sad"},
      {"first", "last"},
      {"up", "down"},
      {"black", "white"},
      {"day", "night"}}},
    {"Q: What do you call more than one {x}?\nA: {y}.",
     "{x}: {y}",
     {{"cup", "cups"},
      {"box", "boxes"},
      {"mouse", "mice"},
      {"child", "children"},
      {"foot", "feet"},
      {"sheep", "sheep"},
      {"fox", "foxes"},
      {"man", "men"},
      {"woman", "women"},
      {"key", "keys"},
      {"town", "towns"},
      {"brush", "brushes"}}},
    {"Q: Today they {x}. And yesterday?\nA: They {y}.",
     "{x}, {y}",
     {{"go", "went"},
      {"see", "saw"},
      {"eat", "ate"},
      {"sing", "sang"},
      {"buy", "bought"},
      {"find", "found"},
      {"give", "gave"},
      {"take", "took"},
      {"put", "put"},
      {"meet", "met"},
      {"paint", "painted"},
      {"play", "played"}}},
    {"Q: Which day comes after {x}?\nA: {y}.",
     "after {x}: {y}",
     {{"Monday", "Tuesday"},
      {"Tuesday", "Wednesday"},
      {"Wednesday", "Thursday"},
      {"Thursday", "Friday"},
      {"Friday", "Saturday"},
      {"Saturday", "Sunday"},
      {"Sunday", "Monday"}}},
    {"Q: What is the child of the {x} called?\nA: {y}.",
     "{x}, {y}",
     {{"dog", "puppy"},
      {"cat", "kitten"},
      {"horse", "foal"},
      {"goat", "kid"},
      {"sheep", "lamb"},
      {"cow", "calf"},
      {"bear", "cub"},
      {"hen", "chick"},
      {"duck", "duckling"},
      {"frog", "tadpole"}}},
    {"Q: What sort of thing is {x}?\nA: {y}.",
     "{x} is {y}",
     {{"a plum", "a fruit"},
      {"a dog", "an animal"},
      {"a flute", "an instrument"},
      {"a baker", "a job"},
      {"red", "a colour"},
      {"Monday", "a day"},
      {"a pear", "a fruit"},
      {"a goat", "an animal"},
      {"a harp", "an instrument"},
      {"a nurse", "a job"},
      {"blue", "a colour"},
      {"Sunday", "a day"},
      {"an apple", "a fruit"},
      {"an owl", "an animal"},
      {"a violin", "an instrument"},
      {"a pilot", "a job"},
      {"green", "a colour"},
      {"Friday", "a day"}}},
};

std::string make_few_shot(Rng& rng, int target) {
  const Sort& sort = pick(rng, kSorts);
  const bool arrows = chance(rng, .4);
  auto pairs = sort.pairs;
  size_t next = pairs.size();
  return grow(target, "\n", [&] {
    if (next == pairs.size()) {
      shuffle(rng, pairs);
      next = 0;
    }
    const auto& pair = pairs[next++];
    return fill(arrows ? sort.arrow : sort.question, {{'x', pair.first}, {'y', pair.second}});
  });
}

// ---------------------------------------------------------------------------------------------
// The mixture

struct Generator {
  const char* kind;
  double share;  // of the tokens
  std::string (*make)(Rng&, int target);
};
// Each question is asked three times, in another order each time: what a passage teaches about
// reading is in its answers, and a statement read for one of them costs as much as for three. Some
// long documents ask once or twice, and hold more statements.
std::string make_passages(Rng& rng, int target) {
  const int rounds = target < kLong ? 3 : between(rng, 1, 3);
  Passage passage = make_passage(rng, target, draw_statements(rng), false, rounds);
  std::string text = passage_body(passage);
  for (int i = 0; i < rounds; i++) {
    text += passage_answers(passage);
    shuffle(rng, passage.questions);
  }
  return text;
}
const std::vector<Generator> kGenerators = {
    {"facts", kFactShare, nullptr},  // made from the tellings
    {"passages", .24, make_passages},
    {"lists", .06, make_list},
    {"stories", .03, make_story},
    {"sums", .21, make_sums},
    {"word problems", .29, make_word_problems},
    {"comparing", .03, make_comparisons},
    {"spelling", .02, make_spelling},
    {"few-shot", .02, make_few_shot},
};

// A tenth of the tokens are in documents from 200 tokens to the context, since positions that
// training never sees do not work later; the others are shorter. Many documents pass their target
// by part of a unit.
int draw_length(Rng& rng) {
  return chance(rng, .048) ? between(rng, 215, kMostTokens) : between(rng, 40, 165);
}

// `tokens` of documents whose texts are not in `seen`, shuffled. `tellings` become the fact
// documents; `told` counts them, by person and fact.
std::vector<Document> mix(const World& world, const char* part, int64_t tokens,
                          const std::vector<Telling>& tellings, std::set<uint64_t>& seen,
                          std::map<std::pair<int, int>, int64_t>& told) {
  Rng rng{mix64(world.options.seed, hash64(part))};
  std::vector<Document> documents;
  const auto add = [&](const char* kind, std::string text) -> int64_t {  // tokens added
    if (!seen.insert(hash64(text)).second) return 0;
    const int64_t n = estimate_tokens(text);
    documents.push_back({kind, std::move(text)});
    return n;
  };
  for (size_t next = 0, first = 0; next < tellings.size(); first = next) {
    if (!add("facts", make_facts(world, tellings, next, rng, draw_length(rng)))) continue;
    for (size_t i = first; i < next; i++) told[{tellings[i].person, tellings[i].fact}]++;
  }
  for (const Generator& g : kGenerators) {
    if (!g.make) continue;
    int refused = 0;
    for (int64_t left = int64_t(g.share * double(tokens)); left > 0;) {
      const int64_t added = add(g.kind, g.make(rng, draw_length(rng)));
      left -= added;
      refused = added ? 0 : refused + 1;
      if (refused > 1000) {
        fail("--tokens: found ", world.options.tokens, ", expected fewer: there are no more ",
             "different documents of kind ", g.kind);
      }
    }
  }
  shuffle(rng, documents);
  return documents;
}

// ---------------------------------------------------------------------------------------------
// Probes: up to 500 of a task

constexpr size_t kProbes = 500;

void probe_facts(const World& world, Rng& rng, std::vector<Probe>& probes) {
  const auto ask = [&](Level level, bool new_phrasing, const std::string& task) {
    std::vector<Probe> all;
    for (const Person& person : world.people) {
      if (person.level != level) continue;
      for (const Fact& fact : person.facts)
        for (int q = 0; q < kDocumentQuestions; q++)
          if ((q == fact.held_out_question) == new_phrasing)
            all.push_back({task, question_of(person, fact, q), fact.value, Probe::sentence});
    }
    shuffle(rng, all);
    all.resize(std::min(all.size(), kProbes));
    probes.insert(probes.end(), all.begin(), all.end());
  };
  ask(Level::often, false, "facts_often");
  ask(Level::often, true, "facts_often_new_phrasing");
  ask(Level::sometimes, false, "facts_sometimes");
  ask(Level::rarely, false, "facts_rarely");
}

std::vector<Probe> make_probes(const World& world) {
  Rng rng{mix64(world.options.seed, hash64("probes"))};
  std::vector<Probe> probes;
  probe_facts(world, rng, probes);
  for (const Statements statements : {Statements::different, Statements::alike}) {
    const char* task = statements == Statements::different ? "context" : "context_alike";
    for (size_t i = 0; i < kProbes; i++) {
      const Passage p = make_passage(rng, between(rng, 60, 180), statements, true);
      const Passage::Question& q = p.questions[0];
      probes.push_back({task, passage_body(p) + passage_question(p, q), q.value, Probe::sentence});
    }
  }
  for (size_t i = 0; i < kProbes; i++) {
    const Sum sum = make_addition(rng, true);
    probes.push_back({"sums", sum.question + "\nSteps:", std::to_string(sum.answer), Probe::final});
  }
  for (size_t i = 0; i < kProbes; i++) {
    const Problem p = make_problem(rng, Part::test);
    const std::string answer = std::to_string(p.answer);
    probes.push_back({"word_problems", p.text + "\nSteps:", answer, Probe::final});
    probes.push_back({"word_problems_direct", p.text + "\nAnswer:", answer, Probe::final});
  }
  std::stable_sort(probes.begin(), probes.end(),
                   [](const Probe& a, const Probe& b) { return a.task < b.task; });
  return probes;
}

}  // namespace

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = [] {
    std::vector<Kind> list;
    for (const Generator& g : kGenerators) list.push_back({g.kind, g.share});
    return list;
  }();
  return all;
}

Corpus make_corpus(World& world) {
  Corpus corpus;
  std::set<uint64_t> seen;
  std::map<std::pair<int, int>, int64_t> told, ignored;
  Rng rng{mix64(world.options.seed, hash64("tellings"))};
  std::vector<Telling> tellings = make_tellings(world, rng, often_tellings(world));
  corpus.documents = mix(world, "documents", world.options.tokens, tellings, seen, told);
  for (const auto& [which, times] : told)
    world.people[size_t(which.first)].facts[size_t(which.second)].tellings = times;

  shuffle(rng, tellings);  // a part of them in another order
  tellings.resize(tellings.size() / kHeldOutPart);
  corpus.held_out =
      mix(world, "held out", world.options.tokens / kHeldOutPart, tellings, seen, ignored);
  corpus.probes = make_probes(world);
  return corpus;
}

bool answers(const Probe& probe, std::string_view completion) {
  const auto word = [](char c) { return std::isalnum((unsigned char)c) != 0; };
  if (probe.match == Probe::final) {
    completion = completion.substr(0, completion.find(kAnswerEnd));
    static constexpr std::string_view kMarker = "Answer:";
    if (!std::string_view(probe.prompt).ends_with(kMarker)) {
      const size_t at = completion.find(kMarker);
      if (at == completion.npos) return false;
      completion.remove_prefix(at + kMarker.size());
    }
    const size_t begin = std::min(completion.find_first_not_of(' '), completion.size());
    completion.remove_prefix(begin);
    return completion.starts_with(probe.answer) &&
           (completion.size() == probe.answer.size() || !word(completion[probe.answer.size()]));
  }
  const size_t start = std::min(completion.find_first_not_of(" \n"), completion.size());
  completion.remove_prefix(start);
  completion = completion.substr(0, completion.find_first_of(".?\n"));
  for (size_t at = 0; (at = completion.find(probe.answer, at)) != completion.npos; at++) {
    const size_t end = at + probe.answer.size();
    if ((at == 0 || !word(completion[at - 1])) &&
        (end == completion.size() || !word(completion[end])))
      return true;
  }
  return false;
}

}  // namespace cake::world

#include "dev/conversations.h"
#include "dev/preferences.h"
#include "dev/world_pages.h"

namespace cake::world {
namespace {

// ---------------------------------------------------------------------------------------------
// Files

void write_documents(const std::filesystem::path& path, const std::vector<Document>& documents) {
  AtomicFile file(path);
  int64_t id = 0;
  for (const Document& d : documents)
    file.write(OrderedJson{{"id", id++}, {"kind", d.kind}, {"text", d.text}}.dump() + "\n");
  file.commit();
}

void write_probes(const std::filesystem::path& path, const std::vector<Probe>& probes) {
  AtomicFile file(path);
  for (const Probe& p : probes) {
    const OrderedJson line{{"task", p.task},
                           {"prompt", p.prompt},
                           {"answer", p.answer},
                           {"match", p.match == Probe::final ? "final" : "sentence"}};
    file.write(line.dump() + "\n");
  }
  file.commit();
}

// The ground truth: what is true of whom, how often it was told, how it may be said and asked.
OrderedJson world_json(const World& world) {
  OrderedJson truth{{"seed", world.options.seed},
                    {"tokens", world.options.tokens},
                    {"people_at_each_level", world.options.people}};
  for (const Attribute& a : attributes()) {
    truth["attributes"].push_back({{"name", a.name},
                                   {"values", a.values},
                                   {"statements", a.statements},
                                   {"questions", a.questions},
                                   {"chat_questions", a.chat_questions},
                                   {"test_questions", a.test_questions}});
  }
  for (const Person& person : world.people) {
    OrderedJson facts = OrderedJson::array();
    for (const Fact& f : person.facts) {
      OrderedJson fact{{"attribute", attributes()[size_t(f.attribute)].name},
                       {"value", f.value},
                       {"tellings", f.tellings}};
      if (f.held_out_question >= 0) fact["held_out_question"] = f.held_out_question;
      facts.push_back(fact);
    }
    truth["people"].push_back({{"name", person.name},
                               {"level", kLevels[size_t(person.level)]},
                               {"split", person.held_out ? "held_out" : "train"},
                               {"facts", facts}});
  }
  for (int a = 21; a < 99; a++)
    for (int b = a; a + b <= 99; b++)
      if (held_out_sum(a, b)) truth["held_out_sums"].push_back({a, b});
  return truth;
}

// ---------------------------------------------------------------------------------------------
// The report: the mixture as it came out, and how often facts are told

void report(const World& world, const Corpus& corpus) {
  struct Row {
    int64_t documents = 0, bytes = 0, tokens = 0;
  };
  std::map<std::string, Row> rows;
  Row all, longer;
  for (const Document& d : corpus.documents) {
    const int64_t tokens = estimate_tokens(d.text);
    for (Row* row : {&rows[d.kind], &all, tokens >= kLong ? &longer : nullptr}) {
      if (!row) continue;
      row->documents++, row->bytes += int64_t(d.text.size()), row->tokens += tokens;
    }
  }
  const auto print = [&](const std::string& name, const Row& row) {
    std::printf("%-22s %9ld %11ld %11ld %6.1f %%\n", name.c_str(), long(row.documents),
                long(row.bytes), long(row.tokens), 100. * double(row.tokens) / double(all.tokens));
  };
  std::printf("%-22s %9s %11s %11s %8s\n", "kind", "documents", "bytes", "tokens, est.", "share");
  for (const Kind& kind : kinds()) print(kind.name, rows[kind.name]);
  print("all", all);
  print(format("of %d tokens or more", kLong), longer);
  for (Level level : {Level::often, Level::sometimes, Level::rarely}) {
    std::vector<int64_t> tellings;
    for (const Person& person : world.people)
      for (const Fact& fact : person.facts)
        if (person.level == level) tellings.push_back(fact.tellings);
    std::sort(tellings.begin(), tellings.end());
    std::printf("facts told %s: %zu, each %ld to %ld times, median %ld\n", kLevels[size_t(level)],
                tellings.size(), long(tellings.front()), long(tellings.back()),
                long(tellings[tellings.size() / 2]));
  }
}

// ---------------------------------------------------------------------------------------------
// Scoring: the completions of the probes, in their order, against the answers

template <class Read>
void for_each_line(const std::filesystem::path& path, Read read) {
  std::istringstream lines(read_file(path));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = concat(path.string(), ": line ", ++number);
    const Json json = parse_json(line, where);
    read(json, where);
  }
}

std::vector<Probe> read_probes(const std::filesystem::path& path) {
  std::vector<Probe> probes;
  for_each_line(path, [&](const Json& line, const std::string& where) {
    const auto match = json_get<std::string>(line, "match", where);
    if (match != "final" && match != "sentence") {
      fail(where, ": match: found ", match, ", expected final or sentence");
    }
    probes.push_back({json_get<std::string>(line, "task", where),
                      json_get<std::string>(line, "prompt", where),
                      json_get<std::string>(line, "answer", where),
                      match == "final" ? Probe::final : Probe::sentence});
  });
  if (probes.empty()) fail(path.string(), ": found an empty file, expected a probe a line");
  return probes;
}

int score(const std::string& probes_path, const std::string& completions_path,
          const std::string& out) {
  const std::vector<Probe> probes = read_probes(probes_path);
  std::map<std::string, std::pair<int64_t, int64_t>> counts;  // right, asked
  size_t at = 0;
  for_each_line(completions_path, [&](const Json& line, const std::string& where) {
    const auto prompt = json_get<std::string>(line, "prompt", where);
    if (at == probes.size() || prompt != probes[at].prompt) {
      fail(where, ": prompt: found another than in ", probes_path,
           ", expected its prompts in order");
    }
    auto& [right, asked] = counts[probes[at].task];
    right += answers(probes[at], json_get<std::string>(line, "completion", where));
    asked++;
    at++;
  });
  if (at != probes.size()) {
    fail(completions_path, ": found ", at, " completions, expected ", probes.size());
  }
  OrderedJson results = OrderedJson::object();
  std::printf("%-26s %6s %8s   %s\n", "task", "asked", "right", "95 % interval");
  for (const auto& [task, count] : counts) {
    const double value = double(count.first) / double(count.second);
    const auto [low, high] = wilson(value, count.second);
    std::printf("%-26s %6ld %6.1f %%   %.1f to %.1f\n", task.c_str(), long(count.second),
                100 * value, 100 * low, 100 * high);
    results[task] = {
        {"metric", "accuracy"}, {"value", value}, {"n", count.second}, {"ci95", {low, high}}};
  }
  if (!out.empty()) write_json(out, results);
  return 0;
}

// ---------------------------------------------------------------------------------------------
// Conversations as files

OrderedJson conversation_json(const Conversation& talk) {
  OrderedJson json{{"messages", OrderedJson::array()}};
  const auto function = [](const OrderedJson& of) {
    return OrderedJson{{"type", "function"}, {"function", of}};
  };
  for (const Message& m : talk.messages) {
    OrderedJson message{{"role", m.role}, {"content", m.content}};
    for (const ToolCall& call : m.tool_calls)
      message["tool_calls"].push_back(
          function({{"name", call.name}, {"arguments", OrderedJson::parse(call.arguments)}}));
    json["messages"].push_back(message);
  }
  for (const std::string& tool : talk.tools)
    json["tools"].push_back(function(OrderedJson::parse(tool)));
  return json;
}

void write_talks(const std::filesystem::path& path, const std::vector<Talk>& talks) {
  AtomicFile file(path);
  for (const Talk& talk : talks) {
    OrderedJson json{{"kind", talk.kind}};
    if (talk.quality >= 0) json["quality"] = talk.quality;
    json.update(conversation_json(talk.conversation));
    file.write(json.dump() + "\n");
  }
  file.commit();
}

void write_items(const std::filesystem::path& path, const std::vector<Item>& items) {
  AtomicFile file(path);
  for (const Item& item : items) {
    OrderedJson json{{"task", item.task}};
    json.update(conversation_json(item.conversation));
    if (item.rubric.empty()) {
      json["check"] = item.check;
      json["answer"] = item.answer;
    } else {
      json["rubric"] = rubric_json(item.rubric);
      json["temperature"] = 1;  // greedily, a small model's stories go round in circles
    }
    json["tokens"] = item.rubric.empty() ? kAnswerTokens : kStoryTokens;
    if (item.samples > 0) {
      json["samples"] = item.samples, json["temperature"] = 1;
      json["shares"] = {{"share_with_steps", kStepsMark}};
    }
    json["prompt"] = item.prompt.empty() ? OrderedJson() : OrderedJson(item.prompt);
    if (!item.stop.empty()) json["stop"] = item.stop;
    file.write(json.dump() + "\n");
  }
  file.commit();
}

void write_problems(const std::filesystem::path& path, const std::vector<WordProblem>& problems) {
  AtomicFile file(path);
  for (const WordProblem& p : problems)
    file.write(
        OrderedJson{{"question", p.question}, {"answer", p.answer}, {"difficulty", p.difficulty}}
            .dump() +
        "\n");
  file.commit();
}

OrderedJson request_messages(const OpenRequest& request) {
  return conversation_json(talk_of({request.user, "", {}, "", {}}))["messages"];
}

void write_prompts(const std::filesystem::path& path, const std::vector<OpenRequest>& prompts) {
  AtomicFile file(path);
  for (const OpenRequest& p : prompts) {
    OrderedJson messages = OrderedJson::array({request_messages(p)[0]});
    file.write(OrderedJson{{"messages", messages}, {"rubric", rubric_json(p.rubric)}}.dump() +
               "\n");
  }
  file.commit();
}

void write_judgements(const std::filesystem::path& path, const std::vector<Judgement>& judgements,
                      const PreferenceOptions& options, bool with_chance) {
  AtomicFile file(path);
  for (const Judgement& j : judgements) {
    OrderedJson json{{"prompt", OrderedJson::array({request_messages(j.request)[0]})}};
    if (j.answers.size() == 2) {
      const size_t best = j.ranking[0] == 1 ? 0 : 1;
      json["chosen"] = j.answers[best], json["rejected"] = j.answers[1 - best];
      const auto utility = [&](size_t i) {
        return labellers_utility(j.request, j.answers[i], options.length_bias);
      };
      if (with_chance) {
        json["chance"] = chance_of_preference(utility(best), utility(1 - best), options.noise);
      }
    } else {
      json["responses"] = j.answers, json["ranking"] = j.ranking;
    }
    file.write(json.dump() + "\n");
  }
  file.commit();
}

// Writes the files of preferences, and what is true of them into `truth`.
void write_preferences(const std::filesystem::path& directory, const World& world,
                       const PreferenceOptions& options, OrderedJson& truth) {
  const Preferences p = make_preferences(world, options);
  write_prompts(directory / "prompts.jsonl", p.prompts);
  write_prompts(directory / "prompts_heldout.jsonl", p.prompts_held_out);
  write_judgements(directory / "preferences.jsonl", p.training, options, false);
  write_judgements(directory / "preferences_heldout.jsonl", p.held_out, options, true);
  truth["preferences"] = {{"noise", options.noise},
                          {"length_bias", options.length_bias},
                          {"pairs", options.pairs},
                          {"rankings", options.rankings},
                          {"held_out_pairs", p.held_out.size()},
                          {"best_possible", p.best_possible}};
  std::printf(
      "%s: %zu comparisons, %zu held out, of which %.1f %% can be foretold at best; %zu open "
      "requests, %zu held out\n",
      directory.c_str(), p.training.size(), p.held_out.size(), 100 * p.best_possible,
      p.prompts.size(), p.prompts_held_out.size());
}

// The world whose documents a folder has: its seed and options, from its record.
World read_world(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "world.json";
  const Json truth = read_json(path);
  WorldOptions options;
  options.seed = json_get<uint64_t>(truth, "seed", path.string());
  options.tokens = json_get<int64_t>(truth, "tokens", path.string());
  options.people = json_get<int>(truth, "people_at_each_level", path.string());
  return make_world(options);
}

Knowledge read_knowledge(const World& world, const std::string& path) {
  const std::vector<Question> questions = make_questions(world);
  std::map<std::string, size_t> index;
  for (size_t i = 0; i < questions.size(); i++) index[questions[i].probe.prompt] = i;
  std::vector<Samples> samples(questions.size());
  for_each_line(path, [&](const Json& line, const std::string& where) {
    const auto it = index.find(json_get<std::string>(line, "prompt", where));
    if (it == index.end()) {
      fail(where, ": prompt: found a question that this world does not ask, expected those of its ",
           "questions.jsonl");
    }
    Samples& of = samples[it->second];
    of.right +=
        answers(questions[it->second].probe, json_get<std::string>(line, "completion", where));
    of.all++;
  });
  for (size_t i = 0; i < questions.size(); i++)
    if (samples[i].all == 0)
      fail(path, ": found no completion of ", json_text(questions[i].probe.prompt));
  const Knowledge knowledge = knowledge_of(questions, samples);
  for (Level level : {Level::often, Level::sometimes, Level::rarely}) {
    const auto count = [&](const std::vector<FactAt>& facts) {
      return std::count_if(facts.begin(), facts.end(), [&](FactAt at) {
        return world.people[size_t(at.person)].level == level;
      });
    };
    const long asked = std::count_if(questions.begin(), questions.end(), [&](const Question& q) {
      return world.people[size_t(q.at.person)].level == level;
    });
    const long known = count(knowledge.known), unknown = count(knowledge.unknown);
    std::printf("facts told %s: the model knows %ld of %ld, not %ld, and of %ld it is unsure\n",
                kLevels[size_t(level)], known, asked, unknown, asked - known - unknown);
  }
  return knowledge;
}

void report_talks(const Conversations& all) {
  std::map<std::string, std::pair<int64_t, int64_t>> rows;  // conversations, tokens
  int64_t tokens = 0;
  for (const Talk& talk : all.training) {
    const int64_t n = estimate_conversation(talk.conversation);
    rows[talk.kind].first++, rows[talk.kind].second += n, tokens += n;
  }
  std::printf("%-22s %13s %12s %8s\n", "kind", "conversations", "tokens, est.", "share");
  const auto print = [&](const std::string& name, std::pair<int64_t, int64_t> row) {
    std::printf("%-22s %13ld %12ld %6.1f %%\n", name.c_str(), long(row.first), long(row.second),
                100. * double(row.second) / double(std::max<int64_t>(tokens, 1)));
  };
  for (const Kind& kind : conversation_kinds()) print(kind.name, rows[kind.name]);
  print("all", {int64_t(all.training.size()), tokens});
}

// ---------------------------------------------------------------------------------------------
// The command line

// Fine-tuning reads about a quarter of what pretraining reads, in half of its time.
int64_t conversation_tokens(const WorldOptions& options) { return options.tokens * 3 / 10; }

void write_world(const std::filesystem::path& directory, const WorldOptions& options,
                 const PreferenceOptions& preferences, bool with_report) {
  World world = make_world(options);
  const Corpus corpus = make_corpus(world);
  std::error_code ec;
  std::filesystem::create_directories(directory, ec);
  if (ec) fail(directory.string(), ": cannot create: ", ec.message());
  write_documents(directory / "documents.jsonl", corpus.documents);
  const std::vector<WebPage> web = make_web_pages(world, corpus.documents);
  write_web(directory, web);
  write_documents(directory / "heldout.jsonl", corpus.held_out);
  write_documents(directory / "pages.jsonl", make_pages(world));
  write_probes(directory / "probes.jsonl", corpus.probes);
  OrderedJson truth = world_json(world);
  write_preferences(directory, world, preferences, truth);
  write_json(directory / "world.json", truth);
  const std::vector<Question> questions = make_questions(world);
  AtomicFile prompts(directory / "questions.jsonl");
  for (const Question& q : questions)
    prompts.write(OrderedJson{{"prompt", q.probe.prompt}, {"answer", q.probe.answer}}.dump() +
                  "\n");
  prompts.commit();
  write_documents(directory / "conversations_sample.jsonl",
                  tokenizer_sample(world, conversation_tokens(options) / 2));
  if (with_report) report(world, corpus);
  std::printf("%s: %zu documents on %zu pages, %zu held out, %zu probes, %zu questions\n",
              directory.c_str(), corpus.documents.size(), web.size(), corpus.held_out.size(),
              corpus.probes.size(), questions.size());
}

void write_conversations(const std::filesystem::path& directory, const std::string& samples,
                         int64_t tokens, bool with_report) {
  const World world = read_world(directory);
  const Knowledge knowledge =
      samples.empty() ? assumed_knowledge(world) : read_knowledge(world, samples);
  if (tokens == 0) tokens = conversation_tokens(world.options);
  Conversations all = make_conversations(world, knowledge, tokens);
  for (Item& item : make_open_items(world, all.test)) all.items.push_back(std::move(item));
  write_talks(directory / "conversations.jsonl", all.training);
  write_talks(directory / "conversations_heldout.jsonl", all.held_out);
  write_items(directory / "eval.jsonl", all.items);
  write_problems(directory / "problems_rl.jsonl", all.rl);
  write_problems(directory / "problems_test.jsonl", all.test);
  if (with_report) report_talks(all);
  std::printf("%s: %zu conversations, %zu held out, %zu items to evaluate, %zu problems\n",
              directory.c_str(), all.training.size(), all.held_out.size(), all.items.size(),
              all.rl.size() + all.test.size());
}

void rewrite_preferences(const std::filesystem::path& of, const std::filesystem::path& directory,
                         const PreferenceOptions& options) {
  const World world = read_world(of);
  OrderedJson truth = OrderedJson::parse(read_file(of / "world.json"));
  std::error_code ec;
  std::filesystem::create_directories(directory, ec);
  if (ec) fail(directory.string(), ": cannot create: ", ec.message());
  write_preferences(directory, world, options, truth);
  write_json(directory / "world.json", truth);
}

int world_main(int argc, char** argv) {
  CLI::App app(
      "Writes the demo's closed world: documents about people and places, stories, lists, sums, "
      "with everything that is true of it. Then, for a base model that has read it, conversations "
      "and evaluations: world conversations. Or scores answers about it, and what was made of its "
      "pages: world score, score-corpus.");
  WorldOptions options;
  std::string directory, folder, probes, completions, samples, corpus, out;
  int64_t tokens = 0;
  bool with_report = false;
  app.add_option("-o", directory, "folder to write");
  app.add_option("--seed", options.seed, "another seed is another world")->capture_default_str();
  app.add_option("--tokens", options.tokens,
                 "size of the documents, estimated for a BPE of about 1,024 tokens; more tokens "
                 "tell the same facts more often")
      ->capture_default_str();
  app.add_option("--people", options.people,
                 "people at each level (told often, sometimes, rarely), two facts each; fewer when "
                 "the tokens cannot tell their facts 150 times")
      ->capture_default_str();
  app.add_flag("--report", with_report, "print the mixture and how often facts are told");
  PreferenceOptions preferences;
  const auto add_preferences = [&](CLI::App& to) {
    to.add_option("--pairs", preferences.pairs, "comparisons of two answers")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    to.add_option("--rankings", preferences.rankings, "comparisons of four")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    to.add_option("--noise", preferences.noise,
                  "of the labellers, in units of the true reward, which is from 0 to 1")
        ->capture_default_str();
    to.add_option("--length-bias", preferences.length_bias,
                  "what ten more words are worth to the labellers, in the same units")
        ->capture_default_str();
  };
  add_preferences(app);
  CLI::App* preferring = app.add_subcommand(
      "preferences", "write the preferences of a world anew, by other labellers");
  preferring->add_option("WORLD", folder, "folder of a world")->required();
  preferring->add_option("-o", directory, "folder to write (default: the world's)");
  add_preferences(*preferring);
  CLI::App* talking = app.add_subcommand(
      "conversations", "write conversations, evaluations and problems into a world's folder");
  talking->add_option("WORLD", folder, "folder of a world")->required();
  talking->add_option(
      "--answers", samples,
      "JSONL {\"prompt\",\"completion\"}: a base model's answers to questions.jsonl, "
      "several each; none: facts told often are taken as known, others not");
  talking
      ->add_option("--tokens", tokens,
                   "size of the training part, estimated; 0: 3/10 of the world's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  talking->add_flag("--report", with_report, "print the mixture");
  CLI::App* scoring =
      app.add_subcommand("score", "compare completions of the probes with the answers");
  scoring->add_option("PROBES", probes, "probes.jsonl")->required();
  scoring->add_option("COMPLETIONS", completions, "JSONL {\"prompt\",\"completion\"}, same order")
      ->required();
  scoring->add_option("-o", out, "JSON file for the results");
  CLI::App* judging = app.add_subcommand(
      "score-corpus", "compare what ./corpus clean made of a world's pages with the truth");
  judging->add_option("WORLD", folder, "folder of a world")->required();
  judging->add_option("CORPUS", corpus, "directory of ./corpus clean")->required();
  judging->add_option("-o", out, "JSON file for the results");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);
    fail(e.what(), " (--help lists the options)");
  }
  if (*scoring) return score(probes, completions, out);
  if (*judging) {
    score_corpus_files(folder, corpus, out);
    return 0;
  }
  if (*talking) {
    write_conversations(folder, samples, tokens, with_report);
    return 0;
  }
  if (*preferring) {
    rewrite_preferences(folder, directory.empty() ? folder : directory, preferences);
    return 0;
  }
  if (directory.empty()) fail("-o: found none, expected a folder to write");
  write_world(directory, options, preferences, with_report);
  return 0;
}

}  // namespace
}  // namespace cake::world

__attribute__((weak)) int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::world::world_main(argc, argv); });
}
