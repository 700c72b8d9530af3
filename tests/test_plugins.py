"""The plugins: recorded answers reproduced, hostile commands survived, every backend met on loopback."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.plugins import execute
from moss_jt.plugins.calculator import CalculationError, calculate
from moss_jt.plugins.calls import Call, parse_commands
from moss_jt.plugins.folder_search import FolderSearch, passages, terms
from moss_jt.plugins.image import ImagePlugin, file_stem
from moss_jt.plugins.interface import Item, Outcome, Source, Style
from moss_jt.plugins.numbered_results import body_of
from moss_jt.plugins.registry import PluginSettings, make_plugins
from moss_jt.plugins.run import MAX_CALLS, call_with_limit, iterate_results, run_commands
from moss_jt.plugins.search import Search, make_search
from moss_jt.plugins.solver import Solver, solve
from moss_jt.plugins.web_search import Ddgs, SearXNG, Serper
from tests.support.shared import shared

# ---- commands


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("None", []),
        ("None.", []),
        ("None (This question doesn't require a search)", []),
        ("Non", []),
        ("", []),
        ('Calculate("1+2")', [("Calculate", "1+2")]),
        ('Search("a"), Search("b")', [("Search", "a"), ("Search", "b")]),
        ('Search("a") ,\nSearch("b"),', [("Search", "a"), ("Search", "b")]),
        ('Search("a"), None', [("Search", "a")]),
        ('1. Search("a") # first\n2. Calculate("(1+2)*3")', [("Search", "a"), ("Calculate", "(1+2)*3")]),
        ('Search("the "inner" quotes")', [("Search", 'the "inner" quotes')]),
        ('Solve("x+y=1;x-y=2", "x")', [("Solve", 'x+y=1;x-y=2", "x')]),
        ('Count("words (all)")', [("Count", "words (all)")]),
        ("Search('single')", [("Search", "single")]),
        ("Search(“curly”)", [("Search", "curly")]),
        ('Search("never closed', []),
        ('Search(no quotes), Calculate("1")', [("Calculate", "1")]),
        ('("nameless")', []),
    ],
)
def test_calls_are_found_in_what_models_write(text: str, calls: list[tuple[str, str]]) -> None:
    assert [(call.function, call.argument) for call in parse_commands(text)] == calls


def recorded_turns() -> Iterator[dict[str, str]]:
    for path in sorted(shared("data").glob("plugin_dialogues_*.json")):
        for dialogue in json.loads(path.read_text(encoding="utf-8")):
            yield from dialogue["turns"]


def test_every_recorded_command_is_found() -> None:
    """The Results field repeats each call that the service ran, so it says which calls there are."""
    turns = 0
    for turn in recorded_turns():
        commands = turn["Commands"].removeprefix("<|Commands|>:").removesuffix("<eoc>\n")
        answered = re.findall(r"^(\w+\(\".*\"\)) =>", turn["Tool Responses"], re.MULTILINE)
        actual = [call.text for call in parse_commands(commands)]
        if answered:
            turns += 1
            assert [text for text in answered if text not in actual] == []
    assert turns > 300


def recorded_calculations() -> list[tuple[str, str]]:
    pattern = re.compile(r'^Calculate\("(.*)"\) => (.*)$', re.MULTILINE)
    return [match for turn in recorded_turns() for match in pattern.findall(turn["Tool Responses"])]


@pytest.mark.parametrize("commands", [None, 3, b'Calculate("1")', ["Calculate"]])
def test_commands_that_are_no_text_are_named(commands: Any) -> None:
    with pytest.raises(MossError, match=f"^commands is {re.escape(repr(commands))}; it must be text"):
        execute(commands, ["calculator"])


def test_recorded_calculations_come_out_as_recorded() -> None:
    """98 % or more. Two older forms in the mixed dialogues (bare numbers, other words for no result) count by value, and
    where the record has no result for what can be computed, ours may have one."""
    right, wrong = 0, []
    for expression, recorded in recorded_calculations():
        ours = execute(f'Calculate("{expression}")', ["calculator"]).removeprefix(
            f'Calculate("{expression}") => '
        )
        value, ours_value = recorded.strip("'"), ours.strip("'")
        if value in ("No result.", "No calculation results."):
            right += 1
        elif ours == recorded or (not recorded.startswith("'") and value == ours_value):
            right += 1
        else:
            wrong.append((expression, recorded, ours))
    assert right + len(wrong) == 145
    assert right / 145 >= 0.98, wrong


def test_recorded_solutions_come_out_as_recorded() -> None:
    """All that the service solved."""
    pattern = re.compile(r'(Solve\(".*?"\)) =>\n((?:(?!Solve|Calculate|<eor>|Search|No result).+\n)+)')
    solved = [match for turn in recorded_turns() for match in pattern.findall(turn["Tool Responses"])]
    assert len(solved) >= 30
    wrong = [
        (call, lines, ours)
        for call, lines in solved
        if (ours := execute(call, ["solver"])) != f"{call} =>\n{lines}".strip()
    ]
    assert wrong == []


# ---- calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("8*4+3", "35"),
        ("-7", "-7"),
        ("(12/2)*(2*6+(12-1)*3)", "270.0"),
        ("6^3-5^3", "91"),
        ("p=(1300+700+1100)/2;sqrt(p*(p-1300)*(p-700)*(p-1100))", "384991.88303131796"),
        ("0.5*8*15*sin(30)", "-59.28189744557171"),
        ("floor((500-80-90-95)/110)+3", "5"),
        ("math.sqrt(2)", "1.4142135623730951"),
        ("2**0.5", "1.4142135623730951"),
        ("7//2", "3"),
        ("pow(2, 10)", "1024"),
        ("factorial(20)", "2432902008176640000"),
        ("2^1000", str(2**1000)),
    ],
)
def test_arithmetic(expression: str, value: str) -> None:
    assert calculate(expression) == value


HOSTILE_EXPRESSIONS = [
    "9**9**9**9",
    "9^9^9",
    "2**100000",
    "(-2)**99999",
    "factorial(100000)",
    "comb(10**9, 5*10**8)",
    "1<<10**9",
    "10**400*1.0",
    "1/0",
    "0**-1",
    "(-1)**0.5",
    "__import__('os').system('true')",
    "().__class__.__bases__",
    "open('/etc/passwd')",
    "math.__dict__",
    "lambda: 1",
    "[x for x in range(10**9)]",
    "a" * 5000,
    "(" * 500 + "1" + ")" * 500,
    "-" * 900 + "1",
    "2**" * 300 + "2",
    "1 if 2 else 3",
    "'a'*10**9",
    "1==1",
    "2.5!",
    "3!!",
    "50%",
    "x",
    "int('9'*9999)",
    "max(*[1])",
    "round(1.5, ndigits=1)",
    "for i in x: pass",
    "exec",
    "1e308*10",
    "\x00",
    "sqrt",
    "round(10**300, -(10**18))",
    "f'{1}'",
    "1+1 # comment\nimport os",
    "(y:=5)",
]


@pytest.mark.parametrize("expression", HOSTILE_EXPRESSIONS)
def test_hostile_arithmetic_is_refused_at_once(expression: str) -> None:
    begin = time.process_time()
    body = execute(f'Calculate("{expression}")', ["calculator"])
    assert time.process_time() - begin < 2
    assert body.endswith("=> 'No result.'") or body.endswith("=> 'inf'") or body == "None"


# ---- solver


@pytest.mark.parametrize(
    ("equations", "lines"),
    [
        ("x+y=35;2x+4y=94", "x = 23\ny = 12"),
        ("x^2=144", "x_0 = -12\nx_1 = 12"),
        ("3x=10", "x = 10/3"),
        ("2(x+1)=7x", "x = 2/5"),
        ("0.5x=65", "x = 130.000000000000"),
        ("12*20*x=960", "x = 4"),
        ("x^2=15", "x_0 = -sqrt(15)\nx_1 = sqrt(15)"),
        ("xy=6", "xy = 6"),
        ("x+y=3, x-y=1, z=x", "x = 2\ny = 1\nz = 2"),
        ("π=x", "x = 3.14159265358979"),
        ("2.5x+1.5y=50;x+y=?", None),
        ("x+y=1", None),
        ("x=1;x=2", None),
        ("1=1", None),
        ("x=x", None),
        ("__import__('os')=1", None),
        ("x.is_real=1", None),
        ("lambda=1;", "lambda = 1"),
        ("x^(10^9)=2", None),
        ("9^9^9^9*x=1", None),
        ("((((((((((((((((((((((((((((((((((((((((((x=1", None),
        ("x" * 600, None),
    ],
)
def test_equations(equations: str, lines: str | None) -> None:
    assert solve(equations, 10) == lines


def test_an_equation_that_takes_too_long_is_given_up_and_the_next_is_solved() -> None:
    begin = time.monotonic()
    hard = "x^31+y^29=1;x^23-x*y^17=3;y^19+x^7=z^11"
    assert solve(hard, 0.3) is None
    assert time.monotonic() - begin < 60
    assert solve("x+1=2", 30) == "x = 1"


# ---- results in the trained form


class Fake:
    """A plugin that does what a test tells it."""

    timeout_s = 0.2

    def __init__(self, function: str, style: Style, answer: Any) -> None:
        self.name = self.label = self.function = function
        self.argument = "x"
        self.style = style
        self.answer = answer

    def call(self, argument: str, wanted: int) -> Outcome:
        return self.answer(argument, wanted) if callable(self.answer) else self.answer


def results(count: int) -> Outcome:
    return Outcome(
        items=tuple(Item(f"text {n}", Source(f"title {n}", f"http://x/{n}")) for n in range(count))
    )


def test_items_are_numbered_through_the_turn_and_fewer_for_more_queries() -> None:
    search = Fake("Search", "items", lambda argument, wanted: results(wanted))
    actual = run_commands('Search("a"), Search("b")', [search])
    assert body_of(actual) == (
        "Search(\"a\") =>\n<|1|>: 'text 0'\n<|2|>: 'text 1'\nSearch(\"b\") =>\n<|3|>: 'text 0'\n<|4|>: 'text 1'"
    )
    assert [result.numbers for result in actual] == [(1, 2), (3, 4)]
    assert actual[1].sources[0].location == "http://x/0"
    assert len(run_commands('Search("a")', [search])[0].numbers) == 3
    assert [len(r.numbers) for r in run_commands('Search("a"), Search("b"), Search("c")', [search])] == [
        1,
        1,
        1,
    ]


def test_items_are_quoted_as_python_does_and_cut() -> None:
    texts = ["it's", 'say "hi"', "both ' and \"", "中文\n" + "长" * 500]
    answer = Outcome(items=tuple(Item(text, Source("", "")) for text in texts))
    lines = body_of(run_commands('Search("q")', [Fake("Search", "items", answer)])).split("\n")[1:]
    assert lines[:3] == ['<|1|>: "it\'s"', "<|2|>: 'say \"hi\"'", "<|3|>: 'both \\' and \"'"]
    assert lines[3].startswith("<|4|>: '中文\\n长长") and len(lines[3]) < 420


def test_failures_are_the_no_result_that_the_model_knows() -> None:
    release = threading.Event()

    def broken(argument: str, wanted: int) -> Outcome:
        raise SystemError("boom")

    def endless(argument: str, wanted: int) -> Outcome:
        release.wait(20)
        return results(1)

    assert body_of(run_commands('A("x")', [Fake("A", "value", broken)])) == "A(\"x\") => 'No result.'"
    assert body_of(run_commands('A("x")', [Fake("A", "lines", Outcome())])) == 'A("x") =>\nNo result.'
    assert body_of(run_commands('A("x")', [Fake("A", "items", Outcome())])) == 'A("x") =>\nNo result.'
    assert body_of(run_commands('Nope("x")', [])) == 'Nope("x") =>\nNo result.'
    assert (
        body_of(run_commands('A("x")', [Fake("A", "lines", lambda argument, wanted: "no outcome")]))
        == 'A("x") =>\nNo result.'
    )
    begin = time.monotonic()
    assert call_with_limit(Fake("A", "lines", endless), "x", 1) == Outcome()
    assert time.monotonic() - begin < 10
    release.set()
    assert body_of([]) == "None"


def test_calls_beyond_the_cap_are_not_run() -> None:
    calls = [Call("A", str(n)) for n in range(50)]
    assert len(list(iterate_results(calls, [Fake("A", "value", Outcome("1"))]))) == MAX_CALLS


def test_execute_is_the_public_way() -> None:
    assert (
        execute('Calculate("8*4+3"), Calculate("-7")', ["calculator"])
        == "Calculate(\"8*4+3\") => '35'\nCalculate(\"-7\") => '-7'"
    )
    assert execute("None", ["calculator"]) == "None"
    with pytest.raises(MossError, match="calculator"):
        execute("None", ["abacus"])


def test_settings_that_are_missing_are_said(tmp_path: Path) -> None:
    with pytest.raises(MossError, match="--image-url"):
        make_plugins(["image"])
    with pytest.raises(MossError, match="is not a folder"):
        make_plugins(["search"], PluginSettings(search_folder=tmp_path / "none"))
    with pytest.raises(MossError, match="http://host:port"):
        make_plugins(["search"], PluginSettings(search_url="file:///etc"))


# ---- search in a folder


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "penguins.txt").write_text(
        "Emperor penguins breed in the Antarctic winter. They dive to 500 metres.\n"
    )
    (folder / "茶.md").write_text("龙井茶产于杭州西湖。乌龙茶来自福建和台湾。", encoding="utf-8")
    (folder / "旧.txt").write_bytes("长城修建于明朝。".encode("gb18030"))
    (folder / "picture.txt").write_bytes(b"\x89PNG\0\0penguins")
    (folder / ".hidden.txt").write_text("penguins in hiding")
    (folder / "program.exe").write_text("penguins")
    (folder / "link.txt").symlink_to("/etc/passwd")
    return folder


def test_a_folder_is_searched_in_both_languages(library: Path, tmp_path: Path) -> None:
    search = FolderSearch(library, tmp_path / "index")
    assert [Path(i.source.location).name for i in search.search("how deep do penguins dive?", 3)] == [
        "penguins.txt"
    ]
    assert search.search("龙井茶产于哪里", 3)[0].source.title == "茶.md"
    assert search.search("明朝 长城", 3)[0].text == "长城修建于明朝。"
    assert search.search("root", 3) == []
    assert search.search('"; DROP TABLE passages; --', 3) == []
    assert search.search("AND OR NOT NEAR ( *", 3) == []
    search.close()


def test_the_index_follows_the_files(library: Path, tmp_path: Path) -> None:
    search = FolderSearch(library, tmp_path / "index")
    (library / "new.txt").write_text("Capybaras like warm water.")
    assert search.search("capybaras", 3)[0].source.title == "new.txt"
    (library / "new.txt").write_text("Wombats like burrows instead of water.")
    assert search.search("capybaras", 3) == []
    assert search.search("wombats", 3)
    (library / "new.txt").unlink()
    assert search.search("wombats", 3) == []
    search.close()
    again = FolderSearch(library, tmp_path / "index")
    assert len(again.search("penguins", 3)) == 1
    again.close()


def test_passages_and_terms() -> None:
    assert terms("Hello 世界你好 x2") == ["hello", "世界", "界你", "你好", "x2"]
    assert terms("茶") == ["茶"]
    text = "A sentence. " * 100 + "长" * 900
    texts = list(passages(text))
    assert all(len(passage) <= 300 for passage in texts)
    assert "".join(texts).replace(" ", "") == text.replace(" ", "")


def test_search_through_the_plugin_in_trained_form(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    plugins = make_plugins(["search"], PluginSettings(search_folder=library))
    body = body_of(run_commands('Search("乌龙茶")', plugins))
    assert body == "Search(\"乌龙茶\") =>\n<|1|>: '龙井茶产于杭州西湖。乌龙茶来自福建和台湾。'"


# ---- servers on loopback


@contextmanager
def server(answers: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """An HTTP server: path -> JSON, bytes, or a status; and the bodies that it got."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer()

        def answer(self) -> None:
            actual = answers.get(self.path.split("?")[0], 404)
            status, location = (actual, None) if isinstance(actual, int) else (200, None)
            if isinstance(actual, str):
                status, location = 302, actual
            data = actual if isinstance(actual, bytes) else json.dumps(actual).encode()
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", got
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_searxng() -> None:
    actual = {
        "results": [
            {"title": "T", "url": "http://t", "content": "a <b>bold</b> &amp; text"},
            {"content": 5},
            "x",
        ]
    }
    with server({"/search": actual}) as (address, _):
        assert Search(SearXNG(address)).call("q", 3).items == (
            Item("a bold & text", Source("T", "http://t")),
        )
    with server({"/search": [1, 2]}) as (address, _):
        assert Search(SearXNG(address)).call("q", 3) == Outcome()


def test_serper_and_its_answer_box() -> None:
    organic = {
        "organic": [{"title": "A", "link": "http://a", "snippet": "one"}, {"title": "B", "snippet": "two"}]
    }
    with server({"/search": organic}) as (address, got):
        assert [item.text for item in Serper("key", address).search("q", 3)] == ["one", "two"]
        assert got == [{"q": "q"}]
    box = {"answerBox": {"title": "Beijing / Population", "answer": "21.54 million (2018)"}}
    with server({"/search": box}) as (address, _):
        body = body_of(run_commands('Search("q")', [Search(Serper("key", address))]))
        assert body == "Search(\"q\") =>\n<|1|>: Beijing / Population: '21.54 million (2018)'"


def test_ddgs_is_asked_as_its_package_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    ddgs = pytest.importorskip("ddgs")
    asked = []

    class Stand:
        def __init__(self, timeout: int) -> None:
            assert timeout <= 20

        def text(self, query: str, max_results: int) -> list[dict[str, str]]:
            asked.append((query, max_results))
            return [{"title": "T", "href": "http://t", "body": "text"}]

    assert callable(ddgs.DDGS.text)
    monkeypatch.setattr(ddgs, "DDGS", Stand)
    assert Ddgs().search("q", 2) == [Item("text", Source("T", "http://t"))]
    assert asked == [("q", 2)]


def test_which_search_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    assert isinstance(make_search(None, "http://x").backend, SearXNG)
    monkeypatch.setenv("SERPER_API_KEY", "k")
    assert isinstance(make_search(None, None).backend, Serper)


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize("kind", ["automatic1111", "openai", "openai-address"])
def test_pictures_are_saved_and_named(tmp_path: Path, kind: str) -> None:
    text = base64.b64encode(PNG).decode()
    answers: dict[str, Any] = {
        "automatic1111": {"/sdapi/v1/txt2img": {"images": [text]}},
        "openai": {"/v1/images/generations": {"data": [{"b64_json": text}]}},
        "openai-address": {"/v1/images/generations": {"data": [{"url": None}]}, "/picture": PNG},
    }[kind]
    with server(answers) as (address, got):
        if kind == "openai-address":
            answers["/v1/images/generations"]["data"][0]["url"] = f"{address}/picture"
        plugin = ImagePlugin(address, tmp_path)
        actual = run_commands('Text2Image("a ../../rock, 岩石")', [plugin])
    assert body_of(actual) == "Image generated successfully."
    picture = actual[0].picture
    assert picture is not None and picture.parent == tmp_path and picture.read_bytes() == PNG
    assert picture.name.startswith("a-rock-岩石-")
    assert got[-1]["prompt"] == "a ../../rock, 岩石"


def test_what_is_no_picture_is_no_result(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(PNG)
    text = base64.b64encode(b"<html>").decode()
    for answers in (
        {"/sdapi/v1/txt2img": {"images": [text]}},
        {"/sdapi/v1/txt2img": {"images": []}},
        {"/sdapi/v1/txt2img": {"images": ["!!"]}},
        {"/sdapi/v1/txt2img": 500},
        {"/v1/images/generations": {"data": [{"url": secret.as_uri()}]}},
        {"/v1/images/generations": {"data": [{"url": "http://127.0.0.1:9/x"}]}},
        {"/sdapi/v1/txt2img": secret.as_uri()},
    ):
        with server(answers) as (address, _):
            actual = run_commands('Text2Image("x")', [ImagePlugin(address, tmp_path / "out")])
        assert body_of(actual).endswith("No result."), answers
    assert not (tmp_path / "out").exists()
    assert file_stem("../..") == "picture"


# ---- fuzz

FUZZ = r"""
import json, random, sys
from moss_jt.plugins import execute
from moss_jt.plugins.solver import solve
import moss_jt.plugins.calculator

solve("x=1", 60)  # the worker is started before anything is watched
touched = []
WATCHED = ("open", "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "shutil.", "ctypes.")
def watch(event, arguments):
    if event.startswith(WATCHED) or (event == "import" and not str(arguments[0]).startswith(("moss_jt", "unicodedata"))):
        touched.append((event, str(arguments)[:80]))
    if event == "exec":
        touched.append((event, str(arguments)[:80]))
sys.addaudithook(watch)
random.seed(7)
PIECES = ["1", "9", "99999999999999999999", "0x10", "1e999",
    ".", "+", "-", "*", "**", "^", "/", "//", "%", "(", ")", "((((", "))))", "[", "]",
    "sqrt(", "round(", "factorial(", "comb(", "x", "y", "=", "==", ";", ",", "__import__", "('os')",
    ".system", "eval(", "exec(", "open('/etc/passwd')",
    "lambda:", "𝟏", "１", "ｅval", "\u200b", "\x00", "'", '"', "\\", "\n", " ", "{", "}", "@",
    "!", "~", "|", "√", "½", "²", "万", ",000", " 000", "'000", " 1/2", "<<", ">>", "for", "in", "if", "else", "π", "数"]
for number in range(3000):
    text = "".join(random.choice(PIECES) for _ in range(random.randint(1, 40)))
    name = random.choice(["Calculate", "Calculate", "Calculate", "Search", "Text2Image", "None", "__import__"])
    body = execute(f'{name}("{text}")', ["calculator"])
    assert isinstance(body, str) and len(body) < 10_000
for number in range(300):
    text = "".join(random.choice(PIECES) for _ in range(random.randint(1, 25))) + random.choice(["", "=1", "x=2"])
    solve(text, 5)
print(json.dumps(touched))
"""


def test_fuzzed_commands_crash_nothing_and_touch_nothing() -> None:
    """3000 calculations and 300 equations of hostile pieces in one process whose every file, socket and import is watched."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FUZZ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []


def test_random_bytes_as_commands_never_raise() -> None:
    draw = np.random.default_rng(3)
    for _ in range(300):
        text = bytes(draw.integers(0, 256, 200, dtype=np.uint8)).decode("utf-8", "replace")
        parse_commands(text + '("' * 30 + text + '")')
    assert len(parse_commands('A("x")' * 10_000)) > 1000


def test_a_worker_ends_with_its_program() -> None:
    program = "from moss_jt.plugins import solver\nsolver.solve('x=1', 60)\nprint(solver._worker.process.pid)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_calculation_errors_say_what_is_wrong() -> None:
    with pytest.raises(CalculationError, match="unknown"):
        calculate("nothing(3)")
    assert Solver().call("x=", 1) == Outcome()
