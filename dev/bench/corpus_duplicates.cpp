// Measures what the corpus stage does besides rules, on one core, in processor time: duplicates of
// made-up signatures with two bounds on memory, repeated passages, decontamination and the quality
// score on the texts of JSON Lines files.
//
//     make build/bench_duplicates
//     build/bench_duplicates DOCUMENTS EVALUATION.jsonl FILE.jsonl...
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <fstream>

#include "cake/corpus.h"
#include "cake/json.h"

using namespace cake;
using namespace cake::corpus;

namespace {

double processor_seconds() {  // of this thread: other programs do not count
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

double peak_megabytes() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_maxrss) / 1024;
}

// About a tenth of the documents repeats another text, a fifth of the others another's first band.
std::vector<SignatureFile> write_made_up_signatures(const std::filesystem::path& dir,
                                                    size_t documents) {
  constexpr size_t kTask = 50000;
  std::vector<SignatureFile> files;
  for (size_t begin = 0; begin < documents; begin += kTask) {
    std::vector<Signature> list(std::min(kTask, documents - begin));
    for (size_t i = 0; i < list.size(); i++) {
      Rng rng{mix64(begin + i)};
      const uint64_t shared = documents + rng.below(documents);
      const bool repeats = rng.below(10) == 0;
      const uint64_t text = repeats ? shared : documents + begin + i;
      list[i].text_hash = {mix64(text, 1), mix64(text, 2)};
      list[i].has_bands = true;
      for (uint64_t b = 0; b < kBands; b++) list[i].band_hashes[b] = mix64(text, b, 3);
      if (!repeats && rng.below(5) == 0) list[i].band_hashes[0] = mix64(shared, 0, 3);
    }
    files.push_back(
        {dir / concat("signatures-", files.size()), begin, std::vector<bool>(list.size(), true)});
    write_signatures(files.back().path, list);
  }
  return files;
}

void bench_pairs(size_t documents) {
  const auto dir = std::filesystem::temp_directory_path() / concat("bench-", getpid());
  std::filesystem::create_directory(dir);
  const std::vector<SignatureFile> files = write_made_up_signatures(dir, documents);
  for (const size_t bytes : {documents, 32 * documents}) {  // a sixteenth of the records; all
    DedupOptions options;
    options.memory = bytes, options.folder = dir;
    std::vector<std::filesystem::path> pairs;
    const double begin = processor_seconds();
    for (int pass = 0; pass <= kBands; pass++) {
      pairs.push_back(dir / concat("pairs-", pass));
      find_pairs(files, pass, options, pairs.back());
    }
    const double middle = processor_seconds(), peak = peak_megabytes();
    const size_t found = cluster(pairs, documents, options).size();
    const double seconds = processor_seconds() - begin;
    std::printf(
        "%s documents within %s: pairs %.1f s, peak memory until then %.0f MB, clusters %.1f s: "
        "%.0fM documents an hour, %zu duplicates\n",
        count_text(double(documents)).c_str(), bytes_text(double(bytes)).c_str(), middle - begin,
        peak, seconds - (middle - begin), double(documents) / seconds * 3600 / 1e6, found);
  }
  std::filesystem::remove_all(dir);
}

std::vector<std::string> read_texts(const std::string& path) {
  std::ifstream in(path);
  if (!in) fail(path, ": cannot open: ", errno_text());
  std::vector<std::string> texts;
  int64_t number = 1;
  for (std::string line; std::getline(in, line); number++) {
    const std::string where = concat(path, ":", number);
    texts.push_back(json_get<std::string>(parse_json(line, where), "text", where));
  }
  return texts;
}

// Prints the best of three runs.
template <class Body>
void bench_texts(const char* name, const std::vector<std::string>& texts, const Body& body) {
  double bytes = 0, best = 1e30;
  for (const std::string& text : texts) bytes += double(text.size());
  for (int i = 0; i < 3; i++) {
    const double begin = processor_seconds();
    body();
    best = std::min(best, processor_seconds() - begin);
  }
  std::printf("%s: %.1f MB/s\n", name, bytes / 1e6 / best);
}

int run(int argc, char** argv) {
  require(argc > 3, "usage: bench_duplicates DOCUMENTS EVALUATION.jsonl FILE.jsonl...");
  bench_pairs(std::stoull(argv[1]));
  std::vector<std::string> texts;
  for (int i = 3; i < argc; i++) {
    for (std::string& text : read_texts(argv[i])) texts.push_back(std::move(text));
  }
  bench_texts("repeated passages of 100 bytes", texts, [&] {
    std::vector<std::string> copy = texts;
    remove_repeated_substrings(copy, 100);
  });
  const Contamination sets({argv[2]});
  int64_t hits = 0;
  bench_texts("decontamination", texts, [&] {
    for (const std::string& text : texts) hits += sets.find(text).ngrams;
  });
  std::printf("  against %s n-grams; found %s\n", count_text(double(sets.counts().ngrams)).c_str(),
              count_text(double(hits / 3)).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return guarded_main([&] { return run(argc, argv); });
}
