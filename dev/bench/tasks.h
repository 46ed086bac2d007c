// build/bench --tasks 8,32,64: how the engine's loops divide among so many threads. Each task runs
// alone, one after the other, and its processor time is added to the thread that would have it: the
// figures come from the engine's own loop bounds, on any machine. What they leave out is what
// threads share: memory bandwidth, caches, and the cost of waking them.
#pragma once
#include <time.h>

#include <map>
#include <queue>

namespace cake {

class TaskRecorder : public LoopObserver {
 public:
  explicit TaskRecorder(int threads) : threads_(threads) {
    clock_ = 1;  // seconds that reading the clock takes
    for (int i = 0; i < 1000; i++) {
      const double start = seconds();
      clock_ = std::min(clock_, seconds() - start);
    }
  }
  int threads() const override { return threads_; }

  void run(const char* where, int64_t tasks, bool in_turn,
           const std::function<void(int64_t)>& work) override {
    if (inside_) {  // a loop in a task is that task's
      for (int64_t t = 0; t < tasks; t++) work(t);
      return;
    }
    inside_ = true;
    const double begin = seconds();
    if (next_ == loops_.size()) loops_.push_back({where, in_turn, {}});
    Loop& loop = loops_[next_++];
    loop.times.resize(size_t(tasks), 1e30);
    for (int64_t t = 0; t < tasks; t++) {
      const double start = seconds();
      work(t);
      double& best = loop.times[size_t(t)];
      best = std::min(best, std::max(0., seconds() - start - clock_));
    }
    in_loops_ += seconds() - begin;
    inside_ = false;
  }

  // Runs `body` so many times, which must do the same each time; the shortest time of each task
  // counts. Returns the seconds that it would take with these threads.
  double record(const std::function<void()>& body, int times) {
    loops_.clear(), serial_ = 1e30;
    for (int i = 0; i < times; i++) {
      next_ = 0, in_loops_ = 0;
      current = this;
      const double begin = seconds();
      body();
      serial_ = std::min(serial_, std::max(0., seconds() - begin - in_loops_));
      current = nullptr;
    }
    return summary("", false);
  }
  // `one`: seconds on one thread.
  void print(const std::string& title, double one) { summary(title, true, one); }

 private:
  struct Loop {
    std::string where;
    bool in_turn;
    std::vector<double> times;  // seconds of each task
  };
  // Seconds of the thread that has most to do. Of loops in turn, the thread that has done least
  // takes the next task.
  double longest_chain(const Loop& loop) const {
    if (!loop.in_turn) return std::ranges::max(loop.times);
    std::priority_queue<double, std::vector<double>, std::greater<>> free_at;
    for (int i = 0; i < threads_; i++) free_at.push(0);
    double longest = 0;
    for (const double time : loop.times) {
      const double end = free_at.top() + time;
      free_at.pop(), free_at.push(end);
      longest = std::max(longest, end);
    }
    return longest;
  }

  double summary(const std::string& title, bool print, double one = 0) const {
    struct Region {
      int64_t calls = 0, fewest_tasks = INT64_MAX;
      double work = 0, chain = 0;
    };
    std::map<std::pair<std::string, bool>, Region> regions;
    double work = serial_, time = serial_;
    for (const Loop& loop : loops_) {
      if (loop.times.empty()) continue;
      const auto tasks = int64_t(loop.times.size());
      Region& r = regions[{loop.where, tasks < threads_}];
      const double sum = std::accumulate(loop.times.begin(), loop.times.end(), 0.);
      const double chain = longest_chain(loop);
      r.calls++, r.fewest_tasks = std::min(r.fewest_tasks, tasks);
      r.work += sum, r.chain += chain;
      work += sum, time += chain;
    }
    if (!print) return time;
    std::printf("%s, %d threads: at best x%.1f of one, which does %.3f of their work\n",
                title.c_str(), threads_, one / time, one / work);
    std::printf("  %-24s %6s %8s %9s %9s %9s\n", "loop in", "calls", "tasks", "of work", "of time",
                "serial");
    using Entry = std::pair<std::pair<std::string, bool>, Region>;
    std::vector<Entry> sorted(regions.begin(), regions.end());
    std::ranges::sort(
        sorted, [](const Entry& a, const Entry& b) { return a.second.chain > b.second.chain; });
    for (const auto& [where, r] : sorted) {
      // Amdahl: chain = work (serial + (1 - serial) / threads)
      const double serial = (r.chain / std::max(r.work, 1e-12) * threads_ - 1) / (threads_ - 1);
      std::printf("  %-24s %6lld %8lld %8.2f%% %8.2f%% %8.2f%%%s\n", where.first.c_str(),
                  (long long)r.calls, (long long)r.fewest_tasks, 100 * r.work / work,
                  100 * r.chain / time, 100 * std::max(0., serial),
                  where.second ? "  fewer tasks than threads" : "");
    }
    std::printf("  %-24s %6s %8s %8.2f%% %8.2f%%\n\n", "(outside of loops)", "", "",
                100 * serial_ / work, 100 * serial_ / time);
    std::fflush(stdout);
    return time;
  }

  static double seconds() {  // of this thread's processor time
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
  const int threads_;
  double clock_ = 0, in_loops_ = 0, serial_ = 0;
  bool inside_ = false;
  size_t next_ = 0;          // of loops_: the call that comes next
  std::vector<Loop> loops_;  // every call, in order
};

inline void print_tasks(const std::vector<int>& counts) {
  Config small;  // GPT-2 124M
  small.family = Family::gpt2, small.tied = true, small.norm_eps = 1e-5;
  small.V = 50257, small.T = 8192, small.L = 12, small.C = 768, small.NH = small.NKV = 12;
  small.HS = 64, small.F = 3072;
  Config large;  // Llama 3.2 1B
  large.family = Family::llama, large.tied = true;
  large.V = 128256, large.T = 8192, large.L = 16, large.C = 2048, large.NH = 32, large.NKV = 8;
  large.HS = 64, large.F = 8192;
  const auto model = [](Config c, int layers, Mode mode) {
    c.L = layers;
    auto gpt = make_gpt(c, {.device = Device::cpu, .mode = mode});
    for (size_t i = 0; i < gpt->table().tensors.size(); i++) {
      const Tensor& t = gpt->table().tensors[i];
      std::vector<float> values(size_t(t.size()));
      for (size_t j = 0; j < values.size(); j++)
        values[j] = t.init_one ? 1.f : .03f * (float(j * 2654435761u % 255) / 128 - 1);
      gpt->write(int(i), Slot::weight, values);
    }
    return gpt;
  };
  const auto tokens = [](int n) {
    std::vector<int> ids(static_cast<size_t>(n));
    for (int i = 0; i < n; i++) ids[size_t(i)] = i * 31 % 50000;
    return ids;
  };
  const auto report = [&](const std::string& title, int times, const std::function<void()>& body) {
    body();  // memory is there, and panels are made
    const double one = TaskRecorder(1).record(body, times);
    for (const int threads : counts) {
      TaskRecorder recorder(threads);
      recorder.record(body, times);
      recorder.print(title, one);
    }
  };
  for (const auto& [name, config] : {std::pair("124M", small), std::pair("1B", large)}) {
    {
      const auto gpt = model(config, 1, Mode::inference);
      const auto prompt = tokens(8192);
      report(concat(name, ", one layer, a prompt of 8,192 tokens"), 2, [&] {
        const auto cache = gpt->make_cache(8192);
        DecodeResult result;
        const DecodeRow row{cache->create(), prompt, {}, {}};
        gpt->decode(*cache, {&row, 1}, result);
      });
    }
    {
      const int layers = std::min(config.L, 4);
      const auto gpt = model(config, layers, Mode::inference);
      const auto cache = gpt->make_cache(64 * 256);
      const auto prompt = tokens(128);
      std::vector<DecodeRow> rows;
      DecodeResult result;
      for (int r = 0; r < 64; r++) {
        rows.push_back({cache->create(), prompt, {}, {}});
        gpt->decode(*cache, {&rows.back(), 1}, result);
      }
      for (DecodeRow& row : rows) row.tokens = std::span(prompt).first(1);
      report(concat(name, ", ", layers, " layers, a token for each of 64 rows"), 5, [&] {
        for (const DecodeRow& row : rows) cache->truncate(row.sequence, 128);
        gpt->decode(*cache, rows, result);
      });
    }
    if (name == std::string("1B")) break;
    const auto gpt = model(config, 1, Mode::train);
    const auto ids = tokens(4096);
    const std::vector<int> starts = {0, 4096};
    const std::vector<float> dlogp(4096, -1 / 4096.f);
    report(concat(name, ", one layer, training on a document of 4,096 tokens"), 2, [&] {
      gpt->forward_backward({ids, ids, starts}, dlogp);
      gpt->update({});
    });
  }
}

}  // namespace cake
