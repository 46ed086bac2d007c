// Decontamination and the quality classifier: what a text says, by its words.
//
//     text --split_lower_words--> words --13 at a time--> found in an evaluation set?
//                                 --1 and 2 at a time--> buckets --weights--> probability of good
//
// Decontamination follows GPT-3 (Brown et al. 2020, appendix C) and lm-evaluation-harness: a text
// that has 13 words in a row in common with a text of an evaluation set is contaminated. The
// classifier is a linear model over hashed n-grams, as fastText's (Joulin et al. 2016), which
// DCLM and FineWeb-Edu used to tell good pages from the others; ours is trained by AdaGrad (Duchi,
// Hazan, Singer 2011) on the logistic loss.

#include <map>

#include "cake/corpus.h"
#include "cake/json.h"
#include "cake/unicode.h"

namespace cake::corpus {
namespace {

// ---------------------------------------------------------------------------------------------
// Words: runs of letters, marks and digits, in lower case. A character of Chinese or Japanese is a
// word of its own, since no spaces stand between words there. Bytes that are no UTF-8 end a word.

// Of an ASCII byte of a word its lower case, else 0.
constexpr std::array<char, 256> kAsciiWordBytes = [] {
  std::array<char, 256> table = {};
  for (int c = '0'; c <= '9'; c++) table[size_t(c)] = char(c);
  for (int c = 'a'; c <= 'z'; c++) table[size_t(c)] = table[size_t(c - 'a' + 'A')] = char(c);
  return table;
}();

bool is_word_alone(int32_t c) {
  return c >= 0x3040 && (c <= 0x30ff || (c >= 0x3400 && c <= 0x9fff) ||
                         (c >= 0xf900 && c <= 0xfaff) || (c >= 0x20000 && c <= 0x3ffff));
}

// Bytes that split_lower_words writes at most.
size_t lower_words_bytes(size_t text_bytes) { return 2 * text_bytes + 8; }

// Writes the words to `out`, a space behind each, and calls word(hash, begin, end, offset) for
// each: its place in `out`, and its begin in the text. Returns the number of bytes written.
template <class Word>
size_t split_lower_words(std::string_view text, char* out, const Word& word) {
  constexpr uint64_t kStart = 0xcbf29ce484222325, kPrime = 0x100000001b3;  // FNV-1a
  const uint8_t* classes = char_classes();
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  uint64_t hash = kStart;
  size_t begin = 0, end = 0, offset = 0;  // the word is out[begin, end)
  const auto add = [&](char c) {
    hash = (hash ^ static_cast<unsigned char>(c)) * kPrime;
    out[end++] = c;
  };
  const auto finish = [&](size_t next) {  // `next`: offset of the next word, if one begins there
    if (end > begin) {
      word(mix64(hash), begin, end, offset);
      out[end++] = ' ';
      begin = end, hash = kStart;
    }
    offset = next;
  };
  for (size_t i = 0; i < text.size();) {
    if (const char lower = kAsciiWordBytes[bytes[i]]) {
      add(lower), i++;
    } else if (bytes[i] < 0x80) {
      finish(++i);
    } else {
      const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
      const size_t next = i + size_t(c.bytes);
      const bool in_word = classes[c.code] >= kUpper;
      if (!in_word || is_word_alone(c.code)) finish(in_word ? i : next);
      if (in_word) {
        char lower[4];
        const int n = encode_utf8(lower_case(c.code), lower);
        for (int k = 0; k < n; k++) add(lower[k]);
        if (is_word_alone(c.code)) finish(next);
      }
      i = next;
    }
  }
  finish(text.size());
  return end;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Decontamination. All 13-grams of the evaluation sets are in a table of their hashes; a hit counts
// once the words are compared. The hash of 13 words rolls on with each word, so a text is read once
// (Karp, Rabin 1987). A filter of 16 to 32 bits for each n-gram, which fits into a cache where the
// table does not, answers nearly always.

namespace {

constexpr size_t kNgramWords = 13;
constexpr uint64_t kNgramBase = 0x9e3779b97f4a7c15;  // odd

constexpr uint64_t power_of(uint64_t base, size_t exponent) {
  uint64_t result = 1;
  for (size_t i = 0; i < exponent; i++) result *= base;
  return result;
}

// The last 13 words: the hash of w[0], .., w[12] is the sum of w[i] base^(12 - i).
class NgramWindow {
 public:
  // True when there are 13 words.
  bool add(uint64_t word_hash, size_t word_begin) {
    constexpr uint64_t kLeaves = power_of(kNgramBase, kNgramWords);
    hash_ = hash_ * kNgramBase + word_hash - hashes_[oldest_] * kLeaves;
    hashes_[oldest_] = word_hash, begins_[oldest_] = word_begin;
    oldest_ = oldest_ + 1 == kNgramWords ? 0 : oldest_ + 1;
    return ++words_ >= kNgramWords;
  }
  uint64_t hash() const { return hash_; }
  size_t begin() const { return begins_[oldest_]; }  // of the first word

 private:
  std::array<uint64_t, kNgramWords> hashes_ = {};
  std::array<size_t, kNgramWords> begins_ = {};
  uint64_t hash_ = 0;
  size_t oldest_ = 0, words_ = 0;
};

}  // namespace

struct Contamination::State {
  std::vector<std::string> names;  // of the files
  std::string words;               // of all strings, a space behind each
  struct Origin {                  // of the words from `offset` on
    size_t offset, file;
    int64_t line;
  };
  std::vector<Origin> origins;
  struct Ngram {
    uint64_t hash, offset;  // offset: of its first word
  };
  std::vector<Ngram> ngrams;     // as read
  std::vector<Ngram> table;      // open addressing, at most half full; hash 0: empty
  std::vector<uint64_t> filter;  // a bit for each n-gram
  int table_shift = 0, filter_shift = 0;
  Counts counts;

  void read(const std::string& path);
  void read_json(ByteWindow window);
  void read_rows(const std::string& path);
  void read_plain_text(ByteWindow window);
  void add_strings(simdjson::dom::element e, int64_t line);
  void add_string(std::string_view text, int64_t line);
  void build_table();
  size_t slot_of(uint64_t hash) const { return size_t(hash * kNgramBase >> table_shift); }
  size_t filter_bit(uint64_t hash) const {
    return size_t(hash * 0xbf58476d1ce4e5b9 >> filter_shift);
  }
  bool may_have(uint64_t hash) const {
    const size_t bit = filter_bit(hash);
    return filter[bit / 64] >> (bit % 64) & 1;
  }
  bool has_words(size_t offset, std::string_view ngram) const {
    return words.compare(offset, ngram.size(), ngram) == 0 && words[offset + ngram.size()] == ' ';
  }
  const Ngram* find(uint64_t hash, std::string_view ngram) const;
};

void Contamination::State::read(const std::string& path) {
  require(path != "-", "decontamination: found standard input, expected a file");
  names.push_back(path);
  const Input input(path);
  ByteWindow window(ByteSource(input, {.any_kind = true}));
  const std::string_view head = window.need(1 << 16);
  const FileKind kind = file_kind(input, head, {});
  if (kind == FileKind::json) return read_json(std::move(window));
  if (kind == FileKind::parquet) {
    require_mapped_parquet(input, window.source());
    return read_rows(path);
  }
  require_text(head, path);
  read_plain_text(std::move(window));
}

// Any JSON values: one on each line, or the elements of an array.
void Contamination::State::read_json(ByteWindow window) {
  JsonValues values(std::move(window));
  for (simdjson::dom::element value; values.next(value);) add_strings(value, values.number());
}

void Contamination::State::read_rows(const std::string& path) {
  parquet::JsonRows rows(path);
  simdjson::dom::parser parser;
  simdjson::dom::element row;
  for (std::string json; rows.next(json);) {
    const auto error = parse_and_repair(json, parser, row);
    if (error) fail(path, ": row ", rows.row(), ": ", json_problem(error));
    add_strings(row, rows.row());
  }
}

void Contamination::State::add_strings(simdjson::dom::element e, int64_t line) {
  std::string_view text;
  simdjson::dom::array array;
  simdjson::dom::object object;
  if (!e.get(text)) {
    add_string(text, line);
  } else if (!e.get(array)) {
    for (const auto item : array) add_strings(item, line);
  } else if (!e.get(object)) {
    for (const auto& member : object) add_strings(member.value, line);
  }
}

// A plain text is one string, since its lines may be broken anywhere.
void Contamination::State::read_plain_text(ByteWindow window) {
  window.begin_text();
  while (!window.ended()) window.need(window.bytes().size() + (1 << 20));
  add_string(window.bytes(), 1);
}

void Contamination::State::add_string(std::string_view text, int64_t line) {
  const size_t base = words.size();
  words.resize(base + lower_words_bytes(text.size()));
  NgramWindow window;
  size_t counted = 0, count = 0;  // newlines before text[counted] are in `line`
  origins.push_back({base, names.size() - 1, line});
  const size_t size = split_lower_words(
      text, words.data() + base, [&](uint64_t hash, size_t begin, size_t, size_t offset) {
        const int64_t line_before = line;
        for (; counted < offset; counted++) line += text[counted] == '\n';
        if (line > line_before) origins.push_back({base + begin, names.size() - 1, line});
        if (window.add(hash, begin)) ngrams.push_back({window.hash(), base + window.begin()});
        count++;
      });
  words.resize(base + size);
  counts.strings++;
  counts.short_strings += count < kNgramWords;
}

// The first n-gram of a kind stays.
void Contamination::State::build_table() {
  int bits = 4;
  while ((size_t(1) << bits) < 2 * ngrams.size()) bits++;
  table_shift = 64 - bits, filter_shift = table_shift - 3;
  table.assign(size_t(1) << bits, {0, 0});
  filter.assign((size_t(8) << bits) / 64, 0);
  for (Ngram& ngram : ngrams) {
    size_t end = ngram.offset;
    for (size_t i = 0; i < kNgramWords; i++) end = words.find(' ', end) + 1;
    ngram.hash += ngram.hash == 0;
    if (find(ngram.hash, std::string_view(words).substr(ngram.offset, end - 1 - ngram.offset)))
      continue;
    size_t slot = slot_of(ngram.hash);
    while (table[slot].hash != 0) slot = (slot + 1) & (table.size() - 1);
    table[slot] = ngram;
    filter[filter_bit(ngram.hash) / 64] |= uint64_t(1) << (filter_bit(ngram.hash) % 64);
    counts.ngrams++;
  }
  ngrams = {};
}

const Contamination::State::Ngram* Contamination::State::find(uint64_t hash,
                                                              std::string_view ngram) const {
  for (size_t slot = slot_of(hash); table[slot].hash != 0; slot = (slot + 1) & (table.size() - 1)) {
    if (table[slot].hash == hash && has_words(table[slot].offset, ngram)) return &table[slot];
  }
  return nullptr;
}

Contamination::Contamination(const std::vector<std::string>& paths) {
  const auto state = std::make_shared<State>();
  for (const std::string& path : paths) {
    const size_t before = state->words.size();
    state->read(path);
    require(state->words.size() > before, path, ": found no text, expected an evaluation set");
  }
  require(paths.empty() || !state->ngrams.empty(), paths.empty() ? "" : paths[0],
          ": found no text of ", kNgramWords, " words or more: nothing could ever match");
  state->build_table();
  state_ = state;
}

const Contamination::Counts& Contamination::counts() const { return state_->counts; }

Contamination::Match Contamination::find(std::string_view text) const {
  const State& state = *state_;
  Match match;
  const std::unique_ptr<char[]> words(new char[lower_words_bytes(text.size())]);
  NgramWindow window;
  split_lower_words(text, words.get(), [&](uint64_t word_hash, size_t begin, size_t end, size_t) {
    if (!window.add(word_hash, begin)) return;
    const uint64_t hash = window.hash() + (window.hash() == 0);
    if (!state.may_have(hash)) return;
    const std::string_view ngram(words.get() + window.begin(), end - window.begin());
    const State::Ngram* found = state.find(hash, ngram);
    if (!found) return;
    if (match.ngrams++ > 0) return;
    const auto behind = std::upper_bound(
        state.origins.begin(), state.origins.end(), found->offset,
        [](size_t offset, const State::Origin& origin) { return offset < origin.offset; });
    const State::Origin& origin = behind[-1];
    match.example = concat(state.names[origin.file], ":", origin.line, ": \"", ngram, "\"");
  });
  return match;
}

// ---------------------------------------------------------------------------------------------
// The quality classifier. A text's features are the distinct buckets of its words and pairs of
// words, each 1 / sqrt(number of buckets), so that a long text counts no more than a short one:
//     score = logistic(bias + sum of weights[bucket] / sqrt(buckets))

namespace {

constexpr int kQualityBits = 20;
constexpr size_t kQualityBuckets = size_t(1) << kQualityBits;

// Distinct, in the order in which they come first.
std::vector<uint32_t> quality_buckets(std::string_view text) {
  thread_local std::vector<uint64_t> seen(kQualityBuckets / 64);  // bits, all 0 between calls
  std::vector<uint32_t> buckets;
  const auto add = [&](uint64_t hash) {
    const auto bucket = uint32_t(hash >> (64 - kQualityBits));
    const uint64_t bit = uint64_t(1) << (bucket % 64);
    if (seen[bucket / 64] & bit) return;
    seen[bucket / 64] |= bit;
    buckets.push_back(bucket);
  };
  const std::unique_ptr<char[]> words(new char[lower_words_bytes(text.size())]);
  uint64_t previous = 0;
  split_lower_words(text, words.get(), [&](uint64_t hash, size_t, size_t, size_t) {
    add(hash);
    if (previous != 0) add(mix64(previous, hash));
    previous = hash;
  });
  for (const uint32_t bucket : buckets) seen[bucket / 64] = 0;
  return buckets;
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

double quality_of(std::span<const uint32_t> buckets, const std::vector<float>& weights,
                  double bias) {
  double sum = 0;
  for (const uint32_t b : buckets) sum += double(weights[b]);
  return logistic(bias + sum / std::sqrt(double(std::max<size_t>(1, buckets.size()))));
}

// A model's file: this header, then the weights as float32, little endian.
struct QualityHeader {
  char magic[8];
  uint32_t version, bits;
  uint64_t checksum;  // of the weights
  float bias;
  uint32_t unused;
};
constexpr char kQualityMagic[] = "cakequal";
constexpr uint32_t kQualityVersion = 1;

std::string_view weight_bytes(const std::vector<float>& weights) {
  return {reinterpret_cast<const char*>(weights.data()), weights.size() * sizeof(float)};
}

}  // namespace

double QualityModel::score(std::string_view text) const {
  return quality_of(quality_buckets(text), weights_, double(bias_));
}

void QualityModel::save(const std::filesystem::path& path) const {
  QualityHeader header = {{}, kQualityVersion, kQualityBits, hash64(weight_bytes(weights_)), bias_,
                          0};
  std::memcpy(header.magic, kQualityMagic, sizeof header.magic);
  AtomicFile file(path);
  file.write(&header, sizeof header);
  file.write(weight_bytes(weights_));
  file.commit();
}

QualityModel QualityModel::load(const std::filesystem::path& path) {
  const std::string bytes = read_file(path);
  QualityHeader header = {};
  std::memcpy(&header, bytes.data(), std::min(bytes.size(), sizeof header));
  if (std::memcmp(header.magic, kQualityMagic, sizeof header.magic) != 0) {
    fail(path.string(), ": found other bytes, expected a model of ./corpus classify train");
  }
  if (header.version != kQualityVersion || header.bits != kQualityBits) {
    fail(path.string(), ": found version ", header.version, " with 2^", header.bits,
         " buckets, expected version ", kQualityVersion, " with 2^", kQualityBits);
  }
  QualityModel model;
  model.weights_.resize(kQualityBuckets);
  model.bias_ = header.bias;
  const size_t expected = sizeof header + weight_bytes(model.weights_).size();
  if (bytes.size() != expected) {
    fail(path.string(), ": found ", bytes.size(), " bytes, expected ", expected);
  }
  std::memcpy(model.weights_.data(), bytes.data() + sizeof header, expected - sizeof header);
  if (header.checksum != hash64(weight_bytes(model.weights_)) || !std::isfinite(header.bias)) {
    fail(path.string(), ": found other weights than were written: the file is damaged");
  }
  return model;
}

// ---------------------------------------------------------------------------------------------
// Training

// A good or bad text, by its buckets.
struct QualityExample {
  std::vector<uint32_t> buckets;
  bool good;
};

struct QualityTraining {
  // Minimises the mean logistic loss of both kinds, each of which weighs one half however many
  // texts it has, one example at a time in an order drawn anew for each epoch.
  static QualityModel train(const std::vector<QualityExample>& examples, int epochs,
                            uint64_t seed) {
    constexpr double kLearningRate = .5, kEpsilon = 1e-8;
    double of_kind[2] = {0, 0};
    std::vector<uint32_t> order;
    for (const QualityExample& e : examples) {
      of_kind[e.good]++;
      order.push_back(uint32_t(order.size()));
    }
    QualityModel model;
    model.weights_.resize(kQualityBuckets);
    std::vector<float> squares(kQualityBuckets);  // sums of squared gradients
    double bias = 0, bias_squares = 0;
    const auto step = [&](double gradient, double& sum) {
      sum += gradient * gradient;
      return kLearningRate * gradient / (std::sqrt(sum) + kEpsilon);
    };
    Rng rng{seed};
    for (int epoch = 0; epoch < epochs; epoch++) {
      shuffle(order, rng);
      for (const uint32_t i : order) {
        const QualityExample& e = examples[i];
        const double weight = double(examples.size()) / (2 * of_kind[e.good]);
        const double d = weight * (quality_of(e.buckets, model.weights_, bias) - double(e.good));
        const double x = 1 / std::sqrt(double(std::max<size_t>(1, e.buckets.size())));
        for (const uint32_t b : e.buckets) {
          double sum = double(squares[b]);
          model.weights_[b] -= float(step(d * x, sum));
          squares[b] = float(sum);
        }
        bias -= step(d, bias_squares);
      }
    }
    model.bias_ = float(bias);
    return model;
  }

  static double score(const QualityModel& model, const QualityExample& e) {
    return quality_of(e.buckets, model.weights_, double(model.bias_));
  }
};

namespace {

// Calls body(page, text) for every page of the inputs; HTML pages give their main text.
template <class Body>
void read_quality_pages(const std::vector<std::string>& paths, const Body& body) {
  uint32_t number = 0;
  for (const Input& input : expand_inputs(paths)) {
    PageReader reader(input, number++);
    for (Page page; reader.next(page);) {
      stop_if_signalled();
      if (page.html) page.text = extract(page.text, page.url).text;
      body(page);
    }
    for (const auto& [problem, count] : reader.problems()) {
      std::fprintf(stderr, "%s: %lld: %s\n", input.name.c_str(), static_cast<long long>(count),
                   problem.c_str());
    }
  }
}

// The probability that a good text has a higher score than a bad one; equal scores count one half.
double area_under_curve(std::vector<double> good, std::vector<double> bad) {
  std::sort(bad.begin(), bad.end());
  double wins = 0;
  for (const double score : good) {
    const auto [low, high] = std::equal_range(bad.begin(), bad.end(), score);
    wins += double(low - bad.begin()) + double(high - low) / 2;
  }
  return wins / (double(good.size()) * double(bad.size()));
}

void print_percentiles(const char* name, std::vector<double> scores) {
  std::sort(scores.begin(), scores.end());
  std::printf("%-5s", name);
  for (const int percent : {1, 5, 25, 50, 75, 95, 99}) {
    std::printf("  %.4f", scores[(scores.size() - 1) * size_t(percent) / 100]);
  }
  std::printf("\n");
}

void print_held_out(const QualityModel& model, const std::vector<QualityExample>& examples) {
  std::vector<double> scores[2];
  size_t right = 0;
  for (const QualityExample& e : examples) {
    const double score = QualityTraining::score(model, e);
    scores[e.good].push_back(score);
    right += (score >= .5) == e.good;
  }
  std::printf("held out: %zu good, %zu bad: accuracy %.4f, AUC %.4f\n", scores[1].size(),
              scores[0].size(), double(right) / double(examples.size()),
              area_under_curve(scores[1], scores[0]));
  std::printf(
      "percentile of score\n         1%%      5%%     25%%     50%%     75%%     95%%     99%%\n");
  print_percentiles("good", scores[1]);
  print_percentiles("bad", scores[0]);
}

}  // namespace

// Memory: 4 bytes for each distinct word and pair of words of a document.
void classify_train(const ClassifyOptions& options) {
  require(options.epochs > 0, "epochs: found ", options.epochs, ", expected 1 or more");
  std::vector<QualityExample> examples, held_out;
  size_t counts[2][2] = {};  // [held out][good]
  for (const bool good : {true, false}) {
    read_quality_pages(good ? options.good : options.bad, [&](const Page& page) {
      const bool hold_out = hash64(page.text) % 10 == 0;  // equal texts are on one side
      counts[hold_out][good]++;
      (hold_out ? held_out : examples).push_back({quality_buckets(page.text), good});
    });
  }
  for (const bool good : {true, false}) {
    const size_t all = counts[0][good] + counts[1][good];
    require(counts[0][good] > 0 && counts[1][good] > 0, good ? "good" : "bad", " documents: found ",
            all, ", of which ", counts[1][good],
            " are held out (a tenth, by their hashes), expected more");
  }
  std::printf("training on %s good and %s bad documents, %d epochs\n",
              count_text(double(counts[0][1])).c_str(), count_text(double(counts[0][0])).c_str(),
              options.epochs);
  std::fflush(stdout);
  const QualityModel model = QualityTraining::train(examples, options.epochs, options.seed);
  print_held_out(model, held_out);
  model.save(options.output);
}

// ---------------------------------------------------------------------------------------------
// Applying it. Scores are rounded to six decimals, as they are written; so the threshold of the
// best share is exact with a histogram of a million and one counts.

namespace {

constexpr uint32_t kQualityOne = 1000000;  // the score 1

uint32_t rounded_score(double score) { return uint32_t(std::lround(score * kQualityOne)); }

// The highest threshold that keeps at least this share.
uint32_t threshold_of_share(const std::vector<int64_t>& histogram, double keep) {
  int64_t all = 0, above = 0;
  for (const int64_t count : histogram) all += count;
  uint32_t threshold = kQualityOne + 1;
  while (threshold > 0 && double(above) < keep * double(all)) above += histogram[--threshold];
  return threshold;
}

// Calls body(page, rounded score) in order; texts are scored side by side.
template <class Body>
void score_pages(const std::vector<std::string>& inputs, const QualityModel& model, int threads,
                 const Body& body) {
  std::vector<Page> batch;
  std::vector<uint32_t> scores;
  size_t bytes = 0;
  const auto flush = [&] {
    scores.resize(batch.size());
    parallel_for(batch.size(), std::max(1, threads),
                 [&](size_t i, size_t) { scores[i] = rounded_score(model.score(batch[i].text)); });
    for (size_t i = 0; i < batch.size(); i++) body(batch[i], scores[i]);
    batch.clear(), bytes = 0;
  };
  read_quality_pages(inputs, [&](Page& page) {
    bytes += page.text.size();
    batch.push_back(std::move(page));
    if (bytes > (8 << 20) || batch.size() == 4096) flush();
  });
  flush();
}

// The other members of a JSON line, without the score of an earlier model.
std::string without_quality(const std::string& rest) {
  if (rest.find("\"quality\"") == std::string::npos) return rest;
  OrderedJson members = parse_json<OrderedJson>("{" + rest + "}", "members of a JSON line");
  members.erase("quality");
  const std::string text = json_line(members);
  return text.substr(1, text.size() - 3);  // without {, } and \n
}

std::string scored_line(const Page& page, uint32_t score) {
  std::string line = "{\"text\":";
  append_json_string(line, page.text);
  const auto add = [&](const char* key, const std::string& value) {
    if (value.empty()) return;
    line += concat(",\"", key, "\":");
    append_json_string(line, value);
  };
  add("url", page.url), add("id", page.id);
  const std::string rest = without_quality(page.rest);
  if (!rest.empty()) line += "," + rest;
  return line + format(",\"quality\":%u.%06u}\n", score / kQualityOne, score % kQualityOne);
}

}  // namespace

void classify_apply(const ClassifyOptions& options) {
  require(options.keep >= 0 && options.keep <= 1, "keep: found ", options.keep,
          ", expected a share from 0 to 1");
  require(options.min_score >= 0 && options.min_score <= 1, "min-score: found ", options.min_score,
          ", expected a probability from 0 to 1");
  const QualityModel model = QualityModel::load(options.model);
  uint32_t threshold = rounded_score(options.min_score);
  if (options.keep > 0) {
    for (const std::string& path : options.inputs) {
      require(path != "-", "standard input cannot be read twice, as --keep needs: give a file");
    }
    std::vector<int64_t> histogram(kQualityOne + 1);
    score_pages(options.inputs, model, options.threads,
                [&](const Page&, uint32_t score) { histogram[score]++; });
    threshold = threshold_of_share(histogram, options.keep);
  }
  TextFile out(options.output, options.threads);
  int64_t documents = 0, kept = 0;
  score_pages(options.inputs, model, options.threads, [&](const Page& page, uint32_t score) {
    documents++;
    if (score < threshold) return;
    kept++;
    out.write(scored_line(page, score));
  });
  out.commit();
  std::printf("kept %s of %s documents, with a score of %.6f or more\n",
              count_text(double(kept)).c_str(), count_text(double(documents)).c_str(),
              double(threshold) / kQualityOne);
}

}  // namespace cake::corpus
