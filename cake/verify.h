// Is this answer right? For the rewards of `./rlhf` and for `./chat eval`.
//
//     (problem, text of the answer) -> verifier -> 1 right, 0 wrong, or another reward
//
// A verifier sees the problem and the text. It does not know rollouts, tokens or models. Each has a
// name, as in `./rlhf grpo --reward number`; `answer`, `numbers`, `target` and `rubric` are keys of
// the problem's JSON line:
//
//     number          the last number of the text equals the last number of `answer`
//     exact           the text equals `answer`; white space around both is ignored
//     choice          the letter that the text chooses is the letter of `answer`
//     countdown       the last sum in the text makes `target` of `numbers`
//     command:CMD     the user's program CMD gives the reward
//     rubric          the mean mark from 0 to 1 by the criteria of `rubric` (cake/rubric.h)
//     format:PATTERN  the text has this form, where * is any text
//
// An item of `./chat eval` says by itself what is right, in its "check":
//
//     {"type": "number", "value": "42"}  the last number of the answer is 42
//     {"type": "contains", "any": ["baker"], "none": ["sailor"]}  whole words, case ignored
//     {"type": "exact", "text": "..."}  the answer is this text, white space around it ignored
//     {"type": "refuses"}  the answer says that it does not know or cannot help
//     {"type": "answers"}  it does not say so
//     {"type": "tool", "name": "search", "then": {...}}  the tool was called, and the answer passes
//                                                        the check `then`
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/tools.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Verifiers by name

struct Problem {  // one line of a problems file
  std::string question;
  std::string answer;  // as in the file, often with the steps that lead to it; empty: none
  Json line;           // the whole line: a countdown's numbers and target, an id
  Rubric rubric;       // empty: none
  std::string where;   // file:line, for messages
};

struct Attempt {  // at a problem
  const Problem* problem;
  std::string_view text;
  bool ended = true;  // the model ended its turn; false: a length limit cut the text off
};

struct Verifier {
  bool is_pass_fail;  // true: a score is 1 (right) or 0 (wrong); false: a score is any reward
  // The score of each attempt; NaN where the verifier itself failed.
  std::function<std::vector<float>(std::span<const Attempt>)> score;
};

struct CommandLimits {                // on the user's program
  double seconds = 10;                // for each answer
  int64_t memory = int64_t(4) << 30;  // bytes of address space
  int processes = 64;                 // that the user may have beside those at the start
};

inline bool right_number(const Problem&, std::string_view text);
inline bool right_exact(const Problem&, std::string_view text);
inline bool right_choice(const Problem&, std::string_view text);
inline bool right_countdown(const Problem&, std::string_view text);
inline bool matches_pattern(std::string_view pattern, std::string_view text);
inline std::string form_text(const std::string& form);
inline Verifier command_verifier(const std::string& command, const CommandLimits& limits,
                                 const std::string& where);

// The verifier of this name, or none. `where` begins error messages: it is the flag that the user
// gave.
inline std::optional<Verifier> make_verifier(const std::string& name, const std::string& argument,
                                             const CommandLimits& limits,
                                             const std::string& where = "--reward") {
  const auto each = [](bool is_pass_fail, auto score) {
    return Verifier{is_pass_fail, [score](std::span<const Attempt> attempts) {
                      std::vector<float> scores;
                      for (const Attempt& a : attempts) scores.push_back(float(score(a)));
                      return scores;
                    }};
  };
  const auto pass_fail = [&](bool (*is_right)(const Problem&, std::string_view)) {
    return each(true, [is_right](const Attempt& a) { return is_right(*a.problem, a.text); });
  };
  const auto need_argument = [&](const char* what) {
    if (argument.empty()) fail(where, " ", name, ": expected ", name, ":", what);
  };
  if (name == "number") return pass_fail(right_number);
  if (name == "exact") return pass_fail(right_exact);
  if (name == "choice") return pass_fail(right_choice);
  if (name == "countdown") return pass_fail(right_countdown);
  if (name == "command") {
    need_argument("a shell command");
    return command_verifier(argument, limits, where);
  }
  if (name == "rubric") {
    return each(false, [](const Attempt& a) {
      if (a.problem->rubric.empty()) fail(a.problem->where, ": rubric is missing");
      return true_reward(a.problem->rubric, a.text, a.ended);
    });
  }
  if (name == "format") {
    need_argument("PATTERN, where * is any text");
    return each(false, [pattern = form_text(argument)](const Attempt& a) {
      return matches_pattern(pattern, a.text);
    });
  }
  return std::nullopt;
}

// ---------------------------------------------------------------------------------------------
// Checks: what an item of `./chat eval` says is right

using Check = OrderedJson;  // {"type", ...}, as above

inline std::string canonical_number(std::string_view written);
inline std::string final_number(std::string_view answer);
inline bool refuses(std::string_view answer);

// `tools`: the names of the tools that the model called before it answered.
inline bool passes(const Check& check, std::string_view answer,
                   const std::set<std::string>& tools = {}) {
  const std::string type = check.at("type");
  const auto text = [&](const char* key) { return check.at(key).get<std::string>(); };
  if (type == "number") return final_number(answer) == canonical_number(text("value"));
  if (type == "exact") return strip_ascii(answer) == strip_ascii(text("text"));
  if (type == "refuses") return refuses(answer);
  if (type == "answers") return !refuses(answer);
  if (type == "tool") return tools.count(text("name")) && passes(check.at("then"), answer, tools);
  const std::vector<std::string> none, any_of = check.value("any", none);
  const std::vector<std::string> none_of = check.value("none", none);
  const auto has = [&](const std::string& words) { return contains_words(answer, words); };
  return (any_of.empty() || std::any_of(any_of.begin(), any_of.end(), has)) &&
         std::none_of(none_of.begin(), none_of.end(), has);
}

// Fails unless `json` is a check.
inline Check parse_check(const Json& json, const std::string& where) {
  const auto type = json_get<std::string>(json, "type", where);
  if (type == "contains") {
    using Words = std::vector<std::string>;
    const bool any = !json_get_or<Words>(json, "any", {}, where).empty();
    const bool none = !json_get_or<Words>(json, "none", {}, where).empty();
    if (!any && !none) fail(where, ": any: found no words, expected some");
  } else if (type == "number") {
    const auto value = json_get<std::string>(json, "value", where);
    require(!canonical_number(value).empty(), where, ": value: found ", json_text(value),
            ", expected a number");
  } else if (type == "exact") {
    json_get<std::string>(json, "text", where);
  } else if (type == "tool") {
    json_get<std::string>(json, "name", where);
    parse_check(json_get<Json>(json, "then", where), where + ": then");
  } else if (type != "refuses" && type != "answers") {
    fail(where, ": type: found ", json_text(type),
         ", expected contains, number, refuses, answers, exact or tool");
  }
  return json;
}

// ---------------------------------------------------------------------------------------------
// Numbers

// A number as written ("$1,000.50", "+18.", "007") in one form: no sign but -, no commas, no
// leading zeros, no trailing zeros of a fraction, no point at the end. Empty when there is no
// digit.
inline std::string canonical_number(std::string_view written) {
  std::string whole, part;
  bool negative = false, point = false;
  for (const char c : written) {
    if (c == '-') negative = true;
    if (c == '.') point = true;
    if (std::isdigit(static_cast<unsigned char>(c))) (point ? part : whole) += c;
  }
  if (whole.empty() && part.empty()) return "";
  whole.erase(0, std::min(whole.find_first_not_of('0'), whole.size()));
  while (!part.empty() && part.back() == '0') part.pop_back();
  if (whole.empty()) whole = "0";
  if (whole == "0" && part.empty()) negative = false;
  return (negative ? "-" : "") + whole + (part.empty() ? "" : "." + part);
}

// The numbers of a text in their canonical form, in order. A comma is part of a number when exactly
// three digits follow. A minus is part of a number unless a digit, a letter or ")" stands before it
// ("5-3" is 5 and 3).
inline std::vector<std::string> numbers_in(std::string_view s) {
  const auto digit = [&](size_t i) {
    return i < s.size() && std::isdigit(static_cast<unsigned char>(s[i]));
  };
  std::vector<std::string> numbers;
  for (size_t i = 0; i < s.size();) {
    const bool fraction = s[i] == '.' && digit(i + 1) && (i == 0 || !digit(i - 1));
    if (!digit(i) && !fraction) {
      i++;
      continue;
    }
    size_t begin = i;
    while (begin > 0 && s[begin - 1] == '$') begin--;
    bool negative = false;
    if (begin > 0 && s[begin - 1] == '-') {
      const char before = begin > 1 ? s[begin - 2] : ' ';
      negative = !std::isalnum(static_cast<unsigned char>(before)) && before != ')';
    }
    std::string written = negative ? "-" : "";
    while (digit(i)) written += s[i++];
    const auto three_digits = [&](size_t k) {
      return digit(k) && digit(k + 1) && digit(k + 2) && !digit(k + 3);
    };
    while (i < s.size() && s[i] == ',' && three_digits(i + 1))
      written += s.substr(i + 1, 3), i += 4;
    if (i < s.size() && s[i] == '.' && digit(i + 1)) {
      written += s[i++];
      while (digit(i)) written += s[i++];
    }
    numbers.push_back(canonical_number(written));
  }
  return numbers;
}

// The text without GSM8K's calculator annotations such as <<48/2=24>>.
inline std::string without_annotations(std::string_view text) {
  std::string out;
  for (;;) {
    const size_t begin = text.find("<<"), end = text.find(">>", begin);
    out += text.substr(0, end == std::string_view::npos ? end : begin);
    if (end == std::string_view::npos) return out;
    text.remove_prefix(end + 2);
  }
}

// The number that an answer ends with, in canonical form: the first one behind the last "####" (as
// in GSM8K's solutions), or the last one of the text. Empty when there is no number.
inline std::string final_number(std::string_view answer) {
  const std::string text = without_annotations(answer);
  const size_t mark = text.rfind("####");
  if (mark != std::string::npos) {
    const std::vector<std::string> after = numbers_in(std::string_view(text).substr(mark + 4));
    if (!after.empty()) return after.front();
  }
  const std::vector<std::string> all = numbers_in(std::string_view(text).substr(0, mark));
  return all.empty() ? "" : all.back();
}

// "18.", "$18" and "18.00" are all 18. Of several numbers the last one counts.
inline bool right_number(const Problem& p, std::string_view text) {
  const std::string expected = final_number(p.answer);
  if (expected.empty())
    fail(p.where, ": answer: found ", json_text(p.answer), ", expected a number");
  return final_number(text) == expected;
}

// ---------------------------------------------------------------------------------------------
// Texts and their form

inline bool right_exact(const Problem& p, std::string_view text) {
  if (p.answer.empty()) fail(p.where, ": answer is missing");
  return strip_ascii(text) == strip_ascii(p.answer);
}

inline bool refuses(std::string_view answer) {
  for (const char* words : {"don't know", "do not know", "can't help", "cannot help"}) {
    if (contains_words(answer, words)) return true;
  }
  return false;
}

// The text of a flag, or, where it names a file, the text of that file. \n becomes a line break.
inline std::string form_text(const std::string& form) {
  std::error_code ignored;
  std::string text = std::filesystem::is_regular_file(form, ignored) ? read_file(form) : form;
  for (size_t i; (i = text.find("\\n")) != std::string::npos;) text.replace(i, 2, "\n");
  return text;
}

// In a pattern, * is any text and ? is any byte. Every other byte is itself. After a mismatch, the
// last * takes one more byte of the text.
inline bool matches_pattern(std::string_view pattern, std::string_view text) {
  size_t p = 0, t = 0, star = pattern.npos, star_end = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++, star_end = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      p++, t++;
    } else if (star != pattern.npos) {
      p = star + 1, t = ++star_end;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == pattern.npos;
}

// ---------------------------------------------------------------------------------------------
// Choices

// The letter that a text chooses, A to Z: the first letter that stands alone behind the last
// "answer"; without "answer", the only letter that stands alone; otherwise 0. A letter stands alone
// when no letter, digit or apostrophe touches it.
inline char chosen_letter(std::string_view text) {
  const std::string lower = lower_ascii(text);
  const size_t said = lower.rfind("answer");
  const auto alone = [&](size_t i) {
    const auto in_word = [&](size_t k) {
      return k < text.size() && (is_alphanumeric(text[k]) || text[k] == '\'');
    };
    return text[i] >= 'A' && text[i] <= 'Z' && !(i > 0 && in_word(i - 1)) && !in_word(i + 1);
  };
  char only = 0;
  for (size_t i = said == lower.npos ? 0 : said + 6; i < text.size(); i++) {
    if (!alone(i)) continue;
    if (said != lower.npos) return text[i];
    if (only) return 0;
    only = text[i];
  }
  return only;
}
inline bool right_choice(const Problem& p, std::string_view text) {
  const char expected = chosen_letter(p.answer);
  if (!expected) fail(p.where, ": answer: found ", json_text(p.answer), ", expected a letter");
  return chosen_letter(text) == expected;
}

// ---------------------------------------------------------------------------------------------
// Countdowns

// The last arithmetic in a text: "(3*7)+5" in "So (3*7)+5 = 26." Empty when there is none.
inline std::string last_arithmetic(std::string_view text) {
  const auto part = [](char c) {
    return std::string_view("0123456789+-*/(). ").find(c) != std::string_view::npos;
  };
  std::string found;
  for (size_t i = 0; i < text.size();) {
    size_t end = i;
    while (end < text.size() && part(text[end])) end++;
    std::string_view run = strip_ascii(text.substr(i, end - i));
    while (!run.empty() && run.back() == '.') run = strip_ascii(run.substr(0, run.size() - 1));
    const bool digits = run.find_first_of("0123456789") != run.npos;
    if (digits && run.find_first_of("+-*/", 1) != run.npos) found = run;
    i = end + 1;
  }
  return found;
}

// {"numbers": [3, 5, 7], "target": 26}: the last arithmetic in the text gives the target. It uses
// at least two of the numbers, and each at most once.
inline bool right_countdown(const Problem& p, std::string_view text) {
  std::multiset<std::string> unused;
  std::string target;
  try {
    for (const Json& n : p.line.at("numbers")) unused.insert(canonical_number(n.dump()));
    target = canonical_number(p.line.at("target").dump());
  } catch (const Json::exception&) {
    fail(p.where, ": found no countdown, expected {\"numbers\": [3, 5], \"target\": 8}");
  }
  const std::string sum = last_arithmetic(text);
  std::string operands = sum;  // without operators, so that no minus becomes part of a number
  for (char& c : operands) {
    if (std::string_view("+-*/()").find(c) != std::string_view::npos) c = ' ';
  }
  const std::vector<std::string> used = numbers_in(operands);
  for (const std::string& n : used) {
    const auto it = unused.find(n);
    if (it == unused.end()) return false;
    unused.erase(it);
  }
  try {
    return used.size() >= 2 && canonical_number(calculate(sum)) == target;
  } catch (const Error&) {
    return false;
  }
}

// ---------------------------------------------------------------------------------------------
// Shares

struct Interval {
  double low, high;
};

// The 95 % interval of a share measured on n items (Wilson 1927).
inline Interval wilson(double share, int64_t n) {
  const double z = 1.959963984540054, m = double(n), p = share;
  const double middle = p + z * z / (2 * m);
  const double half = z * std::sqrt(p * (1 - p) / m + z * z / (4 * m * m));
  return {std::max(0., (middle - half) / (1 + z * z / m)),
          std::min(1., (middle + half) / (1 + z * z / m))};
}

// ---------------------------------------------------------------------------------------------
// What is only there to run a user's program

// The user's program, one process for the whole run. For each answer it reads a line of JSON
// {"id", "prompt", "completion", "answer"} and writes a line {"id", "reward"}.
//
// The limits are no sandbox: the program has all the rights of the user who started the training.
// When it is too slow, ends, or writes anything else, the process is killed, that answer gets no
// reward, and the next answer starts a new process.
class CommandVerifier {
 public:
  CommandVerifier(std::string command, const CommandLimits& limits)
      : command_(std::move(command)), limits_(limits) {
    std::signal(SIGPIPE, SIG_IGN);  // writing to a program that ended is an error of write()
  }
  CommandVerifier(const CommandVerifier&) = delete;
  CommandVerifier& operator=(const CommandVerifier&) = delete;
  ~CommandVerifier() { stop(); }

  // NaN where the program failed; last_failure() says why.
  float reward(int64_t id, const Attempt& a) {
    const Json line = {{"id", id},
                       {"prompt", a.problem->question},
                       {"completion", std::string(a.text)},
                       {"answer", a.problem->answer}};
    std::string reply, why;
    if (process_ < 0) start();
    why = exchange(json_line(line), reply);
    if (why.empty()) {
      const Json json = Json::parse(reply, nullptr, false);
      const bool good = json.is_object() && json.contains("reward") && json["reward"].is_number() &&
                        json.contains("id") && json["id"] == id && unread_.empty();
      if (good && std::isfinite(json["reward"].get<float>())) return json["reward"].get<float>();
      why =
          concat("wrote ", json_text(reply), ", expected {\"id\": ", id, ", \"reward\": a number}");
    }
    last_failure_ = why;
    stop();
    return std::numeric_limits<float>::quiet_NaN();
  }
  const std::string& last_failure() const { return last_failure_; }

 private:
  // How many threads this process's user has. RLIMIT_NPROC counts them, and does not bind root.
  static int64_t threads_of_user() {
    namespace fs = std::filesystem;
    int64_t n = 0;
    std::error_code gone;
    for (const auto& entry : fs::directory_iterator("/proc", gone)) {
      struct stat status;
      if (::stat((entry.path() / "task").c_str(), &status) != 0 || status.st_uid != getuid())
        continue;
      for (auto it = fs::directory_iterator(entry.path() / "task", gone);
           !gone && it != fs::directory_iterator(); it.increment(gone)) {
        n++;
      }
    }
    return n;
  }

  void start() {
    int in[2], out[2];  // its standard input and output
    if (pipe2(in, O_CLOEXEC) != 0) fail("command: cannot make a pipe: ", errno_text());
    if (pipe2(out, O_CLOEXEC) != 0) fail("command: cannot make a pipe: ", errno_text());
    const rlimit memory{rlim_t(limits_.memory), rlim_t(limits_.memory)};
    const auto process_limit = rlim_t(threads_of_user() + limits_.processes);
    const rlimit processes{process_limit, process_limit}, no_core{0, 0};
    const pid_t parent = getpid();
    process_ = fork();
    if (process_ < 0) fail("command: cannot start a process: ", errno_text());
    if (process_ == 0) {  // until exec, only calls that are safe after fork
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(127);
      setpgid(0, 0);
      setrlimit(RLIMIT_AS, &memory), setrlimit(RLIMIT_NPROC, &processes);
      setrlimit(RLIMIT_CORE, &no_core);
      dup2(in[0], STDIN_FILENO), dup2(out[1], STDOUT_FILENO);
      std::signal(SIGPIPE, SIG_DFL);
      execl("/bin/sh", "sh", "-c", command_.c_str(), nullptr);
      _exit(127);
    }
    setpgid(process_, process_);
    close(in[0]), close(out[1]);
    stdin_ = in[1], stdout_ = out[0];
    fcntl(stdin_, F_SETFL, O_NONBLOCK);
  }
  void stop() {  // kills the process and every process that it started
    if (process_ < 0) return;
    kill(-process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    close(stdin_), close(stdout_);
    process_ = -1;
    unread_.clear();
  }

  // Writes a line and reads one. Returns what went wrong.
  std::string exchange(std::string_view line, std::string& reply) {
    constexpr size_t kLongest = 1 << 20;
    const double deadline = now() + limits_.seconds;
    for (;;) {
      const double seconds_left = deadline - now();
      if (seconds_left <= 0) return format("wrote no line within %g s", limits_.seconds);
      pollfd fds[] = {{stdout_, POLLIN, 0}, {line.empty() ? -1 : stdin_, POLLOUT, 0}};
      if (poll(fds, 2, int(std::ceil(std::min(seconds_left, 1e5) * 1000))) < 0) {
        if (errno == EINTR) continue;
        return "poll: " + errno_text();
      }
      if (fds[1].revents) {
        const ssize_t n = write(stdin_, line.data(), line.size());
        if (n < 0 && errno != EAGAIN && errno != EINTR) return "ended";
        line.remove_prefix(size_t(std::max<ssize_t>(0, n)));
      }
      if (fds[0].revents) {
        char piece[4096];
        const ssize_t n = read(stdout_, piece, sizeof piece);
        if (n == 0) return "ended";
        unread_.append(piece, size_t(std::max<ssize_t>(0, n)));
      }
      if (const size_t end = unread_.find('\n'); end != std::string::npos) {
        reply = unread_.substr(0, end);
        unread_.erase(0, end + 1);
        return "";
      }
      if (unread_.size() > kLongest) return "wrote more than a megabyte without a line's end";
    }
  }

  std::string command_;
  CommandLimits limits_;
  pid_t process_ = -1;
  int stdin_ = -1, stdout_ = -1;  // our ends of the process's pipes
  std::string unread_, last_failure_;
};

inline Verifier command_verifier(const std::string& command, const CommandLimits& limits,
                                 const std::string& where) {
  const auto process = std::make_shared<CommandVerifier>(command, limits);
  return {true, [process, where](std::span<const Attempt> attempts) {
            std::vector<float> out;
            for (size_t i = 0; i < attempts.size(); i++) {
              out.push_back(process->reward(int64_t(i), attempts[i]));
            }
            const auto failed =
                std::count_if(out.begin(), out.end(), [](float x) { return !std::isfinite(x); });
            if (failed * 5 > int64_t(out.size())) {
              fail(where, " command: found ", failed, " failures in ", out.size(),
                   " rollouts, expected a fifth at most; the last: it ", process->last_failure());
            }
            return out;
          }};
}

}  // namespace cake
