#!/usr/bin/env python3
"""Compares cake/jinja.h with Jinja2, set up as transformers sets it up, on random templates.

Templates are drawn from a grammar of everything that chat templates use, and rendered with random
conversations. Both give the same text, or both refuse. A template that Jinja2 renders and we refuse
is counted by its error: what is not supported is to be known. Anything else is a difference, is made
smaller, and is printed.

    make build/jinja_render
    python dev/interop/jinja_compare.py [--count 20000] [--seed 1] [--templates FOLDER]

With --templates, published templates (*.jinja) are rendered too, whole and with random changes.
Needs jinja2 (3.1.6).
"""

import argparse
import collections
import datetime
import json
import pathlib
import random
import re
import signal
import subprocess
import warnings

import jinja2
import jinja2.ext
import jinja2.sandbox

ROOT = pathlib.Path(__file__).parents[2]
DATE = "2024-07-26"

# ---------------------------------------------------------------------------------------------
# Jinja2 as transformers has it


class Generation(jinja2.ext.Extension):
    """{% generation %}: its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.fromisoformat(DATE).strftime(form)
    return env


ENVIRONMENT = environment()
warnings.simplefilter("ignore", SyntaxWarning)  # of Python, on {{ 1[0] }}


class TookTooLong(Exception):
    pass


def stop(*_):
    raise TookTooLong


def reference(text, variables):
    """(text, None) or (None, error)."""
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        return ENVIRONMENT.from_string(text).render(**variables), None
    except TookTooLong:
        return None, "took too long"
    except (MemoryError, RecursionError) as e:
        return None, type(e).__name__
    except Exception as e:  # Python's own errors pass through Jinja2
        return None, f"{type(e).__name__}: {e}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Ours:
    """build/jinja_render. A crash counts as an error of its own kind."""

    def __init__(self, binary):
        self.binary = binary
        self.start()

    def start(self):
        self.process = subprocess.Popen([self.binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def render(self, text, variables):
        line = json.dumps({"template": text, "variables": variables, "name": "t", "date": DATE})
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.process.wait()
            self.start()
            return None, f"CRASH {status}"
        answer = json.loads(answer)
        return answer.get("text"), answer.get("error")


# ---------------------------------------------------------------------------------------------
# Random data

STRINGS = ["", " ", "a", "Hi.", " two words ", "\n\nline one\nline two\n", "<|im_end|>", "<think>x</think>\n\ny", "</think>",
           "it's \"quoted\" \\ back", "<b> & 'c'", "\u65e5\u672c\u8a9e", "na\u00efve \u00c9T\u00c9 stra\u00dfe", "\U0001f600!", "tab\there", "12", "-3.5",
           "a,b,,c", "UPPER lower", "{{ a }}", "x" * 40, "\r\nwin\r\n", "0", "true", "[\"a\", 1]", "e\u0301"]  # fmt: skip
KEYS = ["a", "b", "c", "name", "role", "content", "items", "x y", "A", "type"]
NUMBERS = [0, 1, -1, 2, 3, 7, 10, -5, 100, 255, 1 << 31, 1 << 53]
FLOATS = [0.0, 1.0, -2.5, 0.1, 3.14159, 1e16, 1e-7, 123456.789, 2.5, 1e22, 0.5, 1.5]


def value(draw, depth=2):
    kind = draw.randrange(9 if depth else 6)
    if kind < 2:
        return draw.choice(STRINGS)
    if kind == 2:
        return draw.choice(NUMBERS)
    if kind == 3:
        return draw.choice(FLOATS)
    if kind == 4:
        return draw.choice([True, False])
    if kind == 5:
        return None
    if kind == 6:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return [draw.choice(STRINGS + KEYS) for _ in range(draw.randrange(5))]
    return {draw.choice(KEYS): value(draw, depth - 1) for _ in range(draw.randrange(4))}


def conversation(draw):
    messages = []
    for _ in range(draw.randrange(6)):
        role = draw.choice(["system", "user", "assistant", "tool", "user", "assistant"])
        message = {"role": role, "content": draw.choice(STRINGS)}
        if role == "assistant" and draw.random() < 0.3:
            message["reasoning_content"] = draw.choice(STRINGS)
        if role == "assistant" and draw.random() < 0.3:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": draw.choice(KEYS), "arguments": {draw.choice(KEYS): value(draw, 1)}}}
                for _ in range(draw.randrange(1, 3))
            ]
        messages.append(message)
    return messages


def variables(draw):
    tools = None
    if draw.random() < 0.5:
        tools = [{"type": "function", "function": {"name": draw.choice(KEYS), "parameters": value(draw)}} for _ in range(draw.randrange(1, 3))]
    return {
        "messages": conversation(draw),
        "tools": tools,
        "add_generation_prompt": draw.random() < 0.5,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "s": draw.choice(STRINGS),
        "u": draw.choice(STRINGS),
        "n": draw.choice(NUMBERS[:10]),
        "m": draw.choice(NUMBERS[:8]),
        "f": draw.choice(FLOATS),
        "l": [draw.choice(NUMBERS[:10]) for _ in range(draw.randrange(6))],
        "w": [draw.choice(STRINGS) for _ in range(draw.randrange(5))],
        "d": {draw.choice(KEYS): value(draw, 1) for _ in range(draw.randrange(4))},
        "r": [{"name": draw.choice(STRINGS), "a": draw.choice(NUMBERS[:8])} for _ in range(draw.randrange(4))],
        "v": value(draw),
        "t": draw.random() < 0.5,
    }


# ---------------------------------------------------------------------------------------------
# The grammar

LITERALS = ["0", "1", "2", "-1", "3", "10", "1.5", "0.25", "2.0", "1e3", "1_000", "true", "false", "none", "True", "None", "''", "\"\"", "'a'",
            "\"it's\"", "'\\n'", "'a\\'b'", "'\\u00e9\\x41\\t\\\\'", "'<|im_end|>'", "', '", "'\u65e5'", "[]", "{}", "()", "(1,)", "[1, 2, 3]",
            "['b', 'a', 'C']", "{'a': 1, 'b': [2]}", "'{}'", "'%s'", "'a' 'b'", "'\\d'"]  # fmt: skip
TEXTS = ["text", " ", "\n", "\n\n", "  \n", "<|im_start|>", "a b\n", "\t", "x: ", "}", "{ ", "%}", "\u65e5\u672c", "#", "'", "\n  ", "end\n "]
TESTS = ["defined", "undefined", "none", "string", "number", "mapping", "sequence", "iterable", "boolean", "integer", "float", "true", "false",
         "odd", "even", "lower", "upper", "callable", "escaped"]  # fmt: skip
TESTS_WITH = ["divisibleby", "equalto", "eq", "==", "ne", "lt", "gt", "ge", "le", "in", "sameas", "greaterthan", "lessthan"]
FILTERS = ["trim", "upper", "lower", "title", "capitalize", "length", "count", "first", "last", "join", "tojson", "reverse", "sort", "unique",
           "list", "string", "int", "float", "abs", "sum", "min", "max", "items", "dictsort", "wordcount", "round", "safe", "escape", "e", "d('x')",
           "default('z', true)", "default(n)", "join(', ')", "join('-', attribute='name')", "tojson(indent=2)", "tojson(sort_keys=true)", "tojson(ensure_ascii=true)",
           "tojson(separators=(',', ':'))", "replace('a', 'b')", "replace(' ', '_', 1)", "map('upper')", "map(attribute='name')", "map(attribute='a', default=0)",
           "map('trim')", "map('default', 'q')", "select", "reject", "select('string')", "select('gt', 2)", "reject('none')", "selectattr('name')", "selectattr('a', 'gt', 1)",
           "selectattr('role', 'equalto', 'user')", "rejectattr('role', 'eq', 'user')", "rejectattr('a')", "batch(2)", "batch(2, 'p')", "slice(2)", "slice(3, 'p')",
           "indent", "indent(2)", "indent(2, true)", "indent(first=true)", "indent(2, blank=true)", "indent('> ')", "round(1)", "round(1, 'floor')",
           "round(method='ceil')", "center(12)", "truncate(9)", "truncate(5, true, '')", "int(5)", "int(default=3)", "float(1.5)", "sort(reverse=true)",
           "sort(attribute='a')", "sort(case_sensitive=true)", "dictsort(reverse=true)", "dictsort(by='value')", "unique(attribute='a')", "sum(attribute='a')",
           "sum(start=3)", "min(attribute='a')", "max(attribute='a')", "groupby('a')", "format(1, 'x')", "trim('a')", "attr('name')", "random_is_not_here",
           "map('int')", "map('length')", "map('tojson')", "map(attribute='function.name')", "join(attribute=0)", "first | upper", "last | tojson", "urlencode",
           "striptags", "wordwrap(5)", "filesizeformat", "pprint", "xmlattr"]  # fmt: skip
METHODS = ["strip()", "lstrip()", "rstrip()", "strip('a\\n')", "rstrip('.')", "lstrip(' ')", "split()", "split(',')", "split('</think>')", "split('a', 1)",
           "split(none, 1)", "rsplit(' ', 1)", "splitlines()", "splitlines(true)", "startswith('a')", "endswith('.')", "startswith(('a', 'H'))",
           "endswith('')", "upper()", "lower()", "title()", "capitalize()", "swapcase()", "replace('a', 'xx')", "replace('', '-')", "replace('i', '', 1)",
           "find('a')", "rfind('i')", "find('i', 1)", "index('i')", "count('i')", "count('')", "join(w)", "join(['a', 'b'])", "isdigit()", "isalpha()",
           "isspace()", "isalnum()", "isupper()", "islower()", "isnumeric()", "isdecimal()", "istitle()", "isidentifier()", "zfill(6)", "ljust(8, '*')", "rjust(8)", "center(9, '-')",
           "removeprefix('a')", "removesuffix('.')", "partition(' ')", "rpartition('i')", "format(1, a=2)", "encode()", "get('a')", "get('a', 0)", "get(s)", "items()", "keys()", "values()",
           "index(1)", "count(1)", "append(1)", "pop()", "update({})", "copy()", "casefold()", "expandtabs()", "__len__()", "nothing()", "split(sep='a')",
           "split(',', maxsplit=1)"]  # fmt: skip
NAMES = ["messages", "tools", "add_generation_prompt", "bos_token", "s", "u", "n", "m", "f", "l", "w", "d", "r", "v", "t", "nothing", "s", "n", "w"]
LOOP = ["index", "index0", "first", "last", "length", "revindex", "revindex0", "previtem", "nextitem", "depth", "depth0",
        "changed(x)", "cycle('a', 'b')", "previtem.role", "nextitem.content"]  # fmt: skip
ATTRIBUTES = ["role", "content", "a", "name", "b", "items", "tool_calls", "nothing", "function", "keys", "x"]


class Grammar:
    def __init__(self, draw):
        self.draw = draw
        self.names = list(NAMES)
        self.in_loop = 0
        self.in_function = 0  # break and continue stop at a macro, a call or a generation block
        self.macros = []
        self.spaces = []

    def pick(self, items):
        return self.draw.choice(items)

    def chance(self, p):
        return self.draw.random() < p

    def name(self):
        if self.in_loop and self.chance(0.2):
            return "loop." + self.pick(LOOP)
        if self.spaces and self.chance(0.1):
            return self.pick(self.spaces) + "." + self.pick(["a", "b", "x"])
        return self.pick(self.names)

    def expression(self, depth=3):
        """One that Jinja2 evaluates, most of the time."""
        if POOL and not self.chance(0.1):
            return self.pick(POOL)
        return self.any_expression(depth)

    def condition(self):
        """For the head of a tag, where an `if` would be another one."""
        text = self.expression(2)
        return f"({text})" if " if " in text else text

    def any_expression(self, depth):
        if depth <= 0 or self.chance(0.15):
            return self.pick(LITERALS) if self.chance(0.35) else self.name()
        e = lambda: self.bracketed(depth - 1)  # noqa: E731
        kinds = [
            (10, lambda: f"{e()} | {self.pick(FILTERS)}"),
            (8, lambda: f"{self.operand(e())}.{self.pick(METHODS)}"),
            (5, lambda: f"{self.operand(e())}.{self.pick(ATTRIBUTES)}"),
            (4, lambda: f"{self.operand(e())}[{e()}]"),
            (5, lambda: f"{self.operand(e())}[{self.slice()}]"),
            (8, lambda: f"{e()} {self.pick(['+', '-', '*', '/', '//', '%', '~', '+', '~'])} {e()}"),
            (1, lambda: f"{self.pick(['2', 'n', '-1', '1.5', '(-2)'])} ** {self.pick(['2', '0', '-1', '3', '0.5', 'm % 5'])}"),
            (6, lambda: f"{e()} {self.pick(['==', '!=', '<', '<=', '>', '>=', 'in', 'not in', '=='])} {e()}"),
            (1, lambda: f"{e()} {self.pick(['<', '==', '>'])} {e()} {self.pick(['<=', '!=', '<'])} {e()}"),
            (5, lambda: f"{e()} {self.pick(['and', 'or'])} {e()}"),
            (3, lambda: f"not {e()}"),
            (1, lambda: f"{self.pick(['-', '+'])}{self.operand(e())}"),
            (4, lambda: f"{e()} if {e()} else {e()}"),
            (1, lambda: f"{e()} if {e()}"),
            (4, lambda: f"{e()} is {self.pick(['', 'not '])}{self.pick(TESTS)}"),
            (2, lambda: f"{e()} is {self.pick(['', 'not '])}{self.pick(TESTS_WITH)}({e()})"),
            (1, lambda: f"{self.operand(e())} is divisibleby {self.pick(['2', '3', '0', 'n'])}"),
            (2, lambda: f"[{e()}, {e()}]"),
            (1, lambda: f"({e()}, {e()})"),
            (1, lambda: f"{{'a': {e()}, {self.pick(['s', repr('b'), 'n'])}: {e()}}}"),
            (3, lambda: f"({e()})"),
            (2, lambda: f"range({self.pick(['3', 'n', '1, 5', '5, 0, -2', 'm, n', 'l | length', '0', '2, 3, 0'])})"),
            (1, lambda: f"dict(a={e()}, b=2)"),
            (1, lambda: f"namespace(a={e()}).a"),
            (1, lambda: f"{self.pick(['lipsum', 'cycler', 'joiner', 'strftime_now', 'range', 'self', 'caller', 'loop'])}"),
            (1, lambda: f"strftime_now({self.pick([repr('%d %b %Y'), repr('%Y-%m-%d %A %B %j'), repr('%H:%M%%')])})"),
        ]
        weights = [k[0] for k in kinds]
        return self.draw.choices(kinds, weights)[0][1]()

    def bracketed(self, depth):
        text = self.any_expression(depth)
        return f"({text})" if " " in text and self.chance(0.7) else text

    def operand(self, text):
        """In brackets, unless it binds as tightly as a name does."""
        return text if re.fullmatch(r"[\w.]+|\[.*\]|'[^']*'", text) and not text[0].isdigit() else f"({text})"

    def slice(self):
        part = lambda: self.pick(["", "", "0", "1", "-1", "2", "n", "-2", "100"])  # noqa: E731
        return f"{part()}:{part()}" + (f":{self.pick(['', '1', '2', '-1', '-2', 'n'])}" if self.chance(0.4) else "")

    def call(self, depth):
        name, arguments = self.pick(self.macros)
        given = [self.expression(depth - 1) for _ in range(self.draw.randrange(len(arguments) + 1))]
        if arguments and self.chance(0.3):
            given.append(f"{self.pick(arguments)}={self.expression(depth - 1)}")
        if self.chance(0.05):
            given.append("1")
        return f"{name}({', '.join(given)})"

    def tag(self, text):
        """{% ... %} with any control of white space."""
        return "{%" + self.pick(["", "", "-", "+", "-"]) + f" {text} " + self.pick(["", "", "-", "-", "+"]) + "%}"

    def body(self, depth):
        return "".join(self.statement(depth - 1) for _ in range(self.draw.randrange(1, 4)))

    def function(self, depth):
        """A body in which an outer loop cannot be left."""
        loops, self.in_loop = self.in_loop, 0
        names = list(self.names)
        text = self.body(depth)
        self.in_loop, self.names = loops, names
        return text

    def statement(self, depth):
        if depth <= 0 or self.chance(0.3):
            return self.output() if self.chance(0.6) else self.pick(TEXTS)
        kinds = [(6, self.write_if), (7, self.write_for), (5, self.write_set), (2, self.write_set_block), (2, self.write_namespace),
                 (2, self.write_macro), (1, self.write_call), (1, self.write_filter), (2, self.write_generation), (1, self.write_with),
                 (1, self.write_raw), (1, self.write_comment), (4, lambda _: self.output()), (4, lambda _: self.pick(TEXTS))]  # fmt: skip
        if self.in_loop:
            kinds.append((2, lambda _: self.tag(f"if {self.condition()}") + self.tag(self.pick(["break", "continue"])) + self.tag("endif")))
        return self.draw.choices([k[1] for k in kinds], [k[0] for k in kinds])[0](depth)

    def output(self):
        if self.macros and self.chance(0.3):
            return "{{ " + self.call(3) + self.pick(["", "", " | trim", " ~ s", " | upper", "[1:]"]) + " }}"
        return "{{" + self.pick(["", "", "-", "+"]) + f" {self.expression()} " + self.pick(["", "", "-"]) + "}}"

    def write_if(self, depth):
        text = self.tag(f"if {self.condition()}") + self.body(depth)
        while self.chance(0.3):
            text += self.tag(f"elif {self.condition()}") + self.body(depth)
        if self.chance(0.4):
            text += self.tag("else") + self.body(depth)
        return text + self.tag("endif")

    def write_for(self, depth):
        names = list(self.names)
        over = self.pick(["messages", "l", "w", "r", "d", "d.items()", "range(3)", "messages[1:]", "s", "d | items", "tools or []", self.condition()])
        target = self.pick(["x", "m", "x", "k, y"]) if "items" not in over else self.pick(["k, y", "k, y", "x"])
        recursive = self.chance(0.08)
        text = f"for {target} in {over}"
        self.names += target.split(", ") * 3
        if self.chance(0.2):
            text += f" if {self.condition()}"
        text = self.tag(text + (" recursive" if recursive else ""))
        self.in_loop += 1
        text += self.body(depth)
        if recursive:
            text += "{{ loop(" + self.pick(["[]", "x", "x.a", "w[:1]", "v"]) + ") if loop.depth < 3 }}"
        self.in_loop -= 1
        if self.chance(0.2):
            text += self.tag("else") + self.body(depth)
        self.names = names
        return text + self.tag("endfor")

    def write_set(self, depth):
        target = self.pick(["x", "y", "s", "a, b", "n", "z"])
        if self.spaces and self.chance(0.4):
            target = self.pick(self.spaces) + "." + self.pick(["a", "b"])
        text = self.tag(f"set {target} = {self.expression()}" + (f", {self.expression(2)}" if "," in target else ""))
        if "." not in target:
            self.names += target.split(", ")
        return text

    def write_set_block(self, depth):
        text = self.tag(f"set x{self.pick(['', '', ' | upper', ' | trim'])}") + self.function(depth) + self.tag("endset")
        self.names.append("x")
        return text

    def write_namespace(self, depth):
        self.spaces.append("ns")
        return self.tag(f"set ns = namespace({self.pick(['', 'a=1', 'a=[], b=s', 'x=0', 'd'])})")

    def write_macro(self, depth):
        name = self.pick(["f", "g"])
        arguments = self.pick([[], ["x"], ["x", "y"], ["p", "x"]])
        listed = [a if i == 0 or self.chance(0.5) else f"{a}={self.expression(1)}" for i, a in enumerate(arguments)]
        for i in range(1, len(listed)):  # one with a default is followed by others that have one
            if "=" in listed[i - 1] and "=" not in listed[i]:
                listed[i] += "=none"
        names, macros, spaces = list(self.names), list(self.macros), list(self.spaces)
        self.names += arguments * 3 + (["varargs", "kwargs", "caller"] if self.chance(0.2) else [])
        text = self.tag(f"macro {name}({', '.join(listed)})") + self.function(depth)
        if self.chance(0.2):
            text += "{{ caller(1) if caller is defined }}"
        self.names, self.spaces = names, spaces
        self.macros = macros + [(name, arguments)]
        return text + self.tag("endmacro")

    def write_call(self, depth):
        if not self.macros:
            return self.output()
        argument = self.pick(["", "", "(x)"])
        return self.tag(f"call{argument} {self.call(2)}") + self.function(depth) + self.tag("endcall")

    def write_filter(self, depth):
        return self.tag(f"filter {self.pick(['upper', 'trim', 'indent(2)', 'replace(' + repr('a') + ', s)', 'tojson'])}") + self.function(depth) + self.tag("endfilter")

    def write_generation(self, depth):
        return self.tag("generation") + self.function(depth) + self.tag("endgeneration")

    def write_with(self, depth):
        return self.tag(f"with x = {self.expression(2)}, z = 1") + self.body(depth) + self.tag("endwith")

    def write_raw(self, depth):
        return self.pick(["{% raw %}", "{%- raw -%}"]) + self.pick(["{{ x }}", " {% if %} ", "\n a \n", ""]) + self.pick(["{% endraw %}", "{%- endraw -%}"])

    def write_comment(self, depth):
        return self.pick(["{# c #}", "{#- c -#}", "{# a\n {% b %} #}", " {# c #}\n", "{#+ c #}"])


POOL = []  # expressions that Jinja2 evaluates with the data of some try


def fill_pool(seed, count):
    """Returns what each of them was evaluated with, too."""
    pool = []
    tries = 0
    while len(pool) < count:
        tries += 1
        draw = random.Random(f"{seed} expression {tries}")
        text = Grammar(draw).any_expression(3)
        data = variables(draw)
        for name in ["x", "y", "k", "p", "z", "a", "b"]:
            data[name] = data[draw.choice(["s", "n", "w", "d", "v"])]
        data["loop"] = {"index": 1, "index0": 0, "first": True, "last": False, "length": 2, "revindex": 2, "revindex0": 1}
        data["ns"] = {"a": data["s"], "b": data["l"], "x": 0}
        if reference("{{ " + text + " }}", data)[1] is None:
            pool.append((text, data))
    POOL[:] = [text for text, _ in pool]
    return pool


def random_template(draw):
    grammar = Grammar(draw)
    return "".join(grammar.statement(4) for _ in range(draw.randrange(1, 5)))


def changed(draw, text):
    """A published template with small changes in its tags."""
    for _ in range(draw.randrange(1, 4)):
        tags = list(re.finditer(r"\{[{%]-?\s*(.*?)\s*-?[}%]\}", text, re.S))
        if not tags:
            return text
        tag = draw.choice(tags)
        kind = draw.randrange(6)
        if kind == 0:  # the control of white space
            new = tag[0].replace("{%-", "{%") if "{%-" in tag[0] else tag[0].replace("{%", "{%-").replace("{{", "{{-")
        elif kind == 1:
            new = tag[0] + draw.choice(TEXTS)
        elif kind == 2:
            new = tag[0] + Grammar(draw).statement(2)
        elif kind == 3 and tag[0].startswith("{{"):
            new = Grammar(draw).output()
        elif kind == 4:
            words = list(re.finditer(r"\b(content|role|messages|loop\.\w+|\d+|'[^']*')", tag[0]))
            if not words:
                continue
            word = draw.choice(words)
            new = tag[0][: word.start()] + f"({Grammar(draw).expression(2)})" + tag[0][word.end() :]
        else:
            new = ""
        text = text[: tag.start()] + new + text[tag.end() :]
    return text


# ---------------------------------------------------------------------------------------------
# The comparison


ODD = re.compile(r"<(?:Macro|Cycler|Joiner|Namespace|TemplateReference|generator|function|method|bound method|built-in|LoopContext|class|dict_)[^\n]*|at 0x[0-9a-f]+|\brange\("
                 r"|Undefined|&lt;(?:Macro|generator|function|class|built-in)|dict_(?:keys|values|items)\(|&#\d+;|&amp;")  # fmt: skip


def compare(ours, text, data):
    """What differs, or None; and the kind: same, both refuse, refused, different, skipped."""
    expected, error = reference(text, data)
    if error in ("took too long", "MemoryError", "RecursionError"):
        return "skipped", None
    found, our_error = ours.render(text, data)
    if our_error and our_error.startswith("CRASH"):
        return "different", our_error
    if our_error and "\n" in our_error:
        return "different", "an error of more than one line: " + our_error
    if expected is not None and ODD.search(expected):  # Python's names of objects
        return "skipped", None
    if found is not None and expected is not None:
        return ("same", None) if found == expected else ("different", f"found    {found!r}\nexpected {expected!r}")
    if found is None and expected is None:
        return "both refuse", None
    if found is None:
        return "refused", our_error
    return "different", f"found    {found!r}\nexpected {error}"


def smaller(ours, text, data, kind, key):
    """The shortest template found, by taking parts away, that differs in the same way."""

    def same(candidate):
        k, detail = compare(ours, candidate, data)
        return k == kind and key(detail) == key(original)

    original = compare(ours, text, data)[1]
    size = max(1, len(text) // 2)
    tries = 0
    while size >= 1 and tries < 600:
        begin = 0
        while begin < len(text) and tries < 600:
            candidate = text[:begin] + text[begin + size :]
            tries += 1
            if candidate and same(candidate):
                text = candidate
            else:
                begin += size
        size //= 2
    return text


def refusal(error):
    """An error without what is particular to one template."""
    error = re.sub(r"^t:\d+: ", "", error or "")
    return re.sub(r"\d+", "N", re.sub(r"\"[^\"]*\"|'[^']*'", "...", error))[:100]


def difference(detail):
    """How a difference is told from others, roughly: by the error, or that texts differ."""
    lines = (detail or "").split("\n")
    return re.sub(r"['\"].*|\d+", "", lines[-1])[:60]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="random templates")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--binary", default=str(ROOT / "build/jinja_render"))
    parser.add_argument("--templates", type=pathlib.Path, help="a folder with published templates")
    parser.add_argument("--show", type=int, default=20, help="differences that are printed")
    parser.add_argument("--refusals", type=int, default=0, help="refusals that are printed, made smaller, one of each kind")
    args = parser.parse_args()

    published = [p.read_text() for p in sorted(args.templates.rglob("*.jinja"))] if args.templates else []
    ours = Ours(args.binary)
    counts, refusals, examples, shown = collections.Counter(), collections.Counter(), {}, set()
    pool = fill_pool(args.seed, args.count // 5)
    for i in range(args.count):
        draw = random.Random(f"{args.seed} {i}")
        data = variables(draw)
        if i < len(pool):
            text, data = "{{ " + pool[i][0] + " }}", pool[i][1]
        elif published and i % 2:
            text = changed(draw, draw.choice(published))
        else:
            text = random_template(draw)
        kind, detail = compare(ours, text, data)
        counts[kind] += 1
        if kind == "refused":
            refusals[refusal(detail)] += 1
            examples.setdefault(refusal(detail), (text, data))
        if kind == "different" and len(shown) < args.show:
            text = smaller(ours, text, data, kind, difference)
            if text not in shown:
                shown.add(text)
                used = {k: v for k, v in data.items() if re.search(rf"\b{k}\b", text)}
                print(f"--- seed {args.seed}, template {i}\n{text!r}\nwith     {json.dumps(used, ensure_ascii=False)[:300]}\n{compare(ours, text, data)[1]}")
    print(", ".join(f"{n} {k}" for k, n in counts.most_common()))
    for error, n in refusals.most_common(40):
        print(f"{n:6} refused: {error}")
        if args.refusals > 0:
            args.refusals -= 1
            text, data = examples[error]
            text = smaller(ours, text, data, "refused", refusal)
            print(f"       {text!r}, expected {reference(text, data)[0]!r}")
    return 1 if counts["different"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
