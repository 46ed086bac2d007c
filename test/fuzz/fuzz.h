// The check of pages: reading in one go equals reading with a restart behind a page.
#pragma once

#include <cstdint>
#include <memory>

#include "cake/pages.h"
#include "test/fuzz/expect.h"

namespace cake::fuzz {

// `extension`: of the name that the file has.
inline void read_pages(const uint8_t* data, size_t size, const char* extension) {
  const MemoryFile file(data, size);
  const Input input(file.path(), concat("fuzz", extension));
  const PageOptions options{.max_page_bytes = 1 << 16};
  try {
    PageReader reader(input, 1, options);
    ProblemCounts before;  // of a reader that is replaced
    std::unique_ptr<PageReader> other;
    int pages = 0;
    for (Page page, again; reader.next(page); pages++) {
      expect(is_utf8(page.text) && is_utf8(page.url) && is_utf8(page.id), "pages are UTF-8");
      expect(page.text.size() <= options.max_page_bytes, "pages have at most max_page_bytes");
      simdjson::dom::parser parser;
      simdjson::dom::element rest;
      const simdjson::padded_string json("{" + page.rest + "}");
      expect(!parse_and_repair(json, parser, rest), "the rest is JSON");
      if (other) {
        expect(other->next(again), "a restarted reader has the next page");
        expect(again.place == page.place && again.text == page.text && again.url == page.url &&
                   again.id == page.id && again.rest == page.rest && again.html == page.html &&
                   again.repaired == page.repaired,
               "a restarted reader has the same page");
      }
      if (pages % 3 == 0) {
        if (other)
          for (const auto& [name, count] : other->problems()) before[name] += count;
        if (pages == 0) before = reader.problems();
        other = std::make_unique<PageReader>(input, 1, options, reader.entry());
      }
    }
    if (other) {
      Page again;
      expect(!other->next(again), "a restarted reader ends where the first one does");
      for (const auto& [name, count] : other->problems()) before[name] += count;
      expect(before == reader.problems(), "a restarted reader counts the same problems");
    }
    expect(reader.progress() >= 0 && reader.progress() <= 1, "progress is a share");
  } catch (const Error&) {  // one line for the user
  }
}

}  // namespace cake::fuzz
