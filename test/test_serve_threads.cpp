// Everything at once: clients of every kind on one server, for a second in `make test`, and under
// ThreadSanitizer for $CAKE_SERVE_MINUTES in `make test-threads`. Each client checks its own
// answers; at the end nothing runs, waits or is open.
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "test/serve_scripts.h"

using namespace cake;

namespace {

// doctest's checks are not for several threads: the first failure of a thread is kept.
class Failures {
 public:
  void add(const std::string& what) {
    const std::lock_guard lock(mutex_);
    if (count_++ < 5) text_ += what + "\n";
  }
  std::string text() const {
    const std::lock_guard lock(mutex_);
    return count_ == 0 ? "" : concat(count_, " failures\n", text_);
  }

 private:
  mutable std::mutex mutex_;
  int64_t count_ = 0;
  std::string text_;
};

struct LoadCounts {
  std::atomic<int64_t> answered{0}, refused{0}, left{0}, errors{0}, others{0};
};

class LoadClient {
 public:
  LoadClient(int port, uint64_t seed, Failures& failures, LoadCounts& counts)
      : port_(port), rng_{seed}, failures_(failures), counts_(counts) {}

  void run(double seconds) {
    for (const double end = now() + seconds; now() < end;) {
      const uint64_t kind = rng_.below(12);
      try {
        if (kind < 4) {
          scripted_answer();
        } else if (kind < 6) {
          choices();
        } else if (kind < 8) {
          leave();
        } else if (kind == 8) {
          read_slowly();
        } else if (kind == 9) {
          bad_request();
        } else {
          look();
        }
      } catch (const std::exception& e) {
        failures_.add(concat("kind ", kind, ": ", e.what()));
      }
    }
  }

 private:
  void need(bool good, const std::string& what) {
    if (!good) failures_.add(what);
  }
  template <class List>
  const auto& any_of(const List& list) {
    return list[rng_.below(std::size(list))];
  }
  bool coin() { return rng_.below(2); }

  // 503 is a right answer here: the queue is short.
  bool refused(const Reply& reply) {
    if (reply.status != 503) return false;
    need(reply.has("Retry-After"), "503 without Retry-After");
    counts_.refused++;
    return true;
  }
  std::string text_of(const Way& way, const OrderedJson& choice) {
    const char* part = way.stream ? "delta" : "message";
    const OrderedJson& holder = way.chat ? choice.at(part) : choice;
    const auto found = holder.find(way.chat ? "content" : "text");
    return found == holder.end() || found->is_null() ? "" : found->get<std::string>();
  }
  // The texts of an answer by the choices' numbers; none when it was refused.
  std::vector<std::string> texts(Connection& connection, const Way& way) {
    std::vector<std::string> list;
    const auto add = [&](const OrderedJson& json) {
      for (const OrderedJson& choice : json.at("choices")) {
        const size_t i = choice.at("index").get<size_t>();
        if (list.size() <= i) list.resize(i + 1);
        list[i] += text_of(way, choice);
      }
    };
    if (way.stream) {
      const StreamedReply stream = read_stream(connection);
      if (refused(stream.reply)) return {};
      require(stream.reply.status == 200, "found status ", stream.reply.status, ": ",
              stream.reply.body);
      require(stream.done() && stream.reply.complete, "found a stream without its end");
      for (const OrderedJson& chunk : stream.chunks()) add(chunk);
    } else {
      const Reply reply = connection.read_reply();
      if (refused(reply)) return {};
      require(reply.status == 200, "found status ", reply.status, ": ", reply.body);
      add(reply.json());
    }
    counts_.answered++;
    return list;
  }

  void scripted_answer() {
    const Way way = any_of(kWays);
    const std::string name =
        any_of(std::vector<std::string>{"merged", "bytes", "divided0", "held"});
    const std::string text = name == "held" ? "The answer is 4" : kSentence;
    OrderedJson body = scripted_request(way, name);
    body["model"] = "script", body["stream"] = way.stream;
    std::string expected = text;
    if (coin()) {
      const std::string stop = text.substr(rng_.below(10), 1 + rng_.below(8));
      body["stop"] = {stop, "never said"};
      expected = text.substr(0, text.find(stop));
    }
    if (coin()) {
      body["logprobs"] = way.chat ? OrderedJson(true) : OrderedJson(3);
      if (way.chat) body["top_logprobs"] = 3;
    }
    if (way.stream && coin()) body["stream_options"] = {{"include_usage", true}};
    Connection connection(port_, 60);
    const std::string request = http_post(path_of(way), body);
    if (rng_.below(4) == 0) {
      connection.write_slowly(request, 1 + rng_.below(300), .0005);
    } else {
      connection.write(request);
    }
    const auto list = texts(connection, way);
    if (!list.empty()) need(list == std::vector{expected}, "another text: " + list[0]);
    if (rng_.below(4) == 0) {  // once more on the same connection
      connection.write(http_get("/health"));
      need(connection.read_reply().status == 200, "/health behind an answer");
    }
  }

  // Sampled texts: a seed's texts are the same each time, in whichever company.
  void choices() {
    const Way way = any_of(kWays);
    const uint64_t seed = rng_.below(8);
    OrderedJson body = {{"model", "random"},      {"seed", seed},         {"max_tokens", 12},
                        {"n", 1 + rng_.below(4)}, {"stream", way.stream}, {"temperature", 1}};
    if (way.chat) {
      body["messages"] = {{{"role", "user"}, {"content", "Say something."}}};
      if (seed == 0) body["tools"] = {{{"type", "function"}, {"function", {{"name", "weather"}}}}};
    } else {
      body["prompt"] = "Say something.";
      if (seed == 0) body["logprobs"] = 2, body["echo"] = true;
    }
    Connection connection(port_, 60);
    connection.write(http_post(path_of(way), body));
    const auto list = texts(connection, way);
    static std::mutex mutex;
    static std::map<std::pair<bool, uint64_t>, std::vector<std::string>> known;
    const std::lock_guard lock(mutex);
    auto& before = known[{way.chat, seed}];
    for (size_t i = 0; i < list.size(); i++) {
      if (before.size() <= i) before.push_back(list[i]);
      need(before[i] == list[i], "the same seed, another text: " + before[i] + " | " + list[i]);
    }
  }

  // A client that vanishes: before, while and after it is answered.
  void leave() {
    const Way way = any_of(kWays);
    OrderedJson body = {{"model", "endless"},
                        {"max_tokens", 500},
                        {"stream", way.stream},
                        {"temperature", 0},
                        {"n", 1 + rng_.below(3)}};
    if (way.chat) {
      body["messages"] = {{{"role", "user"}, {"content", std::string(rng_.below(900), '~')}}};
    } else {
      body["prompt"] = models().prompt(1 + int(rng_.below(900)));
    }
    const std::string request = http_post(path_of(way), body);
    Connection connection(port_);
    const bool whole = coin();
    connection.write(
        std::string_view(request).substr(0, whole ? request.size() : rng_.below(request.size())));
    for (uint64_t n = rng_.below(4); n > 0; n--) connection.receive(double(rng_.below(30)) / 1000);
    if (coin()) {
      connection.reset();
    } else {
      connection.close();
    }
    counts_.left++;
  }

  void read_slowly() {
    OrderedJson body = scripted_request({true, true}, "bytes");
    body["model"] = "script", body["stream"] = true;
    Connection connection(port_, 30, 2048);
    connection.write(http_post("/v1/chat/completions", body));
    std::string text;
    char buffer[10];
    for (int i = 0; i < 30; i++) {
      const ssize_t n = ::recv(connection.fd(), buffer, sizeof buffer, MSG_DONTWAIT);
      if (n > 0) text.append(buffer, size_t(n));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (text.size() >= 12) {
      const std::string status = text.substr(9, 3);
      need(status == "200" || status == "503", "found status " + status);
    }
    counts_.left++;
  }

  void bad_request() {
    const std::string body = any_of(std::vector<std::string>{
        "{", "[]", R"({"messages":5})", R"({"messages":[]})", R"({"prompt":{}})",
        R"({"prompt":"x","max_tokens":"x"})", std::string(1000, '['), "\xff\xfe",
        R"({"prompt":"x","n":1000})", R"({"prompt":"x","model":"nobody"})",
        R"({"prompt":"x","max_tokens":100000})"});
    const Reply reply = ask(
        port_, http_post(any_of(kWays).chat ? "/v1/chat/completions" : "/v1/completions", body));
    if (refused(reply)) return;  // what a full queue refuses is not read
    need(reply.status == 400 || reply.status == 404, concat(body, ": found ", reply.status));
    need(reply.json().at("error").at("message").is_string(), "no error in " + reply.body);
    counts_.errors++;
  }

  void look() {
    Connection connection(port_);
    for (uint64_t n = 1 + rng_.below(4); n > 0; n--) {
      const std::string path = any_of(std::vector<std::string>{
          "/health", "/v1/models", "/metrics", "/props", "/nothing", "/v1/models/script"});
      const Reply reply = connection.ask(http_get(path));
      need(reply.status == (path == "/nothing" ? 404 : 200), concat(path, ": ", reply.status));
      need(reply.complete, path + ": cut");
    }
    const Reply reply = connection.ask(http_post("/tokenize", R"({"content":"The answer"})"));
    need(reply.status == 200, concat("/tokenize: ", reply.status));
    counts_.others++;
  }

  int port_;
  Rng rng_;
  Failures& failures_;
  LoadCounts& counts_;
};

size_t entries_of_process(const std::string& folder) {
  size_t n = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator("/proc/self/" + folder)) {
    n++;
  }
  return n;
}

}  // namespace

TEST_CASE(
    "serve: under a mixed load each client is answered rightly, and at the end nothing is left") {
  const char* minutes = std::getenv("CAKE_SERVE_MINUTES");
  const double seconds = minutes ? 60 * std::atof(minutes) : 1.5;
  REQUIRE(seconds > 0);
  { const RunningServer first(models().script); }  // libraries start threads of their own once
  const size_t threads = entries_of_process("task");
  {
    ServeOptions options = serve_options("script=" + models().script);
    options.models.push_back("endless=" + models().endless);
    options.models.push_back("random=" + models().random);
    options.engine.rows = 4, options.engine.queue = 8;
    options.cache_mb = 16;
    RunningServer server(options);
    const size_t descriptors = entries_of_process("fd");
    Failures failures;
    LoadCounts counts;
    std::vector<std::thread> clients;
    for (uint64_t i = 0; i < 8; i++) {
      clients.emplace_back([&, i] {
        LoadClient(server.port(), mix64(i, uint64_t(now())), failures, counts).run(seconds);
      });
    }
    for (std::thread& client : clients) client.join();
    const std::string text = failures.text();
    CHECK_MESSAGE(text.empty(), text);
    CHECK(counts.answered > 0);
    CHECK(counts.left > 0);
    CHECK(counts.errors > 0);
    CHECK(counts.others > 0);
    if (minutes) {
      MESSAGE("answered " << counts.answered.load() << ", refused " << counts.refused.load()
                          << ", left " << counts.left.load() << ", errors " << counts.errors.load()
                          << ", others " << counts.others.load());
    }
    CHECK(wait_until(
        [&] {
          return server.metric("cake_requests_running") == 0 &&
                 server.metric("cake_requests_queued") == 0;
        },
        60));
    CHECK(wait_until([&] { return entries_of_process("fd") <= descriptors; }, 60));
    CHECK(server.stop() == 0);
  }
  CHECK(wait_until([&] { return entries_of_process("task") <= threads; }, 60));
}
