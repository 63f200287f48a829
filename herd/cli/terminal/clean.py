"""Text that a terminal may be given: what a model or a file says must not move the cursor, set a title or write into the clipboard.

A terminal obeys control characters, of which ESC begins most orders, wherever they come from. Each becomes a picture of itself, so that
nothing is obeyed and nothing hidden. No sequence is looked for: one that never ends could take the rest of the text with it.
"""

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t\r"}
_BROKEN = dict.fromkeys([*range(0x7F, 0xA0), 0x202D, 0x202E], "\ufffd")  # DEL, C1, and the two that turn the direction of all that follows
_TABLE = {**_PICTURES, **_BROKEN, 0x0D: "", 0x2028: "\n", 0x2029: "\n"}


def clean(text: str) -> str:
    """The text without control characters but line feeds and tabs. Character by character, so pieces may be cleaned one by one."""
    return text.translate(_TABLE)
