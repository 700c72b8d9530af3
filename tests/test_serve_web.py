"""The page's files, and what a browser is told about them."""

from pathlib import Path

from moss_jt.serve import web
from tests.support.serving import client, shared_server


def test_only_files_of_known_kinds_are_served(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    for name in (
        "index.html",
        "page.js",
        "lib/a.mjs",
        "lib/a.css",
        "notes.md",
        ".hidden",
        "script.py",
        "index.html~",
    ):
        (tmp_path / name).write_text(name)
    pages = web.page_files(tmp_path)
    assert set(pages) == {"index.html", "page.js", "lib/a.mjs", "lib/a.css"}
    assert pages["lib/a.mjs"] == ("text/javascript; charset=utf-8", b"lib/a.mjs")
    assert web.page_files(tmp_path / "nothing") == {}


def test_no_path_leads_out_of_the_page() -> None:
    with client(shared_server()) as http:
        for path in (
            "/page/../app.py",
            "/page/%2e%2e/app.py",
            "/page/..%2fapp.py",
            "/page//etc/passwd",
            "/page/%00",
        ):
            assert http.get(path).status_code == 404


def test_the_policy_lets_no_script_in_and_nothing_out() -> None:
    rules = dict(rule.split(" ", 1) for rule in web.POLICY.split("; "))
    assert (
        rules["default-src"] == "'none'"
        and rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    )
    assert "unsafe" not in web.POLICY and "*" not in web.POLICY and "data:" not in web.POLICY
    assert web.HEADERS["X-Content-Type-Options"] == "nosniff"
