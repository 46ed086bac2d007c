// The files of web/, as they were when the binary was built. bpe_page.cpp holds them, so that every
// stage that has a tokenizer has them too.
#pragma once

#include <string_view>

namespace cake::web {

std::string_view style_css();   // colours, text, tables, and the look of the token view
std::string_view tokens_js();   // the token view, a module without imports
std::string_view stats_html();  // the page of ./bpe stats
std::string_view stats_js();    // fills it

}  // namespace cake::web
