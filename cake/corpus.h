// What corpus.cpp is made of, for its tests and benchmarks: pages -> main text -> values of rules
// -> verdicts -> a deduplicated corpus.
//
//     PageReader (cake/pages.h) --Page--> extract --text--> Measurer --Measured--> verdicts
//         --signatures--> find_duplicates --Verdict--> documents.jsonl.zst, verdicts, report
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/pages.h"
#include "cake/run.h"

namespace cake::corpus {

// ---------------------------------------------------------------------------------------------
// Output

// A text file, complete or not there at all; "-" is standard output. A name that ends in .zst:
// Zstandard frames of 4 MB of whole lines, compressed side by side; the bytes depend on the text
// alone.
class TextFile {
 public:
  TextFile(const std::filesystem::path&, int threads);
  void write(std::string_view lines);  // whole lines
  void commit();

 private:
  void compress();
  std::optional<AtomicFile> file_;
  bool zstd_;
  size_t threads_;
  bool is_empty_ = true;             // nothing has been written
  std::vector<std::string> frames_;  // the last one is being filled
};

// ---------------------------------------------------------------------------------------------
// Main text of a page of HTML

enum class ExtractMode { precision, balanced, recall };
struct ExtractOptions {
  ExtractMode mode = ExtractMode::balanced;
  bool rules = false;  // without the learned classifier of blocks: hand-written rules alone
};
struct Extracted {
  std::string text, title;  // UTF-8; text: blocks in the page's order, lines joined by \n
  size_t html_bytes = 0;    // of the page, and of these what the HTML parser was given
  size_t parsed_bytes = 0;
};
// Never throws on any bytes. `url` may be empty.
Extracted extract(std::string_view html, std::string_view url, const ExtractOptions& = {});

// For training and tests: the blocks of a page, their features (blocks, features) and what the
// classifier says of each; and extract() with probabilities from elsewhere, one for each block.
struct ExtractBlocks {
  std::vector<std::string> texts;
  std::vector<float> features, probabilities;
};
ExtractBlocks extract_blocks(std::string_view html, std::string_view url);
Extracted extract_chosen(std::string_view html, std::string_view url, ExtractMode,
                         std::span<const float> probabilities);
std::vector<std::string> extract_feature_names();

// ---------------------------------------------------------------------------------------------
// Rules: each compares one measure of a document with a threshold

struct Measure {
  std::string_view name;  // its key in verdicts: "words"
  std::string_view help;  // what it is, with its unit
};
struct Rule {
  std::string_view name;                        // "min-words": its flag is --min-words
  std::string_view filter;                      // the group of FineWeb's recipe: "gopher_quality"
  int measure = 0;                              // index into measures()
  enum Direction { min, max } direction = max;  // dropped when value < / > threshold; NaN: passes
  double fineweb = 0;  // FineWeb's threshold; NaN: FineWeb has no such rule
};
std::span<const Measure> measures();
std::span<const Rule> rules();  // in the order in which they are applied: the first that fails wins

inline constexpr double kOff = std::numeric_limits<double>::quiet_NaN();  // a rule not applied
using Thresholds = std::vector<double>;  // one for each rule, kOff where it is not applied
Thresholds fineweb_thresholds();
// The index of the first rule that the values fail, -1: none.
int first_failed(std::span<const double> values, std::span<const double> thresholds);

inline constexpr int kBands = 14, kHashesPerBand = 8;  // MinHash as FineWeb sets it
struct Signature {
  std::array<uint64_t, 2> text_hash{};         // of the whole text: exact duplicates
  std::array<uint64_t, kBands> band_hashes{};  // equal in a band: near duplicates
  bool has_bands = false;                      // fewer than 5 words: no near duplicates
};

// The steps of a signature and of the other measures, for their tests. Texts are valid UTF-8.
std::vector<std::string_view> split_words(std::string_view text);  // pointing into the text
std::string normal_form(std::string_view text);                    // "Café 3,1!": "cafe 0"
std::vector<uint64_t> shingles(std::string_view text);             // hashes of its word 5-grams
using MinHashes = std::array<std::array<uint64_t, kHashesPerBand>, kBands>;
MinHashes min_hashes(std::span<const uint64_t> shingles);
MinHashes min_hashes_plain(std::span<const uint64_t> shingles);         // their definition
int64_t replace_private_data(std::string_view text, std::string& out);  // appends; their number

struct MeasureOptions {
  std::vector<std::string> languages = {"en"};  // wanted, ISO 639-1; empty: any
  bool detect_language = true;                  // false: "un", and its share is not measured
  std::vector<std::string> blocked_domains, blocked_hosts, blocked_urls;  // paths of lists
  std::vector<std::string> banned_words, soft_banned_words, banned_substrings;
  int min_line_words = 3, max_word_characters = 1000;  // C4's, by line
  bool c4_lines = true;                                // the text becomes the lines that C4 keeps
  bool private_data = true;  // e-mail and IP addresses are replaced in the text that is kept
  bool signatures = true;
  std::vector<std::string> decontaminate;  // JSON lines whose strings must not occur
  std::string quality_model;               // of `corpus classify train`
};

struct Measured {
  std::vector<double> values;  // one for each measure; NaN: not measured
  std::string language;        // ISO 639-1, "un" unknown
  std::string match;           // what a list or the decontamination found; empty: nothing
  std::string text;            // as it is kept
  int64_t private_data = 0;    // addresses replaced
  Signature signature;
};

// Measures documents one after another; one for each thread. Copies share what is read only.
class Measurer {
 public:
  explicit Measurer(const MeasureOptions&);  // reads the lists: may throw
  Measurer(const Measurer&);
  Measurer(Measurer&&) noexcept;
  ~Measurer();
  void measure(std::string_view text, std::string_view url, Measured& out);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// ---------------------------------------------------------------------------------------------
// Decontamination and the quality classifier: used by Measurer

// Word 13-grams (words of letters and digits, lower case) of evaluation sets: files of JSON lines,
// of which all strings are taken, or of plain text.
class Contamination {
 public:
  explicit Contamination(const std::vector<std::string>& paths);
  struct Match {
    int64_t ngrams = 0;   // of the text, that an evaluation set holds too
    std::string example;  // the first: 'file:line: "the 13 words"'
  };
  Match find(std::string_view text) const;
  struct Counts {
    int64_t strings = 0, short_strings = 0;  // short: fewer than 13 words, can never match
    int64_t ngrams = 0;                      // different ones
  };
  const Counts& counts() const;  // to be told to the user

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// A linear model over hashed words and pairs of words: the probability that a text is of the good
// kind.
class QualityModel {
 public:
  static QualityModel load(const std::filesystem::path&);
  void save(const std::filesystem::path&) const;
  double score(std::string_view text) const;  // 0 to 1

 private:
  friend struct QualityTraining;
  std::vector<float> weights_;  // one for each bucket
  float bias_ = 0;
};
struct ClassifyOptions {
  std::vector<std::string> good, bad, inputs;
  std::string model, output;  // train writes the model to `output`
  double keep = 0;            // of the inputs, the best share; 0: min_score decides
  double min_score = 0;       // lowest score that is kept
  int epochs = 3;
  uint64_t seed = 1;
  int threads = 1;  // of apply; the output does not depend on them
};
void classify_train(const ClassifyOptions&);
void classify_apply(const ClassifyOptions&);

// ---------------------------------------------------------------------------------------------
// Duplicates. A document is numbered by its place among all documents of a run.

// The signatures of one task's documents, in order: a file that stores them column by column, and
// that is read in slices.
void write_signatures(const std::filesystem::path&, std::span<const Signature>);

struct SignatureFile {
  std::filesystem::path path;
  uint64_t first_document = 0;   // number of its first document
  std::vector<bool> considered;  // false: dropped before, takes no part
};
struct DedupOptions {
  bool exact = true, near = true;
  size_t memory = size_t(1) << 30;  // bytes, at most, for what is sorted at once
  int threads = 1;
  std::filesystem::path folder;  // for temporary files
};
struct Duplicate {
  uint64_t document = 0, original = 0;  // numbers; original: the first of its cluster
  bool exact = false;
  bool operator==(const Duplicate&) const = default;
};
// In order of `document`. Pass one of `kBands + 1`: pairs of one column (the text's hash, then the
// bands), written to `out`; any process may do any pass.
void find_pairs(const std::vector<SignatureFile>&, int pass, const DedupOptions&,
                const std::filesystem::path& out);
// From the files of all passes; exact duplicates are taken out before near ones are clustered.
std::vector<Duplicate> cluster(const std::vector<std::filesystem::path>& pairs, uint64_t documents,
                               const DedupOptions&);

// Exact substrings of `min_bytes` or more that occurred earlier, removed from the texts (first copy
// kept; cut at UTF-8 boundaries). texts: in order; returns the bytes removed of each.
std::vector<int64_t> remove_repeated_substrings(std::vector<std::string>& texts, size_t min_bytes);

// ---------------------------------------------------------------------------------------------
// Verdicts: one for each document, kept or dropped; a line of DIR/verdicts.jsonl.zst

struct Verdict {
  Place place;
  std::string url, id, language, match;
  std::vector<double> values;     // one for each measure
  int64_t bytes = 0;              // of the text before the rules
  int64_t private_data = 0;       // addresses replaced
  std::string begins;             // the text's first characters, to be looked at
  int rule = -1;                  // index into rules(): the first it fails; -1: none
  std::optional<Place> original;  // of which it is a duplicate
  bool exact = false;             // an exact one
  bool empty = false;             // no text is left, whatever the rules say
  int64_t repeated_bytes = 0;     // removed: exact substrings of earlier documents
  bool kept() const { return rule < 0 && !original && !empty; }
  // "kept", a rule's name, "empty", "exact-duplicate" or "near-duplicate".
  std::string_view reason() const;
};
std::string verdict_line(const Verdict&);  // with \n; the same doubles come back
Verdict parse_verdict(std::string_view line, const std::string& where);

// Report: DIR/report.html from DIR/verdicts.jsonl.zst and DIR/summary.json, which write_summary in
// corpus.cpp writes.
void write_report(const std::filesystem::path& dir);

}  // namespace cake::corpus
