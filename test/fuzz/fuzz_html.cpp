// Any bytes as a page of HTML: a text comes out, in UTF-8, the same twice. The bytes are the page
// itself, or, where the first one is odd, each chooses a piece of HTML.
#include "cake/corpus.h"
#include "test/fuzz/fuzz.h"

namespace {

constexpr const char* kPieces[] = {"<div>",
                                   "</div>",
                                   "<p>",
                                   "</p>",
                                   "<b>",
                                   "</b>",
                                   "<i>",
                                   "</i>",
                                   "<a href=x>",
                                   "</a>",
                                   "<ul>",
                                   "<li>",
                                   "</ul>",
                                   "<table>",
                                   "</table>",
                                   "<tr>",
                                   "<td>",
                                   "</td>",
                                   "<th>",
                                   "<caption>",
                                   "<colgroup>",
                                   "<tbody>",
                                   "<select>",
                                   "</select>",
                                   "<option>",
                                   "<svg>",
                                   "</svg>",
                                   "<foreignObject>",
                                   "</foreignObject>",
                                   "<title>",
                                   "</title>",
                                   "<math>",
                                   "<mi>",
                                   "<annotation-xml>",
                                   "</math>",
                                   "<template>",
                                   "<template shadowrootmode=open>",
                                   "</template>",
                                   "<script>",
                                   "</script>",
                                   "<!--",
                                   "-->",
                                   "<style>",
                                   "</style>",
                                   "<pre>",
                                   "</pre>",
                                   "<br>",
                                   "\n",
                                   " ",
                                   "word ",
                                   "Main text. ",
                                   "&amp;",
                                   "&",
                                   "<",
                                   "</",
                                   "<!",
                                   "<?",
                                   "<![CDATA[",
                                   "]]>",
                                   "\"",
                                   "'",
                                   "=",
                                   ">",
                                   "/",
                                   "<p class=\"content\">",
                                   "<div hidden>",
                                   "<form>",
                                   "</form>",
                                   "<button>",
                                   "<h1>",
                                   "</h2>",
                                   "<noscript>",
                                   "</noscript>",
                                   "<body>",
                                   "<html>",
                                   "<head>",
                                   "</body>",
                                   "<frameset>",
                                   "<plaintext>",
                                   "<xmp>",
                                   "<textarea>",
                                   "<iframe>",
                                   "<object>",
                                   "</object>",
                                   "<dd>",
                                   "<dl>",
                                   "<rt>",
                                   "<ruby>",
                                   "<x-y>",
                                   "</x-y>",
                                   "<o:p>",
                                   "<script type=application/ld+json>{\"description\":\"\\u00e9",
                                   "<meta name=description content='a b'>",
                                   "\xc3\xa9",
                                   "\xff",
                                   "\xe2\x80",
                                   "<font>",
                                   "</font>",
                                   "<nobr>",
                                   "<hr>",
                                   "<input>",
                                   "<img>",
                                   "<article>",
                                   "<main>",
                                   "<nav>",
                                   "</nav>"};

std::string page_of(const uint8_t* data, size_t size) {
  if (size == 0 || data[0] % 2 == 0) return std::string(reinterpret_cast<const char*>(data), size);
  std::string html;
  for (size_t i = 1; i < size; i++) html += kPieces[data[i] % std::size(kPieces)];
  return html;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace cake;
  using namespace cake::corpus;
  using fuzz::expect;
  const std::string html = page_of(data, size);
  const ExtractBlocks blocks = extract_blocks(html, html.substr(0, 40));
  const size_t features = extract_feature_names().size();
  expect(blocks.features.size() == blocks.texts.size() * features, "a row for each block");
  for (const float p : blocks.probabilities) expect(p >= 0 && p <= 1, "probabilities");
  for (const float x : blocks.features) expect(x - x == 0, "features are finite");
  for (const std::string& text : blocks.texts) {
    expect(!text.empty() && is_utf8(text), "blocks are UTF-8");
    expect(text.front() != ' ' && text.back() != ' ' && text.find("  ") == std::string::npos,
           "white space of blocks is collapsed");
  }
  for (int mode = 0; mode < 4; mode++) {
    ExtractOptions options;
    options.mode = ExtractMode(mode % 3);
    options.rules = mode == 3;
    const Extracted e = extract(html, html.substr(0, 40), options);
    expect(is_utf8(e.text) && is_utf8(e.title), "texts are UTF-8");
    expect(e.html_bytes == html.size(), "the size of the page");
    if (mode == 1) expect(e.text == extract(html, html.substr(0, 40)).text, "the same text again");
  }
  return 0;
}
