// For dev/extraction.py and dev/bench/extraction.py: what corpus_extract.cpp makes of pages.
//
//     extraction_blocks blocks PAGES OUT      blocks, features, probabilities of each page
//     extraction_blocks texts PAGES OUT [MODE [PROBABILITIES]]    a line of JSON for each page
//     extraction_blocks time PAGES            processor time on one core
//     extraction_blocks names                 the names of features, one a line
//
// PAGES: JSON lines with "html" and "url". MODE: precision, balanced, recall, rules. Numbers are
// little endian. `blocks` writes for each page: int32 blocks, int32 features, float32 features
// (blocks, features), float32 probabilities (blocks), and for each block int32 bytes and its text.
// PROBABILITIES: float32, of the blocks of all pages.
#include <cstdio>
#include <ctime>
#include <fstream>

#include "cake/corpus.h"
#include "cake/json.h"

namespace {

using namespace cake;
using namespace cake::corpus;

struct PageLine {
  std::string html, url;
};
template <class Visit>
void each_page(const std::string& path, Visit visit) {
  std::ifstream in(path);
  require(bool(in), path, ": cannot be read");
  size_t number = 0;
  for (std::string line; std::getline(in, line);) {
    const std::string where = concat(path, ":", ++number);
    const Json json = parse_json(line, where);
    visit(PageLine{json_get<std::string>(json, "html", where),
                   json_get_or<std::string>(json, "url", "", where)});
  }
}

void put_int(std::ofstream& out, size_t value) {
  const int32_t x = int32_t(value);
  out.write(reinterpret_cast<const char*>(&x), sizeof x);
}
void put_floats(std::ofstream& out, const std::vector<float>& values) {
  out.write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * 4));
}

void write_blocks(const std::string& pages, const std::string& path) {
  std::ofstream out(path, std::ios::binary);
  const size_t features = extract_feature_names().size();
  each_page(pages, [&](const PageLine& page) {
    const ExtractBlocks b = extract_blocks(page.html, page.url);
    put_int(out, b.texts.size());
    put_int(out, features);
    put_floats(out, b.features);
    put_floats(out, b.probabilities);
    for (const std::string& text : b.texts) {
      put_int(out, text.size());
      out.write(text.data(), std::streamsize(text.size()));
    }
  });
  require(bool(out.flush()), path, ": cannot be written");
}

void write_texts(const std::string& pages, const std::string& path, const std::string& mode,
                 const std::string& probabilities) {
  ExtractOptions options;
  options.rules = mode == "rules";
  if (mode == "precision") options.mode = ExtractMode::precision;
  if (mode == "recall") options.mode = ExtractMode::recall;
  std::ofstream out(path);
  std::ifstream p(probabilities, std::ios::binary);
  require(probabilities.empty() || bool(p), probabilities, ": cannot be read");
  each_page(pages, [&](const PageLine& page) {
    Extracted e;
    if (probabilities.empty()) {
      e = extract(page.html, page.url, options);
    } else {
      std::vector<float> of_page(extract_blocks(page.html, page.url).texts.size());
      p.read(reinterpret_cast<char*>(of_page.data()), std::streamsize(of_page.size() * 4));
      require(bool(p), probabilities, ": found fewer numbers than there are blocks");
      e = extract_chosen(page.html, page.url, options.mode, of_page);
    }
    out << json_line(OrderedJson{{"text", e.text},
                                 {"title", e.title},
                                 {"html_bytes", e.html_bytes},
                                 {"parsed_bytes", e.parsed_bytes}});
  });
  require(bool(out.flush()), path, ": cannot be written");
}

void time_pages(const std::string& pages) {
  double seconds = 0;
  size_t n = 0, bytes = 0, parsed = 0;
  each_page(pages, [&](const PageLine& page) {
    const std::clock_t begin = std::clock();
    const Extracted e = extract(page.html, page.url);
    seconds += double(std::clock() - begin) / CLOCKS_PER_SEC;
    n++;
    bytes += e.html_bytes;
    parsed += e.parsed_bytes;
  });
  std::printf("%zu pages, %.2f s, %.0f pages/s, %.1f MB/s of HTML, the parser saw %.1f %%\n", n,
              seconds, double(n) / seconds, double(bytes) / seconds / 1e6,
              100. * double(parsed) / double(bytes));
}

int run_tool(int argc, char** argv) {
  const std::vector<std::string> a(argv + 1, argv + argc);
  const auto argument = [&](size_t i) { return i < a.size() ? a[i] : std::string(); };
  if (a.size() == 3 && a[0] == "blocks") {
    write_blocks(a[1], a[2]);
  } else if (a.size() >= 3 && a[0] == "texts") {
    write_texts(a[1], a[2], argument(3), argument(4));
  } else if (a.size() == 2 && a[0] == "time") {
    time_pages(a[1]);
  } else if (a.size() == 1 && a[0] == "names") {
    for (const std::string& name : extract_feature_names()) std::printf("%s\n", name.c_str());
  } else {
    fail("usage: see the beginning of dev/extraction_blocks.cpp");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return guarded_main([&] { return run_tool(argc, argv); });
}
