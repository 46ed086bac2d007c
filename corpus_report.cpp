// The report: what a run dropped, why, and what is left, on one page that people look at.
//
//     DIR/verdicts.jsonl.zst --ReportCounts--> figures and samples --report_page--> DIR/report.html
//     DIR/summary.json ------------------------------------------------^
//
// Every figure about documents is counted from the verdicts, a line for each document; the summary
// adds what no verdict holds: bytes read, seconds, thresholds, damaged inputs.
//
// Memory is bounded, whatever the number of documents, and the same verdicts give the same bytes:
//
//   values of a rule    a histogram of 256 narrow bins for each power of two; the page's bins are
//                       made of these at the end, when the range of the values is known
//   samples             the few documents nearest to a threshold, and a few of all, chosen by a
//                       hash of their place
//   sites, clusters     counters for the most frequent ones: when there are too many, the rare half
//                       is forgotten, and how much that can hide is known (after the lossy counting
//                       of Manku and Motwani, 2002)
//   sizes of clusters   counted for clusters whose hash is below a limit; the limit is halved when
//                       these are too many (Wegman's adaptive sampling, in Flajolet, 1990)
//
// A second pass over the verdicts collects the documents of the largest clusters. The page needs
// nothing but itself: charts are SVG within it, there are no scripts and no links to elsewhere, and
// all text is escaped: a page of the web is shown, never obeyed.
#include <libpsl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>

#include "cake/corpus.h"
#include "cake/json.h"
#include "cake/records.h"

namespace cake::corpus {
namespace reporting {
namespace {

// ---------------------------------------------------------------------------------------------
// Counting in bounded memory

// How often values occur: each bin is as wide as 1/512 to 1/256 of the values in it. Whole numbers
// to 512 and zero have a bin of their own.
class FineHistogram {
 public:
  static constexpr int kParts = 256, kLeast = -30, kMost = 40;  // powers of two
  static constexpr size_t kBins = 1 + size_t(kMost - kLeast) * kParts;

  void add(double value) { bins_[bin_of(value)]++; }
  int64_t count(size_t bin) const { return bins_[bin]; }
  static double begin(size_t bin) {  // the least value of a bin; of the first one: 0 and less
    if (bin == 0) return 0;
    const int parts = int(bin - 1);
    return std::ldexp(.5 + parts % kParts / (2. * kParts), parts / kParts + kLeast);
  }

 private:
  static size_t bin_of(double value) {
    if (!(value > 0)) return 0;
    int power = 0;
    const double mantissa = std::frexp(value, &power);  // .5 to 1
    if (std::isinf(value) || power >= kMost) return kBins - 1;
    if (power < kLeast) return 1;
    return 1 + size_t(power - kLeast) * kParts + size_t((mantissa - .5) * 2 * kParts);
  }

  std::vector<int64_t> bins_ = std::vector<int64_t>(kBins);
};

struct KeyCounts {
  int64_t documents = 0, kept = 0;
};

// Counts of the most frequent keys. A count is never too high, and at most missed() too low.
template <class Key, class Hash = std::hash<Key>>
class FrequentKeys {
 public:
  explicit FrequentKeys(size_t most_keys) : most_keys_(most_keys) {}

  void add(const Key& key, bool kept) {
    if (counts_.size() >= most_keys_ && !counts_.contains(key)) forget_rare();
    KeyCounts& counts = counts_[key];
    counts.documents++, counts.kept += kept;
  }

  int64_t missed() const { return missed_; }
  size_t size() const { return counts_.size(); }  // of keys that are counted

  std::vector<std::pair<Key, KeyCounts>> most_frequent(size_t n) const {
    std::vector<std::pair<Key, KeyCounts>> sorted(counts_.begin(), counts_.end());
    n = std::min(n, sorted.size());
    std::partial_sort(sorted.begin(), sorted.begin() + long(n), sorted.end(),
                      [](const auto& a, const auto& b) {
                        if (a.second.documents != b.second.documents)
                          return a.second.documents > b.second.documents;
                        return a.first < b.first;
                      });
    sorted.resize(n);
    return sorted;
  }

 private:
  void forget_rare() {  // the half with the lowest counts, and all that have the highest of these
    std::vector<int64_t> documents;
    for (const auto& [key, counts] : counts_) documents.push_back(counts.documents);
    const auto middle = documents.begin() + long(documents.size() / 2);
    std::nth_element(documents.begin(), middle, documents.end());
    const int64_t limit = *middle;
    std::erase_if(counts_, [&](const auto& c) { return c.second.documents <= limit; });
    missed_ += limit;
  }

  size_t most_keys_;
  int64_t missed_ = 0;
  std::unordered_map<Key, KeyCounts, Hash> counts_;
};

struct PlaceHash {
  size_t operator()(const Place& p) const { return size_t(mix64(p.input, p.offset)); }
};

// Numbers of copies of the clusters whose first document's hash is below a limit.
class ClusterSizes {
 public:
  void add(const Place& original) {
    const uint64_t hash = mix64(original.input, original.offset, 1);
    if (hash > limit_) return;
    copies_[hash]++;
    if (copies_.size() < kMostClusters) return;
    limit_ /= 2;
    std::erase_if(copies_, [&](const auto& c) { return c.first > limit_; });
  }

  double clusters_for_each() const { return std::pow(2., 64) / (double(limit_) + 1); }
  const std::unordered_map<uint64_t, int64_t>& copies() const { return copies_; }

 private:
  static constexpr size_t kMostClusters = 400000;
  uint64_t limit_ = ~uint64_t(0);
  std::unordered_map<uint64_t, int64_t> copies_;
};

// ---------------------------------------------------------------------------------------------
// Samples

constexpr size_t kSampleBegins = 400, kSampleUrl = 200;  // characters that are shown

struct ReportSample {
  double distance = 0;  // from a threshold; 0 where any document will do
  uint64_t hash = 0;    // of its place
  Place place;
  double value = 0;
  std::string url, begins, match, reason;

  bool operator<(const ReportSample& other) const {
    return std::tie(distance, hash, place) < std::tie(other.distance, other.hash, other.place);
  }
};

// The `most` least samples of all that are offered.
class SampleShelf {
 public:
  explicit SampleShelf(size_t most = 0) : most_(most) {}

  void offer(const Verdict& v, double distance, double value) {
    ReportSample s{distance, mix64(v.place.input, v.place.offset), v.place, value, {}, {}, {}, {}};
    if (samples_.size() == most_ && (most_ == 0 || !(s < samples_.back()))) return;
    s.url = cut_to_width(v.url, kSampleUrl);
    s.begins = cut_to_width(v.begins, kSampleBegins);
    s.match = cut_to_width(v.match, kSampleBegins);
    s.reason = std::string(v.reason());
    samples_.insert(std::upper_bound(samples_.begin(), samples_.end(), s), std::move(s));
    if (samples_.size() > most_) samples_.pop_back();
  }

  const std::vector<ReportSample>& samples() const { return samples_; }

 private:
  size_t most_;
  std::vector<ReportSample> samples_;  // in order
};

// ---------------------------------------------------------------------------------------------
// Sites

// "http://user@Www.Example.co.uk:80/a" -> "www.example.co.uk"; "" where there is none.
std::string host_of_url(std::string_view url) {
  const size_t scheme = url.find("://");
  if (scheme == std::string_view::npos) return "";
  url.remove_prefix(scheme + 3);
  url = url.substr(0, url.find_first_of("/?#\\"));
  if (const size_t at = url.rfind('@'); at != std::string_view::npos) url.remove_prefix(at + 1);
  if (url.starts_with('[')) {
    url = url.substr(0, url.find(']') + 1);  // IPv6; npos + 1 is 0
  } else {
    url = url.substr(0, url.find(':'));
  }
  while (url.ends_with('.')) url.remove_suffix(1);
  std::string host(url.substr(0, 253));
  for (char& c : host)
    if (c >= 'A' && c <= 'Z') c = char(c - 'A' + 'a');
  return host;
}

// The part of the host that someone registered: "example.co.uk". Addresses stay as they are.
std::string registered_host(std::string_view url) {
  const std::string host = host_of_url(url);
  if (host.find_first_not_of("0123456789.") == std::string::npos || host[0] == '[') return host;
  const char* registered = psl_registrable_domain(psl_builtin(), host.c_str());
  return registered ? registered : host;
}

// ---------------------------------------------------------------------------------------------
// Figures of a run

struct ReportSummary {  // summary.json; each key may be absent
  Json json;
  std::string where;
  Thresholds thresholds;  // kOff: off, or not known

  std::optional<double> number(const char* key) const { return number_of(json, key); }
  std::optional<double> seconds(const char* part) const {
    const auto it = json.find("seconds");
    return it == json.end() ? std::nullopt : number_of(*it, part);
  }

 private:
  std::optional<double> number_of(const Json& object, const char* key) const {
    if (!object.is_object() || !object.contains(key) || object[key].is_null()) return std::nullopt;
    return json_as<double>(object[key], key, where);
  }
};

ReportSummary read_report_summary(const std::filesystem::path& path) {
  ReportSummary summary{read_json(path), path.string(), Thresholds(rules().size(), kOff)};
  require(summary.json.is_object(), summary.where, ": found ", json_text(summary.json),
          ", expected an object");
  const Json given = json_get_or<Json>(summary.json, "thresholds", Json::object(), summary.where);
  for (size_t r = 0; r < rules().size(); r++) {
    const std::string name(rules()[r].name);
    summary.thresholds[r] = json_get_or<double>(given, name, kOff, summary.where + ": thresholds");
  }
  return summary;
}

struct RuleCounts {
  FineHistogram passes, fails;  // of all documents
  int64_t dropped = 0;          // documents: fail this rule and none before it
  int64_t dropped_bytes = 0;
  int64_t failed = 0;       // fail this rule
  int64_t failed_only = 0;  // fail this rule and no other
  int64_t measured = 0;     // have a value
  bool is_whole = true;     // all values are whole numbers
  SampleShelf nearest_dropped{4}, any_dropped{4}, nearest_kept{4};
  SampleShelf matches{8};  // dropped, with what a list or an evaluation set holds too
};

struct ReportCounts {
  int64_t documents = 0, bytes = 0, kept = 0, kept_bytes = 0;
  int64_t empty = 0, empty_bytes = 0, exact = 0, exact_bytes = 0, near = 0, near_bytes = 0;
  int64_t private_data = 0, private_documents = 0;     // of kept documents
  int64_t repeated_bytes = 0, repeated_documents = 0;  // of kept documents
  int64_t without_site = 0;
  std::vector<RuleCounts> rules = std::vector<RuleCounts>(corpus::rules().size());
  SampleShelf kept_matches{8}, any_kept{8};
  FrequentKeys<std::string> languages{2000}, sites{200000};
  FrequentKeys<Place, PlaceHash> clusters{200000};
  ClusterSizes cluster_sizes;

  void add(const Verdict& v, const Thresholds& thresholds);

 private:
  void add_values(const Verdict& v, const Thresholds& thresholds);
};

void ReportCounts::add(const Verdict& v, const Thresholds& thresholds) {
  documents++, bytes += v.bytes;
  if (v.kept()) {
    kept++, kept_bytes += v.bytes;
    any_kept.offer(v, 0, 0);
    if (!v.match.empty()) kept_matches.offer(v, 0, kOff);
    private_data += v.private_data, private_documents += v.private_data > 0;
    repeated_bytes += v.repeated_bytes, repeated_documents += v.repeated_bytes > 0;
  } else if (v.rule >= 0) {
    RuleCounts& rule = rules[size_t(v.rule)];
    rule.dropped++, rule.dropped_bytes += v.bytes;
  } else if (v.empty) {
    empty++, empty_bytes += v.bytes;
  } else {
    (v.exact ? exact : near)++;
    (v.exact ? exact_bytes : near_bytes) += v.bytes;
    clusters.add(*v.original, false);
    cluster_sizes.add(*v.original);
  }
  languages.add(v.language, v.kept());
  if (const std::string site = registered_host(v.url); !site.empty()) {
    sites.add(site, v.kept());
  } else {
    without_site++;
  }
  add_values(v, thresholds);
}

void ReportCounts::add_values(const Verdict& v, const Thresholds& thresholds) {
  int failed = 0, last_failed = -1;
  for (size_t r = 0; r < rules.size(); r++) {
    const Rule& rule = corpus::rules()[r];
    RuleCounts& counts = rules[r];
    const double value = v.values[size_t(rule.measure)], threshold = thresholds[r];
    const bool fails = rule.direction == Rule::min ? value < threshold : value > threshold;
    const bool drops = v.rule == int(r);
    if (!std::isnan(value)) {
      counts.measured++;
      counts.is_whole &= value == std::floor(value);
      (fails ? counts.fails : counts.passes).add(value);
    }
    if (fails) counts.failed++, failed++, last_failed = int(r);
    const double distance =
        std::isnan(value) || std::isnan(threshold) ? 0 : std::fabs(value - threshold);
    if (drops) {
      counts.nearest_dropped.offer(v, distance, value);
      counts.any_dropped.offer(v, 0, value);
      if (!v.match.empty()) counts.matches.offer(v, 0, value);
    } else if (v.kept() && !std::isnan(value) && !std::isnan(threshold)) {
      counts.nearest_kept.offer(v, distance, value);
    }
  }
  if (failed == 1) rules[size_t(last_failed)].failed_only++;
}

template <class Visit>
void for_each_verdict(const std::filesystem::path& path, Visit visit) {
  if (std::filesystem::is_regular_file(path) && std::filesystem::file_size(path) == 0) return;
  LineReader lines{Input(path.string())};
  for (std::string_view line; lines.next(line);) visit(parse_verdict(line, lines.where()));
}

// A large cluster: documents with the same original.
struct ClusterSamples {
  Place original;
  int64_t copies = 0;
  std::optional<ReportSample> first;  // the original itself
  SampleShelf others{3};
};

constexpr size_t kShownClusters = 12, kShownSites = 50, kShownLanguages = 40;

std::vector<ClusterSamples> collect_clusters(const std::filesystem::path& verdicts,
                                             const ReportCounts& counts) {
  std::vector<ClusterSamples> all;
  std::map<Place, size_t> number;
  for (const auto& [place, cluster] : counts.clusters.most_frequent(kShownClusters)) {
    number[place] = all.size();
    all.push_back({place, cluster.documents, std::nullopt, SampleShelf(3)});
  }
  if (all.empty()) return all;
  for_each_verdict(verdicts, [&](const Verdict& v) {
    if (const auto it = number.find(v.place); it != number.end()) {
      SampleShelf shelf(1);
      shelf.offer(v, 0, 0);
      all[it->second].first = shelf.samples()[0];
    }
    if (!v.original) return;
    if (const auto it = number.find(*v.original); it != number.end()) {
      all[it->second].others.offer(v, 0, 0);
    }
  });
  return all;
}

// ---------------------------------------------------------------------------------------------
// Text of the page

// As text of HTML and within quotes of attributes. Control characters, which HTML forbids, become
// U+FFFD.
std::string html_text(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '"') {
      out += "&quot;";
    } else if (c == '\'') {
      out += "&#39;";
    } else if (((unsigned char)c < 32 && c != '\n' && c != '\t') || c == 127) {
      out += "\xef\xbf\xbd";
    } else {
      out += c;
    }
  }
  return out;
}

std::string share_text(double part, double whole) {
  if (!(whole > 0)) return "-";
  const double percent = 100 * part / whole;
  if (part > 0 && percent < .05) return "< 0.1 %";
  if (part < whole && percent > 99.95) return "> 99.9 %";
  return format("%.1f %%", percent);
}

std::string value_text(double value) {
  if (std::isnan(value)) return "-";
  if (value == std::floor(value) && std::fabs(value) < 1e6) return count_text(value);
  return format("%.4g", value);
}

std::string cell(const std::string& text) { return "<td>" + html_text(text) + "</td>"; }
std::string number_cell(const std::string& text) {
  return "<td class=\"number\">" + html_text(text) + "</td>";
}
std::string count_cell(int64_t n) { return number_cell(count_text(double(n))); }
std::string bar_cell(double part, double whole) {  // a bar, of a whole cell
  if (!(part > 0)) return "<td class=\"bars\"></td>";
  return format("<td class=\"bars\"><div class=\"bar\" style=\"width: %.2f%%\"></div></td>",
                100 * part / whole);
}
// "#left": the column holds numbers.
std::string header_row(const std::vector<std::string>& names) {
  std::string out = "<tr>";
  for (const std::string& name : names) {
    out += name.starts_with('#') ? "<th class=\"number\">" + name.substr(1) : "<th>" + name;
    out += "</th>";
  }
  return out + "</tr>\n";
}
std::string section(const char* id, const char* title) {
  return concat("<h2 id=\"", id, "\">", title, "</h2>\n");
}

std::string filter_title(std::string_view filter) {
  static const std::map<std::string_view, const char*> titles = {
      {"url", "URL lists"},
      {"language", "Language"},
      {"gopher_repetition", "Gopher repetition"},
      {"gopher_quality", "Gopher quality"},
      {"c4", "C4"},
      {"fineweb_quality", "FineWeb quality"},
      {"contamination", "Decontamination"},
      {"quality", "Quality classifier"}};
  const auto it = titles.find(filter);
  return it == titles.end() ? std::string(filter) : it->second;
}

std::string threshold_text(const Rule& rule, double threshold) {
  if (std::isnan(threshold)) return "off";
  return (rule.direction == Rule::min ? "at least " : "at most ") + value_text(threshold);
}

// What is shown of documents: their value, where they come from, how they begin.
std::string sample_rows(const std::string& label, const std::vector<ReportSample>& samples,
                        bool with_value = true) {
  std::string out;
  for (const ReportSample& s : samples) {
    out += "<tr>" + cell(label) + (with_value ? number_cell(value_text(s.value)) : "") +
           "<td><div class=\"url\" dir=\"auto\">" +
           html_text(s.url.empty() ? concat("input ", s.place.input, ", offset ", s.place.offset)
                                   : s.url) +
           "</div>" +
           (s.match.empty() ? "" : "<div class=\"match\">" + html_text(s.match) + "</div>") +
           "<div class=\"begins\" dir=\"auto\">" + html_text(s.begins) + "</div></td></tr>\n";
  }
  return out;
}

// ---------------------------------------------------------------------------------------------
// Charts: the values of a rule over all documents, with the threshold drawn in

// The bins of a chart: zero may have one of its own, then come bins of the same width, of values
// or of their logarithms. One of the bins begins at the threshold.
struct ChartAxis {
  bool is_log = false, has_zero = false, is_whole = false;
  double begin = 0, width = 1;
  int bins = 1;                                            // without that of zero
  double line = std::numeric_limits<double>::quiet_NaN();  // where a threshold is drawn

  double scaled(double value) const { return is_log ? std::log10(value) : value; }
  double position(double value) const {  // in bins; that of zero is before 0
    return (scaled(value) - begin) / width;
  }
  int bin(double value) const {
    if (value <= 0 && has_zero) return -1;
    const double p = value <= 0 && is_log ? 0 : position(value) + 1e-9;
    return int(std::clamp(std::floor(p), 0., double(bins - 1)));
  }
  double bin_begin(int b) const {
    const double x = begin + b * width;
    return is_log ? std::pow(10, x) : std::fabs(x) < width * 1e-6 ? 0 : x;
  }
};

constexpr int kChartBins = 40, kLeastChartBins = 10;

ChartAxis chart_axis(const RuleCounts& counts, const Rule& rule, double threshold) {
  ChartAxis axis{.is_whole = counts.is_whole};
  int64_t positive = 0;
  const auto documents = [&](size_t i) { return counts.passes.count(i) + counts.fails.count(i); };
  for (size_t i = 1; i < FineHistogram::kBins; i++) positive += documents(i);
  const auto quantile = [&](double q) {
    int64_t seen = 0;
    for (size_t i = 1; i < FineHistogram::kBins; i++) {
      seen += documents(i);
      if (seen > 0 && double(seen) >= q * double(positive)) return FineHistogram::begin(i);
    }
    return 0.;
  };
  const bool whole_max = axis.is_whole && rule.direction == Rule::max;
  const double line = whole_max ? std::floor(threshold) + 1 : threshold;  // NaN: no line
  double low = quantile(.0005), high = quantile(.9995);
  if (positive == 0) low = high = 1;
  const double middle = positive > 0 ? quantile(.5) : 1;
  if (line > 0) low = std::min(low, line), high = std::max(high, line);
  axis.is_log = high > 2 && high > 10 * middle && low > 0;
  axis.has_zero = documents(0) > 0 && (axis.is_log || !axis.is_whole);
  if (!axis.is_log && (low < high / 2 || (documents(0) > 0 && !axis.has_zero))) low = 0;
  if (high <= low) high = low + (axis.is_whole ? 1 : std::max(low, .01));

  const double first = axis.scaled(low), last = axis.scaled(high);
  axis.width = (last - first) / kChartBins;
  if (axis.is_whole && !axis.is_log) axis.width = std::max(1., std::ceil(axis.width));
  axis.begin = first;
  axis.line = line;
  int line_bin = 0;  // it has bins on both sides
  if (line > 0) {
    const double anchor = axis.scaled(line);
    line_bin = std::max(1, int(std::ceil((anchor - first) / axis.width - 1e-6)));
    axis.begin = anchor - line_bin * axis.width;
  }
  const int last_bin = int(std::floor((last - axis.begin) / axis.width + 1e-6));
  axis.bins = std::max({line_bin + 1, last_bin + 1, kLeastChartBins});
  return axis;
}

struct ChartBin {
  int64_t passes = 0, fails = 0;
};

// A fine bin that holds the threshold has values on both sides of it: they are shown on theirs.
std::vector<ChartBin> chart_bins(const RuleCounts& counts, const Rule& rule,
                                 const ChartAxis& axis) {
  std::vector<ChartBin> bins(size_t(axis.bins) + 1);  // the first is that of zero
  for (size_t i = 0; i < FineHistogram::kBins; i++) {
    const int64_t passes = counts.passes.count(i), fails = counts.fails.count(i);
    if (passes == 0 && fails == 0) continue;
    const int bin = axis.bin(FineHistogram::begin(i));
    int below = bin, above = bin;
    if (axis.line > 0 && bin >= 0) {
      const int begin_above = int(std::lround(axis.position(axis.line)));
      below = std::min(bin, begin_above - 1), above = std::max(bin, begin_above);
    }
    const bool min = rule.direction == Rule::min;
    bins[size_t((min ? above : below) + 1)].passes += passes;
    bins[size_t((min ? below : above) + 1)].fails += fails;
  }
  return bins;
}

double tick_width(double range) {  // 1, 2 or 5 times a power of ten, for about four ticks
  const double raw = range / 4, power = std::pow(10, std::floor(std::log10(raw)));
  const double times = raw / power;
  return power * (times < 1.5 ? 1 : times < 3.5 ? 2 : times < 7.5 ? 5 : 10);
}

std::vector<double> chart_ticks(const ChartAxis& axis) {
  std::vector<double> ticks;
  const double end = axis.begin + axis.bins * axis.width;
  const double width = axis.is_log ? std::max(1., std::ceil((end - axis.begin) / 6))
                                   : std::max(tick_width(end - axis.begin), axis.is_whole ? 1. : 0);
  for (double t = std::ceil(axis.begin / width - 1e-9) * width; t <= end + 1e-9 * width; t += width)
    ticks.push_back(axis.is_log ? std::pow(10, t) : std::fabs(t) < width / 1e6 ? 0 : t);
  return ticks;
}

constexpr double kChartWidth = 420, kChartHeight = 170, kChartLeft = 40, kChartRight = 12,
                 kChartTop = 18, kChartBottom = 22;

std::string range_text(const ChartAxis& axis, int bin) {
  if (bin < 0) return "0";
  const double begin = axis.bin_begin(bin), end = axis.bin_begin(bin + 1);
  if (axis.is_whole && !axis.is_log && axis.width == 1) return value_text(begin);
  return format("%.4g to %.4g", begin, end);
}

std::string histogram_chart(const RuleCounts& counts, const Rule& rule, double threshold) {
  const ChartAxis axis = chart_axis(counts, rule, threshold);
  const std::vector<ChartBin> bins = chart_bins(counts, rule, axis);
  int64_t most = 1;
  for (const ChartBin& b : bins) most = std::max({most, b.passes, b.fails});

  const double zero_slots = axis.has_zero ? 1.6 : 0;  // bins that zero takes, with a gap
  const double slot = (kChartWidth - kChartLeft - kChartRight) / (double(axis.bins) + zero_slots);
  const auto x = [&](double bin) { return kChartLeft + (bin + zero_slots) * slot; };
  const double bottom = kChartHeight - kChartBottom;
  const auto y = [&](double documents) {  // the logarithm, so that one document is seen too
    return bottom - std::log10(1 + documents) / std::log10(1 + double(most)) * (bottom - kChartTop);
  };
  std::string out = format(
      "<svg viewBox=\"0 0 %g %g\" width=\"%g\" height=\"%g\" role=\"img\" aria-label=\"%s\">\n",
      kChartWidth, kChartHeight, kChartWidth, kChartHeight,
      html_text(concat("histogram of ", measures()[size_t(rule.measure)].name)).c_str());
  for (double n = 1; n <= double(most); n *= most > 100000 ? 100 : 10) {
    out += format(
        "<line x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\" class=\"grid\"/>"
        "<text x=\"%g\" y=\"%.1f\" class=\"tick\" text-anchor=\"end\">%s</text>\n",
        kChartLeft, kChartWidth - kChartRight, y(n), y(n), kChartLeft - 4, y(n) + 3.5,
        (n >= 1e6 ? format("%gM", n / 1e6) : count_text(n)).c_str());
  }
  for (int b = axis.has_zero ? -1 : 0; b < axis.bins; b++) {
    const ChartBin& bin = bins[size_t(b + 1)];
    const double left = b < 0 ? kChartLeft : x(b);
    const auto bar = [&](const char* kind, int64_t documents) {
      if (documents == 0) return;
      const double top = y(double(documents));
      out += format("<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>",
                    kind, left, top, std::max(1., slot - 1), bottom - top);
    };
    if (bin.passes + bin.fails == 0) continue;
    out += "<g><title>" + range_text(axis, b) + ": " + count_text(double(bin.passes)) + " pass, " +
           count_text(double(bin.fails)) + " fail</title>";
    const bool passes_behind = bin.passes > bin.fails;  // the lower bar stands in front
    if (passes_behind) bar("pass", bin.passes);
    bar("fail", bin.fails);
    if (!passes_behind) bar("pass", bin.passes);
    out += "</g>\n";
  }
  if (axis.has_zero) {
    out += format("<text x=\"%.1f\" y=\"%g\" class=\"tick\" text-anchor=\"middle\">0</text>\n",
                  kChartLeft + slot / 2, kChartHeight - 7);
  }
  for (const double tick : chart_ticks(axis)) {
    if (axis.has_zero && tick == 0) continue;
    const double shift = axis.is_whole && !axis.is_log && axis.width == 1 ? .5 : 0;  // mid of a bin
    out += format("<text x=\"%.1f\" y=\"%g\" class=\"tick\" text-anchor=\"middle\">%s</text>\n",
                  x(axis.position(tick) + shift), kChartHeight - 7,
                  tick >= 1000 ? count_text(tick).c_str() : format("%.4g", tick).c_str());
  }
  if (!std::isnan(threshold)) {
    const double at = axis.line > 0 ? std::clamp(x(axis.position(axis.line)), kChartLeft,
                                                 kChartWidth - kChartRight)
                                    : kChartLeft + (axis.has_zero ? slot * 1.2 : 0);
    const bool left = at > kChartWidth * .7;  // where its label stands
    out += format(
        "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%g\" y2=\"%g\" class=\"threshold\"/>"
        "<text x=\"%.1f\" y=\"11\" class=\"label\" text-anchor=\"%s\">%s</text>\n",
        at, at, kChartTop - 14, bottom, at + (left ? -4 : 4), left ? "end" : "start",
        html_text(threshold_text(rule, threshold)).c_str());
  }
  return out + "</svg>\n";
}

// ---------------------------------------------------------------------------------------------
// Sections

std::string headline_section(const ReportCounts& c, const ReportSummary& summary) {
  const double pages_seconds = summary.seconds("pages").value_or(0);
  const double html = summary.number("html_bytes").value_or(0),
               parsed = summary.number("parsed_bytes").value_or(0);
  std::string out = "<div class=\"tiles\">\n";
  const auto tile = [&](const std::string& figure, const std::string& what) {
    out += "<div class=\"tile\"><b>" + html_text(figure) + "</b><span>" + html_text(what) +
           "</span></div>\n";
  };
  tile(count_text(double(c.documents)), "documents read");
  tile(count_text(double(c.kept)), "kept");
  tile(share_text(double(c.kept), double(c.documents)), "of documents kept");
  tile(share_text(double(c.kept_bytes), double(c.bytes)), "of text kept");
  if (pages_seconds > 0) {
    tile(count_text(double(c.documents) / pages_seconds), "documents a second");
    if (const auto read = summary.number("bytes_read"))
      tile(bytes_text(*read / pages_seconds), "of input a second");
  }
  if (html > 0) tile(share_text(parsed, html), "of HTML reached the parser");
  out += "</div>\n<ul>\n";

  const auto sentence = [&](const std::string& text) {
    out += "<li>" + html_text(text) + "</li>\n";
  };
  std::string inputs;
  if (const auto n = summary.number("inputs"))
    inputs = count_text(*n) + (*n == 1 ? " input" : " inputs");
  if (const auto n = summary.number("bytes_read"))
    inputs += (inputs.empty() ? "" : ", ") + bytes_text(*n) + " read";
  if (!inputs.empty()) sentence(inputs + ".");
  sentence("Text: " + bytes_text(double(c.bytes)) + " before the rules, " +
           bytes_text(double(c.kept_bytes)) + " of it in documents that are kept.");
  if (html > 0) {
    sentence("Of " + bytes_text(html) + " of HTML, " + bytes_text(parsed) + " (" +
             share_text(parsed, html) +
             ") were given to the HTML parser; the rest is script, style, comments and the like.");
  }
  std::string time;
  const std::pair<const char*, const char*> parts[] = {{"pages", "reading, extraction and rules "},
                                                       {"duplicates", "duplicates "},
                                                       {"write", "writing "}};
  for (const auto& [key, name] : parts)
    if (const auto s = summary.seconds(key))
      time += (time.empty() ? "" : ", ") + (name + format("%.1f s", *s));
  if (!time.empty()) {
    std::string by;
    for (const char* key : {"tasks", "ranks", "threads"})
      if (const auto n = summary.number(key)) by += concat(by.empty() ? "" : ", ", key, " ", *n);
    sentence("Time, tasks added up: " + time + (by.empty() ? "." : " (" + by + ")."));
  }
  if (const Json wanted =
          json_get_or<Json>(summary.json, "languages_wanted", Json(), summary.where);
      !wanted.is_null()) {
    std::string list;
    for (const std::string& l :
         json_as<std::vector<std::string>>(wanted, "languages_wanted", summary.where))
      list += (list.empty() ? "" : ", ") + l;
    sentence("Languages wanted: " + (list.empty() ? "any" : list) + ".");
  }
  if (!json_get_or<bool>(summary.json, "block_lists", true, summary.where)) {
    sentence("No block list given: no document was dropped for its URL.");
  }
  if (const auto n = summary.number("documents"); n && *n != double(c.documents)) {
    sentence("The summary counts " + count_text(*n) + " documents, the verdicts " +
             count_text(double(c.documents)) + ": the figures here are of the verdicts.");
  }
  return out + "</ul>\n";
}

std::string funnel_section(const ReportCounts& c, const ReportSummary& summary) {
  std::string out = section("funnel", "The funnel") + "<table>\n" +
                    header_row({"after", "#removed", "#left", "#share", "", "#text left"});
  int64_t left = c.documents, bytes = c.bytes;
  const auto row = [&](const std::string& name, int64_t removed, int64_t removed_bytes) {
    left -= removed, bytes -= removed_bytes;
    out += "<tr>" + cell(name) + (name == "reading" ? "<td></td>" : count_cell(removed)) +
           count_cell(left) + number_cell(share_text(double(left), double(c.documents))) +
           bar_cell(double(left), double(c.documents)) + number_cell(bytes_text(double(bytes))) +
           "</tr>\n";
  };
  row("reading", 0, 0);
  for (size_t r = 0; r < rules().size();) {
    const std::string_view filter = rules()[r].filter;
    int64_t removed = 0, removed_bytes = 0;
    bool is_on = false;
    for (; r < rules().size() && rules()[r].filter == filter; r++) {
      removed += c.rules[r].dropped, removed_bytes += c.rules[r].dropped_bytes;
      is_on |= !std::isnan(summary.thresholds[r]);
    }
    std::string name = filter_title(filter);
    if (!is_on && removed == 0) name += " (off)";
    if (filter == "url" && !json_get_or<bool>(summary.json, "block_lists", true, summary.where))
      name += " (no block list given)";
    row(name, removed, removed_bytes);
  }
  if (c.empty > 0) row("documents left without text", c.empty, c.empty_bytes);
  row("exact duplicates", c.exact, c.exact_bytes);
  row("near duplicates", c.near, c.near_bytes);
  out += "</table>\n";
  if (left != c.kept) {
    fail(summary.where, ": found ", c.kept, " documents kept, expected ", left,
         ", what the verdicts' reasons leave");
  }
  return out;
}

std::string rules_table(const ReportCounts& c, const ReportSummary& summary) {
  std::string out =
      section("rules", "What each rule removes") +
      "<p>A document is dropped by the first rule that it fails. <i>Fails</i> counts all documents "
      "that fail a rule, <i>alone</i> those that fail no other: these would come back without it "
      "(some of them as duplicates).</p>\n<table>\n" +
      header_row({"rule", "threshold", "#drops", "#share", "", "#fails", "#alone"});
  int64_t most = 1, off = 0;
  for (const RuleCounts& rule : c.rules) most = std::max(most, rule.dropped);
  for (size_t r = 0; r < rules().size(); r++) {
    const RuleCounts& counts = c.rules[r];
    const double threshold = summary.thresholds[r];
    if (std::isnan(threshold) && counts.dropped == 0) {
      off++;
      continue;
    }
    const std::string name = html_text(rules()[r].name);
    out += "<tr><td><a href=\"#rule-" + name + "\">" + name + "</a></td>" +
           cell(threshold_text(rules()[r], threshold)) + count_cell(counts.dropped) +
           number_cell(share_text(double(counts.dropped), double(c.documents))) +
           bar_cell(double(counts.dropped), double(most)) + count_cell(counts.failed) +
           count_cell(counts.failed_only) + "</tr>\n";
  }
  out += "</table>\n";
  if (off > 0) out += format("<p class=\"note\">Rules that are off: %lld.</p>\n", (long long)off);
  return out;
}

std::string rule_card(const RuleCounts& counts, const Rule& rule, double threshold) {
  const Measure& measure = measures()[size_t(rule.measure)];
  const std::string name = html_text(rule.name);
  std::string out = "<div class=\"card\" id=\"rule-" + name + "\">\n<h3>" + name + " <small>" +
                    html_text(threshold_text(rule, threshold)) + "</small></h3>\n<p>" +
                    html_text(measure.name) + ": " + html_text(measure.help) + ".</p>\n";
  if (counts.measured == 0) {
    return out + "<p class=\"note\">No document was measured.</p>\n</div>\n";
  }
  out += histogram_chart(counts, rule, threshold);
  out += "<p>" + html_text(count_text(double(counts.dropped))) + " dropped by it first, " +
         count_text(double(counts.failed)) + " fail it, of " + count_text(double(counts.measured)) +
         " measured.</p>\n";
  const std::string rows = sample_rows("dropped, nearest", counts.nearest_dropped.samples()) +
                           sample_rows("kept, nearest", counts.nearest_kept.samples()) +
                           sample_rows("dropped, any", counts.any_dropped.samples());
  if (!rows.empty()) {
    out +=
        "<details><summary>Samples of dropped and kept documents</summary>\n"
        "<table class=\"samples\">\n" +
        header_row({"", "#value", "document"}) + rows + "</table></details>\n";
  }
  return out + "</div>\n";
}

std::string rule_sections(const ReportCounts& c, const ReportSummary& summary) {
  std::string out =
      section("values", "Values of each rule") +
      "<p>Documents by value, all of them, with the threshold: <span class=\"key pass\"></span> "
      "pass, <span class=\"key fail\"></span> fail. Heights are logarithms of numbers of "
      "documents; zero stands apart; the outermost bars hold all that lies beyond.</p>\n";
  std::string_view filter;
  for (size_t r = 0; r < rules().size(); r++) {
    if (rules()[r].filter != filter) {
      if (!filter.empty()) out += "</div>\n";
      filter = rules()[r].filter;
      out += "<h3 class=\"filter\">" + html_text(filter_title(filter)) +
             "</h3>\n<div class=\"cards\">\n";
    }
    out += rule_card(c.rules[r], rules()[r], summary.thresholds[r]);
  }
  return out + (filter.empty() ? "" : "</div>\n");
}

std::string key_rows(const std::vector<std::pair<std::string, KeyCounts>>& keys, int64_t all) {
  std::string out;
  for (const auto& [name, n] : keys) {
    out += "<tr><td dir=\"auto\">" + html_text(cut_to_width(name, 80)) + "</td>" +
           count_cell(n.documents) + number_cell(share_text(double(n.documents), double(all))) +
           count_cell(n.kept) + number_cell(share_text(double(n.kept), double(n.documents))) +
           bar_cell(double(n.kept), double(n.documents)) + "</tr>\n";
  }
  return out;
}

std::string languages_section(const ReportCounts& c) {
  std::string out = section("languages", "Languages") + "<table>\n" +
                    header_row({"language", "#documents", "#share", "#kept", "#kept share", ""}) +
                    key_rows(c.languages.most_frequent(kShownLanguages), c.documents) +
                    "</table>\n";
  if (c.languages.size() > kShownLanguages) {
    out += "<p class=\"note\">And " + count_text(double(c.languages.size() - kShownLanguages)) +
           " more.</p>\n";
  }
  return out;
}

std::string sites_section(const ReportCounts& c) {
  std::string out = section("sites", "Sites");
  if (c.sites.size() == 0) return out + "<p>No document has the URL of a site.</p>\n";
  out += "<p>" + std::string(c.sites.missed() > 0 ? "More than " : "") +
         count_text(double(c.sites.size())) +
         " registered hosts; the most frequent ones are shown.";
  if (c.sites.missed() > 0) {
    out += " A number can be at most " + count_text(double(c.sites.missed())) + " too low.";
  }
  if (c.without_site > 0) {
    out += " " + count_text(double(c.without_site)) + " documents have no URL of a site.";
  }
  return out + "</p>\n<table>\n" +
         header_row({"site", "#documents", "#share", "#kept", "#kept share", ""}) +
         key_rows(c.sites.most_frequent(kShownSites), c.documents) + "</table>\n";
}

std::string cluster_sizes_table(const ReportCounts& c) {
  struct SizeRow {
    const char* name;
    int64_t most;  // copies
    int64_t clusters = 0;
  };
  SizeRow rows[] = {{"2", 1},
                    {"3", 2},
                    {"4 to 5", 4},
                    {"6 to 10", 9},
                    {"11 to 100", 99},
                    {"101 to 1,000", 999},
                    {"more than 1,000", std::numeric_limits<int64_t>::max()}};
  int64_t clusters = 0, most = 1;
  for (const auto& [hash, copies] : c.cluster_sizes.copies()) {
    size_t i = 0;
    while (copies > rows[i].most) i++;
    rows[i].clusters++, clusters++;
    most = std::max(most, rows[i].clusters);
  }
  const double scale = c.cluster_sizes.clusters_for_each();
  std::string out = "<table>\n" + header_row({"documents of a cluster", "#clusters", "#share", ""});
  for (const SizeRow& row : rows) {
    if (row.clusters == 0) continue;
    out += "<tr>" + cell(row.name) + number_cell(count_text(scale * double(row.clusters))) +
           number_cell(share_text(double(row.clusters), double(clusters))) +
           bar_cell(double(row.clusters), double(most)) + "</tr>\n";
  }
  out += "</table>\n";
  if (scale > 1) {
    out += "<p class=\"note\">Estimated from " + count_text(double(clusters)) +
           " clusters, chosen by a hash.</p>\n";
  }
  return out;
}

std::string clusters_section(const ReportCounts& c, const std::vector<ClusterSamples>& clusters) {
  std::string out = section("duplicates", "Duplicates") + "<p>" + count_text(double(c.exact)) +
                    " exact and " + count_text(double(c.near)) +
                    " near duplicates of earlier documents were dropped.";
  if (c.repeated_documents > 0) {
    out += " Passages that earlier documents have were removed from " +
           count_text(double(c.repeated_documents)) +
           " kept documents: " + bytes_text(double(c.repeated_bytes)) + ".";
  }
  out += "</p>\n";
  if (c.exact + c.near == 0) return out;
  out += cluster_sizes_table(c) + "<h3>The largest clusters</h3>\n";
  if (c.clusters.missed() > 0) {
    out += "<p class=\"note\">A number can be at most " + count_text(double(c.clusters.missed())) +
           " too low.</p>\n";
  }
  for (const ClusterSamples& cluster : clusters) {
    std::string title =
        cluster.first && !cluster.first->url.empty()
            ? cut_to_width(cluster.first->url, 90)
            : concat("input ", cluster.original.input, ", offset ", cluster.original.offset);
    out += "<details><summary>" + count_text(double(cluster.copies)) +
           (cluster.copies == 1 ? " copy of " : " copies of ") + html_text(title) +
           "</summary>\n<table class=\"samples\">\n" + header_row({"", "document"});
    if (cluster.first) out += sample_rows("the first", {*cluster.first}, false);
    for (const ReportSample& s : cluster.others.samples()) {
      out += sample_rows(s.reason, {s}, false);
    }
    out += "</table></details>\n";
  }
  return out;
}

std::string matches_section(const ReportCounts& c, const ReportSummary& summary) {
  std::string rows;
  for (size_t r = 0; r < rules().size(); r++) {
    rows += sample_rows(std::string(rules()[r].name), c.rules[r].matches.samples());
  }
  rows += sample_rows("kept", c.kept_matches.samples());
  std::string out = section("matches", "Decontamination and lists");
  bool is_on = false;
  int64_t dropped = 0;
  for (size_t r = 0; r < rules().size(); r++) {
    if (rules()[r].filter != "contamination") continue;
    is_on |= c.rules[r].measured > 0 && !std::isnan(summary.thresholds[r]);
    dropped += c.rules[r].dropped;
  }
  out += is_on || dropped > 0
             ? "<p>" + count_text(double(dropped)) +
                   " documents were dropped because an evaluation set holds 13 words in a row of "
                   "theirs.</p>\n"
             : "<p>No evaluation set was compared.</p>\n";
  if (rows.empty()) return out;
  return out +
         "<p>Documents that a list or an evaluation set matches, a few for each rule:</p>\n"
         "<table class=\"samples\">\n" +
         header_row({"rule", "#value", "document"}) + rows + "</table>\n";
}

std::string private_section(const ReportCounts& c) {
  return section("private", "Private data") + "<p>" + count_text(double(c.private_data)) +
         " e-mail and IP addresses were replaced, in " + count_text(double(c.private_documents)) +
         " of the documents that are kept (" +
         share_text(double(c.private_documents), double(c.kept)) + ").</p>\n";
}

std::string problems_section(const ReportSummary& summary) {
  std::string out = section("problems", "Problems of the inputs");
  const Json problems = json_get_or<Json>(summary.json, "problems", Json::object(), summary.where);
  require(problems.is_object(), summary.where, ": problems: found ", json_text(problems),
          ", expected an object");
  if (problems.empty()) return out + "<p>None.</p>\n";
  out += "<table>\n" + header_row({"problem", "#number"});
  for (const auto& [name, value] : problems.items()) {
    out += "<tr>" + cell(name) +
           count_cell(json_as<int64_t>(value, name, summary.where + ": problems")) + "</tr>\n";
  }
  return out + "</table>\n";
}

std::string kept_section(const ReportCounts& c) {
  if (c.kept == 0) return "";
  return section("kept", "Some documents that are kept") + "<table class=\"samples\">\n" +
         header_row({"", "document"}) + sample_rows("kept", c.any_kept.samples(), false) +
         "</table>\n";
}

// ---------------------------------------------------------------------------------------------
// The page

constexpr const char* kReportStyle = R"(
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #6a6a6a; --rule: #ddd;
        --grid: #e8e8e8; --pass: #1f6fb2; --fail: #d1662a; --link: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dcdcdc; --paper: #17191c; --faint: #9a9a9a; --rule: #3a3d41; --grid: #2b2e32;
          --pass: #5b9fd8; --fail: #e58a52; --link: #7db8ea; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } h3 { font-size: 1em; }
h3 small { color: var(--faint); font-weight: normal; }
h3.filter { margin-top: 1.6em; border-bottom: 1px solid var(--rule); }
a { color: var(--link); }
nav a { margin-right: 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }
th, td { padding: .2em .7em; text-align: left; border-bottom: 1px solid var(--rule);
         vertical-align: top; }
th.number, td.number { text-align: right; white-space: nowrap; }
td.bars { width: 12em; min-width: 6em; vertical-align: middle; }
.bar { background: var(--pass); height: .7em; min-width: 1px; }
.note { color: var(--faint); }
.tiles { display: flex; flex-wrap: wrap; gap: .8em 2.2em; margin: 1em 0; }
.tile b { display: block; font-size: 1.6em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26em), 1fr));
         gap: .5em 2em; }
.card { min-width: 0; } .card h3 { margin-bottom: 0; } .card p { margin: .2em 0; font-size: .92em; }
.card:has(details[open]) { grid-column: 1 / -1; }
.key { display: inline-block; width: .8em; height: .8em; }
.key.pass { background: var(--pass); } .key.fail { background: var(--fail); }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--grid); } svg .tick { font-size: 10.5px; fill: var(--faint); }
svg .label { fill: var(--ink); font-weight: 600; }
svg .threshold { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 4 3; }
svg .pass { fill: var(--pass); } svg .fail { fill: var(--fail); }
summary { cursor: pointer; overflow-wrap: anywhere; }
.samples { font-size: .92em; width: 100%; }
.samples td:first-child { white-space: nowrap; color: var(--faint); }
.url { overflow-wrap: anywhere; color: var(--faint); }
.match { overflow-wrap: anywhere; color: var(--fail); }
.begins { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9em; overflow-y: auto; }
)";

std::string report_page(const std::string& title, const ReportCounts& c,
                        const ReportSummary& summary, const std::vector<ClusterSamples>& clusters) {
  const std::string name = html_text("Corpus report: " + title);
  std::string out =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width\">\n"
      // Nothing is loaded and nothing runs, even if a text were not escaped.
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src &#39;none&#39;; "
      "style-src &#39;unsafe-inline&#39;\">\n<title>" +
      name + "</title>\n<style>" + kReportStyle + "</style>\n</head>\n<body>\n<h1>" + name +
      "</h1>\n<nav>";
  const std::pair<const char*, const char*> links[] = {
      {"funnel", "funnel"},       {"rules", "rules"},          {"values", "values"},
      {"languages", "languages"}, {"sites", "sites"},          {"duplicates", "duplicates"},
      {"matches", "matches"},     {"private", "private data"}, {"problems", "problems"}};
  for (const auto& [id, text] : links) out += concat("<a href=\"#", id, "\">", text, "</a> ");
  out += "</nav>\n";
  out += headline_section(c, summary);
  out += funnel_section(c, summary);
  out += rules_table(c, summary);
  out += rule_sections(c, summary);
  out += languages_section(c);
  out += sites_section(c);
  out += clusters_section(c, clusters);
  out += matches_section(c, summary);
  out += private_section(c);
  out += problems_section(summary);
  out += kept_section(c);
  return out + "</body>\n</html>\n";
}

}  // namespace
}  // namespace reporting

void write_report(const std::filesystem::path& dir) {
  using namespace reporting;
  const ReportSummary summary = read_report_summary(dir / "summary.json");
  const std::filesystem::path verdicts = dir / "verdicts.jsonl.zst";
  const auto counts = std::make_unique<ReportCounts>();
  for_each_verdict(verdicts, [&](const Verdict& v) { counts->add(v, summary.thresholds); });
  const std::string title = std::filesystem::absolute(dir / ".").parent_path().filename().string();
  write_file(dir / "report.html",
             report_page(title, *counts, summary, collect_clusters(verdicts, *counts)));
}

}  // namespace cake::corpus
