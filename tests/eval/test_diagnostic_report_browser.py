"""The page of a diagnostic run in a real browser: nothing complains, nothing is loaded, everything is there at both widths."""

import os

import pytest
from browser import Browser, find_browser
from finding_factory import SWAPS, TASKS, manifest, synthetic_run

from kvpress_eval.diagnostic.report import summarize, to_html
from kvpress_eval.diagnostic.sign_settings import SignSettings

SECTIONS = [
    "Findings",
    "Lost answers by stage",
    "Stage ladder",
    "Cells and signs",
    "Leverage",
    "Trajectories over budgets",
    "Measures of the stages",
    "Boundary",
    "Coupling",
    "Samples worth a look",
    "How to read it",
    "Manifest",
]
OPEN_ALL = "document.querySelectorAll('details').forEach((part) => { part.open = true })"


@pytest.fixture(scope="module")
def summary():
    settings = SignSettings(repeats=4, n_permutations=20, n_studies=2)
    swaps = {name: SWAPS[name] for name in ("cumulative", "nolev", "mii", "blocks")}
    run = synthetic_run(n_samples=5, tasks=tuple(TASKS)[:5], arms=("snapkv", "null", "oracle", *swaps))
    return summarize([(run, manifest(swaps=swaps))], settings=settings)


@pytest.fixture(scope="module")
def page(tmp_path_factory, summary):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(summary), encoding="utf-8")
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


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def opened(browser, page, request):
    browser.events.clear()
    browser.open(page, width=request.param)
    browser.evaluate(OPEN_ALL)
    return browser


def test_nothing_is_complained_about_and_nothing_is_loaded(opened, page):
    methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in opened.events if event.get("method") in methods] == []
    asked = [
        one["params"]["request"]["url"] for one in opened.events if one.get("method") == "Network.requestWillBeSent"
    ]
    assert asked == [page]


def test_all_sections_are_there_and_in_the_contents(opened):
    assert opened.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == SECTIONS
    links = "[...document.querySelectorAll('nav a')].map((a) => a.getAttribute('href').slice(1))"
    ids = "[...document.querySelectorAll('h2')].map((h) => h.id)"
    assert opened.evaluate(links) == opened.evaluate(ids)


def test_the_page_is_never_wider_than_its_window(opened):
    width, body, window = opened.evaluate(
        "[document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]"
    )
    assert max(width, body) <= window
    # what is wider scrolls inside its own box
    assert opened.evaluate("[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)")


def test_the_findings_come_first_and_are_those_of_the_summary(opened, summary):
    assert opened.evaluate("[...document.querySelectorAll('ol.head li')].map((li) => li.textContent)") == summary.head
    first = "document.querySelector('main').children[1].className"
    assert opened.evaluate(first) == "head"


def test_every_figure_is_drawn_and_says_what_it_cannot_say(opened):
    figures = opened.evaluate(
        "[...document.querySelectorAll('figure')].map((f) => [f.querySelector('.cannot').textContent, "
        "f.querySelector('svg').getBoundingClientRect().width, f.querySelector('svg').getBoundingClientRect().height])"
    )
    assert len(figures) == 8  # verdicts, three ladders, margins, trajectories, layers, coupling
    for told, width, height in figures:
        assert told.startswith("What it cannot say: ")
        assert len(told) > 60
        assert width > 300
        assert height > 100


def test_numbers_stand_to_the_right_and_ink_is_dark_on_white(opened):
    aligned = (
        "[...document.querySelectorAll('tbody td:not(.left):not(.text)')].map((c) => getComputedStyle(c).textAlign)"
    )
    found = opened.evaluate(aligned)
    assert len(found) > 500
    assert set(found) == {"right"}
    style = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    assert opened.evaluate(style) == ["rgb(22, 25, 29)", "rgb(255, 255, 255)"]


def test_hostile_predictions_are_text(opened):
    """Sample 1 of every task answers with markup; it is among the texts, and no element was made of it."""
    texts = opened.evaluate("[...document.querySelectorAll('.answers p')].map((p) => p.textContent)")
    assert any("<script>alert" in text for text in texts)
    assert opened.evaluate("document.querySelectorAll('script').length") == 1
    assert opened.evaluate("document.querySelectorAll('main script, main img, main iframe').length") == 0


def test_the_table_of_swaps_filters_and_sorts(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('#steps-query_aware tbody tr')].filter((row) => !row.hidden)"
    everything = browser.evaluate(f"{shown}.length")
    browser.evaluate(
        "(() => { const field = document.querySelector('input[data-filters]'); field.value = 'transfer';"
        " field.dispatchEvent(new Event('input')) })()"
    )
    arms = browser.evaluate(f"{shown}.map((row) => row.cells[0].textContent)")
    assert 0 < len(arms) < everything
    assert set(arms) == {"blocks"}
    browser.evaluate("document.querySelectorAll('#steps-query_aware thead button')[6].click()")
    values = browser.evaluate(f"{shown}.map((row) => Number(row.cells[6].dataset.value))")
    assert values == sorted(values)
    assert len(set(values)) > 1
