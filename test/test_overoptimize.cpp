// The over-optimisation experiment: fits against known curves, intervals against values worked out
// by hand, what a directory of runs is turned into, and how the script goes on with a run that was
// stopped.
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#define main cake_overoptimize_main  // test/main.cpp has the binary's
#include "dev/overoptimize.cpp"
#undef main
#include "test/support.h"

using namespace cake;

namespace {

std::vector<Measurement> gold_points(Pressure pressure, double alpha, double beta,
                                     const std::vector<double>& distances) {
  std::vector<Measurement> points = {Measurement{}};
  for (const double d : distances) {
    const double gold =
        pressure == Pressure::best_of_n ? d * (alpha - beta * d) : d * (alpha - beta * std::log(d));
    points.push_back({.d = d, .gold = {gold, .1}});
  }
  return points;
}

OverCurve curve_of(Pressure pressure, std::vector<Measurement> points) {
  OverCurve curve{pressure, 64, std::move(points), {}};
  curve.fit = fit_gold(pressure, curve.points);
  return curve;
}

double squares(const OverCurve& c, double alpha, double beta) {
  double sum = 0;
  for (const Measurement& m : c.points)
    sum += std::pow(fitted_gold(c.pressure, alpha, beta, m.d) - m.gold.mean, 2);
  return sum;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Fits

TEST_CASE("fits of over-optimisation find the curve, its residual and its highest point") {
  for (const Pressure p : {Pressure::best_of_n, Pressure::ppo}) {
    const bool best_of_n = p == Pressure::best_of_n;
    const double alpha = best_of_n ? 2 : 1.2, beta = best_of_n ? .4 : .6;
    OverCurve c = curve_of(p, gold_points(p, alpha, beta, {.5, 1, 1.5, 2, 3, 4}));
    CHECK(std::abs(c.fit.alpha - alpha) < 1e-12);
    CHECK(std::abs(c.fit.beta - beta) < 1e-12);
    CHECK(c.fit.residual < 1e-12);
    CHECK(std::abs(c.fit.optimum - (best_of_n ? 2.5 : std::exp(1.))) < 1e-12);
    REQUIRE(measured_optimum(c));
    const double highest = fitted_gold(p, alpha, beta, *measured_optimum(c));
    CHECK(std::abs(highest - (best_of_n ? 2.5 : .6 * std::exp(1.))) < 1e-12);
    for (const double off : {-.01, .01})
      CHECK(fitted_gold(p, alpha, beta, c.fit.optimum + off) < highest);

    // Least squares: no other curve is nearer to noisy points. Six points without the one at 0.
    Rng rng{hash64("gold")};
    for (Measurement& m : c.points)
      if (m.d > 0) m.gold.mean += .2 * rng.normal();
    c.fit = fit_gold(p, c.points);
    const double least = squares(c, c.fit.alpha, c.fit.beta);
    CHECK(std::abs(c.fit.residual - std::sqrt(least / 6)) < 1e-12);
    for (const double off : {-1e-3, 1e-3}) {
      CHECK(squares(c, c.fit.alpha + off, c.fit.beta) > least);
      CHECK(squares(c, c.fit.alpha, c.fit.beta + off) > least);
    }
  }
}

TEST_CASE("a fit without two distances above 0 is none") {
  for (const Pressure p : {Pressure::best_of_n, Pressure::ppo}) {
    const OverCurve c = curve_of(p, gold_points(p, 1, 1, {2, 2}));
    CHECK(std::isnan(c.fit.alpha));
    CHECK(!measured_optimum(c));
    CHECK(contains(curve_text(c), "no fit: it needs two distances above 0"));
    CHECK(curve_json(c).dump().find("\"alpha\":null") != std::string::npos);
  }
}

TEST_CASE("an optimum outside of the measured range is not printed, the best measured point is") {
  // Best of n: the highest point of d (2 - .4 d) is 2.5. PPO: that of d (1.2 - .6 log d) is e.
  const auto text = [](Pressure p, const std::vector<double>& distances) {
    const bool best_of_n = p == Pressure::best_of_n;
    const OverCurve c =
        curve_of(p, gold_points(p, best_of_n ? 2 : 1.2, best_of_n ? .4 : .6, distances));
    CHECK(curve_json(c).at("optimum").is_null() == !measured_optimum(c).has_value());
    return curve_text(c);
  };
  const std::string inside = "highest point of the fit: gold ", outside = "best measured point: ";
  for (const Pressure p : {Pressure::best_of_n, Pressure::ppo}) {
    for (const auto& distances : {std::vector<double>{.5, 1, 2}, {3, 4, 6}}) {
      CHECK(!contains(text(p, distances), inside));
      CHECK(contains(text(p, distances), outside));
    }
    CHECK(contains(text(p, {1, 2, 3}), inside));
    CHECK(!contains(text(p, {1, 2, 3}), outside));
  }
  CHECK(contains(text(Pressure::best_of_n, {1, 2, 3}), inside + "+2.500 at sqrt KL 2.50"));
  CHECK(contains(text(Pressure::best_of_n, {.5, 1, 2}),
                 outside + "gold +2.400 +- 0.100 at sqrt KL 2.00"));
  // A curve that only rises has no highest point.
  const OverCurve rising =
      curve_of(Pressure::ppo, gold_points(Pressure::ppo, 1, -.5, {.5, 1, 2, 4}));
  CHECK(std::isinf(rising.fit.optimum));
  CHECK(contains(curve_text(rising), outside));
}

// ---------------------------------------------------------------------------------------------
// Best of n

TEST_CASE("the n that are measured are powers of two and those nearest to the distances") {
  // sqrt(KL) of 2 is .439, of 3 .657, of 5 .899, of 6 .979, of 25 1.503, of 26 1.516, of
  // 147 1.9993, of 148 2.0009.
  CHECK(measured_n(150, std::vector<double>{.5, 1, 1.5, 2, 3}) ==
        std::set<int>{1, 2, 4, 6, 8, 16, 25, 32, 64, 128, 147});
  CHECK(measured_n(32, std::vector<double>{.65, 2}) == std::set<int>{1, 2, 3, 4, 8, 16, 32});
  CHECK(measured_n(1, std::vector<double>{.5}) == std::set<int>{1});
}

TEST_CASE("the best of k answers is the mean over all draws of k") {
  const std::vector<double> proxy = {.3, -1, 2, .7, .1}, gold = {5, 1, -3, 2, 8};
  for (int k = 1; k <= 5; k++) {
    double of_proxy = 0, of_gold = 0, draws = 0;
    for (unsigned set = 0; set < 32; set++) {
      if (__builtin_popcount(set) != k) continue;
      size_t best = 5;
      for (size_t i = 0; i < 5; i++)
        if (set >> i & 1 && (best == 5 || proxy[i] > proxy[best])) best = i;
      of_proxy += proxy[best], of_gold += gold[best], draws++;
    }
    CHECK(best_of(k, proxy, gold).proxy == doctest::Approx(of_proxy / draws));
    CHECK(best_of(k, proxy, gold).gold == doctest::Approx(of_gold / draws));
  }
}

TEST_CASE("best of n has its gain over the mean answer, with the interval over prompts") {
  // Gains of the best of two by the proxy over the mean of both, proxy: 1, 1, 4; gold: 2, -1, 2.
  const std::vector<PromptAnswers> prompts = {
      {{{0, 2}, {10, 14}}}, {{{5, 3}, {20, 22}}}, {{{-4, 4}, {-2, 2}}}};
  const OverCurve c = measure_best_of_n(prompts, 0, {7, 2}, {7, .5}, std::vector<double>{.4});
  REQUIRE(c.points.size() == 2);
  CHECK(c.points[0].d == 0);
  CHECK(c.points[0].gold.mean == 0);
  CHECK(c.points[0].gold.ci95 == 0);
  CHECK(c.points[1].n == 2);
  CHECK(c.points[1].d == doctest::Approx(std::sqrt(std::log(2) - .5)));
  // Mean 2, sample variance 3: 1.96 sqrt(3 / 3), over a std of 2.
  CHECK(c.points[1].proxy.mean == doctest::Approx(1));
  CHECK(c.points[1].proxy.ci95 == doctest::Approx(.98));
  // Mean 1, sample variance 3, over a std of .5.
  CHECK(c.points[1].gold.mean == doctest::Approx(2));
  CHECK(c.points[1].gold.ci95 == doctest::Approx(3.92));
}

// ---------------------------------------------------------------------------------------------
// A directory of runs

namespace {

// Rewards of the first policy: two prompts, two answers each. Proxies of 8 and 64 prompts have the
// means 1 and 0 and the stds 1 and 10; gold has 0 and 2.
void write_runs(const std::filesystem::path& dir) {
  for (const char* run :
       {"best-of-n", "proxy-8/ppo", "proxy-64/ppo", "proxy-8/answers", "proxy-64/answers"})
    std::filesystem::create_directories(dir / run);
  write_file(dir / "best-of-n/metrics.jsonl",
             "{\"step\":1,\"rewards\":[[0,2],[10,-10]],\"gold\":[-2,2]}\n"
             "{\"step\":2,\"rewards\":[[2,0],[-10,10]],\"gold\":[-2,2]}\n");
  const auto line = [](int step, const char* at, double kl, double reward, double gold) {
    return format(
        "{\"step\":%d,%s\"val_kl\":%g,\"val_reward\":%g,\"val_reward_ci95\":0.5,"
        "\"val_gold\":%g,\"val_gold_ci95\":1}\n",
        step, at, kl, reward, gold);
  };
  write_file(dir / "proxy-8/ppo/metrics.jsonl",
             line(0, "", 0, 1, .5) + "{\"step\":1,\"kl\":0.2,\"reward\":1}\n" +
                 line(1, "\"at_sqrt_kl\":0.5,", .25, 2, 1) + line(2, "", .8, 9, 9) +
                 line(3, "\"at_sqrt_kl\":1,", 4, 3, 2) + line(3, "\"at_sqrt_kl\":1.5,", 4, 3, 2) +
                 line(4, "\"at_sqrt_kl\":3,", 9, 4, -1));
  write_file(dir / "proxy-64/ppo/metrics.jsonl", line(1, "\"at_sqrt_kl\":0.5,", .25, 10, 1));
  for (const char* size : {"8", "64"}) {
    std::string answers;
    for (int i = 0; i < 5; i++)
      answers += format("{\"step\":%d,\"reward\":[%d],\"gold\":[0],\"text\":\"answer %d <&\"}\n",
                        i + 1, i, i);
    write_file(dir / concat("proxy-", size, "/answers/metrics.jsonl"), answers);
  }
}

}  // namespace

TEST_CASE("a directory of runs becomes tables, a summary and a picture") {
  const TempDir dir;
  write_runs(dir.path());
  const Output out = shell("build/overoptimize " + dir.path().string());
  CAPTURE(out.text);
  REQUIRE(out.status == 0);
  CHECK(contains(out.text,
                 "PPO against a proxy of 8 prompts\n"
                 "  sqrt KL             proxy              gold\n"
                 "    0.000   +0.000 +- 0.000   +0.000 +- 0.000\n"
                 "    0.500   +1.000 +- 0.500   +0.500 +- 0.500\n"
                 "    2.000   +2.000 +- 0.500   +1.000 +- 0.500\n"
                 "    3.000   +3.000 +- 0.500   -0.500 +- 0.500\n"
                 "  fit: gold = d ("));
  // Both prompts: the proxy's better answer is the one with gold 2, or the one with -2.
  CHECK(contains(out.text,
                 "best of n against a proxy of 8 prompts\n"
                 "     n  sqrt KL             proxy              gold\n"
                 "     1    0.000   +0.000 +- 0.000   +0.000 +- 0.000\n"
                 "     2    0.439   +1.000 +- 0.000   +0.000 +- 1.960\n"));
  const Json summary = read_json(dir / "summary.json");
  CHECK(summary.at("stage") == "overoptimize");
  REQUIRE(summary.at("curves").size() == 4);
  const Json& ppo = summary.at("curves").at(2);
  CHECK(ppo.at("pressure") == "ppo");
  CHECK(ppo.at("size") == 8);
  CHECK(ppo.at("points").size() == 4);
  CHECK(ppo.at("points").at(2).at("sqrt_kl") == 2);
  CHECK(ppo.at("points").at(2).at("gold_ci95") == .5);
  CHECK(ppo.at("best_measured").at("gold") == 1);
  CHECK(summary.at("curves").at(3).at("size") == 64);
  CHECK(summary.at("curves").at(3).at("points").at(1).at("proxy") == 1);
  CHECK(summary.at("curves").at(3).at("alpha").is_null());  // one distance
  REQUIRE(summary.at("answers").size() == 6);               // three of each proxy
  CHECK(summary.at("answers").at(0).at("text") == "answer 4 <&");
  CHECK(summary.at("answers").at(0).at("proxy") == 3);

  const std::string svg = read_file(dir / "overoptimization.svg");
  CHECK(svg.starts_with("<svg"));
  CHECK(contains(svg, "</svg>"));
  CHECK(contains(svg, "stroke-opacity"));  // intervals
  CHECK(!contains(svg, "nan"));
}

TEST_CASE("a directory without runs, or with damaged ones, is refused with its file and line") {
  const TempDir dir;
  const auto error = [&] {
    const Output out = shell("build/overoptimize " + dir.path().string());
    CHECK(out.status == 1);
    CHECK(!std::filesystem::exists(dir / "summary.json"));
    return out.text;
  };
  CHECK(contains(error(), "found no folder proxy-SIZE"));
  write_runs(dir.path());
  write_file(dir / "best-of-n/metrics.jsonl", "{\"rewards\":[[1,2]],\"gold\":[1,2]}\n");
  CHECK(contains(error(),
                 "best-of-n/metrics.jsonl:1: rewards: found those of 1 proxies, "
                 "expected 2"));
  write_file(dir / "best-of-n/metrics.jsonl", "{\"rewards\":[[1,2],[1,2]],\"gold\":[1]}\n");
  CHECK(contains(error(), "metrics.jsonl:1: found 1 rewards, expected 2 answers"));
  write_file(dir / "best-of-n/metrics.jsonl",
             "{\"rewards\":[[1,2],[1,2]],\"gold\":[1,1]}\n"
             "{\"rewards\":[[1,2],[1,2]],\"gold\":[1,1]}\n");
  CHECK(contains(error(), "found the same reward (number 3, gold is the last)"));
  write_runs(dir.path());
  write_file(dir / "proxy-8/ppo/metrics.jsonl", "{\"step\":1,\"at_sqrt_kl\":1}\n");
  CHECK(contains(error(), "proxy-8/ppo/metrics.jsonl:1: val_kl is missing"));
}

// ---------------------------------------------------------------------------------------------
// The script, with programs that do nothing but write down their command lines

namespace {

// Runs of `reward` and `ppo` leave a finished model, those of best-of-n a summary. The program
// named in the file `stopped` leaves its run unfinished once, with the status of SIGTERM.
constexpr const char* kProgram = R"(#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
out= previous=
for word; do
  [ "$previous" = -o ] && out=$word
  previous=$word
done
mkdir -p "$out/model"
case "$1" in
best-of-n) file=$out/state.json; rmdir "$out/model"; [ -e "$LOG.stop-$1" ] || touch "$out/summary.json" ;;
*) file=$out/model/trainer_state.json ;;
esac
if [ -e "$LOG.stop-$1" ]; then
  echo '{ "finished": false }' >"$file"
  rm "$LOG.stop-$1"
  exit 143
fi
echo '{ "finished": true }' >"$file"
)";

}  // namespace

TEST_CASE("dev/overoptimize.sh ends with the status of a stopped run, and then goes on with it") {
  const TempDir dir;
  const std::string root = dir.path();
  for (const char* folder : {"bin", "demo/sft/model", "demo/world"})
    std::filesystem::create_directories(dir / folder);
  for (const char* name : {"reward", "rlhf", "world", "overoptimize"}) {
    write_file(dir / concat("bin/", name), kProgram);
    std::filesystem::permissions(dir / concat("bin/", name), std::filesystem::perms::owner_all);
  }
  write_file(dir / "demo/sft/model/config.json", "{}");
  write_file(dir / "demo/world/world.json", "{}");
  const std::string command = "LOG=" + root + "/log BIN=" + root + "/bin BUILD=" + root +
                              "/bin FROM=" + root + "/demo RUN=" + root +
                              "/run dev/overoptimize.sh";
  const auto calls = [&](const std::string& settings, int status) {
    write_file(dir / "log", "");
    const Output out = shell(settings + " " + command);
    CAPTURE(out.text);
    CHECK(out.status == status);
    std::vector<std::string> lines;
    std::istringstream text(read_file(dir / "log"));
    for (std::string line; std::getline(text, line);) lines.push_back(line);
    return lines;
  };
  const std::string ppo = root + "/run/proxy-8/ppo";
  write_file(dir / "log.stop-ppo", "");
  const auto stopped = calls("SIZES='64 8'", 143);
  REQUIRE(stopped.size() == 5);  // world, two proxies, best of n, the first ppo
  CHECK(contains(stopped[1], "--limit 8 "));
  CHECK(contains(stopped[3], "proxy-8/reward --reward model:" + root + "/run/proxy-64/reward"));
  CHECK(contains(stopped[4], "--eval-at-kl .5,1,1.5,2,3,4,6,8,12"));
  CHECK(stopped[4].ends_with("-o " + ppo));

  CHECK(contains(shell("SIZES=8 " + command).text, "found a run of FROM="));  // other settings

  write_file(dir / "log.stop-best-of-n", "");
  const auto resumed = calls("SIZES='8 64'", 143);
  REQUIRE(resumed.size() == 4);  // world, two ppo, the first answers
  CHECK(resumed[1] == "rlhf ppo -o " + ppo + " --resume");
  CHECK(contains(resumed[2], "proxy-64/ppo"));
  const auto rest = calls("SIZES='8 64'", 0);
  REQUIRE(rest.size() == 4);  // world, the answers of both, the fits
  CHECK(rest[1] == "rlhf best-of-n -o " + root + "/run/proxy-8/answers --resume");
  CHECK(contains(rest[3], "overoptimize " + root + "/run --sqrt-kl .5,1,1.5,2,3,4,6,8,12"));
  CHECK(calls("SIZES='8 64'", 0).size() == 2);  // world and the fits
}
