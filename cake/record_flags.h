// The two flags of every stage that reads records: --map and --bad-lines.
#pragma once

#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "cake/json.h"
#include "cake/record_options.h"
#include "cake/run.h"

namespace cake {

// "answer=reward_model.ground_truth": a field of this program and the key of the file that holds
// it. A dot leads into an object; a number behind a dot is an index into a list.
inline void add_field_name(FieldNames& names, const std::string& value) {
  const size_t equals = value.find('=');
  const std::string field = value.substr(0, equals);
  const std::string key = equals == std::string::npos ? "" : value.substr(equals + 1);
  const bool has_empty_part =
      key.starts_with('.') || key.ends_with('.') || key.find("..") != std::string::npos;
  require(!field.empty() && !key.empty() && !has_empty_part, "--map: found ", json_text(value),
          ", expected FIELD=KEY, as in --map answer=reward_model.ground_truth");
  require(names.emplace(field, key).second, "--map: found the field ", json_text(field),
          " twice, expected each field once");
}

// `app`: a program, a subcommand or an option group. `options` must live as long as it.
inline void add_record_flags(CLI::App& app, RecordOptions& options) {
  app.add_option_function<std::vector<std::string>>(
         "--map",
         [&options](const std::vector<std::string>& values) {
           options.names.clear();
           for (const std::string& value : values) add_field_name(options.names, value);
         },
         "read the key KEY of the file as FIELD: --map answer=reward_model.ground_truth (a dot "
         "leads into an object, a number is an index into a list); may be given several times")
      ->type_name("FIELD=KEY")
      ->allow_extra_args(false)
      ->default_str("");
  app.add_option_function<std::string>(
         "--bad-lines",
         [&options](const std::string& value) {
           require(value == "stop" || value == "skip", "--bad-lines: found ", json_text(value),
                   ", expected stop or skip");
           options.skip_bad_lines = value == "skip";
         },
         "at a record that cannot be read: stop, or skip it; the output says how many were skipped "
         "and shows the first three")
      ->type_name("TEXT")
      ->default_str("stop");
}

}  // namespace cake
