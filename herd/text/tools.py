"""How tools, calls and results are written into a prompt, in each of the forms that models of the family were trained on.

    pythonic   Meta: tools in the system message, calls as [f(a="x"), g()], results as they are
    json       transformers' template of the released instruct models: tools before the first user message, calls as JSON
    tags       SmolLM2 (Cria): tools in the system message, calls as <tool_call>[{...}]</tool_call>, results from the user

Source: llama-models' models/llama4/prompt_format.md and chat_format.py, llama-stack's PythonListCustomToolGenerator (the tools come before
a system message of one's own); transformers' processing_llama4.py, chat_template; SmolLM2-1.7B-Instruct's instructions_function_calling.md
and ollama's template for it. Where those lose something we do not: Meta's python lists escape no quotes, and transformers drops a message
whose list of calls is empty. Several calls are one list, as the models write them; Meta's code would write a list for each.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from herd.chat import Image, Message, Tool, ToolCall
from herd.errors import PromptError

MOST_NESTED = 100  # of a call's arguments in the history, which is as deep as Python can be asked to go with some room


@dataclass(frozen=True, slots=True)
class Special:
    """A special token, by name, among text."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One form."""

    introduce: Callable[[list[Message], Sequence[Tool]], list[Message]]  # a conversation in which the tools are written
    reply: Callable[[Message], list[str | Special]]  # the content of an assistant's message with calls
    result: Callable[[str], str]  # the content of a tool's message
    role: str  # whose header a result has
    close_reply: str  # special that ends a message with calls
    close_result: str


def definition(tool: Tool) -> dict[str, Any]:
    """A tool as its JSON object, with what it says of itself and no more."""
    told = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {key: value for key, value in told.items() if value or key == "name"}


def arguments(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call in the history. Raises `PromptError` when they are no JSON object."""
    try:
        found = json.loads(call.arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        hint = "send back the arguments as they came, or leave out a call that was cut off"
        raise PromptError(f"the arguments of a call to {call.name} are no JSON object: {call.arguments!r:.80}", hint, param="messages")
    if _is_deeper(found, MOST_NESTED):
        text = f"the arguments of a call to {call.name} are nested deeper than {MOST_NESTED}: {call.arguments!r:.80}"
        raise PromptError(text, "leave the call out", param="messages")
    return found


def _is_deeper(value: Any, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(item, depth - 1) for item in items)


def literal(value: Any) -> str:
    """A JSON value as Python writes it, with strings in double quotes as Llama 4 does."""
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(key)}: {literal(item)}' for key, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _with_system(messages: list[Message], write: Callable[[str], str]) -> list[Message]:
    """The conversation with its system message rewritten, or with one that is new."""
    has_one = bool(messages) and messages[0].role == "system"
    text = write(messages[0].text if has_one else "")
    return [Message(role="system", content=(text,)), *messages[has_one:]]


_PYTHONIC = """\
You are a helpful assistant and an expert in function composition. You can answer general questions using your internal knowledge OR \
invoke functions when necessary. Follow these strict guidelines:

1. FUNCTION CALLS:
- ONLY use functions that are EXPLICITLY listed in the function list below
- If NO functions are listed (empty function list []), respond ONLY with internal knowledge or "I don't have access to \
[Unavailable service] information"
- If a function is not in the list, respond ONLY with internal knowledge or "I don't have access to [Unavailable service] information"
- If ALL required parameters are present AND the query EXACTLY matches a listed function's purpose: output ONLY the function call(s)
- Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]
Examples:
CORRECT: [get_weather(location="Vancouver"), calculate_route(start="Boston", end="New York")] <- Only if get_weather and \
calculate_route are in function list
INCORRECT: get_weather(location="New York")
INCORRECT: Let me check the weather: [get_weather(location="New York")]
INCORRECT: [get_events(location="Singapore")] <- If function not in list

2. RESPONSE RULES:
- For pure function requests matching a listed function: ONLY output the function call(s)
- For knowledge questions: ONLY output text
- For missing parameters: ONLY request the specific missing parameters
- For unavailable services (not in function list): output ONLY with internal knowledge or "I don't have access to \
[Unavailable service] information". Do NOT execute a function call.
- If the query asks for information beyond what a listed function provides: output ONLY with internal knowledge about your limitations
- NEVER combine text and function calls in the same response
- NEVER suggest alternative functions when the requested service is unavailable
- NEVER create or invent new functions not listed below

3. STRICT BOUNDARIES:
- ONLY use functions from the list below - no exceptions
- NEVER use a function as an alternative to unavailable information
- NEVER call functions not present in the function list
- NEVER add explanatory text to function calls
- NEVER respond with empty brackets
- Use proper Python/JSON syntax for function calls
- Check the function list carefully before responding

4. TOOL RESPONSE HANDLING:
- When receiving tool responses: provide concise, natural language responses
- Don't repeat tool response verbatim
- Don't add supplementary information


Here is a list of functions in JSON format that you can invoke.

@TOOLS@

You can answer general questions or invoke tools when necessary.
In addition to tool calls, you should also augment your responses by using the tool outputs."""


def _introduce_pythonic(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    guide = _PYTHONIC.replace("@TOOLS@", _dumps([definition(tool) for tool in tools], indent=4))
    return _with_system(messages, lambda own: f"{guide}\n{own}" if own else guide)


def _reply_pythonic(message: Message) -> list[str | Special]:
    def written(call: ToolCall) -> str:
        return f"{call.name}({', '.join(f'{key}={literal(value)}' for key, value in arguments(call).items())})"

    return [message.text, f"[{', '.join(map(written, message.tool_calls))}]"]


_JSON = """\
Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.

"""


def _introduce_json(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    has_system = bool(messages) and messages[0].role == "system"
    system = [Message(role="system", content=("Environment: ipython\n" + messages[0].text.strip(),))] if has_system else []
    if not messages[has_system:] or messages[has_system].role != "user":
        raise PromptError("there is no user message to put the tools before", "begin with a user message", param="messages")
    first, *rest = messages[has_system:]
    told = _JSON + "".join(_dumps({"type": "function", "function": definition(tool)}, indent=4) + "\n\n" for tool in tools)
    has_image = any(isinstance(part, Image) for part in first.content)
    content = first.content if has_image else (first.text.strip(),)
    return [*system, replace(first, content=(told, *content)), *rest]


def _reply_json(message: Message) -> list[str | Special]:
    calls = "".join(f'{{"name": "{call.name}", "parameters": {_dumps(arguments(call))}}}' for call in message.tool_calls)
    return [Special("<|python_start|>"), message.text, Special("<|python_end|>"), calls]


_TAGS = """\
You are an expert in composing functions. You are given a question and a set of possible functions.
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the functions can be used, point it out and refuse to answer.
If the given question lacks the parameters required by the function, also point it out.

You have access to the following tools:
<tools>@TOOLS@</tools>

The output MUST strictly adhere to the following format, and NO other text MUST be included.
The example format is as follows. Please make sure the parameter type is correct. \
If no function call is needed, please make the tool calls an empty list '[]'.
<tool_call>[
{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},
... (more tool calls as required)
]</tool_call>"""


def _introduce_tags(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    guide = _TAGS.replace("@TOOLS@", _dumps([definition(tool) for tool in tools]))
    return _with_system(messages, lambda own: f"{own}\n\n{guide}" if own else guide)


def _reply_tags(message: Message) -> list[str | Special]:
    calls = ",\n".join(f'{{"name": "{call.name}", "arguments": {_dumps(arguments(call))}}}' for call in message.tool_calls)
    return [f"{message.text}\n" if message.text else "", f"<tool_call>[\n{calls}\n]</tool_call>"]


TOOL_FORMATS = {
    "pythonic": ToolFormat(
        introduce=_introduce_pythonic,
        reply=_reply_pythonic,
        result=lambda text: text,
        role="ipython",
        close_reply="<|eom|>",
        close_result="<|eom|>",
    ),
    "json": ToolFormat(
        introduce=_introduce_json,
        reply=_reply_json,
        result=_dumps,
        role="ipython",
        close_reply="<|eot|>",
        close_result="<|eot|>",
    ),
    "tags": ToolFormat(
        introduce=_introduce_tags,
        reply=_reply_tags,
        result=lambda text: f"<tool_response>\n{text}\n</tool_response>",
        role="user",
        close_reply="<|im_end|>",
        close_result="<|im_end|>",
    ),
}


def in_order(messages: Sequence[Message]) -> list[Message]:
    """The conversation with the results of calls in the order of the calls: prompts carry no ids, so order is all that a model sees.

    Raises `PromptError` for a result of no call, or a second one of the same.
    """
    ordered: list[Message] = []
    waiting: list[str] = []  # ids of calls without a result
    results: list[tuple[int, Message]] = []  # of the last calls
    order: dict[str, int] = {}
    for message in [*messages, None]:
        if message is not None and message.role == "tool":
            if message.tool_call_id is None and waiting:
                results.append((order[waiting[0]], message))
                waiting.pop(0)
            elif message.tool_call_id in waiting:
                results.append((order[message.tool_call_id], message))
                waiting.remove(message.tool_call_id)
            else:
                of = "no call" if message.tool_call_id is None else f"{message.tool_call_id!r}, which waits for none"
                raise PromptError(f"a tool's message is the result of {of}", "put it right after the call, once", param="messages")
            continue
        ordered += [result for _, result in sorted(results, key=lambda pair: pair[0])]
        results = []
        if message is not None:
            order = {call.id: place for place, call in enumerate(message.tool_calls)}
            waiting = list(order)
            ordered.append(message)
    return ordered
