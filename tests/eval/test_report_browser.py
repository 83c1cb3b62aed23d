"""The page in a real browser: it shows what it should, asks nobody for anything, and fits on a phone."""

import os

import pytest
from browser import Browser, find_browser
from record_factory import MANIFEST, NEEDLES, synthetic_run

from kvpress_eval.report import summarize
from kvpress_eval.report.html import to_html

TASKS = ("ruler/niah_single_3", "ruler/niah_multiquery", "ruler/qa_1", NEEDLES)
SECTIONS = [
    "Findings",
    "Macro scores",
    "Score by measured bytes",
    "Differences of each task",
    "Every task and arm",
    "Score by depth",
    "Retention",
    "Noise floor",
    "Cost",
    "Worst losses",
    "How to read it",
    "Manifest",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(summarize(synthetic_run(n_samples=5, tasks=TASKS), MANIFEST)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        if os.environ.get("KVPRESS_REQUIRE_BROWSER") == "1":
            pytest.fail("KVPRESS_REQUIRE_BROWSER=1, but there is no chromium; install it or set KVPRESS_BROWSER")
        pytest.skip("no chromium here; install it or set KVPRESS_BROWSER")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["desktop", "phone"])
def opened(browser, page, request):
    browser.events.clear()
    browser.open(page, width=request.param[0], scheme=request.param[1])
    return browser


def complaints(browser):
    """Messages on the console, refused contents and exceptions."""
    methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    return [event for event in browser.events if event.get("method") in methods]


def test_nothing_is_complained_about_and_nothing_is_loaded(opened, page):
    opened.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    assert complaints(opened) == []
    asked = [
        event["params"]["request"]["url"]
        for event in opened.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert asked == [page]


def test_the_watch_over_console_and_network_is_awake(browser, tmp_path):
    """The same watch does see a message, a refused script and a request on a page that has them."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta http-equiv="Content-Security-Policy" content="script-src \'nonce-x\'">'
        '<script nonce="x">console.log("hello")</script><script>alert(1)</script><img src="missing.png">'
    )
    browser.events.clear()
    browser.open(bad.as_uri())
    assert len(complaints(browser)) >= 2
    assert sum(event.get("method") == "Network.requestWillBeSent" for event in browser.events) == 2


def test_all_sections_are_there(opened):
    assert opened.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == SECTIONS
    assert "synthetic-0.5b-instruct" in opened.evaluate("document.querySelector('h1').textContent")
    targets = "[...document.querySelectorAll('nav a')].every((a) => document.querySelector(a.getAttribute('href')))"
    assert opened.evaluate(targets)


def test_plots_have_a_size_and_colours(opened):
    sizes = opened.evaluate(
        "[...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect()).map((b) => [b.width, b.height])"
    )
    assert len(sizes) == 4 + 2 + 2  # scores of two families in two modes, differences of one, depths of the other
    assert all(width > 200 and height > 100 for width, height in sizes)
    stroke = "getComputedStyle(document.querySelector('figure svg path[style*=\"--series-1\"]')).stroke"
    assert opened.evaluate(stroke).startswith("rgb(")


def test_the_page_is_never_wider_than_its_window(opened):
    opened.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    width, window = opened.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window
    # wide tables are still there: they scroll inside their own boxes
    assert opened.evaluate("[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)")


def test_light_and_dark_differ_and_text_is_readable(browser, page):
    contrasts = {}
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        style = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        contrasts[scheme] = [brightness(colour) for colour in browser.evaluate(style)]
    ink, paper = contrasts["light"]
    assert ink < 0.2 < 0.8 < paper
    ink, paper = contrasts["dark"]
    assert paper < 0.2 < 0.8 < ink


def brightness(colour):
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def test_the_table_of_all_rows_sorts_and_filters(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('#rows tbody tr')].filter((row) => !row.hidden)"
    everything = browser.evaluate(f"{shown}.length")
    browser.evaluate(
        "(() => { const field = document.getElementById('filter'); field.value = 'qa_1 query-aware';"
        " field.dispatchEvent(new Event('input')) })()"
    )
    tasks = browser.evaluate(f"{shown}.map((row) => row.cells[0].textContent + ' ' + row.cells[2].textContent)")
    assert 0 < len(tasks) < everything
    assert set(tasks) == {"ruler/qa_1 query-aware"}
    browser.evaluate("document.querySelectorAll('#rows thead button')[4].click()")
    values = browser.evaluate(f"{shown}.map((row) => Number(row.cells[4].dataset.value))")
    assert values == sorted(values)
    browser.evaluate("document.querySelectorAll('#rows thead button')[4].click()")
    assert browser.evaluate(f"{shown}.map((row) => Number(row.cells[4].dataset.value))") == sorted(values, reverse=True)
