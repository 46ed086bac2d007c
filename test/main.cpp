// The test binary's main: doctest's, then a count of the tests that were skipped for want of data.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "cake/run.h"
#include "test/support.h"

int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  doctest::Context context(argc, argv);
  const int status = context.run();
  if (context.shouldExit()) return status;
  std::printf("skipped: %zu\n", cake::skipped_tests().size());
  return status;
}
