// Every binary has its own main: two stages are libraries too, and a link line in the wrong order
// would give a program their main.
#include "test/support.h"

using namespace cake;

TEST_CASE("each binary's --help is its own") {
  const std::pair<std::string, std::string> binaries[] = {
      {"./bpe", "Byte pair encoding"},      {"./train_gpt", "Trains a base model"},
      {"./sft", "Fine-tunes a model"},      {"./reward", "Learns from preferences"},
      {"./rlhf", "Reinforcement learning"}, {"./chat", "Talks to a model"},
      {"build/world", "closed world"},      {"build/report", "Tells a run on one page"},
      {"build/overoptimize", "picture"},
  };
  for (const auto& binary : binaries) {
    CAPTURE(binary.first);
    const Output help = shell(binary.first + " --help");
    CHECK(help.status == 0);
    for (const auto& other : binaries) {
      CAPTURE(other.second);
      CHECK_MESSAGE(contains(help.text, other.second) == (&other == &binary), help.text);
    }
  }
}
