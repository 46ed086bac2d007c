// The models of a server: opened, fitted into the memory, loaded.
//
//     NAME=PATH -> open: tokenizer, chat template, default sampling -> plan: context and KV cache
//               -> load: weights, fingerprint
//
// The plan is made, and printed, before any weights are read. What every model takes for certain is
// counted first: its weights and the activations of one step. What is left is for keys and values:
// equal shares, and what one model cannot use goes to the others.
#include <sys/stat.h>

#include <algorithm>
#include <limits>

#include "cake/serve.h"
#include "cake/sha256.h"

namespace cake {

namespace {

struct ModelPlan {
  GptOptions engine;
  GeneratorOptions generator;
  int64_t fixed_bytes = 0, page_bytes = 0, cache_bytes = 0;
  std::string items;  // what fixed_bytes are
};

// ---------------------------------------------------------------------------------------------
// Opening

// NAME=PATH, or PATH alone, which may hold a "=" too: it is a path where there is such a file.
std::pair<std::string, std::string> split_model_argument(const std::string& argument) {
  const size_t equals = argument.find('=');
  const bool named = equals != std::string::npos && !std::filesystem::exists(argument);
  if (!named) return {argument, argument};
  const std::string name = argument.substr(0, equals), path = argument.substr(equals + 1);
  require(!name.empty() && !path.empty(), "model: found ", argument, ", expected NAME=PATH");
  return {name, path};
}

// The template that the server talks in; none: of a base model. A base model may come with the
// template of the assistants that are made of it: it does not end its turns.
std::optional<ChatTemplate> served_template(const TextModel& m, const std::string& id,
                                            const TemplateFlags& flags, std::string& note) {
  const bool is_own = flags.choice == "auto";
  if (flags.choice == "none" && !(flags.values.empty() && flags.date.empty())) {
    fail("--template none: found ", flags.values.empty() ? "--date" : "--template-set",
         ", expected it with a chat template");
  }
  if (flags.choice == "none" || (is_own && chat_template(m.dir).empty())) return std::nullopt;
  const ChatTemplate found = find_template(m, flags);
  // Errors that clients see name the model, not its path.
  ChatTemplate chat(m.tokenizer, found.text(), "the chat template of " + id, found.options());
  const int end_of_turn = chat.find_end_of_turn();
  const std::vector<int> ends = m.config.all_end_tokens();
  const bool is_base = is_own && end_of_turn >= 0 && !ends.empty() &&
                       std::find(ends.begin(), ends.end(), end_of_turn) == ends.end();
  if (!is_base) return chat;
  note = concat("; a base model, since it does not end its turns with ",
                m.tokenizer.token_bytes(end_of_turn), ": --template makes it talk");
  return std::nullopt;
}

int64_t changed_at(const std::filesystem::path& model) {  // seconds since 1970, of its newest file
  const auto seconds = [](const std::filesystem::path& path) {
    struct stat status;
    return stat(path.c_str(), &status) == 0 ? int64_t(status.st_mtim.tv_sec) : 0;
  };
  if (!std::filesystem::is_directory(model)) return seconds(model);
  int64_t newest = 0;
  for (const auto& entry : std::filesystem::directory_iterator(model)) {
    if (entry.is_regular_file()) newest = std::max(newest, seconds(entry.path()));
  }
  return newest;
}

ModelOptions options_of(const ServeOptions& o, const std::string& path) {
  ModelOptions options = o.model;
  options.path = path;
  return options;
}

ServedModel open_served(const ServeOptions& o, const std::string& argument, std::string& note) {
  const auto [id, path] = split_model_argument(argument);
  ServedModel m{.id = id, .text = open_model(options_of(o, path))};
  use_template(m.text, served_template(m.text, id, o.chat_template, note));
  m.created = changed_at(m.text.dir);
  m.deterministic = find_device(parse_device(o.model.device)) == Device::cpu;
  m.sampling = default_sampling(m.text.dir, m.text.tokenizer.vocab_size());
  return m;
}

// The tools of the models that can call them. The documents are read once; each model measures
// passages with its own tokenizer.
void add_tools(std::vector<ServedModel>& models, const ServeOptions& o) {
  std::vector<std::string> documents;
  if (!o.documents.empty()) documents = Search::read_documents(o.documents);
  bool used = false;
  for (ServedModel& m : models) {
    // Tools run behind the token that ends a turn.
    if (!m.text.chat || !m.text.chat->has_tools() || m.text.chat->find_end_of_turn() < 0) continue;
    used = true;
    if (o.calculator) m.tools.push_back(kCalculatorTool);
    if (o.documents.empty()) continue;
    m.tools.push_back(kSearchTool);
    m.search = std::make_shared<const Search>(documents, [&](std::string_view text) {
      return int(m.text.tokenizer.encode(text).size());
    });
  }
  require(used || (!o.calculator && o.documents.empty()), "--calculator, --documents: found no ",
          "model whose chat template has calls between <tool_call> and </tool_call>, and a token ",
          "that ends turns");
}

// ---------------------------------------------------------------------------------------------
// Memory

struct Budget {
  int64_t available = 0, memory = 0;  // that is free; that may be taken
  bool stated = false;                // by --memory-mb

  Budget(Device device, int memory_mb)
      : available(free_memory(device)), memory(available), stated(memory_mb > 0) {
    if (stated) memory = std::min(available, int64_t(memory_mb) << 20);
  }
  void expect_room(int64_t taken, const char* what, const char* lower) const {
    if (taken <= memory) return;
    const bool by_flag = stated && memory < available;
    fail("out of memory: ", what, " take ", bytes_text(double(taken)), ", found ",
         bytes_text(double(memory)), by_flag ? " (--memory-mb); raise it, " : " available; ",
         lower);
  }
};

// What a model takes whatever its cache holds: its weights, and one step.
ModelPlan plan_fixed(const TextModel& m, const ServeOptions& o) {
  ModelPlan p;
  p.generator.rows = o.engine.rows;
  p.generator.prefill_slice = 0;  // as long as a step of the rows that decode
  p.engine = engine_options(m, o.model, 0, decode_plan(p.generator));
  p.generator.cache_type = p.engine.decode.cache;
  const MemoryPlan taken = plan_memory(m.config, p.engine);  // the cache has no positions yet
  for (const MemoryPlan::Item& item : taken.items) {
    if (item.bytes == 0) continue;
    p.items += concat(p.items.empty() ? "" : ", ", item.what, " ", bytes_text(double(item.bytes)));
  }
  p.fixed_bytes = taken.total();
  p.page_bytes = cache_page_bytes(m.config, p.engine);
  return p;
}

// A cache that takes `bytes` at most, unless one sequence needs more.
void limit_cache_bytes(ModelPlan& p, int64_t bytes) {
  GeneratorOptions& g = p.generator;
  g.cache_positions = cache_positions(g.rows, g.context, bytes, p.page_bytes);
  p.cache_bytes = g.cache_positions / kPage * p.page_bytes;
  p.engine.decode = decode_plan(g);
}

std::vector<ModelPlan> plan_models(const std::vector<ServedModel>& models, const ServeOptions& o,
                                   const Budget& budget) {
  std::vector<ModelPlan> plans;
  int64_t taken = 0;
  int longest = 0;
  for (const ServedModel& m : models) {
    plans.push_back(plan_fixed(m.text, o));
    taken += plans.back().fixed_bytes;
    longest = std::max(longest, m.text.config.T);
  }
  budget.expect_room(taken, "the weights and one step of all models",
                     "take --weights bf16 or q8_0, which are smaller, or serve fewer models");
  require(o.model.context <= longest, "--context: found ", o.model.context, ", expected 2 to ",
          longest, ", the longest context of a model, or 0");
  const int64_t left = budget.memory - taken;
  std::vector<ModelPlan*> order;  // those that can use the least first
  for (size_t m = 0; m < models.size(); m++) {
    const Config& c = models[m].text.config;
    plans[m].generator.context = choose_context(c, std::min<int64_t>(o.model.context, c.T),
                                                left / int64_t(models.size()), plans[m].page_bytes);
    const int64_t all = std::numeric_limits<int64_t>::max();
    limit_cache_bytes(plans[m], o.cache_mb > 0 ? int64_t(o.cache_mb) << 20 : all);
    order.push_back(&plans[m]);
  }
  std::sort(order.begin(), order.end(),
            [](const ModelPlan* a, const ModelPlan* b) { return a->cache_bytes < b->cache_bytes; });
  // Where no memory is stated, half of what is free stays free.
  int64_t shares = budget.stated ? left : left / 2;
  for (size_t i = 0; i < order.size(); i++) {
    const int64_t share = std::max<int64_t>(0, shares) / int64_t(order.size() - i);
    if (o.cache_mb == 0) limit_cache_bytes(*order[i], std::min(order[i]->cache_bytes, share));
    shares -= order[i]->cache_bytes;
    taken += order[i]->cache_bytes;
  }
  budget.expect_room(taken, "the models with their keys and values",
                     o.cache_mb > 0
                         ? "lower --cache-mb, --context, or serve fewer models"
                         : "lower --context, take --cache-type bf16, or serve fewer models");
  return plans;
}

std::string plan_line(const ServedModel& m, const ModelPlan& p, const std::string& note) {
  const int T = m.text.config.T, context = p.generator.context;
  return concat(m.id, ": ", p.items, ", keys and values up to ", bytes_text(double(p.cache_bytes)),
                " (", p.generator.cache_positions, " tokens); context ", context,
                context < T ? concat(" of the model's ", T) : "", ", ", p.generator.rows, " rows",
                !m.text.chat && note.empty() ? "; no chat template" : note);
}

// ---------------------------------------------------------------------------------------------
// Fingerprint

// Of all that decides a text beside the request: the weights, the tokenizer and the template, how
// weights and cache are kept, and the program, which was compiled for one kind of processor.
std::string fingerprint(const ServedModel& m, const GptOptions& engine) {
  static const std::string program = [] {
    std::vector<MappedFile> files;
    files.emplace_back("/proc/self/exe");
    return hash_files(files);
  }();
  const std::filesystem::path& dir = m.text.dir;
  std::vector<MappedFile> files;
  const auto add = [&](const std::filesystem::path& path) {
    if (std::filesystem::is_regular_file(path)) files.emplace_back(path);
  };
  for (const char* name : kTokenizerFiles) add(dir / name);
  std::filesystem::path weights = dir;
  if (has_adapters(dir)) {
    add(dir / "adapter_model.safetensors");
    add(dir / "adapter_config.json");
    weights = load_adapter_config(dir).base;
  }
  std::string text = concat(program, " ", weights_hash(weights), " ", hash_files(files), " ",
                            int(find_device(engine.device)), " ", int(engine.precision), " ",
                            int(engine.decode.cache));
  if (const auto& chat = m.text.chat) {
    text += concat(chat->text(), chat->options().variables.dump(), chat->options().date);
  }
  for (size_t t = 0; t < m.text.gpt->table().tensors.size(); t++) {
    text += kWeightTypeNames[int(m.text.gpt->weight_type(int(t)))];
  }
  std::string hash;
  for (const unsigned char byte : sha256(text)) hash += format("%02x", byte);
  return concat("fp_", hash.substr(0, 16), m.deterministic ? "-deterministic" : "-batch-dependent");
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// What the server calls

Sampling default_sampling(const std::filesystem::path& dir, int vocab) {
  const OrderedJson settings = generation_settings(dir);
  const std::string where = (dir / "generation_config.json").string();
  const auto get = [&](const char* key, auto fallback, auto low, auto high) {
    const auto it = settings.find(key);
    if (it == settings.end() || it->is_null()) return fallback;
    const auto value = json_as<decltype(fallback)>(Json(*it), key, where);
    require(value >= low && value <= high, where, ": ", key, ": found ", value, ", expected ", low,
            " to ", high);
    return value;
  };
  Sampling s;
  s.vocab = vocab;
  s.temperature = get("temperature", 1.f, 0.f, 100.f);
  s.top_k = get("top_k", 0, 0, std::numeric_limits<int>::max());
  s.top_p = get("top_p", 1.f, 0.f, 1.f);
  s.min_p = get("min_p", 0.f, 0.f, 1.f);
  s.repetition_penalty = get("repetition_penalty", 1.f, .01f, 100.f);
  // Only where the file says so: a model without the key is sampled from, as OpenAI's API has it.
  const auto sampled = settings.find("do_sample");
  if (sampled != settings.end() && sampled->is_boolean() && !sampled->get<bool>()) {
    s.temperature = 0;
  }
  return s;
}

LoadedModels load_models(const ServeOptions& o,
                         const std::function<void(const std::string&)>& print) {
  require(!o.models.empty(), "models: found none, expected at least one");
  set_threads(o.model.threads);
  LoadedModels loaded;
  std::vector<std::string> notes(o.models.size());
  for (size_t m = 0; m < o.models.size(); m++) {
    loaded.models.push_back(open_served(o, o.models[m], notes[m]));
    for (size_t other = 0; other < m; other++) {
      require(loaded.models[other].id != loaded.models[m].id, "model: found ", o.models[m],
              " twice, expected NAME=PATH with another name");
    }
    stop_if_signalled();
  }
  add_tools(loaded.models, o);
  const Budget budget(parse_device(o.model.device), o.memory_mb);
  const std::vector<ModelPlan> plans = plan_models(loaded.models, o, budget);
  int64_t taken = 0;
  for (const ModelPlan& p : plans) taken += p.fixed_bytes + p.cache_bytes;
  if (print) {
    for (size_t m = 0; m < plans.size(); m++) {
      print(plan_line(loaded.models[m], plans[m], notes[m]));
    }
    print(concat("memory: up to ", bytes_text(double(taken)), " of ",
                 bytes_text(double(budget.memory)),
                 budget.memory < budget.available ? "" : " that are free"));
  }
  for (size_t m = 0; m < plans.size(); m++) {
    const std::string path = split_model_argument(o.models[m]).second;
    use_one_checkpoint(path, [&](const std::filesystem::path&, const auto& expect_same) {
      ServedModel& model = loaded.models[m];
      std::optional<ChatTemplate> chat = std::move(model.text.chat);
      model.text = open_model(options_of(o, path));  // a run may have exchanged its checkpoint
      use_template(model.text, std::move(chat));
      model.context = plans[m].generator.context;
      load_engine(model.text, options_of(o, path), plans[m].engine);
      model.fingerprint = fingerprint(model, plans[m].engine);
      expect_same();
    });
    loaded.caches.push_back(plans[m].generator);
    stop_if_signalled();
  }
  return loaded;
}

}  // namespace cake
