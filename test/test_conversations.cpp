// The world's conversations: what they promise, checked by reading them. Arithmetic, spelling,
// facts and passages are worked out here again, from the words alone.
#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cake/tools.h"
#include "dev/world.h"
#include "test/chatml.h"
#include "test/support.h"

using namespace cake;
using namespace cake::world;

namespace {

constexpr int64_t kTokens = 300'000;  // of training conversations

struct Taught {
  World world;
  Knowledge knowledge;
  Conversations all;
};
Taught teach(uint64_t seed, int64_t tokens) {
  Taught t{make_world({.seed = seed}), {}, {}};
  t.knowledge = assumed_knowledge(t.world);
  t.all = make_conversations(t.world, t.knowledge, tokens);
  return t;
}
const Taught& taught() {  // a world of the default size
  static const Taught t = teach(1, kTokens);
  return t;
}
const std::vector<const Talk*>& talks() {  // training and held out
  static const std::vector<const Talk*> list = [] {
    std::vector<const Talk*> all;
    for (const auto* part : {&taught().all.training, &taught().all.held_out})
      for (const Talk& talk : *part) all.push_back(&talk);
    return all;
  }();
  return list;
}

// Calls check(user's text, assistant's text, the conversation) for each exchange of a kind without
// tools; returns how many there were.
int each_exchange(
    const std::string& kind,
    const std::function<void(const std::string&, const std::string&, const Conversation&)>& check) {
  int n = 0;
  for (const Talk* talk : talks()) {
    if (!kind.empty() && talk->kind != kind) continue;
    const auto& messages = talk->conversation.messages;
    for (size_t i = 1; i < messages.size(); i++) {
      if (messages[i].role != "assistant" || messages[i - 1].role != "user") continue;
      CAPTURE(messages[i - 1].content);
      CAPTURE(messages[i].content);
      check(messages[i - 1].content, messages[i].content, talk->conversation);
      n++;
    }
  }
  return n;
}

std::string joined(const Conversations& all) {
  std::string text;
  for (const auto* part : {&all.training, &all.held_out})
    for (const Talk& talk : *part) text += talk.kind + conversation_text(talk.conversation);
  for (const Item& item : all.items)
    text += item.task + conversation_text(item.conversation) + item.answer + item.prompt;
  for (const auto* part : {&all.rl, &all.test})
    for (const WordProblem& p : *part) text += p.question + p.answer;
  return text;
}

bool has_word(const std::string& text, const std::string& word) {
  const auto letter = [&](size_t i) {
    return i < text.size() && std::isalnum((unsigned char)text[i]) != 0;
  };
  for (size_t at = 0; (at = text.find(word, at)) != text.npos; at++)
    if (!(at > 0 && letter(at - 1)) && !letter(at + word.size())) return true;
  return false;
}
bool is_refusal(const std::string& answer) {
  return contains(answer, "don't know") || contains(answer, "cannot help");
}

std::string last_number(const std::string& text) {
  size_t end = text.find_last_of("0123456789");
  if (end == text.npos) return "";
  size_t begin = end;
  while (begin > 0 && (std::isdigit((unsigned char)text[begin - 1]) || text[begin - 1] == '.'))
    begin--;
  return text.substr(begin, end + 1 - begin);
}

std::vector<int> numbers(const std::string& text) {
  std::vector<int> found;
  for (size_t i = 0; i < text.size(); i++) {
    if (!std::isdigit((unsigned char)text[i])) continue;
    found.push_back(std::atoi(text.c_str() + i));
    while (i < text.size() && std::isdigit((unsigned char)text[i])) i++;
  }
  return found;
}

std::vector<std::string> split(const std::string& text, const std::string& ends) {
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); i++) {
    parts.back() += text[i];
    if (ends.find(text[i]) != ends.npos) parts.emplace_back();
  }
  if (parts.back().empty()) parts.pop_back();
  for (std::string& part : parts)
    part.erase(0, std::min(part.find_first_not_of(" \n"), part.size()));
  return parts;
}

// A word problem worked out from its sentences: the first says what there is; one with two numbers
// brings their product, one of loss takes its number away, any other brings its number.
int solve(const std::string& problem) {
  int value = -1;
  for (const std::string& sentence : split(problem, ".?")) {
    const std::vector<int> n = numbers(sentence);
    if (n.empty()) continue;
    bool loss = false;
    for (const char* word : {" away", " loses ", " takes ", " sells ", " steals "})
      loss |= contains(sentence, word);
    value = value < 0       ? n[0]
            : n.size() == 2 ? value + n[0] * n[1]
            : loss          ? value - n[0]
                            : value + n[0];
  }
  return value;
}

const Person* named(const std::string& text) {
  for (const Person& p : taught().world.people)
    if (contains(text, p.name)) return &p;
  return nullptr;
}

// What a question asks for, by its words: town, job, food or colour.
int attribute_asked(const std::string& question) {
  const std::pair<const char*, int> words[] = {
      {"colour", 3}, {"living", 1}, {"live", 0}, {"lives", 0}, {"town", 0},  {"home", 0},
      {"visit", 0},  {"find", 0},   {"eat", 2},  {"eats", 2},  {"food", 2},  {"dinner", 2},
      {"cook", 2},   {"job", 1},    {"work", 1}, {"works", 1}, {"people", 1}};
  for (const auto& [word, attribute] : words)
    if (has_word(question, word)) return attribute;
  FAIL("an attribute is asked: " << question);
  return -1;
}

std::string with(std::string text, const std::string& what, const std::string& by) {
  for (size_t at = 0; (at = text.find(what, at)) != text.npos; at += by.size())
    text.replace(at, what.size(), by);
  return text;
}

// A text without its content: names of people, numbers, and letter by letter what is spelled.
std::string frame(std::string text, const std::string& answer) {
  if (const Person* p = named(text)) text = with(text, p->name, "{n}");
  std::string word;
  if (const auto parts = split(answer, " "); !parts.empty()) {
    for (const std::string& part : parts)  // "b a k e r." or "Steps: b 1, a 2, ..."
      if (std::islower((unsigned char)part[0]) &&
          (part.size() == 1 || part[1] == ' ' || part[1] == '.'))
        word += part[0];
  }
  if (word.size() > 2) {
    text = with(text, word, "{w}");
    for (const char c : word) {
      for (const std::string around : {" ", "?"})
        text = with(text, concat(" ", c, around), " {l}" + around);
    }
  }
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    const bool digit = std::isdigit((unsigned char)text[i]);
    const bool point =
        text[i] == '.' && i + 1 < text.size() && std::isdigit((unsigned char)text[i + 1]);
    if (!digit && !point) {
      out += text[i];
    } else if (out.empty() || out.back() != '#') {
      out += '#';
    }
  }
  for (const char* sign : {"plus", "minus", "times", "-", "*"}) out = with(out, sign, "+");
  for (const char* which : {"larger", "smaller"}) out = with(out, which, "{>}");
  return out;
}

}  // namespace

TEST_CASE("the same seed makes the same conversations, another seed others") {
  const std::string first = joined(teach(7, 60'000).all);
  CHECK(first == joined(teach(7, 60'000).all));
  CHECK(first != joined(teach(8, 60'000).all));
}

TEST_CASE("conversations follow the template and fit the context of a tokenizer trained on them") {
  TempDir dir;
  World world = make_world({.seed = 1, .tokens = 1'000'000});
  {
    AtomicFile file(dir / "text.jsonl");
    for (const Document& d : make_corpus(world).documents) {
      file.write(Json{{"text", d.text}}.dump() + "\n");
    }
    for (const Document& d : tokenizer_sample(world, kTokens)) {
      file.write(Json{{"text", d.text}}.dump() + "\n");
    }
    file.commit();
  }
  const Tokenizer tokenizer = train_tokenizer({{(dir / "text.jsonl").string()}}, 1024, "qwen2");
  int64_t tokens = 0, estimated = 0;
  size_t longest = 0;
  for (const Talk* talk : talks()) {
    CAPTURE(conversation_text(talk->conversation));
    check_conversation(talk->conversation, talk->kind);
    const size_t n = chatml(tokenizer, talk->conversation).ids.size();
    longest = std::max(longest, n);
    tokens += int64_t(n), estimated += estimate_conversation(talk->conversation);
    REQUIRE(n <= size_t(kContext));
  }
  CHECK(longest > 190);
  CHECK(double(estimated) > .85 * double(tokens));
  CHECK(double(estimated) < 1.1 * double(tokens));
  for (const Item& item : taught().all.items) {
    check_conversation(item.conversation, item.task, true);
    REQUIRE(item.conversation.messages.back().role == "user");
    Conversation answered = item.conversation;
    answered.messages.push_back({"assistant", item.answer, {}});
    CAPTURE(conversation_text(answered));
    REQUIRE(chatml(tokenizer, answered).ids.size() <= size_t(kContext));
    REQUIRE(tokenizer.encode(item.answer).size() < size_t(kAnswerTokens));
  }
  const Search search([] {
    std::vector<std::string> pages;
    for (const Document& page : make_pages(taught().world)) pages.push_back(page.text);
    return pages;
  }());
  for (const std::string& passage : search.passages())
    REQUIRE(tokenizer.encode(passage).size() <= 64);
}

TEST_CASE("conversations are mixed as promised, and one in fifty beginnings is held out") {
  const Conversations& all = taught().all;
  std::map<std::string, double> tokens;
  for (const Talk& talk : all.training)
    tokens[talk.kind] += double(estimate_conversation(talk.conversation));
  double shares = 0;
  for (const world::Kind& kind : conversation_kinds()) {
    CAPTURE(kind.name);
    // The last conversation of a kind passes the share: half of the longest, of the smallest share.
    CHECK(tokens[kind.name] >= kind.share * double(kTokens));
    CHECK(tokens[kind.name] <= kind.share * double(kTokens) + kContext);
    shares += kind.share;
  }
  CHECK(std::abs(shares - 1) < 1e-9);
  CHECK(tokens.size() == conversation_kinds().size());
  const auto first = [](const Talk& talk) {
    return talk.conversation.messages[talk.conversation.messages[0].role == "system"].content;
  };
  std::set<std::string> beginnings;
  for (const Talk& talk : all.training) beginnings.insert(first(talk));
  std::set<std::string> kinds;
  for (const Talk& talk : all.held_out) {
    REQUIRE(beginnings.count(first(talk)) == 0);
    kinds.insert(talk.kind);
  }
  // Of the rarest kinds, with 20 conversations or so, none may be held out.
  CHECK(kinds.size() >= conversation_kinds().size() - 4);
  CHECK(kinds.count("word problems"));
  CHECK(double(all.held_out.size()) > .01 * double(all.training.size()));
  CHECK(double(all.held_out.size()) < .03 * double(all.training.size()));
}

TEST_CASE("no phrasing, problem or text of the evaluations is in training conversations") {
  std::set<std::string> texts, frames;
  std::string everything;
  for (const Talk& talk : taught().all.training) {
    const auto& messages = talk.conversation.messages;
    for (size_t i = 0; i + 1 < messages.size(); i++) {
      if (messages[i].role != "user" && messages[i].role != "system") continue;
      texts.insert(messages[i].content);
      const std::string& answer = messages[i + 1].content;
      frames.insert(frame(messages[i].content, answer));
      everything += messages[i].content + "\n\n";
    }
  }
  std::map<std::string, int> count;
  std::map<std::string, std::set<std::string>> remains;
  for (const Item& item : taught().all.items) {
    const std::string& user = item.conversation.messages.back().content;
    CAPTURE(user);
    count[item.task]++;
    if (item.task != "system") REQUIRE(texts.count(user) == 0);
    const std::string framed = frame(user, item.answer);
    CAPTURE(framed);
    if (item.task != "identity" && item.task != "decline" && item.task != "system")
      REQUIRE(frames.count(framed) == 0);
    if (item.task == "system") {
      REQUIRE(texts.count(item.conversation.messages[0].content) == 0);
    } else if (item.task == "word_problems" || item.task == "word_problems_direct") {
      const std::string problem = item.prompt.substr(0, item.prompt.find('\n'));
      REQUIRE(problem_part(problem) == Part::test);
      REQUIRE_FALSE(contains(everything, problem));
      const size_t at = user.find(problem);
      REQUIRE(at != user.npos);
      remains[item.task].insert(user.substr(0, at) + user.substr(at + problem.size()));
    } else if (item.task == "compare") {
      double x = 0, y = 0;
      const size_t digit = item.prompt.find_first_of("0123456789");
      REQUIRE(std::sscanf(item.prompt.c_str() + digit, "%lf or %lf", &x, &y) == 2);
      REQUIRE(held_out_comparison(format("%g", x), format("%g", y)));
    }
  }
  for (const auto& [task, parts] : remains) {
    CHECK(parts.size() == 4);
    for (const std::string& part : parts) CHECK_FALSE(contains(everything, part));
  }
  for (const char* words :
       {"My question:", "Tell me: ", "I have a text for you", "Please answer. "})
    CHECK_FALSE(contains(everything, words));
  for (const Attribute& a : attributes())
    for (const std::string& q : a.test_questions) CHECK(frames.count(q) == 0);
  CHECK(frames.count(attributes()[0].chat_questions[0]) == 1);  // frames do find what is there
  for (const char* task :
       {"facts_often", "facts_sometimes", "facts_rarely", "facts_unmentioned", "refuse_unknown",
        "refuse_known", "context", "context_alike", "word_problems", "word_problems_direct",
        "identity", "system", "compare", "spelling", "tools", "decline"}) {
    CAPTURE(task);
    CHECK(count[task] == 500);
  }
  CHECK(count.size() == 16);
}

TEST_CASE("an item's own answer passes its check, and another does not") {
  for (const Item& item : taught().all.items) {
    CAPTURE(item.task);
    CAPTURE(item.conversation.messages.back().content);
    CAPTURE(item.answer);
    const bool tool = item.check.at("type") == "tool";
    const std::set<std::string> called = {item.check.value("name", "")};
    REQUIRE(passes(item.check, item.answer, called));
    if (tool) REQUIRE_FALSE(passes(item.check, item.answer));
    const bool refuses = is_refusal(item.answer);
    REQUIRE_FALSE(passes(item.check, refuses ? "Yes, I do 1." : "I don't know.", called));
    REQUIRE(tool == !item.conversation.tools.empty());
  }
}

TEST_CASE("people are answered for as the model knows them, and held-out people never named") {
  const World& world = taught().world;
  int answered = 0, refused = 0, asked = 0;
  asked = each_exchange(
      "", [&](const std::string& user, const std::string& answer, const Conversation&) {
        const Person* p = named(user);
        if (!p || answer.empty()) return;  // empty: a call
        const auto told = std::find_if(p->facts.begin(), p->facts.end(), [&](const Fact& f) {
          return f.attribute == attribute_asked(user);
        });
        const bool known = told != p->facts.end() && p->level == Level::often;
        if (is_refusal(answer)) {
          REQUIRE_FALSE(known);
          refused++;
        } else {
          REQUIRE(known);
          REQUIRE(has_word(answer, told->value));
          answered++;
        }
      });
  CHECK(asked > 1000);
  CHECK(answered > 1000);
  CHECK(refused > 500);
  for (const Talk* talk : talks()) {
    for (const Message& m : talk->conversation.messages)
      for (const Person& p : world.people)
        if (p.held_out) REQUIRE_FALSE(contains(m.content, p.name));
  }
  for (const Item& item : taught().all.items) {
    const Person* p = named(item.conversation.messages.back().content);
    if (item.task.starts_with("facts_")) {
      REQUIRE(p);
      REQUIRE(p->held_out == (item.task == "facts_unmentioned"));
      REQUIRE(std::any_of(p->facts.begin(), p->facts.end(),
                          [&](const Fact& f) { return item.check.at("any").at(0) == f.value; }));
      const Level level = item.task == "facts_sometimes" ? Level::sometimes
                          : item.task == "facts_rarely"  ? Level::rarely
                                                         : Level::often;
      REQUIRE(p->level == level);
    } else if (item.task == "refuse_unknown") {
      REQUIRE(p);
      REQUIRE(p->level == Level::unknown);
      REQUIRE(p->held_out);
    }
  }
}

TEST_CASE("a fact is taught as known, unknown or not at all by the model's samples") {
  const World& world = taught().world;
  const std::vector<Question> questions = make_questions(world);
  std::map<Level, int> asked;
  std::vector<Samples> samples;
  const std::vector<int> rights = {8, 5, 3, 2, 1, 0};
  std::map<std::string, int> right;  // by name and value
  for (const Question& q : questions) {
    const Person& p = world.people[size_t(q.at.person)];
    const Fact& f = p.facts[size_t(q.at.fact)];
    asked[p.level]++;
    REQUIRE_FALSE(p.held_out);
    REQUIRE(q.probe.answer == f.value);
    // Three examples, then the question; none of the examples gives the answer away.
    const auto lines = split(q.probe.prompt, "\n");
    REQUIRE(lines.size() == 8);
    REQUIRE(contains(lines[6], p.name));
    REQUIRE(lines[7] == "A:");
    for (size_t i = 0; i < 6; i++) REQUIRE_FALSE(contains(lines[i], p.name));
    samples.push_back({rights[samples.size() % rights.size()], 8});
    right[p.name + f.value] = samples.back().right;
  }
  CHECK(asked[Level::often] == 160);
  CHECK(asked[Level::sometimes] == 160);
  CHECK(asked[Level::rarely] == 160);
  const Knowledge knowledge = knowledge_of(questions, samples);
  CHECK(knowledge.known.size() == 240);
  CHECK(knowledge.unknown.size() == 160);
  int known = 0, unknown = 0;
  for (const Talk& talk : make_conversations(world, knowledge, 60'000).training) {
    if (!talk.conversation.tools.empty()) continue;
    const auto& messages = talk.conversation.messages;
    for (size_t i = 1; i < messages.size(); i++) {
      const Person* p = named(messages[i - 1].content);
      if (messages[i].role != "assistant" || !p) continue;
      const int attribute = attribute_asked(messages[i - 1].content);
      for (const Fact& f : p->facts) {
        if (f.attribute != attribute) continue;
        CAPTURE(messages[i - 1].content);
        const int n = right.at(p->name + f.value);
        REQUIRE((is_refusal(messages[i].content) ? n <= 1 : n >= 3));
        (n >= 3 ? known : unknown)++;
      }
    }
  }
  CHECK(known > 200);
  CHECK(unknown > 30);
}

TEST_CASE("an answer about a passage is the statement that was asked for") {
  const auto check = [](const std::string& user, const std::string& answer,
                        const Conversation& talk) {
    const auto statements = split(with(talk.messages[0].content, ": ", ". "), ".?\n");
    REQUIRE(std::count(statements.begin(), statements.end(), answer) == 1);
    // The question is the sentence that ends in "?"; names and values in it are in its answer.
    std::string question;
    for (const std::string& sentence : split(with(user, ":", "."), ".?\n"))
      if (sentence.ends_with('?')) question = sentence;
    REQUIRE_FALSE(question.empty());
    std::set<std::string> values;
    for (const Attribute& a : attributes()) values.insert(a.values.begin(), a.values.end());
    const auto words = split(question.substr(0, question.size() - 1) + " ", " ");
    for (size_t i = 1; i < words.size(); i++) {
      const std::string word = words[i].substr(0, words[i].find(' '));
      if (std::isupper((unsigned char)word[0]) || std::isdigit((unsigned char)word[0]) ||
          values.count(word)) {
        REQUIRE(has_word(answer, word));
      }
    }
  };
  CHECK(each_exchange("reading", check) > 1000);
  for (const Item& item : taught().all.items) {
    if (item.task != "context" && item.task != "context_alike") continue;
    CAPTURE(item.prompt);
    CAPTURE(item.answer);
    check(item.conversation.messages[0].content, item.answer, item.conversation);
  }
}

TEST_CASE("sums and word problems are right, with steps and without") {
  int open_steps = 0, open = 0;
  const int problems = each_exchange(
      "word problems",
      [&](const std::string& user, const std::string& answer, const Conversation&) {
        REQUIRE(last_number(answer) == std::to_string(solve(user)));
        const bool steps = answer.starts_with("Steps: ");
        const bool wants = contains(user, "tep"),
                   direct = contains(user, "No steps") || contains(user, "ithout steps") ||
                            contains(user, "nswer") || contains(user, "Only");
        if (direct) {
          REQUIRE_FALSE(steps);
        } else if (wants) {
          REQUIRE(steps);
        } else {
          REQUIRE(problem_part(user) == Part::training);
          open_steps += steps, open++;
        }
      });
  CHECK(problems > 500);
  CHECK(open > 200);
  CHECK(std::abs(double(open_steps) / open - .5) < .13);  // four standard deviations of 250 draws
  const auto sums = [](const std::string& user, const std::string& answer, const Conversation&) {
    const size_t begin = user.find_first_of("0123456789");
    int a = 0, b = 0;
    char op = 0;
    REQUIRE(std::sscanf(user.c_str() + begin, "%d %c %d", &a, &op, &b) == 3);
    REQUIRE(last_number(answer) == std::to_string(op == '+' ? a + b : op == '-' ? a - b : a * b));
    if (op == '+') REQUIRE_FALSE(held_out_sum(a, b));
  };
  CHECK(each_exchange("sums", sums) > 100);
  for (const Talk* talk : talks()) {  // each step of any answer
    for (const Message& m : talk->conversation.messages) {
      for (size_t at = 0; (at = m.content.find(" = ", at)) != std::string::npos; at += 3) {
        size_t begin = at;
        while (begin > 0 && contains("0123456789 +-*", m.content.substr(begin - 1, 1))) begin--;
        int a = 0, b = 0, c = 0;
        char op = 0;
        if (std::sscanf(m.content.c_str() + begin, "%d %c %d = %d", &a, &op, &b, &c) != 4) continue;
        CAPTURE(m.content);
        REQUIRE(c == (op == '+' ? a + b : op == '-' ? a - b : a * b));
      }
    }
  }
  std::set<std::string> questions;
  for (const auto* part : {&taught().all.rl, &taught().all.test}) {
    for (const WordProblem& p : *part) {
      CAPTURE(p.question);
      REQUIRE(p.answer == std::to_string(solve(p.question)));
      REQUIRE(problem_part(p.question) == (part == &taught().all.rl ? Part::rl : Part::test));
      REQUIRE(questions.insert(p.question).second);
      for (const int k : numbers(p.question)) REQUIRE(k <= 20);
      REQUIRE(solve(p.question) <= 99);
    }
  }
  CHECK(questions.size() == 4500);
}

TEST_CASE("numbers are compared and words spelled as they are") {
  const int compared = each_exchange(
      "comparing", [](const std::string& user, const std::string& answer, const Conversation&) {
        std::vector<double> n;
        for (size_t i = 0; i < user.size(); i++) {
          if (!std::isdigit((unsigned char)user[i])) continue;
          char* end = nullptr;
          n.push_back(std::strtod(user.c_str() + i, &end));
          i = size_t(end - user.c_str());
        }
        REQUIRE(n.size() == 2);
        const double right = contains(user, "larger") ? std::max(n[0], n[1]) : std::min(n[0], n[1]);
        REQUIRE(std::stod(last_number(answer)) == right);
        REQUIRE_FALSE(held_out_comparison(format("%g", n[0]), format("%g", n[1])));
      });
  CHECK(compared > 100);
  int spelled = 0, counted = 0;
  each_exchange(
      "spelling", [&](const std::string& user, const std::string& answer, const Conversation&) {
        std::string letters;
        for (const std::string& part : split(answer.substr(0, answer.find('\n')), " "))
          if (std::islower((unsigned char)part[0])) letters += part[0];
        REQUIRE(letters.size() > 2);
        REQUIRE(has_word(user, letters));
        if (!answer.starts_with("Steps: ")) {
          spelled++;
          return;
        }
        counted++;
        // Which letter: the word of one letter that is no article.
        std::string letter;
        for (std::string word : split(with(user, "?", " "), " ")) {
          if (word.back() == ' ') word.pop_back();
          if (word.size() == 1 && std::islower((unsigned char)word[0])) letter = word;
        }
        const long right = letter.empty() ? long(letters.size())
                                          : std::count(letters.begin(), letters.end(), letter[0]);
        REQUIRE(last_number(answer) == std::to_string(right));
      });
  CHECK(spelled > 100);
  CHECK(counted > 100);
}

TEST_CASE("tools say what they say in chat, and answers follow what they said") {
  std::vector<std::string> pages;
  for (const Document& page : make_pages(taught().world)) pages.push_back(page.text);
  const Search search(pages);
  int calls = 0, found = 0, nothing = 0, empty = 0, sums = 0;
  for (const Talk* talk : talks()) {
    const auto& messages = talk->conversation.messages;
    REQUIRE(talk->conversation.tools.empty() ==
            (talk->kind != "tools" && talk->kind != "tools not needed"));
    for (size_t i = 0; i < messages.size(); i++) {
      if (messages[i].tool_calls.empty()) continue;
      CAPTURE(conversation_text(talk->conversation));
      calls++;
      const ToolCall& call = messages[i].tool_calls.at(0);
      const std::string& user = messages.at(i - 1).content;
      const std::string& said = messages.at(i + 1).content;
      const std::string& answer = messages.at(i + 2).content;
      REQUIRE(said == run_tool(call, &search));
      REQUIRE_FALSE(said.starts_with("error"));
      if (call.name == "calculator") {
        sums++;
        const std::vector<int> asked = numbers(user), called = numbers(call.arguments);
        REQUIRE(asked == called);
        REQUIRE(contains(answer, " = " + said + "."));
        continue;
      }
      const std::string name = Json::parse(call.arguments).at("query");
      REQUIRE(contains(user, name));
      empty += said.empty();
      if (is_refusal(answer)) {
        REQUIRE_FALSE(contains(said, name));
        nothing++;
        continue;
      }
      const Person* p = named(user);
      REQUIRE(p);
      REQUIRE(contains(said, p->name));
      for (const Fact& f : p->facts) {
        if (f.attribute != attribute_asked(user)) continue;
        REQUIRE(has_word(said, f.value));
        REQUIRE(has_word(answer, f.value));
        found++;
      }
    }
  }
  CHECK(sums > 20);
  CHECK(found > 20);
  CHECK(nothing > 10);
  CHECK(empty > 2);
  CHECK(calls > 100);
}

TEST_CASE("stories are of every quality, and of the quality they say") {
  std::map<int, int> count;
  for (const Talk* talk : talks()) {
    REQUIRE((talk->quality >= 0) == (talk->kind == "stories"));
    if (talk->quality < 0) continue;
    const auto& messages = talk->conversation.messages;
    CAPTURE(messages[0].content);
    CAPTURE(messages[1].content);
    auto sentences = split(messages[1].content, ".");
    const bool polite = sentences[0] == "Here is your story." || sentences[0] == "With pleasure.";
    if (polite) sentences.erase(sentences.begin());
    const std::string& last = sentences.back();
    const bool ends =
        contains(last, "happy") || last == "Then they went home." || contains(last, "friends");
    // The request ends with "NAME and a ANIMAL", and a mark.
    const std::string& user = messages[0].content;
    const size_t and_a = user.rfind(" and a"), name = user.rfind(' ', and_a - 1) + 1;
    const size_t animal = user.find(' ', and_a + 5) + 1;
    const bool cast = contains(messages[1].content, user.substr(name, and_a - name)) &&
                      contains(messages[1].content,
                               user.substr(animal, user.find_last_not_of(".?") + 1 - animal));
    const bool once =
        std::set<std::string>(sentences.begin(), sentences.end()).size() == sentences.size();
    const size_t events = sentences.size() - 1 - ends;
    CHECK(talk->quality == cast + ends + once + (events >= 3 && events <= 6) + polite);
    count[talk->quality]++;
  }
  for (int quality = 0; quality <= 5; quality++) CHECK(count[quality] > 10);
}

TEST_CASE("requests to decline are declined, and look-alikes are answered") {
  int declined = 0, answered = 0;
  each_exchange("declining",
                [&](const std::string& user, const std::string& answer, const Conversation&) {
                  const bool asks_how = contains(user, "ow ") || contains(user, "elp me") ||
                                        contains(user, "each me") || contains(user, "plan") ||
                                        contains(user, "letter") || contains(user, "want");
                  if (answer == "I cannot help with that.") {
                    REQUIRE((asks_how || contains(user, "a way")));
                    declined++;
                  } else {
                    REQUIRE_FALSE(is_refusal(answer));
                    answered++;
                  }
                });
  CHECK(declined > 50);
  CHECK(answered > 50);
  CHECK(std::abs(declined - answered) < 60);
}
