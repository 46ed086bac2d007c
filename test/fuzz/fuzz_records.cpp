// Any bytes as a file of records: reading them, and making conversations, preferences, problems,
// prompts and documents of them, ends in those or in an Error.
#include "cake/documents.h"
#include "cake/preferences.h"
#include "cake/problems.h"
#include "cake/records.h"
#include "test/fuzz/fuzz.h"

namespace {
using namespace cake;

template <class Body>
void allow_error(Body&& body) {
  try {
    body();
  } catch (const Error&) {  // one line for the user
  }
}

void read_records(const Input& input, const RecordOptions& options) {
  LeftOut left_out;
  for_each_record({input.path}, options, left_out, [](const Record& r) -> const char* {
    fuzz::expect(is_utf8(std::string(simdjson::minify(r.object))), "records are UTF-8");
    allow_error([&] { parse_training_text(r); });
    allow_error([&] { parse_conversation(r); });
    allow_error([&] { parse_preference(r); });
    allow_error([&] { parse_problem(r); });
    allow_error([&] { fail_unknown_shape(r, "none"); });
    return nullptr;
  });
}

// The text of all documents, each with its beginning and end.
std::string documents_of(const Input& input, const RecordOptions& options, size_t part_bytes) {
  std::string all;
  DocumentReader reader({input}, options, part_bytes);
  bool is_open = false;
  for (DocumentPart part; reader.next(part);) {
    fuzz::expect(part.begins == !is_open, "a document begins where the last one ended");
    all.append(part.begins ? "<" : "").append(part.text).append(part.ends ? ">" : "");
    is_open = !part.ends;
  }
  fuzz::expect(!is_open, "the last document ends");
  return all;
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::MemoryFile file(data, size);
  const Input input(file.path());
  const RecordOptions stop, skip{.names = {{"text", "a.0"}}, .skip_bad_lines = true};
  allow_error([&] { read_records(input, stop); });
  allow_error([&] { read_records(input, skip); });
  allow_error([&] { read_text_lines(input, "prompt"); });
  std::string small, large;
  allow_error([&] { small = documents_of(input, stop, 1024); });
  allow_error([&] { large = documents_of(input, stop, 1 << 16); });
  fuzz::expect(small == large, "documents do not depend on the size of parts");
  allow_error([&] { documents_of(input, skip, 1024); });
  return 0;
}
