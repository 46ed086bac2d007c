// Stage 0, the corpus: raw pages to clean text.
#include "cake/corpus.h"
namespace cake {
namespace {
int run(int, char**) { return 0; }
}  // namespace
}  // namespace cake
__attribute__((weak)) int main(int argc, char** argv) {
  return cake::guarded_main([&] { return cake::run(argc, argv); });
}
