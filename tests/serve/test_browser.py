"""The chat page as people use it, in Chromium: `pytest -m browser`. Skipped where Chromium or Playwright is missing."""

import asyncio
import base64
import io
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Picture

from herd.chat import ChatEvent, ChatRequest, Progress
from herd.errors import ContextError, HerdError
from tests.serve.conftest import Live, live
from tests.serve.echo import Echo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


class Moody(Echo):
    """An echo that fails as it is told, once for each error in `errors`, before the first word, and reads slowly what is called long."""

    def __init__(self, *names: str, word_s: float = 0.0) -> None:
        super().__init__(*names, word_s=word_s)
        self.errors: list[HerdError] = []

    async def chat(self, request: ChatRequest) -> AsyncIterator[ChatEvent]:
        if self.errors:
            raise self.errors.pop(0)
        if request.progress and request.messages[-1].text.startswith("long"):
            yield Progress(prompt_tokens=300, read_tokens=102, cached_tokens=0)
            await asyncio.sleep(1)
        async for event in super().chat(request):
            yield event


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def backend() -> Moody:
    return Moody("one", "two", word_s=0.002)


@pytest.fixture(scope="module")
def site(backend: Moody) -> Iterator[Live]:
    with live(backend) as running:
        yield running


@pytest.fixture(scope="module")
def profile(chromium: Any, site: Live) -> Iterator[Any]:
    """A profile with one tab, which stays open so that those of the tests find a process that is warm."""
    context = chromium.new_context(viewport={"width": 1100, "height": 800})
    context.new_page().goto(f"{site.url}/metrics")
    yield context
    context.close()


@pytest.fixture
def page(profile: Any, site: Live) -> Iterator[Any]:
    """A new tab of a profile that has kept nothing, and at the end of the test no script has failed."""
    page = profile.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("dialog", lambda dialog: (failures.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.set_default_timeout(5000)
    visit(page, site)
    yield page
    first, *others = profile.pages
    for other in others:
        other.close()
    profile.new_cdp_session(first).send("Storage.clearDataForOrigin", {"origin": site.url, "storageTypes": "all"})
    assert failures == []


def visit(page: Any, site: Live) -> None:
    page.goto(site.url)
    page.wait_for_selector("body[data-ready]")


def say(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def replies(page: Any, num: int = 1, state: str = "done") -> list[str]:
    """The texts of all replies shown, once there are so many in this state."""
    found = page.locator(f".reply[data-state={state}]")
    found.nth(num - 1).wait_for()
    assert found.count() == num
    return [text.inner_text() for text in page.locator(".reply .prose").all()]


def messages(page: Any) -> list[str]:
    return [text.inner_text() for text in page.locator(".bubble p").all()]


def test_talk_and_reload(page: Any) -> None:
    say(page, "Hello, **you**")
    assert replies(page) == ["Hello, you"]
    assert page.locator(".reply strong").inner_text() == "you"
    assert "2 tokens" in page.locator(".facts").inner_text() and page.locator("#context-text").inner_text() == "4 tokens"
    page.press("#input", "Shift+Enter")
    assert page.input_value("#input") == "\n"
    say(page, "and again")
    assert replies(page, 2) == ["Hello, you", "and again"]
    page.reload()
    assert replies(page, 2) == ["Hello, you", "and again"] and messages(page) == ["Hello, **you**", "and again"]
    assert page.locator("#conversations .name").all_inner_texts() == ["Hello, you"]


def test_stop(page: Any, backend: Moody) -> None:
    say(page, "word " * 5000)
    page.locator(".reply[data-state=streaming]").wait_for()
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    page.keyboard.press("Escape")
    (text,) = replies(page, state="stopped")
    assert 0 < len(text.split()) < 5000 and "stopped" in page.locator(".facts").inner_text()
    page.reload()
    assert replies(page, state="stopped") == [text]


def test_a_long_prompt_tells_how_far_it_is(page: Any) -> None:
    say(page, "long ago")
    page.get_by_text("Reading the prompt: 34 %").wait_for()
    assert replies(page) == ["long ago"] and page.get_by_text("Reading the prompt").count() == 0


def test_stop_before_the_first_word(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)
    say(page, "hello")
    page.locator(".reply[data-state=waiting] .waiting").wait_for()
    page.click("#stop")
    assert replies(page, state="stopped") == [""] and page.locator("#send").is_visible()
    page.unroute("**/v1/chat/completions")
    page.click("[data-act=regenerate]")
    assert replies(page) == ["hello"]


def test_edit_while_a_reply_comes(page: Any) -> None:
    """What is typed stays while replies change, and what is sent takes the place of what was under way."""
    say(page, "word " * 300)
    page.locator(".reply[data-state=streaming]").wait_for()
    page.hover(".said")
    page.click("[data-act=edit]")
    page.fill("#edit", "half an ed")
    replies(page)
    page.keyboard.type("it")
    assert page.input_value("#edit") == "half an edit"
    page.press("#edit", "Enter")
    assert replies(page) == ["half an edit"]
    say(page, "word " * 5000)
    page.locator(".reply[data-state=streaming]").wait_for()
    page.locator(".said").last.hover()
    page.locator("[data-act=edit]").last.click()
    page.fill("#edit", "this instead")
    page.press("#edit", "Enter")
    assert replies(page, 2) == ["half an edit", "this instead"] and not page.locator("#stop").is_visible()


def test_what_has_not_changed_stays(page: Any) -> None:
    """So that a selection lives, and a long chat is not laid out anew with each state of a reply."""
    say(page, "hello")
    replies(page)
    page.evaluate("for (const line of document.getElementById('log').children) line.isOld = true")
    say(page, "and again")
    replies(page, 2)
    assert page.evaluate("[...document.getElementById('log').children].map((line) => line.isOld ?? false)") == [True, True, False, False]


def test_draft_lives_through_a_reload(page: Any) -> None:
    page.fill("#input", "not sent yet")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#input") == "not sent yet"
    page.press("#input", "Enter")
    replies(page)
    page.reload()
    assert page.input_value("#input") == ""


def test_two_tabs_lose_nothing(page: Any, site: Live) -> None:
    say(page, "first")
    replies(page)
    other = page.context.new_page()
    other.goto(page.url)
    say(other, "second")
    assert replies(other, 2) == ["first", "second"] == replies(page, 2)  # shown in the other tab too
    say(page, "third")
    assert replies(page, 3) == replies(other, 3)
    other.reload()
    assert replies(other, 3) == ["first", "second", "third"]
    other.click(".current [data-act=delete]")
    page.locator("#conversations li").wait_for(state="detached")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("Object.defineProperty(window, 'indexedDB', { value: undefined })", "keeps nothing here"),
        ("IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError'); }", "no more room"),
        ("Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('', 'SecurityError'); } })", ""),
    ],
)
def test_browser_that_keeps_nothing(page: Any, site: Live, broken: str, told: str) -> None:
    page.add_init_script(broken)
    visit(page, site)
    say(page, "hello")
    assert replies(page) == ["hello"]
    if told:
        page.locator("#toast", has_text=told).wait_for()


def test_edit_makes_a_branch(page: Any) -> None:
    say(page, "first")
    replies(page)
    page.hover(".said")
    page.click("[data-act=edit]")
    page.fill("#edit", "second")
    page.press("#edit", "Enter")
    page.locator(".arrows").wait_for()
    assert replies(page) == ["second"] and page.locator(".arrows span").inner_text() == "2/2"
    page.click("[aria-label='Previous version']")
    assert replies(page) == ["first"] and page.locator(".arrows span").inner_text() == "1/2"
    page.click("[data-act=regenerate]")
    page.locator(".reply .arrows").wait_for()
    assert replies(page) == ["first"] and page.locator(".reply .arrows span").inner_text() == "2/2"
    page.hover(".said")
    page.click("[data-act=edit]")
    page.keyboard.press("Escape")
    assert not page.locator("#edit").count()


def test_compare(page: Any, backend: Moody) -> None:
    page.click("#compare")
    page.click("#settings1")
    page.fill("[name=system]", "You are B.")
    page.fill("[name=temperature]", "0.5")
    page.keyboard.press("Escape")
    backend.requests.clear()
    say(page, "both")
    assert replies(page, 2) == ["both", "both"]
    assert page.locator(".columns header").all_inner_texts() == ["A\none", "B\ntwo"]
    asked = {request.model: request for request in backend.requests}
    assert asked["two"].messages[0].text == "You are B." and asked["two"].sampling.temperature == 0.5
    assert [message.role for message in asked["one"].messages] == ["user"]
    say(page, "once more")
    replies(page, 4)
    page.locator("[data-act=keep][data-lane='1']").last.click()
    assert page.locator(".columns").count() == 0 and page.locator("#model0").input_value() == "two"
    assert page.locator(".reply .arrows span").first.inner_text() == "2/2"


ATTACK = """<script>document.title = "hit"; alert(1)</script>

<img src=x onerror="document.title = 'hit'; alert(1)"> [link](javascript:alert(1))

```html
</code></pre><script>alert(1)</script>
```
"""


def test_nothing_in_a_reply_runs(page: Any) -> None:
    say(page, ATTACK)
    (text,) = replies(page)
    assert "<script>document.title" in text and '<img src=x onerror="' in text and "javascript:alert(1)" in text
    assert page.locator("#log script, #log img, #log a").count() == 0
    page.wait_for_timeout(100)
    assert page.title() != "hit"


def test_formulas(page: Any) -> None:
    loaded = "performance.getEntriesByType('resource').some(({ name }) => name.endsWith('temml.js'))"
    say(page, "costs $5 and $10")
    assert replies(page) == ["costs $5 and $10"] and not page.evaluate(loaded)
    say(page, "so $x^2$ and \\(y\\), broken $\\frac{1$, $$\\frac{1}{2}$$\n\n\\[\nz\n\\]\n\nlast $\\nosuch{q}$")
    page.locator("math").nth(3).wait_for()
    assert page.evaluate(loaded) and page.locator("math").count() == 4
    assert page.locator("math[display=block]").count() == 2 and page.locator("math mfrac mn").all_text_contents() == ["1", "2"]
    assert page.locator(".is-source").all_inner_texts() == ["\\frac{1", "\\nosuch{q}"]


def test_formula_that_grows_shows_no_error(page: Any) -> None:
    say(page, "$x$")
    page.locator("math").wait_for()
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => {
        const last = [...document.querySelectorAll(".reply .prose")].at(-1);
        window.seen.push([last.querySelectorAll(".is-source, merror").length, last.querySelectorAll("math").length]);
      }).observe(document.getElementById("log"), { subtree: true, childList: true, characterData: true });
    }""")
    say(page, "$$ \\frac { 1 } { 2 } + \\left( \\sqrt { 3 } \\right) $$ and then some words that come after it, " + "one by one " * 20)
    replies(page, 2)
    seen = page.evaluate("window.seen")
    assert len(seen) > 3 and {errors for errors, _ in seen} == {0}
    assert [drawn for _, drawn in seen] == sorted(drawn for _, drawn in seen) and seen[-1][1] == 1  # once drawn it stays


HOSTILE = [  # in the order: what is refused, what would take forever, what is too deep or too long
    r"\href{javascript:alert(1)}{x}",
    r"\includegraphics{https://x.org/a.png}",
    r"\style{position:fixed}{x}",
    r"\class{toast}{x}",
    r"\id{input}{x}",
    r"\data{act=delete}{x}",
    r"\htmlData{act=delete}{x}",
    r"\color{red;background:url(//x.org)}x",
    r"\text{<script>alert(1)</script><img src=x onerror=alert(1)>}",
    r"\ref{x}",
    r"\def\a{\a\a}\a",
    r"\def\a{" + "x" * 1000 + "}" + r"\a" * 900,
    r"\cancelto{x}{" * 14 + "x" + "}" * 14,
    r"\equilibriumRight{" * 14 + "x" + "}" * 14,
    r"\sqrt{" * 500 + "x" + "}" * 500,
    r"x^{" * 300 + "x" + "}" * 300,
    "x+" * 100_000 + "y",
]


def test_nothing_in_a_formula_runs(page: Any) -> None:
    page.set_default_timeout(10_000)
    say(page, "$x$ " + " ".join(f"$${text}$$" for text in HOSTILE) + r" $$\kern-500em \rule{900em}{900em} x \label{input} \tag{2}$$")
    page.locator("math").first.wait_for()
    replies(page)
    assert page.locator(".prose .maths:not(.is-set)").count() == 0 and page.locator(".is-source").count() == len(HOSTILE) - 1
    assert page.locator(".prose :is(a, img, script, [id], [data-act], [href])").count() == 0
    assert page.evaluate("document.elementFromPoint(60, 20).closest('#sidebar') !== null")  # nothing is drawn over the rest of the page
    assert page.evaluate("document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth")
    say(page, "still here")
    replies(page, 2)


def test_the_policy_stops_what_gets_through(page: Any) -> None:
    """If a reply did become HTML one day, the browser would refuse it."""
    refused = page.evaluate("() => { try { document.getElementById('log').innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }")
    assert refused == "TypeError"


def test_picture(page: Any, backend: Moody) -> None:
    stream = io.BytesIO()
    Picture.new("RGB", (40, 30), "red").save(stream, "PNG")
    png = stream.getvalue()
    files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": png} for i in range(2)]
    page.set_input_files("#files", files)
    page.locator("#attached img").nth(1).wait_for()
    page.click("[aria-label='Remove picture 1']")
    assert page.locator("#attached img").count() == 1
    for kind, event in (("ClipboardEvent", "paste"), ("DragEvent", "drop")):
        paste = """([kind, event, data]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], "p.png", { type: "image/png" }));
          const given = { bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer };
          document.getElementById("input").dispatchEvent(new window[kind](event, given));
        }"""
        before = page.locator("#attached img").count()
        page.evaluate(paste, [kind, event, base64.b64encode(png).decode()])
        page.locator("#attached img").nth(before).wait_for()
    backend.requests.clear()
    say(page, "look")
    replies(page)
    assert page.locator(".bubble img").count() == 3 and not page.locator("#attached img").count()
    assert [part for part in backend.requests[0].messages[0].content if isinstance(part, str)] == ["look"]
    assert len(backend.requests[0].messages[0].content) == 4


def test_errors_are_shown_and_can_be_tried_again(page: Any, backend: Moody) -> None:
    backend.errors = [HerdError("this model takes no images", "leave them out")]
    say(page, "hello")
    page.locator(".notice").wait_for()
    assert "his model takes no images. Hint: leave them out" in page.locator(".notice").inner_text()
    page.click("[data-act=retry]")
    assert replies(page) == ["hello"] and page.locator(".notice").count() == 0


@pytest.mark.parametrize("ends", [True, False])
def test_stream_that_breaks_keeps_what_came(page: Any, ends: bool) -> None:
    """A server that dies in the middle of a reply, and one that tells of a failure there."""
    said = json.dumps({"choices": [{"delta": {"content": "half of"}}]})
    failure = json.dumps({"error": {"message": "the engine has died", "code": None}})
    body = f"data: {said}\n\n" + f"data: {failure}\n\n" * ends
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    say(page, "hello")
    assert replies(page, state="failed") == ["half of"]
    assert page.locator(".notice p").inner_text().lower().startswith("the engine has died" if ends else "the connection broke off")
    page.unroute("**/v1/chat/completions")
    page.click("[data-act=retry]")
    assert replies(page) == ["hello"]


def test_full_context_is_told_with_what_to_do(page: Any, backend: Moody) -> None:
    backend.errors = [ContextError("the prompt has 9,000 tokens; this engine holds 8,192")]
    say(page, "hello")
    page.locator(".notice.full").wait_for()
    assert (
        "The context is full" in page.locator(".notice").inner_text() and "edit an earlier message" in page.locator(".notice").inner_text()
    )
    page.locator(".notice [data-act=new]").click()
    say(page, "anew")
    assert replies(page) == ["anew"]


@pytest.mark.parametrize(
    ("length", "level", "text"),
    [
        (100, "", "6 of 100 tokens"),
        (7, "low", "Nearly full: 1 tokens left"),
        (6, "full", "Context full: start a new chat"),
        (None, "", "6 tokens"),
    ],
)
def test_context_bar(page: Any, length: int | None, level: str, text: str) -> None:
    models = [{"id": "one", "context_length": length}, {"id": "two", "max_model_len": length}]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    page.reload()
    page.wait_for_selector("body[data-ready]")
    say(page, "a b c")
    replies(page)
    assert page.inner_text("#context-text") == text and page.get_attribute("#context", "data-level") == level
    assert page.locator("#context-bar").is_visible() == bool(length)
    if length:
        assert page.locator("#context-bar").evaluate("bar => bar.value") == pytest.approx(min(1, 6 / length))


def test_models_that_load_and_are_missing(page: Any) -> None:
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.wait_for_function("document.getElementById('model0').textContent === 'Loading models…'")
    assert page.locator("#model0").is_disabled()
    while not held:
        page.wait_for_timeout(10)
    held.pop().fulfill(status=503, body="")
    page.locator("#banner").wait_for()
    assert page.locator("#model0").inner_text().strip() == "No models" and "status 503" in page.inner_text("#banner-text")


def test_waiting_for_a_busy_server_can_end(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, headers={"retry-after": "60"}, body=""))
    say(page, "hello")
    page.locator(".notice.busy").wait_for()
    assert page.inner_text(".countdown") in ("Trying again in 60 s", "Trying again in 59 s")
    page.click("[data-act=stop-one]")
    page.locator(".reply[data-state=stopped]").wait_for()
    assert page.locator(".notice").count() == 0
    page.click("[data-act=regenerate]")
    page.locator(".notice.busy").wait_for()
    page.unroute("**/v1/chat/completions")
    page.click("[data-act=retry]")  # now, not in a minute
    assert replies(page) == ["hello"]


def test_busy_server_is_asked_again(page: Any) -> None:
    answers = iter([1])

    def once(route: Any) -> None:
        if next(answers, None):
            headers = {"retry-after": "1", "content-type": "application/json"}
            route.fulfill(status=429, headers=headers, body=json.dumps({"error": {"message": "the queue is full"}}))
        else:
            route.continue_()

    page.route("**/v1/chat/completions", once)
    say(page, "hello")
    page.locator(".notice.busy").wait_for()
    assert "he queue is full" in page.locator(".notice").inner_text() and "Trying again in" in page.locator(".countdown").inner_text()
    assert replies(page) == ["hello"]


def test_server_that_is_away(page: Any) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    say(page, "hello")
    page.locator(".notice.offline").wait_for()
    page.locator("#banner").wait_for()
    page.unroute("**/v1/**")
    page.click("[data-act=reconnect]")
    page.locator("#banner").wait_for(state="hidden")
    page.click("[data-act=retry]")
    assert replies(page) == ["hello"]


def test_key_is_sent_and_kept(page: Any) -> None:
    sent: list[str | None] = []
    page.route("**/v1/**", lambda route: (sent.append(route.request.headers.get("authorization")), route.continue_()))
    page.click("#settings0")
    page.fill("[name=key]", "secret")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    say(page, "hello")
    replies(page)
    assert set(sent) == {"Bearer secret"}


def test_list_of_conversations(page: Any, tmp_path: Path) -> None:
    for text in ("about cats", "about dogs"):
        page.click("#new")
        say(page, text)
        replies(page)
    names = page.locator("#conversations .name")
    assert names.all_inner_texts() == ["about dogs", "about cats"]
    page.keyboard.press("Control+k")
    page.keyboard.type("cats")
    assert names.all_inner_texts() == ["about cats"]
    page.keyboard.press("Enter")
    assert messages(page) == ["about cats"]
    page.click(".current [data-act=rename]")
    page.keyboard.type("Felines")
    page.keyboard.press("Enter")
    assert sorted(names.all_inner_texts()) == ["Felines", "about dogs"]

    page.click("#settings0")
    with page.expect_download() as download:
        page.click("[data-act=export]")
    download.value.save_as(tmp_path / "chats.json")
    page.keyboard.press("Escape")
    for _ in range(2):
        page.hover("#conversations li")
        page.locator("[data-act=delete]").first.click()
    assert names.count() == 0
    page.set_input_files("#import-file", tmp_path / "chats.json")
    page.locator("#conversations li").nth(1).wait_for()
    assert sorted(names.all_inner_texts()) == ["Felines", "about dogs"]
    page.locator(".open", has_text="Felines").click()
    assert replies(page) == ["about cats"]


def test_theme(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.click("#theme")
    assert page.evaluate(ground) == light
    page.reload()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("width", [320, 390])
def test_phone(chromium: Any, site: Live, width: int) -> None:
    """Nothing is wider than the screen, and the list is behind a button."""
    page = chromium.new_context(viewport={"width": width, "height": 700}, is_mobile=True, has_touch=True).new_page()
    visit(page, site)
    assert not page.locator("#sidebar").is_visible()
    page.click("#compare")
    page.fill("#input", f"```\n{'long ' * 100}\n```\n\n| a | b |\n|-|-|\n| {'x' * 300} | y |\n\n{'w' * 300}")
    page.click("#send")
    replies(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.getElementById('scroll').scrollWidth <= innerWidth")
    page.click("#menu")
    page.locator("#sidebar").wait_for()
    page.context.close()


def test_right_to_left(page: Any) -> None:
    say(page, "שלום world\n\nhello שלום")
    replies(page)
    directions = page.locator(".prose p").evaluate_all("all => all.map((one) => getComputedStyle(one).direction)")
    assert directions == ["rtl", "ltr"]
    assert page.locator(".bubble p").evaluate("one => getComputedStyle(one).direction") == "rtl"


def test_what_scrolls_can_be_reached(page: Any) -> None:
    say(page, f"```\n{'long ' * 100}\n```\n\n```\nshort\n```")
    replies(page)
    page.wait_for_function("[...document.querySelectorAll('.prose pre')].map((one) => one.tabIndex).join() === '0,-1'")


def test_controls_have_names(page: Any) -> None:
    say(page, "hello")
    replies(page)
    nameless = """[...document.querySelectorAll("button, input, textarea, select")].filter((one) => !one.hidden && !(
        one.getAttribute("aria-label") || one.closest("label") || one.textContent.trim())).map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.locator("#announcer", has_text="one says: hello").wait_for(state="attached")
