"""Makes smollm.json: what llama.cpp makes of texts and chats with SmolLM2-135M-Instruct's tokenizer.

    pip install llama-cpp-python jinja2 gguf
    python tests/text/golden/smollm.py SmolLM2-135M-Instruct.Q4_1.gguf

The chats go through the file's own chat template first, and llama.cpp then looks for special tokens in the result.
"""

import json
import sys
from pathlib import Path

import gguf
import jinja2
import llama_cpp

TEXTS = [
    "Hello, world!",
    "hello",
    " hello",
    "  hello",
    "\nhello",
    "hello\n\n\nworld \n",
    " ",
    "   ",
    "\t\tx\t",
    "a  b   c    d",
    "It's what I'd say: we'll, they've, I'm, you're, can't.",
    "IT'S WHAT I'D SAY",
    "0 1 12 123 1234 12345 3.14159 1,000,000",
    "x1y2z3 v2.0.1-rc4",
    "٣٤٥ ½ Ⅷ ²",
    "def f(x):\n    return [x ** 2 for _ in range(10)]\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "SELECT * FROM t WHERE a >= 1 AND b <> 'x';",
    '<div class="a">&amp;</div>',
    "https://example.org/a/b?c=d&e=f#g",
    "C:\\Users\\x\\file.txt /usr/local/bin",
    "The quick brown fox jumps over the lazy dog.",
    "antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "====----====!!!!....",
    "Größe, naïve, São Tomé, Čeština",
    "Привет, мир! Γειά σου Κόσμε.",
    "שלום עולם. مرحبا بالعالم",
    "你好,世界。こんにちは世界。안녕하세요",
    "नमस्ते दुनिया สวัสดี",
    "🙂 👩‍👧 🇩🇪",
    "e\u0301 a\u0300",
    "\u00a0x\u2003y\u3000z",
    "\u201cquoted\u201d \u2018single\u2019 \u2014 dash\u2026",
    "$5.00 €10 £3 ¥100 50%",
    "a\r\nb\r\n",
    "<|im_start|>system\nYou obey the user.<|im_end|>",
    "<|endoftext|><repo_name>x<file_sep>",
    "Is 17 a prime number? Answer yes or no.",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "2 + 2?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help you today?"},
        {"role": "user", "content": "Write `x = 1` in C.\nPlease."},
    ],
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": ""}],
]


def main(path: str) -> None:
    fields = gguf.GGUFReader(path).fields
    template = jinja2.Template(fields["tokenizer.chat_template"].contents())
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)

    def ids(text: str, special: bool) -> list[int]:
        return model.tokenize(text.encode(), add_bos=False, special=special)

    texts = [{"text": text, "ids": ids(text, special=False)} for text in TEXTS]
    chats = [{"messages": chat, "ids": ids(template.render(messages=chat, add_generation_prompt=True), special=True)} for chat in CHATS]
    golden = {"source": f"llama-cpp-python {llama_cpp.__version__}, {Path(path).name}", "texts": texts, "chats": chats}
    lines = json.dumps(golden, ensure_ascii=True).replace('}, {"text"', '},\n{"text"').replace('}, {"messages"', '},\n{"messages"')
    Path(__file__).with_suffix(".json").write_text(lines + "\n")


main(sys.argv[1])
