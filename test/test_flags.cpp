// Command lines: what stands on one is what a stage reads.
#include "cake/flags.h"

#include "test/support.h"

using namespace cake;

namespace {

// What a command line of ./tool is read as, in the shapes of flags that the stages have.
struct Parsed {
  std::string tokenizer, one, out, prompt;
  std::vector<std::string> texts, stops, many, tasks;
  bool on = false;
};

Parsed parse(std::vector<std::string> words) {
  Parsed p;
  CLI::App app("tool");
  CLI::App* show = app.add_subcommand("show", "a subcommand");
  show->add_option("TOKENIZER", p.tokenizer)->required();
  show->add_option("TEXT", p.texts);
  auto* group = show->add_option_group("Group", "of flags");
  group->add_option("--one", p.one);
  group->add_flag("--on", p.on);
  CLI::Option* prompt = group->add_option("--prompt", p.prompt);
  CLI::Option* stop = show->add_option("--stop", p.stops)->allow_extra_args(false);
  show->add_option("--many", p.many);
  show->add_option("--tasks", p.tasks)->delimiter(',');
  show->add_option("-o,--out", p.out);
  add_raw_flag(*show, {prompt, stop});
  const RenamedFlag renamed[] = {{"--single", "--one"}};
  words.insert(words.begin(), {"./tool", "show"});
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  if (!parse_flags(app, int(pointers.size()), pointers.data(), {}, renamed)) fail("help");
  return p;
}

using Words = std::vector<std::string>;

// Texts into which CLI11, a shell's habits or a list's syntax could read something.
const std::string kTexts[] = {
    "[1,2]",  "[]",    "[END]", "[[x]]", "[",   "]",        "[a] b",     "a,b",
    "++",     "{}",    "%%",    "a=b",   "=",   "=[x]",     "--",        "-",
    "-x",     "-5",    "--one", "-o[x]", "- a", "--on=[x]", "--help",    "--help-all",
    "--what", "show",  "",      " ",     "'",   "\x01",     "\x01[x]",   "--single",
    "#",      "@file", "/help", "!x",    "\"",  "--one=1",  "[INST] hi", "--raw"};

}  // namespace

TEST_CASE("the value of a flag is the text on the command line") {
  for (const std::string& text : kTexts) {
    CAPTURE(text);
    for (const Words& words :
         {Words{"--one", text}, {"--one=" + text}, {"--single", text}, {"--single=" + text}}) {
      Words all = {"T"};
      all.insert(all.end(), words.begin(), words.end());
      CHECK(parse(all).one == text);
      all.push_back("--on");
      CHECK(parse(all).on);
      CHECK(parse(all).one == text);
      CHECK(parse(all).texts.empty());
    }
    CHECK(parse({"T", "-o", text}).out == text);
    if (!text.empty()) CHECK(parse({"T", "-o" + text}).out == text);
    CHECK(parse({"T", "--stop", text, "--stop=" + text, "--stop", "b"}).stops ==
          Words{text, text, "b"});
    CHECK(parse({"T", "--many", text, "--many=" + text}).many == Words{text, text});
    CHECK(parse({"T", "--prompt", text, "--raw"}).prompt == text);
  }
}

TEST_CASE("a word without a flag is a text, and behind -- every word is") {
  for (const std::string& text : kTexts) {
    CAPTURE(text);
    CHECK(parse({"T", "--", text, "b", text}).texts == Words{text, "b", text});
    CHECK(parse({"T", "a", "--", text}).texts == Words{"a", text});
    CHECK(parse({"--", text, text}).tokenizer == text);
    const bool is_flag = text.size() > 1 && text[0] == '-' && text != "- a" && text != "-5";
    if (is_flag) continue;
    CHECK(parse({"T", text}).texts == Words{text});
    CHECK(parse({"T", text, text, "--on"}).texts == Words{text, text});
    CHECK(parse({"T", "--many", "a", text}).many == Words{"a", text});
  }
  CHECK(contains(error_of([] {
                   parse({"T", "-x"});
                 }),
                 "-- stands before a text that begins with -"));
}

TEST_CASE("a list with commas keeps its brackets") {
  CHECK(parse({"T", "--tasks", "[a],b,[c]"}).tasks == Words{"[a]", "b", "[c]"});
  CHECK(parse({"T", "--tasks=[a]"}).tasks == Words{"[a]"});
}

TEST_CASE("texts of flags read \\n, \\t, \\\\ and \\xHH, and nothing else") {
  const std::pair<std::string, std::string> cases[] = {{"", ""},
                                                       {R"(\n)", "\n"},
                                                       {R"(a\n\nb)", "a\n\nb"},
                                                       {R"(a\tb)", "a\tb"},
                                                       {R"(\\)", "\\"},
                                                       {R"(\\n)", "\\n"},
                                                       {R"(\\\n)", "\\\n"},
                                                       {R"(C:\\new\\dir)", "C:\\new\\dir"},
                                                       {R"(\xe2\x82\xAC)", "\xe2\x82\xac"},
                                                       {R"(\x00.)", std::string("\0.", 2)},
                                                       {R"(\x0a0)", "\n0"},
                                                       {"a\nb", "a\nb"},
                                                       {"\u00e9/n", "\u00e9/n"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    CHECK(unescape(c.first, "--stop") == c.second);
    CHECK(parse({"T", "--prompt", c.first}).prompt == c.second);
    CHECK(parse({"T", "--prompt=" + c.first}).prompt == c.second);
    CHECK(parse({"T", "--stop", c.first, "--stop", "x"}).stops == Words{c.second, "x"});
    CHECK(parse({"T", "--one", c.first}).one == c.first);  // no text of that kind
    CHECK(parse({"T", c.first}).texts == Words{c.first});
    for (const Words& words :
         {Words{"--raw", "--prompt", c.first}, {"--prompt", c.first, "--raw"}}) {
      Words all = {"T"};
      all.insert(all.end(), words.begin(), words.end());
      CHECK(parse(all).prompt == c.first);
    }
  }
  const std::pair<std::string, std::string> bad[] = {
      {R"(\frac{1}{2})", R"(found \f, expected \n, \t, \\ or \xHH)"},
      {R"(\d+)", R"(found \d, )"},
      {R"(C:\Users)", R"(found \U, )"},
      {R"(\)", R"(found \, )"},
      {R"(a\\\)", R"(found \, )"},
      {R"(\x)", R"(found \x, )"},
      {R"(\x4)", R"(found \x, )"},
      {R"(\xg0)", R"(found \x, )"},
      {R"(\x4g)", R"(found \x, )"},
      {R"(\N)", R"(found \N, )"},
      {"\\\u00e9", "found \\\u00e9, "},
      {R"(\r)", R"(found \r, )"},
      {R"(\0)", R"(found \0, )"}};
  for (const auto& c : bad) {
    CAPTURE(c.first);
    for (const char* flag : {"--prompt", "--stop"}) {
      const std::string error = error_of([&] { parse({"T", flag, c.first}); });
      CHECK(error.starts_with(std::string(flag) + ": found \\"));
      CHECK(contains(error, c.second));
      CHECK(contains(error, "--raw"));
    }
    CHECK(parse({"T", "--prompt", c.first, "--raw"}).prompt == c.first);
  }
}

TEST_CASE("the name of a file in place of a text has no escapes") {
  const TempDir dir;
  const std::string name = dir / "a\\nb";
  CHECK(unescape_unless_file(name, "--form") != name);
  write_file(name, "x");
  CHECK(unescape_unless_file(name, "--form") == name);
}

TEST_CASE("a subcommand of a subcommand is one, and behind it its name is a text") {
  CLI::App app{"a tool"};
  CLI::App* train = app.add_subcommand("classify", "c")->add_subcommand("train", "t");
  std::vector<std::string> files;
  train->add_option("FILES", files);
  Words words = {"./tool", "classify", "train", "train", "classify", "[a]"};
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  CHECK(parse_flags(app, int(pointers.size()), pointers.data(), {}));
  CHECK(train->parsed());
  CHECK(files == Words{"train", "classify", "[a]"});
}
