// Duplicates: signatures, pairs, clusters, and repeated passages, against plain definitions.
#include <malloc.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <map>
#include <numeric>

#include "cake/corpus.h"
#include "test/support.h"

namespace cake::corpus {
namespace {

// Random signatures of few different hashes, so that there are many duplicates. Documents of one
// text have the same bands.
std::vector<Signature> random_signatures(Rng& rng, size_t n, uint64_t texts, uint64_t hashes) {
  std::vector<Signature> list(n);
  for (Signature& s : list) {
    const uint64_t text = rng.below(texts);
    s.text_hash = {mix64(text, 1), mix64(text, 2)};
    s.has_bands = text % 5 != 0;
    Rng of_text{mix64(text, 3)};
    for (size_t b = 0; b < kBands; b++) s.band_hashes[b] = mix64(b, of_text.below(hashes));
  }
  return list;
}

// A run of several tasks.
struct Tasks {
  std::vector<Signature> documents;
  std::vector<bool> considered;
  std::vector<SignatureFile> files;

  Tasks(const TempDir& dir, std::vector<Signature> list, std::vector<bool> take_part, size_t tasks)
      : documents(std::move(list)), considered(std::move(take_part)) {
    for (size_t t = 0; t < tasks; t++) {
      const size_t begin = documents.size() * t / tasks, end = documents.size() * (t + 1) / tasks;
      const auto path = dir / concat("signatures-", t);
      write_signatures(path, {documents.begin() + long(begin), documents.begin() + long(end)});
      files.push_back(
          {path, begin, {considered.begin() + long(begin), considered.begin() + long(end)}});
    }
  }
};

std::vector<std::filesystem::path> all_pairs(const std::vector<SignatureFile>& files,
                                             const DedupOptions& options,
                                             const std::filesystem::path& prefix) {
  std::vector<std::filesystem::path> paths;
  for (int pass = 0; pass <= kBands; pass++) {
    paths.push_back(prefix.string() + std::to_string(pass));
    find_pairs(files, pass, options, paths.back());
  }
  return paths;
}

// The definition, in O(n^2).
std::vector<Duplicate> duplicates_by_hand(const std::vector<Signature>& list,
                                          const std::vector<bool>& considered, bool exact,
                                          bool near) {
  const size_t n = list.size();
  std::vector<size_t> same_text(n), group(n);
  std::iota(same_text.begin(), same_text.end(), 0);
  std::iota(group.begin(), group.end(), 0);
  for (size_t i = 0; i < n && exact; i++) {
    for (size_t j = 0; j < i && considered[i] && same_text[i] == i; j++) {
      if (considered[j] && list[i].text_hash == list[j].text_hash) same_text[i] = j;
    }
  }
  const auto is_near = [&](size_t i, size_t j) {
    if (!list[i].has_bands || !list[j].has_bands) return false;
    for (size_t b = 0; b < kBands; b++) {
      if (list[i].band_hashes[b] == list[j].band_hashes[b]) return true;
    }
    return false;
  };
  const auto takes_part = [&](size_t i) { return near && considered[i] && same_text[i] == i; };
  for (bool changed = true; changed;) {  // the smallest number spreads through a cluster
    changed = false;
    for (size_t i = 0; i < n; i++) {
      for (size_t j = 0; j < n; j++) {
        if (takes_part(i) && takes_part(j) && group[j] < group[i] && is_near(i, j)) {
          group[i] = group[j], changed = true;
        }
      }
    }
  }
  std::vector<Duplicate> duplicates;
  for (size_t i = 0; i < n; i++) {
    if (same_text[i] != i) duplicates.push_back({i, same_text[i], true});
    if (same_text[i] == i && group[i] != i) duplicates.push_back({i, group[i], false});
  }
  return duplicates;
}

std::vector<Duplicate> duplicates_of(const TempDir& dir, const Tasks& tasks,
                                     DedupOptions options = {}) {
  options.folder = dir.path();
  return cluster(all_pairs(tasks.files, options, dir / "pairs-"), tasks.documents.size(), options);
}

TEST_CASE("duplicates are those of the definition") {
  Rng rng{71};
  size_t exact = 0, near = 0, none = 0;
  for (int round = 0; round < 7; round++) {
    CAPTURE(round);
    const TempDir dir;
    const size_t n = rng.below(300);
    auto list = random_signatures(rng, n, 1 + rng.below(300), 1 + rng.below(3000));
    std::vector<bool> considered(n);
    for (size_t i = 0; i < n; i++) considered[i] = rng.below(8) != 0;
    const Tasks tasks(dir, std::move(list), std::move(considered), 1 + rng.below(5));
    DedupOptions options;
    options.exact = round % 7 != 5, options.near = round % 7 != 6;
    options.memory = round % 2 ? 100 : 1 << 20;
    options.threads = 1 + round % 3;
    const auto found = duplicates_of(dir, tasks, options);
    REQUIRE(found ==
            duplicates_by_hand(tasks.documents, tasks.considered, options.exact, options.near));
    for (const Duplicate& d : found) (d.exact ? exact : near)++;
    none += n - found.size();
  }
  CHECK(exact > 100);
  CHECK(near > 100);
  CHECK(none > 100);
}

Signature signature_of(uint64_t text, std::map<size_t, uint64_t> bands) {
  Signature s;
  s.text_hash = {text, text};
  s.has_bands = true;
  for (size_t b = 0; b < kBands; b++) {
    s.band_hashes[b] = bands.count(b) ? bands[b] : mix64(text, b);
  }
  return s;
}

TEST_CASE("an exact duplicate does not break a chain of near duplicates") {
  const TempDir dir;
  // 2 repeats 0's text; only 2's and 3's band is shared with it, and 3 is near 1.
  Signature a = signature_of(10, {{4, 77}}), c = signature_of(12, {{4, 77}, {9, 5}});
  Signature b = signature_of(11, {{9, 5}});
  const Tasks tasks(dir, {a, b, a, c}, {true, true, true, true}, 2);
  const std::vector<Duplicate> expected = {{1, 0, false}, {2, 0, true}, {3, 0, false}};
  CHECK(duplicates_of(dir, tasks) == expected);
  // Without document 0, the text of 2 is the first of its kind.
  const Tasks without(dir, {a, b, a, c}, {false, true, true, true}, 2);
  const std::vector<Duplicate> rest = {{2, 1, false}, {3, 1, false}};
  CHECK(duplicates_of(dir, without) == rest);
}

TEST_CASE("a hash counts only in its own band, and only where a document has bands") {
  const TempDir dir;
  Signature a = signature_of(1, {{0, 99}}), b = signature_of(2, {{1, 99}});
  Signature c = signature_of(3, {{0, 99}});
  c.has_bands = false;
  CHECK(duplicates_of(dir, Tasks(dir, {a, b, c}, {true, true, true}, 1)).empty());
  c.has_bands = true;
  CHECK(duplicates_of(dir, Tasks(dir, {a, b, c}, {true, true, true}, 1)) ==
        std::vector<Duplicate>{{2, 0, false}});
  Signature d = signature_of(4, {});
  d.text_hash = {1, 2};  // one half of the text's hash is not enough
  CHECK(duplicates_of(dir, Tasks(dir, {a, d}, {true, true}, 1)).empty());
}

TEST_CASE("no documents have no duplicates") {
  const TempDir dir;
  CHECK(duplicates_of(dir, Tasks(dir, {}, {}, 3)).empty());
  CHECK(cluster(all_pairs({}, {}, dir / "none-"), 0, {}).empty());
}

TEST_CASE("the bytes of pairs depend on the signatures alone") {
  const TempDir dir;
  Rng rng{72};
  auto list = random_signatures(rng, 3000, 1500, 4000);
  for (size_t i = 0; i < 700; i++) list[4 * i] = list[4];  // one text much more often than others
  const std::vector<bool> considered(list.size(), true);
  const Tasks one(dir, list, considered, 1);
  std::filesystem::create_directory(dir / "many");
  std::map<std::string, std::string> expected;
  for (const auto& path : all_pairs(one.files, {}, dir / "whole-")) {
    expected[path.filename().string().substr(6)] = read_file(path);
  }
  CHECK(expected["0"].size() > 1000 * 16);
  CHECK(expected["7"].size() > 700 * 16);
  const TempDir other;
  Tasks many(other, list, considered, 23);
  for (const auto& [threads, memory] : {std::pair{1, 1600}, {4, 20000}, {3, 1 << 30}}) {
    DedupOptions options;
    options.threads = threads, options.memory = size_t(memory);
    std::reverse(many.files.begin(), many.files.end());
    for (const auto& path : all_pairs(many.files, options, other / "part-")) {
      CAPTURE(path);
      CHECK((read_file(path) == expected[path.filename().string().substr(5)]));
    }
  }
  auto paths = all_pairs(one.files, {}, dir / "whole-");
  const auto clusters = cluster(paths, list.size(), {});
  std::reverse(paths.begin(), paths.end());
  DedupOptions spilled;
  spilled.memory = 1000, spilled.folder = dir.path();
  const size_t files = files_below(dir.path()).size();
  CHECK(cluster(paths, list.size(), spilled) == clusters);
  CHECK(files_below(dir.path()).size() == files);  // no temporary file is left
}

// Texts of made-up words. The second of each two has the words of the first, but for some.
std::vector<std::string> near_duplicate_texts(Rng& rng, size_t pairs, size_t words) {
  const auto word = [&] {
    std::string text;
    for (int i = 0; i < 3; i++) text += {"bdfgklmnprst"[rng.below(12)], "aeiou"[rng.below(5)]};
    return text;
  };
  std::vector<std::string> texts;
  for (size_t i = 0; i < pairs; i++) {
    std::string first, second;
    const double changed = .08 * rng.uniform();
    for (size_t k = 0; k < words; k++) {
      const std::string w = word();
      first += w + " ", second += (rng.uniform() < changed ? word() : w) + " ";
    }
    texts.push_back(first), texts.push_back(second);
  }
  return texts;
}

// Of the sets of 5 words in a row.
double jaccard(const std::string& a, const std::string& b) {
  const auto shingles = [](const std::string& text) {
    std::istringstream in(text);
    const std::vector<std::string> words(std::istream_iterator<std::string>(in), {});
    std::set<std::string> result;
    for (size_t i = 0; i + 5 <= words.size(); i++) {
      std::string shingle;
      for (size_t k = i; k < i + 5; k++) shingle += words[k] + " ";
      result.insert(shingle);
    }
    return result;
  };
  const auto sa = shingles(a), sb = shingles(b);
  double both = 0;
  for (const std::string& s : sa) both += double(sb.count(s));
  return both / (double(sa.size() + sb.size()) - both);
}

TEST_CASE("near duplicates are found as often as MinHash's theory says") {
  const TempDir dir;
  Rng rng{75};
  constexpr size_t kPairs = 400;
  const auto texts = near_duplicate_texts(rng, kPairs, 100);
  MeasureOptions options;
  options.languages = {}, options.c4_lines = options.private_data = false;
  Measurer measurer(options);
  std::vector<Signature> signatures;
  for (const std::string& text : texts) {
    Measured measured;
    measurer.measure(text, "", measured);
    signatures.push_back(measured.signature);
  }
  const std::vector<bool> all(texts.size(), true);
  std::vector<Duplicate> found = duplicates_of(dir, Tasks(dir, signatures, all, 3));
  std::set<uint64_t> duplicates;
  for (const Duplicate& d : found) {
    CHECK(d.document == d.original + 1);  // no two of different texts
    CHECK(d.document % 2 == 1);
    CHECK(d.exact == (texts[d.document] == texts[d.original]));
    duplicates.insert(d.document);
  }
  struct Bin {
    double pairs = 0, found = 0, expected = 0, variance = 0;
  };
  std::vector<Bin> bins(4);  // by similarity
  for (size_t i = 0; i < kPairs; i++) {
    const double s = jaccard(texts[2 * i], texts[2 * i + 1]);
    const double p = 1 - std::pow(1 - std::pow(s, kHashesPerBand), kBands);
    Bin& bin = bins[s < .6 ? 0 : s < .72 ? 1 : s < .85 ? 2 : 3];
    bin.pairs++, bin.found += double(duplicates.count(2 * i + 1));
    bin.expected += p, bin.variance += p * (1 - p);
  }
  for (const Bin& bin : bins) {
    CAPTURE(bin.pairs);
    CHECK(bin.pairs > 40);
    CHECK(std::fabs(bin.found - bin.expected) < 4 * std::sqrt(bin.variance) + 1);
  }
}

#ifndef __SANITIZE_ADDRESS__  // which takes more memory than the bound

// Peak memory of a process of its own, in bytes.
template <class Body>
int64_t peak_memory(const Body& body) {
  malloc_trim(0);  // the child begins without memory that is free already
  const pid_t child = fork();
  if (child == 0) {
    try {
      body();
    } catch (...) {
      _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  struct rusage usage = {};
  REQUIRE(wait4(child, &status, 0, &usage) == child);
  REQUIRE(status == 0);
  return usage.ru_maxrss * 1024;
}

TEST_CASE("memory for pairs stays within its bound") {
  const TempDir dir;
  constexpr size_t kDocuments = 1 << 19, kTasks = 8;
  std::vector<SignatureFile> files;
  for (size_t t = 0; t < kTasks; t++) {
    std::vector<Signature> list(kDocuments / kTasks);
    for (size_t i = 0; i < list.size(); i++) {
      list[i].text_hash = {mix64(t, i, 1), mix64(t, i, 2)};
      list[i].band_hashes.fill(i % 4 ? mix64(t, i) : 5);  // a quarter has the same band
      list[i].has_bands = true;
    }
    files.push_back({dir / concat(t), t * list.size(), std::vector<bool>(list.size(), true)});
    write_signatures(files.back().path, list);
  }
  const auto run = [&](size_t memory, int pass) {
    return peak_memory([&] {
      DedupOptions options;
      options.memory = memory;
      find_pairs(files, pass, options, dir / concat("pairs-", pass, "-", memory));
    });
  };
  const int64_t nothing = peak_memory([] {});
  for (const int pass : {0, 3}) {
    CAPTURE(pass);
    const size_t record = pass == 0 ? 24 : 16;  // bytes
    const size_t small = kDocuments * record / 8, large = kDocuments * record;
    const int64_t overhead = 6 << 20;  // counts, slices and the allocator
    CHECK(run(small, pass) < nothing + int64_t(small) + overhead);
    CHECK(run(large, pass) > nothing + int64_t(large / 2));  // the test can fail
    CHECK((read_file(dir / concat("pairs-", pass, "-", small)) ==
           read_file(dir / concat("pairs-", pass, "-", large))));
  }
}

#endif

TEST_CASE("damaged files of signatures and pairs are refused in one line") {
  const TempDir dir;
  Rng rng{73};
  const auto list = random_signatures(rng, 20, 10, 10);
  const auto signatures = dir / "signatures", pairs = dir / "pairs";
  const std::vector<bool> all(20, true);
  write_signatures(signatures, list);
  find_pairs({{signatures, 0, all}}, 0, {}, pairs);
  const std::string good = read_file(signatures), good_pairs = read_file(pairs);
  DedupOptions exact_only;
  exact_only.near = false;
  const auto read_signatures = [&](const std::string& bytes, const std::vector<bool>& considered) {
    write_file(signatures, bytes);
    return error_of([&] { find_pairs({{signatures, 0, considered}}, 3, {}, dir / "out"); });
  };
  const auto read_pair_file = [&](const std::string& bytes, uint64_t documents) {
    write_file(pairs, bytes);
    return error_of([&] { cluster({pairs}, documents, exact_only); });
  };
  CHECK(read_signatures(good, all) == "no error");
  CHECK(read_pair_file(good_pairs, 20) == "no error");
  for (const size_t size : {size_t(0), size_t(5), size_t(23), size_t(24), good.size() - 1}) {
    const std::string error = read_signatures(good.substr(0, size), all);
    CHECK_MESSAGE(contains(error, signatures.string() + ": found "), error);
    CHECK(contains(error, ", expected "));
  }
  for (const size_t size : {size_t(0), size_t(23), good_pairs.size() - 1}) {
    const std::string error = read_pair_file(good_pairs.substr(0, size), 20);
    CHECK_MESSAGE(contains(error, pairs.string() + ": found "), error);
  }
  std::string lying = good;
  lying.replace(16, 8, "\xff\xff\xff\xff\xff\xff\xff\xff");
  CHECK(contains(read_signatures(lying, all), "truncated or damaged"));
  lying = good_pairs;
  lying.replace(16, 8, "\xff\xff\xff\xff\xff\xff\xff\xff");
  CHECK(contains(read_pair_file(lying, 20), "truncated or damaged"));
  CHECK(contains(read_signatures(good + "x", all), "truncated or damaged"));
  lying = good, lying[8] = 2;
  CHECK(contains(read_signatures(lying, all), "found signatures of version 2"));
  lying = good_pairs, lying[8] = 2;
  CHECK(contains(read_pair_file(lying, 20), "found pairs of version 2"));
  CHECK(contains(read_signatures(good, std::vector<bool>(19, true)),
                 "found the signatures of 20 documents, expected 19"));
  CHECK(contains(read_signatures(good_pairs, all), "expected a file of signatures"));
  CHECK(contains(read_pair_file(good, 20), "expected a file of pairs"));
  CHECK(contains(read_pair_file(good_pairs, 3), "expected numbers of 3 documents"));
  write_file(pairs, good_pairs);
  CHECK(contains(error_of([&] { cluster({pairs}, 20, {}); }), "pass 1 are missing"));
  CHECK(contains(error_of([&] { cluster({pairs, pairs}, 20, exact_only); }), "found pass 0"));
  CHECK(contains(error_of([&] { find_pairs({}, 15, {}, dir / "out"); }), "found pass 15"));
}

// ---------------------------------------------------------------------------------------------
// Repeated passages

// The definition, in O(n^2): the bytes of every window that stands wholly before, removed.
std::vector<std::string> without_repeats_by_hand(const std::vector<std::string>& texts,
                                                 size_t min_bytes) {
  std::vector<std::string> result;
  for (size_t t = 0; t < texts.size(); t++) {
    std::vector<bool> removed(texts[t].size());
    for (size_t i = 0; i + min_bytes <= texts[t].size(); i++) {
      const std::string window = texts[t].substr(i, min_bytes);
      bool before = texts[t].substr(0, i).find(window) != std::string::npos;
      for (size_t u = 0; u < t; u++) before = before || contains(texts[u], window);
      for (size_t k = i; before && k < i + min_bytes; k++) removed[k] = true;
    }
    std::string kept;
    for (size_t i = 0; i < removed.size(); i++)
      if (!removed[i]) kept += texts[t][i];
    result.push_back(kept);
  }
  return result;
}

TEST_CASE("repeated passages are those of the definition, and the first copy stays") {
  Rng rng{74};
  int64_t removed = 0, kept = 0;
  for (int round = 0; round < 300; round++) {
    CAPTURE(round);
    std::vector<std::string> texts(rng.below(6));
    for (std::string& text : texts) {
      for (size_t n = rng.below(60); text.size() < n;) {
        text += char('a' + rng.below(1 + uint64_t(round) % 5));
      }
    }
    const size_t min_bytes = 1 + rng.below(7);
    const auto expected = without_repeats_by_hand(texts, min_bytes);
    const auto before = texts;
    const auto bytes = remove_repeated_substrings(texts, min_bytes);
    REQUIRE(texts == expected);
    REQUIRE(bytes.size() == texts.size());
    for (size_t i = 0; i < texts.size(); i++) {
      REQUIRE(bytes[i] == int64_t(before[i].size() - texts[i].size()));
      removed += bytes[i], kept += int64_t(texts[i].size());
    }
  }
  CHECK(removed > 1000);
  CHECK(kept > 1000);
}

TEST_CASE("a passage is never matched across two texts, and one that repeats itself keeps a copy") {
  std::vector<std::string> texts = {"abcd", "efgh", "abcdefgh", "xefghx"};
  const auto whole = texts;
  CHECK(remove_repeated_substrings(texts, 5) == std::vector<int64_t>{0, 0, 0, 0});
  CHECK(texts == whole);
  CHECK(remove_repeated_substrings(texts, 4) == std::vector<int64_t>{0, 0, 8, 4});
  CHECK(texts == std::vector<std::string>{"abcd", "efgh", "", "xx"});
  std::string again;
  for (int i = 0; i < 1000; i++) again += "ab";
  texts = {again, again};
  remove_repeated_substrings(texts, 10);
  CHECK(texts == std::vector<std::string>{"ababababab", ""});
  CHECK(contains(error_of([&] { remove_repeated_substrings(texts, 0); }), "expected 1 or more"));
  texts.clear();
  CHECK(remove_repeated_substrings(texts, 10).empty());
}

TEST_CASE("a cut inside a character moves inward") {
  // The repeated bytes begin with the second byte of "é" (c3 a9), which is that of "©" (c2 a9)
  // too, and end with the first byte of "ü" (c3 bc), which is that of "ö" (c3 b6) too.
  std::vector<std::string> texts = {"1éabcdefgü1", "2©abcdefgö2"};
  CHECK(remove_repeated_substrings(texts, 6) == std::vector<int64_t>{0, 7});
  CHECK(texts == std::vector<std::string>{"1éabcdefgü1", "2©ö2"});
  std::vector<std::string> damaged = {std::string(40, '\x80'), std::string(40, '\x80')};
  remove_repeated_substrings(damaged, 6);  // bytes that are no UTF-8 at all: nothing to be said
  CHECK(damaged.size() == 2);
}

TEST_CASE("repeated passages of real text are found wherever they stand") {
  if (skip_without_data("text/wikitext2_valid.txt")) return;
  const std::string wiki = read_file(data_path("text/wikitext2_valid.txt")).substr(0, 400000);
  std::vector<std::string> texts = {wiki};
  remove_repeated_substrings(texts, 200);
  const std::string alone = texts[0];
  CHECK(alone.size() > wiki.size() * 97 / 100);
  texts = {wiki, "before " + wiki.substr(1000, 300) + " behind", wiki};
  remove_repeated_substrings(texts, 200);
  CHECK(texts[0] == alone);
  CHECK(contains(texts[1], "before"));
  CHECK(contains(texts[1], "behind"));
  CHECK(texts[1].size() < 20);
  CHECK(texts[2].empty());
}

}  // namespace
}  // namespace cake::corpus
