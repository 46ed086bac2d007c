// Sequences end to end, as the engine takes them.
//
// A batch has no padding. Attention and positions restart at each sequence (Batch::doc_starts), so
// that a packed batch computes what its sequences would compute alone.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cake/gpt.h"

namespace cake {

struct Packed {
  std::vector<int> tokens;            // (N) ids that are read
  std::vector<int> targets;           // (N) the id to predict at each position, or -1
  std::vector<int> doc_starts = {0};  // (members + 1)
  std::vector<int> members;           // the caller's number of each sequence
  int64_t trained = 0;                // targets that are not -1

  int64_t positions() const { return int64_t(tokens.size()); }           // N
  size_t begin(size_t i) const { return size_t(doc_starts[i]); }         // of sequence i
  size_t last(size_t i) const { return size_t(doc_starts[i + 1]) - 1; }  // its last position
  Batch batch(float temperature = 1) const { return {tokens, targets, doc_starts, temperature}; }

  // Appends a sequence of which the first `positions` ids are read: all of them, where the value
  // behind the last one counts, or all but the last, which is only predicted. Position p predicts
  // ids[p + 1] where is_target(p + 1).
  template <class IsTarget>
  void add(int member, std::span<const int> ids, size_t positions, IsTarget is_target) {
    members.push_back(member);
    for (size_t p = 0; p < positions; p++) {
      const bool target = p + 1 < ids.size() && is_target(p + 1);
      tokens.push_back(ids[p]);
      targets.push_back(target ? ids[p + 1] : -1);
      trained += target;
    }
    doc_starts.push_back(int(tokens.size()));
  }

  // (N) dL/dlogp of the mean loss over `n` trained tokens, some of which are in this batch.
  std::vector<float> mean_loss_weights(int64_t n) const {
    std::vector<float> weights;
    for (const int target : targets) weights.push_back(target >= 0 ? -1 / float(n) : 0);
    return weights;
  }
};

// The micro-batch that takes `n` more positions: the last one, or a new one where that would pass
// `limit`. What goes together depends on the lengths alone. B has positions().
template <class B>
B& batch_with_room(std::vector<B>& batches, int64_t n, int64_t limit) {
  if (batches.empty() || batches.back().positions() + n > limit) batches.emplace_back();
  return batches.back();
}

}  // namespace cake
