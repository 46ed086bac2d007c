// The API's answers: from events of the engine to chunks, and to one JSON.
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "cake/serve.h"
#include "test/chatml.h"
#include "test/stream_grammar.h"
#include "test/support.h"

namespace cake {
namespace {

using AnswerIds = std::vector<int>;

// A model of which the writer needs the tokenizer and the rules of its turns. `markers` false: the
// tokenizer has no tokens <think> and <tool_call>.
const ServedModel& answer_model(bool markers = true) {
  static const TempDir dir;
  const auto make = [](bool with) {
    const auto path = dir / (with ? "with" : "without");
    std::filesystem::create_directories(path);
    write_file(dir / "text.txt", "The answer is 42. It is a long way to the town of Olm.\n");
    const Tokenizer trained = train_tokenizer({.inputs = {dir / "text.txt"}}, 300, "qwen2");
    trained.save(path);
    if (!with) {
      std::string json = read_file(path / "tokenizer.json");
      for (const char* name : {"<think>", "</think>", "<tool_call>", "</tool_call>"}) {
        for (size_t i; (i = json.find(concat('"', name, '"'))) != std::string::npos;) {
          json.replace(i + 1, std::string(name).size(), concat("<|no_", i, "|>"));
        }
      }
      write_file(path / "tokenizer.json", json);
    }
    ServedModel m{.id = "cake/\"test\"",
                  .text = {.dir = path, .config = {}, .tokenizer = Tokenizer::load(path)}};
    m.text.document_start = m.text.tokenizer.end_of_text();
    m.text.stop_ids = {m.text.document_start};
    use_template(m.text, chatml_template(m.text.tokenizer));
    m.fingerprint = "fp_0123";
    m.tools = {kCalculatorTool};
    return m;
  };
  static const ServedModel with = make(true), without = make(false);
  return markers ? with : without;
}

int end_of_turn(const ServedModel& m) { return m.text.chat->end_of_turn(); }
AnswerIds ids_of(const std::string& text, const ServedModel& m = answer_model()) {
  return m.text.tokenizer.encode(text, true);
}
AnswerIds byte_ids(const std::string& text) {  // a token for each byte
  AnswerIds ids;
  for (const char c : text) {
    for (int id = 0; id < 256; id++) {
      if (answer_model().text.tokenizer.token_bytes(id) == std::string_view(&c, 1))
        ids.push_back(id);
    }
  }
  REQUIRE(ids.size() == text.size());
  return ids;
}
AnswerIds operator+(AnswerIds a, const AnswerIds& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TokenScore made_up_score(uint64_t seed, int id, int top, int vocab) {
  TokenScore score;
  Rng rng{seed};
  for (int i = 0; i < top; i++) {
    int other = int(rng.below(uint64_t(vocab)));
    while (std::any_of(score.top.begin(), score.top.end(), [&](auto& t) { return t.id == other; }))
      other = (other + 1) % vocab;
    score.top.push_back({other, float(-.1 - .7 * i)});
  }
  score.logp = float(-20 * rng.uniform());
  score.rank = 1 + int(rng.below(uint64_t(vocab)));
  for (const TopToken& t : score.top) {
    if (t.id == id) score.logp = t.logp;
  }
  return score;
}

struct AnswerScript {  // what a choice's model writes
  std::vector<AnswerIds> turns;
  Finish finish = Finish::stop_token;  // of the last turn: appends <|im_end|>
  std::vector<std::string> stops = {};
  int prompt_tokens = 12, cached_tokens = 8;
};

// The events of a choice, as the generator makes them (cake/generate.h, accept).
std::vector<Event> events_of(const AnswerScript& script, int choice, int top,
                             const ServedModel& m = answer_model(),
                             std::optional<AnswerIds> scored_prompt = {},
                             const std::string& held = "") {
  std::vector<Event> events;
  events.push_back({.kind = Event::admitted, .choice = choice});
  const int vocab = m.text.tokenizer.vocab_size();
  if (scored_prompt) {
    Event e{.kind = Event::prompt_scores, .choice = choice};
    for (size_t i = 1; i < scored_prompt->size(); i++) {
      e.scores.push_back(made_up_score(900 + i, (*scored_prompt)[i], top, vocab));
    }
    events.push_back(std::move(e));
  }
  int sampled = 0;
  Finish finish = script.finish;
  for (size_t t = 0; t < script.turns.size(); t++) {
    StopStrings stops(script.stops);
    Utf8Stream utf8;
    std::string none;
    if (t == 0) utf8.feed(held, none);
    AnswerIds turn = script.turns[t];
    const bool last_turn = t + 1 == script.turns.size();
    const bool stopped = !last_turn || finish == Finish::stop_token;
    if (stopped) turn.push_back(end_of_turn(m));
    for (size_t i = 0; i < turn.size(); i++) {
      const bool last = i + 1 == turn.size();
      bool ended = last;
      std::string bytes, text;
      if (!(last && stopped) && stops.feed(m.text.tokenizer.token_bytes(turn[i]), bytes)) {
        ended = true;
        finish = Finish::stop_string;
      }
      utf8.feed(bytes, text);
      if (ended) {
        bytes.clear();
        stops.finish(bytes);
        utf8.feed(bytes, text);
        utf8.finish(text);
      }
      Event e{
          .kind = Event::token, .choice = choice, .id = turn[i], .text = text, .turn_ends = ended};
      if (top >= 0) e.score = made_up_score(uint64_t(choice * 1000 + sampled), turn[i], top, vocab);
      events.push_back(std::move(e));
      sampled++;
      if (ended) break;
    }
    if (finish == Finish::stop_string) break;
  }
  events.push_back({.kind = Event::finished, .choice = choice});
  events.back().finish = finish;
  events.back().prompt_tokens = script.prompt_tokens;
  events.back().cached_tokens = script.cached_tokens;
  events.back().sampled_tokens = sampled;
  return events;
}

// The choices' events mixed, in the order of each.
std::vector<Event> mixed(std::vector<std::vector<Event>> choices, Rng& rng) {
  std::vector<Event> events;
  std::vector<size_t> next(choices.size());
  for (size_t left = 0, c = 0;; left = 0) {
    for (size_t i = 0; i < choices.size(); i++) left += choices[i].size() - next[i];
    if (left == 0) return events;
    do {
      c = size_t(rng.below(choices.size()));
    } while (next[c] == choices[c].size());
    events.push_back(choices[c][next[c]++]);
  }
}

ApiCall chat_call(int n = 1) {
  ApiCall call;
  call.chat = true;
  call.n = n;
  call.sampling.seed = 77;
  return call;
}

AnswerRules rules_of(const ApiCall& call) {
  return {.chat = call.chat,
          .choices = call.n * int(call.chat ? 1 : call.prompts.size()),
          .include_usage = call.include_usage,
          .top_logprobs = call.top_logprobs,
          .token_details = call.token_details};
}

std::string stream_text(ApiCall call, const std::vector<Event>& events, Rng& rng, int most = 5,
                        const ServedModel& m = answer_model(),
                        std::vector<AnswerIds> prompts = {{1, 2}}) {
  call.stream = true;
  AnswerWriter writer(call, m, std::move(prompts));
  std::string text = writer.begin();
  for (size_t i = 0; i < events.size();) {
    const size_t n = std::min(events.size() - i, 1 + size_t(rng.below(uint64_t(most))));
    text += writer.add({events.data() + i, n});
    i += n;
  }
  return text + writer.end();
}
std::string whole_text(ApiCall call, const std::vector<Event>& events,
                       const ServedModel& m = answer_model(),
                       std::vector<AnswerIds> prompts = {{1, 2}}) {
  call.stream = false;
  AnswerWriter writer(call, m, std::move(prompts));
  CHECK(writer.add(events) == "");
  return writer.whole();
}

// Both forms, which must agree, at several groupings.
ApiAnswer answer_of(const ApiCall& call, const std::vector<Event>& events,
                    const ServedModel& m = answer_model(),
                    const std::vector<AnswerIds>& prompts = {{1, 2}}, bool echo_ids = false) {
  AnswerRules rules = rules_of(call);
  rules.echo_ids = echo_ids;
  const std::string text = whole_text(call, events, m, prompts);
  const ApiAnswer whole = read_whole(text, rules);
  Rng rng{5};
  for (const int most : {1, 4, 1000}) {
    const std::string stream = stream_text(call, events, rng, most, m, prompts);
    const ApiAnswer streamed = read_stream(stream, rules);
    CAPTURE(stream);
    CAPTURE(text);
    CHECK(streamed == whole);
    CHECK(streamed.usage == (call.include_usage ? whole.usage : OrderedJson()));
  }
  return whole;
}
ApiChoice choice_of(const ApiCall& call, const AnswerScript& script,
                    const ServedModel& m = answer_model()) {
  const std::string held = held_bytes(call, m);
  return answer_of(call, events_of(script, 0, call.top_logprobs, m, {}, held), m).choices[0];
}

const char* kCall =
    "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"\xc3\xa9\"]}}\n</tool_call>";
const char* kSum =
    "<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": "
    "\"6*7\"}}\n</tool_call>";

}  // namespace

// ---------------------------------------------------------------------------------------------
// The form

TEST_CASE("a stream has the role first, one chunk a token, the finish chunk and [DONE]") {
  ApiCall call = chat_call();
  call.stream = true;
  AnswerWriter writer(call, answer_model(), {{1, 2}});
  const auto events = events_of({.turns = {byte_ids("A\"\n")}}, 0, -1);
  std::string text = writer.begin();
  for (const Event& e : events) text += writer.add({&e, 1});
  text += writer.end();
  const std::string id = text.substr(text.find("chatcmpl-"), 38);
  const std::string created = text.substr(text.find("created\":") + 9, 10);
  const std::string head = "data: {\"id\":\"" + id +
                           "\",\"object\":\"chat.completion.chunk\",\"created\":" + created +
                           ",\"model\":\"cake/\\\"test\\\"\",\"system_fingerprint\":\"fp_0123\","
                           "\"seed\":77,\"choices\":[{\"index\":0,\"delta\":{";
  const std::string tail = "},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
  CHECK(text == head + "\"role\":\"assistant\",\"content\":\"\"" + tail + head +
                    "\"content\":\"A\"" + tail + head + "\"content\":\"\\\"\"" + tail + head +
                    "\"content\":\"\\n\"" + tail + head +
                    "},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n");
}

TEST_CASE(
    "streams follow the grammar and equal the whole answer, for all options and any grouping") {
  const std::string face = "\xf0\x9f\x99\x82";
  const std::vector<std::pair<const char*, AnswerScript>> scripts = {
      {"plain", {.turns = {ids_of("The answer is 42.\n")}}},
      {"cut", {.turns = {ids_of("The answer is")}, .finish = Finish::length}},
      {"empty", {.turns = {{}}}},
      {"white space", {.turns = {ids_of(" \n\n")}}},
      {"reasoning", {.turns = {ids_of("<think>\nIt is a \n way\n</think>\n\nThe answer\n")}}},
      {"reasoning cut", {.turns = {ids_of("<think>\nIt is a \n")}, .finish = Finish::length}},
      {"call", {.turns = {ids_of(std::string("It is\n\n") + kCall)}}},
      {"calls", {.turns = {ids_of(concat("<think>a</think>\n", kCall, "\n", kCall, "\n"))}}},
      {"no call", {.turns = {ids_of("a\n<tool_call>\nwhat\n</tool_call>\n")}}},
      {"call cut", {.turns = {ids_of("a\n<tool_call>\n{\"name")}, .finish = Finish::length}},
      {"face", {.turns = {byte_ids("a" + face + "b")}}},
      {"half a face", {.turns = {byte_ids("a" + face.substr(0, 3))}, .finish = Finish::length}},
      {"bytes", {.turns = {byte_ids("a\x80\xff\xe2\x82z\xf0\x9f")}}},
      {"stop", {.turns = {ids_of("The answer is 42. It")}, .stops = {"er is", "42"}}},
      {"held", {.turns = {ids_of("The answer is 42")}, .stops = {"42!", "is 41"}}},
      {"held marker",
       {.turns = {ids_of(std::string("a<think>b\n") + kCall)}, .stops = {"nk>\n", "_call>?"}}},
      {"cut marker",
       {.turns = {ids_of(std::string("<think>b</think>c\n") + kCall)}, .stops = {"_call>\n"}}},
  };
  Rng rng{3};
  for (const auto& named : scripts) {
    CAPTURE(named.first);
    const AnswerScript& script = named.second;
    for (const int n : {1, 3}) {
      for (const int top : {-1, 0, 3}) {
        for (const bool usage : {false, true}) {
          for (int form = 0; form < 5; form++) {
            CAPTURE(form);
            ApiCall call = chat_call(n);
            call.top_logprobs = top;
            call.include_usage = usage;
            call.stop = script.stops;
            call.has_tools = form == 1 || form == 3;
            if (form == 2 || form == 3) call.server_tools = {"calculator"};
            if (form == 4) {
              call.chat = false;
              call.prompts = {"a", "b"};
            }
            const int total = n * (call.chat ? 1 : 2);
            std::vector<std::vector<Event>> choices;
            for (int i = 0; i < total; i++) choices.push_back(events_of(script, i, top));
            const auto events = mixed(std::move(choices), rng);
            const auto answer = answer_of(call, events, answer_model(), {{1}, {2}});
            CHECK(answer.usage["prompt_tokens"] == (call.chat ? 12 : 24));
          }
        }
      }
    }
  }
}

TEST_CASE("random tokens: streams equal whole answers, and bytes of logprobs rebuild every text") {
  for (int round = 0; round < 200; round++) {
    const ServedModel& m = answer_model(round % 2 == 0);
    const int vocab = m.text.tokenizer.vocab_size();
    const AnswerIds pieces =
        ids_of("<think></think><tool_call></tool_call>\n\n \n{}<|im_start|>", m);
    Rng rng{uint64_t(round)};
    ApiCall call = chat_call(1 + int(rng.below(3)));
    call.chat = rng.below(4) != 0;
    if (!call.chat) call.prompts = {"a"};
    call.top_logprobs = int(rng.below(5)) - 1;
    call.token_details = call.top_logprobs >= 0 && rng.below(2) == 0;
    call.include_usage = rng.below(2) == 0;
    call.has_tools = rng.below(2) == 0;
    if (rng.below(3) == 0) call.server_tools = {"calculator"};
    std::vector<std::vector<Event>> choices;
    for (int i = 0; i < call.n; i++) {
      AnswerScript script;
      script.finish = rng.below(2) ? Finish::stop_token : Finish::length;
      if (rng.below(2)) script.stops = {"\n\n", "x", "{}", std::string("<\xc3\xa9")};
      for (uint64_t t = 1 + rng.below(2); t-- > 0;) {
        AnswerIds turn;
        if (rng.below(3) == 0) turn = ids_of("\n<think>\n", m);
        for (uint64_t k = rng.below(30); k-- > 0;) {
          const uint64_t what = rng.below(8);
          if (what < 3) turn.push_back(pieces[size_t(rng.below(pieces.size()))]);
          if (what == 3) turn = turn + ids_of(rng.below(2) ? kCall : kSum, m);
          if (what <= 3) continue;
          // Bytes that are dropped must not leave a character's beginning before another's end,
          // which those who join the entries' bytes would take for a character.
          const int id = int(rng.below(uint64_t(vocab)));
          const auto bytes = m.text.tokenizer.token_bytes(id);
          if (!bytes.empty() && (bytes[0] & 0xc0) == 0x80) turn = turn + byte_ids("\xe2");
          turn.push_back(id);
        }
        std::erase_if(turn,
                      [&](int id) { return id == end_of_turn(m) || id == m.text.document_start; });
        if (turn.empty()) turn = ids_of("a");
        script.turns.push_back(turn);
      }
      choices.push_back(events_of(script, i, call.top_logprobs, m));
    }
    CAPTURE(round);
    const auto events = mixed(std::move(choices), rng);
    answer_of(call, events, m);
  }
}

TEST_CASE("usage and finish_reason: a prompt counts once, length and context are length") {
  ApiCall call = chat_call(2);
  Rng rng{1};
  const AnswerScript script{.turns = {ids_of("a")}, .finish = Finish::context};
  auto events = mixed({events_of(script, 0, -1), events_of(script, 1, -1)}, rng);
  ApiAnswer a = answer_of(call, events);
  CHECK(a.choices[1].finish == "length");
  CHECK(a.usage ==
        OrderedJson::parse(R"({"prompt_tokens":12,"completion_tokens":2,)"
                           R"("total_tokens":14,"prompt_tokens_details":{"cached_tokens":8}})"));
  call.n = 1;
  const AnswerScript thinks{.turns = {ids_of("<think>") + byte_ids("\nab") + ids_of("</think>c")}};
  a = answer_of(call, events_of(thinks, 0, -1));
  CHECK(a.usage["completion_tokens"] == 7);  // the end of the turn counts too
  CHECK(a.usage["completion_tokens_details"]["reasoning_tokens"] == 5);
  // A token of which a stop string holds a part back counts once.
  const AnswerScript held{.turns = {ids_of("<think><tool_response>a</think>c")},
                          .stops = {"ponse>!"}};
  a = answer_of(call, events_of(held, 0, -1));
  CHECK(a.usage["completion_tokens_details"]["reasoning_tokens"] == 4);
}

// ---------------------------------------------------------------------------------------------
// Reasoning

TEST_CASE("reasoning stands apart from the content, without the white space around it") {
  const auto split = [](const std::string& text, bool markers = true) {
    const ServedModel& m = answer_model(markers);
    const ApiChoice c = choice_of(chat_call(), {.turns = {ids_of(text, m)}}, m);
    return c.reasoning + "|" + c.text;
  };
  for (const bool markers : {true, false}) {
    CAPTURE(markers);
    CHECK(split("<think>\nIt is \xe3\x80\x80\n</think>\n\n The\n", markers) == "It is|The\n");
    CHECK(split(" \n<think>a</think>b", markers) == "a|b");
    CHECK(split("<think>a\n\nb", markers) == "a\n\nb|");
    CHECK(split("<think>\n\n</think>\n\nb", markers) == "|b");
    CHECK(split("<think>a</think>", markers) == "a|");
    CHECK(split("a <think>b</think>", markers) == "|a <think>b</think>");
    CHECK(split("</think>b", markers) == "|</think>b");
    CHECK(split("\n\nThe\n\n", markers) == "|\n\nThe\n\n");
    CHECK(split("<think>a</think>b<think>c</think>", markers) == "a|b<think>c</think>");
    CHECK(split("<thin", markers) == "|<thin");
    CHECK(split(" <", markers) == "| <");
  }
  CHECK(split("<think>a </thin", false) == "a </thin|");
  CHECK(split("<think>a </thing> <</think>b", false) == "a </thing> <|b");
}

TEST_CASE(
    "markers are tokens where the tokenizer has them; the same text in other tokens is text") {
  const ApiChoice c = choice_of(chat_call(), {.turns = {byte_ids("<think>a</think>b")}});
  CHECK(c.text == "<think>a</think>b");
}

TEST_CASE("an answer to a prompt that ends with <think> begins with reasoning") {
  for (const bool markers : {true, false}) {
    const ServedModel& m = answer_model(markers);
    ApiCall call = chat_call();
    call.in_reasoning = call.turns_begin_in_reasoning = true;
    const auto split = [&](const std::string& text) {
      const ApiChoice c = choice_of(call, {.turns = {ids_of(text, m)}}, m);
      return c.reasoning + "|" + c.text;
    };
    CAPTURE(markers);
    CHECK(split("\nIt is\n</think>\n\nThe") == "It is|The");
    CHECK(split("It is") == "It is|");
    CHECK(split("</think>The") == "|The");
    // So does each turn behind a tool's result.
    call.server_tools = {"calculator"};
    const ApiChoice c = choice_of(
        call, {.turns = {ids_of(concat("a</think>b\n", kSum), m), ids_of("c</think>\nd", m)}}, m);
    CHECK(c.results.size() == 1);
    CHECK(c.reasoning == "ac");
    CHECK(c.text == "b\nd");
  }
}

TEST_CASE("a call amid reasoning leaves the text around it in its order") {
  ApiCall call = chat_call();
  call.has_tools = true;
  for (const bool markers : {true, false}) {
    const ServedModel& m = answer_model(markers);
    const std::string text = concat("<think>a </thi", kSum, "b</think>c");
    const ApiChoice c = choice_of(call, {.turns = {ids_of(text, m)}}, m);
    CAPTURE(markers);
    CHECK(c.calls.size() == 1);
    CHECK(c.reasoning == "a </thib");
    CHECK(c.text == "c");
  }
}

TEST_CASE("a call that a stop string ends is whole") {  // as without parallel calls
  ApiCall call = chat_call();
  call.has_tools = true;
  const ServedModel& m = answer_model(false);
  const ApiChoice c = choice_of(call,
                                {.turns = {ids_of(concat("a", kSum, kSum), m)},
                                 .finish = Finish::length,
                                 .stops = {"</tool_call>"}},
                                m);
  CHECK(c.text == "a");
  CHECK(c.calls.size() == 1);
  CHECK(c.finish == "tool_calls");
}

TEST_CASE("a stop string that holds back the end of a marker changes nothing") {
  ApiCall call = chat_call();
  call.has_tools = true;
  const AnswerIds ids = ids_of(concat("<think>a</think>b\n", kCall));
  for (const char* stop : {"nk>!", ">!", "_call>!", "</t!", "<tool_call>!"}) {
    CAPTURE(stop);
    CHECK(choice_of(call, {.turns = {ids}, .stops = {stop}}) == choice_of(call, {.turns = {ids}}));
  }
}

TEST_CASE("reasoning is what split_answer finds, for random answers that end it") {
  for (uint64_t round = 0; round < 200; round++) {
    Rng rng{round};
    const std::string pieces[] = {" ", "\n", "a", "The ", "\xe2\x80\x83", "\xc3\xa9", "<", "</th"};
    const auto some = [&] {
      std::string text;
      for (uint64_t n = rng.below(6); n-- > 0;) text += pieces[rng.below(std::size(pieces))];
      return text;
    };
    const std::string space = rng.below(2) ? " \n" : "";
    const Message message{.role = "assistant",
                          .content = space + "<think>" + some() + "</think>" + some() + "x"};
    const Answer expected = split_answer(message);
    for (const bool markers : {true, false}) {
      const ServedModel& m = answer_model(markers);
      const ApiChoice c = choice_of(chat_call(), {.turns = {ids_of(message.content, m)}}, m);
      CHECK(c.reasoning == *expected.reasoning);
      CHECK(c.text == expected.content);
    }
  }
}

TEST_CASE("an answer that goes on amid the reasoning of its beginning ends it") {
  ApiCall call = chat_call();
  call.in_reasoning = true;  // as read_chat finds it
  const ApiChoice c = choice_of(call, {.turns = {ids_of(" it is\n</think>\n\nThe answer")}});
  CHECK(c.reasoning == "it is");
  CHECK(c.text == "The answer");
}

// ---------------------------------------------------------------------------------------------
// Tools

TEST_CASE("calls become tool_calls, their arguments a string, and finish_reason tells of them") {
  ApiCall call = chat_call();
  call.has_tools = true;
  const std::string twice = concat("It is\n\n", kCall, "\n", kSum, "\n");
  ApiChoice c = choice_of(call, {.turns = {ids_of(twice)}});
  CHECK(c.text == "It is");
  CHECK(c.finish == "tool_calls");
  REQUIRE(c.calls.size() == 2);
  CHECK(c.calls[0] == OrderedJson{{"name", "f"}, {"arguments", "{\"x\": [1, \"\xc3\xa9\"]}"}});
  CHECK(c.calls[1]["arguments"] == "{\"expression\": \"6*7\"}");
  // without text, content is null
  const auto events = events_of({.turns = {ids_of(kCall)}}, 0, -1);
  const std::string text = whole_text(call, events);
  CHECK(text.find("\"content\":null") != std::string::npos);
  // the end of the turn ends a call; a token limit cuts one
  c = choice_of(call, {.turns = {ids_of("<tool_call>{\"name\":\"f\",\"arguments\":{}}")}});
  CHECK(c.calls.size() == 1);
  c = choice_of(call, {.turns = {ids_of(std::string("a") + kCall)}, .finish = Finish::length});
  CHECK(c.calls.size() == 1);
  CHECK(c.finish == "length");
  // text behind a call is content, with the newlines between
  c = choice_of(call, {.turns = {ids_of(concat("a\n", kCall, "\nb\n"))}});
  CHECK(c.text == "a\n\nb");
}

TEST_CASE("reasoning goes on behind a call within it") {
  ApiCall call = chat_call();
  call.has_tools = true;
  const std::string text = concat("<think>a", kCall, "b</think>\n", kCall, "\nc");
  const ApiChoice c = choice_of(call, {.turns = {ids_of(text)}});
  CHECK(c.reasoning == "ab");
  CHECK(c.text == "c");
  CHECK(c.calls.size() == 2);
}

TEST_CASE("what is no call stays content, with its markers") {
  ApiCall call = chat_call();
  call.has_tools = true;
  for (const char* inside :
       {"what", "", "{\"name\": \"f\"}", "[1]", "{\"name\": 3, \"arguments\": {}}",
        "{\"name\": \"f\", \"arguments\": \"{}\"}", "{\"name\": \"\", \"arguments\": {}}",
        "{\"name\": \"f\", \"arguments\": {}} {}"}) {
    for (const char* before : {"a\n", " ", ""}) {
      const std::string text = concat(before, "<tool_call>", inside, "</tool_call>\n");
      const ApiChoice c = choice_of(call, {.turns = {ids_of(text)}});
      CHECK(c.text == text);
      CHECK(c.finish == "stop");
    }
  }
  const AnswerIds bytes = ids_of("<tool_call>") + byte_ids("{\"name\":\"\xff\",\"arguments\":{}}");
  CHECK(choice_of(call, {.turns = {bytes}}).text ==
        "<tool_call>{\"name\":\"\xef\xbf\xbd\",\"arguments\":{}}");
  // nobody offered tools
  CHECK(choice_of(chat_call(), {.turns = {ids_of(kCall)}}).text == kCall);
}

TEST_CASE("content and calls are what read_turn finds, for random turns") {
  ApiCall call = chat_call();
  call.has_tools = true;
  for (uint64_t round = 0; round < 400; round++) {
    const bool markers = round % 2 == 0;  // they are tokens, or text
    const ServedModel& m = answer_model(markers);
    Rng rng{round};
    std::string text;
    const std::string pieces[] = {"\n", "a", "The answer", kCall, kSum, " ", "\n\n", "<tool"};
    for (uint64_t n = 1 + rng.below(8); n-- > 0;) text += pieces[rng.below(std::size(pieces))];
    const Message expected = read_turn(*answer_model().text.chat, ids_of(text));
    const AnswerIds ids = !markers && rng.below(2) ? byte_ids(text) : ids_of(text, m);
    const ApiChoice c = choice_of(call, {.turns = {ids}}, m);
    CAPTURE(text);
    CAPTURE(markers);
    CHECK((c.text == (expected.tool_calls.empty() ? text : expected.content)));
    REQUIRE(c.calls.size() == expected.tool_calls.size());
    for (size_t i = 0; i < c.calls.size(); i++) {
      CHECK(c.calls[i]["name"] == expected.tool_calls[i].name);
      CHECK(c.calls[i]["arguments"] == expected.tool_calls[i].arguments);
    }
  }
}

TEST_CASE("tools that run on the server: all turns are one text, results are in cake_tools") {
  ApiCall call = chat_call();
  call.server_tools = {"calculator"};
  const AnswerScript script{.turns = {ids_of(concat("<think>\na\n</think>\n\nIt is\n", kSum)),
                                      ids_of("<think>\nb\n</think>\n\nThe answer is 42.\n")}};
  for (const int top : {-1, 2}) {
    call.top_logprobs = top;
    const ApiChoice c = choice_of(call, script);
    CHECK(c.text == "It is\nThe answer is 42.");
    CHECK(c.reasoning == "a\nb");
    CHECK(c.finish == "stop");
    CHECK(c.calls.empty());
    REQUIRE(c.results.size() == 1);
    CHECK(c.results[0] == OrderedJson{{"name", "calculator"},
                                      {"arguments", "{\"expression\": \"6*7\"}"},
                                      {"result", "42"},
                                      {"turn", 0}});
  }
  // what is no call has a result that says so
  ApiChoice c = choice_of(call, {.turns = {ids_of("<tool_call>what</tool_call>"), ids_of("b")}});
  CHECK(c.text == "b");
  CHECK(c.results[0]["arguments"] == "what");
  CHECK(c.results[0]["result"].get<std::string>().starts_with("error: "));
  // each says which turn called it
  c = choice_of(call, {.turns = {ids_of(concat(kSum, kSum)), ids_of(kSum), ids_of("b")}});
  REQUIRE(c.results.size() == 3);
  for (size_t i = 0; i < 3; i++) CHECK(c.results[i]["turn"] == (i < 2 ? 0 : 1));
  // a call that a limit cuts off did not run
  c = choice_of(call, {.turns = {ids_of(concat("a\n", kSum, "b"))}, .finish = Finish::length});
  CHECK(c.results.empty());
  CHECK(c.text == concat("a\n", kSum, "b"));
}

TEST_CASE("calls of the client's tools end the answer, beside tools of the server too") {
  ApiCall call = chat_call();
  call.has_tools = true;
  call.server_tools = {"calculator"};
  ApiChoice c = choice_of(call, {.turns = {ids_of(concat("a\n", kSum, "\n", kCall))}});
  CHECK(c.calls.size() == 2);
  CHECK(c.results.empty());
  CHECK(c.finish == "tool_calls");
  c = choice_of(call, {.turns = {ids_of(concat("a\n", kSum)), ids_of(kCall)}});
  CHECK(c.text == "a");
  CHECK(c.results.size() == 1);
  CHECK(c.calls.size() == 1);
}

// ---------------------------------------------------------------------------------------------
// Ids of an answer, and answers that begin with ids

// What the server's tools put behind the turn `ids`, which ends with the id that ends turns.
AnswerIds ids_behind(const ApiCall& call, const AnswerIds& ids) {
  return ids_behind_turn(call, answer_model(), ids);
}

TEST_CASE("the ids of an answer are those of its tokens and of the server's tools") {
  ApiCall call = chat_call();
  call.return_ids = true;
  const AnswerIds end = {end_of_turn(answer_model())};
  CHECK(choice_of(call, {.turns = {ids_of("The answer")}}).ids ==
        OrderedJson(ids_of("The answer") + end));
  CHECK(choice_of(call, {.turns = {ids_of("The answer")}, .finish = Finish::length}).ids ==
        OrderedJson(ids_of("The answer")));
  call.server_tools = {"calculator"};
  const AnswerIds first = ids_of(concat("It is\n", kSum)) + end, last = ids_of("42.");
  const AnswerIds result = ids_behind(call, first);
  CHECK(result.size() > 10);
  CHECK(choice_of(call, {.turns = {ids_of(concat("It is\n", kSum)), last}}).ids ==
        OrderedJson(first + result + last + end));
  call.return_ids = false;
  CHECK(choice_of(call, {.turns = {last}}).ids.is_null());
}

TEST_CASE("an answer that begins with ids is the same as one that was written in a piece") {
  ApiCall call = chat_call();
  call.return_ids = true;
  call.server_tools = {"calculator"};
  const AnswerIds end = {end_of_turn(answer_model())};
  const AnswerIds first = ids_of(concat("<think>\na\n b\n</think>\n\nIt is\n", kSum));
  const AnswerIds second =
      ids_of("<think>\nc\n</think>\n\nabc ") + byte_ids("\xf0\x9f\x99\x82") + ids_of("the answer.");
  const ApiChoice whole = choice_of(call, {.turns = {first, second}});
  CHECK(whole.results.size() == 1);
  CHECK(whole.text == "It is\nabc \xf0\x9f\x99\x82the answer.");
  const AnswerIds turn = first + end, result = ids_behind(call, turn);
  const AnswerIds all = turn + result + second;
  for (size_t n = 1; n < all.size(); n++) {  // every place where it may be cut
    const bool in_first = n < turn.size();
    if (n >= turn.size() && n < turn.size() + result.size()) continue;
    call.answer_ids = AnswerIds(all.begin(), all.begin() + long(n));
    AnswerScript rest{.turns = {}};
    if (in_first) rest.turns.push_back({first.begin() + long(n), first.end()});
    rest.turns.push_back(
        {in_first ? second.begin() : second.begin() + long(n - turn.size() - result.size()),
         second.end()});
    CAPTURE(n);
    const ApiChoice c = choice_of(call, rest);
    CHECK(c.text == whole.text);
    CHECK(c.reasoning == whole.reasoning);
    CHECK(c.results == whole.results);
    CHECK(c.ids == whole.ids);
    CHECK(c.finish == whole.finish);
  }
}

TEST_CASE("the ids that an answer begins with have no log-probabilities, and are not counted") {
  ApiCall call = chat_call();
  call.top_logprobs = 2;
  call.answer_ids = ids_of("The answer");
  const AnswerIds rest = ids_of(" is 42.");
  const auto json = OrderedJson::parse(whole_text(call, events_of({.turns = {rest}}, 0, 2)));
  const OrderedJson& choice = json["choices"][0];
  CHECK(choice["message"]["content"] == "The answer is 42.");
  CHECK(choice["logprobs"]["content"].size() == rest.size());
  call.answer_ids = ids_of("<think>\na\n</think>\n\nb");
  const auto thought = OrderedJson::parse(whole_text(call, events_of({.turns = {rest}}, 0, 2)));
  CHECK(thought["choices"][0]["message"]["reasoning_content"] == "a");
  CHECK_FALSE(thought["usage"].contains("completion_tokens_details"));
}

// ---------------------------------------------------------------------------------------------
// Log-probabilities

TEST_CASE("an emoji that is split over tokens: no chunk until it is whole, then every entry") {
  ApiCall call = chat_call();
  call.top_logprobs = 2;
  call.stream = true;
  AnswerWriter writer(call, answer_model(), {{1}});
  writer.begin();
  const auto events = events_of({.turns = {byte_ids("\xf0\x9f\x99\x82")}}, 0, 2);
  for (size_t i = 0; i < 4; i++) CHECK(writer.add({&events[i], 1}) == "");  // admitted, 3 bytes
  const std::string chunk = writer.add({&events[4], 1});
  const auto json = OrderedJson::parse(chunk.substr(6));
  CHECK(json["choices"][0]["delta"] == OrderedJson{{"content", "\xf0\x9f\x99\x82"}});
  const auto& entries = json["choices"][0]["logprobs"]["content"];
  REQUIRE(entries.size() == 4);
  CHECK(entries[1]["token"] == "bytes:\\x9f");
  CHECK(entries[1]["bytes"] == OrderedJson::parse("[159]"));
  CHECK(entries[1]["top_logprobs"].size() == 2);
}

TEST_CASE("an entry comes with its text, behind reasoning and white space that are dropped") {
  ApiCall call = chat_call();
  call.top_logprobs = 0;
  call.stream = true;
  AnswerWriter writer(call, answer_model(), {{1}});
  writer.begin();
  const AnswerIds ids =
      ids_of("<think>") + byte_ids("\na\n") + ids_of("</think>") + byte_ids("\nbc");
  int chunks = 0;
  for (const Event& e : events_of({.turns = {ids}}, 0, 0)) {
    const std::string chunk = writer.add({&e, 1});
    if (e.text == "a" || e.text == "b" || e.text == "c") {
      CHECK(chunk.find("\"token\":\"" + e.text + "\"") != std::string::npos);
      chunks++;
    }
  }
  CHECK(chunks == 3);
}

TEST_CASE("entries are cut where the text is cut, and stop tokens have none") {
  ApiCall call = chat_call();
  call.top_logprobs = 0;
  const auto tokens = [](const ApiChoice& c) {
    std::string text;
    for (const OrderedJson& e : c.entries) text += e["token"].get<std::string>() + "|";
    return text;
  };
  const AnswerIds ids = byte_ids("ab") + ids_of("<tool_response>") + byte_ids("c");
  CHECK(tokens(choice_of(call, {.turns = {ids}})) == "a|b|<tool_response>|c|");
  CHECK(tokens(choice_of(call, {.turns = {ids}, .stops = {"_resp"}})) == "a|b|<tool|");
  CHECK(tokens(choice_of(call, {.turns = {ids}, .stops = {"b<t"}})) == "a|");
  CHECK(tokens(choice_of(call, {.turns = {ids}, .stops = {"c!"}})) == "a|b|<tool_response>|c|");
  // white space that is dropped
  const AnswerIds thinks =
      ids_of("<think>") + byte_ids("\na\n") + ids_of("</think>") + byte_ids("\nb");
  const ApiChoice c = choice_of(call, {.turns = {thinks}});
  CHECK(tokens(c) == "b|");
  REQUIRE(c.reasoned.size() == 1);
  CHECK(c.reasoned[0]["token"] == "a");
}

TEST_CASE("a completion's logprobs name byte tokens apart, and hold the sampled one as it is") {
  ApiCall call;
  call.prompts = {AnswerIds{1, 2}};
  call.top_logprobs = 5;
  ApiChoice c = choice_of(call, {.turns = {byte_ids("\xe2\x82\xac z")}});
  CHECK(c.names == std::vector<std::string>{"bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", " ", "z"});
  CHECK(c.offsets == OrderedJson::parse("[0,0,0,1,2]"));
  CHECK(c.text == "\xe2\x82\xac z");
  call.top_logprobs = 0;
  c = choice_of(call, {.turns = {byte_ids("z")}});
  CHECK(c.tops[0] == OrderedJson{{"z", c.logprobs[0]}});
  // two tokens with the same bytes, and one whose name another's bytes spell
  const ServedModel& m = answer_model();
  auto events = events_of({.turns = {byte_ids("a")}}, 0, 0);
  const int a = byte_ids("a")[0];
  const int nothing = m.text.tokenizer.vocab_size() + 5, other = nothing + 1;  // "" both
  for (Event& e : events) {
    if (e.score) e.score->top = {{nothing, -1}, {a, -2}, {other, -3}};
    if (e.score) e.score->logp = -2;
  }
  call.top_logprobs = 3;
  const std::string text = whole_text(call, events);
  const auto json = OrderedJson::parse(text);
  CHECK(json["choices"][0]["logprobs"]["top_logprobs"][0].dump() ==
        concat(R"({"":-1.0,"a":-2.0,"token_id:)", other, R"(":-3.0})"));
}

TEST_CASE("token_details: every token has its id, its rank and its kind, every likely one its id") {
  const ServedModel& m = answer_model();
  const int response = m.text.tokenizer.special("<tool_response>");
  ApiCall call = chat_call();
  call.top_logprobs = 3;
  call.token_details = true;
  const AnswerIds ids = byte_ids("a\xe2\x82") + AnswerIds{response} + byte_ids("b");
  auto events = events_of({.turns = {ids}}, 0, 3);
  for (const bool chat : {true, false}) {
    call.chat = chat;
    if (!chat) call.prompts = {AnswerIds{1, 2}};
    const ApiChoice c = answer_of(call, events).choices[0];
    REQUIRE(c.entries.size() == 5);
    for (size_t i = 0; i < 5; i++) {
      const TokenScore& score = *events[1 + i].score;
      CHECK(c.entries[i]["id"] == ids[i]);
      CHECK(c.entries[i]["rank"] == score.rank);
      CHECK(c.entries[i]["special"] == (ids[i] == response));
      REQUIRE(c.entries[i]["top_logprobs"].size() == 3);
      for (size_t k = 0; k < 3; k++) {
        CHECK(c.entries[i]["top_logprobs"][k]["id"] == score.top[k].id);
        CHECK(c.entries[i]["top_logprobs"][k]["special"] ==
              m.text.tokenizer.is_special(score.top[k].id));
      }
    }
    call.token_details = false;
    const ApiChoice plain = answer_of(call, events).choices[0];
    CHECK((plain.entries.empty() || !plain.entries[0].contains("id")));
    CHECK(plain.names == c.names);
    call.token_details = true;
  }
}

TEST_CASE("/next_token lists the likeliest, and sums up what the settings leave of the others") {
  const Tokenizer& t = answer_model().text.tokenizer;
  const auto V = size_t(t.vocab_size()) + 3;  // three ids that no token has
  Distribution d;
  d.logp.assign(V, float(std::log(.25 / double(V - 3))));
  d.probability.assign(V, 0);
  const int special = t.special("<|im_end|>"), byte = byte_ids("\xe2")[0], a = byte_ids("a")[0];
  d.logp[size_t(special)] = float(std::log(.5));
  d.logp[size_t(byte)] = float(std::log(.125)), d.logp[size_t(a)] = float(std::log(.125));
  d.probability[size_t(special)] = .5f, d.probability[size_t(byte)] = .25f;
  d.probability[7] = .25f;
  const OrderedJson json = next_token_json(d, t, 3);
  const OrderedJson& tokens = json.at("tokens");
  REQUIRE(tokens.size() == 3);
  CHECK(tokens[0] == OrderedJson{{"id", special},
                                 {"token", "<|im_end|>"},
                                 {"bytes", {60, 124, 105, 109, 95, 101, 110, 100, 124, 62}},
                                 {"special", true},
                                 {"logprob", d.logp[size_t(special)]},
                                 {"probability", .5f}});
  CHECK(tokens[1].at("id") == std::min(a, byte));  // of equals the smaller id comes first
  const OrderedJson& half = tokens[a < byte ? 2 : 1];
  CHECK(half.at("token") == "bytes:\\xe2");
  CHECK(half.at("bytes") == OrderedJson{226});
  CHECK(half.at("probability") == .25f);
  CHECK(tokens[a < byte ? 1 : 2].at("probability") == 0);
  CHECK(json.at("rest").get<double>() == doctest::Approx(.25));
  CHECK(json.at("kept") == 3);
  CHECK(json.at("entropy_after").get<double>() == doctest::Approx(1.5));
  const double all = double(V - 3);
  CHECK(json.at("entropy").get<double>() ==
        doctest::Approx(.5 + .75 + .25 * std::log2(all / .25)).epsilon(1e-4));
  CHECK(next_token_json(d, t, 0).at("tokens").empty());
  CHECK(next_token_json(d, t, 0).at("rest").get<double>() == doctest::Approx(1));
  CHECK(next_token_json(d, t, 1 << 20).at("tokens").size() == V - 3);
}

TEST_CASE("log-probabilities are finite numbers, and the same float when they are read") {
  ApiCall call = chat_call();
  call.top_logprobs = 1;
  auto events = events_of({.turns = {byte_ids("abcdef")}}, 0, 1);
  const float inf = std::numeric_limits<float>::infinity();
  const float values[] = {-inf, std::numeric_limits<float>::quiet_NaN(), -0.f, -1e-7f, -12345.f,
                          -.1f};
  for (int i = 0; i < 6; i++) {
    events[size_t(1 + i)].score = TokenScore{values[i], {{65, values[i]}}};
  }
  const ApiChoice c = answer_of(call, events).choices[0];
  const float expected[] = {-9999, -9999, 0, -1e-7f, -9999, -.1f};
  for (size_t i = 0; i < 6; i++) {
    CHECK(c.entries[i]["logprob"].get<float>() == expected[i]);
    CHECK(c.entries[i]["top_logprobs"][0]["logprob"].get<float>() == expected[i]);
    CHECK(c.entries[i]["logprob"].dump() != "-0.0");
  }
}

// ---------------------------------------------------------------------------------------------
// Echo

TEST_CASE("echo: the prompt's text and scores come first; ids begin with null") {
  const AnswerIds prompt = ids_of("The answer is") + byte_ids("\xe2\x82");
  ApiCall call;
  call.echo = true;
  call.n = 2;
  call.prompts = {prompt, byte_ids("z")};
  Rng rng{2};
  for (const int round : {0, 1, 2, 3}) {
    const int top = round < 2 ? round - 1 : 1;
    call.top_logprobs = top;
    call.token_details = round == 3;
    std::vector<std::vector<Event>> choices;
    for (int i = 0; i < 4; i++) {
      const AnswerIds& own = i < 2 ? prompt : byte_ids("z");
      auto scored = top >= 0 ? std::optional(own) : std::nullopt;
      choices.push_back(events_of({.turns = {byte_ids(" 42")}}, i, top, answer_model(), scored));
    }
    const ApiAnswer a = answer_of(call, mixed(std::move(choices), rng), answer_model(),
                                  {prompt, byte_ids("z")}, true);
    CHECK(a.choices[0].text == "The answer is\xef\xbf\xbd 42");
    CHECK(a.choices[3].text == "z 42");
    if (top < 0) continue;
    const ApiChoice& c = a.choices[1];
    CHECK(c.names.size() == prompt.size() + 3);
    const TokenScore score =
        made_up_score(901, prompt[1], top, answer_model().text.tokenizer.vocab_size());
    CHECK(c.logprobs[1].get<float>() == score.logp);
    CHECK(c.offsets[1] == 3);
  }
}

TEST_CASE("echo of a text leaves out the document's start, which the client did not send") {
  const int start = answer_model().text.document_start;
  ApiCall call;
  call.echo = true;
  call.prompts = {"ab"};
  call.top_logprobs = 0;
  const AnswerIds prompt = AnswerIds{start} + byte_ids("ab");
  ApiAnswer a = answer_of(call, events_of({.turns = {byte_ids("c")}}, 0, 0, answer_model(), prompt),
                          answer_model(), {prompt});
  CHECK(a.choices[0].text == "abc");
  CHECK(a.choices[0].names == std::vector<std::string>{"a", "b", "c"});
  // max_tokens 0: the token that the engine sampled is left out
  call.max_tokens = 0;
  a = answer_of(
      call,
      events_of({.turns = {byte_ids("c")}, .finish = Finish::length}, 0, 0, answer_model(), prompt),
      answer_model(), {prompt});
  CHECK(a.choices[0].text == "ab");
  CHECK(a.choices[0].names.size() == 2);
  CHECK(a.choices[0].finish == "length");
  CHECK(a.usage["completion_tokens"] == 0);
}

// ---------------------------------------------------------------------------------------------
// Failures, silence, hostile text

TEST_CASE(
    "a failure ends a stream with an error and no [DONE], and a whole answer with its status") {
  ApiCall call = chat_call(2);
  auto events = events_of({.turns = {ids_of("The answer")}}, 0, -1);
  events.resize(3);
  Event failed{.kind = Event::failed, .text = "the engine \xff broke\nhere"};
  failed.status = 500;
  events.push_back(failed);
  events.push_back(failed);  // of the other choice
  Rng rng{1};
  const ApiAnswer a = read_stream(stream_text(call, events, rng), rules_of(call));
  CHECK(a.error == "the engine \xef\xbf\xbd broke\nhere");
  AnswerWriter writer(call, answer_model(), {{1}});
  writer.add(events);
  CHECK(writer.failed());
  bool thrown = false;
  try {
    writer.whole();
  } catch (const ApiError& e) {
    thrown = e.status == 500 && e.type == "server_error";
  }
  CHECK(thrown);
}

TEST_CASE("silence is filled with an empty delta of a choice that is not finished") {
  for (const bool chat : {true, false}) {
    ApiCall call = chat_call(2);
    call.chat = chat;
    if (!chat) call.prompts = {"a"};
    call.stream = true;
    AnswerWriter writer(call, answer_model(), {{1}});
    std::string text = writer.begin() + writer.keep_alive();
    for (int i = 0; i < 2; i++) {
      for (const Event& e : events_of({.turns = {ids_of("a")}}, i, -1)) text += writer.add({&e, 1});
      text += writer.keep_alive();
    }
    CHECK(writer.keep_alive() == "");
    CHECK(read_stream(text + writer.end(), rules_of(call)).keep_alives == 2);
  }
}

TEST_CASE("names and texts that are no UTF-8 are sent as UTF-8, in one line") {
  const ServedModel& other = answer_model();
  ServedModel m{.id = "", .text = {.dir = "", .config = {}, .tokenizer = other.text.tokenizer}};
  use_template(m.text, other.text.chat);
  m.id = "a\xff\n\"b";
  m.fingerprint = "\x80";
  ApiCall call = chat_call();
  call.top_logprobs = 3;
  const auto events = events_of({.turns = {byte_ids("\xff\n\r\x01\x7f\xe2\x80\xa8")}}, 0, 3, m);
  const ApiAnswer a = answer_of(call, events, m);
  CHECK(a.model == "a\xef\xbf\xbd\n\"b");
  CHECK(a.choices[0].text == "\xef\xbf\xbd\n\r\x01\x7f\xe2\x80\xa8");
}

// ---------------------------------------------------------------------------------------------
// The checker itself

TEST_CASE("the grammar's checker finds every deviation") {
  ApiCall call = chat_call(2);
  call.include_usage = true;
  call.has_tools = true;
  call.top_logprobs = 2;
  Rng rng{4};
  const AnswerScript script{.turns = {ids_of(concat("<think>a</think>The way\n", kCall))}};
  const std::string good =
      stream_text(call, mixed({events_of(script, 0, 2), events_of(script, 1, 2)}, rng), rng);
  const AnswerRules rules = rules_of(call);
  read_stream(good, rules);
  const auto edited = [&](const std::string& from, const std::string& to) {
    std::string bad = good;
    const size_t i = bad.find(from);
    REQUIRE(i != std::string::npos);
    return bad.replace(i, from.size(), to);
  };
  const std::pair<const char*, const char*> edits[] = {
      {"data: [DONE]\n\n", ""},
      {"data: [DONE]", "data: [DONE]\n\ndata: [DONE]"},
      {"data: ", "data:"},
      {"\n\n", "\n"},
      {"\n\ndata: ", "\r\n\r\ndata: "},
      {"\"role\":\"assistant\",", ""},
      {"\"content\":\"The", "\"role\":\"assistant\",\"content\":\"The"},
      {"\"usage\":null", "\"usage\":{}"},
      {",\"usage\":null", ""},
      {"\"choices\":[]", "\"choices\":[{}]"},
      {"chat.completion.chunk", "chat.completion"},
      {"chatcmpl-", "chatcmpl-x"},
      {"\"seed\":77", "\"seed\":78"},
      {"\"seed\":77,", ""},
      {"\"finish_reason\":\"tool_calls\"", "\"finish_reason\":\"stop\""},
      {"\"finish_reason\":\"tool_calls\"", "\"finish_reason\":null"},
      {"\"finish_reason\":null", "\"finish_reason\":\"length\""},
      {"\"index\":1", "\"index\":2"},
      {"\"arguments\":\"{", "\"arguments\":\""},
      {"\"tool_calls\":[{\"index\":0", "\"tool_calls\":[{\"index\":1"},
      {"\"id\":\"call_", "\"id\":\"c"},
      {"\"refusal\":null", "\"refusal\":\"\""},
      {",\"refusal\":null", ""},
      {"\"bytes\":[", "\"bytes\":[65,"},
      {"\"logprob\":-", "\"logprob\":1"},
      {"\"reasoning_content\":\"a\"", "\"reasoning_content\":\"b\""},
      {"\"total_tokens\":", "\"total_tokens\":1"},
      {"\"cached_tokens\":8", "\"cached_tokens\":800"},
  };
  for (const auto& edit : edits) {
    CAPTURE(edit.first);
    CAPTURE(edit.second);
    CHECK_THROWS_AS(read_stream(edited(edit.first, edit.second), rules), Error);
  }
  // An event is left out. Without text and its entries, or without a call, it is another answer.
  std::vector<std::string> events;
  for (size_t i = 0; i < good.size();) {
    const size_t end = good.find("\n\n", i) + 2;
    events.push_back(good.substr(i, end - i));
    i = end;
  }
  for (size_t i = 0; i < events.size(); i++) {
    if (events[i].find("tool_calls\":[") != std::string::npos) continue;
    std::string bad;
    for (size_t k = 0; k < events.size(); k++) bad += k == i ? "" : events[k];
    CAPTURE(events[i]);
    if (events[i].find("\"logprobs\":{") != std::string::npos) continue;  // text and its entries
    CHECK_THROWS_AS(read_stream(bad, rules), Error);
  }
}

}  // namespace cake
