"""What several routes are sent, and what backends answer in several tests."""

import base64
from typing import Any

from herd.chat import Done, Format, Text, ToolCallDelta, ToolCallEnd, ToolCallStart, Usage
from herd.serve.schema import Sampled

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PIXEL).decode(), "detail": "low"}}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
STEPS = [
    Text(text="Let me see. "),
    ToolCallStart(index=0, id="call_a", name="get-weather"),
    ToolCallDelta(index=0, arguments='{"city": "Pa'),
    ToolCallDelta(index=0, arguments='ris", "days": 1}'),
    ToolCallEnd(index=0),
    ToolCallStart(index=1, id="call_b", name="clock"),
    ToolCallDelta(index=1, arguments="{}"),
    ToolCallEnd(index=1),
    Done(reason="tool_calls", usage=Usage(prompt_tokens=9, completion_tokens=7, cached_tokens=4)),
]

EXTENSIONS = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "timings", "return_progress", *Sampled.formats}

OF_RIVALS = {  # values that are refused, of fields that completions have too
    "allowed_token_ids": [5],
    "bad_words": ["x"],
    "cache_prompt": False,
    "id_slot": 0,
    "include_stop_str_in_output": True,
    "length_penalty": 2.0,
    "logits_processors": ["x"],
    "min_tokens": 5,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "stop_token_ids": [5],
    "timings_per_token": True,
    "truncate_prompt_tokens": 5,
    "use_beam_search": True,
}

# of chat completions and responses alike; field: (its value on the wire, what Sampling makes of it)
SAMPLED_ANYWHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0, {"temperature": 0.0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "seed": (-3, {"seed": -3}),
    "stop": ("END", {"stop": ("END",)}),
    "top_k": (40, {"top_k": 40}),
    "min_p": (0.1, {"min_p": 0.1}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "presence_penalty": (-1, {"presence_penalty": -1}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "logit_bias": ({"5": 1, "70": -2.5}, {"logit_bias": {5: 1.0, 70: -2.5}}),
    "structured_outputs": ({"regex": "a+"}, {"format": Format(kind="regex", value="a+")}),
    "guided_json": ('{"type": "object"}', {"format": Format(kind="json_schema", value={"type": "object"})}),
    "guided_regex": ("a+", {"format": Format(kind="regex", value="a+")}),
    "guided_choice": (["a", "b"], {"format": Format(kind="choice", value=("a", "b"))}),
    "json_schema": ({"type": "object"}, {"format": Format(kind="json_schema", value={"type": "object"})}),
    "grammar": ('root ::= "a"', {"format": Format(kind="gbnf", value='root ::= "a"')}),
    "guided_grammar": ('root ::= "a"', {"format": Format(kind="gbnf", value='root ::= "a"')}),
}
