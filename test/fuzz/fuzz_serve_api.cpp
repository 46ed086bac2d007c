// Any bytes as the body of a request: the first byte chooses the endpoint and the model's template.
// Reading ends in requests that the generator takes, or in one ApiError of status 400 whose message
// is one line of valid UTF-8.
#include <string>
#include <vector>

#include "cake/serve.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;

Tokenizer fuzz_tokenizer() {
  const std::string text = "User: what is 1?\nAssistant: The answer is 1.\n\n";
  const fuzz::MemoryFile file(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  return train_tokenizer({.inputs = {file.path()}}, 300, "qwen2");
}

// `choice`: "chatml", "plain" or "none".
ServedModel fuzz_model(const std::string& choice) {
  const Tokenizer tokenizer = fuzz_tokenizer();
  ServedModel m{.id = "m", .text = {.dir = "m", .tokenizer = tokenizer}};
  m.text.document_start = tokenizer.document_separator();
  m.text.stop_ids = {m.text.document_start};
  if (choice != "none") use_template(m.text, open_chat_template(tokenizer, "", choice));
  m.context = 4096;
  if (choice == "chatml") m.tools = {kCalculatorTool};
  return m;
}

void check_requests(const std::vector<Request>& requests, const ServedModel& model,
                    const ApiLimits& limits) {
  fuzz::expect(!requests.empty() && requests.size() <= size_t(limits.max_choices), "choices");
  for (const Request& r : requests) {
    fuzz::expect(!r.prompt.empty(), "a prompt has a token");
    for (const int id : r.prompt) {
      fuzz::expect(id >= 0 && id < model.text.tokenizer.vocab_size(), "ids are tokens");
    }
    fuzz::expect(r.max_new >= 1 && int(r.prompt.size()) + r.max_new <= model.context, "it fits");
    const Sampling& s = r.sampling;
    fuzz::expect(s.temperature >= 0 && s.temperature <= 2, "temperature");
    fuzz::expect(s.top_p > 0 && s.top_p <= 1 && s.min_p >= 0 && s.min_p <= 1, "top_p and min_p");
    fuzz::expect(s.top_k >= 0 && s.repetition_penalty > 0, "top_k and repetition_penalty");
    fuzz::expect(r.top_logprobs >= -1 && r.top_logprobs <= 20, "top_logprobs");
    for (const std::string& stop : r.stop_strings) fuzz::expect(!stop.empty(), "stop strings");
  }
}

void check_error(const ApiError& e) {
  fuzz::expect(e.status == 400 && e.type == "invalid_request_error", "the client's error");
  const std::string text = concat(e.what(), e.param);
  fuzz::expect(simdjson::validate_utf8(text), "UTF-8");
  for (const char c : text) fuzz::expect(static_cast<unsigned char>(c) >= 0x20, "one line");
  fuzz::expect(!text.empty() && text.size() < 1000, "short");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const ServedModel models[] = {fuzz_model("chatml"), fuzz_model("plain"),
                                       fuzz_model("none")};
  if (size == 0) return 0;
  const bool chat = data[0] % 2 == 0;
  const ServedModel& model = models[data[0] / 2 % 3];
  const ApiLimits limits;
  try {
    const OrderedJson body = read_body({reinterpret_cast<const char*>(data) + 1, size - 1}, limits);
    requested_model(body);
    const ApiCall call =
        chat ? read_chat(body, model, limits) : read_completion(body, model, limits);
    const std::vector<Request> requests = make_requests(call, model, limits);
    check_requests(requests, model, limits);
    if (chat) {
      fuzz::expect(prompt_origins(call, model).size() == prompt_of(call).size(), "origins");
    }
    if (requests[0].on_turn) requests[0].on_turn(0, requests[0].prompt);
  } catch (const ApiError& e) {
    check_error(e);
  }
  return 0;
}
