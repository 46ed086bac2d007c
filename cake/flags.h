// Command lines: one way to parse them in every stage, on CLI11.
//
// --help shows the flags that matter, --help-all shows all of them. A flag that was renamed still
// works under its old name, which no help shows. Every error is one line and exit status 1.
#pragma once

#include <algorithm>
#include <filesystem>
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

// ---------------------------------------------------------------------------------------------
// Texts in flags: --prompt, --system, --stop, --form. A shell does not turn \n into a line break,
// so that these flags read escapes, unless --raw is given. The text of a file has none.

// \n is a line break, \t a tab, \\ a backslash, and \xHH the byte of these two hexadecimal digits.
// Any other character behind a backslash is an error: LaTeX and paths of Windows are full of them,
// and where \frac stayed as it is, \times would still become a tab without a word. `flag` begins
// the message.
inline std::string unescape(std::string_view text, std::string_view flag) {
  std::string out;
  const auto digit = [&](size_t i) {
    const char c = i < text.size() ? text[i] : '\0';
    return c >= '0' && c <= '9'                 ? c - '0'
           : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                : -1;
  };
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != '\\') {
      out += text[i];
      continue;
    }
    const char c = i + 1 < text.size() ? text[i + 1] : '\0';
    const int high = digit(i + 2), low = digit(i + 3);
    if (c == 'n' || c == 't' || c == '\\') {
      out += c == 'n' ? '\n' : c == 't' ? '\t' : c;
      i++;
    } else if (c == 'x' && high >= 0 && low >= 0) {
      out += char(16 * high + low);
      i += 3;
    } else {
      size_t end = std::min(text.size(), i + 2);  // of the character behind the backslash
      while (end < text.size() && (text[end] & 0xC0) == 0x80) end++;
      fail(flag, ": found ", text.substr(i, end - i),
           ", expected \\n, \\t, \\\\ or \\xHH (write \\\\ for a backslash, or give --raw)");
    }
  }
  return out;
}

// The same for a flag that takes a text or a file: the name of a file stays as it is.
inline std::string unescape_unless_file(std::string_view text, std::string_view flag) {
  std::error_code ignored;
  const bool is_file = std::filesystem::is_regular_file(std::filesystem::path(text), ignored);
  return is_file ? std::string(text) : unescape(text, flag);
}

// Adds --raw, which turns escapes off, and makes `texts` flags that read them. A value that is read
// in another way, as the texts in it ask, has a `read` of its own.
inline void add_raw_flag(CLI::App& app, const std::vector<CLI::Option*>& texts,
                         std::string (*read)(std::string_view, std::string_view) = unescape) {
  CLI::Option* raw = app.get_option_no_throw("--raw");
  if (!raw) {
    raw = app.add_flag("--raw")->description(
        "a backslash in a flag's text is itself; otherwise \\n is a line break, \\t a tab, "
        "\\\\ a backslash, and \\xHH a byte");
  }
  for (CLI::Option* text : texts) {
    text->transform([=](const std::string& value) {
      return raw->count() > 0 ? value : read(value, text->get_name());
    });
  }
}

// ---------------------------------------------------------------------------------------------
// The words of a command line

// The flags of a program or subcommand and of its groups.
inline void collect_flags(const CLI::App& app, std::vector<const CLI::Option*>& flags) {
  for (const CLI::Option* option : app.get_options({})) flags.push_back(option);
  for (const CLI::App* group : app.get_subcommands({})) {
    if (group->get_name().empty()) collect_flags(*group, flags);
  }
}

// CLI11 reads meaning into values: it splits '[1,2]' where a flag may be given several times, drops
// '++', takes the next word where the text behind = is empty, and takes a text for a subcommand of
// that name. So every value is given to it with a mark in front, which unmark_values removes when
// the value has been parsed.
inline constexpr char kValueMark = '\x01';

inline void unmark_values(CLI::App& app) {
  for (CLI::Option* option : app.get_options({})) {
    if (option->get_items_expected_max() == 0) continue;  // a flag without a value
    option->transform([](const std::string& value) {
      return value.substr(value.starts_with(kValueMark) ? 1 : 0);
    });
  }
  for (CLI::App* sub : app.get_subcommands({})) unmark_values(*sub);
}

// The words of a command line for CLI11, the program's name left out: renamed flags under their new
// names, values marked, and no -- in front of words that are all values. --help-all becomes --help
// and sets `all`.
inline std::vector<std::string> read_words(const CLI::App& app, int argc, char** argv,
                                           std::span<const RenamedFlag> renamed, bool& all) {
  std::vector<std::string> words(argv + std::min(1, argc), argv + argc);
  const CLI::App* command = &app;  // then the subcommand that was named, and its own
  std::string subcommand;          // the program's
  std::vector<const CLI::Option*> flags;
  collect_flags(app, flags);
  const auto takes_value = [&](const std::string& name) {
    return std::any_of(flags.begin(), flags.end(), [&](const CLI::Option* flag) {
      return flag->get_items_expected_max() > 0 && flag->check_name(name);
    });
  };
  bool is_value = false, only_values = false;  // behind a flag that takes a value; behind --
  for (std::string& word : words) {
    const bool is_flag = word.size() > 1 && word[0] == '-';
    if (is_value || only_values || !is_flag) {
      const auto subs = command->get_subcommands([&](const CLI::App* sub) {
        return !is_value && !only_values && sub->get_name() == word;
      });
      if (!subs.empty() && !word.empty()) {
        if (command == &app) subcommand = word;
        command = subs[0];
        collect_flags(*command, flags);
      } else {
        word.insert(0, 1, kValueMark);
      }
      is_value = false;
      continue;
    }
    if (word == "--") {
      only_values = true;
      continue;
    }
    if (word == "--help-all") word = "--help", all = true;
    std::string name = word.substr(0, word.find('='));
    for (const RenamedFlag& r : renamed) {
      if (name != r.old_name || (!r.subcommand.empty() && r.subcommand != subcommand)) continue;
      if (!r.reason.empty()) fail(name, ": ", r.reason);
      word = std::string(r.new_name) + word.substr(name.size());
      name = r.new_name;
      break;
    }
    const bool is_short = word[1] != '-';
    if (is_short) name = word.substr(0, 2);
    if (!takes_value(name)) continue;
    is_value = word == name;
    if (!is_value) word.insert(name.size() + !is_short, 1, kValueMark);  // --name=value, -nvalue
  }
  std::erase(words, "--");
  return words;
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
  bool all = false;
  std::vector<std::string> words = read_words(app, argc, argv, renamed, all);
  if (!all) {
    for (HelpPage& page : pages) {
      page.app->formatter(std::make_shared<ShortHelp>(std::move(page.shown)));
    }
  }
  hide_empty_defaults(app);
  unmark_values(app);
  if (argc > 0) app.name(argv[0]);
  std::reverse(words.begin(), words.end());  // CLI11 takes them from the back
  try {
    app.parse(words);
  } catch (const CLI::CallForHelp& e) {
    app.exit(e);
    return false;
  } catch (const CLI::ParseError& e) {
    std::string what = e.what();
    std::erase(what, kValueMark);
    const bool is_dash = what.find("not expected: -") != std::string::npos;
    fail(what, " (see --help", is_dash ? "; -- stands before a text that begins with -)" : ")");
  }
  return true;
}

}  // namespace cake
