// Part of ./bpe: tokenizer.json, the file of Hugging Face's tokenizers, in and out.
//
// The file says in this order what happens to a text: added_tokens are cut out, the normalizer
// changes the text between them, the pre_tokenizer cuts it into pieces, the model (byte pair
// encoding) makes ids of each, the post_processor puts ids around them; the decoder goes back.
// Whatever would make other ids here than there is refused by its name.
#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>

#include "cake/bpe.h"
#include "cake/chatml.h"
#include "cake/json.h"
#include "cake/tokenizer_files.h"

namespace cake::tokenizer_files {
namespace {

// ---------------------------------------------------------------------------------------------
// Reading

// SentencePiece's models spell spaces with U+2581 and fall back to bytes. That is another
// algorithm.
[[noreturn]] void refuse_kind(const JsonNode& node, std::string_view kind) {
  fail(
      node.where(), ": found ", kind,
      ", expected byte-level BPE: tokenizers of the SentencePiece, WordPiece and Unigram kinds are "
      "not supported");
}

void check_model(const JsonNode& model) {
  const std::string_view type =
      model.has("type") ? model.member("type").string() : std::string_view("BPE");  // older files
  if (type != "BPE") refuse_kind(model.member("type"), type);
  if (model.flag("byte_fallback", false)) refuse_kind(model, "\"byte_fallback\": true");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(key) && !model.member(key).string().empty()) model.member(key).refuse("null");
  }
  if (model.has("dropout") && model.member("dropout").as<double>("a number") != 0) {
    model.member("dropout").refuse("null");
  }
}

// Appends the steps of a normalizer.
void read_normalizer(const JsonNode& node, std::vector<NormalizerStep>& steps) {
  using Kind = NormalizerStep::Kind;
  static const std::vector<std::pair<std::string_view, Kind>> plain = {
      {"NFC", Kind::nfc},
      {"NFD", Kind::nfd},
      {"NFKC", Kind::nfkc},
      {"NFKD", Kind::nfkd},
      {"Lowercase", Kind::lowercase}};
  const std::string_view type = node.member("type").string();
  for (const auto& [name, kind] : plain) {
    if (type == name) return steps.push_back({.kind = kind});
  }
  if (type == "Sequence") {
    for (const JsonNode& inner : node.member("normalizers").items()) read_normalizer(inner, steps);
  } else if (type == "Prepend") {
    steps.push_back({.kind = Kind::prepend, .text = node.text("prepend", "")});
  } else if (type == "Replace") {
    const JsonNode pattern = node.member("pattern");
    if (!pattern.has("String")) pattern.refuse("a String");
    steps.push_back({.kind = Kind::replace,
                     .text = std::string(pattern.member("String").string()),
                     .content = std::string(node.member("content").string())});
  } else {
    if (type == "Precompiled") refuse_kind(node.member("type"), type);
    node.member("type").refuse("NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace or Sequence");
  }
}

constexpr std::pair<const char*, SplitBehavior> kBehaviors[] = {
    {"Isolated", SplitBehavior::isolated},
    {"Removed", SplitBehavior::removed},
    {"MergedWithPrevious", SplitBehavior::merged_with_previous},
    {"MergedWithNext", SplitBehavior::merged_with_next},
    {"Contiguous", SplitBehavior::contiguous}};

SplitBehavior read_behavior(const JsonNode& node) {
  if (!node.has("behavior")) return SplitBehavior::isolated;
  const JsonNode behavior = node.member("behavior");
  for (const auto& [name, value] : kBehaviors) {
    if (behavior.string() == name) return value;
  }
  behavior.refuse("Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous");
}

SplitStep read_split(const JsonNode& node) {
  const JsonNode pattern = node.member("pattern");
  SplitStep step;
  if (pattern.has("Regex")) {
    const JsonNode regex = pattern.member("Regex");
    try {
      step = split_step(std::string(regex.string()));
    } catch (const Error& error) {
      fail(regex.file, ": ", error.what());
    }
  } else {
    step.kind = SplitStep::Kind::literal;
    step.text = pattern.member("String").string();
    if (step.text.empty()) pattern.refuse("a string that is not empty");
  }
  step.behavior = read_behavior(node);
  step.invert = node.flag("invert", false);
  return step;
}

struct PreTokenizerSteps {
  std::vector<SplitStep> steps;
  bool byte_level = false, add_prefix_space = false;
};

void read_pre_tokenizer(const JsonNode& node, PreTokenizerSteps& all) {
  const std::string_view type = node.member("type").string();
  if (type == "Sequence") {
    for (const JsonNode& inner : node.member("pretokenizers").items())
      read_pre_tokenizer(inner, all);
    return;
  }
  if (type == "Metaspace") refuse_kind(node, type);
  const size_t before = all.steps.size();
  if (type == "ByteLevel") {
    if (all.byte_level) node.refuse("one ByteLevel");
    if (node.flag("add_prefix_space", true)) {
      if (!all.steps.empty()) node.refuse("\"add_prefix_space\": false behind another step");
      all.add_prefix_space = true;
    }
    if (node.flag("use_regex", true)) all.steps.push_back({.pattern = Pattern::gpt2});
    all.byte_level = true;
    return;
  }
  if (type == "Split") {
    all.steps.push_back(read_split(node));
  } else if (type == "Digits") {
    all.steps.push_back({.kind = SplitStep::Kind::digits,
                         .individual_digits = node.flag("individual_digits", false)});
  } else if (type == "Punctuation") {
    all.steps.push_back({.kind = SplitStep::Kind::punctuation, .behavior = read_behavior(node)});
  } else {
    node.member("type").refuse("ByteLevel, Split, Digits, Punctuation or Sequence");
  }
  for (size_t i = before; i < all.steps.size(); i++) all.steps[i].of_bytes = all.byte_level;
}

void read_pre_tokenizer(const JsonNode& root, TokenizerData& data) {
  require(root.has("pre_tokenizer"), root.where(),
          ": pre_tokenizer: found null, expected ByteLevel, or Split and ByteLevel");
  const JsonNode node = root.member("pre_tokenizer");
  PreTokenizerSteps all;
  read_pre_tokenizer(node, all);
  if (!all.byte_level) node.refuse("a step ByteLevel: other kinds of BPE are not supported");
  data.add_prefix_space = all.add_prefix_space;
  try {
    data.pre_tokenizer = PreTokenizer(std::move(all.steps));
  } catch (const Error& error) {
    fail(node.file, ": ", error.what());
  }
}

void read_added_tokens(const JsonNode& root, TokenizerData& data) {
  if (!root.has("added_tokens")) return;
  for (const JsonNode& token : root.member("added_tokens").items()) {
    data.added.push_back(
        read_added_token(token, token.member("content").string(), token.member("id").id()));
  }
}

// "left right" or ["left", "right"].
bool split_merge(const JsonElement& merge, std::string_view& left, std::string_view& right) {
  if (merge.is_array()) {
    const simdjson::dom::array pair = merge.get_array();
    return pair.size() == 2 && !pair.at(0).get(left) && !pair.at(1).get(right);
  }
  std::string_view text;
  if (merge.get(text)) return false;
  const size_t space = text.find(' ');
  if (space == std::string_view::npos) return false;
  left = text.substr(0, space), right = text.substr(space + 1);
  return true;
}

void read_model(const JsonNode& model, TokenizerData& data) {
  const JsonNode vocab = model.member("vocab"), list = model.member("merges");
  const simdjson::dom::object entries = vocab.object();
  const size_t bytes = data.json.size() / 4;  // an estimate
  data.reserve(entries.size(), bytes);
  VocabularyBuilder builder(data);
  const std::string where = vocab.where();
  std::unordered_map<std::string_view, int> added;
  for (const AddedToken& token : data.added) added[token.text] = token.id;
  for (const auto& [key, value] : entries) {
    int64_t id;
    const bool good = !value.get(id) && id >= 0 && id <= JsonNode::kMaxTokenId;
    if (!good) JsonNode{value, vocab.file, "model.vocab"}.id();
    builder.add_entry(key, int(id), where);
    const auto it = added.find(key);
    if (it == added.end() || it->second == int(id)) continue;
    fail(model.file, ": added_tokens: found id ", it->second, " for ", json_string(it->first),
         ", expected ", id, ", which model.vocab gives it");  // Hugging Face takes that
  }
  builder.end_entries();
  size_t number = 0;
  for (const JsonElement merge : list.array()) {
    std::string_view left, right;
    if (!split_merge(merge, left, right) || !builder.add_merge(left, right)) {
      list.item(number).refuse(
          "two tokens such that the vocabulary holds both and their concatenation");
    }
    number++;
  }
  const int wrong = builder.end_merges();
  if (wrong >= 0) {
    list.item(size_t(wrong)).refuse("a merge that comes after the merges of its two parts");
  }
}

// A byte without a token becomes the unknown token, where the file names one.
void read_unknown(const JsonNode& model, TokenizerData& data) {
  if (!model.has("unk_token")) return;
  const JsonNode name = model.member("unk_token");
  JsonElement id;
  if (model.member("vocab").value.at_key(name.string()).get(id)) return;
  const bool complete =
      std::all_of(data.ids.begin(), data.ids.begin() + 256, [](int byte) { return byte >= 0; });
  if (complete) return;
  if (model.flag("fuse_unk", false)) model.refuse("\"fuse_unk\": false, as bytes lack tokens");
  data.unknown = JsonNode{id, model.file, "model.unk_token"}.id();
  std::replace(data.ids.begin(), data.ids.begin() + 256, -1, data.unknown);
}

// The ids that a post-processor puts around one text.
void read_post_processor(const JsonNode& node, TokenizerData& data) {
  const std::string_view type = node.member("type").string();
  std::vector<int> begin, end;
  if (type == "Sequence") {
    for (const JsonNode& inner : node.member("processors").items())
      read_post_processor(inner, data);
  } else if (type == "TemplateProcessing") {
    bool behind = false;
    for (const JsonNode& piece : node.member("single").items()) {
      if (piece.has("Sequence")) {
        if (behind) piece.refuse("one Sequence");
        behind = true;
        continue;
      }
      const std::string name(piece.member("SpecialToken").member("id").string());
      const JsonNode ids = node.member("special_tokens").member(name.c_str()).member("ids");
      for (const JsonNode& id : ids.items()) (behind ? end : begin).push_back(id.id());
    }
    if (!behind) node.member("single").refuse("a Sequence");
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    begin.push_back(node.member("cls").item(1).id());
    end.push_back(node.member("sep").item(1).id());
  } else if (type != "ByteLevel") {
    node.member("type").refuse(
        "TemplateProcessing, ByteLevel, BertProcessing, RobertaProcessing or Sequence");
  }
  data.text_begin.insert(data.text_begin.begin(), begin.begin(), begin.end());
  data.text_end.insert(data.text_end.end(), end.begin(), end.end());
}

// Decoding joins the bytes of the tokens: ByteLevel.
void check_decoder(const JsonNode& node) {
  const std::string_view type = node.member("type").string();
  if (type == "Sequence") {
    for (const JsonNode& inner : node.member("decoders").items()) check_decoder(inner);
  } else if (type != "ByteLevel" && type != "Fuse" && type != "ByteFallback") {
    node.member("type").refuse("ByteLevel");
  }
}

}  // namespace

AddedToken read_added_token(const JsonNode& node, std::string_view text, int id) {
  AddedToken token{std::string(text), id};
  token.special = node.flag("special", false);
  token.lstrip = node.flag("lstrip", false);
  token.rstrip = node.flag("rstrip", false);
  token.single_word = node.flag("single_word", false);
  token.normalized = node.flag("normalized", !token.special);
  return token;
}

JsonNode parse_file(simdjson::dom::parser& parser, const std::string& content,
                    const std::string& path) {
  JsonElement element;
  if (const auto error = parser.parse(content).get(element)) {
    fail(path, ": not JSON: ", simdjson::error_message(error));
  }
  return {element, path, ""};
}

std::shared_ptr<TokenizerData> read_tokenizer_json(std::string content, const JsonNode& root) {
  auto data = std::make_shared<TokenizerData>();
  data->json = std::move(content);
  const JsonNode model = root.member("model");
  check_model(model);
  if (root.has("normalizer")) read_normalizer(root.member("normalizer"), data->normalizer.steps);
  read_pre_tokenizer(root, *data);
  data->ignore_merges = model.flag("ignore_merges", false);
  read_added_tokens(root, *data);
  read_model(model, *data);
  read_unknown(model, *data);
  if (root.has("post_processor")) read_post_processor(root.member("post_processor"), *data);
  if (root.has("decoder")) check_decoder(root.member("decoder"));
  return data;
}

// ---------------------------------------------------------------------------------------------
// Writing

namespace {

// Tokens may hold bytes that are no UTF-8: they become U+FFFD.
std::string dump(const OrderedJson& json, int indent = -1) {
  return json.dump(indent, ' ', false, OrderedJson::error_handler_t::replace);
}

OrderedJson byte_level_json(bool use_regex, bool add_prefix_space = false) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", add_prefix_space},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

OrderedJson normalizer_json(const NormalizerStep& step) {
  using Kind = NormalizerStep::Kind;
  switch (step.kind) {
    case Kind::nfc:
      return {{"type", "NFC"}};
    case Kind::nfd:
      return {{"type", "NFD"}};
    case Kind::nfkc:
      return {{"type", "NFKC"}};
    case Kind::nfkd:
      return {{"type", "NFKD"}};
    case Kind::lowercase:
      return {{"type", "Lowercase"}};
    case Kind::prepend:
      return {{"type", "Prepend"}, {"prepend", step.text}};
    case Kind::replace:
      break;
  }
  return {{"type", "Replace"},
          {"pattern", OrderedJson{{"String", step.text}}},
          {"content", step.content}};
}

OrderedJson normalizer_json(const Normalizer& normalizer) {
  if (normalizer.empty()) return nullptr;
  if (normalizer.steps.size() == 1) return normalizer_json(normalizer.steps[0]);
  OrderedJson list = OrderedJson::array();
  for (const NormalizerStep& step : normalizer.steps) list.push_back(normalizer_json(step));
  return {{"type", "Sequence"}, {"normalizers", list}};
}

OrderedJson split_json(const SplitStep& step) {
  using Kind = SplitStep::Kind;
  const char* behavior = kBehaviors[size_t(step.behavior)].first;
  if (step.kind == Kind::digits) {
    return {{"type", "Digits"}, {"individual_digits", step.individual_digits}};
  }
  if (step.kind == Kind::punctuation) return {{"type", "Punctuation"}, {"behavior", behavior}};
  OrderedJson pattern = {{"Regex", step.text}};
  if (step.kind == Kind::literal) pattern = {{"String", step.text}};
  if (step.kind == Kind::pattern) pattern = {{"Regex", pattern_regex(step.pattern)}};
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", step.invert}};
}

// ByteLevel's own pattern is gpt2's, so that a last step with it needs no Split.
OrderedJson pre_tokenizer_json(const TokenizerData& data) {
  const std::vector<SplitStep>& steps = data.pre_tokenizer.steps();
  const auto is_gpt2 = [](const SplitStep& step) {
    return step.kind == SplitStep::Kind::pattern && step.pattern == Pattern::gpt2 &&
           step.behavior == SplitBehavior::isolated && !step.invert;
  };
  size_t before = 0;  // steps in front of ByteLevel
  while (before < steps.size() && !steps[before].of_bytes) before++;
  const bool use_regex = before > 0 && is_gpt2(steps[before - 1]);
  OrderedJson list = OrderedJson::array();
  for (size_t i = 0; i + use_regex < before; i++) list.push_back(split_json(steps[i]));
  list.push_back(byte_level_json(use_regex, data.add_prefix_space));
  for (size_t i = before; i < steps.size(); i++) list.push_back(split_json(steps[i]));
  if (list.size() == 1) return list[0];
  return {{"type", "Sequence"}, {"pretokenizers", list}};
}

OrderedJson post_processor_json(const TokenizerData& data) {
  if (data.text_begin.empty() && data.text_end.empty()) return nullptr;
  OrderedJson single = OrderedJson::array(), pair, specials = OrderedJson::object();
  const auto put = [&](const std::vector<int>& ids) {
    for (const int id : ids) {
      const std::string name(data.token(id));
      single.push_back({{"SpecialToken", OrderedJson{{"id", name}, {"type_id", 0}}}});
      specials[name] = {{"id", name}, {"ids", {id}}, {"tokens", {name}}};
    }
  };
  const auto text = [](const char* id) {
    return OrderedJson{{"Sequence", OrderedJson{{"id", id}, {"type_id", 0}}}};
  };
  put(data.text_begin);
  single.push_back(text("A"));
  put(data.text_end);
  pair = single;
  pair.push_back(text("B"));
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", pair},
          {"special_tokens", specials}};
}

// The items as lines of a JSON list or object.
std::string json_lines(const std::vector<std::string>& items, const std::string& indent) {
  std::string out;
  for (const std::string& item : items) out += (out.empty() ? "\n" : ",\n") + indent + item;
  return out;
}

std::vector<std::string> added_tokens(const TokenizerData& data) {
  std::vector<std::string> items;
  const auto truth = [](bool x) { return x ? "true" : "false"; };
  for (const AddedToken& token : data.added) {
    items.push_back(concat(R"({"id":)", token.id, R"(,"content":)", json_string(token.text),
                           R"(,"single_word":)", truth(token.single_word), R"(,"lstrip":)",
                           truth(token.lstrip), R"(,"rstrip":)", truth(token.rstrip),
                           R"(,"normalized":)", truth(token.normalized), R"(,"special":)",
                           truth(token.special), "}"));
  }
  return items;
}

// Added tokens are in the vocabulary too. Otherwise Hugging Face numbers them from the size of the
// vocabulary on, which is wrong where ids have holes.
std::vector<std::string> vocabulary(const SpelledVocabulary& spelled) {
  std::vector<std::string> items;
  for (size_t id = 0; id < spelled.tokens.size(); id++) {
    if (spelled.tokens[id].empty()) continue;
    items.push_back(json_string(spelled.tokens[id]) + ": " + std::to_string(id));
  }
  return items;
}

std::vector<std::string> json_strings(std::vector<std::string> texts) {
  for (std::string& text : texts) text = json_string(text);
  return texts;
}

}  // namespace

SpelledVocabulary spell_vocabulary(const TokenizerData& data) {
  SpelledVocabulary all;
  std::vector<bool> raw(size_t(data.tokens()));  // not spelled
  for (const AddedToken& token : data.added) raw[size_t(token.id)] = true;
  for (const int id : data.unspelled) raw[size_t(id)] = true;
  for (const int id : data.ids) {
    if (id >= 0 && id != data.unknown) raw[size_t(id)] = false;
  }
  std::unordered_set<std::string> raw_keys;
  for (int id = 0; id < data.tokens(); id++) {
    if (raw[size_t(id)]) raw_keys.insert(std::string(data.token(id)));
  }
  for (int id = 0; id < data.tokens(); id++) {
    const std::string_view bytes = data.token(id);
    all.tokens.push_back(raw[size_t(id)] ? std::string(bytes) : spell(bytes));
    const std::string& key = all.tokens.back();
    if (!raw[size_t(id)] && raw_keys.count(key)) {
      fail("tokenizer: found an added token ", json_string(key), " and another token with that ",
           "spelling, which a tokenizer.json cannot hold");
    }
  }
  const Merges& merges = data.merges;
  const auto put = [&](int left, int right) {
    all.merges.push_back(spell(merges.bytes(left)) + " " + spell(merges.bytes(right)));
  };
  size_t late = 0;
  for (int t = 256; t < merges.size(); t++) {
    const auto [left, right] = merges.parts(t);
    if (left >= 0) put(left, right);
    for (; late < merges.late_pairs().size() && merges.late_pairs()[late].token == t; late++) {
      put(merges.late_pairs()[late].left, merges.late_pairs()[late].right);
    }
  }
  return all;
}

std::string tokenizer_json(const TokenizerData& data) {
  constexpr const char* kForm = R"({
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [%s
  ],
  "normalizer": %s,
  "pre_tokenizer": %s,
  "post_processor": %s,
  "decoder": %s,
  "model": {
    "type": "BPE",
    "dropout": null,
    "unk_token": %s,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": %s,
    "vocab": {%s
    },
    "merges": [%s
    ]
  }
}
)";
  const SpelledVocabulary spelled = spell_vocabulary(data);
  return format(
      kForm, json_lines(added_tokens(data), "    ").c_str(),
      dump(normalizer_json(data.normalizer)).c_str(), dump(pre_tokenizer_json(data)).c_str(),
      dump(post_processor_json(data)).c_str(), dump(byte_level_json(true)).c_str(),
      data.unknown < 0 ? "null" : json_string(data.token(data.unknown)).c_str(),
      data.ignore_merges ? "true" : "false", json_lines(vocabulary(spelled), "      ").c_str(),
      json_lines(json_strings(spelled.merges), "      ").c_str());
}

std::string tokenizer_config_json(const TokenizerData& data) {
  OrderedJson config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                        {"add_prefix_space", data.add_prefix_space},
                        {"clean_up_tokenization_spaces", false}};
  if (data.added_ids.count("<|endoftext|>")) {
    for (const char* role : {"bos_token", "eos_token", "pad_token"}) config[role] = "<|endoftext|>";
  } else {
    if (data.separator >= 0) config["bos_token"] = data.token(data.separator);
    for (const char* name : {"<|end_of_text|>", "</s>"}) {
      if (data.added_ids.count(name)) config["eos_token"] = name;
    }
  }
  if (data.added_ids.count("<|im_end|>")) config["chat_template"] = kChatTemplate;
  return dump(config, 2) + "\n";
}

}  // namespace cake::tokenizer_files
