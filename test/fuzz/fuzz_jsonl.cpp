// Any bytes as JSON lines or text, plain or compressed: read to the end, the same with restarts.
#include "test/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  cake::fuzz::read_pages(data, size, ".jsonl");
  return 0;
}
