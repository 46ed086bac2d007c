// Judges answers from standard input, for math_verify_check.py: a line {"text", "expected"} gives a
// line {"right", "found"}, by the verifier `number`.
#include <iostream>
#include <string>

#include "cake/answers.h"
#include "cake/json.h"
#include "cake/run.h"

using namespace cake;

int main() {
  return guarded_main([] {
    int64_t lines = 0;
    for (std::string line; std::getline(std::cin, line);) {
      const std::string where = concat("line ", ++lines);
      const Json json = parse_json(line, where);
      const auto answer = json_get<std::string>(json, "expected", where);
      const std::string expected = reference_number(answer);
      if (expected.empty())
        fail(where, ": expected: found ", json_text(answer), ", expected a number");
      const std::string found = final_number(json_get<std::string>(json, "text", where));
      std::cout << json_line(Json{{"right", is_same_number(expected, found)}, {"found", found}});
    }
    return 0;
  });
}
