// The page in a browser: what a person types, clicks and sees. Each case is skipped by name where
// Chromium or chromedriver is not installed.
//
// All cases share one browser. Each has a server of its own, and with it an empty storage; at its
// end it checks that nothing was asked of any other server, that no dialog opened and that the
// console holds no error.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "cake/votes.h"
#include "test/chatml.h"
#include "test/http_proxy.h"
#include "test/serve_scripts.h"
#include "test/webdriver.h"

namespace cake {
namespace {

WebDriver& browser() {
  static WebDriver driver;
  return driver;
}

// True when there is no browser: then the test says so by name and returns.
//     if (skip_without_browser()) return;
bool skip_without_browser() {
  static const std::string missing = WebDriver::missing();
  if (missing.empty()) return false;
  skip_test(missing);
  return true;
}

// The options of a server whose page is looked at. CAKE_WEB=web: the files of that folder, so that
// nothing is compiled while one works on them.
ServeOptions page_options(const std::string& model) {
  ServeOptions options = serve_options(model);
  if (const char* web = std::getenv("CAKE_WEB")) options.web = web;
  return options;
}

// The page of the server on a port, from construction to destruction.
class Page {
 public:
  // `view`: "chat", "write", ... Opens with an empty storage unless `view` is "".
  Page(int port, const std::string& view) : origin_(concat("http://127.0.0.1:", port)) {
    browser().open("about:blank");
    browser().devtools("Storage.clearDataForOrigin",
                       {{"origin", origin_}, {"storageTypes", "all"}});
    browser().resize(1200, 900);
    browser().prefer_dark(false);
    browser().happened();  // of the case before
    if (!view.empty()) open(view);
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  // The checks of every case.
  ~Page() {
    try {
      check();
      browser().open("about:blank");
    } catch (const std::exception& e) {
      FAIL_CHECK(e.what());
    }
  }

  // Opens a view and waits until it is there.
  void open(const std::string& view) {
    browser().open(origin_ + "/#" + view);
    browser().wait(concat("!document.querySelector('#", view, "').hidden"));
  }
  void reload() { browser().reload(); }
  // An error of the console that holds this text is expected.
  void expect_error(const std::string& text) { expected_errors_.push_back(text); }
  // A request that begins like this is expected.
  void expect_request(const std::string& url) { expected_requests_.push_back(url); }
  // What happened since the last call, checked.
  WebDriver::Happened check() {
    const WebDriver::Happened h = browser().happened();
    for (const std::string& url : h.requests) {
      const bool is_ours = url.starts_with(origin_ + "/") || url.starts_with("data:") ||
                           url.starts_with("blob:" + origin_ + "/") || url == "about:blank";
      const bool expected =
          std::any_of(expected_requests_.begin(), expected_requests_.end(),
                      [&](const std::string& begin) { return url.starts_with(begin); });
      if (!is_ours && !expected) FAIL_CHECK("asked for ", url);
    }
    for (const std::string& text : h.dialogs) FAIL_CHECK("a dialog: ", text);
    for (const std::string& text : h.errors) {
      const bool expected =
          std::any_of(expected_errors_.begin(), expected_errors_.end(),
                      [&](const std::string& part) { return contains(text, part); });
      if (!expected) FAIL_CHECK("the console: ", text);
    }
    return h;
  }
  const std::string& origin() const { return origin_; }

 private:
  std::string origin_;
  std::vector<std::string> expected_errors_, expected_requests_;
};

// -------------------------------------------------------------------------------------------------
// Models whose answers are known

// Answers to conversations, by the number of tokens in front of the answer. At temperature 1 too,
// the model writes what it was told to: the likeliest token has all but a millionth.
class Script {
 public:
  explicit Script(int T = 2048) : model_(T) {}
  const Tokenizer& tokenizer() const { return model_.tokenizer(); }
  // What the model says behind these messages: the user's, the assistant's, the user's, ...
  Script& answer(const std::vector<std::string>& messages, const std::string& text) {
    Conversation c;
    for (size_t i = 0; i < messages.size(); i++) {
      c.messages.push_back({.role = i % 2 ? "assistant" : "user", .content = messages[i]});
    }
    return write(int(chatml(tokenizer(), c, true).ids.size()), text + "<|im_end|>");
  }
  Script& write(int n, const std::string& text) { return write(n, tokenizer().encode(text, true)); }
  Script& write(int n, const std::vector<int>& ids) {
    for (size_t i = 0; i < ids.size(); i++) {  // a script that overwrites itself says nothing
      REQUIRE_MESSAGE(written_.insert(n + int(i)).second, "two texts at position ", n + i);
    }
    model_.write(n, ids);
    return *this;
  }
  // The model's directory. A higher `temperature` is its default: its texts then differ.
  std::string save(const std::string& name = "model", double temperature = 1) {
    const std::string dir = model_.save(name);
    write_json(dir + "/generation_config.json", {{"temperature", temperature}});
    return dir;
  }

 private:
  ScriptedModel model_;
  std::set<int> written_;
};

// Chunks of a stream that the test itself sends.
OrderedJson chat_chunk(const OrderedJson& delta, const OrderedJson& finish = nullptr) {
  OrderedJson ids = OrderedJson::array();
  if (delta.contains("content") && delta["content"] != "") ids.push_back(1);
  return {{"id", "chatcmpl-1"},
          {"object", "chat.completion.chunk"},
          {"created", 1},
          {"model", "m"},
          {"system_fingerprint", "fp_1"},
          {"choices",
           {{{"index", 0},
             {"delta", delta},
             {"logprobs", nullptr},
             {"token_ids", ids},
             {"finish_reason", finish}}}}};
}
void begin_answer(HeldCall& call, const std::string& text = "") {
  call.begin_stream();
  call.send(chat_chunk({{"role", "assistant"}, {"content", ""}}));
  if (!text.empty()) call.send(chat_chunk({{"content", text}}));
}
void end_answer(HeldCall& call, const std::string& finish = "stop") {
  call.send(chat_chunk(OrderedJson::object(), finish));
  call.end_stream();
}
void answer(HeldCall call, const std::string& text) {
  begin_answer(call, text);
  end_answer(call);
}

// -------------------------------------------------------------------------------------------------
// Chat as a person uses it

const std::string kMessage = "#chat textarea[aria-label=Message]";
const std::string kChatCalls = "/v1/chat/completions";

void say_to_model(const std::string& text) {
  browser().fill(kMessage, text);
  browser().press(keys::kEnter);
}
// The text of message `i`, from 1.
std::string bubble(int i) { return concat("#chat [role=log] article:nth-child(", i, ") .bubble"); }
void wait_for_text(const std::string& selector, const std::string& text) {
  browser().wait("document.querySelector(" + WebDriver::quoted(selector) +
                 ").textContent === " + WebDriver::quoted(text));
}
void press_button(int message, const std::string& action) {
  browser().click(
      concat("#chat [role=log] article:nth-child(", message, ") [data-action='", action, "']"));
}
void wait_until_idle() {
  browser().wait("document.querySelector('#chat .dock .primary').textContent === 'Send'");
}

// -------------------------------------------------------------------------------------------------
// Write

// The tokens of the text, as the page keeps them.
OrderedJson written() { return browser().value("JSON.parse(localStorage.write).tokens"); }
std::vector<int> ids_of(const OrderedJson& entries) {
  std::vector<int> ids;
  for (const OrderedJson& entry : entries) ids.push_back(entry.at("id"));
  return ids;
}
void wait_until_written() {
  browser().wait(
      "document.querySelector('#write .dock .primary').hidden === false && "
      "document.querySelector('#write textarea').value === ''");
}
void focus_token(size_t i) {
  browser().run(
      "document.querySelectorAll('#write .prose [data-index]')[arguments[0]]"
      ".focus();",
      {i});
}
OrderedJson api_scores(RunningServer& server, const std::vector<int>& ids) {
  const Reply reply = server.post("/v1/completions", {{"prompt", ids},
                                                      {"echo", true},
                                                      {"max_tokens", 0},
                                                      {"logprobs", 10},
                                                      {"token_details", true}});
  REQUIRE_MESSAGE(reply.status == 200, reply.body);
  return reply.json().at("choices")[0].at("logprobs").at("content");
}

// -------------------------------------------------------------------------------------------------
// Attacks: each would open a dialog, ask for something with "pwned" in its name or on another host,
// or set window.pwned, if any of it were taken for more than text

const std::vector<std::string> kAttacks = {
    R"x(<script>window.pwned = 1; fetch('/pwned');</script>)x",
    R"x(<img src=x onerror="window.pwned = 1; alert(1)">)x",
    R"x(<img src="/pwned.png">)x",
    R"x(<svg onload=alert(1)>)x",
    R"x(<svg><script>alert(1)</script></svg>)x",
    R"x(<iframe src="javascript:alert(1)"></iframe>)x",
    R"x(<iframe srcdoc="<script>parent.pwned = 1</script>"></iframe>)x",
    R"x(<body onload=alert(1)>)x",
    R"x(<a href="javascript:alert(1)" autofocus onfocus=alert(1)>a</a>)x",
    R"x([a](javascript:alert(1)))x",
    R"x(![a](http://evil.invalid/pwned.png))x",
    R"x(<style>@import '/pwned.css'; * { display: none }</style>)x",
    R"x(<link rel=stylesheet href="/pwned.css">)x",
    R"x(<meta http-equiv=refresh content="0;url=/pwned">)x",
    R"x(<base href="http://evil.invalid/">)x",
    R"x(<form action="/pwned"><input autofocus onfocus=alert(1)></form>)x",
    R"x(<video src="/pwned.mp4"><source onerror="alert(1)"></video>)x",
    R"x(<details open ontoggle=alert(1)>)x",
    R"x(<math><mtext><mglyph><style><img src=x onerror=alert(1)></style></math>)x",
    R"x(<div style="background: url(/pwned)">a</div>)x",
    R"x("><script>alert(1)</script>)x",
    R"x(' onmouseover='alert(1)' a=')x",
    R"x(</textarea><script>alert(1)</script>)x",
    R"x(</title></style></script><script>alert(1)</script>)x",
    R"x(<!--><script>alert(1)</script>-->)x",
    R"x(<object data="/pwned"></object><embed src="/pwned">)x",
    R"x({{constructor.constructor('alert(1)')()}})x",
    R"x(${alert(1)} `+alert(1)+`)x",
    R"x(&lt;script&gt;alert(1)&lt;/script&gt; &#60;script>)x",
    "\"}}]}\n\ndata: {\"error\":{\"message\":\"<b>x</b>\"}}\n\ndata: [DONE]",
};

void check_nothing_ran(Page& page) {
  const WebDriver::Happened h = page.check();  // dialogs and requests of other hosts
  for (const std::string& url : h.requests) {
    if (contains(url, "pwned")) FAIL_CHECK("asked for ", url);
  }
  CHECK(browser().value("typeof window.pwned") == "undefined");
  CHECK(browser().count("main script, main img, main iframe, main style, main link, main base, "
                        "main video, main object, main embed, main math, main form[action]") == 0);
}

}  // namespace

TEST_CASE("the page opens in a browser and asks for nothing but its server") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Page page(server.port(), "");
  browser().open(page.origin() + "/");
  CHECK(contains(browser().value("document.title"), "cake"));
  browser().wait("document.querySelector('#tabs a')");
  const WebDriver::Happened h = page.check();
  CHECK(h.requests.size() >= 1);
}

TEST_CASE("page: what an injected script would do is refused by the browser") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Page page(server.port(), "chat");
  page.expect_error("Content Security Policy");
  page.expect_error("Trusted");                // TrustedHTML, TrustedScript
  page.expect_request("http://127.0.0.2:9/");  // is refused before anything is sent
  const auto error_of_script = [](const std::string& body) {
    return browser().run("try { " + body + " return 'done'; } catch (e) { return e.name; }");
  };
  CHECK(error_of_script("document.body.innerHTML = '<b>x</b>';") == "TypeError");
  CHECK(error_of_script("setTimeout('window.pwned = 1');") == "TypeError");
  CHECK(error_of_script("document.createElement('script').textContent = 'x';") == "TypeError");
  const auto loads = [](const std::string& make) {
    return browser().run("return new Promise(done => { const e = " + make +
                         "; e.onload = () => done(true); e.onerror = () => done(false); });");
  };
  CHECK(loads("Object.assign(new Image(), {src: 'http://127.0.0.2:9/x.png'})") == false);
  CHECK(browser().run("return fetch('http://127.0.0.2:9/').then(() => true, () => false);") ==
        false);
  page.expect_error("127.0.0.2");
}

TEST_CASE("page: while the models load it says so, and goes on by itself") {
  if (skip_without_browser()) return;
  const TempDir dir;
  ServeOptions options = page_options(models().script);
  options.documents = dir / "documents";  // loading waits until somebody writes to it
  REQUIRE(mkfifo(options.documents.c_str(), 0600) == 0);
  RunningServer server(options, false);
  FifoWriter documents(options.documents);
  Page page(server.port(), "");
  page.expect_error("503");
  browser().open(page.origin() + "/");
  browser().wait("document.body.innerText.includes('Loading the models')");
  REQUIRE(documents.write());
  browser().wait("!document.querySelector('#chat').hidden");
  CHECK(browser().value("document.querySelector('#waiting').hidden") == true);
}

TEST_CASE("page: a key is asked for until it is right, and the tab alone keeps it") {
  if (skip_without_browser()) return;
  ServeOptions options = page_options(models().script);
  options.http.keys = {"open-sesame"};
  RunningServer server(options);
  Page page(server.port(), "");
  page.expect_error("401");
  browser().open(page.origin() + "/");
  for (const std::string key : {"wrong", "open-sesame"}) {
    browser().wait("document.querySelector('#key-dialog').open");
    browser().fill("#key", key);
    browser().press(keys::kEnter);
  }
  browser().wait("!document.querySelector('#chat').hidden");
  CHECK(browser().value("document.querySelector('#key-dialog').open") == false);
  CHECK(browser().value("sessionStorage.getItem('key')") == "open-sesame");
  CHECK(browser().value("localStorage.getItem('key')").is_null());
  page.reload();
  browser().wait("!document.querySelector('#chat').hidden");
  CHECK(browser().value("document.querySelector('#key-dialog').open") == false);
}

TEST_CASE("page: a model without a template writes, and the page says why it does not chat") {
  if (skip_without_browser()) return;
  ServeOptions options = page_options(models().script);
  options.chat_template.choice = "none";
  RunningServer server(options);
  Page page(server.port(), "");
  browser().open(page.origin() + "/");
  browser().wait("!document.querySelector('#write').hidden");  // what such a model can do
  browser().click("#tabs a[href='#chat']");
  browser().wait("!document.querySelector('#no-chat').hidden");
  CHECK(contains(browser().text("#no-chat"), "has no chat template"));
  browser().click("#no-chat a");
  browser().wait("!document.querySelector('#write').hidden");
}

// -------------------------------------------------------------------------------------------------
// Chat

TEST_CASE("chat: what is typed is answered, and a reload keeps the conversation") {
  if (skip_without_browser()) return;
  Script script;
  script.answer({"hello"}, kSentence).answer({"hello", kSentence, "again"}, "Once more.");
  RunningServer server(page_options(script.save()));
  Page page(server.port(), "chat");
  browser().type(kMessage, "hello" + keys::kEnter);
  wait_for_text(bubble(2), kSentence);
  wait_until_idle();
  CHECK(browser().texts("#chat .bubble") == std::vector<std::string>{"hello", kSentence});
  page.reload();
  wait_for_text(bubble(2), kSentence);
  say_to_model("again");
  wait_for_text(bubble(4), "Once more.");
}

TEST_CASE("chat: an answer grows while it comes, and only the status is read aloud") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Proxy proxy(server.port());
  proxy.hold(kChatCalls);
  Page page(proxy.port(), "chat");
  say_to_model("hello");
  HeldCall call = proxy.next_call();
  CHECK(call.json().at("messages") == OrderedJson{{{"role", "user"}, {"content", "hello"}}});
  begin_answer(call, "The ans");
  wait_for_text(bubble(2), "The ans");
  CHECK(browser().text("#status") == "Answering");
  CHECK(browser().count("#chat [role=log][aria-live=off] .bubble") == 2);
  call.send(chat_chunk({{"content", "wer.\n\nIt <b>is</b> 7."}}));
  wait_for_text(bubble(2), "The answer.\n\nIt <b>is</b> 7.");
  end_answer(call);
  wait_until_idle();
  CHECK(browser().text("#status").starts_with("Done, "));
}

TEST_CASE("chat: a stop ends the call, and the next message can be sent at once") {
  if (skip_without_browser()) return;
  Script script;
  script.answer({"hello", "Half an", "hi"}, "Whole.");
  RunningServer server(page_options(script.save()));
  Proxy proxy(server.port());
  proxy.hold(kChatCalls);
  Page page(proxy.port(), "chat");
  say_to_model("hello");
  HeldCall call = proxy.next_call();
  begin_answer(call, "Half an");
  wait_for_text(bubble(2), "Half an");
  proxy.pass_on(kChatCalls);
  browser().click("#chat .dock .primary");
  say_to_model("hi");
  wait_for_text(bubble(4), "Whole.");
  call.wait_for_the_end();
  CHECK(browser().texts("#chat .bubble") ==
        std::vector<std::string>{"hello", "Half an", "hi", "Whole."});
  CHECK(contains(browser().text("#chat article:nth-child(2) .note"), "stopped"));
}

TEST_CASE("chat: regenerating keeps the older answers, also over a reload") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Proxy proxy(server.port());
  proxy.hold(kChatCalls);
  Page page(proxy.port(), "chat");
  say_to_model("hello");
  answer(proxy.next_call(), "First.");
  wait_for_text(bubble(2), "First.");
  wait_until_idle();
  press_button(2, "Regenerate");
  HeldCall second = proxy.next_call();
  CHECK(second.json().at("messages").size() == 1);
  answer(std::move(second), "Second.");
  wait_for_text(bubble(2), "Second.");
  wait_until_idle();
  CHECK(browser().text("#chat article:nth-child(2) .actions .number") == "2/2");
  press_button(2, "‹");
  wait_for_text(bubble(2), "First.");
  page.reload();
  wait_for_text(bubble(2), "First.");
  press_button(2, "›");
  wait_for_text(bubble(2), "Second.");
}

TEST_CASE("chat: an edited message is answered anew, beside the older version with its answer") {
  if (skip_without_browser()) return;
  Script script;
  script.answer({"hello"}, "Hello.").answer({"hello, what is the answer now?"}, "It is 7.");
  RunningServer server(page_options(script.save()));
  Page page(server.port(), "chat");
  say_to_model("hello");
  wait_for_text(bubble(2), "Hello.");
  wait_until_idle();
  press_button(1, "Edit");
  browser().type("#chat article textarea", ", what is the answer now?");
  press_button(1, "Save");
  wait_for_text(bubble(2), "It is 7.");
  wait_until_idle();
  CHECK(browser().text(bubble(1)) == "hello, what is the answer now?");
  press_button(1, "‹");
  wait_for_text(bubble(1), "hello");
  CHECK(browser().text(bubble(2)) == "Hello.");
}

TEST_CASE("chat: the settings are those of the request") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Proxy proxy(server.port());
  proxy.hold(kChatCalls);
  Page page(proxy.port(), "chat");
  browser().click("#open-settings");
  browser().fill("#set-temperature", "0.25");
  browser().fill("#set-top_k", "7");
  browser().fill("#set-max_tokens", "33");
  browser().fill("#seed", "1234");
  browser().fill("#stop", "user:\n\\n\\n");
  browser().press(keys::kTab);
  say_to_model("hello");
  HeldCall call = proxy.next_call();
  const OrderedJson body = call.json();
  CHECK(body.at("temperature") == .25);
  CHECK(body.at("top_k") == 7);
  CHECK(body.at("max_tokens") == 33);
  CHECK(body.at("seed") == 1234);
  CHECK(body.at("stop") == OrderedJson{"user:", "\n\n"});
  answer(std::move(call), "First.");
  wait_for_text(bubble(2), "First.");
  wait_until_idle();
  page.reload();  // the tab keeps what was changed
  browser().wait("document.querySelector('#set-temperature').value === '0.25'");
  if (browser().value("document.querySelector('#settings').hidden")) {
    browser().click("#open-settings");
  }
  browser().click("#settings .tools button");  // all defaults
  press_button(2, "Regenerate");
  HeldCall again = proxy.next_call();
  CHECK(again.json().at("temperature") == 1);
  CHECK_FALSE(again.json().contains("max_tokens"));
  answer(std::move(again), "Second.");
  wait_until_idle();
}

TEST_CASE("chat: characters arrive whole from a server that writes one byte at a time") {
  if (skip_without_browser()) return;
  const std::string text = "a😀b👩‍👩‍👧 naïve 日本語\n\n€🎂🎂 end";
  Script script;
  script.answer({"hello"}, text);
  RunningServer server(page_options(script.save()));
  Proxy proxy(server.port());
  Page page(proxy.port(), "chat");
  proxy.byte_by_byte(true);
  say_to_model("hello");
  wait_for_text(bubble(2), text);
  wait_until_idle();
  CHECK(browser().text(bubble(2)) == text);
}

TEST_CASE("chat: the page follows an answer only while its reader is at the end") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Proxy proxy(server.port());
  proxy.hold(kChatCalls);
  Page page(proxy.port(), "chat");
  const auto below = [] {  // pixels of the page below the window
    return browser()
        .value(
            "document.scrollingElement.scrollHeight - innerHeight - "
            "document.scrollingElement.scrollTop")
        .get<double>();
  };
  const auto above = [] {
    return browser().value("document.scrollingElement.scrollTop").get<double>();
  };
  say_to_model("hello");
  HeldCall call = proxy.next_call();
  begin_answer(call, "Lines:\n");
  std::string text = "Lines:\n";
  const auto send_lines = [&] {
    std::string lines;
    for (int i = 0; i < 60; i++) lines += concat("line ", i, "\n");
    call.send(chat_chunk({{"content", lines}}));
    text += lines;
    wait_for_text(bubble(2), text);
  };
  send_lines();
  CHECK(above() > 100);
  CHECK(below() <= 40);
  browser().scroll(-300);
  browser().wait(
      "document.scrollingElement.scrollHeight - innerHeight - "
      "document.scrollingElement.scrollTop > 200");
  const double place = above();
  send_lines();
  CHECK(above() == place);
  browser().scroll(100000);
  browser().wait(
      "document.scrollingElement.scrollHeight - innerHeight - "
      "document.scrollingElement.scrollTop <= 1");
  send_lines();
  CHECK(below() <= 40);
  browser().scroll(-300);  // and the end of the answer moves nobody
  browser().wait(
      "document.scrollingElement.scrollHeight - innerHeight - "
      "document.scrollingElement.scrollTop > 200");
  const double last = above();
  end_answer(call);
  wait_until_idle();
  CHECK(std::abs(above() - last) <= 1);
}

TEST_CASE("chat: 20,000 tokens cost the page the same work each, and it stays responsive") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Proxy proxy(server.port());
  proxy.hold(kChatCalls);
  Page page(proxy.port(), "chat");
  say_to_model("hello");
  HeldCall call = proxy.next_call();
  begin_answer(call, "A");
  wait_for_text(bubble(2), "A");
  // Whatever stands is not drawn again: no node of the answer is removed, few are added.
  browser().run(
      "window.work = {added: 0, removed: 0, tasks: 0};"
      "new MutationObserver(list => list.forEach(({addedNodes, removedNodes}) => {"
      "  work.added += addedNodes.length; work.removed += removedNodes.length;"
      "})).observe(document.querySelector('#chat [role=log]'), {childList: true, subtree: true});"
      "new PerformanceObserver(list => { work.tasks += list.getEntries().length; })"
      "  .observe({type: 'longtask'});");
  size_t size = 1;
  for (int i = 0; i < 20000; i++) {
    const std::string token = i % 50 == 49 ? " end.\n" : " word";
    size += token.size();
    call.send(chat_chunk({{"content", token}}));
    if (i % 4000 == 3999) {  // a person can still do something
      browser().type(kMessage, "x");
      browser().wait("document.querySelector('" + kMessage +
                     "').value.length === " + std::to_string(i / 4000 + 1));
    }
  }
  browser().wait("document.querySelector(" + WebDriver::quoted(bubble(2)) +
                 ").textContent.length === " + std::to_string(size));
  const OrderedJson work = browser().value("work");
  CHECK(work.at("removed") == 0);
  CHECK(work.at("added").get<int>() < 1000);
  MESSAGE("tasks of more than 50 ms: " << work.at("tasks").get<int>());
  end_answer(call);
  wait_until_idle();
}

// -------------------------------------------------------------------------------------------------
// Write

TEST_CASE("write: the numbers shown are the API's, another token can be chosen, and undone") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().random));
  Page page(server.port(), "write");
  browser().click("#open-settings");
  browser().fill("#seed", "7");
  browser().press(keys::kTab);
  browser().click("#open-settings");
  browser().fill("#write textarea", "The answer is");
  browser().press({keys::kControl, keys::kEnter});
  wait_until_written();
  const OrderedJson entries = written();
  REQUIRE(entries.size() > 20);
  const OrderedJson scores = api_scores(server, ids_of(entries));
  for (size_t i = 1; i < entries.size(); i++) {
    CAPTURE(i);
    const double expected = scores[i].at("logprob");
    CHECK(std::abs(entries[i].at("logprob").get<double>() - expected) < 1e-5);
    CHECK(entries[i].at("rank") == scores[i].at("rank"));
  }
  for (const size_t i : {1, 5, 12, 20}) {
    CAPTURE(i);
    focus_token(i);
    char surprise[32];
    std::snprintf(surprise, sizeof surprise, "surprise %.2f bits",
                  -scores[i].at("logprob").get<double>() / std::log(2.));
    const std::string shown = browser().text("#scores p.number");
    CHECK_MESSAGE(contains(shown, concat("rank ", scores[i].at("rank").get<int>())), shown);
    CHECK_MESSAGE(contains(shown, surprise), shown);
    CHECK(browser().count("#scores li") == 10);
  }

  // By keys alone: into the list, to another token, and on from there.
  const size_t at = 12;
  focus_token(at);
  browser().press(keys::kEnter);
  const OrderedJson& top = scores[at].at("top_logprobs");
  const int own = scores[at].at("rank");  // from 1; beyond the list the first one has the focus
  const bool is_listed = own <= int(top.size());
  const size_t chosen = !is_listed ? 0 : own == 1 ? 1 : size_t(own) - 2;
  if (is_listed) browser().press(own == 1 ? keys::kDown : keys::kUp);
  browser().press(keys::kEnter);
  wait_until_written();
  const OrderedJson changed = written();
  REQUIRE(changed.size() > at);
  for (size_t i = 0; i < at; i++) CHECK(changed[i].at("id") == entries[i].at("id"));
  CHECK(changed[at].at("id") == top[chosen].at("id"));
  CHECK(changed != entries);
  browser().press({keys::kControl, "z"});
  browser().wait("document.querySelector('#write textarea').value === ''");
  CHECK(ids_of(written()) == ids_of(entries));
}

TEST_CASE("write: every one of the 256 bytes is shown as something one can see") {
  if (skip_without_browser()) return;
  Script script;
  std::vector<int> ids;
  for (int byte = 0; byte < 256; byte++) {
    ids.push_back(script.tokenizer().encode(std::string(1, char(byte))).at(0));
  }
  script.write(2, ids);  // behind <|endoftext|>, which begins every text, and what is typed
  RunningServer server(page_options(script.save()));
  Page page(server.port(), "write");
  browser().click("#open-settings");
  browser().fill("#set-max_tokens", "256");
  browser().press(keys::kTab);
  browser().fill("#write textarea", "~");
  browser().press({keys::kControl, keys::kEnter});
  wait_until_written();
  REQUIRE(browser().count("#write .prose [data-index]") == 258);
  const auto names = browser()
                         .run(
                             "return [...document.querySelectorAll('#write .prose "
                             "[data-index]')].slice(2).map(part => { part.focus();"
                             "  return document.querySelector('.popover-token').textContent; });")
                         .get<std::vector<std::string>>();
  CHECK(std::set(names.begin(), names.end()).size() == 256);
  for (size_t byte = 0; byte < 256; byte++) {
    CAPTURE(byte);
    CAPTURE(names[byte]);
    CHECK_FALSE(names[byte].empty());
    for (const char c : names[byte]) CHECK((c < 0 || c > ' '));
    CHECK_FALSE(contains(names[byte], "\uFFFD"));
    if (byte > ' ' && byte < 127) CHECK(names[byte] == std::string(1, char(byte)));
  }
}

TEST_CASE("write: the picture of the settings is what the server would sample from") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().random));
  Page page(server.port(), "write");
  browser().fill("#write textarea", "The answer is");
  browser().click("#open-settings");
  const auto shown = [] {
    browser().wait("document.querySelectorAll('#settings .picture tbody tr').length === 10");
    return browser().texts("#settings .picture tbody tr td:last-child");
  };
  CHECK(shown().front() != "100 %");
  browser().fill("#set-temperature", "0");
  browser().press(keys::kTab);
  browser().wait(
      "document.querySelector('#settings .picture td:last-child').textContent === '100 %'");
  const std::vector<std::string> greedy = shown();
  for (size_t i = 1; i < greedy.size(); i++) CHECK(greedy[i] == "never");
  browser().fill("#set-temperature", "1");
  browser().fill("#set-top_k", "3");
  browser().press(keys::kTab);
  browser().wait(
      "[...document.querySelectorAll('#settings .picture td:last-child')]"
      ".filter(cell => cell.textContent !== 'never').length === 3");
  const OrderedJson next =
      server
          .post("/next_token",
                {{"prompt", "The answer is"}, {"temperature", 1}, {"top_k", 3}, {"top", 10}})
          .json();
  const std::vector<std::string> cut = shown();
  for (size_t i = 0; i < 3; i++) {
    char percent[32];
    std::snprintf(percent, sizeof percent, "%.1f %%",
                  100 * next.at("tokens")[i].at("probability").get<double>());
    CHECK(cut[i] == percent);
  }
}

// -------------------------------------------------------------------------------------------------
// Tokens

TEST_CASE("tokens: what is shown is what the server's tokenizer makes of the text") {
  if (skip_without_browser()) return;
  RunningServer server(page_options(models().script));
  Page page(server.port(), "tokens");
  const std::string text = "The answer is\t42.\n\n naïve 👩‍👩‍👧 <|im_end|>";
  browser().fill("#tokens textarea", text);
  std::vector<std::string> ids;
  const OrderedJson tokenized = server.post("/tokenize", {{"content", text}}).json();
  for (const OrderedJson& id : tokenized.at("tokens")) ids.push_back(id.dump());
  browser().wait(concat("document.querySelectorAll('#tokens .token-view [data-index]').length === ",
                        ids.size()));
  CHECK(contains(browser().text("#tokens .columns .note"), concat(ids.size(), " tokens")));
  CHECK(contains(browser().text("#tokens .columns .note"), concat(text.size(), " bytes")));
  CHECK(contains(browser().text("#tokens .token-view"), "⏎"));
  browser().click("#tokens .tools button");  // Ids
  CHECK(browser().texts("#tokens .token-view [data-index]") == ids);
}

// -------------------------------------------------------------------------------------------------
// What models and people write is text, whatever it looks like

TEST_CASE("chat: as the model sees it, each token says what it is from") {
  if (skip_without_browser()) return;
  Script script;
  script.answer({"Hello."}, "It is 42.");
  RunningServer server(page_options(script.save()));
  Page page(server.port(), "chat");
  say_to_model("Hello.");
  wait_for_text(bubble(2), "It is 42.");
  wait_until_idle();
  browser().click("#chat [role=log] ~ details > summary");
  browser().wait("document.querySelector('#chat .token-view [data-source=answer]')");
  const auto joined = [](const std::string& source) {
    std::string all;
    for (const std::string& text :
         browser().texts("#chat .token-view [data-source=" + source + "]"))
      all += text;
    return all;
  };
  CHECK(joined("role") == "user");
  CHECK(joined("content") == "Hello.");
  CHECK(contains(joined("answer"), "42."));
  CHECK(contains(joined("template"), "<|im_start|>"));
  // The key has the sources that occur. Each stretch has its name, which colours alone do not tell.
  CHECK(browser().texts("#chat .legend li") ==
        std::vector<std::string>{"the chat template", "role", "text", "answer, as it was sampled"});
  CHECK(browser().value(
            "document.querySelector('#chat .token-view [data-source=content]').dataset.origin") ==
        "message 1: text");
  CHECK(browser().count("#chat .token-view [data-origin]") == 2);
  browser().run("document.querySelector('#chat .token-view [data-source=content]').focus();");
  CHECK(contains(browser().value("document.activeElement.ariaLabel"), "from message 1: text"));
  CHECK(contains(browser().text("#token-popover"), "message 1: text"));
  check_nothing_ran(page);
}

TEST_CASE("page: thirty attacks as prompts and as answers are shown as they are, and do nothing") {
  if (skip_without_browser()) return;
  const std::vector<std::string>& attacks = kAttacks;
  REQUIRE(attacks.size() == 30);
  Script script(8192);
  std::vector<std::string> messages;
  for (size_t i = 0; i < attacks.size(); i++) {
    messages.push_back(attacks[i]);
    const std::string& text = attacks[(i + 7) % attacks.size()];
    script.answer(messages, text);
    messages.push_back(text);
  }
  RunningServer server(page_options(script.save()));
  Page page(server.port(), "chat");
  for (size_t i = 0; i < messages.size(); i += 2) {
    say_to_model(messages[i]);
    wait_for_text(bubble(int(i) + 2), messages[i + 1]);
    wait_until_idle();
  }
  CHECK(browser().texts("#chat [role=log] .bubble") == messages);
  browser().click("#chat [role=log] ~ details > summary");  // as the model sees it
  browser().wait("document.querySelectorAll('#chat .token-view [data-index]').length > 1000");
  page.reload();
  wait_for_text(bubble(int(messages.size())), messages.back());
  CHECK(browser().texts("#chat [role=log] .bubble") == messages);
  check_nothing_ran(page);

  std::string all;
  for (const std::string& attack : attacks) all += attack + "\n";
  page.open("write");
  browser().fill("#write textarea", all);
  browser().press({keys::kControl, keys::kEnter});
  wait_until_written();
  const std::string sheet = browser().text("#write .prose");
  for (const std::string& attack : attacks) {
    if (!contains(attack, "\n")) CHECK_MESSAGE(contains(sheet, attack), attack);
  }
  page.open("tokens");
  browser().fill("#tokens textarea", all);
  browser().wait("document.querySelector('#tokens .token-view').textContent.includes('[DONE]')");
  check_nothing_ran(page);
}

// -------------------------------------------------------------------------------------------------
// Arena

TEST_CASE(
    "arena: a vote in the browser is stored once, names come after it, and it can be undone") {
  if (skip_without_browser()) return;
  Script first, second;
  first.answer({"hello"}, kAttacks[1]);
  second.answer({"hello"}, "The answer is 8.");
  const TempDir dir;
  ServeOptions options = page_options("");
  options.models = {"alpha=" + first.save(), "beta=" + second.save()};
  options.arena.votes = dir / "votes.db";
  RunningServer server(options);
  const auto votes = [&] { return Votes(options.arena.votes, Votes::Access::read).count(); };
  Page page(server.port(), "arena");
  browser().type("#arena textarea", "hello" + keys::kEnter);
  browser().wait("document.querySelector('#arena .dock button:not(:disabled) kbd')");
  const std::vector<std::string> shown = browser().texts("#arena .answers .arena-text");
  REQUIRE(shown.size() == 2);
  const bool alpha_is_left = shown[0] == kAttacks[1];
  CHECK(shown[alpha_is_left ? 0 : 1] == kAttacks[1]);
  CHECK(shown[alpha_is_left ? 1 : 0] == "The answer is 8.");
  CHECK_FALSE(contains(browser().text("#arena"), "alpha"));
  CHECK_FALSE(contains(browser().text("#arena"), "beta"));
  CHECK(votes() == 0);

  browser().press("1");  // A is better
  browser().wait("document.querySelector('#arena .dock').textContent.includes('is stored')");
  const std::string left = alpha_is_left ? "alpha" : "beta";
  CHECK(contains(browser().text("#arena .dock"), "A is " + left));
  CHECK(votes() == 1);
  Votes(options.arena.votes, Votes::Access::read).for_each([&](const Vote& vote) {
    CHECK(vote.answers.at(0).model == left);
    CHECK(vote.answers.at(0).rank == 1);
    CHECK(vote.answers.at(1).rank == 2);
  });

  page.reload();
  browser().wait("document.querySelector('#arena .dock').textContent.includes('is stored')");
  CHECK(browser().count("#arena .dock kbd") == 0);
  browser().press("3");
  const OrderedJson battle = browser().value("JSON.parse(localStorage.battle)");
  const Reply again = server.post("/arena/vote", {{"battle", battle.at("battle")},
                                                  {"token", battle.at("token")},
                                                  {"vote", "right"},
                                                  {"good", {true, true}}});
  CHECK(again.status == 409);
  CHECK(votes() == 1);

  browser().click("#arena .dock button");
  browser().wait("document.querySelector('#arena .dock').textContent.includes('taken back')");
  CHECK(votes() == 0);
  check_nothing_ran(page);
}

TEST_CASE("arena: the leaderboard is hidden before ten votes") {
  if (skip_without_browser()) return;
  Script first, second;
  first.answer({"hello"}, "The answer is 7.");
  second.answer({"hello"}, "The answer is 8.");
  const TempDir dir;
  ServeOptions options = page_options("");
  options.models = {"alpha=" + first.save(), "beta=" + second.save()};
  options.arena.votes = dir / "votes.db";
  RunningServer server(options);
  Page page(server.port(), "leaderboard");
  browser().wait("document.querySelector('#leaderboard').textContent.includes('To go: 10')");
  CHECK_FALSE(contains(browser().text("#leaderboard"), "alpha"));
  const std::string voter = browser().value("localStorage.voter");
  for (int i = 0; i < 10; i++) {
    const OrderedJson battle =
        server
            .post("/arena/battle",
                  {{"voter", voter}, {"messages", {{{"role", "user"}, {"content", "hello"}}}}})
            .json();
    const bool left = contains(battle.at("answers")[0].at("text"), "8") || i == 9;
    const Reply vote = server.post("/arena/vote", {{"battle", battle.at("battle")},
                                                   {"token", battle.at("token")},
                                                   {"vote", left ? "left" : "right"},
                                                   {"good", {true, true}}});
    REQUIRE_MESSAGE(vote.status == 200, vote.body);
  }
  page.reload();
  browser().wait("document.querySelectorAll('#leaderboard table').length === 2");
  CHECK(browser().texts("#leaderboard table:first-of-type tbody th").at(0) == "beta");
  CHECK(contains(browser().text("#leaderboard"), "10 votes"));
}

TEST_CASE("arena: four answers of one model are ranked by keys, and ties are ties") {
  if (skip_without_browser()) return;
  Script script;
  std::string text;
  for (int i = 0; i < 20; i++) text += concat("The answer is ", i, ". ");
  script.answer({"hello"}, text);
  const TempDir dir;
  ServeOptions options = page_options(script.save("model", 2));
  options.arena.votes = dir / "votes.db";
  RunningServer server(options);
  Page page(server.port(), "arena");
  browser().type("#arena textarea", "hello" + keys::kEnter);
  browser().wait("document.querySelectorAll('#arena .answers input[type=number]').length === 4");
  const std::vector<std::string> shown = browser().texts("#arena .answers .arena-text");
  for (const char* place : {"2", "1", "4", "2"}) browser().press(place);
  browser().press(keys::kEnter);
  browser().wait("document.querySelector('#arena .dock').textContent.includes('is stored')");
  const Votes votes(options.arena.votes, Votes::Access::read);
  CHECK(votes.count() == 1);
  votes.for_each([&](const Vote& vote) {
    CHECK(vote.mode == "collect");
    const int ranks[] = {2, 1, 4, 2};
    REQUIRE(vote.answers.size() == 4);
    for (size_t i = 0; i < 4; i++) {
      CHECK(vote.answers[i].rank == ranks[i]);
      CHECK(vote.answers[i].text == shown[i]);
    }
  });
}

// An arena whose battles the test writes: /arena/battle and /arena/vote are held.
struct HeldArena {
  HeldArena() {
    ServeOptions options = page_options("");
    options.models = {"a=" + models().script, "b=" + models().script};
    options.arena.votes = dir / "votes.db";
    server.emplace(options);
    proxy.emplace(server->port());
    proxy->hold("/arena/battle");
    proxy->hold("/arena/vote");
  }
  // What the page asked for, answered up to these texts.
  HeldCall begin(const std::vector<std::string>& texts) {
    HeldCall call = proxy->next_call();
    call.begin_stream();
    call.send({{"battle", "b1"},
               {"token", "t1"},
               {"mode", "compare"},
               {"answers", 2},
               {"prompt", call.json().value("messages", OrderedJson::array())}});
    call.send({{"delta", texts}});
    return call;
  }
  void end(HeldCall& call) {
    call.send({{"done", {{{"finish", "length"}}, {{"finish", "stop"}}}}});
    call.end_stream();
  }
  TempDir dir;
  std::optional<RunningServer> server;
  std::optional<Proxy> proxy;
};
const std::string kVoteButtons = "#arena .dock button[aria-keyshortcuts]";
size_t open_votes() { return browser().count(kVoteButtons + ":not(:disabled)"); }

TEST_CASE("arena: a vote is possible once both answers are over, and is kept when it fails") {
  if (skip_without_browser()) return;
  HeldArena arena;
  Page page(arena.proxy->port(), "arena");
  browser().type("#arena textarea", "hello" + keys::kEnter);
  HeldCall call = arena.begin({"The left", "The right"});
  browser().wait("document.querySelector('#arena .arena-text + .note')");
  browser().wait("document.querySelector('#arena .answers').textContent.includes('The right')");
  CHECK(browser().count(kVoteButtons) == 4);
  CHECK(open_votes() == 0);
  browser().press("1");
  CHECK(browser().value("document.querySelectorAll('#arena [aria-live]').length") == 0);
  call.send({{"delta", {" one.", " one."}}});
  arena.end(call);
  browser().wait("!document.querySelector('" + kVoteButtons + "').disabled");
  CHECK(open_votes() == 4);
  CHECK(browser().texts(kVoteButtons) ==
        std::vector<std::string>{"A is better1", "Tie2", "B is better3", "Both are bad4"});
  CHECK(browser().texts("#arena .answers .note") ==
        std::vector<std::string>{"Cut off by the limit of tokens.", ""});
  CHECK(browser().text("#status").starts_with("The answers are complete"));
  CHECK(arena.proxy->waiting_calls() == 0);  // the key that came too early was no vote

  page.reload();  // the battle is still there
  browser().wait("document.querySelectorAll('#arena .arena-text').length === 3");
  CHECK(browser().texts("#arena .answers .arena-text") ==
        std::vector<std::string>{"The left one.", "The right one."});
  browser().press("4");
  browser().press("4");
  HeldCall vote = arena.proxy->next_call();
  CHECK(vote.json() ==
        OrderedJson{{"battle", "b1"}, {"token", "t1"}, {"vote", "tie"}, {"good", {false, false}}});
  page.expect_error("507");
  vote.reply(507, {{"error", {{"message", "the disk is full"}, {"code", "not_stored"}}}});
  browser().wait("document.querySelector('#error').textContent === 'the disk is full'");
  CHECK(open_votes() == 4);
  CHECK(arena.proxy->waiting_calls() == 0);
  browser().press("3");
  HeldCall again = arena.proxy->next_call();
  CHECK(again.json().at("vote") == "right");
  page.expect_error("409");
  again.reply(409, {{"error", {{"message", "it was cast before"}, {"code", "already_voted"}}}});
  browser().wait("document.querySelector('#arena .dock').textContent.includes('is stored')");

  // The conversation goes on with the answer that was chosen.
  browser().type("#arena textarea", "and then?" + keys::kEnter);
  HeldCall next = arena.begin({"One", "Two"});
  CHECK(next.json().at("messages") ==
        OrderedJson{{{"role", "user"}, {"content", "hello"}},
                    {{"role", "assistant"}, {"content", "The right one."}},
                    {{"role", "user"}, {"content", "and then?"}}});
  arena.end(next);
  browser().wait("!document.querySelector('" + kVoteButtons + "').disabled");
}

TEST_CASE("arena: while a vote is due the leaderboard is not shown") {
  if (skip_without_browser()) return;
  HeldArena arena;
  Page page(arena.proxy->port(), "arena");
  browser().type("#arena textarea", "hello" + keys::kEnter);
  HeldCall call = arena.begin({"one", "two"});
  arena.end(call);
  browser().wait("!document.querySelector('" + kVoteButtons + "').disabled");
  browser().click("#tabs a[href='#leaderboard']");
  browser().wait("document.querySelector('#leaderboard').textContent.includes('your vote')");
  page.reload();
  browser().wait("document.querySelector('#leaderboard').textContent.includes('your vote')");
  CHECK(arena.proxy->bodies("/arena/leaderboard").empty());
  browser().click("#leaderboard a");
  browser().wait("!document.querySelector('" + kVoteButtons + "').disabled");
}

TEST_CASE("arena: answers that are the same, and a stream that breaks, give the prompt back") {
  if (skip_without_browser()) return;
  HeldArena arena;
  Page page(arena.proxy->port(), "arena");
  browser().type("#arena textarea", "hello" + keys::kEnter);
  HeldCall call = arena.begin({"", ""});
  call.send({{"same", true}});
  call.end_stream();
  browser().wait("document.querySelector('#arena .dock').textContent.includes('the same')");
  CHECK(browser().value("document.querySelector('#arena textarea').value") == "hello");
  browser().press(keys::kEnter);
  arena.begin({"half an", "answer"}).connection.close();
  browser().wait("!document.querySelector('#alert').hidden");
  CHECK(browser().value("document.querySelector('#arena textarea').value") == "hello");
  CHECK(browser().count("#arena .answers article") == 0);
}

TEST_CASE("arena: answers have one width and one look, and on a phone a coin orders them") {
  if (skip_without_browser()) return;
  HeldArena arena;
  Page page(arena.proxy->port(), "arena");
  for (const int coin : {0, 1}) {
    browser().run("crypto.getRandomValues = bytes => bytes.fill(arguments[0]);", {coin});
    browser().type("#arena textarea", "hello" + keys::kEnter);
    HeldCall call = arena.begin({"one", "a much longer answer than the other one is"});
    arena.end(call);
    browser().wait("!document.querySelector('" + kVoteButtons + "').disabled");
    const std::string boxes =
        "[...document.querySelectorAll('#arena .answers article')].map(e => {"
        " const {left, top, width, height} = e.getBoundingClientRect();"
        " const {font, color, backgroundColor} = getComputedStyle(e);"
        " return {left, top, width, height, look: font + color + backgroundColor}; })";
    for (const int width : {1200, 390}) {
      browser().resize(width, 900);
      const OrderedJson box = browser().value(boxes);
      CHECK(box[0].at("width") == box[1].at("width"));
      CHECK(box[0].at("look") == box[1].at("look"));
      if (width == 1200) {
        CHECK(box[0].at("top") == box[1].at("top"));
        CHECK(box[0].at("left") < box[1].at("left"));
        CHECK(box[0].at("height") == box[1].at("height"));
      } else {
        const bool first_is_above = box[0].at("top") < box[1].at("top");
        CHECK(first_is_above == (coin == 0));
      }
    }
    browser().resize(1200, 900);
    browser().press("2");
    HeldCall vote = arena.proxy->next_call();
    vote.reply(200, {{"models", {"a", "b"}}, {"votes", 1}, {"leaked", false}});
    browser().wait("document.querySelector('#arena .dock').textContent.includes('is stored')");
  }
}

// -------------------------------------------------------------------------------------------------
// Keyboard

TEST_CASE("page: every control of every view is reached by the Tab key, and shows that it is") {
  if (skip_without_browser()) return;
  Script script;
  script.answer({"hello"}, "The answer is 7.");
  const TempDir dir;
  ServeOptions options = page_options("");
  options.models = {"alpha=" + script.save(), "beta=" + models().script};
  options.arena.votes = dir / "votes.db";
  RunningServer server(options);
  Page page(server.port(), "chat");
  say_to_model("hello");
  wait_for_text(bubble(2), "The answer is 7.");
  wait_until_idle();
  const std::string fields =
      "[...document.querySelectorAll('a[href], button:not(:disabled), select:not(:disabled), "
      "textarea, input:not(:disabled), summary, [tabindex=\"0\"]')].filter(e => "
      "e.checkVisibility({visibilityProperty: true}) && e.closest('[inert]') === null)";
  for (const std::string view : {"chat", "write", "tokens", "arena", "leaderboard"}) {
    CAPTURE(view);
    page.open(view);
    if (view == "write") {
      browser().fill("#write textarea", "The answer");
      browser().press(keys::kTab);  // takes one token
      wait_until_written();
    }
    if (view == "tokens")
      browser().wait("document.querySelector('#tokens .token-view [data-index]')");
    if (view == "leaderboard") browser().wait("document.querySelector('#leaderboard').textContent");
    // The focus shows in the look of the element or of the one around it.
    browser().run(
        "window.lookOf = e => [e, e.parentElement ?? e].map(e => getComputedStyle(e)).map(s => ["
        "  s.outlineStyle, s.outlineWidth, s.outlineColor, s.boxShadow, s.borderColor,"
        "  s.backgroundColor]).join();"
        "document.activeElement.blur(); window.scrollTo(0, 0); getSelection().removeAllRanges();"
        "document.body.tabIndex = -1; document.body.focus();"
        "document.body.removeAttribute('tabindex');"
        "window.reached = new Set();"
        "window.looks = new Map([...document.querySelectorAll('*')].map(e => [e, lookOf(e)]));");
    for (int i = 0; i < 80; i++) {
      if (view == "write" && browser().value("document.activeElement.matches('#write textarea')")) {
        browser().press(keys::kEscape);  // as the view says: there Tab takes a token
      }
      browser().press(keys::kTab);
      const std::string problem = browser().run(
          "const e = document.activeElement;"
          "if (e === document.body || reached.has(e)) return 'end';"
          "reached.add(e);"
          "return lookOf(e) !== looks.get(e) ? '' : e.outerHTML.slice(0, 200);");
      if (problem == "end") break;
      if (!problem.empty()) FAIL_CHECK("no sign of the focus: ", problem);
    }
    const std::vector<std::string> missed =
        browser()
            .value("(" + fields +
                   ").filter(e => !reached.has(e)).map(e => e.outerHTML.slice(0, 200))")
            .get<std::vector<std::string>>();
    for (const std::string& element : missed) FAIL_CHECK("not reached: ", element);
    CHECK(browser().value("reached.size").get<int>() > 8);
  }
}

}  // namespace cake
