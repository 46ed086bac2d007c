// The chat template that models of this project are made with: ChatML with tools as in Qwen3,
// `<|im_start|>{role}\n{content}<|im_end|>\n`. Jinja, which other programs read in
// tokenizer_config.json; here cake/jinja.h renders it, as it does the templates of other models.
//
// Reasoning is written as Qwen3 does: <think>\n...\n</think>\n\n before the answer, and only in
// what follows the last message of the user. The reasoning of earlier answers is left out: a model
// that answers again does not see it.
//
// The assistant's contents are stripped: generation and training begin at the first token of the
// content, which white space at its beginning could join to the line end of "assistant\n". Qwen3's
// declaration of tools is a paragraph long; this one is short, because a small model has a short
// context.
#pragma once

namespace cake {

inline constexpr const char* kChatTemplate = R"({%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>\n' }}
    {%- for tool in tools %}
        {{- (tool.function if tool.function is defined else tool) | tojson }}{{- '\n' }}
    {%- endfor %}
    {{- '</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set query = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set query.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content or '') | trim %}
        {%- set reasoning = (message.reasoning_content or '') | trim or none %}
        {%- if reasoning is none and content.startswith('<think>') and '</think>' in content %}
            {%- set parts = content.split('</think>') %}
            {%- set reasoning = parts[0][7:] | trim %}
            {%- set content = parts[1:] | join('</think>') | trim %}
        {%- endif %}
        {%- if loop.index0 < query.last %}{%- set reasoning = none %}{%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if reasoning is not none %}
                {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
            {%- endif %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {%- if content or not loop.first %}{{- '\n' }}{%- endif %}
                {%- set function = call.function if call.function is defined else call %}
                {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
                {%- set arguments = function.arguments or {} %}
                {{- arguments if arguments is string else arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.role != 'system' %}
        {{- raise_exception('found role ' + message.role + ', expected user, assistant or tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)";

}  // namespace cake
