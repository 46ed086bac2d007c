// Text of any charset as UTF-8.
//
// What a page says of its charset is often wrong, so its bytes come first: a byte order mark, then
// valid UTF-8. Then what the HTTP header says, what a <meta> in the first 1024 bytes says, and what
// uchardet (Mozilla's detector) makes of the bytes; the first one in which the bytes make sense is
// taken. Labels mean what they mean to browsers (encoding.spec.whatwg.org): latin1 is windows-1252,
// gb2312 is GB18030, shift_jis is Microsoft's code page 932.
#pragma once

#include <iconv.h>
#include <simdjson.h>
#include <strings.h>
#include <uchardet/uchardet.h>

#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "cake/bytes.h"
#include "cake/run.h"
#include "cake/utf8.h"

namespace cake {

inline bool is_utf8(std::string_view text) {
  return simdjson::validate_utf8(text.data(), text.size());
}

struct Utf8Census {
  size_t characters = 0;  // beyond ASCII
  size_t invalid = 0;     // maximal beginnings of characters that do not go on as they must
};

// Appends the text to `out`, where there is one, with U+FFFD for what is invalid.
inline Utf8Census repair_utf8(std::string_view text, std::string* out) {
  Utf8Census census;
  size_t copied = 0;
  for (size_t i = 0; i < text.size();) {
    uint64_t eight;
    if (i + 8 <= text.size()) {
      std::memcpy(&eight, text.data() + i, 8);
      if ((eight & 0x8080808080808080) == 0) {
        i += 8;
        continue;
      }
    }
    if ((text[i] & 0x80) == 0) {
      i++;
      continue;
    }
    size_t bad;
    if (const size_t length = utf8_length(text, i, bad)) {
      i += length;
      census.characters++;
      continue;
    }
    if (out) out->append(text.substr(copied, i - copied)) += kReplacement;
    i += bad;
    copied = i;
    census.invalid++;
  }
  if (out) *out += text.substr(copied);
  return census;
}

// iconv's name of the charset that a label means; "" where no browser knows the label.
inline const char* charset_of_label(std::string_view label) {
  struct Name {
    const char *label, *charset;
  };
  static constexpr Name kNames[] = {{"utf-8", "UTF-8"},
                                    {"utf8", "UTF-8"},
                                    {"unicode-1-1-utf-8", "UTF-8"},
                                    {"latin1", "CP1252"},
                                    {"latin-1", "CP1252"},
                                    {"l1", "CP1252"},
                                    {"iso-8859-1", "CP1252"},
                                    {"iso8859-1", "CP1252"},
                                    {"iso88591", "CP1252"},
                                    {"iso_8859-1", "CP1252"},
                                    {"ascii", "CP1252"},
                                    {"us-ascii", "CP1252"},
                                    {"windows-1252", "CP1252"},
                                    {"cp1252", "CP1252"},
                                    {"x-cp1252", "CP1252"},
                                    {"iso-8859-2", "ISO-8859-2"},
                                    {"iso8859-2", "ISO-8859-2"},
                                    {"latin2", "ISO-8859-2"},
                                    {"iso-8859-3", "ISO-8859-3"},
                                    {"iso-8859-4", "ISO-8859-4"},
                                    {"iso-8859-5", "ISO-8859-5"},
                                    {"iso-8859-6", "ISO-8859-6"},
                                    {"iso-8859-7", "ISO-8859-7"},
                                    {"iso-8859-8", "ISO-8859-8"},
                                    {"iso-8859-8-i", "ISO-8859-8"},
                                    {"logical", "ISO-8859-8"},
                                    {"iso-8859-9", "CP1254"},
                                    {"latin5", "CP1254"},
                                    {"iso-8859-10", "ISO-8859-10"},
                                    {"iso-8859-11", "CP874"},
                                    {"iso-8859-13", "ISO-8859-13"},
                                    {"iso-8859-14", "ISO-8859-14"},
                                    {"iso-8859-15", "ISO-8859-15"},
                                    {"latin9", "ISO-8859-15"},
                                    {"iso-8859-16", "ISO-8859-16"},
                                    {"windows-874", "CP874"},
                                    {"tis-620", "CP874"},
                                    {"windows-1250", "CP1250"},
                                    {"cp1250", "CP1250"},
                                    {"windows-1251", "CP1251"},
                                    {"cp1251", "CP1251"},
                                    {"x-cp1251", "CP1251"},
                                    {"win-1251", "CP1251"},
                                    {"windows-1253", "CP1253"},
                                    {"windows-1254", "CP1254"},
                                    {"windows-1255", "CP1255"},
                                    {"windows-1256", "CP1256"},
                                    {"windows-1257", "CP1257"},
                                    {"windows-1258", "CP1258"},
                                    {"koi8-r", "KOI8-R"},
                                    {"koi8", "KOI8-R"},
                                    {"koi8_r", "KOI8-R"},
                                    {"koi8-u", "KOI8-U"},
                                    {"koi8-ru", "KOI8-U"},
                                    {"ibm866", "CP866"},
                                    {"cp866", "CP866"},
                                    {"macintosh", "MACINTOSH"},
                                    {"x-mac-roman", "MACINTOSH"},
                                    {"mac", "MACINTOSH"},
                                    {"x-mac-cyrillic", "MAC-CYRILLIC"},
                                    {"gb2312", "GB18030"},
                                    {"gb_2312-80", "GB18030"},
                                    {"gb_2312", "GB18030"},
                                    {"x-gbk", "GB18030"},
                                    {"gbk", "GB18030"},
                                    {"gb18030", "GB18030"},
                                    {"chinese", "GB18030"},
                                    {"big5", "BIG5-HKSCS"},
                                    {"big5-hkscs", "BIG5-HKSCS"},
                                    {"x-x-big5", "BIG5-HKSCS"},
                                    {"cn-big5", "BIG5-HKSCS"},
                                    {"euc-jp", "EUC-JP-MS"},
                                    {"x-euc-jp", "EUC-JP-MS"},
                                    {"shift_jis", "CP932"},
                                    {"shift-jis", "CP932"},
                                    {"sjis", "CP932"},
                                    {"x-sjis", "CP932"},
                                    {"ms_kanji", "CP932"},
                                    {"windows-31j", "CP932"},
                                    {"iso-2022-jp", "ISO-2022-JP-2"},
                                    {"euc-kr", "UHC"},
                                    {"korean", "UHC"},
                                    {"ks_c_5601-1987", "UHC"},
                                    {"ksc5601", "UHC"},
                                    {"windows-949", "UHC"},
                                    {"utf-16", "UTF-16LE"},
                                    {"utf-16le", "UTF-16LE"},
                                    {"utf-16be", "UTF-16BE"}};
  for (const Name& name : kNames) {
    if (label.size() == std::strlen(name.label) &&
        strncasecmp(label.data(), name.label, label.size()) == 0) {
      return name.charset;
    }
  }
  return "";
}

// What stands behind "charset=", with or without quotes; "" where there is none.
inline std::string_view charset_parameter(std::string_view text) {
  static constexpr std::string_view kKey = "charset";
  for (size_t i = 0; i + kKey.size() < text.size(); i++) {
    if ((text[i] | 0x20) != 'c' || strncasecmp(text.data() + i, kKey.data(), kKey.size()) != 0) {
      continue;
    }
    std::string_view rest = text.substr(i + kKey.size());
    const size_t equals = rest.find_first_not_of(" \t\r\n");
    if (equals == std::string_view::npos || rest[equals] != '=') continue;
    rest.remove_prefix(equals + 1);
    const size_t begin = rest.find_first_not_of(" \t\r\n\"'");
    if (begin == std::string_view::npos) return {};
    rest.remove_prefix(begin);
    return rest.substr(0, rest.find_first_of(" \t\r\n\"';>/"));
  }
  return {};
}

// Of a <meta> or an <?xml encoding=".."?> in the first 1024 bytes of a page.
inline std::string_view meta_charset(std::string_view html) {
  const std::string_view head = html.substr(0, 1024);
  for (size_t i = 0; (i = head.find('<', i)) != std::string_view::npos; i++) {
    const std::string_view tag = head.substr(i, head.find('>', i) - i);
    if (tag.starts_with("<?xml")) {
      const size_t encoding = tag.find("encoding=");
      if (encoding == std::string_view::npos || encoding + 10 >= tag.size()) continue;
      const std::string_view value = tag.substr(encoding + 10);
      return value.substr(0, value.find_first_of("\"'?"));
    }
    if (tag.size() < 5 || strncasecmp(tag.data(), "<meta", 5) != 0) continue;
    const std::string_view label = charset_parameter(tag);
    if (!label.empty()) return label;
  }
  return {};
}

// Converts by iconv and appends to `out`; what the charset does not have becomes U+FFFD. Returns
// the number of these, SIZE_MAX where iconv does not know the charset.
inline size_t convert_charset(std::string_view text, const char* charset, std::string& out) {
  struct Close {
    void operator()(void* converter) const { iconv_close(converter); }
  };
  const iconv_t opened = iconv_open("UTF-8", charset);
  if (opened == iconv_t(-1)) return SIZE_MAX;
  const std::unique_ptr<void, Close> converter(opened);
  size_t invalid = 0, size = out.size();
  char* in = const_cast<char*>(text.data());
  for (size_t left = text.size(); left > 0;) {
    out.resize(size + 2 * left + 64);
    char* target = out.data() + size;
    size_t room = out.size() - size;
    const size_t status = iconv(converter.get(), &in, &left, &target, &room);
    const int error = errno;
    size = size_t(target - out.data());
    if (status != size_t(-1) || error == E2BIG) continue;
    out.resize(size);
    out += kReplacement;
    size = out.size();
    invalid++;
    const bool wide = std::strncmp(charset, "UTF-16", 6) == 0;
    const size_t skipped = error == EINVAL ? left : std::min<size_t>(left, wide ? 2 : 1);
    in += skipped;
    left -= skipped;
    iconv(converter.get(), nullptr, nullptr, nullptr, nullptr);
  }
  out.resize(size);
  return invalid;
}

// What uchardet takes the bytes for: a label; "" where it cannot say.
inline std::string detect_charset(std::string_view text) {
  const std::unique_ptr<uchardet, decltype(&uchardet_delete)> detector(uchardet_new(),
                                                                       uchardet_delete);
  size_t begin = 0;  // of what tells most: the first byte beyond ASCII
  while (begin < text.size() && (text[begin] & 0x80) == 0) begin++;
  text = text.substr(begin - std::min<size_t>(begin, 256), 1 << 16);
  uchardet_handle_data(detector.get(), text.data(), text.size());
  uchardet_data_end(detector.get());
  return uchardet_get_charset(detector.get());
}

// UTF-8 of a page's or a text's bytes. `declared`: a label from outside, as of the HTTP header;
// `guess`: a <meta> counts, and the bytes may be taken for another charset. Returns whether there
// are U+FFFD in it for what no charset explains.
inline bool decode_text(std::string_view bytes, std::string_view declared, bool guess,
                        std::string& out) {
  out.clear();
  if (bytes.starts_with("\xef\xbb\xbf")) {
    bytes.remove_prefix(3);
    declared = {};
    guess = false;
  }
  if (bytes.empty()) return false;
  if (const char* utf16 = utf16_charset(bytes)) {
    if (bytes.starts_with("\xff\xfe") || bytes.starts_with("\xfe\xff")) bytes.remove_prefix(2);
    return convert_charset(bytes, utf16, out) > 0;
  }
  const bool escapes = guess && std::memchr(bytes.data(), 0x1b, bytes.size());  // ISO-2022-JP
  if (!escapes && is_utf8(bytes)) {
    out.assign(bytes);
    return false;
  }
  const Utf8Census census = repair_utf8(bytes, nullptr);
  const bool mostly_utf8 = census.invalid == 0 || census.characters >= 10 * census.invalid;
  if (guess && (escapes || !mostly_utf8)) {
    const std::string_view meta = meta_charset(bytes);
    const std::string detected = detect_charset(bytes);
    for (const std::string_view label : {declared, meta, std::string_view(detected)}) {
      const char* charset = charset_of_label(label);
      if (!*charset && label == detected) charset = detected.c_str();
      const bool is_utf = std::strncmp(charset, "UTF-", 4) == 0;
      if (!*charset || is_utf || (mostly_utf8 && std::strncmp(charset, "ISO-2022", 8) != 0)) {
        continue;
      }
      // A charset makes sense where at most one in a hundred of the bytes beyond ASCII is outside.
      size_t beyond = 0;
      for (const char c : bytes) beyond += (c & 0x80) != 0;
      out.clear();
      const size_t invalid = convert_charset(bytes, charset, out);
      if (invalid <= std::max<size_t>(1, beyond / 100)) return invalid > 0;
    }
    out.clear();
  }
  return repair_utf8(bytes, &out).invalid > 0;
}

}  // namespace cake
