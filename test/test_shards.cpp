// Token shards: written, read back, damaged; windows shuffled and resumed.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "cake/shards.h"
#include "test/support.h"

using namespace cake;

namespace {

constexpr uint64_t kHash = 0xfedcba9876543210;

// Ids 0, 1, 2, ... modulo `vocab`: the n-th says where it stands.
std::vector<int> counting(int n, int vocab) {
  std::vector<int> ids(static_cast<size_t>(n));
  for (int i = 0; i < n; i++) ids[size_t(i)] = i % vocab;
  return ids;
}

void write_shards(const std::filesystem::path& prefix, std::span<const int> ids, int vocab,
                  int64_t tokens_per_file = kShardTokens) {
  ShardWriter writer(prefix, "train", vocab, kHash, tokens_per_file);
  writer.append(ids);
  CHECK(writer.finish() == int64_t(ids.size()));
}

std::vector<int> read_all(const TokenStream& stream) {
  std::vector<int> ids(static_cast<size_t>(stream.size()));
  stream.copy(0, ids);
  return ids;
}

// Overwrites bytes of a file.
template <class T>
void poke(const std::filesystem::path& path, int64_t offset, T value) {
  std::string bytes = read_file(path);
  std::memcpy(bytes.data() + offset, &value, sizeof value);
  write_file(path, bytes);
}

int32_t peek(const std::filesystem::path& path, int index) {
  int32_t value;
  std::memcpy(&value, read_file(path).data() + 4 * index, 4);
  return value;
}

std::string stream_error(const std::filesystem::path& prefix) {
  return error_of([&] { read_all(TokenStream(prefix, "train")); });
}

}  // namespace

TEST_CASE("shards hold what was written, across files and in pieces") {
  TempDir dir;
  for (const int vocab : {1000, 70000}) {
    const std::vector<int> ids = counting(1000, std::min(vocab, 997));
    {
      ShardWriter writer(dir / "a/x", "train", vocab, kHash, 300);
      for (size_t i = 0; i < ids.size();) {  // pieces of 1, 2, 3, ... ids
        const size_t n = std::min(i + 1, ids.size() - i);
        writer.append(std::span(ids).subspan(i, n));
        i += n;
      }
      CHECK(writer.finish() == 1000);
    }
    CHECK(shard_numbers(dir / "a/x", "train") == std::vector<int>{0, 1, 2, 3});
    const TokenStream stream(dir / "a/x", "train");
    CHECK(stream.vocab_size() == vocab);
    CHECK(read_all(stream) == ids);
    std::vector<int> some(350);
    stream.copy(299, some);  // the end of one file, a whole one, the begin of a third
    CHECK(std::equal(some.begin(), some.end(), ids.begin() + 299));
    CHECK(contains(error_of([&] { stream.copy(651, some); }), "found positions 651 to 1001"));
    const auto first = shard_path(dir / "a/x", "train", 0);
    CHECK(peek(first, 0) == (vocab > 65536 ? 20240801 : 20240520));
    CHECK(peek(first, 1) == (vocab > 65536 ? 7 : 1));
    CHECK(peek(first, 2) == 300);
    CHECK(peek(first, 3) == vocab);
    CHECK(uint32_t(peek(first, 4)) == 0x76543210);
    CHECK(uint32_t(peek(first, 5)) == 0xfedcba98);
    CHECK(std::filesystem::file_size(first) == 1024 + 300 * (vocab > 65536 ? 4 : 2));
  }
}

TEST_CASE("a shorter encoding removes the shards of a longer one") {
  TempDir dir;
  write_shards(dir / "x", counting(1000, 100), 100, 100);
  CHECK(shard_numbers(dir / "x", "train").size() == 10);
  write_shards(dir / "x", counting(250, 100), 100, 100);
  CHECK(shard_numbers(dir / "x", "train").size() == 3);
  CHECK(TokenStream(dir / "x", "train").size() == 250);
}

TEST_CASE("an encoding that fails leaves the shards that were there") {
  TempDir dir;
  const std::vector<int> ids = counting(250, 100);
  write_shards(dir / "x", ids, 100, 100);
  {
    ShardWriter writer(dir / "x", "train", 50, kHash, 100);
    CHECK(contains(error_of([&] { writer.append(ids); }), "found token 50, expected 0 to 49"));
  }
  CHECK(read_all(TokenStream(dir / "x", "train")) == ids);
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) {
    CHECK(entry.path().extension() == ".bin");  // no .partial
  }
}

TEST_CASE("PREFIX.json says what was written in it, and errors name file and key") {
  TempDir dir;
  const auto path = data_info_path(dir / "x");
  CHECK(contains(error_of([&] { read_data_info(dir / "x"); }), "bpe encode"));
  write_data_info(dir / "x", {"../tok", kHash, 1024, {3, 250, 900}, {1, 20, 70}});
  const DataInfo info = read_data_info(dir / "x");
  CHECK(info.tokenizer == "../tok");
  CHECK(info.hash == kHash);
  CHECK(info.vocab_size == 1024);
  CHECK(info.train.documents == 3);
  CHECK(info.train.tokens == 250);
  CHECK(info.train.bytes == 900);
  CHECK(info.val.bytes == 70);

  const Json good = read_json(path);
  const auto broken = [&](const char* key, const Json& value) {
    Json json = good;
    json[key] = value;
    write_file(path, json.dump());
    return error_of([&] { read_data_info(dir / "x"); });
  };
  CHECK(contains(broken("vocab_size", 0), "x.json: vocab_size: found 0"));
  CHECK(contains(broken("vocab_size", "7"), "vocab_size: found \"7\", expected an integer"));
  CHECK(contains(broken("tokenizer_hash", "12"), "tokenizer_hash: found 12"));
  CHECK(contains(broken("val", {{"documents", 1}}), "tokens is missing"));
  CHECK(contains(broken("train", {{"documents", -1}, {"tokens", 0}, {"bytes", 0}}),
                 "train.documents: found -1"));
  write_file(path, "{\"tokenizer\": ");
  CHECK(contains(error_of([&] { read_data_info(dir / "x"); }), "x.json: not JSON: parse error"));
}

TEST_CASE("a damaged shard is an error that names it") {
  TempDir dir;
  const auto shard = shard_path(dir / "x", "train", 1);
  const auto fresh = [&] { write_shards(dir / "x", counting(250, 100), 100, 100); };
  CHECK(contains(stream_error(dir / "x"), "x_train_000000.bin: not found"));
  fresh();
  poke<int32_t>(shard, 0, 1);
  CHECK(contains(stream_error(dir / "x"), "x_train_000001.bin: found magic 1"));
  fresh();
  poke<int32_t>(shard, 4, 2);
  CHECK(contains(stream_error(dir / "x"), "found version 2, expected 1"));
  fresh();
  poke<int32_t>(shard, 8, 99);
  CHECK(contains(stream_error(dir / "x"), "found 100 tokens, expected the 99 of its header"));
  fresh();
  poke<int32_t>(shard, 8, -100);
  CHECK(contains(stream_error(dir / "x"), "expected the -100"));
  fresh();
  std::filesystem::resize_file(shard, 1024 + 199);
  CHECK(contains(stream_error(dir / "x"), "found 99 tokens, expected the 100"));
  fresh();
  std::filesystem::resize_file(shard, 1000);
  CHECK(contains(stream_error(dir / "x"), "found 1000 bytes, expected a header of 1024"));
  fresh();
  std::filesystem::resize_file(shard, 0);
  CHECK(contains(stream_error(dir / "x"), "found 0 bytes"));
  fresh();
  poke<uint16_t>(shard, 1024 + 2 * 30, 100);
  CHECK(contains(stream_error(dir / "x"),
                 "x_train_000001.bin: position 30: found token 100, expected 0 to 99"));
  fresh();
  std::filesystem::remove(shard);
  CHECK(contains(stream_error(dir / "x"), "x_train_000001.bin: not found, although a later"));
}

TEST_CASE("shards must agree with PREFIX.json and with each other") {
  TempDir dir;
  const auto fresh = [&](int vocab, uint64_t hash, int64_t tokens) {
    write_shards(dir / "x", counting(250, 100), 100, 100);
    write_data_info(dir / "x", {"tok", hash, vocab, {1, tokens, 900}, {}});
  };
  fresh(100, kHash, 250);
  CHECK(stream_error(dir / "x") == "no error");
  fresh(101, kHash, 250);
  CHECK(contains(stream_error(dir / "x"), "found a vocabulary of 100, expected 101"));
  fresh(100, kHash + 1, 250);
  CHECK(contains(stream_error(dir / "x"), "tokens of another tokenizer"));
  fresh(100, kHash, 251);
  CHECK(contains(stream_error(dir / "x"), "x.json: train.tokens: found 251, expected the 250"));
  std::filesystem::remove(data_info_path(dir / "x"));
  poke<int32_t>(shard_path(dir / "x", "train", 2), 4 * 5, 0);
  CHECK(contains(stream_error(dir / "x"), "000002.bin: found tokens of another tokenizer"));
}

TEST_CASE("llm.c's own shards are read: no vocabulary in the header, numbered from 1") {
  TempDir dir;
  const std::vector<int> ids = counting(200, 50257);
  for (const int number : {1, 2}) {
    std::string bytes(1024, '\0');
    const int32_t header[3] = {20240520, 1, 100};
    std::memcpy(bytes.data(), header, sizeof header);
    for (int i = 0; i < 100; i++) {
      const uint16_t id = uint16_t(ids[size_t((number - 1) * 100 + i)]);
      bytes.append(reinterpret_cast<const char*>(&id), 2);
    }
    write_file(shard_path(dir / "x", "train", number), bytes);
  }
  const TokenStream stream(dir / "x", "train");
  CHECK(read_all(stream) == ids);
  CHECK(stream.vocab_size() == 0);
}

TEST_CASE("a permutation visits every index once, in an order of its seed") {
  for (const int64_t n : {1, 2, 3, 5, 16, 17, 1000, 4097}) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < n; i++) order.push_back(permuted(i, n, 7));
    std::vector<int64_t> sorted = order;
    std::sort(sorted.begin(), sorted.end());
    std::vector<int64_t> all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), 0);
    CHECK(sorted == all);
    if (n < 100) continue;
    CHECK(order != all);
    // neighbours land anywhere: their mean distance is that of random pairs, n/3, within a tenth
    double distance = 0;
    for (size_t i = 1; i < order.size(); i++) distance += std::abs(double(order[i] - order[i - 1]));
    CHECK(std::abs(distance / double(n) / double(n) - 1 / 3.) < .03);
  }
  CHECK(permuted(0, 1000, 1) != permuted(0, 1000, 2));
  const int64_t billions = 40'000'000'000;
  CHECK(permuted(billions - 1, billions, 1) < billions);
}

TEST_CASE("an epoch visits each window once, and the next one cuts elsewhere") {
  TempDir dir;
  const int n = 1003, T = 16;
  write_shards(dir / "x", counting(n, n), n, 300);
  const TokenStream stream(dir / "x", "train");
  Loader loader(stream, T, 42, -1);
  std::vector<int> tokens, targets, doc_starts;
  std::map<int64_t, int> offsets;
  for (int epoch = 0; epoch < 8; epoch++) {
    const int64_t offset = loader.offset(epoch), windows = loader.windows_in(epoch);
    offsets[offset]++;
    CHECK(offset >= 0);
    CHECK(offset < T);
    CHECK(windows == (n - 1 - offset) / T);
    std::vector<int> seen(size_t(n), 0);
    for (int64_t w = 0; w < windows; w++) {
      CHECK(loader.state().epoch == epoch);
      loader.next(1, tokens, targets, doc_starts);
      REQUIRE(tokens.size() == size_t(T));
      REQUIRE(targets.size() == size_t(T));
      for (size_t i = 0; i < size_t(T); i++) {
        seen[size_t(tokens[i])]++;
        CHECK(targets[i] == tokens[i] + 1);
        if (i > 0) CHECK(tokens[i] == tokens[i - 1] + 1);
      }
    }
    for (int i = 0; i < n; i++) {
      CHECK(seen[size_t(i)] == (i >= offset && i < offset + windows * T ? 1 : 0));
    }
    CHECK(loader.epochs() == epoch + 1);
  }
  CHECK(offsets.size() > 3);
  int same = 0;  // windows that stand at the same place of two epochs' orders
  for (int64_t w = 0; w < 61; w++) {
    std::vector<int> other;
    loader.set_state({0, w});
    loader.next(1, tokens, targets, doc_starts);
    loader.set_state({1, w});
    loader.next(1, other, targets, doc_starts);
    same += (tokens[0] - loader.offset(0)) / T == (other[0] - loader.offset(1)) / T;
  }
  CHECK(same < 10);  // 1 is expected of two random orders
}

TEST_CASE("resumed windows are those of a loader that was never interrupted") {
  TempDir dir;
  write_shards(dir / "x", counting(500, 97), 97);
  const TokenStream stream(dir / "x", "train");
  Loader whole(stream, 8, 3, 0);
  std::vector<int> a, b, c, d, e, f;
  for (int step = 0; step < 100; step++) {  // five epochs, some batches across their borders
    const LoaderState state = whole.state();
    whole.next(3, a, b, c);
    Loader resumed(stream, 8, 3, 0);
    resumed.set_state(state);
    resumed.next(3, d, e, f);
    CHECK(a == d);
    CHECK(b == e);
    CHECK(c == f);
  }
  Loader other(stream, 8, 4, 0);  // another seed, another order
  whole.set_state({});
  whole.next(3, a, b, c);
  other.next(3, d, e, f);
  CHECK(a != d);
  CHECK(contains(error_of([&] { whole.set_state({0, 62}); }), "found window 62 of epoch 0"));
}

TEST_CASE("documents start at each window and at each end of text") {
  TempDir dir;
  // documents of 5 tokens: 9 0 1 2 3 | 9 0 1 2 3 | ...
  std::vector<int> ids;
  for (int i = 0; i < 200; i++) ids.push_back(i % 5 == 0 ? 9 : i % 5 - 1);
  write_shards(dir / "x", ids, 10);
  const TokenStream stream(dir / "x", "train");
  Loader loader(stream, 12, 1, 9);
  std::vector<int> tokens, targets, doc_starts;
  for (int step = 0; step < 10; step++) {
    loader.next(4, tokens, targets, doc_starts);
    REQUIRE(tokens.size() == 48);
    std::vector<int> expected;
    for (int i = 0; i < 48; i++) {
      if (i % 12 == 0 || tokens[size_t(i)] == 9) expected.push_back(i);
      // the last token of a document predicts the end_of_text of the next
      CHECK(targets[size_t(i)] == (tokens[size_t(i)] == 9   ? 0
                                   : tokens[size_t(i)] == 3 ? 9
                                                            : tokens[size_t(i)] + 1));
    }
    expected.push_back(48);
    CHECK(doc_starts == expected);
  }
}

TEST_CASE("a stream shorter than the context is one short window") {
  TempDir dir;
  std::vector<int> tokens, targets, doc_starts;
  for (const int n : {2, 5, 8, 9}) {
    write_shards(dir / "x", counting(n, 10), 10);
    const TokenStream stream(dir / "x", "train");
    Loader loader(stream, 8, 1, -1);
    for (int epoch = 0; epoch < 5; epoch++) {
      CHECK(loader.windows_in(epoch) == 1);
      loader.next(1, tokens, targets, doc_starts);
      CHECK(tokens == counting(n - 1, 10));
      CHECK(targets.back() == n - 1);
      CHECK(doc_starts == std::vector<int>{0, n - 1});
    }
  }
  for (const int n : {0, 1}) {
    TempDir empty;
    write_shards(empty / "x", counting(n, 10), 10);
    CHECK(contains(error_of([&] { Loader(TokenStream(empty / "x", "train"), 8, 1, -1); }),
                   n == 0 ? "not found" : "found 1 tokens, expected at least 2"));
  }
}

TEST_CASE("validation counts every token but the first exactly once") {
  TempDir dir;
  std::vector<int> tokens, targets, doc_starts;
  for (const int n : {2, 16, 17, 18, 100}) {
    write_shards(dir / "x", counting(n, 200), 200);
    const TokenStream stream(dir / "x", "train");
    std::vector<int> seen;
    const int64_t windows = validation_windows(stream, 16);
    CHECK(windows == (n - 1 + 15) / 16);
    for (int64_t w = 0; w < windows; w++) {
      tokens.clear(), targets.clear(), doc_starts.clear();
      append_window(stream, 16 * w, std::min<int64_t>(16, n - 1 - 16 * w), 50, tokens, targets,
                    doc_starts);
      CHECK(tokens.size() == targets.size());
      CHECK(doc_starts.front() == 0);
      CHECK(doc_starts.size() == size_t(1 + (n > 51 && w == 50 / 16)));
      seen.insert(seen.end(), targets.begin(), targets.end());
    }
    std::vector<int> expected = counting(n, 200);
    expected.erase(expected.begin());
    CHECK(seen == expected);
  }
}
