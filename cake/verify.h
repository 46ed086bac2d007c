// Is this answer right? For the rewards of `./rlhf` and for `./chat eval`.
//
//     (problem, text of the answer) -> verifier -> 1 right, 0 wrong, or another reward
//
// A verifier sees the problem and the text. It does not know rollouts, tokens or models. Each has a
// name, as in `./rlhf grpo --reward number`. What is right is in the Problem (cake/problems.h); of
// several answers any is right. What the text says is read by cake/answers.h:
//
//     number          its number is that of an answer: 0.75 and 3/4 are equal, 18 and $18.00 too
//     exact           it equals an answer; white space around both is ignored
//     choice          it chooses the letter of an answer, of the letters that the problem offers
//     countdown       it has an expression of `numbers` alone, each used once, that is `target`
//     countdown:all   the same, and the expression uses all of them
//     check:CMD       the user's program CMD says 1 (right) or 0 (wrong)
//     command:CMD     the user's program CMD gives any number
//     rubric          the mean mark from 0 to 1 by the criteria of `rubric` (cake/rubric.h)
//     format:PATTERN  the text has this form, where * is any text
//
// Before a run, `check_problem` finds the problems that a verifier could not judge, such as one
// whose answer is no number for `number`, and `try_out` starts the user's program.
//
// An item of `./chat eval` says by itself what is right, in its "check":
//
//     {"type": "number", "value": "42"}  the number that counts in the answer is 42
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
#include <array>
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

#include "cake/answers.h"
#include "cake/bytes.h"
#include "cake/json.h"
#include "cake/problems.h"
#include "cake/rubric.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Verifiers by name

struct Attempt {  // at a problem
  const Problem* problem;
  std::string_view text;
  bool ended = true;  // the model ended its turn; false: a length limit cut the text off
};

struct Verifier {
  bool is_pass_fail;  // true: a score is 1 (right) or 0 (wrong); false: a score is any reward
  // The score of each attempt; NaN where the verifier itself failed.
  std::function<std::vector<float>(std::span<const Attempt>)> score;
  // Both may be empty. Fails where a problem lacks what the verifier needs:
  std::function<void(const Problem&)> check_problem;
  // Fails unless the verifier judges an attempt at this problem:
  std::function<void(const Problem&)> try_out;
};

struct CommandLimits {                // on the user's program
  double seconds = 10;                // for each answer
  double start_seconds = 60;          // more for the first one
  int64_t memory = int64_t(4) << 30;  // bytes of address space; 0: any
  int processes = 64;                 // that the user may have beside those at the start
  int verifiers = 1;                  // processes of it at once
};

inline bool right_number(const Problem&, std::string_view text);
inline bool right_exact(const Problem&, std::string_view text);
inline bool right_choice(const Problem&, std::string_view text);
inline bool right_countdown(const Problem&, std::string_view text, bool all = false);
// What is right, one or several, and any of them counts. These fail where there is none.
inline std::vector<std::string> expected_numbers(const Problem&);
inline std::vector<std::string_view> expected_texts(const Problem&);
inline std::vector<char> expected_choices(const Problem&);
struct Countdown {
  std::multiset<std::string> numbers;  // in canonical form, like the target
  std::string target;
};
inline Countdown countdown_of(const Problem&);
inline bool matches_pattern(std::string_view pattern, std::string_view text);
inline std::string form_text(const std::string& form);
inline Verifier command_verifier(const std::string& command, const CommandLimits& limits,
                                 bool is_pass_fail, const std::string& where);

// The verifier of this name, or none. `where` begins error messages: it is the flag that the user
// gave.
inline std::optional<Verifier> make_verifier(const std::string& name, const std::string& argument,
                                             const CommandLimits& limits,
                                             const std::string& where = "--reward") {
  const auto each = [](bool is_pass_fail, auto score, auto check_problem) {
    return Verifier{is_pass_fail,
                    [score](std::span<const Attempt> attempts) {
                      std::vector<float> scores;
                      for (const Attempt& a : attempts) scores.push_back(float(score(a)));
                      return scores;
                    },
                    check_problem,
                    {}};
  };
  const auto pass_fail = [&](auto is_right, auto expected) {
    return each(
        true, [is_right](const Attempt& a) { return is_right(*a.problem, a.text); },
        [expected](const Problem& p) { expected(p); });
  };
  const auto need_argument = [&](const char* what) {
    if (argument.empty()) fail(where, " ", name, ": expected ", name, ":", what);
  };
  if (name == "number") return pass_fail(right_number, expected_numbers);
  if (name == "exact") return pass_fail(right_exact, expected_texts);
  if (name == "choice") return pass_fail(right_choice, expected_choices);
  if (name == "countdown") {
    if (!argument.empty() && argument != "all") {
      fail(where, " countdown: found ", argument, ", expected countdown or countdown:all");
    }
    const bool all = !argument.empty();
    return pass_fail(
        [all](const Problem& p, std::string_view text) { return right_countdown(p, text, all); },
        countdown_of);
  }
  if (name == "command" || name == "check") {
    need_argument("a shell command");
    return command_verifier(argument, limits, name == "check", where + " " + name);
  }
  if (name == "rubric") {
    const auto check_problem = [](const Problem& p) {
      if (p.rubric.empty()) fail(p.where, ": rubric is missing");
    };
    return each(
        false, [](const Attempt& a) { return true_reward(a.problem->rubric, a.text, a.ended); },
        check_problem);
  }
  if (name == "format") {
    need_argument("PATTERN, where * is any text");
    return each(
        true,
        [pattern = form_text(argument)](const Attempt& a) {
          return matches_pattern(pattern, a.text);
        },
        [](const Problem&) {});
  }
  return std::nullopt;
}

// ---------------------------------------------------------------------------------------------
// Checks: what an item of `./chat eval` says is right

using Check = OrderedJson;  // {"type", ...}, as above

inline bool refuses(std::string_view answer);

// `tools`: the names of the tools that the model called before it answered.
inline bool passes(const Check& check, std::string_view answer,
                   const std::set<std::string>& tools = {}) {
  const std::string type = check.at("type");
  const auto text = [&](const char* key) { return check.at(key).get<std::string>(); };
  if (type == "number")
    return is_same_number(canonical_number(text("value")), final_number(answer));
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
// Numbers, choices, countdowns: the answer's (cake/answers.h) beside the problem's

inline std::vector<std::string> expected_numbers(const Problem& p) {
  require(!p.answers.empty(), p.where, ": answer is missing");
  std::vector<std::string> numbers;
  for (const std::string& answer : p.answers) {
    numbers.push_back(reference_number(answer));
    if (!numbers.back().empty()) continue;
    fail(p.where, ": answer: found ", json_text(answer),
         ", expected one number, or one behind #### or in \\boxed{}");
  }
  return numbers;
}
inline bool right_number(const Problem& p, std::string_view text) {
  const std::string found = final_number(text);
  return std::ranges::any_of(expected_numbers(p), [&](const std::string& expected) {
    return is_same_number(expected, found);
  });
}

// The problem's own choices, or those that its question lists, "A) .. B) ..", "A. ..", "(1) .. (2)
// .."; otherwise the 26 letters.
inline OfferedChoices offered_choices(const Problem& p) {
  if (!p.choices.empty()) return {int(std::min<size_t>(26, p.choices.size())), false, p.choices};
  for (const char begin : {'A', '1'}) {
    int n = 0;
    for (size_t i = 0; n < (begin == 'A' ? 26 : 9) && i + 1 < p.question.size(); i++) {
      const bool stands_alone = i == 0 || !is_alphanumeric(p.question[i - 1]);
      const char next = p.question[i + 1];
      if (stands_alone && p.question[i] == begin + n)
        n += next == ')' || next == '.' || next == ':';
    }
    if (n >= 2) return {n, begin == '1', {}};
  }
  return {};
}
inline std::vector<char> expected_choices(const Problem& p) {
  require(!p.answers.empty(), p.where, ": answer is missing");
  const OfferedChoices choices = offered_choices(p);
  std::vector<char> letters;
  for (const std::string& answer : p.answers) {
    letters.push_back(chosen_letter(answer, choices));
    if (letters.back()) continue;
    fail(p.where, ": answer: found ", json_text(answer), ", expected ",
         choices.are_numbered ? "a number from 1 to " : "a letter from A to ",
         char((choices.are_numbered ? '1' : 'A') + choices.offered - 1));
  }
  return letters;
}
inline bool right_choice(const Problem& p, std::string_view text) {
  const char chosen = chosen_letter(text, offered_choices(p));
  return std::ranges::count(expected_choices(p), chosen) > 0;
}

inline Countdown countdown_of(const Problem& p) {
  Countdown c{{}, canonical_number(p.target)};
  for (const std::string& n : p.numbers) c.numbers.insert(canonical_number(n));
  if (!c.target.empty() && c.numbers.size() >= 2 && !c.numbers.count("")) return c;
  fail(p.where, ": found no countdown, expected {\"numbers\": [3, 5], \"target\": 8}");
}
inline bool right_countdown(const Problem& p, std::string_view text, bool all) {
  const Countdown c = countdown_of(p);
  const std::string found = final_arithmetic(text, c.numbers, c.target);
  if (found.empty() || (all && answers::operands_of(found) != c.numbers)) return false;
  try {
    return exact_value(found) == c.target;
  } catch (const Error&) {  // divided by zero
    return false;
  }
}

// ---------------------------------------------------------------------------------------------
// Texts and their form

inline std::vector<std::string_view> expected_texts(const Problem& p) {
  require(!p.answers.empty(), p.where, ": answer is missing");
  std::vector<std::string_view> texts;
  for (const std::string& answer : p.answers) {
    texts.push_back(strip_ascii(answer));
    const size_t choice = answer.size() == 1 ? size_t(answer[0] - 'A') : p.choices.size();
    if (choice < p.choices.size()) texts.push_back(p.choices[choice]);  // the letter, or its text
  }
  return texts;
}
inline bool right_exact(const Problem& p, std::string_view text) {
  return std::ranges::count(expected_texts(p), strip_ascii(text)) > 0;
}

inline bool refuses(std::string_view answer) {
  for (const char* words : {"don't know", "do not know", "can't help", "cannot help"}) {
    if (contains_words(answer, words)) return true;
  }
  return false;
}

// A text, or, where it names a file, the text of that file.
inline std::string form_text(const std::string& form) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(form, ignored) ? read_text_file(form) : form;
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

// One process of the user's program, asked one line at a time.
class CommandProcess {
 public:
  CommandProcess(std::string command, const CommandLimits& limits)
      : command_(std::move(command)), limits_(limits) {}
  CommandProcess(const CommandProcess&) = delete;
  CommandProcess& operator=(const CommandProcess&) = delete;
  ~CommandProcess() { stop(); }

  bool is_busy() const { return attempt_ >= 0; }
  int64_t attempt() const { return attempt_; }  // number of the line it was asked; -1: none
  double seconds_left() const { return deadline_ - now(); }
  const std::string& reply() const { return reply_; }      // the line that it wrote,
  const std::string& failure() const { return failure_; }  // or what went wrong

  // Starts the process where there is none. Its first line may take longer: programs load
  // libraries.
  void ask(int64_t attempt, std::string line) {
    const bool is_first = process_ < 0;
    if (is_first) start();
    const double start_seconds = first_reply_ < 0 ? limits_.start_seconds : 2 * first_reply_;
    asked_ = now(), seconds_ = limits_.seconds + (is_first ? start_seconds : 0);
    deadline_ = asked_ + seconds_;
    attempt_ = attempt, unsent_ = std::move(line), is_first_ = is_first;
  }
  std::array<pollfd, 2> polled() const {
    const bool writes = is_busy() && !unsent_.empty();
    return {pollfd{is_busy() ? stdout_ : -1, POLLIN, 0}, pollfd{writes ? stdin_ : -1, POLLOUT, 0}};
  }
  // Writes and reads what it can. True when there is a reply or a failure; a failure ends it.
  bool advance(std::span<const pollfd> polled) {  // (2)
    reply_.clear(), failure_.clear();
    if (polled[1].revents) {
      const ssize_t n = write(stdin_, unsent_.data(), unsent_.size());
      if (n < 0 && errno != EAGAIN && errno != EINTR) failure_ = "ended";
      unsent_.erase(0, size_t(std::max<ssize_t>(0, n)));
    }
    if (polled[0].revents) {
      char piece[4096];
      const ssize_t n = read(stdout_, piece, sizeof piece);
      if (n == 0) failure_ = "ended";
      unread_.append(piece, size_t(std::max<ssize_t>(0, n)));
    }
    if (const size_t end = unread_.find('\n'); end != std::string::npos) {
      reply_ = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      failure_ = unread_.empty() ? "" : "wrote more than one line";
      if (is_first_ && first_reply_ < 0) first_reply_ = now() - asked_;
      attempt_ = -1;
    } else if (unread_.size() > (1 << 20)) {
      failure_ = "wrote more than a megabyte without a line's end";
    } else if (failure_.empty() && seconds_left() <= 0) {
      failure_ = format("wrote no line within %g s", seconds_);
    }
    if (!failure_.empty()) stop();
    return !is_busy();
  }
  void stop() {  // kills the process and every process that it started
    attempt_ = -1;
    if (process_ < 0) return;
    kill(-process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    close(stdin_), close(stdout_);
    process_ = -1;
    unread_.clear();
  }

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
      if (limits_.memory > 0) setrlimit(RLIMIT_AS, &memory);
      setrlimit(RLIMIT_NPROC, &processes), setrlimit(RLIMIT_CORE, &no_core);
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

  std::string command_;
  CommandLimits limits_;
  pid_t process_ = -1;
  int stdin_ = -1, stdout_ = -1;  // our ends of the process's pipes
  int64_t attempt_ = -1;
  bool is_first_ = false;  // the line is the process's first
  double asked_ = 0, deadline_ = 0, seconds_ = 0;
  double first_reply_ = -1;  // seconds that a first line took; -1: not known
  std::string unsent_, unread_, reply_, failure_;
};

// The user's program, in limits.verifiers processes that last for the whole run. For each answer
// one of them reads a line of JSON {"id", "prompt", "completion", "answer", "answers", "record":
// the problem's whole line} and writes a line {"id", "reward"}. Rewards are joined in the order of
// the answers.
//
// The limits are no sandbox: the program has all the rights of the user who started the training.
// When it is too slow, ends, or writes anything else, the process is killed, that answer gets no
// reward, and the next answer starts a new process.
class CommandVerifier {
 public:
  CommandVerifier(const std::string& command, const CommandLimits& limits, bool is_pass_fail)
      : is_pass_fail_(is_pass_fail) {
    std::signal(SIGPIPE, SIG_IGN);  // writing to a program that ended is an error of write()
    for (int i = 0; i < limits.verifiers; i++) {
      processes_.push_back(std::make_unique<CommandProcess>(command, limits));
    }
  }

  // NaN where the program failed; last_failure() says why. Ends after more than `most_failures`,
  // with NaN for all answers that are left.
  std::vector<float> score(std::span<const Attempt> attempts, size_t most_failures) {
    std::vector<float> rewards(attempts.size(), std::numeric_limits<float>::quiet_NaN());
    for (const auto& p : processes_) {
      if (p->is_busy()) p->stop();  // an earlier call was interrupted
    }
    size_t asked = 0, done = 0;
    for (failures_ = 0; done < attempts.size() && failures_ <= most_failures;) {
      stop_if_signalled();
      std::vector<pollfd> polled;
      double seconds = 1;
      for (const auto& p : processes_) {
        if (!p->is_busy() && asked < attempts.size()) {
          p->ask(int64_t(asked), line_of(asked, attempts[asked]));
          asked++;
        }
        for (const pollfd& fd : p->polled()) polled.push_back(fd);
        if (p->is_busy()) seconds = std::clamp(p->seconds_left(), 0., seconds);
      }
      if (poll(polled.data(), polled.size(), int(std::ceil(seconds * 1000))) < 0) {
        if (errno == EINTR) continue;
        fail("command: poll: ", errno_text());
      }
      for (size_t i = 0; i < processes_.size(); i++) {
        CommandProcess& p = *processes_[i];
        const int64_t attempt = p.attempt();
        if (attempt < 0 || !p.advance(std::span(polled).subspan(2 * i, 2))) continue;
        rewards[size_t(attempt)] = reward_of(p, attempt);
        done++;
      }
    }
    return rewards;
  }
  size_t failures() const { return failures_; }  // of the last call
  const std::string& last_failure() const { return last_failure_; }
  size_t processes() const { return processes_.size(); }

 private:
  static std::string line_of(size_t id, const Attempt& a) {
    return json_line(Json{{"id", id},
                          {"prompt", a.problem->question},
                          {"completion", std::string(a.text)},
                          {"answer", a.problem->answers.empty() ? "" : a.problem->answers[0]},
                          {"answers", a.problem->answers},
                          {"record", a.problem->line}});
  }
  float reward_of(CommandProcess& p, int64_t id) {
    std::string why = p.failure();
    if (why.empty()) {
      const Json json = Json::parse(p.reply(), nullptr, false);
      const bool is_reply = json.is_object() && json.contains("reward") &&
                            json["reward"].is_number() && json.contains("id") && json["id"] == id;
      const float reward = is_reply ? json["reward"].get<float>() : NAN;
      if (is_pass_fail_ ? reward == 0 || reward == 1 : std::isfinite(reward)) return reward;
      why = concat("wrote ", json_text(p.reply()), ", expected {\"id\": ", id,
                   ", \"reward\": ", is_pass_fail_ ? "0 or 1}" : "a number}");
      p.stop();
    }
    failures_++, last_failure_ = why;
    return std::numeric_limits<float>::quiet_NaN();
  }

  bool is_pass_fail_;
  std::vector<std::unique_ptr<CommandProcess>> processes_;
  size_t failures_ = 0;
  std::string last_failure_;
};

inline Verifier command_verifier(const std::string& command, const CommandLimits& limits,
                                 bool is_pass_fail, const std::string& where) {
  const auto program = std::make_shared<CommandVerifier>(command, limits, is_pass_fail);
  const auto score = [program, where](std::span<const Attempt> attempts) {
    std::vector<float> out = program->score(attempts, attempts.size() / 5);
    if (program->failures() * 5 > attempts.size()) {
      fail(where, ": found ", program->failures(), " failures in ", attempts.size(),
           " rollouts, expected a fifth at most; the last: it ", program->last_failure());
    }
    return out;
  };
  const auto try_out = [program, where](const Problem& p) {
    const std::vector<Attempt> attempts(program->processes(), {&p, ""});
    program->score(attempts, 0);
    if (program->failures() == 0) return;
    const std::string& why = program->last_failure();
    fail(where, ": tried before the run with an empty completion, it ", why,
         why == "ended" ? "; --command-memory counts addresses, of which some programs (node, java,"
                          " go, CUDA) reserve more than they use: 0 sets no limit"
                        : "");
  };
  return {is_pass_fail, score, {}, try_out};
}

}  // namespace cake
