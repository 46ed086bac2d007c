// The documents as the web would have them: in pages of made-up sites, among other pages that a
// corpus must not keep. Part of dev/world.cpp.
//
//     documents -> bundled, 60 words or more a page -> their lines as HTML (paragraphs, breaks)
//         -> within a site's layout: header, menu, sidebar, related links, share buttons, footer,
//            scripts, styles, cookie banner
//     + dirt: mirrors and near-duplicates on other sites, other languages, spam, navigation, walls
//       of consent; and in clean text addresses of people, other encodings and broken bytes
//         -> in one order, a copy somewhere behind its original -> DIR/pages/ and DIR/truth.jsonl
//
// The layouts are those of common programs for blogs, encyclopedias, forums and shops. No site and
// no address is a real one: hosts end in .example (RFC 2606).
#pragma once

#include <zlib.h>

#include "cake/records.h"

namespace cake::world {
namespace {

// ---------------------------------------------------------------------------------------------
// Bundles: the documents of one page

// Words as people count them: pieces between white space that hold a letter or a digit.
int count_words(std::string_view text) {
  int words = 0;
  bool counted = false;
  for (const char c : text) {
    if (c == ' ' || c == '\n') {
      counted = false;
    } else if (!counted && std::isalnum((unsigned char)c)) {
      counted = true;
      words++;
    }
  }
  return words;
}

constexpr int kPageWords = 60;      // a page's, at least
constexpr int kPageTokens = 250;    // a page's, at most, where its documents allow it
constexpr size_t kCandidates = 12;  // documents among which the best one is chosen to fill a page

using Bundle = std::vector<int>;  // indices of documents

// Sums, comparisons, lists and the like say the same few words in each document: numbers aside, two
// of them are near-duplicates for anybody, and some of them are in no language. Each of them shares
// its page with a document of another kind, which differs from all others.
std::vector<Bundle> bundle(const std::vector<Document>& documents) {
  static const std::set<std::string> kFillers = {"facts", "passages", "stories", "word problems"};
  std::vector<int> fillers, others;
  for (size_t i = 0; i < documents.size(); i++)
    (kFillers.count(documents[i].kind) ? fillers : others).push_back(int(i));
  std::vector<Bundle> bundles;
  const auto tokens = [&](int i) { return int(estimate_tokens(documents[size_t(i)].text)); };
  const auto words = [&](int i) { return count_words(documents[size_t(i)].text); };
  size_t next = 0;
  const auto add_filler = [&](Bundle& page, int& page_tokens) {
    // The longest of the next few that still fits, else the shortest.
    const size_t end = std::min(fillers.size(), next + kCandidates);
    size_t best = next;
    for (size_t i = next + 1; i < end; i++) {
      const int now = tokens(fillers[i]), before = tokens(fillers[best]);
      const bool fits = page_tokens + now <= kPageTokens, did = page_tokens + before <= kPageTokens;
      if (fits != did ? fits : fits ? now > before : now < before) best = i;
    }
    std::swap(fillers[next], fillers[best]);
    page.push_back(fillers[next]);
    page_tokens += tokens(fillers[next]);
    next++;
  };
  const auto fill_page = [&](int first, bool alone) {
    Bundle page{first};
    int page_tokens = tokens(first), page_words = words(first);
    while (next < fillers.size() && (page_words < kPageWords || (!alone && page.size() == 1))) {
      add_filler(page, page_tokens);
      page_words += words(page.back());
    }
    if (page_words < kPageWords && !bundles.empty()) {  // the last few
      bundles.back().insert(bundles.back().end(), page.begin(), page.end());
    } else {
      bundles.push_back(std::move(page));
    }
  };
  for (const int i : others) fill_page(i, false);
  while (next < fillers.size()) fill_page(fillers[next++], true);
  return bundles;
}

// ---------------------------------------------------------------------------------------------
// Sites and their layouts

// {text} the documents, each in {before} and {after}; of the page: {title} {author} {date} {url}
// {crumb} {related} {tags} {teaser} {number}; of the site: {site} {host} {menu} {side} {footer}
// {style} {script} {cookie} {lang}.
struct Layout {
  const char *page, *before, *after;
  const char* path;  // of its addresses: {slug}, {number}, {year}
};

const std::vector<Layout> kLayouts = {
    // A blog
    {R"(<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="{charset}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} &#8211; {site}</title>
<link rel="canonical" href="{url}">
<meta property="og:type" content="article">
<meta property="og:title" content="{title}">
<style id="global-styles-inline-css">{style}</style>
<script>{script}</script>
</head>
<body class="post-template-default single single-post">
<div id="page" class="site">
<a class="skip-link screen-reader-text" href="#primary">Skip to content</a>
<header id="masthead" class="site-header"><div class="site-branding"><p class="site-title"><a href="/" rel="home">{site}</a></p></div>
<nav id="site-navigation" class="main-navigation"><ul id="primary-menu" class="menu">{menu}</ul></nav></header>
<main id="primary" class="site-main">
<article id="post-{number}" class="post type-post status-publish format-standard hentry">
<header class="entry-header"><div class="entry-meta"><span class="posted-on">Posted on <time class="entry-date published">{date}</time></span> <span class="byline">by <a class="url fn n" href="/author/">{author}</a></span></div></header>
<div class="entry-content">
{text}
</div>
<footer class="entry-footer"><span class="cat-links">Posted in <a href="/category/" rel="category tag">{crumb}</a></span> <span class="tags-links">Tagged {tags}</span></footer>
</article>
<nav class="navigation post-navigation" aria-label="Posts"><div class="nav-links">{related}</div></nav>
<div id="comments" class="comments-area"><h3 id="reply-title" class="comment-reply-title">Leave a Reply</h3><form class="comment-form"><p class="comment-notes">Your email address will not be published. Required fields are marked *</p><label for="comment">Comment *</label><textarea name="comment"></textarea><input type="submit" value="Post Comment"></form></div>
</main>
<aside id="secondary" class="widget-area">{side}</aside>
<footer id="colophon" class="site-footer"><div class="site-info">{footer}</div></footer>
</div>
{cookie}
</body>
</html>
)",
     "", "", "/{year}/{slug}/"},
    // An encyclopedia
    {R"(<!DOCTYPE html>
<html class="client-nojs" lang="{lang}" dir="ltr">
<head>
<meta charset="{charset}"/>
<title>{title} - {site}</title>
<script>{script}</script>
<style>{style}</style>
<link rel="canonical" href="{url}"/>
</head>
<body class="mediawiki ltr sitedir-ltr ns-0 ns-subject skin-vector action-view">
<div id="mw-page-base" class="noprint"></div>
<div id="content" class="mw-body" role="main">
<div id="siteNotice" class="noprint">{teaser}</div>
<div id="bodyContent" class="mw-body-content">
<div id="siteSub" class="noprint">From {site}</div>
<div id="mw-content-text" class="mw-content-ltr" lang="{lang}"><div class="mw-parser-output">
{text}
</div></div>
<div class="printfooter">Retrieved from "<a href="{url}">{url}</a>"</div>
<div id="catlinks" class="catlinks"><a href="/wiki/Special:Categories">Categories</a>: <ul><li><a href="/wiki/Category">{crumb}</a></li>{tags}</ul></div>
</div></div>
<div id="mw-navigation"><h2>Navigation menu</h2>
<div id="p-personal" class="vector-menu"><ul><li><a href="/login">Log in</a></li><li><a href="/create">Create account</a></li></ul></div>
<div id="mw-panel"><div id="p-logo"></div><nav class="mw-portlet portal"><h3>Navigation</h3><ul>{menu}</ul></nav>
<nav class="mw-portlet portal"><h3>Tools</h3><ul><li><a>What links here</a></li><li><a>Related changes</a></li><li><a>Permanent link</a></li><li><a>Page information</a></li></ul></nav></div></div>
<footer id="footer" class="mw-footer"><ul id="footer-info"><li>This page was last edited on {date}.</li><li>{footer}</li></ul></footer>
{cookie}
</body>
</html>
)",
     "", "", "/wiki/{slug}"},
    // A forum
    {R"(<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="{charset}">
<title>{title} | {site}</title>
<style>{style}</style>
<script>{script}</script>
</head>
<body id="phpbb" class="nojs notouch section-viewtopic ltr">
<div id="wrap" class="wrap">
<div id="page-header"><div class="headerbar" role="banner"><a id="logo" class="logo" href="/">{site}</a><p class="skiplink"><a href="#start_here">Skip to content</a></p></div>
<div class="navbar" role="navigation"><ul id="nav-main" class="nav-main linklist">{menu}</ul><ul id="nav-breadcrumbs"><li class="breadcrumbs"><a href="/">Board index</a> &rsaquo; <a href="/f">{crumb}</a></li></ul></div></div>
<div id="page-body" class="page-body" role="main">
<h2 class="topic-title"><a href="{url}">{title}</a></h2>
<div class="action-bar bar-top"><a class="button" href="/reply">Post Reply</a> <div class="pagination">1 post &bull; Page <strong>1</strong> of <strong>1</strong></div></div>
{text}
<div class="action-bar bar-bottom"><a class="button" href="/reply">Post Reply</a> <a href="/f" class="jumpbox-return">Return to &ldquo;{crumb}&rdquo;</a></div>
<div class="stat-block online-list"><h3>Who is online</h3><p>Users browsing this forum: no registered users and 3 guests</p></div>
</div>
<aside class="similar-topics"><h3>Similar topics</h3>{related}</aside>
<div id="page-footer" class="page-footer" role="contentinfo">{footer}</div>
</div>
{cookie}
</body>
</html>
)",
     "<div class=\"post has-profile bg1\"><div class=\"inner\"><dl class=\"postprofile\"><dt><a "
     "class=\"username\" href=\"/u\">{author}</a></dt><dd class=\"profile-posts\"><strong>Posts:"
     "</strong> {number}</dd></dl><div class=\"postbody\"><p class=\"author\">Post by <strong>"
     "{author}</strong> &raquo; {date}</p><div class=\"content\">",
     "</div></div></div></div>\n", "/viewtopic.php?t={number}"},
    // A newspaper
    {R"(<!doctype html>
<html lang="{lang}" class="no-js">
<head>
<meta charset="{charset}">
<title>{title} | {site}</title>
<meta property="og:type" content="article">
<meta property="og:site_name" content="{site}">
<script type="application/ld+json">{"@context":"https://schema.org","@type":"NewsArticle","headline":"{title}","datePublished":"{date}","author":{"@type":"Person","name":"{author}"}}</script>
<script async>{script}</script>
<style>{style}</style>
</head>
<body class="article-page">
<div class="ad-slot ad-slot--top" data-ad="leaderboard"><span class="ad-label">Advertisement</span></div>
<header class="masthead"><a class="masthead__logo" href="/">{site}</a><button class="masthead__menu" aria-label="Open menu">Menu</button><nav class="masthead__nav" aria-label="Sections"><ul>{menu}</ul></nav></header>
<main class="article-layout">
<article class="article" itemscope itemtype="https://schema.org/NewsArticle">
<div class="article__head"><p class="article__kicker">{crumb}</p><p class="article__byline">By <a rel="author" href="/by">{author}</a></p><time datetime="{date}">{date}</time>
<ul class="share-tools"><li><a href="#">Share on Facebook</a></li><li><a href="#">Tweet</a></li><li><button>Copy link</button></li></ul></div>
<div class="article__body" itemprop="articleBody">
{text}
</div>
</article>
<section class="newsletter-signup"><h3>Sign up to our newsletter</h3><p>Get the stories of the day in your inbox every morning.</p><form><input type="email" placeholder="Your email"><button type="submit">Subscribe</button></form></section>
<aside class="related-stories"><h2>Related stories</h2>{related}</aside>
<aside class="most-read"><h2>Most read</h2>{side}</aside>
</main>
<footer class="site-footer">{footer}</footer>
{cookie}
</body>
</html>
)",
     "", "", "/news/{slug}.html"},
    // A school
    {R"(<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="{charset}">
<title>{site}: {title}</title>
<style>{style}</style>
<script>{script}</script>
</head>
<body>
<div class="wrapper">
<div class="header"><div class="logo"><a href="/">{site}</a></div><div class="nav"><ul class="menu">{menu}</ul></div></div>
<div class="breadcrumb"><a href="/">Home</a> / <a href="/c">{crumb}</a></div>
<div class="container"><div class="row">
<div class="content col-md-9">
<div class="worksheet"><div class="worksheet-body">
{text}
</div></div>
<div class="buttons"><a class="btn" href="#">Print this page</a> <a class="btn" href="#">Download PDF</a></div>
</div>
<aside class="sidebar col-md-3"><div class="widget"><h4>More worksheets</h4>{related}</div><div class="widget"><h4>Subjects</h4>{side}</div></aside>
</div></div>
<div class="footer"><p>{footer}</p></div>
</div>
{cookie}
</body>
</html>
)",
     "", "", "/worksheets/{slug}"},
    // A manual
    {R"(<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="{charset}">
<title>{title} &mdash; {site} documentation</title>
<style>{style}</style>
<script defer>{script}</script>
</head>
<body class="wy-body-for-nav">
<div class="wy-grid-for-nav">
<nav data-toggle="wy-nav-shift" class="wy-nav-side"><div class="wy-side-scroll"><div class="wy-side-nav-search"><a href="/" class="icon icon-home">{site}</a><form role="search"><input type="text" name="q" placeholder="Search docs"></form></div><div class="wy-menu wy-menu-vertical"><p class="caption">Contents</p><ul>{menu}</ul></div></div></nav>
<section class="wy-nav-content-wrap"><div class="wy-nav-content"><div class="rst-content">
<div role="navigation" aria-label="Page navigation"><ul class="wy-breadcrumbs"><li><a href="/">Docs</a> &raquo;</li><li>{crumb}</li><li class="wy-breadcrumbs-aside"><a href="#">View page source</a></li></ul><hr></div>
<div role="main" class="document"><div class="section" itemprop="articleBody">
{text}
</div></div>
<footer><div class="rst-footer-buttons" role="navigation"><a class="btn btn-neutral float-right" rel="next">Next</a> <a class="btn btn-neutral" rel="prev">Previous</a></div><hr><div role="contentinfo"><p>{footer}</p></div></footer>
</div></div></section>
</div>
{cookie}
</body>
</html>
)",
     "", "", "/docs/{slug}.html"},
    // A home page of the old kind
    {R"(<html>
<head>
<title>{title}</title>
<meta http-equiv="Content-Type" content="text/html; charset={charset}">
<style type="text/css">{style}</style>
</head>
<body bgcolor="#FFFFFF" link="#0000CC">
<table width="760" border="0" cellpadding="4" align="center">
<tr><td colspan="2" bgcolor="#CCDDEE"><div id="header"><font size="5"><b><a href="/">{site}</a></b></font></div></td></tr>
<tr><td width="150" valign="top" bgcolor="#EEEEEE"><div id="menu"><font size="2"><ul>{menu}</ul></font></div></td>
<td width="610" valign="top" id="content">
{text}
<hr>
<font size="1"><a href="/">Home</a> | <a href="/guestbook">Guestbook</a> | <a href="#top">Top</a></font>
</td></tr>
<tr><td colspan="2" align="center"><div id="footer"><font size="1">{footer} You are visitor number {number}.</font></div></td></tr>
</table>
{cookie}
</body>
</html>
)",
     "", "", "/~home/{slug}.htm"},
    // A magazine
    {R"(<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="{charset}">
<title>{title} - {site}</title>
<meta name="description" content="{title}, by {author}, in {site}.">
<style>{style}</style>
</head>
<body class="single">
<div class="top-bar"><span class="top-bar__date">{date}</span><a class="top-bar__login" href="/login">Log in</a><a class="top-bar__subscribe" href="/subscribe">Subscribe</a></div>
<header class="header"><div class="header__logo"><a href="/">{site}</a></div><nav class="header__nav"><ul>{menu}</ul></nav></header>
<div class="page-wrap">
<main>
<section class="story">
<div class="story__meta"><a href="/author">{author}</a> &middot; <span>3 min read</span></div>
<div class="story__content prose">
{text}
</div>
<div class="story__tags">{tags}</div>
<div class="author-box"><h4>About the author</h4><p>{author} writes for {site}.</p></div>
</section>
</main>
<section class="read-next"><h3>Read next</h3><div class="cards">{related}</div></section>
</div>
<footer class="footer"><div class="footer__links">{side}</div><p class="footer__copy">{footer}</p></footer>
<script>{script}</script>
{cookie}
</body>
</html>
)",
     "", "", "/stories/{slug}"},
    // A shop's journal
    {R"(<!doctype html>
<html lang="{lang}">
<head>
<meta charset="{charset}">
<title>{title} &ndash; {site}</title>
<link rel="canonical" href="{url}">
<script>{script}</script>
<style>{style}</style>
</head>
<body class="template-article">
<div id="shopify-section-announcement-bar" class="announcement-bar"><p>Free shipping on orders over $50</p></div>
<header class="site-header" role="banner"><a class="site-header__logo" href="/">{site}</a><nav role="navigation"><ul class="site-nav">{menu}</ul></nav><a class="site-header__cart" href="/cart">Cart (0)</a></header>
<main class="main-content" id="MainContent" role="main">
<article class="article">
<div class="article__meta"><span>{date}</span></div>
<div class="rte">
{text}
</div>
</article>
<div class="product-recommendations"><h3>You may also like</h3>{related}</div>
</main>
<footer class="site-footer" role="contentinfo"><div class="newsletter"><p>Subscribe to our newsletter</p><input type="email" placeholder="email"><button>Subscribe</button></div><ul class="footer-links">{side}</ul><small>{footer}</small></footer>
{cookie}
</body>
</html>
)",
     "", "", "/blogs/journal/{slug}"},
};

struct Site {
  std::string name, host;
  size_t layout = 0;
  std::map<std::string, std::string> parts;  // what its pages have in common
};

const Words kSiteFirst = {"Brass",   "Quiet",  "Amber",  "North",  "Little",
                          "Harbour", "Copper", "Willow", "Garden", "Paper",
                          "Morning", "Stone",  "River",  "Maple",  "Lantern"};
const Words kSiteLast = {"Kettle", "Gazette", "Notebook", "Corner", "Journal",
                         "School", "Lamp",    "Wheel",    "Board",  "Almanac",
                         "Post",   "Society", "Library",  "Club",   "Review"};
const Words kMenu = {"Home",    "About",  "Contact", "News",     "Archive", "Events",
                     "Gallery", "Shop",   "Stories", "Subjects", "Members", "Search",
                     "Help",    "Places", "People",  "Blog"};
const Words kSideItems = {"Recent posts",
                          "Weather in the harbour",
                          "Photos of the fair",
                          "The new bridge",
                          "A day at the mill",
                          "Meet the team",
                          "Opening hours",
                          "How to find us",
                          "The winter market",
                          "School holidays",
                          "Our garden",
                          "Letters to the editor",
                          "Old maps",
                          "Jobs",
                          "Press",
                          "Gift cards"};
const Words kCrumbs = {"General", "Homework", "Village life", "Reading",
                       "Puzzles", "Local",    "Learning"};
const Words kTitles = {"{n} and {m} in {t}",  "Notes of {d}",          "From {t}, page {k}",
                       "Sheet {k} for {d}",   "What {n} wrote on {d}", "Of {f} and {b}s",
                       "Exercises, part {k}", "The {s} of {t}",        "Questions of {n}",
                       "The {c} {o}",         "{d} with {n}",          "Lesson {k}: the {o}"};
const Words kCookieBanners = {
    "We use cookies to make this site work and to see how it is used. By going on you accept our "
    "cookie policy.",
    "This website uses cookies to improve your experience. See our privacy policy.",
    "We and our partners use cookies and similar technologies. You can change your choice at any "
    "time in the privacy settings."};
const Words kFooters = {"&copy; 2026 {site}. All rights reserved.",
                        "&copy; 2019-2026 {site} &middot; <a href=\"/privacy\">Privacy policy</a> "
                        "&middot; <a href=\"/terms\">Terms of use</a>",
                        "{site} is made with care. <a href=\"/imprint\">Imprint</a> | <a "
                        "href=\"/contact\">Contact us</a>"};

std::string escape_text(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else
      out += c;
  }
  return out;
}

// {key} by its value; what has no value stays.
std::string fill_parts(std::string_view pattern, const std::map<std::string, std::string>& values) {
  std::string out;
  for (size_t i = 0; i < pattern.size();) {
    const size_t open = std::min(pattern.find('{', i), pattern.size());
    out += pattern.substr(i, open - i);
    if (open == pattern.size()) break;
    const size_t close = pattern.find('}', open);
    const auto value = close == pattern.npos
                           ? values.end()
                           : values.find(std::string(pattern.substr(open + 1, close - open - 1)));
    if (value == values.end()) {
      out += '{';
      i = open + 1;
    } else {
      out += value->second;
      i = close + 1;
    }
  }
  return out;
}

std::string links(Rng& rng, const Words& from, int count, const char* before, const char* after) {
  Words names = from;
  shuffle(rng, names);
  std::string out;
  for (int i = 0; i < count && i < int(names.size()); i++)
    out += before + ("<a href=\"/" + std::to_string(rng.below(900) + 100) + "\">") +
           names[size_t(i)] + "</a>" + after;
  return out;
}

std::string make_style(Rng& rng) {
  std::string out;
  for (int i = between(rng, 2, 7); i > 0; i--)
    out += format(".c%d{margin:%dpx %dpx;padding:%dpx;color:#%06x}", between(rng, 1, 999),
                  between(rng, 0, 40), between(rng, 0, 40), between(rng, 0, 20),
                  unsigned(rng.below(1 << 24)));
  return out;
}
std::string make_script(Rng& rng) {
  return format(
      "window.dataLayer=window.dataLayer||[];function track(){dataLayer.push(arguments)}"
      "track('js',new Date());track('config','UA-%d');(function(d){var s=d.createElement('script');"
      "s.async=1;s.src='/static/%08x.js';d.head.appendChild(s)})(document);if(1<2&&3>2){var "
      "state={\"user\":null,\"page\":%d,\"html\":\"<p>not a paragraph</p>\"}}",
      between(rng, 1000, 99999), unsigned(rng.below(1u << 31)), between(rng, 1, 9999));
}

std::vector<Site> make_sites(Rng& rng) {
  std::vector<std::string> names;
  for (const std::string& first : kSiteFirst)
    for (const std::string& last : kSiteLast) names.push_back("The " + first + " " + last);
  shuffle(rng, names);
  std::vector<Site> sites;
  for (size_t i = 0; i < 4 * kLayouts.size(); i++) {
    Site site{names[i], names[i].substr(4), i % kLayouts.size(), {}};
    for (char& c : site.host) c = c == ' ' ? '-' : char(std::tolower((unsigned char)c));
    site.host = (chance(rng, .5) ? "www." : "") + site.host + ".example";
    site.parts = {
        {"site", site.name},
        {"host", site.host},
        {"menu", links(rng, kMenu, between(rng, 5, 9), "<li>", "</li>")},
        {"side", "<ul>" + links(rng, kSideItems, between(rng, 4, 8), "<li>", "</li>") + "</ul>"},
        {"footer", fill_parts(pick(rng, kFooters), {{"site", site.name}})},
        {"style", make_style(rng)},
        {"script", make_script(rng)},
        {"teaser", ""},
        {"cookie", ""}};
    if (chance(rng, .6))
      site.parts["cookie"] =
          "<div id=\"cookie-consent\" class=\"cookie-banner\" role=\"dialog\"><p>" +
          pick(rng, kCookieBanners) +
          "</p><button>Accept all</button><button>Reject</button></div>";
    sites.push_back(std::move(site));
  }
  return sites;
}

// ---------------------------------------------------------------------------------------------
// A page: documents within a layout

// The lines of a document as HTML: each a paragraph, or divided by breaks, or preformatted. Lines
// that are repeated stay within one element, since an extractor may drop an element that it has
// seen; so do lines of numbers, which look like no text where they stand alone.
std::string document_html(Rng& rng, const std::string& text) {
  Words lines;
  bool plain = true;  // no line of numbers
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    const auto letters = std::count_if(
        line.begin(), line.end(), [](unsigned char c) { return std::isalpha(c) || c >= 0x80; });
    plain &= 2 * size_t(letters) > line.size();
    lines.push_back(escape_text(line));
  }
  const bool repeats = std::set<std::string>(lines.begin(), lines.end()).size() < lines.size();
  const double u = rng.uniform();
  std::string out;
  if (u < .25 && plain && !repeats) {
    for (const std::string& line : lines) out += "<p>" + line + "</p>\n";
    return out;
  }
  const bool pre = u < .32 && lines.size() > 3, div = u < .4;
  const char* between_lines = pre ? "\n" : u < .7 ? "<br>\n" : "<br />";
  for (const std::string& line : lines) out += (out.empty() ? "" : between_lines) + line;
  return pre   ? "<pre>" + out + "</pre>\n"
         : div ? "<div>" + out + "</div>\n"
               : "<p>" + out + "</p>\n";
}

struct PageBody {
  std::string title, lang = "en", charset = "utf-8";
  Words documents;
  int64_t number = 0;  // of the page, in its address
};

std::string make_title(Rng& rng) {
  Dealer dealer(rng);
  Slots slots;
  const std::string& pattern = pick(rng, kTitles);
  dealer.deal(pattern, slots);
  return fill(pattern, slots);
}

std::string make_date(Rng& rng) {
  static const Words kMonths = {"January",   "February", "March",    "April",
                                "May",       "June",     "July",     "August",
                                "September", "October",  "November", "December"};
  return pick(rng, kMonths) + format(" %d, %d", between(rng, 1, 28), between(rng, 2009, 2026));
}

// Returns the HTML; sets the address.
std::string render(Rng& rng, const Site& site, const PageBody& body, std::string& url) {
  const Layout& layout = kLayouts[site.layout];
  std::map<std::string, std::string> values = site.parts;
  std::string slug;
  for (const char c : body.title)
    if (std::isalnum((unsigned char)c))
      slug += char(std::tolower((unsigned char)c));
    else if (!slug.empty() && slug.back() != '-')
      slug += '-';
  const std::string number = std::to_string(body.number);
  values["slug"] = slug + "-" + number, values["number"] = number;
  values["year"] = format("%d/%02d", between(rng, 2009, 2026), between(rng, 1, 12));
  url = "https://" + site.host + fill_parts(layout.path, values);
  values["url"] = escape_text(url), values["title"] = escape_text(body.title);
  values["author"] = pick(rng, kFirstNames) + " " + pick(rng, kLastNames);
  values["date"] = make_date(rng), values["crumb"] = pick(rng, kCrumbs);
  values["lang"] = body.lang, values["charset"] = body.charset;
  Words titles;
  for (int i = 0; i < 5; i++) titles.push_back(make_title(rng));
  values["related"] = "<ul>" + links(rng, titles, between(rng, 2, 5), "<li>", "</li>") + "</ul>";
  values["tags"] = links(rng, kCrumbs, between(rng, 1, 3), "", " ");
  std::string text;
  for (const std::string& document : body.documents) {
    values["author"] = pick(rng, kFirstNames) + " " + pick(rng, kLastNames);
    text += fill_parts(layout.before, values) + document_html(rng, document) + layout.after;
  }
  values["text"] = text;
  return fill_parts(layout.page, values);
}

// ---------------------------------------------------------------------------------------------
// Dirt: pages in other languages

struct Language {
  const char* code;
  Words subjects, actions, objects, places, times, menu;
};
const std::vector<Language> kLanguages = {
    {"es",
     {"El vecino", "Mi hermana", "La profesora", "Un pescador", "El alcalde", "Nuestra abuela"},
     {"compra", "busca", "vende", "encontró", "olvidó", "regala", "quiere llevar", "ha visto"},
     {"una bicicleta roja", "el pan de la mañana", "dos libros viejos", "las llaves de la casa",
      "un queso muy bueno", "las flores del jardín", "el mapa de la ciudad"},
     {"en la plaza", "cerca del río", "junto a la estación", "en el mercado",
      "detrás de la iglesia"},
     {"todos los lunes", "desde hace muchos años", "cuando llueve", "antes de la cena",
      "porque hoy es fiesta"},
     {"Inicio", "Noticias", "Contacto", "Quiénes somos", "Buscar"}},
    {"fr",
     {"Le boulanger", "Ma voisine", "Notre professeur", "La vieille dame", "Un marin", "Le maire"},
     {"achète", "cherche", "vend", "a trouvé", "a oublié", "montre", "veut emporter", "garde"},
     {"une lampe cassée", "le pain du matin", "deux livres anciens", "les clés de la maison",
      "un fromage de chèvre", "les fleurs du jardin", "la carte de la ville"},
     {"sur la place", "au bord de la rivière", "près de la gare", "au marché", "derrière l'église"},
     {"tous les lundis", "depuis longtemps", "quand il pleut", "avant le dîner",
      "parce que c'est la fête"},
     {"Accueil", "Actualités", "Contact", "À propos", "Rechercher"}},
    {"de",
     {"Der Bäcker", "Meine Nachbarin", "Unser Lehrer", "Die alte Frau", "Ein Fischer",
      "Der Bürgermeister"},
     {"kauft", "sucht", "verkauft", "findet", "vergisst", "zeigt", "bringt", "braucht"},
     {"eine kaputte Lampe", "das frische Brot", "zwei alte Bücher", "die Schlüssel des Hauses",
      "einen guten Käse", "die Blumen aus dem Garten", "die Karte der Stadt"},
     {"auf dem Markt", "am Fluss", "neben dem Bahnhof", "in der Schule", "hinter der Kirche"},
     {"jeden Montag", "seit vielen Jahren", "wenn es regnet", "vor dem Abendessen",
      "weil heute ein Fest ist"},
     {"Startseite", "Nachrichten", "Kontakt", "Über uns", "Suche"}},
    {"it",
     {"Il fornaio", "La mia vicina", "Il nostro maestro", "Una vecchia signora", "Un pescatore",
      "Il sindaco"},
     {"compra", "cerca", "vende", "ha trovato", "ha dimenticato", "mostra", "vuole portare",
      "conserva"},
     {"una lampada rotta", "il pane del mattino", "due vecchi libri", "le chiavi della casa",
      "un formaggio molto buono", "i fiori del giardino", "la mappa della città"},
     {"in piazza", "vicino al fiume", "accanto alla stazione", "al mercato", "dietro la chiesa"},
     {"ogni lunedì", "da molti anni", "quando piove", "prima di cena", "perché oggi è festa"},
     {"Home", "Notizie", "Contatti", "Chi siamo", "Cerca"}},
    {"pt",
     {"O padeiro", "A minha vizinha", "O nosso professor", "Uma senhora idosa", "Um pescador",
      "O presidente da câmara"},
     {"compra", "procura", "vende", "encontrou", "esqueceu", "mostra", "quer levar", "guarda"},
     {"uma bicicleta vermelha", "o pão da manhã", "dois livros velhos", "as chaves da casa",
      "um queijo muito bom", "as flores do jardim", "o mapa da cidade"},
     {"na praça", "perto do rio", "ao lado da estação", "no mercado", "atrás da igreja"},
     {"todas as segundas", "há muitos anos", "quando chove", "antes do jantar",
      "porque hoje é dia de festa"},
     {"Início", "Notícias", "Contacto", "Sobre nós", "Pesquisar"}},
    {"nl",
     {"De bakker", "Mijn buurvrouw", "Onze leraar", "De oude vrouw", "Een visser",
      "De burgemeester"},
     {"koopt", "zoekt", "verkoopt", "vindt", "vergeet", "toont", "brengt", "bewaart"},
     {"een kapotte lamp", "het verse brood", "twee oude boeken", "de sleutels van het huis",
      "een lekkere kaas", "de bloemen uit de tuin", "de kaart van de stad"},
     {"op het plein", "bij de rivier", "naast het station", "op de markt", "achter de kerk"},
     {"elke maandag", "sinds vele jaren", "wanneer het regent", "voor het avondeten",
      "omdat het vandaag feest is"},
     {"Thuis", "Nieuws", "Contact", "Over ons", "Zoeken"}},
    {"pl",
     {"Piekarz", "Moja sąsiadka", "Nasz nauczyciel", "Stara kobieta", "Rybak", "Burmistrz"},
     {"kupuje", "znalazł", "sprzedaje", "zapomniał zabrać", "pokazuje", "przynosi", "chowa"},
     {"zepsutą lampę", "świeży chleb", "dwie stare książki", "klucze do domu", "bardzo dobry ser",
      "kwiaty z ogrodu", "mapę miasta"},
     {"na rynku", "nad rzeką", "obok dworca", "w szkole", "za kościołem"},
     {"w każdy poniedziałek", "od wielu lat", "kiedy pada deszcz", "przed kolacją",
      "ponieważ dziś jest święto"},
     {"Strona główna", "Aktualności", "Kontakt", "O nas", "Szukaj"}},
    {"ru",
     {"Пекарь", "Моя соседка", "Наш учитель", "Старая женщина", "Рыбак", "Глава города"},
     {"покупает", "ищет", "продаёт", "находит", "забывает", "показывает", "приносит"},
     {"сломанную лампу", "свежий хлеб", "две старые книги", "ключи от дома", "очень хороший сыр",
      "цветы из сада", "карту города"},
     {"на площади", "у реки", "рядом с вокзалом", "в школе", "за церковью"},
     {"каждый понедельник", "уже много лет", "когда идёт дождь", "перед ужином",
      "потому что сегодня праздник"},
     {"Главная", "Новости", "Контакты", "О нас", "Поиск"}},
};

std::string foreign_text(Rng& rng, const Language& language, int sentences) {
  std::string text;
  for (int i = 0; i < sentences; i++) {
    text += (i == 0       ? ""
             : i % 5 == 0 ? "\n"
                          : " ") +
            pick(rng, language.subjects) + " " + pick(rng, language.actions) + " " +
            pick(rng, language.objects);
    if (chance(rng, .7)) text += " " + pick(rng, language.places);
    if (chance(rng, .6)) text += ", " + pick(rng, language.times);
    text += ".";
  }
  return text;
}

// ---------------------------------------------------------------------------------------------
// Dirt: spam

const Words kBait = {"cheap watches",  "free ringtones",  "online casino",  "best loans",
                     "miracle diet",   "luxury handbags", "lottery winner", "discount pills",
                     "instant credit", "hot deals",       "crypto signals", "replica shoes"};
const Words kBaitWords = {"buy",      "online", "sale", "best price", "free delivery", "click now",
                          "discount", "top",    "new",  "2026",       "original",      "bonus"};
const Words kBaitLines = {"Click here to claim your exclusive bonus today!!!",
                          "Order now and save more than ninety percent!",
                          "You will not believe what this simple trick can do for you!",
                          "Thousands of happy winners have already joined, so join today!"};

std::string spam_text(Rng& rng) {
  const std::string& bait = pick(rng, kBait);
  std::string text;
  switch (rng.below(3)) {
    case 0: {  // the same words again and again
      for (int i = between(rng, 60, 150); i > 0; i--)
        text += (text.empty() ? "" : " ") + (chance(rng, .45) ? bait : pick(rng, kBaitWords));
      return text + ".";
    }
    case 1: {  // the same line again and again
      const std::string line =
          pick(rng, kBaitLines) + " " + bait + " " + pick(rng, kBaitWords) + ".";
      for (int i = between(rng, 8, 30); i > 0; i--) text += (text.empty() ? "" : "\n") + line;
      return text;
    }
    default: {  // a row of half sentences that end in dots
      for (int i = between(rng, 20, 40); i > 0; i--)
        text += (text.empty() ? "" : "\n") + pick(rng, kBaitWords) + " " + pick(rng, kBait) + " " +
                pick(rng, kBaitWords) + " in " + pick(rng, kTowns) + " ...";
      return text;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Dirt: pages that hold links or a question of consent, and nothing else

std::string navigation_html(Rng& rng) {
  Words titles;
  for (int i = between(rng, 8, 40); i > 0; i--) titles.push_back(make_title(rng));
  switch (rng.below(4)) {
    case 0:
      return "<ul class=\"archive-list\">" + links(rng, titles, 40, "<li>", "</li>\n") + "</ul>";
    case 1:
      return "<div class=\"tag-cloud\">" + links(rng, titles, 40, "<span>", "</span> ") + "</div>";
    case 2:
      return "<p>The page you are looking for was not found.</p><ul>" +
             links(rng, kMenu, 8, "<li>", "</li>") + "</ul>";
    default: {
      std::string out = "<div class=\"post-list\">";
      for (const std::string& title : titles)
        out += "<div class=\"card\"><a href=\"/p\">" + title + "</a><span class=\"date\">" +
               make_date(rng) +
               "</span><a class=\"more\">Read more"
               "</a></div>\n";
      return out + "</div><div class=\"pagination\"><a>1</a> <a>2</a> <a>Next</a></div>";
    }
  }
}

std::string consent_html(Rng& rng) {
  std::string out = "<div class=\"consent-wall\" role=\"dialog\"><h2>Before you continue</h2>";
  Words sentences = kCookieBanners;
  sentences.push_back(
      "Some of our " + std::to_string(between(rng, 20, 900)) +
      " partners use cookies on the ground of legitimate interest, as their privacy policy says.");
  sentences.push_back("Read our cookie policy to learn how this site uses cookies.");
  sentences.push_back("To go on, accept the terms of use and the privacy policy.");
  shuffle(rng, sentences);
  for (const std::string& sentence : sentences) out += "<p>" + sentence + "</p>";
  return out + "<button>Accept all</button><button>Manage options</button></div>";
}

// ---------------------------------------------------------------------------------------------
// Copies

// The 5-grams of words that MinHash compares (FineWeb's normalisation: lower case, numbers as 0,
// punctuation as a space).
std::set<uint64_t> word_5_grams(std::string_view text) {
  std::vector<uint64_t> words;
  for (size_t i = 0, end; i < text.size(); i = end) {
    end = i + 1;
    std::string word;
    if (std::isdigit((unsigned char)text[i])) {
      while (end < text.size() && std::isdigit((unsigned char)text[end])) end++;
      word = "0";
    } else if (std::isalpha((unsigned char)text[i]) || (text[i] & 0x80)) {
      while (end < text.size() && (std::isalpha((unsigned char)text[end]) || (text[end] & 0x80)))
        end++;
      for (size_t j = i; j < end; j++) word += char(std::tolower((unsigned char)text[j]));
    }
    if (!word.empty()) words.push_back(hash64(word));
  }
  std::set<uint64_t> grams;
  for (size_t i = 0; i + 5 <= words.size(); i++) {
    uint64_t gram = 0;
    for (size_t j = i; j < i + 5; j++) gram = mix64(gram, words[j]);
    grams.insert(gram);
  }
  return grams;
}

double jaccard(const std::set<uint64_t>& a, const std::set<uint64_t>& b) {
  size_t both = 0;
  for (const uint64_t gram : a) both += b.count(gram);
  return a.empty() && b.empty() ? 1 : double(both) / double(a.size() + b.size() - both);
}

constexpr double kNearest = .9;  // 5-grams that a near-duplicate shares: MinHash finds 99.96 %

// One or two words replaced, or a sentence added; empty where that changes too much.
std::string near_copy(Rng& rng, const std::string& text) {
  static const Words kAdded = {"Thanks for reading.", "More next week.",
                               "Seen elsewhere and worth it."};
  const std::set<uint64_t> grams = word_5_grams(text);
  for (int attempt = 0; attempt < 8; attempt++) {
    std::string copy = text;
    if (chance(rng, .3)) {
      copy += "\n" + pick(rng, kAdded);
    } else {
      for (int changes = between(rng, 1, 2); changes > 0; changes--) {
        const Words* stocks[] = {&kFirstNames, &kTowns, &kColours, &kFoods, &kPlaces};
        const Words& stock = *stocks[rng.below(5)];
        const std::string& old = pick(rng, stock);
        const size_t found = copy.find(" " + old);
        if (found != copy.npos) copy.replace(found + 1, old.size(), pick(rng, stock));
      }
    }
    if (copy != text && jaccard(grams, word_5_grams(copy)) >= kNearest) return copy;
  }
  return "";
}

// ---------------------------------------------------------------------------------------------
// Addresses of people, and other encodings

// A sentence with an address, and the sentence that is to be kept.
std::pair<std::string, std::string> make_address(Rng& rng) {
  if (chance(rng, .65)) {
    std::string name = pick(rng, kFirstNames) + "." + pick(rng, kLastNames);
    for (char& c : name) c = char(std::tolower((unsigned char)c));
    std::string town = pick(rng, kTowns);
    for (char& c : town) c = char(std::tolower((unsigned char)c));
    const std::string pattern =
        pick(rng, Words{"Write to {x} for more.", "Questions? Mail {x} today.",
                        "The teacher reads {x} every day."});
    const size_t open = pattern.find("{x}");
    const auto with = [&](const std::string& address) {
      return pattern.substr(0, open) + address + pattern.substr(open + 3);
    };
    return {with(name + "@" + town + ".example"), with("email@example.com")};
  }
  static const std::vector<int> kFirst = {23, 45, 62, 81, 93, 109, 146, 185};
  const std::string address = format("%d.%d.%d.%d", pick(rng, kFirst), between(rng, 1, 254),
                                     between(rng, 1, 254), between(rng, 1, 254));
  const std::string sentence = "The old server of the school was at ";
  return {sentence + address + " until May.", sentence + "22.214.171.124 until May."};
}

const Words kAccented = {"Zoë and René met at the café in the old façade.",
                         "“Good day,” said the señor – it was a cliché.",
                         "The naïve fiancé paid 20 £ for crème brûlée.",
                         "A piñata, a jalapeño and a soufflé were on the menu’s last page."};

// UTF-8 as windows-1252, for the characters of kAccented and of the layouts.
std::string to_windows_1252(std::string_view text) {
  static const std::vector<std::pair<std::string_view, char>> kHigh = {
      {"‘", '\x91'}, {"’", '\x92'}, {"“", '\x93'}, {"”", '\x94'}, {"–", '\x96'}, {"—", '\x97'}};
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    const unsigned char c = (unsigned char)text[i];
    if (c < 0x80) {
      out += char(c);
    } else if (c == 0xc2 || c == 0xc3) {
      out += char((c & 3) << 6 | (text[++i] & 0x3f));
    } else {
      const auto it = std::find_if(kHigh.begin(), kHigh.end(), [&](const auto& pair) {
        return text.substr(i).starts_with(pair.first);
      });
      if (it == kHigh.end()) fail("dev/world_pages.h: found a character that windows-1252 lacks");
      out += it->second;
      i += it->first.size() - 1;
    }
  }
  return out;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// All pages of a world, in the order of a crawl

std::vector<WebPage> make_web_pages(const World& world, const std::vector<Document>& documents) {
  Rng rng{mix64(world.options.seed, hash64("pages"))};
  const std::vector<Site> sites = make_sites(rng);
  std::vector<WebPage> pages;
  std::vector<double> order;                                          // of a page in the crawl
  const auto site_but = [&](const std::string& url) -> const Site& {  // another than the url's
    for (;;) {
      const Site& site = pick(rng, sites);
      if (url.find("//" + site.host + "/") == url.npos) return site;
    }
  };
  int64_t number = 1000;
  const auto add = [&](const Site& site, PageBody body, WebPage page, double after) {
    body.number = number += between(rng, 1, 99);
    page.html = render(rng, site, body, page.url);
    page.chunked = site.layout == 3;
    pages.push_back(std::move(page));
    order.push_back(after + (1 - after) * rng.uniform());
  };
  // Every document once; some of the pages with an address of somebody, or in another encoding.
  for (Bundle& of : bundle(documents)) {
    shuffle(rng, of);
    PageBody body{make_title(rng), "en", "utf-8", {}};
    bool together = false;  // documents that are numbers are no text for themselves
    for (const int i : of) {
      const Document& document = documents[size_t(i)];
      together |= document.kind == "sums" || document.kind == "comparing";
      if (!body.documents.empty() && together) {
        body.documents.back() += "\n" + document.text;
      } else {
        body.documents.push_back(document.text);
      }
    }
    Words kept = body.documents;
    WebPage page{.kind = "clean"};
    const double u = rng.uniform();
    if (u < .03) {
      page.kind = "address";
      const auto [written, expected] = make_address(rng);
      body.documents.back() += "\n" + written, kept.back() += "\n" + expected;
    } else if (u < .055) {
      page.kind = "encoding";
      const std::string& line = pick(rng, kAccented);
      body.documents.back() += "\n" + line, kept.back() += "\n" + line;
      if (u < .05) body.charset = "windows-1252";
    } else if (u < .06) {
      page.kind = "broken bytes";  // no UTF-8, in a page that says it is
      body.documents.back() += "\nThe old café\xff – the one with the piñata – is open again.";
      kept.back() += "\nThe old café\xef\xbf\xbd – the one with the piñata – is open again.";
    }
    for (const std::string& text : kept) page.text += (page.text.empty() ? "" : "\n") + text;
    add(pick(rng, sites), body, std::move(page), 0);
    WebPage& added = pages.back();
    if (body.charset != "utf-8") {
      added.html = to_windows_1252(added.html);
      if (u < .04) {  // in the HTTP header alone, or nowhere
        const size_t found = added.html.find("windows-1252");
        added.html.replace(found, std::string_view("windows-1252").size(), "");
        if (u < .035) added.charset = "windows-1252";
      }
    } else {
      added.charset = chance(rng, .7) ? "utf-8" : "";
    }
  }
  const size_t originals = pages.size();
  const auto times = [&](double share, auto make) {
    for (size_t i = 0; i < size_t(share * double(originals)); i++) make();
  };
  const auto clean_page = [&]() -> size_t {
    for (;;) {
      const size_t i = rng.below(originals);
      if (pages[i].kind == "clean") return i;
    }
  };
  times(.06, [&] {
    const size_t of = clean_page();
    WebPage page{.kind = "mirror", .of = pages[of].url};
    add(site_but(pages[of].url), {make_title(rng), "en", "utf-8", {pages[of].text}}, page,
        order[of]);
  });
  times(.06, [&] {
    std::string text;
    size_t of = 0;
    while (text.empty()) text = near_copy(rng, pages[of = clean_page()].text);
    WebPage page{.kind = "near-duplicate", .of = pages[of].url};
    add(site_but(pages[of].url), {make_title(rng), "en", "utf-8", {text}}, page, order[of]);
  });
  times(.08, [&] {
    const Language& language = pick(rng, kLanguages);
    Site site = pick(rng, sites);
    site.parts["menu"] = links(rng, language.menu, 5, "<li>", "</li>");
    site.parts["side"] = "<ul>" + links(rng, language.menu, 4, "<li>", "</li>") + "</ul>";
    const std::string text = foreign_text(rng, language, between(rng, 10, 25));
    const std::string title = text.substr(0, text.find('.'));
    add(site, {title, language.code, "utf-8", {text}}, {.kind = "language"}, 0);
  });
  times(.06, [&] {
    add(pick(rng, sites), {make_title(rng), "en", "utf-8", {spam_text(rng)}}, {.kind = "spam"}, 0);
  });
  const auto with_body = [&](const char* kind, const std::string& html) {
    add(pick(rng, sites), {make_title(rng), "en", "utf-8", {"@@"}}, {.kind = kind}, 0);
    std::string& page = pages.back().html;
    page.replace(page.find("@@"), 2, html);
  };
  times(.08, [&] { with_body("navigation", navigation_html(rng)); });
  times(.04, [&] { with_body("consent", consent_html(rng)); });

  std::vector<size_t> sorted(pages.size());
  for (size_t i = 0; i < sorted.size(); i++) sorted[i] = i;
  std::sort(sorted.begin(), sorted.end(), [&](size_t a, size_t b) { return order[a] < order[b]; });
  std::vector<WebPage> crawl;
  for (const size_t i : sorted) crawl.push_back(std::move(pages[i]));
  return crawl;
}

namespace {

// ---------------------------------------------------------------------------------------------
// Files: WARC, a gzip member a record, and JSON lines

class GzipMembers {
 public:
  explicit GzipMembers(const std::filesystem::path& path) : file_(path) {
    if (deflateInit2(&stream_, 1, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK)
      fail(path.string(), ": cannot start gzip");
  }
  GzipMembers(const GzipMembers&) = delete;
  GzipMembers& operator=(const GzipMembers&) = delete;
  ~GzipMembers() { deflateEnd(&stream_); }
  void write(std::string_view bytes, double part = 1) {  // part: of the member's bytes
    deflateReset(&stream_);
    out_.resize(deflateBound(&stream_, uLong(bytes.size())));
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
    stream_.avail_in = uInt(bytes.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out_.data());
    stream_.avail_out = uInt(out_.size());
    if (deflate(&stream_, Z_FINISH) != Z_STREAM_END) fail("cannot compress");
    file_.write(out_.data(), size_t(part * double(out_.size() - stream_.avail_out)));
  }
  void commit() { file_.commit(); }

 private:
  AtomicFile file_;
  z_stream stream_{};
  std::string out_;
};

std::string warc_record(const char* type, const std::string& url, const char* content_type,
                        const std::string& block, uint64_t id, size_t lie = 0) {
  return format("WARC/1.0\r\nWARC-Type: %s\r\n", type) +
         (url.empty() ? "" : "WARC-Target-URI: " + url + "\r\n") +
         format(
             "WARC-Date: 2026-03-0%dT%02d:%02d:00Z\r\nWARC-Record-ID: "
             "<urn:uuid:%08x-%04x-4%03x-8%03x-%012llx>\r\nContent-Type: %s\r\nContent-Length: "
             "%zu\r\n\r\n",
             int(1 + id % 9), int(id / 9 % 24), int(id / 216 % 60), unsigned(mix64(id, 1) >> 32),
             unsigned(id & 0xffff), unsigned(mix64(id, 2) & 0xfff), unsigned(mix64(id, 3) & 0xfff),
             (unsigned long long)(mix64(id, 4) & 0xffffffffffff), content_type,
             block.size() + lie) +
         block + "\r\n\r\n";
}

std::string http_response(const WebPage& page) {
  std::string head = "HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Type: text/html" +
                     (page.charset.empty() ? "" : "; charset=" + page.charset) + "\r\n";
  if (!page.chunked)
    return head + format("Content-Length: %zu\r\n\r\n", page.html.size()) + page.html;
  head += "Transfer-Encoding: chunked\r\n\r\n";
  for (size_t i = 0; i < page.html.size(); i += 1500) {
    const std::string part = page.html.substr(i, 1500);
    head += format("%zx\r\n", part.size()) + part + "\r\n";
  }
  return head + "0\r\n\r\n";
}

constexpr size_t kPagesOfAFile = 4000;

// DIR/pages/crawl-00.warc.gz and so on; the last pages as JSON lines in export.jsonl.gz; behind
// them a file that was cut in the middle of a record. DIR/truth.jsonl: what is known of each page.
void write_web(const std::filesystem::path& directory, const std::vector<WebPage>& pages) {
  const std::filesystem::path folder = directory / "pages";
  std::filesystem::create_directories(folder);
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {  // of a larger world
    const std::string name = entry.path().filename().string();
    if (name.starts_with("crawl-") && name.ends_with(".warc.gz")) remove_path(entry.path());
  }
  std::vector<const WebPage*> crawled, exported;  // of the last pages, those that are UTF-8
  for (size_t i = 0; i < pages.size(); i++) {
    const bool utf8 = pages[i].kind != "encoding" && pages[i].kind != "broken bytes";
    (i >= pages.size() / 20 * 19 && utf8 ? exported : crawled).push_back(&pages[i]);
  }
  uint64_t id = 0;
  for (size_t begin = 0, file = 0; begin < crawled.size(); begin += kPagesOfAFile, file++) {
    GzipMembers out(folder / format("crawl-%02zu.warc.gz", file));
    out.write(warc_record("warcinfo", "", "application/warc-fields",
                          "software: a closed world\r\nformat: WARC File Format 1.0\r\n", id++));
    for (size_t i = begin; i < std::min(begin + kPagesOfAFile, crawled.size()); i++) {
      const WebPage& page = *crawled[i];
      if (i % 50 == 0)
        out.write(warc_record("request", page.url, "application/http; msgtype=request",
                              "GET / HTTP/1.1\r\nUser-Agent: cake\r\n\r\n", id++));
      out.write(warc_record("response", page.url, "application/http; msgtype=response",
                            http_response(page), id++));
    }
    out.commit();
  }
  GzipMembers lines(folder / "export.jsonl.gz");
  std::string text;
  for (const WebPage* page : exported)
    text += json_line(OrderedJson{{"url", page->url}, {"html", page->html}});
  lines.write(text);
  lines.commit();
  // What a reader must survive: a length that lies, and an end in the middle of a record.
  GzipMembers cut(folder / "truncated.warc.gz");
  const WebPage broken{.url = "https://broken.example/", .kind = "", .html = "<p>A cut page.</p>"};
  for (const size_t lie : {0, 40, 0})
    cut.write(warc_record("response", broken.url + std::to_string(lie),
                          "application/http; msgtype=response", http_response(broken), id++, lie));
  cut.write(warc_record("response", broken.url + "cut", "application/http; msgtype=response",
                        http_response(broken), id++),
            .5);
  cut.commit();

  AtomicFile truth(directory / "truth.jsonl");
  for (const WebPage& page : pages) {
    OrderedJson line{{"url", page.url}, {"kind", page.kind}};
    if (!page.of.empty()) line["of"] = page.of;
    if (!page.text.empty()) line["text"] = page.text;
    truth.write(line.dump() + "\n");
  }
  truth.commit();
}

// ---------------------------------------------------------------------------------------------
// Scoring: what `corpus clean` made of the pages, against the truth

// Words are runs of letters and digits, in lower case; each counts as often as it occurs.
std::map<std::string, int64_t> bag_of_words(std::string_view text) {
  std::map<std::string, int64_t> words;
  std::string word;
  for (size_t i = 0; i <= text.size(); i++) {
    const unsigned char c = i < text.size() ? (unsigned char)text[i] : ' ';
    if (std::isalnum(c) || c >= 0x80) {
      word += char(std::tolower(c));
    } else if (!word.empty()) {
      words[word]++;
      word.clear();
    }
  }
  return words;
}

}  // namespace

double word_f1(std::string_view found, std::string_view expected) {
  const auto a = bag_of_words(found), b = bag_of_words(expected);
  int64_t both = 0, all = 0;
  for (const auto& [word, count] : a) {
    const auto other = b.find(word);
    if (other != b.end()) both += std::min(count, other->second);
    all += count;
  }
  for (const auto& [word, count] : b) all += count;
  return all == 0 ? 1 : 2 * double(both) / double(all);
}

CorpusScore score_corpus(const std::vector<WebPage>& truth,
                         const std::map<std::string, std::string>& kept) {
  // A copy that is kept in its original's place counts as the original.
  std::map<std::string, std::string> stands_for;  // original -> copy
  for (const WebPage& page : truth)
    if (!page.of.empty() && kept.count(page.url) && !kept.count(page.of))
      stands_for.emplace(page.of, page.url);
  CorpusScore score;
  double f1 = 0;
  for (const WebPage& page : truth) {
    auto row = std::find_if(score.kinds.begin(), score.kinds.end(),
                            [&](const KindScore& k) { return k.kind == page.kind; });
    if (row == score.kinds.end()) row = score.kinds.insert(row, KindScore{page.kind});
    row->pages++;
    const auto text = kept.find(page.url);
    if (page.text.empty()) {  // dirt: found where it is dropped
      const auto original = stands_for.find(page.of);
      const bool stand_in = original != stands_for.end() && original->second == page.url;
      row->to_find++, row->found += text == kept.end() || stand_in;
      continue;
    }
    const std::string line = page.text.substr(page.text.rfind('\n') + 1);
    const bool has_line = text != kept.end() && text->second.find(line) != text->second.npos;
    if (page.kind == "address") row->to_find++, row->found += has_line;
    if (page.kind == "encoding") row->to_read++, row->read += has_line;
    row->to_keep++, row->kept += text != kept.end() || stands_for.count(page.url);
    if (text == kept.end()) continue;
    row->texts++, row->f1 += word_f1(text->second, page.text);
  }
  for (const KindScore& row : score.kinds) {
    score.to_find += row.to_find, score.found += row.found;
    score.to_keep += row.to_keep, score.kept += row.kept;
    score.texts += row.texts, f1 += row.f1;
  }
  score.f1 = score.texts ? f1 / double(score.texts) : 0;
  return score;
}

namespace {

std::vector<WebPage> read_truth(const std::filesystem::path& path) {
  std::vector<WebPage> pages;
  JsonLines lines{Input(path.string())};
  const auto optional = [](simdjson::dom::object object, const char* key) {
    std::string_view text;
    return object.at_key(key).get(text) ? std::string() : std::string(text);
  };
  for (simdjson::dom::object object; lines.next(object);)
    pages.push_back({.url = std::string(lines.get_string(object, "url")),
                     .kind = std::string(lines.get_string(object, "kind")),
                     .of = optional(object, "of"),
                     .text = optional(object, "text")});
  if (pages.empty()) fail(path.string(), ": found an empty file, expected a page a line");
  return pages;
}

OrderedJson share_json(int64_t part, int64_t of) {
  return of ? OrderedJson(double(part) / double(of)) : OrderedJson();
}

// Prints the table; writes the same as JSON.
void score_corpus_files(const std::filesystem::path& world, const std::filesystem::path& corpus,
                        const std::string& out) {
  const std::vector<WebPage> truth = read_truth(world / "truth.jsonl");
  std::map<std::string, std::string> kept;
  JsonLines lines{Input((corpus / "documents.jsonl.zst").string())};
  for (simdjson::dom::object object; lines.next(object);)
    kept.emplace(lines.get_string(object, "url"), lines.get_string(object, "text"));
  const CorpusScore score = score_corpus(truth, kept);

  std::printf("%-16s %8s %10s %10s %10s %9s\n", "pages", "number", "found", "kept", "read",
              "word F1");
  OrderedJson kinds = OrderedJson::array();
  const auto percent = [](int64_t part, int64_t of) {
    return of ? format("%.2f %%", 100 * double(part) / double(of)) : std::string("-");
  };
  const auto print = [&](const std::string& name, const KindScore& row) {
    std::printf("%-16s %8lld %10s %10s %10s %9s\n", name.c_str(), (long long)row.pages,
                percent(row.found, row.to_find).c_str(), percent(row.kept, row.to_keep).c_str(),
                percent(row.read, row.to_read).c_str(),
                row.texts ? format("%.4f", row.f1 / double(row.texts)).c_str() : "-");
  };
  for (const KindScore& row : score.kinds) {
    print(row.kind, row);
    kinds.push_back({{"kind", row.kind},
                     {"pages", row.pages},
                     {"found", share_json(row.found, row.to_find)},
                     {"kept", share_json(row.kept, row.to_keep)},
                     {"read", share_json(row.read, row.to_read)},
                     {"f1", row.texts ? OrderedJson(row.f1 / double(row.texts)) : OrderedJson()}});
  }
  print("all", {"", int64_t(truth.size()), score.to_find, score.found, score.to_keep, score.kept, 0,
                0, score.texts, score.f1 * double(score.texts)});
  if (out.empty()) return;
  write_json(out, {{"pages", truth.size()},
                   {"documents", kept.size()},
                   {"dirt_found", share_json(score.found, score.to_find)},
                   {"clean_kept", share_json(score.kept, score.to_keep)},
                   {"f1", score.f1},
                   {"kinds", kinds}});
}

}  // namespace
}  // namespace cake::world
