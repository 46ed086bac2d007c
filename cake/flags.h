// Command lines: one way to parse them in every stage, on CLI11.
//
// --help shows the flags that matter, --help-all shows all of them. A flag that was renamed still
// works under its old name, which no help shows. Every error is one line and exit status 1.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

#include "cake/run.h"

namespace cake {

// A flag that has another name now. With a `reason` the old name is an error instead, because its
// meaning would change in silence.
struct RenamedFlag {
  std::string_view old_name, new_name;  // "--documents"
  std::string_view reason = {};
  std::string_view subcommand = {};  // only there; empty: everywhere
};

// The words of a command line, CLI11's order (the program's name left out), with renamed flags
// under their new names.
inline std::vector<std::string> rename_flags(int argc, char** argv,
                                             std::span<const RenamedFlag> renamed) {
  std::vector<std::string> words(argv + std::min(1, argc), argv + argc);
  const std::string subcommand = words.empty() ? "" : words[0];
  for (std::string& word : words) {
    if (word == "--") break;
    const std::string name = word.substr(0, word.find('='));
    for (const RenamedFlag& r : renamed) {
      if (name != r.old_name || (!r.subcommand.empty() && r.subcommand != subcommand)) continue;
      if (!r.reason.empty()) fail(name, ": ", r.reason);
      word = std::string(r.new_name) + word.substr(name.size());
      break;
    }
  }
  return words;
}

// Where a flag may be given several times, CLI11 takes a value in square brackets for a printed
// list: it would read '[1,2]' as two values and '[END]' as END. mark_brackets puts a mark before
// such a value, and read_brackets removes the mark when the value has been parsed.
inline constexpr char kBracketMark = '\x01';

inline void mark_brackets(std::vector<std::string>& words) {
  for (std::string& word : words) {
    if (!word.ends_with(']')) continue;
    const bool short_flag = word.size() > 2 && word[0] == '-' && word[1] != '-';  // -o[x]
    const size_t begin = word.starts_with("--") ? word.find('=') + 1 : short_flag ? 2 : 0;
    if (word[begin] == '[') word.insert(begin, 1, kBracketMark);
  }
}

inline std::string without_mark(std::string value) {
  const bool is_marked = value.size() > 1 && value[0] == kBracketMark && value[1] == '[';
  return value.substr(is_marked ? 1 : 0);
}

inline void read_brackets(CLI::App& app) {
  for (CLI::Option* option : app.get_options({})) {
    if (option->get_items_expected_max() == 0) continue;  // a flag without a value
    option->transform(without_mark);
  }
  for (CLI::App* sub : app.get_subcommands({})) read_brackets(*sub);
}

// The help of the flags that matter, in one list.
class ShortHelp : public CLI::Formatter {
 public:
  explicit ShortHelp(std::vector<std::string> shown) : shown_(std::move(shown)) {}
  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode) const override {
    std::string text = make_description(app) + make_usage(app, std::move(name)) + "\n";
    for (const std::string& option : shown_) {
      if (const auto* o = app->get_option_no_throw(option)) text += make_option(o, false);
    }
    const auto subcommands = app->get_subcommands([](const CLI::App* a) {
      return !a->get_name().empty();  // an option group has none
    });
    if (!subcommands.empty()) text += "\nSubcommands:\n";
    for (const CLI::App* sub : subcommands) text += make_subcommand(sub);
    return text + "\n  --help-all                  every flag\n";
  }

 private:
  std::vector<std::string> shown_;
};

// An option that is empty by default shows no default.
inline void hide_empty_defaults(CLI::App& app) {
  for (CLI::Option* option : app.get_options({})) {
    if (option->get_default_str() == "[]") option->default_str("");
  }
  for (CLI::App* sub : app.get_subcommands({})) hide_empty_defaults(*sub);
}

// What --help shows of a command: the names of its ten or so options that matter.
struct HelpPage {
  CLI::App* app;  // the program, or one of its subcommands
  std::vector<std::string> shown;
};

// Parses the command line. True: go on; false: the help was printed. Throws Error for whatever
// CLI11 refuses. The defaults in the help are those of the variables when the options were added,
// so that `app.option_defaults()->always_capture_default()` belongs before the first add_option.
inline bool parse_flags(CLI::App& app, int argc, char** argv, std::vector<HelpPage> pages,
                        std::span<const RenamedFlag> renamed = {}) {
  std::vector<std::string> words = rename_flags(argc, argv, renamed);
  const auto all = std::find(words.begin(), words.end(), "--help-all");
  if (all != words.end()) {
    *all = "--help";
  } else {
    for (HelpPage& page : pages) {
      page.app->formatter(std::make_shared<ShortHelp>(std::move(page.shown)));
    }
  }
  hide_empty_defaults(app);
  mark_brackets(words);
  read_brackets(app);
  if (argc > 0) app.name(argv[0]);
  std::reverse(words.begin(), words.end());  // CLI11 takes them from the back
  try {
    app.parse(words);
  } catch (const CLI::CallForHelp& e) {
    app.exit(e);
    return false;
  } catch (const CLI::ParseError& e) {
    std::string what = e.what();
    std::erase(what, kBracketMark);
    fail(what, " (see --help)");
  }
  return true;
}

}  // namespace cake
