// Over-optimisation: a reward model is a proxy, and a policy that is trained against it finds its
// errors.
//
//     preferences --sizes--> proxies --best of n, PPO--> answers -> (sqrt KL, proxy, gold) -> fits
//
// The gold reward is the true one: a program (cake/rubric.h), of which the preferences are noisy
// comparisons. As a policy moves away from the first policy, whose answers the proxy was trained
// on, its proxy reward goes on rising. Its gold reward rises at first, then it falls; it falls the
// sooner, the fewer comparisons the proxy was trained on (Gao, Schulman, Hilton 2022, Scaling Laws
// for Reward Model Overoptimization).
//
// dev/overoptimize.sh trains and samples. This program reads what it left in DIR, and writes a
// table of each curve, its fit, a picture and a summary:
//
//     DIR/best-of-n/metrics.jsonl        a line for each prompt: the first policy's n answers, with
//                                        the reward of every proxy (by size) and the gold reward
//     DIR/proxy-SIZE/ppo/metrics.jsonl   held-out evaluations of PPO against this proxy, in the
//                                        lines that have "at_sqrt_kl"
//     DIR/proxy-SIZE/answers/metrics.jsonl   the last policy's answers, one to each prompt
//
// All rewards are in standard deviations of the first policy's answers, from their mean.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "cake/flags.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {
namespace {

namespace fs = std::filesystem;

enum class Pressure { best_of_n, ppo };

// A mean and half of its 95 % interval.
struct Estimate {
  double mean = 0, ci95 = 0;
};

// One measurement: the policy at this distance from the first policy. n: of best of n, else 0.
struct Measurement {
  double d = 0;  // sqrt(KL), KL in nats per answer
  Estimate proxy, gold;
  int n = 0;
};

// A curve R(d) of the gold reward, and how far the measurements lie from it.
struct Fit {
  double alpha = 0, beta = 0;
  double residual = 0;  // root mean square
  double optimum = 0;   // the d of the highest R; infinity if R does not fall
};

// One proxy under one kind of pressure.
struct OverCurve {
  Pressure pressure = Pressure::ppo;
  int64_t size = 0;                 // prompts that the proxy was trained on
  std::vector<Measurement> points;  // d rises; the first at d = 0
  Fit fit;
};

// The mean and spread of the first policy's rewards.
struct Scale {
  double mean = 0, std = 1;
  double operator()(double reward) const { return (reward - mean) / std; }
};

// The first policy's answers to one prompt. Row i of `rewards` is proxy i's; the last is gold.
struct PromptAnswers {
  std::vector<std::vector<double>> rewards;  // (proxies + 1, n)
};

std::vector<int64_t> proxy_sizes(const fs::path& dir);
std::vector<PromptAnswers> read_best_of_n(const fs::path& dir, size_t proxies);
Scale scale_of(std::span<const PromptAnswers> prompts, size_t row);
OverCurve measure_best_of_n(std::span<const PromptAnswers> prompts, size_t proxy, Scale proxy_scale,
                            Scale gold_scale, std::span<const double> distances);
OverCurve read_ppo(const fs::path& path, Scale proxy_scale, Scale gold_scale);
Fit fit_gold(Pressure pressure, std::span<const Measurement> points);
std::string curve_text(const OverCurve& curve);
OrderedJson curve_json(const OverCurve& curve);
std::string curves_svg(std::span<const OverCurve> curves);
OrderedJson hacked_answers(const fs::path& path, int64_t size, Scale proxy_scale, Scale gold_scale);

// The whole experiment, from the runs in DIR to what is printed and written.
void overoptimize(const fs::path& dir, std::span<const double> distances) {
  const std::vector<int64_t> sizes = proxy_sizes(dir);
  const std::vector<PromptAnswers> prompts = read_best_of_n(dir, sizes.size());
  const Scale gold_scale = scale_of(prompts, sizes.size());
  std::vector<OverCurve> best_of_n, ppo;
  OrderedJson answers = OrderedJson::array();
  for (size_t i = 0; i < sizes.size(); i++) {
    const fs::path proxy = dir / concat("proxy-", sizes[i]);
    const Scale proxy_scale = scale_of(prompts, i);
    best_of_n.push_back(measure_best_of_n(prompts, i, proxy_scale, gold_scale, distances));
    ppo.push_back(read_ppo(proxy / "ppo/metrics.jsonl", proxy_scale, gold_scale));
    best_of_n.back().size = ppo.back().size = sizes[i];
    for (const OrderedJson& answer :
         hacked_answers(proxy / "answers/metrics.jsonl", sizes[i], proxy_scale, gold_scale)) {
      answers.push_back(answer);
    }
  }
  std::vector<OverCurve> curves = best_of_n;
  curves.insert(curves.end(), ppo.begin(), ppo.end());
  OrderedJson json = OrderedJson::array();
  for (OverCurve& curve : curves) {
    curve.fit = fit_gold(curve.pressure, curve.points);
    std::printf("%s", curve_text(curve).c_str());
    json.push_back(curve_json(curve));
  }
  write_file(dir / "overoptimization.svg", curves_svg(curves));
  write_json(dir / "summary.json",
             {{"stage", "overoptimize"}, {"curves", json}, {"answers", answers}});
  std::printf("\npicture in %s\n", (dir / "overoptimization.svg").c_str());
}

// =============================================================================================
// What the runs left

// The numbers of the folders DIR/proxy-SIZE, smallest first: the order of the rewards in
// DIR/best-of-n.
std::vector<int64_t> proxy_sizes(const fs::path& dir) {
  if (!fs::is_directory(dir)) fail(dir.string(), ": found no directory, expected one of runs");
  std::vector<int64_t> sizes;
  for (const auto& entry : fs::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string(), prefix = "proxy-";
    if (!name.starts_with(prefix)) continue;
    const std::string digits = name.substr(prefix.size());
    if (digits.empty() || digits.size() > 15 ||
        digits.find_first_not_of("0123456789") != std::string::npos) {
      fail(entry.path().string(), ": found this folder, expected proxy- and a number of prompts");
    }
    sizes.push_back(std::stoll(digits));
  }
  if (sizes.empty()) fail(dir.string(), ": found no folder proxy-SIZE: run dev/overoptimize.sh");
  std::sort(sizes.begin(), sizes.end());
  return sizes;
}

template <class Read>
void for_each_line(const fs::path& path, Read read) {
  std::istringstream lines(read_file(path));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = concat(path.string(), ":", ++number);
    const Json json = parse_json(line, where);
    if (!json.is_object()) fail(where, ": found ", json_text(json), ", expected an object");
    read(json, where);
  }
}

std::vector<double> numbers(const Json& array, const std::string& key, const std::string& where) {
  if (!array.is_array()) fail(where, ": ", key, ": found ", json_text(array), ", expected numbers");
  std::vector<double> values;
  for (const Json& value : array) values.push_back(json_as<double>(value, key, where));
  return values;
}

std::vector<PromptAnswers> read_best_of_n(const fs::path& dir, size_t proxies) {
  const fs::path path = dir / "best-of-n/metrics.jsonl";
  std::vector<PromptAnswers> prompts;
  for_each_line(path, [&](const Json& line, const std::string& where) {
    PromptAnswers p;
    for (const Json& row : line.value("rewards", Json::array())) {
      p.rewards.push_back(numbers(row, "rewards", where));
    }
    if (p.rewards.size() != proxies) {
      fail(where, ": rewards: found those of ", p.rewards.size(), " proxies, expected ", proxies);
    }
    p.rewards.push_back(numbers(line.value("gold", Json()), "gold", where));
    const size_t n = prompts.empty() ? p.rewards[0].size() : prompts[0].rewards[0].size();
    for (const std::vector<double>& row : p.rewards) {
      if (row.empty() || row.size() != n) {
        fail(where, ": found ", row.size(), " rewards, expected ", n, " answers to each prompt");
      }
    }
    prompts.push_back(std::move(p));
  });
  if (prompts.size() < 2) {  // an interval over prompts needs two
    fail(path.string(), ": found ", prompts.size(), " prompts, expected at least 2");
  }
  return prompts;
}

Scale scale_of(std::span<const PromptAnswers> prompts, size_t row) {
  double count = 0, mean = 0, variance = 0;
  for (const PromptAnswers& p : prompts) count += double(p.rewards[row].size());
  for (const PromptAnswers& p : prompts)
    for (const double r : p.rewards[row]) mean += r / count;
  for (const PromptAnswers& p : prompts)
    for (const double r : p.rewards[row]) variance += (r - mean) * (r - mean) / count;
  if (!(variance > 0)) {
    fail("best-of-n/metrics.jsonl: found the same reward (number ", row + 1,
         ", gold is the last) for all answers, expected rewards that differ");
  }
  return {mean, std::sqrt(variance)};
}

// PPO's evaluations at fixed distances. The first policy is at d = 0, where both rewards are 0.
OverCurve read_ppo(const fs::path& path, Scale proxy_scale, Scale gold_scale) {
  OverCurve curve{.pressure = Pressure::ppo, .points = {Measurement{}}};
  int64_t last_step = -1;
  for_each_line(path, [&](const Json& line, const std::string& where) {
    if (!line.contains("at_sqrt_kl")) return;
    const auto value = [&](const char* key) { return json_get<double>(line, key, where); };
    const auto step = json_get<int64_t>(line, "step", where);
    if (step == last_step) return;  // a step that passed two distances was evaluated once
    last_step = step;
    curve.points.push_back(
        {.d = std::sqrt(std::max(0., value("val_kl"))),
         .proxy = {proxy_scale(value("val_reward")), value("val_reward_ci95") / proxy_scale.std},
         .gold = {gold_scale(value("val_gold")), value("val_gold_ci95") / gold_scale.std}});
  });
  std::stable_sort(curve.points.begin(), curve.points.end(),
                   [](const Measurement& a, const Measurement& b) { return a.d < b.d; });
  return curve;
}

// The last policy's answers that the proxy overrates most: what reward hacking looks like.
OrderedJson hacked_answers(const fs::path& path, int64_t size, Scale proxy_scale,
                           Scale gold_scale) {
  struct Answer {
    double proxy = 0, gold = 0;
    std::string text;
  };
  std::vector<Answer> found;
  for_each_line(path, [&](const Json& line, const std::string& where) {
    const std::vector<double> proxy = numbers(line.value("reward", Json()), "reward", where);
    const std::vector<double> gold = numbers(line.value("gold", Json()), "gold", where);
    if (proxy.size() != 1 || gold.size() != 1) fail(where, ": expected one answer to a prompt");
    found.push_back(
        {proxy_scale(proxy[0]), gold_scale(gold[0]), json_get<std::string>(line, "text", where)});
  });
  std::stable_sort(found.begin(), found.end(), [](const Answer& a, const Answer& b) {
    return a.proxy - a.gold > b.proxy - b.gold;
  });
  if (found.size() > 3) found.resize(3);
  OrderedJson json = OrderedJson::array();
  for (const Answer& a : found) {
    json.push_back({{"size", size}, {"proxy", a.proxy}, {"gold", a.gold}, {"text", a.text}});
    std::printf("proxy of %lld prompts: proxy %+.2f, gold %+.2f\n  %s\n", (long long)size, a.proxy,
                a.gold, a.text.substr(0, 400).c_str());
  }
  return json;
}

// =============================================================================================
// Best of n

// KL of the best of n answers from one answer, in nats per answer: an upper bound, exact if no two
// answers have the same reward (Stiennon et al. 2020; Beirami et al. 2024).
double best_of_n_kl(double n) { return std::log(n) - (n - 1) / n; }

// The mean gold and proxy rewards of the best of k answers by the proxy, over all draws of k from
// these N answers without replacement. In the order of the proxy, r_1 <= .. <= r_N, answer i is the
// best of k in C(i - 1, k - 1) of the C(N, k) draws.
struct BestOf {
  double proxy = 0, gold = 0;
};
BestOf best_of(int k, std::span<const double> proxy, std::span<const double> gold) {
  const int N = int(proxy.size());
  std::vector<size_t> order(proxy.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return proxy[a] < proxy[b]; });
  BestOf best;
  double p = double(k) / N;  // the probability that answer i is the best, from i = N downwards
  for (int i = N; i >= k; i--) {
    const size_t answer = order[size_t(i) - 1];
    best.proxy += p * proxy[answer], best.gold += p * gold[answer];
    p *= i > 1 ? double(i - k) / (i - 1) : 0;
  }
  return best;
}

// The n that are measured, out of N answers: powers of two, and of each distance the n whose
// sqrt(KL) is nearest to it. A distance beyond the best of N has none.
std::set<int> measured_n(int N, std::span<const double> distances) {
  std::set<int> all;
  for (int n = 1; n <= N; n *= 2) all.insert(n);
  for (const double d : distances) {
    int n = 1;
    while (n <= N && std::sqrt(best_of_n_kl(n)) < d) n++;  // the first at d or beyond
    if (n > N) continue;
    const auto off = [&](int m) { return std::abs(std::sqrt(best_of_n_kl(m)) - d); };
    all.insert(n > 1 && off(n - 1) < off(n) ? n - 1 : n);
  }
  return all;
}

// Mean, and the interval by the standard error over values that are independent.
Estimate estimate(std::span<const double> values) {
  const double count = double(values.size());
  double mean = 0, squares = 0;
  for (const double x : values) mean += x / count;
  for (const double x : values) squares += (x - mean) * (x - mean);
  return {mean, 1.96 * std::sqrt(squares / (count - 1) / count)};
}

// What the best of n gains over the mean answer, prompt by prompt. The differences between prompts
// cancel, so that the intervals are narrower than those of PPO's evaluations.
OverCurve measure_best_of_n(std::span<const PromptAnswers> prompts, size_t proxy, Scale proxy_scale,
                            Scale gold_scale, std::span<const double> distances) {
  OverCurve curve{.pressure = Pressure::best_of_n};
  for (const int n : measured_n(int(prompts[0].rewards[0].size()), distances)) {
    std::vector<double> proxy_gains, gold_gains;
    for (const PromptAnswers& p : prompts) {
      const BestOf best = best_of(n, p.rewards[proxy], p.rewards.back());
      const BestOf mean = best_of(1, p.rewards[proxy], p.rewards.back());
      proxy_gains.push_back((best.proxy - mean.proxy) / proxy_scale.std);
      gold_gains.push_back((best.gold - mean.gold) / gold_scale.std);
    }
    curve.points.push_back({.d = std::sqrt(best_of_n_kl(n)),
                            .proxy = estimate(proxy_gains),
                            .gold = estimate(gold_gains),
                            .n = n});
  }
  return curve;
}

// =============================================================================================
// Fits

// Gold reward over d = sqrt(KL), 0 at d = 0 (Gao et al. 2022):
//   best of n  R = d (alpha - beta d),      highest at alpha / (2 beta)
//   RL         R = d (alpha - beta log d),  highest at exp(alpha / beta - 1)
double fitted_gold(Pressure pressure, double alpha, double beta, double d) {
  if (d == 0) return 0;
  return d * (alpha - beta * (pressure == Pressure::best_of_n ? d : std::log(d)));
}

// Least squares in alpha and beta, in which R is linear. It needs two different d above 0; with
// fewer, all is NaN.
Fit fit_gold(Pressure pressure, std::span<const Measurement> points) {
  double aa = 0, ab = 0, bb = 0, ar = 0, br = 0;  // sums of products; R = alpha a + beta b
  for (const Measurement& m : points) {
    const double a = m.d, b = fitted_gold(pressure, 0, 1, m.d);
    aa += a * a, ab += a * b, bb += b * b, ar += a * m.gold.mean, br += b * m.gold.mean;
  }
  const double determinant = aa * bb - ab * ab;
  if (!(determinant > 1e-12 * aa * bb)) return {NAN, NAN, NAN, NAN};
  Fit fit{(bb * ar - ab * br) / determinant, (aa * br - ab * ar) / determinant};
  const double ratio = fit.alpha / fit.beta;
  fit.optimum = !(fit.beta > 0)                   ? INFINITY
                : pressure == Pressure::best_of_n ? std::max(0., ratio / 2)
                                                  : std::exp(ratio - 1);
  double squares = 0, count = 0;
  for (const Measurement& m : points) {
    if (m.d == 0) continue;  // all curves pass through it
    squares += std::pow(fitted_gold(pressure, fit.alpha, fit.beta, m.d) - m.gold.mean, 2);
    count++;
  }
  fit.residual = std::sqrt(squares / count);
  return fit;
}

// The highest point of the fit, if it lies within what was measured above d = 0. Outside of that
// range a fit is a guess.
std::optional<double> measured_optimum(const OverCurve& curve) {
  double least = INFINITY, most = 0;
  for (const Measurement& m : curve.points) {
    if (m.d > 0) least = std::min(least, m.d), most = std::max(most, m.d);
  }
  const double d = curve.fit.optimum;
  return d >= least && d <= most ? std::optional(d) : std::nullopt;
}

const Measurement& best_measured(const OverCurve& curve) {
  return *std::max_element(
      curve.points.begin(), curve.points.end(),
      [](const Measurement& a, const Measurement& b) { return a.gold.mean < b.gold.mean; });
}

// =============================================================================================
// The table, the summary and the picture

std::string curve_text(const OverCurve& c) {
  const bool ppo = c.pressure == Pressure::ppo;
  std::string text = format("\n%s against a proxy of %lld prompts\n", ppo ? "PPO" : "best of n",
                            (long long)c.size);
  text += ppo ? "" : "     n";
  text += "  sqrt KL             proxy              gold\n";
  for (const Measurement& m : c.points) {
    if (!ppo) text += format("  %4d", m.n);
    text += format("  %7.3f  %+7.3f +- %5.3f  %+7.3f +- %5.3f\n", m.d, m.proxy.mean, m.proxy.ci95,
                   m.gold.mean, m.gold.ci95);
  }
  if (!std::isfinite(c.fit.alpha)) return text + "  no fit: it needs two distances above 0\n";
  text += format("  fit: gold = d (%.3f - %.3f %s), root mean square residual %.3f\n", c.fit.alpha,
                 c.fit.beta, ppo ? "log d" : "d", c.fit.residual);
  if (const std::optional<double> d = measured_optimum(c)) {
    return text + format("  highest point of the fit: gold %+.3f at sqrt KL %.2f\n",
                         fitted_gold(c.pressure, c.fit.alpha, c.fit.beta, *d), *d);
  }
  const Measurement& best = best_measured(c);
  return text + format(
                    "  best measured point: gold %+.3f +- %.3f at sqrt KL %.2f (the fit has no "
                    "highest point in the measured range)\n",
                    best.gold.mean, best.gold.ci95, best.d);
}

OrderedJson curve_json(const OverCurve& c) {
  OrderedJson points = OrderedJson::array();
  for (const Measurement& m : c.points) {
    OrderedJson json = {{"sqrt_kl", m.d},
                        {"proxy", m.proxy.mean},
                        {"proxy_ci95", m.proxy.ci95},
                        {"gold", m.gold.mean},
                        {"gold_ci95", m.gold.ci95}};
    if (c.pressure == Pressure::best_of_n) json["n"] = m.n;
    points.push_back(json);
  }
  const Measurement& best = best_measured(c);
  OrderedJson optimum, highest;  // null outside of what was measured
  if (const std::optional<double> d = measured_optimum(c)) {
    optimum = *d, highest = fitted_gold(c.pressure, c.fit.alpha, c.fit.beta, *d);
  }
  return {{"size", c.size},
          {"pressure", c.pressure == Pressure::ppo ? "ppo" : "best-of-n"},
          {"alpha", c.fit.alpha},
          {"beta", c.fit.beta},
          {"residual", c.fit.residual},
          {"optimum", optimum},
          {"highest_gold", highest},
          {"best_measured",
           {{"sqrt_kl", best.d}, {"gold", best.gold.mean}, {"gold_ci95", best.gold.ci95}}},
          {"points", points}};
}

// A panel of the picture: where values lie on the page.
constexpr double kWidth = 420, kHeight = 320, kLeft = 48, kTop = 40, kMargin = 8;

struct Panel {
  Pressure pressure;
  double left = 0;                    // on the page
  double right = .1;                  // the largest d
  double lowest = -.1, highest = .1;  // rewards
  double x(double d) const { return left + d / right * (kWidth - kMargin); }
  double y(double r) const { return kTop + (highest - r) / (highest - lowest) * kHeight; }
};

Panel panel_of(Pressure pressure, std::span<const OverCurve> curves) {
  Panel panel{.pressure = pressure,
              .left = kLeft + (pressure == Pressure::ppo ? kWidth + kLeft : 0)};
  for (const OverCurve& c : curves) {
    if (c.pressure != pressure) continue;
    for (const Measurement& m : c.points) {
      panel.right = std::max(panel.right, m.d);
      for (const Estimate& e : {m.proxy, m.gold}) {
        panel.lowest = std::min(panel.lowest, e.mean - e.ci95);
        panel.highest = std::max(panel.highest, e.mean + e.ci95);
      }
    }
  }
  return panel;
}

std::string axes_svg(const Panel& p) {
  std::string svg = format("<text x=\"%g\" y=\"20\" font-size=\"14\">%s</text>\n", p.left,
                           p.pressure == Pressure::ppo ? "PPO" : "best of n") +
                    format("<text x=\"%g\" y=\"%g\">sqrt(KL), up to %.2f</text>\n",
                           p.left + kWidth / 2 - 40, kTop + kHeight + 32, p.right);
  for (const double r : {p.lowest, 0., p.highest}) {
    svg += format(
        "<line x1=\"%g\" x2=\"%g\" y1=\"%g\" y2=\"%g\" stroke=\"#ccc\"/>\n"
        "<text x=\"%g\" y=\"%g\" text-anchor=\"end\">%.1f</text>\n",
        p.left, p.left + kWidth - kMargin, p.y(r), p.y(r), p.left - 4, p.y(r) + 4, r);
  }
  return svg;
}

// A curve: the proxy dashed, gold solid with a dot for each point, intervals as upright bars, the
// fit as a thin line.
std::string curve_svg(const Panel& p, const OverCurve& c, const char* colour) {
  std::string svg, proxy, gold, fit;
  for (const Measurement& m : c.points) {
    proxy += format("%.1f,%.1f ", p.x(m.d), p.y(m.proxy.mean));
    gold += format("%.1f,%.1f ", p.x(m.d), p.y(m.gold.mean));
    svg += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", p.x(m.d),
                  p.y(m.gold.mean), colour);
    for (const Estimate& e : {m.proxy, m.gold}) {
      svg += format(
          "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" "
          "stroke-opacity=\".5\"/>\n",
          p.x(m.d), p.x(m.d), p.y(e.mean - e.ci95), p.y(e.mean + e.ci95), colour);
    }
  }
  for (int i = 0; i <= 60 && std::isfinite(c.fit.alpha); i++) {
    const double d = p.right * i / 60, r = fitted_gold(c.pressure, c.fit.alpha, c.fit.beta, d);
    if (r >= p.lowest && r <= p.highest) fit += format("%.1f,%.1f ", p.x(d), p.y(r));
  }
  const auto line = [&](const std::string& points, const char* style) {
    svg += format("<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" %s/>\n", points.c_str(),
                  colour, style);
  };
  line(proxy, "stroke-dasharray=\"5 4\" stroke-width=\"1.5\"");
  line(gold, "stroke-width=\"1.5\"");
  line(fit, "stroke-width=\".6\"");
  return svg;
}

// A panel for each pressure, a colour for each proxy.
std::string curves_svg(std::span<const OverCurve> curves) {
  static const char* const kColours[] = {"#c0392b", "#2471a3", "#1e8449", "#8e44ad", "#b9770e"};
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      2 * (kWidth + kLeft) + 24, kHeight + 2 * kTop + 12);
  for (const Pressure pressure : {Pressure::best_of_n, Pressure::ppo}) {
    const Panel panel = panel_of(pressure, curves);
    svg += axes_svg(panel);
    size_t number = 0;
    for (const OverCurve& c : curves) {
      if (c.pressure != pressure) continue;
      const char* colour = kColours[number % std::size(kColours)];
      svg += curve_svg(panel, c, colour);
      svg += format(
          "<text x=\"%g\" y=\"%g\" fill=\"%s\">%lld prompts: proxy dashed, gold solid, "
          "fit thin</text>\n",
          panel.left + kMargin, kTop + 14 * double(++number), colour, (long long)c.size);
    }
  }
  return svg + "</svg>\n";
}

// =============================================================================================
// Command line

int overoptimize_main(int argc, char** argv) {
  CLI::App app(
      "Reads the runs of dev/overoptimize.sh: proxy and gold reward over sqrt(KL), with fits and a "
      "picture.");
  app.option_defaults()->always_capture_default();
  std::string dir;
  std::vector<double> distances = {.5, 1, 1.5, 2, 3, 4, 6, 8, 12};
  app.add_option("DIR", dir, "folder with best-of-n/ and a folder proxy-SIZE/ for each proxy")
      ->required();
  app.add_option("--sqrt-kl", distances,
                 "distances at which best of n is measured, square roots of nats per answer")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  if (!parse_flags(app, argc, argv, {{&app, {"DIR", "--sqrt-kl"}}})) return 0;
  overoptimize(dir, distances);
  return 0;
}

}  // namespace
}  // namespace cake

int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::overoptimize_main(argc, argv); });
}
