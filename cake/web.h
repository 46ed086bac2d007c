// The files of web/, as they were when the binary was built. bpe_page.cpp holds those of the page
// of ./bpe stats, so that every stage that has a tokenizer has them; serve_page.cpp holds the rest.
#pragma once

#include <string_view>

namespace cake::web {

std::string_view style_css();   // colours, text, tables, and the look of the token view
std::string_view tokens_js();   // the token view, a module without imports
std::string_view stats_html();  // the page of ./bpe stats
std::string_view stats_js();    // fills it

}  // namespace cake::web

// Defines web::function(), which must be declared: the assembler puts the file's bytes into the
// program. Its path begins at the root of the repository, where make runs. The Makefile lets every
// object with such a file depend on web/. In namespace cake.
#define CAKE_WEB_FILE(function, path)                                                      \
  asm(".section .rodata\n"                                                                 \
      ".globl cake_web_" #function "\n.globl cake_web_" #function                          \
      "_end\n"                                                                             \
      "cake_web_" #function ":\n.incbin \"" path "\"\ncake_web_" #function                 \
      "_end:\n"                                                                            \
      ".previous\n");                                                                      \
  extern "C" const char cake_web_##function[], cake_web_##function##_end[];                \
  std::string_view web::function() {                                                       \
    return {cake_web_##function, size_t(cake_web_##function##_end - cake_web_##function)}; \
  }
