// A model as one GGUF file, for llama.cpp and for what is built on it (LM Studio, Ollama). Which
// tensor holds which row of the parameter table is said in cake/gguf_model.h; here are the keys,
// the tokenizer, and the types of tensors.
//
// llama.cpp reads exactly the tensors that an architecture has, and refuses a file with others. It
// knows how to split text by the name of a pre-tokenizer alone. So a model that it would compute in
// another way, or whose tokenizer would give other ids, is refused here; where it differs in rare
// texts alone, a note says so.
#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cake/bpe.h"
#include "cake/checkpoint.h"
#include "cake/gguf.h"
#include "cake/gguf_model.h"
#include "cake/gpt.h"
#include "cake/tokenizer.h"
#include "cake/tokenizer_files.h"

namespace cake {

struct GgufExport {
  GgufType type = GgufType::f32;  // of the matrices: f32, f16, bf16, q8_0 or q4_0
  std::string chat_template;      // Jinja; empty: none
  std::string name;               // general.name; empty: family and size
};

// Writes `gpt`, a language model without adapters. The bytes depend on the arguments alone, not on
// the path, the date or the machine. Returns notes for the user: where llama.cpp will differ.
// Throws Error for what the format or llama.cpp cannot express.
inline std::vector<std::string> write_gguf(const std::filesystem::path& path, const Gpt& gpt,
                                           const Tokenizer& tokenizer, const GgufExport& options);

// ---------------------------------------------------------------------------------------------
// The tokenizer

// With ignore_merges, a piece that is a token is that token. This makes no difference where the
// merges alone make every token of its own bytes.
inline bool merges_make_every_token(const TokenizerData& data) {
  Merges::Scratch scratch;
  for (int t = 256; t < data.merges.size(); t++) {
    data.merges.encode(data.merges.bytes(t), scratch);
    if (scratch.tokens.size() != 1) return false;
  }
  return true;
}

// The name by which llama.cpp knows how this tokenizer splits text. Throws Error when there is
// none.
inline std::string gguf_pre_tokenizer(const TokenizerData& data, std::vector<std::string>& notes) {
  const std::string found = data.pre_tokenizer.description();
  bool known = false;
  for (const bool equivalent : {false, true}) {
    if (equivalent && !(data.ignore_merges && merges_make_every_token(data))) continue;
    for (const GgufPreTokenizer& pre : kGgufPreTokenizers) {
      if (pre.pattern != found) continue;
      known = true;
      if (pre.ignore_merges != (data.ignore_merges && !equivalent)) continue;
      if (found == "o200k") {
        notes.push_back(
            "llama.cpp splits o200k in another way at combining marks and at upper case outside "
            "ASCII: such text may get other ids there");
      }
      return pre.name;
    }
  }
  if (known) {
    fail("tokenizer: found ", data.ignore_merges ? "" : "no ", "ignore_merges with the split ",
         "pattern ", found, ", which llama.cpp does not combine");
  }
  fail("tokenizer: found the split pattern ", json_text(found), ", expected gpt2, gpt2_digits, ",
       "cl100k, qwen2 or o200k: llama.cpp knows patterns by name, and not this one");
}

// Throws Error for what llama.cpp leaves out when it encodes text.
inline void expect_gguf_tokenizer(const TokenizerData& data, std::vector<std::string>& notes) {
  for (const NormalizerStep& step : data.normalizer.steps) {
    if (step.kind != NormalizerStep::Kind::nfc) {
      fail("tokenizer: found a normalizer other than NFC, expected none: llama.cpp does not ",
           "normalize text");
    }
    notes.push_back(
        "llama.cpp does not compose characters (NFC): text with combining marks may get other ids "
        "there");
  }
  if (data.add_prefix_space) {
    fail("tokenizer: found add_prefix_space, expected false: llama.cpp puts no space before a ",
         "text of this kind of tokenizer");
  }
  if (!data.text_end.empty()) {
    fail("tokenizer: found token ", data.text_end[0],
         " behind every text, expected none: ", "llama.cpp puts at most the end token there");
  }
  for (const AddedToken& token : data.added) {
    if (!token.lstrip && !token.rstrip && !token.single_word) continue;
    fail("tokenizer: found the token ", json_text(token.text), " with ",
         token.lstrip   ? "lstrip"
         : token.rstrip ? "rstrip"
                        : "single_word",
         ", expected none: a GGUF file has no key for it");
  }
  if (data.unknown >= 0) {
    notes.push_back(
        "some bytes have no token: here they become the unknown token, llama.cpp leaves them out");
  }
}

// LLAMA_TOKEN_TYPE of llama.h.
enum class GgufTokenType : int32_t { normal = 1, unknown, control, user_defined, unused };

// What an assistant writes for its reader or for a program: clients show these tokens, while they
// hide control tokens. llama.cpp finds user-defined tokens in every text, also in what a user
// types.
inline bool is_shown_by_clients(std::string_view token) {
  constexpr std::string_view kShown[] = {"<tool_call>",      "</tool_call>", "<tool_response>",
                                         "</tool_response>", "<think>",      "</think>"};
  return std::find(std::begin(kShown), std::end(kShown), token) != std::end(kShown);
}

struct GgufVocabulary {
  std::vector<std::string> tokens;  // (V), each once; ids without a token are "[PAD<id>]"
  std::vector<int32_t> types;       // (V) GgufTokenType
  std::vector<std::string> merges;
};

inline GgufVocabulary gguf_vocabulary(const TokenizerData& data, int V) {
  if (data.tokens() > V) {
    fail("tokenizer: found ", data.tokens(), " tokens, expected at most vocab_size ", V);
  }
  auto spelled = tokenizer_files::spell_vocabulary(data);
  GgufVocabulary all{.tokens = std::move(spelled.tokens), .merges = std::move(spelled.merges)};
  all.tokens.resize(size_t(V));
  all.types.assign(size_t(V), int32_t(GgufTokenType::normal));
  for (const AddedToken& token : data.added) {
    const bool shown = !token.special || is_shown_by_clients(token.text);
    all.types[size_t(token.id)] =
        int32_t(shown ? GgufTokenType::user_defined : GgufTokenType::control);
  }
  std::unordered_set<std::string_view> seen;
  for (size_t id = 0; id < all.tokens.size(); id++) {
    std::string& token = all.tokens[id];
    if (token.empty()) {
      token = concat("[PAD", id, "]");
      all.types[id] = int32_t(GgufTokenType::unused);
    }
  }
  for (const std::string& token : all.tokens) {
    if (!seen.insert(token).second) {
      fail("tokenizer: found the token ", json_text(token), " twice, expected it once: llama.cpp ",
           "finds tokens by their text");
    }
  }
  return all;
}

// The template without the tags {% generation %} and {% endgeneration %}, which tell a trainer what
// to train on, and which many programs that read GGUF files cannot parse. The white space that the
// tags take along goes with them: all of it beside a minus sign; otherwise, as Hugging Face and
// llama.cpp set Jinja up, that in front of it on its line, and one line end behind it.
inline std::string without_generation_tags(const std::string& text) {
  constexpr std::string_view kSpaces = " \t\r\n";
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t open = text.find("{%", i);
    const size_t close = open == text.npos ? text.npos : text.find("%}", open);
    if (close == text.npos) return out += text.substr(i);
    const bool left = text[open + 2] == '-', right = text[close - 1] == '-' && close - 1 > open + 2;
    const std::string_view words = strip_ascii(
        std::string_view(text).substr(open + 2 + left, close - right - (open + 2 + left)));
    if (words != "generation" && words != "endgeneration") {
      out += text.substr(i, close + 2 - i);
      i = close + 2;
      continue;
    }
    out += text.substr(i, open - i);
    if (left) {
      out.resize(out.find_last_not_of(kSpaces) + 1);
    } else {
      const size_t indent = out.find_last_not_of(" \t") + 1;
      if (indent == 0 || out[indent - 1] == '\n') out.resize(indent);
    }
    i = close + 2;
    if (right) {
      i = std::min(text.find_first_not_of(kSpaces, i), text.size());
    } else if (i < text.size() && text[i] == '\n') {
      i++;
    }
  }
  return out;
}

// ---------------------------------------------------------------------------------------------
// Which tokens begin and end a text

struct GgufSpecialTokens {
  int bos, eos, eot;  // ids; eot: the end of a turn
  bool add_bos;       // in front of every text
};

// A base model is given <|endoftext|> or the like in front of a text, and so is a chat model of
// Llama 3. A ChatML model that was trained here is not.
inline GgufSpecialTokens gguf_special_tokens(const Config& c, const Tokenizer& tokenizer,
                                             const std::string& chat_template) {
  const std::vector<int> ends = c.all_end_tokens();
  const auto ends_turns = [&](const char* name, const char* mark) {
    const int id = tokenizer.special(name);
    const bool is_end = std::find(ends.begin(), ends.end(), id) != ends.end();
    return is_end && chat_template.find(mark) != std::string::npos ? id : -1;
  };
  // A base model may have the template too, and <|im_end|> as one more end token.
  int chatml = ends_turns("<|im_end|>", "<|im_start|>");
  if (chatml >= 0 && chatml != ends[0]) chatml = -1;
  const int llama3 = ends_turns("<|eot_id|>", "<|start_header_id|>");
  const int separator = tokenizer.find_document_separator();
  GgufSpecialTokens ids;
  ids.eos = !ends.empty() ? ends[0] : separator;
  if (ids.eos < 0) {
    fail("config.json: eos_token_id is missing, and the tokenizer has no <|endoftext|>: llama.cpp ",
         "would take token 11 for the end of a text");
  }
  ids.eot = chatml >= 0 ? chatml : llama3 >= 0 ? llama3 : ids.eos;
  const int begin = separator >= 0 ? separator : c.bos;
  ids.add_bos = chatml < 0 && begin >= 0;
  ids.bos = ids.add_bos ? begin : c.bos >= 0 ? c.bos : begin >= 0 ? begin : ids.eos;
  return ids;
}

// ---------------------------------------------------------------------------------------------
// Tensors

// Vectors and positions are always f32. A row that is no multiple of a block is f16. With q4_0, the
// head (or the embedding that is also the head) stays q8_0, as llama-quantize has it.
inline GgufType gguf_tensor_type(const Config& c, const Tensor& t, GgufType type) {
  if (t.kind == Kind::vector || t.kind == Kind::position) return GgufType::f32;
  const bool is_head = t.kind == Kind::head || (t.kind == Kind::embedding && c.tied);
  if (type == GgufType::q4_0 && is_head) type = GgufType::q8_0;
  return t.in % gguf_blocks(type).values == 0 ? type : GgufType::f16;
}

// rope_type llama3 is a tensor there: what the frequency of each pair is divided by. (HS/2)
inline std::vector<float> gguf_rope_divisors(const Config& c) {
  Config plain = c;
  plain.rope.factor = 0;
  const std::vector<double> before = rope_frequencies(plain), after = rope_frequencies(c);
  std::vector<float> divisors;
  for (size_t i = 0; i < before.size(); i++) divisors.push_back(float(before[i] / after[i]));
  return divisors;
}

inline bool has_llama3_rope(const Config& c) { return c.rope.type() == std::string("llama3"); }

// Throws Error for a model that llama.cpp would refuse, or compute in another way.
inline void expect_gguf_model(const Gpt& gpt) {
  const Config& c = gpt.config();
  if (c.head != Head::lm) {
    fail("found ", architecture_name(c), ", expected a language model: a GGUF file has no tensor ",
         "for the score of a reward model");
  }
  if (gpt.table().lora.rank > 0) fail("found adapters, expected them merged into the model");
  if (c.family != Family::llama && has_llama3_rope(c)) {
    fail("config.json: rope_type: found llama3 in a ", kModelTypes[int(c.family)],
         ", expected default or linear: llama.cpp has it for the architecture llama alone");
  }
  if (c.family == Family::qwen2 && c.NH * c.HS != c.C) {
    fail("config.json: head_dim: found ", c.HS, " and ", c.NH, " heads, expected hidden_size ", c.C,
         " in all: llama.cpp has no others for qwen2");
  }
  constexpr int kMostLayers = 512;
  if (c.L > kMostLayers) {
    fail("config.json: found ", c.L, " layers, expected at most ", kMostLayers, " for llama.cpp");
  }
}

// The tensors of the file, in its order, with the rows of the table that each holds.
struct GgufRows {
  std::string name;
  std::vector<int64_t> shape;
  GgufType type;
  std::vector<size_t> rows;
};
inline std::vector<GgufRows> gguf_rows(const Gpt& gpt, GgufType type) {
  std::vector<GgufRows> all;
  for (size_t i = 0; i < gpt.table().tensors.size(); i++) {
    const Tensor& t = gpt.table().tensors[i];
    const std::string name = gguf_tensor_name(gpt.config(), t);
    const auto it =
        std::find_if(all.begin(), all.end(), [&](const GgufRows& r) { return r.name == name; });
    if (it != all.end()) {
      it->rows.push_back(i);
    } else {
      all.push_back({name, gguf_shape(t), gguf_tensor_type(gpt.config(), t, type), {i}});
    }
  }
  return all;
}

// ---------------------------------------------------------------------------------------------
// The file

// 135M, 1.2B: two digits or more, as llama.cpp's converter writes general.size_label.
inline std::string gguf_size_label(int64_t parameters) {
  double x = double(parameters) / 1e3;
  const char* unit = "K";
  for (const char* next : {"M", "B", "T"}) {
    if (x <= 1000) break;
    x /= 1000, unit = next;
  }
  return format("%.*f%s", x < .5 ? 2 : x < 9.5 ? 1 : 0, x, unit);
}

// general.file_type: llama_ftype of llama.h.
inline uint32_t gguf_file_type(GgufType type) {
  switch (type) {
    case GgufType::f32:
      return 0;
    case GgufType::f16:
      return 1;
    case GgufType::q4_0:
      return 2;
    case GgufType::q8_0:
      return 7;
    case GgufType::bf16:
      return 32;
    default:
      fail("--type: found ", gguf_blocks(type).name, ", expected f32, f16, bf16, q8_0 or q4_0");
  }
}

inline void write_general_keys(GgufWriter& out, const Gpt& gpt, const GgufExport& options) {
  const Config& c = gpt.config();
  const std::string size = gguf_size_label(gpt.table().parameters());
  const std::string family = kModelTypes[int(c.family)];
  out.set_text("general.architecture", gguf_architecture(c));
  out.set_text("general.type", "model");
  out.set_text("general.name", options.name.empty() ? family + " " + size : options.name);
  out.set_text("general.size_label", size);
  out.set_u32("general.file_type", gguf_file_type(options.type));
  if (gguf_blocks(options.type).values > 1) out.set_u32("general.quantization_version", 2);
}

inline void write_model_keys(GgufWriter& out, const Config& c) {
  const std::string a = std::string(gguf_architecture(c)) + ".";
  out.set_u32(a + "vocab_size", uint32_t(c.V));
  out.set_u32(a + "context_length", uint32_t(c.T));
  out.set_u32(a + "embedding_length", uint32_t(c.C));
  out.set_u32(a + "block_count", uint32_t(c.L));
  out.set_u32(a + "feed_forward_length", uint32_t(c.F));
  out.set_u32(a + "attention.head_count", uint32_t(c.NH));
  out.set_u32(a + "attention.head_count_kv", uint32_t(c.NKV));
  out.set_u32(a + "attention.key_length", uint32_t(c.HS));
  out.set_u32(a + "attention.value_length", uint32_t(c.HS));
  if (c.family == Family::gpt2) {
    out.set_f32(a + "attention.layer_norm_epsilon", float(c.norm_eps));
    return;
  }
  out.set_f32(a + "attention.layer_norm_rms_epsilon", float(c.norm_eps));
  out.set_u32(a + "rope.dimension_count", uint32_t(c.HS));
  out.set_f32(a + "rope.freq_base", float(c.rope.theta));
  if (c.rope.linear) {
    out.set_text(a + "rope.scaling.type", "linear");
    out.set_f32(a + "rope.scaling.factor", float(c.rope.factor));
  }
}

inline void write_tokenizer_keys(GgufWriter& out, const Config& c, const Tokenizer& tokenizer,
                                 const GgufExport& options, std::vector<std::string>& notes) {
  const TokenizerData& data = tokenizer.data();
  expect_gguf_tokenizer(data, notes);
  const std::string pre = gguf_pre_tokenizer(data, notes);
  const GgufVocabulary vocabulary = gguf_vocabulary(data, c.V);
  const GgufSpecialTokens ids = gguf_special_tokens(c, tokenizer, options.chat_template);
  const std::string t = "tokenizer.ggml.";
  out.set_text(t + "model", "gpt2");  // byte-level BPE, in every family
  out.set_text(t + "pre", pre);
  out.set_texts(t + "tokens", vocabulary.tokens);
  out.set_i32s(t + "token_type", vocabulary.types);
  out.set_texts(t + "merges", vocabulary.merges);
  out.set_u32(t + "bos_token_id", uint32_t(ids.bos));
  out.set_u32(t + "eos_token_id", uint32_t(ids.eos));
  out.set_u32(t + "eot_token_id", uint32_t(ids.eot));
  if (c.pad >= 0) out.set_u32(t + "padding_token_id", uint32_t(c.pad));
  if (data.unknown >= 0) out.set_u32(t + "unknown_token_id", uint32_t(data.unknown));
  out.set_bool(t + "add_bos_token", ids.add_bos);
  out.set_bool(t + "add_eos_token", false);
  out.set_bool(t + "add_space_prefix", false);
  if (!options.chat_template.empty()) {
    out.set_text("tokenizer.chat_template", without_generation_tags(options.chat_template));
  }
}

inline void write_tensors(GgufWriter& out, const Gpt& gpt, GgufType type) {
  const Config& c = gpt.config();
  const std::vector<GgufRows> tensors = gguf_rows(gpt, type);
  const bool divisors = has_llama3_rope(c);
  if (divisors) out.add_tensor("rope_freqs.weight", {c.HS / 2}, GgufType::f32);
  for (const GgufRows& r : tensors) out.add_tensor(r.name, r.shape, r.type);
  if (divisors) out.write(gguf_rope_divisors(c));
  std::vector<float> row, whole;
  for (const GgufRows& r : tensors) {
    if (stop_signal) fail("stopped by a signal: not written");
    const int64_t in = gpt.table().tensors[r.rows[0]].in;
    whole.resize(size_t(r.shape[0] * in));
    for (const size_t i : r.rows) {
      const Tensor& t = gpt.table().tensors[i];
      row.resize(size_t(t.size()));
      gpt.read(int(i), Slot::weight, row);
      check_finite(t.name, row, ": not exported");
      for (int64_t o = 0; o < t.out; o++) {
        std::copy_n(row.begin() + o * in, in, whole.begin() + gguf_row(c, t, o) * in);
      }
    }
    out.write(whole);
  }
}

inline std::vector<std::string> write_gguf(const std::filesystem::path& path, const Gpt& gpt,
                                           const Tokenizer& tokenizer, const GgufExport& options) {
  try {
    expect_gguf_model(gpt);
    std::vector<std::string> notes;
    GgufWriter out(path);
    write_general_keys(out, gpt, options);
    write_model_keys(out, gpt.config());
    write_tokenizer_keys(out, gpt.config(), tokenizer, options, notes);
    write_tensors(out, gpt, options.type);
    out.commit();
    return notes;
  } catch (const Error& e) {
    const std::string what = e.what();
    if (what.starts_with(path.string())) throw;
    fail(path.string(), ": ", what);
  }
}

}  // namespace cake
