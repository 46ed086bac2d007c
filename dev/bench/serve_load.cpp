// build/serve_load: load on an OpenAI-compatible server, and what its clients see.
//
//     build/serve_load --port 8080 --streams 64 --requests 256 --max-tokens 128
//     build/serve_load --port 8080 --streams 8 --long-prompts 8 --long-tokens 960
//     build/serve_load --port 8080 --streams 64 --flood 420 --health
//     build/serve_load --port 8080 --streams 64 --requests 10000 --max-tokens 4 --pid PID
//     build/serve_load --port 8080 --drip 500
//
// Each stream is a connection that sends one request after another. Beside the streams, if asked
// for: prompts that fill the context (how long do the streams stand still?), many clients at once
// (is each one answered, and how fast is a refusal?), and GET /health every 20 ms.
//
// One thread, epoll. On a machine with two cores the client must not measure itself: --cpu pins it
// to one core, it searches a chunk for a few bytes instead of parsing JSON, and it reports which
// share of a core it used. The server counts the tokens, in "usage".
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <CLI/CLI.hpp>
#include <deque>
#include <map>
#include <random>

#include "cake/flags.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {
namespace {

struct LoadOptions {
  std::string host = "127.0.0.1", model, key, prompts, more, json;
  int port = 8080;
  bool chat = false, whole = false, health = false;
  int streams = 8, requests = 0, max_tokens = 128;
  int prompt_tokens = 64, vocabulary = 1000;
  double temperature = 0;
  int64_t seed = 1;
  int long_prompts = 0, long_tokens = 960, flood = 0, drip = 0;
  double flood_ms = 0;
  int pid = 0, cpu = -1;
  double seconds = 900;
};

// ---------------------------------------------------------------------------------------------
// One connection and its request

struct Client {
  enum Kind { stream, long_prompt, flood, health, drip, probe } kind = stream;
  int fd = -1;
  bool reused = false;  // the connection has carried a response before
  std::string request;
  size_t sent = 0;

  double start = 0, end = 0;    // before the connection is opened; after the last byte
  std::vector<double> arrived;  // the time of each chunk that has text
  int status = 0, tokens = 0;
  bool error_event = false, done_event = false;
  bool complete = false;  // the whole response is here

  void begin();
  void feed(std::string_view bytes, double time);  // bytes of the response
  void closed(double time);                        // by the server

 private:
  enum { head, chunk_size, body, chunk_end, last_end } state_ = head;
  bool chunked_ = false, events_ = false;
  int64_t left_ = -1;  // bytes of this chunk, or of the body; -1: until the server closes
  std::string line_;   // of the head, or a chunk's size
  std::string text_;   // a line of an event stream, or a whole body

  void header();
  void add_body(std::string_view bytes, double time);
  void inspect(std::string_view text, double time);
};

void Client::begin() {
  sent = 0, status = 0, tokens = 0, left_ = -1, state_ = head;
  error_event = done_event = complete = chunked_ = events_ = false;
  arrived.clear(), line_.clear(), text_.clear();
}

void Client::header() {
  for (char& c : line_) c = char(std::tolower(c));
  const auto is = [&](std::string_view name) { return line_.rfind(name, 0) == 0; };
  if (status == 0) {
    if (is("http/1.") && line_.size() > 9) status = std::atoi(line_.c_str() + 9);
  } else if (is("content-length:")) {
    left_ = std::atoll(line_.c_str() + 15);
  } else if (is("transfer-encoding: chunked")) {
    chunked_ = true;
  } else if (is("content-type: text/event-stream")) {
    events_ = true;
  }
}

// A line of an event stream, or a whole body: is there text, and how many tokens does "usage" tell?
void Client::inspect(std::string_view text, double time) {
  if (events_ && text.rfind("data: ", 0) != 0) return;
  if (events_ && text.rfind("data: [DONE]", 0) == 0) done_event = true;
  if (events_ && text.rfind("data: {\"error\"", 0) == 0) error_event = true;
  const auto behind = [&](std::string_view key) {
    const size_t i = text.find(key);
    return i == text.npos ? std::string_view() : text.substr(i + key.size());
  };
  for (std::string_view key : {"content\":\"", "text\":\""}) {
    const std::string_view rest = behind(key);
    if (rest.empty() || rest[0] == '"') continue;
    arrived.push_back(time);
    break;
  }
  const std::string count(behind("\"completion_tokens\":").substr(0, 12));
  if (!count.empty()) tokens = std::atoi(count.c_str());
}

void Client::add_body(std::string_view bytes, double time) {
  if (!events_) {
    text_.append(bytes);
    return;
  }
  for (size_t end; (end = bytes.find('\n')) != bytes.npos; bytes.remove_prefix(end + 1)) {
    text_.append(bytes.substr(0, end));
    inspect(text_, time);
    text_.clear();
  }
  text_.append(bytes);
}

void Client::feed(std::string_view bytes, double time) {
  const auto finish = [&] {
    complete = true;
    end = time;
    if (!events_) inspect(text_, time);
  };
  while (!bytes.empty() && !complete) {
    if (state_ == body) {
      const size_t n = left_ < 0 ? bytes.size() : std::min(bytes.size(), size_t(left_));
      add_body(bytes.substr(0, n), time);
      bytes.remove_prefix(n);
      if (left_ > 0) left_ -= int64_t(n);
      if (left_ == 0 && chunked_) state_ = chunk_end;
      if (left_ == 0 && !chunked_) finish();
      continue;
    }
    const size_t end = bytes.find('\n');
    line_.append(bytes.substr(0, end));
    if (end == bytes.npos) return;
    bytes.remove_prefix(end + 1);
    if (!line_.empty() && line_.back() == '\r') line_.pop_back();
    if (state_ == head) {
      if (!line_.empty()) {
        header();
      } else {
        state_ = chunked_ ? chunk_size : body;
        if (!chunked_ && left_ == 0) finish();
      }
    } else if (state_ == chunk_size) {
      left_ = std::strtoll(line_.c_str(), nullptr, 16);
      state_ = left_ > 0 ? body : last_end;
    } else if (state_ == chunk_end) {
      state_ = chunk_size;
    } else {
      finish();
    }
    line_.clear();
  }
}

void Client::closed(double time) {
  if (state_ == body && left_ < 0) {
    if (!events_) inspect(text_, time);
    complete = true;
  }
  end = time;
}

// ---------------------------------------------------------------------------------------------
// The load

struct Result {
  Client::Kind kind;
  double start, end;
  std::vector<double> arrived;
  int status, tokens;
  bool failed;  // reset, cut off, or ended by an error event
};

class Load {
 public:
  explicit Load(const LoadOptions&);
  ~Load();
  OrderedJson run();
  OrderedJson run_drip();

 private:
  LoadOptions o_;
  int epoll_;
  std::deque<Client> clients_;  // of streams and long prompts: they send many requests
  std::map<Client*, std::unique_ptr<Client>> single_;  // the others: one request each
  std::vector<std::string> prompts_;
  std::vector<Result> results_;
  int issued_ = 0, finished_ = 0, streaming_ = 0;  // requests of the streams; streams with text
  int long_left_ = 0, single_left_ = 0;
  std::vector<std::pair<double, double>> long_times_;
  OrderedJson process_ = OrderedJson::array();

  std::string request(int64_t number, int prompt_tokens, int max_tokens, bool stream) const;
  std::string http(const std::string& line, const std::string& body) const;
  void start(Client&, std::string request);
  void start_single(Client::Kind, std::string request);
  void connect(Client&);
  void write(Client&);
  void read(Client&, double time);
  void done(Client&, bool failed);
  void poll(double until);
  void look_at_process();
  double server_seconds() const;
  void report_streams(OrderedJson&) const;
};

Load::Load(const LoadOptions& o) : o_(o), epoll_(epoll_create1(EPOLL_CLOEXEC)) {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  if (o.cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(o.cpu, &set);
    require(sched_setaffinity(0, sizeof set, &set) == 0, "--cpu: found ", o.cpu,
            ", expected a core that this process may use");
  }
  if (!o.prompts.empty()) {
    std::ifstream file(o.prompts);
    for (std::string line; std::getline(file, line);)
      if (!line.empty()) prompts_.push_back(line);
    require(!prompts_.empty(), o.prompts, ": found no line, expected prompts");
  }
  require(!o.chat || !prompts_.empty(), "--prompts is missing: the questions of --chat");
  if (o_.requests == 0) o_.requests = 4 * o_.streams;
}

Load::~Load() {
  for (Client& c : clients_)
    if (c.fd >= 0) ::close(c.fd);
  for (auto& [client, owner] : single_)
    if (client->fd >= 0) ::close(client->fd);
  ::close(epoll_);
}

std::string Load::http(const std::string& line, const std::string& body) const {
  std::string text = concat(line, " HTTP/1.1\r\nHost: ", o_.host, ":", o_.port, "\r\n");
  if (!o_.key.empty()) text += "Authorization: Bearer " + o_.key + "\r\n";
  if (line[0] == 'P')
    text += concat("Content-Type: application/json\r\nContent-Length: ", body.size(), "\r\n");
  return text + "\r\n" + body;
}

// Request `number` has a prompt of its own: a line of --prompts, or random ids.
std::string Load::request(int64_t number, int prompt_tokens, int max_tokens, bool stream) const {
  OrderedJson body;
  if (!o_.model.empty()) body["model"] = o_.model;
  const bool text = !prompts_.empty() && prompt_tokens == o_.prompt_tokens;
  if (text) {
    const std::string& prompt = prompts_[size_t(number) % prompts_.size()];
    if (o_.chat)
      body["messages"] = {{{"role", "user"}, {"content", prompt}}};
    else
      body["prompt"] = prompt;
  } else {
    std::mt19937_64 random(uint64_t(o_.seed) << 32 ^ uint64_t(number));
    std::vector<int> ids;
    for (int i = 0; i < prompt_tokens; i++)
      ids.push_back(256 + int(random() % uint64_t(std::max(1, o_.vocabulary - 256))));
    body["prompt"] = ids;
  }
  body["max_tokens"] = max_tokens;
  body["temperature"] = o_.temperature;
  body["seed"] = o_.seed + number;
  body["stream"] = stream;
  if (stream) body["stream_options"] = {{"include_usage", true}};
  if (!o_.more.empty()) body.update(OrderedJson::parse(o_.more));
  return http(o_.chat && text ? "POST /v1/chat/completions" : "POST /v1/completions", body.dump());
}

void Load::start(Client& c, std::string request) {
  c.request = std::move(request);
  c.begin();
  c.start = now();
  if (c.fd < 0)
    connect(c);
  else
    write(c);
}

void Load::start_single(Client::Kind kind, std::string request) {
  auto owner = std::make_unique<Client>();
  Client& c = *owner;
  single_[&c] = std::move(owner);
  c.kind = kind;
  single_left_ += kind != Client::drip;
  start(c, std::move(request));
}

void Load::connect(Client& c) {
  c.fd = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  require(c.fd >= 0, "socket: ", std::strerror(errno));
  c.reused = false;
  const int one = 1;
  setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(uint16_t(o_.port));
  require(inet_pton(AF_INET, o_.host.c_str(), &address.sin_addr) == 1, "--host: found ", o_.host,
          ", expected an IPv4 address");
  epoll_event event{EPOLLIN | EPOLLOUT, {&c}};
  epoll_ctl(epoll_, EPOLL_CTL_ADD, c.fd, &event);
  if (::connect(c.fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 &&
      errno != EINPROGRESS)
    done(c, true);
}

void Load::write(Client& c) {
  const size_t end =
      c.kind == Client::drip ? std::min(c.sent + 1, c.request.size()) : c.request.size();
  if (c.sent < end) {
    const ssize_t n = ::send(c.fd, c.request.data() + c.sent, end - c.sent, MSG_NOSIGNAL);
    require(n >= 0 || errno != ECONNREFUSED, "--port: found no server at ", o_.host, ":", o_.port);
    if (n > 0) c.sent += size_t(n);
  }
  // A socket that is ready for more bytes than there are would wake the loop again and again.
  const bool more = c.kind != Client::drip && c.sent < c.request.size();
  epoll_event event{more ? uint32_t(EPOLLIN | EPOLLOUT) : uint32_t(EPOLLIN), {&c}};
  epoll_ctl(epoll_, EPOLL_CTL_MOD, c.fd, &event);
}

void Load::read(Client& c, double time) {
  static char buffer[1 << 16];
  const ssize_t n = ::recv(c.fd, buffer, sizeof buffer, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (c.complete) {  // nothing follows on this connection
    ::close(c.fd);
    c.fd = -1;
    return;
  }
  if (n > 0) {
    const bool was_silent = c.arrived.empty();
    c.feed({buffer, size_t(n)}, time);
    if (c.kind == Client::stream && was_silent && !c.arrived.empty()) streaming_++;
    if (c.complete) done(c, c.error_event);
    return;
  }
  if (c.reused && c.status == 0) {  // closed while it was idle: the request was never read
    ::close(c.fd);
    c.begin();
    connect(c);
    return;
  }
  c.closed(time);
  ::close(c.fd);
  c.fd = -1;
  done(c, !c.complete || c.error_event);
}

void Load::done(Client& c, bool failed) {
  if (failed && c.end == 0) c.end = now();
  if (c.kind != Client::drip)
    results_.push_back({c.kind, c.start, c.end, c.arrived, c.status, c.tokens, failed});
  const bool single = single_.count(&c) > 0;
  if (c.fd >= 0 && (failed || single)) {
    ::close(c.fd);
    c.fd = -1;
  }
  c.reused = true;
  if (c.kind == Client::stream) {
    finished_++;
    if (finished_ == 1000 || finished_ == o_.requests) look_at_process();
    if (issued_ < o_.requests || long_left_ > 0)
      start(c, request(issued_++, o_.prompt_tokens, o_.max_tokens, !o_.whole));
  } else if (c.kind == Client::long_prompt) {
    long_times_.push_back({c.start, c.end});
    if (--long_left_ > 0) start(c, request(1'000'000 + long_left_, o_.long_tokens, 2, !o_.whole));
  } else if (c.kind == Client::drip) {
    start(c, http("POST /v1/completions", "{}"));
  } else {
    single_left_--;
    single_.erase(&c);
  }
}

void Load::poll(double until) {
  static epoll_event events[256];
  const double wait = std::max(0., until - now());
  const int n = epoll_wait(epoll_, events, 256, int(std::ceil(wait * 1000)));
  const double time = now();
  for (int i = 0; i < n; i++) {
    Client& c = *static_cast<Client*>(events[i].data.ptr);
    if (events[i].events & EPOLLOUT) write(c);
    if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read(c, time);
  }
}

// Memory, descriptors and threads of the server.
void Load::look_at_process() {
  if (o_.pid == 0) return;
  OrderedJson row{{"requests", finished_}};
  std::ifstream file(concat("/proc/", o_.pid, "/status"));
  require(file.good(), "--pid: found ", o_.pid, ", expected a process");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("VmRSS:", 0) == 0) row["rss_mb"] = std::atof(line.c_str() + 6) / 1024;
    if (line.rfind("Threads:", 0) == 0) row["threads"] = std::atoi(line.c_str() + 8);
  }
  const std::filesystem::directory_iterator files(concat("/proc/", o_.pid, "/fd")), last;
  row["descriptors"] = std::distance(files, last);
  process_.push_back(row);
}

// That the server's threads have computed for.
double Load::server_seconds() const {
  if (o_.pid == 0) return 0;
  std::ifstream file(concat("/proc/", o_.pid, "/stat"));
  std::string word;
  double ticks[15] = {};
  std::getline(file, word, ')');  // the program's name may have spaces
  for (int field = 2; field < 15 && file >> word; field++) ticks[field] = std::atof(word.c_str());
  return (ticks[13] + ticks[14]) / double(sysconf(_SC_CLK_TCK));
}

// ---------------------------------------------------------------------------------------------
// Numbers

double quantile(const std::vector<double>& sorted, double q) {
  return sorted.empty() ? NAN : sorted[size_t(q * double(sorted.size() - 1) + .5)];
}

OrderedJson in_ms(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  if (seconds.empty()) return nullptr;
  return {{"median", 1000 * quantile(seconds, .5)},
          {"p99", 1000 * quantile(seconds, .99)},
          {"max", 1000 * seconds.back()},
          {"count", seconds.size()}};
}

void Load::report_streams(OrderedJson& out) const {
  std::vector<double> first, whole, gaps, gaps_long;
  std::vector<std::pair<double, double>> pieces;  // time, tokens
  double tokens = 0, begin = INFINITY, end = 0;
  // Steady: from when all streams have text to when the first request that nothing follows ends.
  std::vector<double> starts, ends;
  for (const Result& r : results_) {
    if (r.kind != Client::stream || r.failed || r.status != 200) continue;
    whole.push_back(r.end - r.start);
    if (r.arrived.empty()) continue;
    tokens += r.tokens;
    begin = std::min(begin, r.start);
    end = std::max(end, r.end);
    first.push_back(r.arrived[0] - r.start);
    starts.push_back(r.arrived[0]);
    ends.push_back(r.end);
    for (size_t i = 0; i < r.arrived.size(); i++) {
      pieces.push_back({r.arrived[i], double(r.tokens) / double(r.arrived.size())});
      if (i == 0) continue;
      bool beside = false;
      for (const auto& [from, to] : long_times_)
        beside |= r.arrived[i] > from && r.arrived[i - 1] < to;
      (beside ? gaps_long : gaps).push_back(r.arrived[i] - r.arrived[i - 1]);
    }
  }
  out["answer_ms"] = in_ms(whole);
  if (starts.empty()) return;
  std::sort(starts.begin(), starts.end());
  std::sort(ends.begin(), ends.end());
  const size_t streams = std::min(size_t(o_.streams), starts.size());
  const double steady_begin = starts[streams - 1], steady_end = ends[ends.size() - streams];
  double steady = 0;
  for (const auto& [time, n] : pieces) steady += time > steady_begin && time <= steady_end ? n : 0;
  out["tokens"] = tokens;
  out["seconds"] = end - begin;
  out["tokens_per_second"] = tokens / (end - begin);
  if (steady_end > steady_begin) {
    out["steady_tokens_per_second"] = steady / (steady_end - steady_begin);
    out["steady_seconds"] = steady_end - steady_begin;
  }
  out["chunks"] = pieces.size();
  out["first_token_ms"] = in_ms(first);
  out["gap_ms"] = in_ms(gaps);
  if (long_times_.empty()) return;
  std::vector<double> took;
  for (const auto& [from, to] : long_times_) took.push_back(to - from);
  out["long_prompts_ms"] = in_ms(took);
  out["gap_beside_long_prompts_ms"] = in_ms(gaps_long);
  std::sort(gaps.begin(), gaps.end());
  std::sort(gaps_long.begin(), gaps_long.end());
  if (gaps.empty() || gaps_long.empty()) return;
  out["largest_gap_by_median"] = gaps_long.back() / quantile(gaps_long, .5);
  out["largest_gap_by_median_alone"] = gaps_long.back() / quantile(gaps, .5);
}

OrderedJson Load::run() {
  const double begin = now();
  rusage before{};
  getrusage(RUSAGE_SELF, &before);
  const double server_before = server_seconds();
  clients_.resize(size_t(std::min(o_.streams, o_.requests)) + (o_.long_prompts > 0));
  long_left_ = o_.long_prompts;
  for (size_t i = 0; i < clients_.size() - (o_.long_prompts > 0); i++)
    start(clients_[i], request(issued_++, o_.prompt_tokens, o_.max_tokens, !o_.whole));
  bool started = o_.long_prompts == 0 && o_.flood == 0;
  double next_health = begin, flood_time = 0;
  std::vector<std::string> flood;  // requests of clients that are still to come
  while (finished_ < issued_ || long_left_ > 0 || single_left_ > 0 || !started || !flood.empty()) {
    require(now() - begin < o_.seconds, "found no end within ", o_.seconds, " seconds: ", finished_,
            " of ", issued_, " requests of streams are answered");
    if (!started && (streaming_ >= std::min(o_.streams, o_.requests))) {
      started = true;
      if (o_.long_prompts > 0) {
        clients_.back().kind = Client::long_prompt;
        start(clients_.back(), request(1'000'000, o_.long_tokens, 2, !o_.whole));
      }
      for (int i = 0; i < o_.flood; i++)
        flood.push_back(request(2'000'000 + i, o_.prompt_tokens, 8, false));
      flood_time = now();
    }
    for (; !flood.empty() && now() >= flood_time; flood_time += o_.flood_ms / 1000) {
      start_single(Client::flood, std::move(flood.back()));
      flood.pop_back();
    }
    if (o_.health && now() >= next_health) {
      start_single(Client::health, http("GET /health", ""));
      next_health = std::max(next_health + .02, now());
    }
    poll(std::min(o_.health ? next_health : now() + .1, flood.empty() ? INFINITY : flood_time));
  }
  const double wall = now() - begin;
  rusage after{};
  getrusage(RUSAGE_SELF, &after);

  OrderedJson out;
  std::map<std::string, int> statuses, flood_statuses;
  std::vector<double> refused, served, health;
  int failed = 0, flood_failed = 0, health_failed = 0;
  for (const Result& r : results_) {
    const double took = r.end - r.start;
    if (r.kind == Client::health) {
      health.push_back(took);
      health_failed += r.failed || r.status != 200;
    } else if (r.kind == Client::flood) {
      flood_statuses[std::to_string(r.status)]++;
      flood_failed += r.failed;
      if (!r.failed) (r.status == 200 ? served : refused).push_back(took);
    } else if (r.kind == Client::stream) {
      statuses[std::to_string(r.status)]++;
      failed += r.failed;
    }
  }
  out["requests"] = finished_;
  out["statuses"] = statuses;
  out["failed"] = failed;
  report_streams(out);
  if (o_.flood > 0)
    out["flood"] = {{"statuses", flood_statuses},
                    {"failed", flood_failed},
                    {"refused_ms", in_ms(refused)},
                    {"served_ms", in_ms(served)}};
  if (o_.health) {
    out["health_ms"] = in_ms(health);
    out["health_failed"] = health_failed;
  }
  if (!process_.empty()) out["process"] = process_;
  const auto seconds = [](const rusage& r) {
    return double(r.ru_utime.tv_sec + r.ru_stime.tv_sec) +
           1e-6 * double(r.ru_utime.tv_usec + r.ru_stime.tv_usec);
  };
  out["client_cores"] = (seconds(after) - seconds(before)) / wall;
  if (o_.pid != 0) out["server_cores"] = (server_seconds() - server_before) / wall;
  return out;
}

// Requests of one token, one after another, ten a second at most: 50 alone, then 150 while --drip
// connections send one byte a second each. What the server closes, connects again.
OrderedJson Load::run_drip() {
  const auto probe = [&](int count) {
    results_.clear();
    double next = now();
    for (int i = 0; i < count || single_left_ > 0;) {
      if (i < count && now() >= next && single_left_ == 0) {
        start_single(Client::probe, request(i++, 8, 1, false));
        next = now() + .1;
      }
      for (auto& [client, owner] : single_)
        if (client->kind == Client::drip && client->fd >= 0 &&
            now() - client->start >= double(client->sent))
          write(*client);
      poll(std::min(next, now() + .02));
    }
    std::vector<double> took;
    int failed = 0;
    for (const Result& r : results_) {
      took.push_back(r.end - r.start);
      failed += r.failed || r.status != 200;
    }
    OrderedJson out = in_ms(took);
    out["failed"] = failed;
    return out;
  };
  OrderedJson out{{"alone_ms", probe(50)}};
  for (int i = 0; i < o_.drip; i++) {  // a fifth of a second for each hundred
    start_single(Client::drip, http("POST /v1/completions", "{}"));
    for (const double next = now() + .002; now() < next;) poll(next);
  }
  out["beside_drip_ms"] = probe(150);
  for (const char* key : {"median", "p99", "max"})
    out["delay_ms"][key] =
        out["beside_drip_ms"][key].get<double>() - out["alone_ms"][key].get<double>();
  return out;
}

int serve_load(int argc, char** argv) {
  CLI::App app("Load on an OpenAI-compatible server, and what its clients see");
  app.option_defaults()->always_capture_default();
  LoadOptions o;
  app.add_option("--host", o.host, "IPv4 address");
  app.add_option("--port", o.port, "of the server");
  app.add_option("--model", o.model, "of the requests; empty: none is named");
  app.add_option("--key", o.key, "API key; empty: none");
  app.add_flag("--chat", o.chat, "/v1/chat/completions in place of /v1/completions");
  app.add_flag("--whole", o.whole, "answers that are not streamed");
  app.add_option("--streams", o.streams, "requests side by side");
  app.add_option("--requests", o.requests, "in all; 0: four for each stream");
  app.add_option("--max-tokens", o.max_tokens, "of an answer");
  app.add_option("--prompt-tokens", o.prompt_tokens, "of a prompt of random ids");
  app.add_option("--vocabulary", o.vocabulary, "random ids are from 256 up to this one");
  app.add_option("--prompts", o.prompts, "file with a prompt on each line, in place of random ids");
  app.add_option("--temperature", o.temperature, "of the requests");
  app.add_option("--seed", o.seed, "of the first request; the next one has the next number");
  app.add_option("--more", o.more, "JSON object: more keys of each request");
  app.add_option("--long-prompts", o.long_prompts, "that arrive one by one beside the streams");
  app.add_option("--long-tokens", o.long_tokens, "of each of these");
  app.add_option("--flood", o.flood, "clients that arrive at once beside the streams");
  app.add_option("--flood-ms", o.flood_ms, "between one of these clients and the next");
  app.add_flag("--health", o.health, "GET /health every 20 ms");
  app.add_option("--drip", o.drip, "connections that send a byte a second; no streams");
  app.add_option(
      "--pid", o.pid,
      "the server's process: cores that it used; memory at request 1,000 and at the end");
  app.add_option("--cpu", o.cpu, "core of this client; -1: any");
  app.add_option("--seconds", o.seconds, "the longest run; more is an error");
  app.add_option("--json", o.json, "file for the results; -: print nothing else");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    fail(e.what(), " (see --help)");
  }
  Load load(o);
  const OrderedJson out = o.drip > 0 ? load.run_drip() : load.run();
  if (!o.json.empty() && o.json != "-") std::ofstream(o.json) << out.dump(1) << "\n";
  if (o.json == "-") {
    std::printf("%s\n", out.dump().c_str());
    return 0;
  }
  for (const auto& [key, value] : out.items())
    std::printf("%-28s %s\n", key.c_str(), value.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::serve_load(argc, argv); });
}
