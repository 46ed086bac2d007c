// Duplicates.
#include "cake/corpus.h"
namespace cake::corpus {
void write_signatures(const std::filesystem::path& path, const std::vector<Signature>&) {
  write_file(path, "");
}
void find_pairs(const std::vector<SignatureFile>&, int, const DedupOptions&,
                const std::filesystem::path& out) {
  write_file(out, "");
}
std::vector<Duplicate> cluster(const std::vector<std::filesystem::path>&, uint64_t,
                               const DedupOptions&) {
  return {};
}
std::vector<int64_t> remove_repeated_substrings(std::vector<std::string>& texts, size_t) {
  return std::vector<int64_t>(texts.size());
}
}  // namespace cake::corpus
