"""The page in a real Chromium, over moss-tiny: what people do with it, and that no text becomes script or leads away unasked."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moss_jt.demos.drawing_server import drawing_server
from moss_jt.plugins.interface import Item, Outcome, Source
from moss_jt.plugins.registry import PluginSettings, make_plugins
from moss_jt.serve.answering import Answering
from moss_jt.serve.server import Server
from tests.support.serving import client, served, shared_moss, shared_server, slowed, url, wait_until

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

# Each sets window.attacked where it runs, or asks another server for something.
ATTACKS = [
    "<script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked = 1'>",
    "<svg onload='window.attacked = 1'></svg>",
    "<iframe srcdoc='<script>parent.attacked = 1</script>'></iframe>",
    "<a href='javascript:window.attacked = 1' class='go'>x</a>",
    "[x](javascript:window.attacked=1)",
    "[x](data:text/html,<script>window.attacked=1</script>)",
    "![x](http://127.0.0.1:9/picture.png)",
    "<img src='http://127.0.0.1:9/picture.png'>",
    "<style>body { background: url(http://127.0.0.1:9/) }</style>",
    "<form action='http://127.0.0.1:9/'><input name=password><button>log in</button></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror='window.attacked=1'>",
    "<details open ontoggle='window.attacked = 1'>",
    "<object data='javascript:window.attacked=1'></object><embed src='javascript:window.attacked=1'>",
    "<p style='position:fixed;inset:0' id='send' name='body'>covers everything</p>",
    "$\\href{javascript:window.attacked=1}{x}$ $\\url{javascript:alert(1)}$ $\\htmlData{x=1}{y}$",
    "$\\def\\a{\\a\\a}\\a$ $$\\begin{matrix}" + "{" * 500 + "$$",
    "```html\n<img src=x onerror='window.attacked = 1'>\n```",
    "`<img src=x onerror='window.attacked = 1'>`",
    "[1] [2] &lt;img src=x onerror='window.attacked=1'&gt;",
    "<" * 5000 + "[" * 5000,
]
ALLOWED = {"href", "class", "target", "rel", "title", "start", "type", "align"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened_page(browser: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page of a browser of its own, in English; and errors of its scripts, and requests to elsewhere."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1100, "height": 700})
    faults: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda asked: faults.append(asked.url) if "127.0.0.1:9/" in asked.url else None)
    yield opened, faults
    context.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    for opened, faults in opened_page(browser):
        yield opened
        assert not faults


def until(page: Any, true: str) -> None:
    """Wait for an expression. Playwright's own waiting evaluates it in the page, which the page's policy forbids."""
    assert wait_until(lambda: bool(page.evaluate(true)), 20), true


def open_page(page: Any, server: Server) -> None:
    page.goto(url(server))
    until(page, "document.getElementById('status').textContent === 'moss-tiny'")


def ask(page: Any, message: str) -> Any:
    """The turn, once it is whole."""
    turns = page.locator("article").count()
    page.fill("#message", message)
    page.press("#message", "Enter")
    page.locator("article").nth(turns).locator(".foot button").first.wait_for()
    until(page, "document.getElementById('turns').getAttribute('aria-busy') === 'false'")
    page.wait_for_timeout(300)
    return page.locator("article").nth(turns)


def test_a_conversation_with_a_plugin(page: Any) -> None:
    open_page(page, shared_server())
    turn = ask(page, "What is 37 times 48?")
    assert turn.locator(".call code").inner_text() == 'Calculate("37*48")'
    assert "1776" in turn.locator(".answer").inner_text() and turn.locator(".cite").inner_text() == "[1]"
    assert "Calculate" in turn.locator(".sources").inner_text()
    assert not turn.locator("details p").is_visible()
    turn.locator("summary").click()
    assert "calculator" in turn.locator("details p").inner_text()
    assert page.locator("#list li").first.locator(".name").inner_text() == "What is 37 times 48?"


class Web:
    """A search engine with one page."""

    name, label, function, argument, style, timeout_s = (
        "search",
        "Web search",
        "Search",
        "query",
        "items",
        9.0,
    )

    def call(self, argument: str, wanted: int) -> Outcome:
        return Outcome(
            items=(Item("the Moon old quiet bright stone.", Source("The Moon", "https://example.org/moon")),)
        )


@pytest.fixture
def with_all(tmp_path: Path) -> Iterator[Server]:
    """A server with all four plugins; another server on this machine draws."""
    with drawing_server() as address:
        settings = PluginSettings(image_url=address, picture_folder=tmp_path / "pictures")
        plugins = [Web(), *make_plugins(["calculator", "solver", "image"], settings)]
        names = [plugin.name for plugin in plugins]
        options: dict[str, Any] = {
            "plugins": plugins, "default_plugins": names, "plugin_settings": settings
        }  # fmt: skip
        with served(shared_moss(), tmp_path / "home", **options) as server:
            yield server


def test_all_four_plugins(page: Any, with_all: Server) -> None:
    open_page(page, with_all)
    turn = ask(page, "Tell me about the Moon")
    cited = turn.locator(".answer .cite").first
    assert cited.inner_text() == "[1]" and cited.get_attribute("href") == "https://example.org/moon"
    source = turn.locator(".sources a")
    assert source.inner_text() == "The Moon" and source.get_attribute("href") == "https://example.org/moon"
    assert "noopener" in source.get_attribute("rel")
    turn = ask(page, "Draw a robot drinking tea")
    turn.locator(".call img").wait_for()
    until(
        page,
        "[...document.querySelectorAll('.call img')].every((one) => one.complete && one.naturalWidth === 192)",
    )
    assert "1776" in ask(page, "What is 37 times 48?").locator(".answer").inner_text()
    until(
        page,
        "(([it]) => it.scrollHeight - it.scrollTop - it.clientHeight < 2)([document.getElementById('turns')])",
    )
    turn = ask(page, "解方程3*x+5=20")
    assert turn.locator(".call pre").inner_text() == "x = 5" and "5" in turn.locator(".answer").inner_text()
    page.reload()
    page.locator("article .call img").wait_for()
    assert page.locator("article").count() == 4


def test_it_is_there_after_a_reload_and_in_the_list(page: Any) -> None:
    open_page(page, shared_server())
    ask(page, "Hello")
    page.reload()
    page.locator("article").wait_for()
    assert page.locator(".mine").inner_text() == "Hello"
    page.click("#new")
    assert page.locator("article").count() == 0
    page.locator("#list .name", has_text="Hello").first.click()
    page.locator("article").wait_for()


def test_edit_and_another_answer(page: Any) -> None:
    open_page(page, shared_server())
    ask(page, "Hello")
    ask(page, "Thank you")
    first = page.locator("article").first
    assert first.get_by_text("Another answer").count() == 0
    first.get_by_text("Edit and ask again").click()
    assert page.input_value("#message") == "Hello"
    page.fill("#message", "Goodbye")
    page.press("#message", "Enter")
    until(page, "document.querySelectorAll('article').length === 1")
    page.evaluate("document.querySelector('article').old = true")
    page.get_by_text("Another answer").click()
    until(page, "document.querySelectorAll('article').length && !document.querySelector('article').old")
    page.get_by_text("Another answer").wait_for()
    assert page.locator(".mine").all_inner_texts() == ["Goodbye"]


def test_plugins_are_switched_for_the_conversation(page: Any) -> None:
    open_page(page, shared_server())
    calculator = page.locator("#plugins button", has_text="Calculator")
    assert calculator.get_attribute("aria-pressed") == "true"
    calculator.click()
    until(page, "document.querySelector('#plugins button').getAttribute('aria-pressed') === 'false'")
    ask(page, "Hello")
    page.locator("#plugins button", has_text="Equation solver").click()
    until(page, "document.querySelectorAll('#plugins button[aria-pressed=true]').length === 0")
    number = page.evaluate("location.hash.slice(1)")
    with client(shared_server()) as http:
        assert http.get(f"/api/conversations/{number}").json()["plugins"] == []


def test_stop_keeps_what_was_shown(page: Any) -> None:
    with slowed(shared_moss(), 0.15):
        open_page(page, shared_server())
        page.fill("#message", "Recommend three science fiction films")
        page.click("#send")
        page.locator(".answer.writing").wait_for()
        page.click("#stop")
        page.get_by_text("Stopped.").wait_for()
    page.locator("#send").wait_for()


# The stream of a turn breaks after its first pieces, as where a network goes away; and so does the first try to take it up.
BREAKING = """
    const asked = window.fetch;
    let broken = 0;
    window.fetch = async (address, options) => {
        if (!/turns$|answer/.test(address) || broken >= 2) return asked(address, options);
        if (broken++) throw new TypeError("network");
        const reader = (await asked(address, options)).body.getReader();
        let pieces = 0;
        return new Response(new ReadableStream({
            async pull(stream) {
                const {value} = await reader.read();
                if (pieces++ < 4) stream.enqueue(value);
                else stream.error(new TypeError("network"));
            },
        }));
    };
"""


def test_a_lost_connection_is_taken_up_again(page: Any) -> None:
    page.add_init_script(BREAKING)
    with slowed(shared_moss(), 0.05):
        open_page(page, shared_server())
        page.fill("#message", "Recommend three science fiction films")
        page.click("#send")
        page.get_by_text("Connection lost").wait_for()
        page.locator("article .foot button").first.wait_for()
    until(page, "document.getElementById('turns').getAttribute('aria-busy') === 'false'")
    text = page.locator(".answer").inner_text()
    assert text.count("Interstellar") == 1 and "The Matrix" in text


# A stream that first tells how far its prompt is read, and goes on when it is let.
READING = """
    const asked = window.fetch;
    const told = 'event: progress\\ndata: {"type":"progress","total":640,"processed":64,"expected_s":8.2}\\n\\n';
    window.fetch = async (address, options) => {
        if (!/turns$/.test(address)) return asked(address, options);
        const reader = (await asked(address, options)).body.getReader();
        const pieces = [new TextEncoder().encode(told)];
        return new Response(new ReadableStream({
            async pull(stream) {
                if (pieces.length) return stream.enqueue(pieces.pop());
                while (!window.goOn) await new Promise((done) => setTimeout(done, 20));
                const {value, done} = await reader.read();
                if (done) stream.close(); else stream.enqueue(value);
            },
        }));
    };
"""


def test_how_long_a_prompt_takes_is_told(page: Any) -> None:
    page.add_init_script(READING)
    open_page(page, shared_server())
    page.fill("#message", "Hello")
    page.click("#send")
    page.get_by_text("Reading: 64 of 640 tokens, about 9 s left").wait_for()
    page.evaluate("window.goOn = true")
    page.locator("article .foot button").first.wait_for()


def test_both_languages_and_themes(page: Any) -> None:
    open_page(page, shared_server())
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.click("#language")
    page.get_by_role("button", name="发送").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    ask(page, "你好")
    page.get_by_text("重新回答").wait_for()


def test_an_answer_can_be_asked_for_again_however_long_it_takes_to_end(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last event comes a moment before the server takes the next question."""
    end = Answering.end
    monkeypatch.setattr(Answering, "end", lambda answering: (time.sleep(0.5), end(answering)))
    open_page(page, shared_server())
    ask(page, "Hello")
    page.get_by_role("button", name="Another answer").wait_for()


def test_settings_are_the_conversation_s(page: Any) -> None:
    open_page(page, shared_server())
    page.click("#open-settings")
    page.fill("input[name=max_new_tokens]", "3")
    page.press("input[name=max_new_tokens]", "Enter")
    until(page, "!document.getElementById('settings').open")
    turn = ask(page, "Recommend three science fiction films")
    assert "Cut after 3 tokens" in turn.inner_text()


def test_everything_can_be_done_with_the_keyboard(page: Any, tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path) as server:  # whose list of conversations is short
        open_page(page, server)
        ask(page, "Hello")
        for name in ("Another answer", "Edit and ask again"):
            page.get_by_role("button", name=name).first.wait_for()
        check_keyboard(page)


def check_keyboard(page: Any) -> None:
    names = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        names.add(page.evaluate("document.activeElement.textContent || document.activeElement.id"))
    assert {"New chat", "Copy", "Another answer", "Edit and ask again", "message"} <= names
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button:not([hidden]), input, textarea')]"
        ".filter(e => e.checkVisibility() && !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).map(e => e.id)"
    )
    assert unnamed == []


def test_on_a_telephone_the_list_opens_and_closes(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 700})
    open_page(page, shared_server())
    assert not page.locator("#new").is_visible()
    page.click("#open-side")
    page.locator("#new").click()
    until(page, "!document.body.classList.contains('listed')")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_key_is_asked_for_and_remembered(page: Any, tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path, keys=["a-key-of-the-owner"]) as server:
        page.goto(url(server))
        page.fill("#ask-text", "a-key-of-the-owner")
        page.press("#ask-text", "Enter")
        until(page, "document.getElementById('status').textContent === 'moss-tiny'")
        ask(page, "Hello")


@pytest.fixture(scope="module")
def attacked(browser: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page for all attacks, and what went wrong in it."""
    yield from opened_page(browser)


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_no_text_becomes_script_or_leads_away(attacked: tuple[Any, list[str]], number: int) -> None:
    page, faults = attacked
    if page.url == "about:blank":
        open_page(page, shared_server())
    faults.clear()
    found = page.evaluate(
        """async (text) => {
            delete window.attacked;
            const {show} = await import("/page/markdown.js");
            const element = document.createElement("div");
            document.body.append(element);
            const sources = new Map([[1, {title: "<b>x</b>", location: "javascript:window.attacked=1"}],
                                     [2, {title: "fine", location: "https://example.org/"}]]);
            show(element, text, sources);
            for (const link of element.querySelectorAll("a")) link.addEventListener("click", (e) => e.preventDefault());
            for (const one of element.querySelectorAll("*")) one.click?.();
            await new Promise((resolve) => setTimeout(resolve, 100));
            const all = [...element.querySelectorAll("*")].filter((one) => !one.closest("math"));
            return {
                attacked: window.attacked ?? null,
                tags: [...new Set(all.map((one) => one.localName))],
                attributes: [...new Set(all.flatMap((one) => one.getAttributeNames()))],
                links: [...element.querySelectorAll("[href]")].map((one) => one.getAttribute("href")),
                left: element.remove() ?? 0,
            };
        }""",
        ATTACKS[number],
    )
    assert found["attacked"] is None and not faults
    assert not set(found["tags"]) & {
        "script",
        "style",
        "img",
        "iframe",
        "form",
        "input",
        "object",
        "embed",
        "svg",
        "details",
    }
    assert set(found["attributes"]) <= ALLOWED
    assert all(link.startswith("https://") for link in found["links"])


def test_markdown_code_and_formulas(page: Any) -> None:
    open_page(page, shared_server())
    code, table = "```python\nfor x in y:\n    pass\n```", "| a | b |\n|---|---|\n| 1 | 2 |"
    text = f"# Title\n\n**bold** `code`\n\n{code}\n\n{table}\n\n$x^2$ and $5 and $6"
    html = page.evaluate(
        """async (text) => {
            const {show} = await import("/page/markdown.js");
            const element = document.createElement("div");
            show(element, text);
            return element.innerHTML;
        }""",
        text,
    )
    for expected in (
        "<h1>Title</h1>",
        "<strong>bold</strong>",
        "hljs-keyword",
        "<table>",
        "<msup>",
        "$5 and $6",
    ):
        assert expected in html, html


def test_what_users_and_titles_say_stays_text(page: Any) -> None:
    open_page(page, shared_server())
    attack = "<img src=x onerror='window.attacked=1'>"
    ask(page, attack)
    assert page.locator(".mine").inner_text() == attack
    assert (
        page.evaluate("window.attacked ?? null") is None
        and page.locator("#turns img:not(.lamp)").count() == 0
    )
