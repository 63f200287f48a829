"""Texts that tell tokenizers apart, and where the released tokenizer lies: in the llama_models wheel."""

from pathlib import Path

import llama_models

WHEEL = Path(llama_models.__file__).parent / "llama4"

TEXTS = [
    "",
    " ",
    "\n",
    "\n\n",
    "Hello, world!",
    "I'll say it's HE'D and WE'LL; don't 'S 'Ll 'ſ",
    "camelCaseXMLHttpRequest snake_case SCREAMING_CASE",
    "1 12 123 1234 12345678901 3.14159 ½ Ⅷ ٣٤٥ 一二三",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # ok\n\n\n\tif x != 0:\r\n\t\tpass\r\n",
    "https://example.org/a/b//c?d=e&f=%20#g /usr/local/lib/\n//\n",
    "   leading, trailing   \t \n  and   inner      runs \u00a0\u2003\u3000 of space \u0085\u2028x",
    "Größe, naïve, São Tomé, Čeština, İstanbul, ǅungla, ﬁn",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم",
    "你好,世界。こんにちは世界。안녕하세요 세계. สวัสดีชาวโลก नमस्ते दुनिया",
    "🙂👩‍👩‍👧🏽🇩🇪 e\u0301 a\u0300\u0316 \ufeff\u200b\u200d \U0001f9ff\U000e0041",
    "\x00\x01\x1f\x7f\x80\x9f",
    "<|begin_of_text|><|eot|><|header_start|>system<|header_end|>\n\n<|patch|><|image|>",
    "a" * 300 + " " * 300 + "=" * 300 + "\n" * 300 + "ha" * 150,
    "\ud800 lone \udfff",
]
