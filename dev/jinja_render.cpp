// What cake/jinja.h makes of templates, for comparisons with Jinja2: dev/interop/jinja_compare.py.
//
// Reads JSON lines and answers each with one:
//   {"template": "...", "variables": {...}, "name": "x", "date": "2024-07-26"}
//   {"text": "...", "generated": [[begin, end], ...]}     places in bytes
//   {"error": "..."}
// The name and the date may be left out. A template that is null is the one of the line before.
#include <cstdio>
#include <iostream>
#include <optional>

#include "cake/jinja.h"
#include "cake/json.h"

using namespace cake;

namespace {

jinja::Variables read_variables(const OrderedJson& json) {
  jinja::Variables variables;
  for (const auto& item : json.items()) {
    variables.emplace_back(item.key(), jinja::from_json(item.value()));
  }
  return variables;
}

OrderedJson answer(const OrderedJson& line, std::optional<jinja::Template>& code) {
  try {
    if (!line.at("template").is_null()) {
      code.reset();
      code.emplace(line["template"].get<std::string>(), line.value("name", "template"));
    }
    require(code.has_value(), "found no template before this line, expected one");
    const jinja::Variables variables = read_variables(line.at("variables"));
    const jinja::Output out = code->render(variables, line.value("date", "2024-07-26"));
    return {{"text", out.text}, {"generated", out.generated}};
  } catch (const Error& error) {
    return {{"error", error.what()}};
  }
}

}  // namespace

int main() {
  return guarded_main([] {
    std::optional<jinja::Template> code;
    for (std::string line; std::getline(std::cin, line);) {
      std::fputs(json_line(answer(parse_json<OrderedJson>(line, "stdin"), code)).c_str(), stdout);
      std::fflush(stdout);
    }
    return 0;
  });
}
