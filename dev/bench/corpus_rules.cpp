// Measures the documents of a JSON Lines file ("text", "url") on one core: megabytes of text a
// second, without and with signatures and language.
//
//     make build/bench_rules
//     build/bench_rules FILE.jsonl           the rates
//     build/bench_rules FILE.jsonl verdicts  one JSON line for each document: the first FineWeb
//     rule
//                                            that it fails (language and URL apart), all values
#include <time.h>

#include <fstream>

#include "cake/corpus.h"
#include "cake/json.h"

using namespace cake;
using namespace cake::corpus;

namespace {

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

double processor_seconds() {  // of this thread: other programs do not count
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The best of some runs, in MB/s.
double rate(const std::vector<std::string>& texts, const MeasureOptions& options) {
  Measurer measurer(options);
  Measured measured;
  double bytes = 0, best = 1e30;
  for (const std::string& text : texts) bytes += double(text.size());
  for (int run = 0; run < 5; run++) {
    const double begin = processor_seconds();
    for (const std::string& text : texts) measurer.measure(text, "", measured);
    best = std::min(best, processor_seconds() - begin);
  }
  return bytes / 1e6 / best;
}

void print_verdicts(const std::vector<std::string>& texts) {
  MeasureOptions options;
  options.private_data = false;
  Thresholds thresholds = fineweb_thresholds();
  for (size_t i = 0; i < rules().size(); i++)
    if (rules()[i].filter == "language") thresholds[i] = kOff;
  Measurer measurer(options);
  Measured measured;
  for (const std::string& text : texts) {
    measurer.measure(text, "", measured);
    const int rule = first_failed(measured.values, thresholds);
    OrderedJson line = {{"reason", rule < 0 ? "kept" : std::string(rules()[size_t(rule)].name)}};
    for (size_t i = 0; i < measures().size(); i++)
      line[std::string(measures()[i].name)] = measured.values[i];
    line["language"] = measured.language;
    line["text"] = measured.text;
    std::fputs(json_line(line).c_str(), stdout);
  }
}

int run(int argc, char** argv) {
  if (argc < 2 || argc > 3) fail("usage: bench_rules FILE.jsonl [verdicts]");
  const std::vector<std::string> texts = read_texts(argv[1]);
  if (argc == 3) {
    print_verdicts(texts);
    return 0;
  }
  MeasureOptions options;
  size_t bytes = 0;
  for (const std::string& text : texts) bytes += text.size();
  std::printf("%zu documents, %s\n", texts.size(), bytes_text(double(bytes)).c_str());
  for (bool language : {false, true}) {
    for (bool signatures : {false, true}) {
      options.detect_language = language, options.signatures = signatures;
      std::printf("%-16s %-18s %7.1f MB/s\n", language ? "language" : "no language",
                  signatures ? "signatures" : "no signatures", rate(texts, options));
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return guarded_main([&] { return run(argc, argv); });
}
