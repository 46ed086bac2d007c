// Stage 1, the tokenizer: documents to a vocabulary, documents to token shards.
//
//     text --normalizer--> text --split pattern--> pieces --byte pair encoding--> ids
//
//     train    pieces, counted --merge the most frequent pair, again and again--> tokenizer.json
//     encode   documents --tokenizer--> separator ids ... separator ids ... --> shards
//     decode   shards --bytes of each token--> text
//
// A split pattern cuts text into pieces that tokens never cross: words with the space before them,
// numbers, punctuation, white space. Byte pair encoding then works on each piece alone: it starts
// from the bytes, and joins neighbours by the merges that training learned. This file begins with
// that, by its definition, in a page. Then come the encoding of a corpus, decoding, and the command
// line. The parts of the stage, in the order in which text meets them:
//
//     cake/stretches.h  a corpus read in stretches of text, on which all threads work
//     bpe_text.cpp      added tokens and normal forms; class Tokenizer
//     bpe_split.cpp     split patterns: scanners written by hand, and regular expressions compiled
//     bpe_encode.cpp    merges applied to pieces, fast, with a cache
//     cake/shards.h     the shards, and how training reads them
//     bpe_train.cpp     training, and more tokens for an existing vocabulary
//     bpe_files.cpp     the file formats of tokenizers
//     bpe_page.cpp      ./bpe stats, in figures and as a page
//
// Sources: byte-level BPE, Radford et al. 2019; BPE for words, Sennrich et al. 2016; patterns and
// the .tiktoken format, OpenAI's tiktoken; tokenizer.json, Hugging Face.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/bpe.h"
#include "cake/documents.h"
#include "cake/flags.h"
#include "cake/json.h"
#include "cake/record_flags.h"
#include "cake/run.h"
#include "cake/shards.h"
#include "cake/stretches.h"
#include "cake/tokenizer.h"
#include "cake/unicode.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Byte pair encoding by its definition. bpe_train.cpp and bpe_encode.cpp give the same
// tokens, but faster; the tests compare the two.

namespace plain {

// Replaces each pair of neighbours (left, right) by `token`, from left to right.
static void join_pairs(std::vector<int>& tokens, Merge pair, int token) {
  size_t size = 0;
  for (size_t i = 0; i < tokens.size(); i++) {
    const bool joined = i + 1 < tokens.size() && Merge(tokens[i], tokens[i + 1]) == pair;
    tokens[size++] = joined ? token : tokens[i];
    i += joined;
  }
  tokens.resize(size);
}

// Training: count the pairs of neighbours in all pieces, join the most frequent pair everywhere,
// count again. Of pairs with equal counts the smallest is joined.
std::vector<Merge> learn_merges(std::vector<std::vector<int>> pieces, int count) {
  std::vector<Merge> merges;
  while (int(merges.size()) < count) {
    std::map<Merge, int64_t> counts;
    for (const std::vector<int>& piece : pieces) {
      for (size_t i = 0; i + 1 < piece.size(); i++) counts[{piece[i], piece[i + 1]}]++;
    }
    if (counts.empty()) break;
    const auto less = [](const auto& a, const auto& b) { return a.second < b.second; };
    const Merge best = std::max_element(counts.begin(), counts.end(), less)->first;
    for (std::vector<int>& piece : pieces) join_pairs(piece, best, 256 + int(merges.size()));
    merges.push_back(best);
  }
  return merges;
}

// Encoding: the bytes of a piece, then every merge in the order in which it was learned.
std::vector<int> encode(std::string_view piece, std::span<const Merge> merges) {
  std::vector<int> tokens;
  for (const unsigned char byte : piece) tokens.push_back(byte);
  for (size_t k = 0; k < merges.size(); k++) join_pairs(tokens, merges[k], 256 + int(k));
  return tokens;
}

}  // namespace plain

// ---------------------------------------------------------------------------------------------
// Encoding a corpus: every stretch of text becomes ids in some thread, and these go to the shards
// in the order of the text. Every document begins with the tokenizer's separator, and has no other
// tokens around it, whatever the post-processor of its file would put there: the stream is cut into
// windows for training, and the separator is where a document begins.

namespace {

struct EncodedStretch {
  struct Part {
    IdBuffer ids;
    std::vector<uint16_t> narrow_ids;  // the same, where shards have ids of 16 bits
    DataInfo::Split counts;
  };
  Part train, val;
};

std::string share_text(int64_t part, int64_t all) {
  return format("%.1f %%", 100 * double(part) / double(std::max<int64_t>(1, all)));
}

void note_split(ConsoleLog& log, const char* name, const DataInfo::Split& split) {
  log.note(format("%s: %lld documents, %lld bytes, %lld tokens, %.3f bytes a token", name,
                  (long long)split.documents, (long long)split.bytes, (long long)split.tokens,
                  double(split.bytes) / double(std::max<int64_t>(1, split.tokens))));
}

// Whether it pays to fill the caches before the first text comes.
bool is_large(const Corpus& corpus) {
  constexpr uintmax_t kLarge = 16 << 20;
  uintmax_t bytes = 0;
  for (const Input& input : expand_folders(corpus.inputs)) {
    std::error_code unknown;
    const uintmax_t size = std::filesystem::file_size(input.path, unknown);
    if (!unknown) bytes += size;
  }
  return bytes >= kLarge;
}

}  // namespace

DataInfo encode_corpus(const Corpus& corpus, const Tokenizer& tokenizer,
                       const std::filesystem::path& tokenizer_path,
                       const std::filesystem::path& prefix) {
  namespace fs = std::filesystem;
  DataInfo info;
  info.hash = tokenizer.hash();
  info.vocab_size = tokenizer.vocab_size();
  info.tokenizer = fs::absolute(tokenizer_path)
                       .lexically_normal()
                       .lexically_proximate(fs::absolute(prefix).lexically_normal().parent_path())
                       .string();
  const int separator = tokenizer.find_document_separator();
  if (separator < 0) {
    fail(tokenizer_path.string(), ": found no token that separates documents, expected ",
         "<|endoftext|> or another: `./bpe extend` adds one (--special '<|endoftext|>')");
  }
  const bool is_narrow = shard_id_bytes(info.vocab_size) == 2;
  ShardWriter train(prefix, "train", info.vocab_size, info.hash);
  ShardWriter val(prefix, "val", info.vocab_size, info.hash);
  std::vector<TextEncoder> encoders;
  for (int t = 0; t < corpus.threads; t++) {
    encoders.emplace_back(tokenizer.data(), corpus.cache_bytes);
    if (is_large(corpus)) encoders.back().preload();
  }

  ConsoleLog log(corpus.quiet);
  const auto encode = [&](const Stretch& stretch, EncodedStretch& encoded, size_t thread) {
    for (EncodedStretch::Part* part : {&encoded.train, &encoded.val}) {
      part->ids.clear();
      part->counts = {};
    }
    for (const Chunk& c : stretch.chunks) {
      EncodedStretch::Part& part = c.is_validation ? encoded.val : encoded.train;
      if (c.begins_document) part.ids.push_back(uint32_t(separator));
      encoders[thread].encode(stretch.text_of(c), c.size(), c.begins_document, corpus.specials,
                              part.ids);
      part.counts.documents += c.begins_document;
      part.counts.bytes += int64_t(c.size());
    }
    for (EncodedStretch::Part* part : {&encoded.train, &encoded.val}) {
      if (is_narrow) narrow_ids(std::span(part->ids.data(), part->ids.size()), part->narrow_ids);
    }
  };
  const auto write = [&](const Stretch&, const EncodedStretch& encoded) {
    const auto add = [&](ShardWriter& writer, DataInfo::Split& total,
                         const EncodedStretch::Part& part) {
      const void* const ids = is_narrow ? static_cast<const void*>(part.narrow_ids.data())
                                        : static_cast<const void*>(part.ids.data());
      writer.append_packed(ids, part.ids.size());
      total.documents += part.counts.documents;
      total.bytes += part.counts.bytes;
      total.tokens += int64_t(part.ids.size());
    };
    add(train, info.train, encoded.train);
    add(val, info.val, encoded.val);
  };
  for_each_stretch<EncodedStretch>(corpus, tokenizer.data(), "encoding", log, encode, write);
  require(info.train.tokens + info.val.tokens > 0,
          "encoding: found documents without text, expected text");
  train.finish();
  val.finish();
  write_data_info(prefix, info);

  int64_t pieces = 0, misses = 0;
  for (const TextEncoder& e : encoders) {
    pieces += e.encoder().pieces(), misses += e.encoder().misses();
  }
  const std::string rate = log.rate(info.train.bytes + info.val.bytes);
  note_split(log, "train", info.train);
  if (info.val.tokens > 0) note_split(log, "val", info.val);
  log.progress(
      concat("encoded into ", prefix.string(), "_*.bin: ", share_text(pieces - misses, pieces),
             " of ", count_text(double(pieces)), " pieces from the cache, ", rate),
      true);
  return info;
}

// ---------------------------------------------------------------------------------------------
// Decoding: the bytes of each token, one after the other.

namespace {

// The bytes of every token, so that most ids take one look-up and one copy of 16 bytes: what is
// copied beyond the token's end is overwritten by the next one.
class TokenTable {
 public:
  explicit TokenTable(const Tokenizer& tokenizer) {
    for (int id = 0; id < tokenizer.vocab_size(); id++) {
      const std::string_view bytes = tokenizer.token_bytes(id);
      longest_ = std::max(longest_, bytes.size());
      Slot slot{};
      if (bytes.size() <= kInline) {
        std::copy(bytes.begin(), bytes.end(), slot.bytes);
        slot.size = uint8_t(bytes.size());
      } else {
        slot.size = kLong;
        const Place place{uint32_t(bytes.size()), long_bytes_.size()};
        std::memcpy(slot.bytes, &place.size, sizeof place.size);
        std::memcpy(slot.bytes + sizeof place.size, &place.offset, sizeof place.offset);
        long_bytes_ += bytes;
      }
      slots_.push_back(slot);
    }
  }

  // Sets `text` to the bytes of the ids, of 16 or 32 bits. `text` must have room(ids.size()) bytes.
  // Returns the number of bytes; -1: an id is not in the vocabulary.
  template <class Id>
  int64_t decode(std::span<const Id> ids, char* text) const {
    Id largest = 0;
    for (const Id id : ids) largest = std::max(largest, id);
    if (!ids.empty() && largest >= slots_.size()) return -1;
    char* out = text;
    for (const Id id : ids) {
      const Slot& slot = slots_[id];
      std::memcpy(out, &slot, sizeof slot);
      if (__builtin_expect(slot.size == kLong, false)) {
        out += copy_long(slot, out);
      } else {
        out += slot.size;
      }
    }
    return out - text;
  }
  size_t room(size_t ids) const { return ids * std::max(longest_, kInline) + sizeof(Slot); }

 private:
  static constexpr size_t kInline = 15;
  static constexpr uint8_t kLong = 255;
  struct Slot {
    char bytes[kInline];
    uint8_t size;  // kLong: the bytes are a Place
  };
  struct Place {  // in long_bytes_
    uint32_t size;
    size_t offset;
  };

  size_t copy_long(const Slot& slot, char* out) const {
    Place place;
    std::memcpy(&place.size, slot.bytes, sizeof place.size);
    std::memcpy(&place.offset, slot.bytes + sizeof place.size, sizeof place.offset);
    std::memcpy(out, long_bytes_.data() + place.offset, place.size);
    return place.size;
  }

  std::vector<Slot> slots_;  // by id
  std::string long_bytes_;   // of the tokens that have more bytes than a slot holds
  size_t longest_ = 0;
};

// Writes the text of a shard, block by block, in order.
template <class Id>
void decode_shard(const Shard& shard, const TokenTable& table, int threads,
                  const std::function<void(std::string_view)>& write) {
  constexpr size_t kBlock = 1 << 15;  // ids
  struct Block {
    std::span<const Id> ids;
    std::unique_ptr<char[]> text;
    int64_t bytes = 0;
  };
  const std::span<const Id> all(reinterpret_cast<const Id*>(shard.ids()), size_t(shard.size()));
  size_t begin = 0;
  run_in_order<Block>(
      threads,
      [&](Block& block) {
        block.ids = all.subspan(begin, std::min(kBlock, all.size() - begin));
        begin += block.ids.size();
        return !block.ids.empty();
      },
      [&](Block& block, size_t) {
        if (!block.text) block.text.reset(new char[table.room(kBlock)]);
        block.bytes = table.decode(block.ids, block.text.get());
        if (block.bytes >= 0) return;
        const auto wrong = std::max_element(block.ids.begin(), block.ids.end());
        fail(shard.path(), ": position ", &*wrong - all.data(), ": found token ", *wrong,
             ", expected an id of the tokenizer");
      },
      [&](Block& block) {
        write({block.text.get(), size_t(block.bytes)});
      });
}

void print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

// `words` are ids, and the paths of shards. `output`: a file; empty: the standard output.
void decode_command(const Tokenizer& tokenizer, const std::vector<std::string>& words, int threads,
                    const std::string& output) {
  std::unique_ptr<AtomicFile> file;
  if (!output.empty()) file = std::make_unique<AtomicFile>(output);
  const auto write = [&](std::string_view text) {
    if (file) return file->write(text);
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) {
      fail("standard output: cannot write: ", errno_text());
    }
  };
  std::unique_ptr<TokenTable> table;
  for (const std::string& word : words) {
    if (word.size() <= 9 && word.find_first_not_of("0123456789") == std::string::npos) {
      const int id = std::stoi(word);
      write(tokenizer.decode(std::span(&id, 1)));
      continue;
    }
    const Shard shard(word);
    if (!table) table = std::make_unique<TokenTable>(tokenizer);
    if (shard.id_bytes() == 2) {
      decode_shard<uint16_t>(shard, *table, threads, write);
    } else {
      decode_shard<uint32_t>(shard, *table, threads, write);
    }
  }
  if (file) return file->commit();
  if (isatty(STDOUT_FILENO)) print("\n");
  if (std::fflush(stdout) != 0) fail("standard output: cannot write: ", errno_text());
}

// ---------------------------------------------------------------------------------------------
// Texts with their tokens, on the screen

// Prints the text with its tokens in colours on a terminal and divided by bars elsewhere, then the
// ids.
void show_command(const Tokenizer& tokenizer, const std::string& text, bool special) {
  const std::vector<int> ids = tokenizer.encode(text, special);
  const bool colours = isatty(STDOUT_FILENO);
  const int backgrounds[] = {153, 222, 157, 218, 189};  // of the 256-colour palette
  std::string shown;
  for (size_t i = 0; i < ids.size(); i++) {
    const std::string_view bytes = tokenizer.token_bytes(ids[i]);
    if (colours) {
      shown += format("\x1b[30;48;5;%dm", backgrounds[i % 5]) + visible_token(bytes) + "\x1b[0m";
    } else {
      shown += (i ? "|" : "") + visible_token(bytes);
    }
    if (!bytes.empty() && bytes.back() == '\n') shown += "\n";
  }
  if (!shown.empty() && shown.back() != '\n') shown += "\n";
  for (size_t i = 0; i < ids.size(); i++) shown += (i ? " " : "") + std::to_string(ids[i]);
  shown += format("\n%zu bytes, %zu tokens, %.3f bytes a token\n", text.size(), ids.size(),
                  double(text.size()) / double(std::max<size_t>(1, ids.size())));
  print(shown);
}

// Prints the ids of each document, an array on a line.
void ids_command(const Tokenizer& tokenizer, const Corpus& corpus, bool around, bool offsets) {
  TextEncoder encoder(tokenizer.data(), 1 << 20);
  DocumentReader reader(expand_folders(corpus.inputs), corpus.records);
  const bool special = corpus.specials;
  int64_t documents = 0;
  std::string text, lines;
  IdBuffer ids;
  for (DocumentPart part; reader.next(part);) {
    if (part.begins) text.clear();
    text += part.text;
    if (!part.ends) continue;
    documents++;
    lines += '[';
    const char* comma = "";
    if (around || offsets) {
      for (const TokenPlace& t : tokenizer.encode_places(text, special, around)) {
        lines += std::exchange(comma, ",");
        lines += offsets ? concat("[", t.id, ",", t.begin, ",", t.end, "]") : std::to_string(t.id);
      }
    } else {
      ids.clear();
      encoder.encode(text, text.size(), true, special, ids);
      for (const uint32_t id : ids) lines += std::exchange(comma, ",") + std::to_string(id);
    }
    lines += "]\n";
    if (lines.size() < 1 << 16) continue;
    print(lines);
    lines.clear();
  }
  print(lines);
  // Beside the ids, which are the output.
  const std::string notes =
      reader.left_out().text(documents + reader.left_out().total()) + reader.divider_note(special);
  std::fputs(notes.c_str(), stderr);
}

std::string read_all(const Input& input) {
  ByteSource source(input);
  std::string text;
  for (std::vector<char> block(1 << 20);;) {
    const size_t n = source.read(block.data(), block.size());
    text.append(block.data(), n);
    if (n < block.size()) return text;
  }
}

// ---------------------------------------------------------------------------------------------
// Command line

const char* const kDocuments =
    "plain text (lines of <|endoftext|> divide a file into documents), JSON lines or a JSON array "
    "with \"text\", WET, each also as .gz or .zst; parquet with \"text\"; folders of these; - is "
    "the standard input";

// What the commands ask for.
struct Options {
  Corpus corpus{.threads = usable_cores(), .quiet = false};
  std::string tokenizer, output, pattern, file;
  std::vector<std::string> words;
  int vocab_size = 0;
  double cache_mib = 64;
  bool special = false, around = false, offsets = false;
  ExtendOptions more;
  StatsOptions figures;
};

void add_threads(CLI::App* command, Options& o) {
  command->add_option("--threads", o.corpus.threads,
                      "number of threads; changes the speed, not the result");
}

void add_corpus(CLI::App* command, Options& o) {
  command->add_option("INPUT", o.corpus.inputs, kDocuments)->required()->default_str("");
  command->add_option("--val-fraction", o.corpus.val_fraction,
                      "share of the text that is kept for validation, 0 to 1: the end of a single "
                      "document, or whole documents; 0: none");
  add_record_flags(*command, o.corpus.records);
  add_threads(command, o);
}

void add_memory(CLI::App* command, Options& o) {
  command
      ->add_option("--max-memory", o.corpus.max_memory,
                   "memory to use, about, as in 2G; 0: half of the machine's. Counts that do not "
                   "fit go to temporary files ($TMPDIR); then the rarest pieces are dropped, and "
                   "the output says which")
      ->transform(CLI::AsSizeValue(false));
}

void add_tokenizer(CLI::App* command, Options& o) {
  command
      ->add_option(
          "TOKENIZER", o.tokenizer,
          "a directory, or a file: tokenizer.json, .gguf, .tiktoken, tekken.json, vocab.bpe, or "
          "vocab.json beside merges.txt")
      ->required();
  command
      ->add_option(
          "--pattern", o.pattern,
          "split pattern of a file that does not say it, as .tiktoken: gpt2, cl100k, qwen2, "
          "o200k or a regular expression; otherwise known by the number of tokens")
      ->default_str("");
}

void add_special(CLI::App* command, Options& o) {
  command->add_flag("--special", o.special,
                    "read the names of special tokens as special tokens; otherwise they are text");
}

void train_command(const Options& o) {
  if (std::filesystem::exists(o.output) && !std::filesystem::is_directory(o.output)) {
    fail(o.output, ": found a file, expected a directory to write");  // before the training
  }
  TrainingReport report;
  const double start = now();
  const Tokenizer tokenizer = train_tokenizer(o.corpus, o.vocab_size, o.pattern, &report);
  tokenizer.save(o.output);
  write_json(std::filesystem::path(o.output) / "train.json",
             {{"documents", report.documents},
              {"bytes", report.bytes},
              {"pieces", report.pieces},
              {"distinct_pieces", report.distinct_pieces},
              {"least_count", report.least_count},
              {"dropped_distinct_pieces", report.dropped_distinct},
              {"dropped_pieces", report.dropped_pieces},
              {"too_long_pieces", report.too_long_pieces},
              {"too_long_bytes", report.too_long_bytes},
              {"temporary_files", report.temporary_files},
              {"left_out", report.left_out},
              {"vocab_size", tokenizer.vocab_size()},
              {"seconds", now() - start}});
}

void extend_command(const Options& o) {
  const Tokenizer old = Tokenizer::load(o.tokenizer, o.pattern);
  const Tokenizer tokenizer = extend_tokenizer(old, o.corpus, o.more);
  tokenizer.save(o.output);
  std::printf("%d new tokens, ids %d to %d: a model needs %d rows of embeddings\n",
              tokenizer.vocab_size() - old.vocab_size(), old.vocab_size(),
              tokenizer.vocab_size() - 1, tokenizer.vocab_size());
}

int run(int argc, char** argv) {
  CLI::App app{
      "Byte pair encoding: trains a tokenizer, turns documents into token shards. Reads and writes "
      "byte-level vocabularies in the formats of Hugging Face, OpenAI and Mistral."};
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  Options o;
  CLI::App* train = app.add_subcommand("train", "documents to a tokenizer");
  add_corpus(train, o);
  train
      ->add_option("--vocab-size", o.vocab_size,
                   concat("number of tokens: 256 bytes, merges, ", kSpecials, " specials"))
      ->required()
      ->default_str("");
  train
      ->add_option("--pattern", o.pattern,
                   "split pattern: gpt2, cl100k, qwen2, o200k, a regular expression, or the path "
                   "of a tokenizer whose normalizer and pre-tokenizer are used")
      ->default_str("cl100k");
  add_memory(train, o);
  train->add_option("-o", o.output, "directory to write")->required();

  CLI::App* encode = app.add_subcommand(
      "encode", "documents to token shards; each document begins with the tokenizer's separator");
  add_tokenizer(encode, o);
  add_corpus(encode, o);
  add_special(encode, o);
  encode->add_option("--cache", o.cache_mib, "MiB of a thread's cache from pieces to ids; 0: none");
  encode->add_option("-o", o.output, "prefix of the shards' paths")->required();

  CLI::App* decode = app.add_subcommand("decode", "ids or shards to text");
  add_tokenizer(decode, o);
  decode->add_option("IDS", o.words, "ids, or shard files")->required()->default_str("");
  decode->add_option("-o", o.output, "file to write; otherwise the standard output");
  add_threads(decode, o);

  CLI::App* show = app.add_subcommand("show", "a text with its tokens made visible");
  add_tokenizer(show, o);
  show->add_option("TEXT", o.words, "the text; without it, the standard input is read")
      ->default_str("");
  show->add_option("-f", o.file, "file to read the text from");
  add_special(show, o);

  CLI::App* ids = app.add_subcommand("ids", "documents to ids, a JSON array on a line for each");
  add_tokenizer(ids, o);
  ids->add_option("INPUT", o.corpus.inputs, kDocuments)->required()->default_str("");
  add_record_flags(*ids, o.corpus.records);
  add_special(ids, o);
  ids->add_flag("--add-special", o.around,
                "put the ids around each text that the tokenizer's post-processor asks for");
  ids->add_flag("--offsets", o.offsets, "print [id, first byte, end] for each token");

  CLI::App* convert = app.add_subcommand("convert", "a tokenizer's file in another format");
  add_tokenizer(convert, o);
  convert->add_option("OUTPUT", o.output, "a directory, a .json file or a .tiktoken file to write")
      ->required();

  CLI::App* extend = app.add_subcommand(
      "extend", "more tokens for an existing vocabulary, behind its last one: no id changes");
  add_tokenizer(extend, o);
  extend->add_option("INPUT", o.corpus.inputs, "documents to train further tokens on, as for train")
      ->default_str("");
  add_record_flags(*extend, o.corpus.records);
  extend->add_option("--special", o.more.specials, "special tokens to add")->default_str("");
  extend->add_option("--tokens", o.more.tokens,
                     "number of tokens to train on the documents, as the present vocabulary "
                     "encodes them");
  add_threads(extend, o);
  add_memory(extend, o);
  extend->add_option("-o", o.output, "directory to write")->required();

  CLI::App* stats = app.add_subcommand("stats", "what a vocabulary makes of a text");
  add_tokenizer(stats, o);
  stats->add_option("INPUT", o.figures.inputs, kDocuments)->required()->default_str("");
  add_record_flags(*stats, o.figures.records);
  stats->add_option("--with", o.figures.others, "further tokenizers to compare with")
      ->default_str("");
  stats->add_option("--html", o.figures.html, "a page to write, with each token in colour");
  stats->add_option("--sample", o.figures.sample, "bytes of the text that the page shows");
  add_threads(stats, o);
  if (!parse_flags(app, argc, argv, {})) return 0;

  require(o.cache_mib >= 0 && o.cache_mib <= 1 << 20, "--cache: found ", o.cache_mib,
          ", expected 0 to ", 1 << 20, " MiB");
  require(o.corpus.max_memory >= 0, "--max-memory: found ", o.corpus.max_memory,
          ", expected 0 or more bytes");
  o.corpus.cache_bytes = size_t(o.cache_mib * double(1 << 20));
  o.corpus.specials = o.special;
  try {
    const bool writes = *train || *encode || *extend || (*decode && !o.output.empty());
    if (writes || *stats) watch_signals();
    if (*train) {
      if (o.pattern.empty()) o.pattern = "cl100k";
      train_command(o);
    } else if (*encode) {
      encode_corpus(o.corpus, Tokenizer::load(o.tokenizer, o.pattern), o.tokenizer, o.output);
      if (!o.pattern.empty()) {
        std::printf(
            "note: the other stages load %s without --pattern: for training, encode with the "
            "tokenizer.json that `./bpe convert %s DIRECTORY --pattern ...` writes\n",
            o.tokenizer.c_str(), o.tokenizer.c_str());
      }
    } else if (*decode) {
      decode_command(Tokenizer::load(o.tokenizer, o.pattern), o.words, o.corpus.threads, o.output);
    } else if (*ids) {
      ids_command(Tokenizer::load(o.tokenizer, o.pattern), o.corpus, o.around, o.offsets);
    } else if (*convert) {
      convert_tokenizer(Tokenizer::load(o.tokenizer, o.pattern), o.output);
    } else if (*extend) {
      extend_command(o);
    } else if (*stats) {
      o.figures.tokenizer = o.tokenizer;
      o.figures.pattern = o.pattern;
      o.figures.threads = o.corpus.threads;
      stats_command(o.figures);
    } else {
      std::string text;
      for (const std::string& word : o.words) text += (text.empty() ? "" : " ") + word;
      if (o.words.empty()) text = read_all(Input(o.file.empty() ? "-" : o.file));
      show_command(Tokenizer::load(o.tokenizer, o.pattern), text, o.special);
    }
  } catch (const Interrupted&) {
    std::fprintf(stderr, "\nstopped; nothing was written\n");
    return 128 + stop_signal;
  }
  return 0;
}

}  // namespace
}  // namespace cake

// Weak: programs that link this file as a library have a main of their own.
__attribute__((weak)) int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  return cake::guarded_main([&] { return cake::run(argc, argv); });
}
