// What the text of an answer says: its number, its choice, its arithmetic; and a table of answers
// with a person's verdicts.
#include <doctest/doctest.h>

#include <ctime>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/answers.h"
#include "cake/verify.h"
#include "test/support.h"

using namespace cake;

TEST_CASE("the number that counts is found however the answer is written") {
  const std::pair<const char*, const char*> cases[] = {
      {"#### 18", "18"},
      {"The answer is 18.", "18"},
      {"She makes $18 every day.", "18"},
      {"so 18.00", "18"},
      {"18.50 dollars", "18.5"},
      {"1,000", "1000"},
      {"$1,234,567.80.", "1234567.8"},
      {"5, 6 and 7", "7"},
      {"1,2", "2"},
      {"12,3456", "3456"},
      {"-5", "-5"},
      {"-$5.0", "-5"},
      {"x = -3", "-3"},
      {"5-3", "3"},
      {"(4)-3", "3"},
      {"range 3-4", "4"},
      {"It is 007.", "7"},
      {"-0", "0"},
      {".5", "0.5"},
      {"3.5.2", ""},
      {"#### 18 apples, 20 pears", "18"},
      {"18\n#### nothing", "18"},
      {"48/2 = <<48/2=24>>24 clips", "24"},
      {"24 clips <<48/2=25>>", "24"},
      {"<<1+1=2>>", ""},
      {"a << b 7", "7"},
      {"none", ""},
      {"", ""},
      {"2+16=18\n#### 18\n\nQuestion: next?\n#### 5", "18"},
      {"#### Step 1\nAdd.\n#### Step 2\nThe answer is 15.", "15"},
      {"#### 1. Add 3\n#### 2. Count\nIt makes 15.", "15"},
      {"#### $-1,000.50", "-1000.5"},
      {"#### **7**", "7"},
      {"So \\boxed{18}. See page 3.", "18"},
      {"\\boxed{1} and then \\boxed{x = 2}, not 3", "1"},
      {"The answer is $9{,}500.", "9500"},
      {"\\boxed{9{,}500}", "9500"},
      {"12\\,345 m", "12345"},
      {"3/4", "0.75"},
      {"\\frac{3}{4}", "0.75"},
      {"-\\dfrac{1}{2}", "-0.5"},
      {"2/6", "1/3"},
      {"1/3", "1/3"},
      {"4/0", ""},
      {"on 1/2/2020", ""},
      {"so x = \u22125", "-5"},
      {"so x = \u20135", "-5"},
      {"x = - 5", "-5"},
      {"- 5 apples", "5"},
      {"the total \u2013 72", "72"},
      {"pages 3\u20134", "4"},
      {"clips--72", "72"},
      {"x^{2}-3", "3"},
      {"1e5", "100000"},
      {"1.5E+3", "1500"},
      {"25e-3", "0.025"},
      {"6 and 10^6", "1000000"},
      {"6 and 2^6", "6"},
      {"18 m2", "18"},
      {"H2O", ""},
      {"5x", ""},
      {"1.5 x 10^6", "1500000"},
      {"$1.5 \\times 10^{6}$", "1500000"},
      {"1 000", "1000"},
      {"1\u00a0000", "1000"},
      {"1\u2009000 000", "1000000"},
      {"1\u202f000,50", "1000.5"},
      {"1'000", "1000"},
      {"1\u2019000\u2019000", "1000000"},
      {"1_000", "1000"},
      {"1,00,000", "100000"},
      {"12,34,567", "1234567"},
      {"1.000,00", "1000"},
      {"1.234.567", "1234567"},
      {"1.000", "1"},
      {"\u20105", "-5"},
      {"\ufe635", "-5"},
      {"\uff0d5", "-5"},
      {"\u2014 5", "5"},
      {"= \u20145", "-5"},
      {"minus 5", "-5"},
      {"negative five", ""},
      {"negative 3/4", "-0.75"},
      {"10 minus 5", "5"},
      {"+5", "5"},
      {"(5)", "5"},
      {"\\boxed{\\text{18 eggs}}", "18"},
      {"\\boxed{\\frac{3}{4}}", "0.75"},
      {"\\boxed{\\dfrac{1}{3}}", "1/3"},
      {"\\boxed{\\$18}", "18"},
      {"\\boxed{50\\%}", "50%"},
      {"\\boxed{90^\\circ}", "90"},
      {"\\boxed{90^{\\circ}}", "90"},
      {"1\\frac{1}{2}", "1.5"},
      {"1 1/2 cups", "1.5"},
      {"-1\\frac12", "-1.5"},
      {"\uff11\uff18", "18"},
      {"\u00bd", "0.5"},
      {"2\u00bd", "2.5"},
      {"\uff11\uff0c\uff10\uff10\uff10", "1000"},
      {"18th", "18"},
      {"2:30", ""},
      {"\\boxed{5\\pi}", ""},
      {"\\boxed{2\\sqrt{3}}", ""},
      {"\\boxed{x+5}", ""},
      {"\\boxed{12 \\text{ and } 15}", ""},
      {"The answer is 12 and 15.", ""},
      {"The answer is 5-7.", ""},
      {"The answer is 5 + 3 = 8.", "8"},
      {"The answer is 18, 2 more than yesterday.", "18"},
      {"The answer is 18 or 19", ""},
      {"She has 9 eggs (16-3-4).", "9"},
      {"answer: 70 thousand", "70000"},
      {"$70k", "70000"},
      {"$5M", "5000000"},
      {"5 kg", "5"},
      {"Answer: **18**", "18"},
      {"**Answer:** 18 dollars and 2 cents", "18"},
      {"**Final Answer**\n\n$\\boxed{840}$", "840"},
      {"The answer is 18\n\nQuestion: 5+3?\nThe answer is 8", "18"},
      {"It is 18.\n\nQ: How many?\nA: 5", "18"},
      {"<think>maybe 5</think>\n\n18", "18"},
      {"<think>maybe 5", ""},
      {"<answer> 42 </answer> ok 5", "42"},
      {"18<|im_end|>\n<|im_start|>user\nmore 7", "18"},
      {"\\boxed{18", "18"},
      {"\\boxed{}", ""},
      {"10-3", "3"},
      {"so \\(x = -\\frac{3}{4}\\)", "-0.75"},
      {"The total is $29.00.", "29"},
      {"72 clips, altogether", "72"},
      {"7 \u00d7 8 = 56", "56"},
      {"It is 3.14 \u00d7 10\u00b2 m", "314"},
      {"10\u2076", "1000000"},
      {"18 m\u00b2", "18"},
      {"5 m/s", "5"},
      {"14 {, }916", "14916"},
      {"\\boxed{14{,}916}", "14916"},
      {"the number is 1,000.99m\u00b2", "1000.99"},
      {"AZYUK2A", ""},
      {"Final: 28 %", "28%"},
      {"$28$ percent", "28%"},
      {"0.5 per cent", "0.5%"},
      {"\\frac13", "1/3"},
      {"\\boxed{x = \\frac{10}{9}}", "10/9"},
      {"\\boxed{k=3, m=4}", ""},
      {"\\boxed{\\text{The answer is 460}}", "460"},
      {"x_1 = 5", "5"},
      {"3 x 60 = 180", "180"},
      {"3x60", "60"},
      {"answer is 2x + 3", ""},
      {"A = 5\\pi r^2", ""},
      {"-(5)", "-5"},
      {"f(-5)", "-5"},
      {"#### -5", "-5"},
      {"#### - 5", "-5"},
      {"####18", "18"},
      {"The answer is:\n\n18", "18"},
      {"Answer - 18", "18"},
      {"The answer is not 5", "5"},
      {"\u0661\u0668", "18"},
      {"\u7b54\u6848\u662f5", "5"},
      {"1 and 1/2", "1.5"},
      {"5 feet 3 inches", "3"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    CHECK(final_number(c.first) == c.second);
  }
}

TEST_CASE("a reference answer is one number, or none") {
  const std::pair<const char*, const char*> cases[] = {{"18", "18"},
                                                       {"$18", "18"},
                                                       {"18 dollars", "18"},
                                                       {"x+5", ""},
                                                       {"5x", ""},
                                                       {"5x+3", ""},
                                                       {"12 and 15", ""},
                                                       {"10^6", "1000000"},
                                                       {"2:30", ""},
                                                       {"many", ""},
                                                       {"1e3", "1000"},
                                                       {"5-3", ""},
                                                       {"3/4", "0.75"},
                                                       {"\u22125", "-5"},
                                                       {"- 5", "-5"},
                                                       {"no solution", ""},
                                                       {"18 m^2", "18"},
                                                       {"18 m2", "18"},
                                                       {"50%", "50%"},
                                                       {"5 km/h", "5"},
                                                       {"\\sqrt{2}", ""},
                                                       {"2\\sqrt{3}", ""},
                                                       {"\\frac{x}{2}", ""},
                                                       {"5!", ""},
                                                       {"5\\pi", ""},
                                                       {"[2,5)", ""},
                                                       {"(3, 4)", ""},
                                                       {"1,2", ""},
                                                       {"1.5 million", "1500000"},
                                                       {"18-year-old", "18"},
                                                       {"x=5", "5"},
                                                       {"x > 5", ""},
                                                       {"\\pm 5", ""},
                                                       {"5 \u00b1 1", ""},
                                                       {"5/x", ""},
                                                       {"1/0", ""},
                                                       {"2/3", "2/3"},
                                                       {"-2/3", "-2/3"},
                                                       {"1\\frac{2}{3}", "5/3"},
                                                       {"3 \\frac{1}{2}", "3.5"},
                                                       {"0x1F", ""},
                                                       {"5 feet 3 inches", ""},
                                                       {"1/2/2020", ""},
                                                       {"five", ""},
                                                       {"0.1 + 0.2 = 0.3", "0.3"},
                                                       {"1e-5", "0.00001"},
                                                       {"(5)", "5"},
                                                       {"[5]", "5"},
                                                       {"{5}", "5"},
                                                       {"\\$5", "5"},
                                                       {"~5", "5"},
                                                       {"about 5", "5"},
                                                       {"5.", "5"},
                                                       {"5,", "5"},
                                                       {"1e99999", ""},
                                                       {"+5", "5"},
                                                       {"5+", ""},
                                                       {"between 5 and 7", ""},
                                                       {"5 to 7", ""},
                                                       {"5\u20137", ""},
                                                       {"$\\dfrac{9}{7}$", "9/7"},
                                                       {"\\text{(C)}", ""},
                                                       {"6\\text{ miles}", "6"},
                                                       {"\\left(5\\right)", "5"},
                                                       {"11\\frac{1}{9}\\%", "100/9%"},
                                                       {"7.0", "7"},
                                                       {"1 000 000", "1000000"},
                                                       {"\\frac{3}{-4}", ""},
                                                       {"3\\cdot 10^{5}", "300000"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    CHECK(reference_number(c.first) == c.second);
  }
}

TEST_CASE("fractions are exact, of up to 36 digits") {
  CHECK(canonical_number("2/6") == "1/3");
  CHECK(canonical_number("0.333333333333") != canonical_number("1/3"));
  CHECK(canonical_number("1/8") == "0.125");
  CHECK(canonical_number("123456789012345678901234567890123456/3") ==
        "41152263004115226300411522630041152");
  CHECK(canonical_number(std::string(100, '7') + "/3") == "");  // no wrong number
  CHECK(canonical_number(std::string(100, '7')) == std::string(100, '7'));
}

TEST_CASE("a percent sign is a unit, unless the expected answer has one") {
  CHECK(is_same_number("50", "50%"));
  CHECK(!is_same_number("0.5", "50%"));
  CHECK(is_same_number("50%", "50%"));
  CHECK(is_same_number("50%", "50"));
  CHECK(is_same_number("50%", "0.5"));
  CHECK(!is_same_number("50%", "0.5%"));
  CHECK(!is_same_number("50%", "5"));
  CHECK(is_same_number("1/3%", "1/300"));
  CHECK(!is_same_number("50", ""));
  CHECK(!is_same_number("", ""));
}

TEST_CASE("a choice is what the text states, concludes, begins with, or alone names") {
  const std::pair<const char*, const char*> cases[] = {
      {"The answer is (B).", "B"},
      {"Answer: A. No. Answer: C", "C"},
      {"D", "D"},
      {"D) because it is so", "D"},
      {"B or C", ""},
      {"Both, I'd say", ""},
      {"B is the correct answer. A is wrong.", "B"},
      {"I choose C, my final answer", "C"},
      {"I think it is B.", "B"},
      {"The answer: I believe B", "B"},
      {"My answer? I think B", "B"},
      {"I am not sure", ""},
      {"The answer is d.", "D"},
      {"the answer is (a)", "A"},
      {"The answer is a dog, B.", "B"},
      {"d)", "D"},
      {"a dog", ""},
      {"The answer\u2014C", "C"},
      {"I don\u2019t doubt the answer: B", "B"},
      {"I\u2019d say so", ""},
      {"'B'", "B"},
      {"It is D, not C", "D"},
      {"B. That is my answer", "B"},
      {"The answer is C because I computed it", "C"},
      {"**Final answer**\n\n**C**", "C"},
      {"The answer is I.", "I"},
      {"A man walks, an answer runs", ""},
      {"So the answer is D, not C.", "D"},
      {"Option B, since Z > Y", "B"},
      {"The answer is B. Note that A is a common distractor.", "B"},
      {"ANSWER IS D. A is incorrect.", "D"},
      {"Answer: **D**", "D"},
      {"I considered (A), but it is incorrect. Final answer: D.", "D"},
      {"The correct answer is d.", "D"},
      {"C. A pretty girl is there", "C"},
      {"ANSWER: None of the above", ""},
      {"ANSWER: Don't know", ""},
      {"ANSWER: I don't know", ""},
      {"ANSWER: b", "B"},
      {"Answer: this asks which is a colour\nthen\nANSWER: B", "B"},
      {"Answer: It is not B, the answer is D", "D"},
      {"Answer: rules out C, leaving D", "D"},
      {"The answer is B because a car moves.", "B"},
      {"I would pick B \u2014 a safe choice.", "B"},
      {"b. 4", "B"},
      {"d", "D"},
      {"Answer seems to be A.\n\nAnswer: A", "A"},
      {"Answer seems to be A", "A"},
      {"ANSWER: AB", ""},
      {"ANSWER: A ... actually, ANSWER: B", "B"},
      {"\\boxed{C} then \\boxed{\\text{E}}", "E"},
      {"\\boxed{E: A polygenic risk score}", "E"},
      {"$\\boxed{\\langle H\\rangle \\ll \\Delta E}$\n\n**Answer: D**", "D"},
      {"A is wrong, B is wrong, so C", "C"},
      {"The correct answer is C) Pacific.\n\nThe reason is that the answer \"A\" is incorrect "
       "because the answer \"B\" is incorrect because the answer \"D\" is incorrect because the "
       "answer \"C\" is incorrect because the answer",
       "C"},
      {"A. Sand\n\nThe correct answer is A. Sunlight", "A"},
      {"A. 6\nB. 8\nC. 10\nD. 4", ""},
      {"The answer is X.", "X"},
      {"A. 100 C\n\nThe boiling point of water at sea level is 100 degrees Celsius.", "A"},
      {"Choice b) is best", "B"},
      {"option b", "B"},
      {"The answer is either A or B", ""},
      {"Both A and B are correct", ""},
      {"The answer is A and C", ""},
      {"Not B.", ""},
      {"(B)", "B"},
      {"Let's see. A and B are wrong. C can't be. So it must be D.", "D"},
      {"The answer is A", "A"},
      {"A", "A"},
      {"Therefore, A is the answer.", "A"},
      {"Vitamin C helps. The answer is B.", "B"},
      {"\u9009\u9879 (B) $3.3\\mathrm{MeV}$\u3002", "B"},
      {"\u7b54\u6848\u662fC\u3002", "C"},
      {"The best choice would be option A because plants need it", "A"},
      {"A would be right", "A"},
      {"It can't be A or B, so I will go with C", "C"},
      {"The single letter answer is E", "E"},
      {"My final answer is: (C) 12", "C"},
      {"C. 12", "C"},
      {"The correct option is B, Paris", "B"},
      {"(a) is wrong; (b) is right", "B"},
      {"Answer: A or B", ""},
      {"The answer is B/C", ""},
      {"B.\n\nExplanation: A is wrong since...", "B"},
      {"I", "I"},
      {"The answer is not A.", ""},
      {"It's A.", "A"},
      {"a", "A"},
      {"The answer is A) 5 and B) 6", "A"},
      {"Answer:B", "B"},
      {"answer is option (c).", "C"},
      {"<think>A? B?</think>C", "C"},
      {"Answer: E\n\nQuestion: next\nAnswer: B", "E"},
      {"So the correct answer is **C) Mercury**.", "C"},
      {"The answer is $\\text{(B)}$", "B"},
      {"Of A, B and C, only B is right.", "B"},
      {"A cell is B-type", ""},
      {"D is not correct. The answer must be A.", "A"},
      {"Answer is: Option D)", "D"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const char letter = chosen_letter(c.first);
    CHECK(std::string(letter != 0, letter) == c.second);
  }
}

TEST_CASE("a choice may be given by its text, and by its number where choices are numbered") {
  const struct {
    const char *text, *letter;
    std::vector<std::string> choices;
  } cases[] = {
      {"The answer is Mercury.", "C", {"Venus", "Earth", "Mercury", "Mars"}},
      {"The answer is a whale.", "D", {"Shark", "Frog", "Eagle", "Whale"}},
      {"The correct answer is: \"Eagle\" is a mammal.", "C", {"Shark", "Frog", "Eagle", "Whale"}},
      {"carbon dioxide", "A", {"Carbon dioxide", "Carbon", "Hydrogen", "Neon"}},
      {"Mercury, not Venus", "C", {"Venus", "Earth", "Mercury", "Mars"}},
      {"I think so", "", {"Venus", "Earth", "Mercury", "Mars"}},
      {"The answer is I.", "", {"Venus", "Earth", "Mercury", "Mars"}},
      {"Z", "", {"Venus", "Earth", "Mercury", "Mars"}},
      {"\\boxed{\\text{Mars}}", "D", {"Venus", "Earth", "Mercury", "Mars"}},
      {"It is Venus or Mars", "", {"Venus", "Earth", "Mercury", "Mars"}},
      {"The answer is 100", "B", {"50", "100", "150", "200"}}};
  for (const auto& c : cases) {
    CAPTURE(c.text);
    const char letter = chosen_letter(c.text, {int(c.choices.size()), false, c.choices});
    CHECK(std::string(letter != 0, letter) == c.letter);
  }
  const std::pair<const char*, const char*> numbered[] = {
      {"3", "C"},
      {"The answer is 2.", "B"},
      {"(4)", "D"},
      {"1) Carbon dioxide\n2) Helium", ""},
      {"2) Paris", "B"},
      {"The correct answer is: 1) Sunlight\n", "A"},
      {"7", ""},
      {"3.5", ""},
      {"The answer is 10", ""}};
  for (const auto& c : numbered) {
    CAPTURE(c.first);
    const char letter = chosen_letter(c.first, {4, true, {}});
    CHECK(std::string(letter != 0, letter) == c.second);
  }
}

TEST_CASE("the arithmetic that counts is found however it is dressed") {
  const auto makes = [](const char* text, const std::vector<std::string>& numbers,
                        const std::string& target) {
    const std::string found = final_arithmetic(text, {numbers.begin(), numbers.end()}, target);
    try {
      return !found.empty() && exact_value(found) == target;
    } catch (const Error&) {
      return false;
    }
  };
  for (const char* text : {"3 * 7 + 5",
                           "(3*7)+5 = 26",
                           "First 25 - 3 = 22.\nSo: 5 + 3 * 7 = 26.",
                           "3*7+5 = 26 in 1-2 steps",
                           "Answer: 3*7+5 (5-step)",
                           "1. 3*7 + 5 = 26",
                           "- 3 * 7 + 5 = 26",
                           "3 \u00d7 7 + 5 = 26",
                           "3 \\times 7 + 5",
                           "(3*7+5 = 26)",
                           "26 = 3*7+5",
                           "<answer> 3 * 7 + 5 </answer>",
                           "<think>25+1</think>\n<answer>5+3*7=26</answer>",
                           "\\boxed{3 \\times 7 + 5}",
                           "$$\\boxed{(3 \\cdot 7) + 5 = 26}$$",
                           "**3 * 7 + 5 = 26**",
                           "`3*7+5`",
                           "```\n3*7+5\n```",
                           "[3*7]+5",
                           "3 x 7 + 5 = 26",
                           "3\\*7 + 5 = 26",
                           "3*7+5=26. Check: 3*7=21 and 21+5=26.",
                           "\\left(3 \\times 7\\right) + 5",
                           "3(7)+5",
                           "5 \u2212 (0 \u2212 3)*7 or rather 5+3*7",
                           "25+5+3-7",
                           "(25+5)-(7-3)",
                           "3 * 7 + 5 = 21 + 5 = 26",
                           "25/5*7-(3+5) or 7*3+5",
                           "5 + (7 \u2217 3)",
                           "Expression: 7\u00b73+5",
                           "print(7*3+5)",
                           "3*7 = 21\n21+5 = 26\nSo 3*7+5",
                           "The final expression is $25 + 5 - 7 + 3 = 26$.",
                           "3**7+5 no; 3*7+5 = 26"}) {
    CAPTURE(text);
    CHECK(makes(text, {"3", "5", "7", "25"}, "26"));
  }
  for (const char* text : {"",
                           "26",
                           "25 + 1",
                           "3*3*3-1",
                           "5 + 7 * 3 - 0",
                           "25 + 3/3",
                           "5+7",
                           "(3*7+5",
                           "1/0",
                           "7*3-(0-5)",
                           "3*7+5+5",
                           "3*7 = 21, 21+5 = 26",
                           "25+3-7+5-0",
                           "3**7+5",
                           "37+5-16",
                           "3*7+5 = 27 - no, 25+3 = 28",
                           "26 = 26",
                           "3 7 5",
                           "3*7",
                           "2*13",
                           "25+5-7",
                           "-3*7+5",
                           "<answer>25+3</answer> or 3*7+5",
                           "\\boxed{25+3-2}",
                           "3.0*7+5.5",
                           "5^2+1",
                           "\\frac{25}{5}+21"}) {
    CAPTURE(text);
    CHECK(!makes(text, {"3", "5", "7", "25"}, "26"));
  }
  const struct {
    const char* text;
    std::vector<std::string> numbers;
    const char* target;
    bool right;
  } cases[] = {{"- 3 + 5 = 8", {"3", "5"}, "8", true},
               {"\\frac{6}{3} + 4", {"6", "3", "4"}, "6", true},
               {"\\frac{6+3}{3}", {"6", "3", "3"}, "3", true},
               {"100 - 25 * 4 = 0", {"100", "25", "4"}, "0", true},
               {"(100 \u2212 25\u00d74)", {"100", "25", "4"}, "0", true},
               {"1,000 - 1", {"1000", "1"}, "999", true},
               {"2-7", {"2", "7"}, "-5", true},
               {"2-7 = \u22125", {"2", "7"}, "-5", true},
               {"5/2*4", {"5", "2", "4"}, "10", true},
               {"7/2", {"7", "2"}, "3", false},
               {"8/(3-8/3)", {"8", "3", "8", "3"}, "24", true},
               {"55 + 36 - 7 - 19", {"19", "36", "55", "7"}, "65", true},
               {"19 + 36 = 55\n55+7=122", {"19", "36", "55", "7"}, "65", false},
               {"44+19+35", {"44", "19", "35"}, "98", true},
               {"8 \u00f7 4", {"8", "4"}, "2", true},
               {"3:1", {"3", "1"}, "3", false},
               {"6 divided by 3", {"6", "3"}, "2", false}};
  for (const auto& c : cases) {
    CAPTURE(c.text);
    CHECK(makes(c.text, c.numbers, c.target) == c.right);
  }
}

// ---------------------------------------------------------------------------------------------
// Answers with a person's verdicts

namespace {

// A line of test/answers.tsv: verdict, verifier, what is expected ("18"; "B of 4" letters, or "B of
// red | blue"; "26 of 3 5 7 25"), where the text comes from, the text as JSON.
struct Judged {
  bool is_right;
  std::string verifier, expected, source, text;
};

std::vector<Judged> read_table() {
  std::vector<Judged> rows;
  std::istringstream lines(read_file("test/answers.tsv"));
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string verdict, text;
    Judged row;
    std::getline(fields, verdict, '\t');
    std::getline(fields, row.verifier, '\t');
    std::getline(fields, row.expected, '\t');
    std::getline(fields, row.source, '\t');
    std::getline(fields, text);
    row.is_right = verdict == "right";
    row.text = Json::parse(text).get<std::string>();
    rows.push_back(row);
  }
  return rows;
}

std::vector<std::string> split_at(std::string text, const std::string& separator) {
  std::vector<std::string> parts;
  for (size_t i; (i = text.find(separator)) != text.npos; text.erase(0, i + separator.size())) {
    parts.push_back(text.substr(0, i));
  }
  parts.push_back(text);
  return parts;
}

Problem problem_of(const Judged& row) {
  Problem p{.question = "q", .where = "row"};
  const std::vector<std::string> of = split_at(row.expected, " of ");
  if (row.verifier == "number") {
    p.answers = {row.expected};
  } else if (row.verifier == "choice") {
    p.answers = {of.at(0)};
    if (of.at(1).find_first_not_of("0123456789") == std::string::npos) {
      for (char c = 'A'; c < 'A' + std::stoi(of[1]); c++) p.question += concat("\n", c, ") ..");
    } else {
      p.choices = split_at(of[1], " | ");
    }
  } else {
    p.target = of.at(0), p.numbers = split_at(of.at(1), " ");
  }
  return p;
}

}  // namespace

TEST_CASE("the verifiers judge as a person does, on answers of models and on traps") {
  const std::vector<Judged> rows = read_table();
  size_t real = 0, wrong = 0;
  for (const Judged& row : rows) {
    CAPTURE(row.text);
    CAPTURE(row.expected);
    const Problem p = problem_of(row);
    const std::vector<std::string> name = split_at(row.verifier, ":");
    const auto verifier = make_verifier(name[0], name.size() > 1 ? name[1] : "", {});
    REQUIRE(verifier);
    verifier->check_problem(p);
    const Attempt attempt{&p, row.text};
    CHECK(verifier->score({&attempt, 1}).at(0) == (row.is_right ? 1 : 0));
    real += row.source != "written", wrong += !row.is_right;
  }
  CHECK(rows.size() >= 400);
  CHECK(real * 2 >= rows.size());
  CHECK(wrong >= 150);
}

// ---------------------------------------------------------------------------------------------
// Time

TEST_CASE("a megabyte of anything is judged in less than a second") {
#ifdef __SANITIZE_ADDRESS__
  constexpr double kLimit = 10;
#else
  constexpr double kLimit = 1;
#endif
  const OfferedChoices choices{4, false, {"red", "blue", "green", "not red"}};
  const std::multiset<std::string> numbers{"3", "5", "7", "25"};
  for (const char* part : {"7",
                           "#",
                           "####",
                           "#### 1 ",
                           "(",
                           ")",
                           "((3+5)",
                           "{",
                           "\\boxed{",
                           "\\boxed{1}",
                           "\\frac{",
                           "\\frac{1}{2}",
                           "\\text{",
                           "\\",
                           "$",
                           "-",
                           " ",
                           "1,",
                           "1,000",
                           "1 ",
                           "1/",
                           "1/0 ",
                           "1 1/2 ",
                           "1e999 ",
                           "10^",
                           "3+5=",
                           "3*",
                           "answer",
                           "answer is ",
                           "Answer: A or ",
                           "A, ",
                           "A ",
                           "(A) not ",
                           "a",
                           "Question:",
                           "Question:\n",
                           "\n",
                           "\n\n#",
                           "<think>",
                           "<answer>",
                           "</think>",
                           "<<",
                           "<<1=1>>",
                           "\u2019",
                           "\u00b2",
                           "\u00bd",
                           "\u2014",
                           "%",
                           "and ",
                           "5 and ",
                           "minus ",
                           "x",
                           ".",
                           "1.1",
                           ":",
                           "1:",
                           "**",
                           "**5** ",
                           "3 times ",
                           "is ",
                           "B is wrong and ",
                           "\xff"}) {
    CAPTURE(part);
    std::string text;
    while (text.size() < 1000000) text += part;
    const auto seconds = [&](const auto& judge) {  // of this process
      const std::clock_t begin = std::clock();
      judge();
      return double(std::clock() - begin) / CLOCKS_PER_SEC;
    };
    CHECK(seconds([&] { final_number(text); }) < kLimit);
    CHECK(seconds([&] { chosen_letter(text, choices); }) < kLimit);
    CHECK(seconds([&] { final_arithmetic(text, numbers, "26"); }) < kLimit);
  }
}
