// The page of ./serve: the files of web/, which the binary holds (serve_page.cpp).
#pragma once

#include <string>
#include <vector>

#include "cake/http.h"

namespace cake {

// GET / and the files that the page loads, each at /NAME. They are answered while the models load,
// and need no key. `dir`: they are read from there at each request, so that a change shows at once;
// "": as they were when the binary was built. Error when one of them is not in `dir`.
void add_page(HttpServer&, const std::string& dir);

// The paths of the page, which need no key: it asks for one.
std::vector<std::string> page_paths();

}  // namespace cake
