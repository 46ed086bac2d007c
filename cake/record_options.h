// What --map and --bad-lines ask of the readers of records and documents.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cake/json.h"

namespace cake {

// Other names of fields, as --map FIELD=KEY gives them: "answer" -> "reward_model.ground_truth". A
// dot leads into an object; a number behind a dot is an index into a list.
using FieldNames = std::map<std::string, std::string, std::less<>>;

struct RecordOptions {
  FieldNames names;
  bool skip_bad_lines = false;

  // The keys at the top of a record that --map reads.
  std::vector<std::string> mapped_keys() const {
    std::vector<std::string> keys;
    for (const auto& [field, key] : names) keys.push_back(key.substr(0, key.find('.')));
    return keys;
  }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(RecordOptions, names, skip_bad_lines)

}  // namespace cake
