// A web browser for tests: Chromium without a window, steered over the WebDriver protocol (W3C,
// https://www.w3.org/TR/webdriver2/), which is JSON over HTTP.
//
//     test --HTTP--> chromedriver --pipe--> chromium --HTTP--> ./serve of the test
//
//     WebDriver browser;                             // starts both programs
//     browser.open("http://127.0.0.1:8080/#chat");
//     browser.type("#prompt", "Hello");              // as a person types: the element must be
//     visible browser.wait("document.querySelectorAll('.answer').length === 1");
//
// chromedriver dies with the test, however that ends, and Chromium dies with chromedriver, because
// it reads its orders from a pipe.
#pragma once

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"
#include "test/http_client.h"
#include "test/support.h"

extern char** environ;

namespace cake {

// The path of a program that a shell would start; "" when there is none.
inline std::string program_path(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string file = folder + "/" + name;
    if (access(file.c_str(), X_OK) == 0) return file;
  }
  return "";
}

// Keys that are no characters, as the protocol writes them: in type() and press().
namespace keys {
inline const std::string kBackspace = "\uE003", kTab = "\uE004", kEnter = "\uE007",
                         kShift = "\uE008", kControl = "\uE009", kEscape = "\uE00C",
                         kSpace = "\uE00D", kEnd = "\uE010", kHome = "\uE011", kLeft = "\uE012",
                         kUp = "\uE013", kRight = "\uE014", kDown = "\uE015", kDelete = "\uE017";
}  // namespace keys

// A program of its own in the background, which is killed with the thread that started it.
class ChildProgram {
 public:
  // Its output goes to `log`. `variables`: "NAME=value", in place of ours of these names.
  ChildProgram(const std::vector<std::string>& command, const std::string& log,
               const std::vector<std::string>& variables) {
    // All is made before fork(): in the child of a program with threads nothing may be allocated.
    std::vector<std::string> all = variables;
    for (char** variable = environ; *variable; variable++) {
      const std::string text = *variable, name = text.substr(0, text.find('=') + 1);
      const bool given = std::any_of(variables.begin(), variables.end(),
                                     [&](const std::string& v) { return v.starts_with(name); });
      if (!given) all.push_back(text);
    }
    std::vector<char*> arguments = pointers(command), environment = pointers(all);
    const int out = ::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    const int in = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    require(out >= 0 && in >= 0, log, ": cannot open: ", errno_text());
    const pid_t parent = getpid();
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(127);
      dup2(in, 0), dup2(out, 1), dup2(out, 2);
      execve(arguments[0], arguments.data(), environment.data());
      _exit(127);
    }
    const std::string why = errno_text();
    ::close(in), ::close(out);
    require(pid_ > 0, command[0], ": cannot start: ", why);
  }
  ChildProgram(const ChildProgram&) = delete;
  ChildProgram& operator=(const ChildProgram&) = delete;
  ~ChildProgram() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

 private:
  static std::vector<char*> pointers(const std::vector<std::string>& texts) {
    std::vector<char*> list;
    for (const std::string& text : texts) list.push_back(const_cast<char*>(text.c_str()));
    list.push_back(nullptr);
    return list;
  }
  pid_t pid_;
};

class WebDriver {
 public:
  // Why there is no browser to test with; "" when there is one.
  static std::string missing() {
    for (const char* name : {"chromium", "chromedriver"}) {
      if (program_path(name).empty()) return concat(name, " is not installed");
    }
    return "";
  }

  // `seconds`: the longest that wait() and any call of the protocol may take.
  explicit WebDriver(double seconds = 30) : seconds_(seconds) {
    const std::string log = dir_ / "chromedriver.log", home = dir_.path();
    driver_.emplace(std::vector<std::string>{program_path("chromedriver"), "--port=0"}, log,
                    std::vector<std::string>{"HOME=" + home, "TMPDIR=" + home, "LANG=C.UTF-8"});
    int port = 0;
    const std::string mark = "successfully on port ";
    for (const double end = now() + seconds_; port == 0;) {
      const std::string text = read_file(log);
      const size_t at = text.find(mark), line = text.find('.', at);
      if (at != std::string::npos && line != std::string::npos) {
        port = std::atoi(text.c_str() + at + mark.size());
      }
      require(now() < end, "chromedriver: found no port in its output: ", text);
      if (port == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    connection_.emplace(port, seconds_ + 10);

    std::vector<std::string> flags = {
        "--headless", "--remote-debugging-pipe", "--user-data-dir=" + home + "/profile",
        "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-first-run",
        "--no-default-browser-check", "--disable-background-timer-throttling",
        "--disable-renderer-backgrounding", "--force-prefers-reduced-motion", "--lang=en-US",
        "--force-device-scale-factor=1", "--hide-scrollbars",
        // No name is looked up: what is asked for elsewhere fails, and is in requests().
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"};
    if (geteuid() == 0) flags.push_back("--no-sandbox");  // Chromium's sandbox refuses root
    const OrderedJson options = {{"binary", program_path("chromium")}, {"args", flags}};
    const OrderedJson wanted = {
        {"browserName", "chrome"},
        {"goog:chromeOptions", options},
        {"goog:loggingPrefs", {{"performance", "ALL"}, {"browser", "ALL"}}},
        {"unhandledPromptBehavior", "ignore"},
        {"timeouts", {{"script", int64_t(seconds_ * 1000)}, {"implicit", 0}}}};
    session_ = "/session";
    const OrderedJson capabilities = {{"alwaysMatch", wanted}};
    const OrderedJson session = call("POST", "", OrderedJson{{"capabilities", capabilities}});
    session_ += "/" + session.at("sessionId").get<std::string>();
    // Elements get their focus events whatever window the system has in front.
    devtools("Emulation.setFocusEmulationEnabled", {{"enabled", true}});
  }

  // One call of the protocol, below the session: the reply's "value". Error for a reply that tells
  // of one.
  OrderedJson call(const std::string& method, const std::string& path,
                   const std::optional<OrderedJson>& body = std::nullopt) {
    auto [status, value] = try_call(method, path, body);
    if (status != 200) {
      fail("the browser: ", method, " ", path, ": found ", value.value("message", value.dump()));
    }
    return value;
  }
  // The same with the status of the reply, whatever it is.
  std::pair<int, OrderedJson> try_call(const std::string& method, const std::string& path,
                                       const std::optional<OrderedJson>& body = std::nullopt) {
    std::optional<std::string> text;
    if (body) text = body->dump();
    const Reply reply = connection_->ask(
        http_request(method, session_ + path, {{"Content-Type", "application/json"}}, text));
    require(reply.status != 0 && reply.complete, "the browser: found no reply to ", path);
    return {reply.status, reply.json().at("value")};
  }
  // A command of Chromium's own protocol (DevTools).
  OrderedJson devtools(const std::string& command, OrderedJson parameters = OrderedJson::object()) {
    return call("POST", "/goog/cdp/execute",
                OrderedJson{{"cmd", command}, {"params", std::move(parameters)}});
  }

  // -----------------------------------------------------------------------------------------------
  // Pages

  void open(const std::string& url) { call("POST", "/url", OrderedJson{{"url", url}}); }
  void reload() { call("POST", "/refresh", OrderedJson::object()); }
  // Pixels of the page's area.
  void resize(int width, int height) {
    devtools("Emulation.setDeviceMetricsOverride",
             {{"width", width}, {"height", height}, {"deviceScaleFactor", 1}, {"mobile", false}});
  }
  void prefer_dark(bool dark) {
    devtools(
        "Emulation.setEmulatedMedia",
        {{"features", {{{"name", "prefers-color-scheme"}, {"value", dark ? "dark" : "light"}}}}});
  }
  // PNG, in base64. `whole`: below what is in sight, too.
  std::string screenshot(bool whole = false) {
    return devtools("Page.captureScreenshot", {{"captureBeyondViewport", whole}})
        .at("data")
        .get<std::string>();
  }

  // What the body of a function returns in the page, with `arguments`. A promise is awaited.
  OrderedJson run(const std::string& body, OrderedJson arguments = OrderedJson::array()) {
    return call("POST", "/execute/sync",
                OrderedJson{{"script", body}, {"args", std::move(arguments)}});
  }
  // The value of a JavaScript expression.
  OrderedJson value(const std::string& expression) { return run("return (" + expression + ");"); }
  // Waits until the expression is true in the page: its value then. An exception counts as false.
  OrderedJson wait(const std::string& expression) {
    const OrderedJson found =
        run("const end = performance.now() + " + std::to_string(int64_t(seconds_ * 900)) +
            ";\n"
            "return new Promise(resolve => {\n"
            "  const test = () => {\n"
            "    let value = null, problem = null;\n"
            "    try { value = (" +
            expression +
            "); } catch (error) { problem = String(error); }\n"
            "    if (value) resolve({value});\n"
            "    else if (performance.now() > end) {\n"
            "      resolve({problem, text: document.body.innerText.slice(0, 2000)});\n"
            "    } else setTimeout(test, 5);\n"
            "  };\n"
            "  test();\n"
            "});");
    if (!found.contains("value")) {
      fail("the page: found no ", expression, " in ", seconds_ * .9, " s (",
           found.value("problem", OrderedJson()).dump(), "), in the page:\n",
           found.value("text", std::string()));
    }
    return found.at("value");
  }

  // -----------------------------------------------------------------------------------------------
  // Elements, by CSS selectors: the first that matches. Each is waited for.

  // The text of an element, shown or not.
  std::string text(const std::string& selector) {
    wait("document.querySelector(" + quoted(selector) + ")");
    return value("document.querySelector(" + quoted(selector) + ").textContent");
  }
  // The texts of all elements that match now.
  std::vector<std::string> texts(const std::string& selector) {
    return value("[...document.querySelectorAll(" + quoted(selector) +
                 ")].map(element => element.textContent)")
        .get<std::vector<std::string>>();
  }
  size_t count(const std::string& selector) {
    return value("document.querySelectorAll(" + quoted(selector) + ").length");
  }
  // A click in the middle of the element, brought into sight. Error when something covers it.
  void click(const std::string& selector) {
    call("POST", "/element/" + find(selector) + "/click", OrderedJson::object());
  }
  // Keys into the element, behind what it holds.
  void type(const std::string& selector, const std::string& text) {
    call("POST", "/element/" + find(selector) + "/value", OrderedJson{{"text", text}});
  }
  // What a field holds is selected, and replaced. `text` may hold any character.
  void fill(const std::string& selector, const std::string& text) {
    run("arguments[0].focus(); arguments[0].select();", {reference(find(selector))});
    if (text.empty()) return press(keys::kDelete);
    devtools("Input.insertText", {{"text", text}});
  }
  // The option of a <select> with this value.
  void choose(const std::string& selector, const std::string& value) {
    click(selector + " option[value=" + quoted(value) + "]");
  }
  // Keys to what has the focus. The first ones are held while the last is pressed:
  // press({keys::kControl, keys::kEnter}).
  void press(const std::vector<std::string>& chord) {
    OrderedJson actions = OrderedJson::array();
    for (const std::string& key : chord) actions.push_back({{"type", "keyDown"}, {"value", key}});
    for (size_t i = chord.size(); i-- > 0;) {
      actions.push_back({{"type", "keyUp"}, {"value", chord[i]}});
    }
    const OrderedJson keyboard = {{"type", "key"}, {"id", "keyboard"}, {"actions", actions}};
    call("POST", "/actions", OrderedJson{{"actions", OrderedJson::array({keyboard})}});
  }
  void press(const std::string& key) { press(std::vector<std::string>{key}); }
  // The mouse wheel over a place of the window; `pixels` > 0: down.
  void scroll(int pixels, int x = 600, int y = 300) {
    const OrderedJson turn = {{"type", "scroll"}, {"x", x},           {"y", y},
                              {"deltaX", 0},      {"deltaY", pixels}, {"duration", 0}};
    const OrderedJson wheel = {
        {"type", "wheel"}, {"id", "wheel"}, {"actions", OrderedJson::array({turn})}};
    call("POST", "/actions", OrderedJson{{"actions", OrderedJson::array({wheel})}});
  }

  // -----------------------------------------------------------------------------------------------
  // What happened in the browser since this was asked last

  struct Happened {
    std::vector<std::string> requests;  // URLs, also of those that failed
    std::vector<std::string> dialogs;   // texts of alert, confirm and prompt
    std::vector<std::string> errors;    // of the console: exceptions, refused scripts, failed loads
  };
  Happened happened() {
    Happened h;
    for (const OrderedJson& entry : call("POST", "/se/log", OrderedJson{{"type", "performance"}})) {
      const OrderedJson event =
          parse_json<OrderedJson>(entry.at("message").get<std::string>(), "the browser's log")
              .at("message");
      const std::string method = event.at("method");
      if (method == "Network.requestWillBeSent") {
        h.requests.push_back(event.at("params").at("request").at("url"));
      } else if (method == "Network.webSocketCreated") {
        h.requests.push_back(event.at("params").at("url"));
      } else if (method == "Page.javascriptDialogOpening") {
        h.dialogs.push_back(event.at("params").at("message"));
      }
    }
    for (const OrderedJson& entry : call("POST", "/se/log", OrderedJson{{"type", "browser"}})) {
      if (entry.at("level") == "SEVERE") h.errors.push_back(entry.at("message"));
    }
    return h;
  }

  // As a string of JavaScript.
  static std::string quoted(const std::string& text) { return OrderedJson(text).dump(); }

 private:
  static constexpr const char* kElement = "element-6066-11e4-a52e-4f735466cecf";  // the standard's
  static OrderedJson reference(const std::string& id) { return {{kElement, id}}; }
  std::string find(const std::string& selector) {
    wait("document.querySelector(" + quoted(selector) + ")");
    return call("POST", "/element", OrderedJson{{"using", "css selector"}, {"value", selector}})
        .at(kElement)
        .get<std::string>();
  }

  const double seconds_;
  TempDir dir_;  // Chromium's profile, and all that both programs would leave in a home
  std::optional<ChildProgram> driver_;
  std::optional<Connection> connection_;
  std::string session_;
};

}  // namespace cake
