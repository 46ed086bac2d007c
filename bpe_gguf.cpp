// Part of ./bpe: the tokenizer in the keys of a .gguf file, where it is byte-level BPE:
//
//     tokenizer.ggml.tokens      by id: spelled as in tokenizer.json; special tokens as text
//     tokenizer.ggml.token_type  normal, control, user-defined, unused ...
//     tokenizer.ggml.merges      "left right", in their order
//     tokenizer.ggml.pre         a name for how text is split: kGgufPreTokenizers
//
// tokenizer_config.json gets what else the keys say: bos, eos and padding tokens, chat template.
#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "cake/bpe.h"
#include "cake/gguf_model.h"
#include "cake/json.h"
#include "cake/tokenizer_files.h"

namespace cake::tokenizer_files {
namespace {

enum TokenType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5 };

void check_model(const GgufFile& file) {
  const std::string& model = file.text("tokenizer.ggml.model");
  if (model == "gpt2") return;
  const char* kind = model == "llama"  ? " (SentencePiece)"
                     : model == "bert" ? " (WordPiece)"
                     : model == "t5"   ? " (Unigram)"
                                       : "";
  fail(file.path().string(), ": tokenizer.ggml.model: found ", model, kind,
       ", expected gpt2, byte-level BPE: tokenizers of other kinds are not supported");
}

const GgufPreTokenizer& find_pre_tokenizer(const GgufFile& file) {
  const std::string& name = file.text("tokenizer.ggml.pre");
  std::string known;
  for (const GgufPreTokenizer& pre : kGgufPreTokenizers) {
    if (name == pre.name) return pre;
    known += concat(known.empty() ? "" : ", ", pre.name);
  }
  fail(file.path().string(), ": tokenizer.ggml.pre: found ", name, ", expected one of ", known);
}

PreTokenizer make_pre_tokenizer(const GgufPreTokenizer& pre) {
  const std::string pattern = pre.pattern;
  if (pattern != "gpt2_digits") return PreTokenizer(parse_pattern(pattern));
  return PreTokenizer({{.kind = SplitStep::Kind::digits}, {.pattern = Pattern::gpt2}});
}

// The id that a key gives; -1 where the key is absent or the token is none.
int special_id(const GgufFile& file, const TokenizerData& data, const char* name) {
  const std::string key = concat("tokenizer.ggml.", name);
  if (!file.has(key)) return -1;
  const int64_t id = file.integer(key);
  return id >= 0 && id < data.tokens() && !data.token(int(id)).empty() ? int(id) : -1;
}

// Whether the tokens were trained here: then all of kSpecialTokens are special. Our exports give
// those of tools and thoughts the type user-defined, so that other programs show them to users. In
// other files the type says it: Qwen's <think> is matched in every text.
bool are_trained_here(const std::vector<std::string>& tokens) {
  const std::unordered_set<std::string_view> all(tokens.begin(), tokens.end());
  return std::all_of(std::begin(kSpecialTokens), std::end(kSpecialTokens),
                     [&](const char* name) { return all.count(name) > 0; });
}

void read_tokens(const GgufFile& file, TokenizerData& data, VocabularyBuilder& builder) {
  const std::string key = "tokenizer.ggml.tokens", type_key = "tokenizer.ggml.token_type";
  const std::string where = concat(file.path().string(), ": ", key);
  const std::vector<std::string>& tokens = file.texts(key);
  require(tokens.size() <= size_t(JsonNode::kMaxTokenId), where, ": found ", tokens.size(),
          " tokens, expected at most ", JsonNode::kMaxTokenId);
  std::vector<int64_t> types(tokens.size(), kNormal);
  if (file.has(type_key)) types = file.integers(type_key);
  require(types.size() == tokens.size(), file.path().string(), ": ", type_key, ": found ",
          types.size(), " types, expected ", tokens.size(), ", one for each token");
  size_t bytes = 0;
  for (const std::string& token : tokens) bytes += token.size();
  data.reserve(tokens.size(), bytes);
  const bool own = are_trained_here(tokens);
  std::unordered_set<std::string_view> added;
  for (size_t i = 0; i < tokens.size(); i++) {
    const int id = int(i);
    const std::string& text = tokens[i];
    if (types[i] == kUnused || text.empty()) continue;  // rows without a token: [PAD49152]
    const bool special = types[i] == kControl || types[i] == kUnknown || gguf_name_ends_text(text);
    if (!special && types[i] != kUserDefined) {
      builder.add_entry(text, id, where);
      continue;
    }
    require(added.insert(text).second, where, ": found ", json_string(text), " twice");
    const bool reserved = own && std::find(std::begin(kSpecialTokens), std::end(kSpecialTokens),
                                           text) != std::end(kSpecialTokens);
    data.added.push_back({.text = text, .id = id, .special = special || reserved});
  }
  builder.end_entries();
}

void read_merges(const GgufFile& file, VocabularyBuilder& builder) {
  const std::string key = "tokenizer.ggml.merges";
  const std::vector<std::string>& merges = file.texts(key);
  const auto refuse = [&](size_t i, const char* expected) {
    fail(file.path().string(), ": ", key, "[", i, "]: found ", json_string(merges[i]),
         ", expected ", expected);
  };
  for (size_t i = 0; i < merges.size(); i++) {
    const std::string_view merge = merges[i];
    const size_t space = merge.find(' ');
    if (space == merge.npos ||
        !builder.add_merge(merge.substr(0, space), merge.substr(space + 1))) {
      refuse(i, "two tokens such that the tokens hold both and their concatenation");
    }
  }
  const int wrong = builder.end_merges();
  if (wrong >= 0) {
    refuse(size_t(wrong), "a merge that comes after the merges of its two parts");
  }
}

std::string config_json(const GgufFile& file, const TokenizerData& data) {
  OrderedJson config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                        {"add_bos_token", !data.text_begin.empty()},
                        {"add_eos_token", !data.text_end.empty()},
                        {"clean_up_tokenization_spaces", false}};
  for (const auto& [role, key] :
       {std::pair{"bos_token", "bos_token_id"}, std::pair{"eos_token", "eos_token_id"},
        std::pair{"pad_token", "padding_token_id"}, std::pair{"unk_token", "unknown_token_id"}}) {
    const int id = special_id(file, data, key);
    if (id >= 0) config[role] = data.token(id);
  }
  const std::string context = file.text_or("general.architecture", "") + ".context_length";
  if (file.has(context)) config["model_max_length"] = file.integer(context);
  if (const std::string text = gguf_chat_template(file); !text.empty()) {
    config["chat_template"] = text;
  }
  return config.dump(2, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
}

}  // namespace

std::shared_ptr<TokenizerData> read_gguf_tokenizer(const std::filesystem::path& path) {
  const GgufFile file(path);
  check_model(file);
  const GgufPreTokenizer& pre = find_pre_tokenizer(file);
  auto data = std::make_shared<TokenizerData>();
  data->pre_tokenizer = make_pre_tokenizer(pre);
  data->ignore_merges = pre.ignore_merges;
  VocabularyBuilder builder(*data);
  read_tokens(file, *data, builder);
  read_merges(file, builder);
  for (const AddedToken& token : data->added) data->add_token(token.id, token.text);
  const auto add = [&](std::vector<int>& ids, const char* key, bool fallback, const char* name) {
    const int id = special_id(file, *data, name);
    if (file.boolean_or(key, fallback) && id >= 0) ids.push_back(id);
  };
  add(data->text_begin, "tokenizer.ggml.add_bos_token", pre.add_bos, "bos_token_id");
  add(data->text_end, "tokenizer.ggml.add_eos_token", false, "eos_token_id");
  data->config = config_json(file, *data);
  return data;
}

}  // namespace cake::tokenizer_files
