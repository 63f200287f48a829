"""The names of the special tokens: markers that only the renderer may place, never a user's text.

Source: llama_models/llama4/tokenizer.py (BASIC_SPECIAL_TOKENS, LLAMA4_SPECIAL_TOKENS and the reserved tail). `<|image|>` marks the
global tile of an image; the places where image features go are `<|patch|>`.
"""


def _reserved(prefix: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"<|{prefix}reserved_special_token_{i}|>" for i in range(start, stop))


def _named(*names: str) -> tuple[str, ...]:
    return tuple(f"<|{name}|>" for name in names)


# All 2,048 in order of id; the first follows the last ordinary token, so it is 200000 in the released vocabulary.
LLAMA4_SPECIALS: tuple[str, ...] = (
    *_named("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *_named("header_start", "header_end", "eom", "eot", "step"),
    *_reserved("text_post_train_", 0, 6),
    *_named("python_start", "python_end", "finetune_right_pad"),
    *_reserved("text_post_train_", 8, 69),
    *_named("image_start", "image_end"),
    *_reserved("vision_", 0, 2),
    *_named("tile_x_separator", "tile_y_separator"),
    *_reserved("vision_", 2, 6),
    *_named("image"),
    *_reserved("vision_", 6, 7),
    *_named("patch"),
    *_reserved("vision_", 7, 1048),
    *_reserved("reasoning_", 0, 8),
    *_named("reasoning_thinking_start", "reasoning_thinking_end"),
    *_reserved("", 0, 904),
)

# Those of the byte tokenizer: the few that herd places, after the 256 bytes.
BYTE_SPECIALS: tuple[str, ...] = (
    *_named("begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot", "finetune_right_pad"),
    *_named("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch"),
    *_named("python_start", "python_end"),
)
