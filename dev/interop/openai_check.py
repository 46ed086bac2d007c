#!/usr/bin/env python3
"""openai-python, as strict as it can be, against ./serve: every mode, every error, retries.

    python3 -m venv venv && venv/bin/pip install openai
    venv/bin/python dev/interop/openai_check.py MODEL [--serve ./serve] [--port 18080]

MODEL is a chat model: a run, a model directory or a .gguf file. The script starts ./serve with it,
with four rows and a queue of four. With _strict_response_validation=True the client raises an error
for every field that does not fit its types, in streams too. The tool calls and the reasoning that
are checked come from the model itself, so a model that makes none says so in the list: `TOOLS` of
the demo's assistants, for one, is a question that they answer with a call.

Prints a line for each check. The exit status is 1 if one failed.
"""

import argparse
import concurrent.futures
import json
import math
import os
import sys
import traceback

import openai

from serve_process import serving

TOOL = {"type": "function", "function": {
    "name": "calculator", "description": "Computes an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}},
                   "required": ["expression"]}}}
TOOLS = "What is 17 * 23?"

checks = []


def check(f):
    checks.append(f)
    return f


def ask(text):
    return [{"role": "user", "content": text}]


HELLO = ask("Say hello to the world, and tell something about it.")


def same(a, b, what):
    assert a == b, f"{what}: {a!r} and {b!r}"


def refused(error, call, status, param=..., code=...):
    """`call` must raise openai's `error`, with this status, `param` and `code`."""
    try:
        call()
    except error as e:
        same(e.status_code, status, "status")
        assert isinstance(e.message, str) and e.message, f"message: {e.message!r}"
        assert isinstance(e.type, str), f"type: {e.type!r}"
        if param is not ...:
            same(e.param, param, "param")
        if code is not ...:
            same(e.code, code, "code")
        return e
    raise AssertionError("no error was raised")


class Joined:
    """The choices of a chat stream, put together again, after a look at its grammar."""

    def __init__(self, stream, usage=False):
        self.text, self.finish, self.logprobs, self.calls = {}, {}, {}, {}
        self.usage, heads = None, set()
        for chunk in stream:
            heads.add((chunk.id, chunk.created, chunk.model, chunk.object))
            if not chunk.choices:
                assert usage and self.usage is None, "a chunk without choices"
                self.usage = chunk.usage
                continue
            assert self.usage is None, "a choice behind the usage"
            for c in chunk.choices:
                i = c.index
                assert i not in self.finish, "a chunk behind finish_reason"
                same(c.delta.role, None if i in self.text else "assistant", "role")
                self.text[i] = self.text.get(i, "") + (c.delta.content or "")
                for call in c.delta.tool_calls or []:
                    known = self.calls.setdefault((i, call.index), ["", "", ""])
                    for k, value in enumerate([call.id, call.function.name,
                                               call.function.arguments]):
                        known[k] += value or ""
                if c.logprobs:
                    self.logprobs.setdefault(i, []).extend(c.logprobs.content)
                if c.finish_reason:
                    assert not c.delta.content, "text in the chunk with finish_reason"
                    self.finish[i] = c.finish_reason
        same(len(heads), 1, "heads of the chunks")
        same(sorted(self.finish), sorted(self.text), "choices with finish_reason")
        assert (self.usage is not None) == usage, "usage"


# -- chat

@check
def chat(client, model):
    r = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0)
    same(r.object, "chat.completion", "object")
    same(r.choices[0].message.role, "assistant", "role")
    assert r.choices[0].message.content
    assert r.choices[0].finish_reason in ("stop", "length")
    same(r.usage.total_tokens, r.usage.prompt_tokens + r.usage.completion_tokens, "total_tokens")
    assert r.usage.prompt_tokens_details.cached_tokens <= r.usage.prompt_tokens


@check
def chat_stream_is_the_same_text(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=24, temperature=.9, seed=3, n=2)
    whole = client.chat.completions.create(**keys)
    stream = Joined(client.chat.completions.create(**keys, stream=True))
    with_usage = Joined(client.chat.completions.create(
        **keys, stream=True, stream_options={"include_usage": True}), usage=True)
    for c in whole.choices:
        same(stream.text[c.index], c.message.content, "text")
        same(with_usage.text[c.index], c.message.content, "text")
        same(stream.finish[c.index], c.finish_reason, "finish_reason")
    same(with_usage.usage.completion_tokens, whole.usage.completion_tokens, "completion_tokens")
    same(with_usage.usage.prompt_tokens, whole.usage.prompt_tokens, "prompt_tokens")


@check
def the_sdks_own_stream_helper(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=16, temperature=0)
    with client.chat.completions.stream(**keys) as stream:
        kinds = {event.type for event in stream}
        try:
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as e:  # so it tells of an answer that was cut
            final = e.completion
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    whole = client.chat.completions.create(**keys)
    same(final.choices[0].message.content, whole.choices[0].message.content, "text")


@check
def four_choices(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=24, temperature=1.2, seed=5)
    r = client.chat.completions.create(**keys, n=4)
    same([c.index for c in r.choices], [0, 1, 2, 3], "indices")
    assert len({c.message.content for c in r.choices}) > 1, "four times the same text"
    one = client.chat.completions.create(**keys)
    same(one.choices[0].message.content, r.choices[0].message.content, "choice 0 and n=1")


@check
def the_same_seed_is_the_same_text(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=24, temperature=1, seed=11)
    alone = client.chat.completions.create(**keys).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: client.chat.completions.create(**keys), range(4)))
    for r in texts:
        same(r.choices[0].message.content, alone, "text")


@check
def logprobs_of_chat(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=12, temperature=1, seed=2, logprobs=True,
                top_logprobs=5)
    whole = client.chat.completions.create(**keys).choices[0]
    entries = whole.logprobs.content
    text = b"".join(bytes(e.bytes) for e in entries).decode(errors="replace")
    same(text, whole.message.content, "bytes of the entries")
    for e in entries:
        same(len(e.top_logprobs), 5, "top_logprobs")
        assert -9999 <= e.logprob <= 0
        tops = [t.logprob for t in e.top_logprobs]
        same(tops, sorted(tops, reverse=True), "order of top_logprobs")
        assert sum(math.exp(x) for x in tops) <= 1 + 1e-5
    stream = Joined(client.chat.completions.create(**keys, stream=True))
    same([e.model_dump() for e in stream.logprobs[0]], [e.model_dump() for e in entries],
         "entries of the stream")
    plain = client.chat.completions.create(**{**keys, "top_logprobs": None}).choices[0]
    same([e.top_logprobs for e in plain.logprobs.content], [[]] * len(entries), "top_logprobs")


@check
def stop_strings(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=40, temperature=0)
    whole = client.chat.completions.create(**keys).choices[0].message.content
    middle = len(whole) // 2
    for stop in (whole[middle:middle + 1], whole[middle:middle + 9]):
        if not stop:
            continue
        expected = whole[:whole.index(stop)]
        r = client.chat.completions.create(**keys, stop=[stop, "never said"])
        same(r.choices[0].message.content, expected, f"text before {stop!r}")
        same(r.choices[0].finish_reason, "stop", "finish_reason")
        stream = Joined(client.chat.completions.create(**keys, stop=stop, stream=True))
        same(stream.text[0], expected, f"streamed text before {stop!r}")
        same(stream.finish[0], "stop", "finish_reason")


@check
def messages_of_every_form(client, model):
    messages = [
        {"role": "developer", "content": "You are brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "},
                                     {"type": "text", "text": "hello."}], "name": "Ada"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Again."}]
    client.chat.completions.create(model=model, messages=messages, max_tokens=4)
    client.chat.completions.create(model=model, messages=messages, max_completion_tokens=4,
                                   presence_penalty=0, frequency_penalty=0, logit_bias={},
                                   response_format={"type": "text"}, user="x", store=False,
                                   metadata={"a": "b"}, service_tier="auto", tools=[TOOL],
                                   tool_choice="none", parallel_tool_calls=True)


@check
def tool_calls(client, model):
    keys = dict(model=model, messages=ask(TOOLS), tools=[TOOL], max_tokens=64, temperature=0)
    choice = client.chat.completions.create(**keys).choices[0]
    if choice.finish_reason != "tool_calls":
        return f"the model made no call: {choice.message.content!r}"
    stream = Joined(client.chat.completions.create(**keys, stream=True))
    same(stream.finish[0], "tool_calls", "finish_reason")
    calls = choice.message.tool_calls
    for k, call in enumerate(calls):
        json.loads(call.function.arguments)
        same(stream.calls[0, k][1:], [call.function.name, call.function.arguments], "call")
        assert call.id and stream.calls[0, k][0]
    messages = keys["messages"] + [choice.message.model_dump(exclude_none=True)] + [
        {"role": "tool", "tool_call_id": call.id, "content": "391"} for call in calls]
    r = client.chat.completions.create(**{**keys, "messages": messages})
    return f"{calls[0].function.name}({calls[0].function.arguments}), then {r.choices[0].message.content!r}"


@check
def reasoning(client, model):
    # The answer goes on behind an opened <think>: reasoning until the model closes it.
    messages = HELLO + [{"role": "assistant", "content": "<think>\nThe user wants"}]
    keys = dict(model=model, messages=messages, max_tokens=12, temperature=0)
    r = client.chat.completions.create(**keys).choices[0].message
    assert isinstance(r.reasoning_content, str) and r.reasoning_content, r
    text = ""
    for chunk in client.chat.completions.create(**keys, stream=True):
        text += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
    same(text, r.reasoning_content, "reasoning_content")


# -- completions

@check
def completions(client, model):
    keys = dict(model=model, prompt="Once upon a time", max_tokens=16, temperature=.8, seed=4)
    whole = client.completions.create(**keys)
    same(whole.object, "text_completion", "object")
    # openai-python's type has no null for finish_reason, which OpenAI's own chunks have: these are
    # validated here, with another value in its place.
    text, usage = "", None
    lenient = openai.OpenAI(base_url=client.base_url, api_key=client.api_key)
    for chunk in lenient.completions.create(**keys, stream=True,
                                            stream_options={"include_usage": True}):
        fields = chunk.model_dump()
        for c in fields["choices"]:
            c["finish_reason"] = c["finish_reason"] or "stop"
        openai.types.Completion.model_validate(fields)
        same(chunk.object, "text_completion", "object")
        if chunk.choices:
            text += chunk.choices[0].text
        else:
            usage = chunk.usage
    same(text, whole.choices[0].text, "text")
    same(usage.completion_tokens, whole.usage.completion_tokens, "completion_tokens")


@check
def prompts_of_every_form(client, model):
    keys = dict(model=model, max_tokens=6, temperature=0)
    one = client.completions.create(**keys, prompt="The moon").choices[0].text
    r = client.completions.create(**keys, prompt=["The moon", "A river"], n=2)
    same([c.index for c in r.choices], [0, 1, 2, 3], "indices")
    same(r.choices[0].text, one, "the first of two prompts")
    same(r.choices[1].text, one, "the second choice of it, at temperature 0")
    ids = client.post("/../tokenize", cast_to=object, body={"content": "The moon"})["tokens"]
    a = client.completions.create(**keys, prompt=ids).choices[0].text
    b = client.completions.create(**keys, prompt=[ids, ids]).choices
    same([b[0].text, b[1].text], [a, a], "texts behind ids")


@check
def logprobs_of_completions(client, model):
    r = client.completions.create(model=model, prompt="The moon is", max_tokens=4, temperature=0,
                                  logprobs=3, echo=True).choices[0]
    p = r.logprobs
    assert r.text.startswith("The moon is"), r.text
    n = len(p.tokens)
    same([len(p.token_logprobs), len(p.top_logprobs), len(p.text_offset)], [n] * 3, "lengths")
    for token, logprob, top, offset in zip(p.tokens, p.token_logprobs, p.top_logprobs,
                                           p.text_offset):
        if logprob is None:
            continue
        assert logprob <= max(top.values())
        if not token.startswith("\\x") and "\\x" not in token:
            same(r.text[offset:offset + len(token)], token, "text at text_offset")
    same(p.token_logprobs[-1], max(p.top_logprobs[-1].values()), "the most likely token")


# -- models, errors

@check
def models(client, model):
    same([m.id for m in client.models.list()], [model], "ids")
    same(client.models.retrieve(model).id, model, "id")
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"), 404,
            code="model_not_found")


@check
def errors(client, model):
    def chat_with(**keys):
        return lambda: client.chat.completions.create(
            **{"model": model, "messages": HELLO, "max_tokens": 4, **keys})
    bad = openai.BadRequestError
    refused(bad, chat_with(temperature=3), 400, "temperature")
    refused(bad, chat_with(temperature="hot"), 400, "temperature")
    refused(bad, chat_with(top_p=-1), 400, "top_p")
    refused(bad, chat_with(n=0), 400, "n")
    refused(bad, chat_with(messages=[]), 400, "messages")
    refused(bad, chat_with(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role")
    refused(bad, chat_with(top_logprobs=2), 400, "top_logprobs")
    refused(bad, chat_with(stop=[""]), 400)
    refused(bad, chat_with(response_format={"type": "json_object"}), 400)
    refused(bad, chat_with(extra_body={"stream": "true"}), 400, "stream")
    refused(bad, chat_with(messages=ask("word " * 20000)), 400, code="context_length_exceeded")
    refused(bad, lambda: client.completions.create(model=model, prompt="x", best_of=2, n=1), 400,
            "best_of")
    refused(openai.NotFoundError,
            lambda: client.post("/nothing", cast_to=object, body={}), 404)
    e = refused(bad, chat_with(max_tokens=-7), 400, "max_tokens")
    assert set(e.body) >= {"message", "type", "param", "code"}, e.body


@check
def cancelled_streams_free_their_rows(client, model):
    for _ in range(12):  # more than rows and queue hold
        stream = client.chat.completions.create(model=model, messages=HELLO, max_tokens=400,
                                                stream=True)
        next(iter(stream))
        stream.close()
    client.chat.completions.create(model=model, messages=HELLO, max_tokens=2)


@check
def a_full_queue_is_503_and_retries_come_through(client, model):
    keys = dict(model=model, messages=HELLO, max_tokens=48, temperature=1)

    def outcome(retries):
        try:
            client.with_options(max_retries=retries).chat.completions.create(**keys)
            return "answered"
        except openai.InternalServerError as e:
            same(e.status_code, 503, "status")
            same(e.code, "queue_full", "code")
            assert e.response.headers["retry-after"], "Retry-After"
            return "refused"
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        first = list(pool.map(outcome, [0] * 24))
        second = list(pool.map(outcome, [60] * 24))
    assert "refused" in first, "24 clients at once, and none was refused"
    same(second, ["answered"] * 24, "with retries")
    return f"{first.count('refused')} of 24 refused without retries, none with them"


@check
def a_key_is_needed(client, model):
    wrong = client.with_options(api_key="wrong")
    refused(openai.AuthenticationError, lambda: wrong.models.list(), 401, code="invalid_api_key")
    refused(openai.AuthenticationError, lambda: wrong.chat.completions.create(
        model=model, messages=HELLO), 401)


@check
def asynchronous(client, model):
    import asyncio

    async def run():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key,
                                      _strict_response_validation=True) as c:
            stream = await c.chat.completions.create(model=model, messages=HELLO, max_tokens=8,
                                                     stream=True)
            return [chunk async for chunk in stream]
    assert asyncio.run(run())[-1].choices[0].finish_reason


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a chat model: a run, a directory or a .gguf file")
    parser.add_argument("--serve", default="./serve")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--only", default="", help="checks whose names hold this")
    o = parser.parse_args()
    failures = 0
    with serving([o.serve, f"model={o.model}", "--rows", "4", "--queue", "4"], o.port,
                 env={**os.environ, "CAKE_API_KEY": "a-key"}):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{o.port}/v1", api_key="a-key",
                               max_retries=0, _strict_response_validation=True)
        print(f"openai-python {openai.__version__}")
        for f in checks:
            if o.only not in f.__name__:
                continue
            try:
                note = f(client, "model")
                print(f"ok      {f.__name__.replace('_', ' ')}{': ' + note if note else ''}")
            except Exception:
                failures += 1
                print(f"FAILED  {f.__name__.replace('_', ' ')}\n{traceback.format_exc(limit=-3)}")
            sys.stdout.flush()
    print(f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
