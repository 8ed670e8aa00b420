"""The built book, page by page, in a browser that may not leave this machine.

What is asked of every page: nothing it loads is missing or comes from the network, nothing it
runs complains, every equation is typeset, every picture is there and described, every link
inside the book leads somewhere, and neither a phone nor a desktop has to scroll sideways.

The pages are those in ``_build/html`` (``make book``). The browser is the one that
``QMRI_CHROMIUM`` names, else the Chromium or Chrome on the path, else Playwright's own.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
import yaml
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    ElementHandle,
    Error,
    Page,
    Playwright,
    Response,
    Route,
    sync_playwright,
)

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.glob("**/*.html"))
PAGES = [page for page in PAGES if not page.startswith("_static/")]
CHART_PAGES = [p for p in PAGES if 'class="vega-chart' in (HTML / p).read_text(encoding="utf-8")]

NO_BROWSER = (
    "no Chromium found: install one (apt-get install chromium, brew install chromium, or "
    ".venv/bin/playwright install chromium) or name it in QMRI_CHROMIUM"
)

TYPESET = """() => {
  const equations = [...document.querySelectorAll(".math")];
  return {
    found: equations.length,
    typeset: equations.filter((e) => e.querySelector("mjx-container")).length,
    errors: [...document.querySelectorAll("mjx-merror, merror, [data-mjx-error]")].map(
      (e) => e.getAttribute("data-mjx-error") || e.textContent),
  };
}"""

PICTURES = """() => [...document.querySelectorAll("main img")].map((img) => ({
  src: img.getAttribute("src"), alt: (img.alt || "").trim(), width: img.naturalWidth,
}))"""

WIDTH = "() => document.scrollingElement.scrollWidth"

WIDEST = """() => [...document.querySelectorAll("main *")]
  .map((e) => [Math.round(e.getBoundingClientRect().right), e.tagName + "." + e.className])
  .sort((a, b) => b[0] - a[0]).slice(0, 3)"""


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves the book without writing a line for every request."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@dataclass
class Visit:
    """One page held open, and what went wrong while it loaded."""

    page: Page
    failed: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def built() -> None:
    """Refuse to test a book that was not built."""
    if not (HTML / "index.html").exists():
        pytest.fail("the book is not built: run `make book` first")


@pytest.fixture(scope="session")
def server(built: None) -> Iterator[str]:
    """Serve the built book on this machine; yields its address."""
    handler = functools.partial(QuietHandler, directory=HTML)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


def launch(playwright: Playwright) -> Browser:
    """Start the browser, wherever it is; raise `Error` if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    executable = os.environ.get("QMRI_CHROMIUM") or next(
        filter(None, map(shutil.which, names)), None
    )
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    return playwright.chromium.launch(
        executable_path=executable, args=[*arguments, "--disable-dev-shm-usage"]
    )


@pytest.fixture(scope="session")
def browser(built: None) -> Iterator[Browser]:
    """Share one browser among all pages; missing, it is a failure where CI=true, else a skip."""
    with sync_playwright() as playwright:
        try:
            chromium = launch(playwright)
        except Error as error:
            if os.environ.get("CI", "").lower() in ("1", "true"):
                pytest.fail(f"{NO_BROWSER}\n{error}")
            pytest.skip(NO_BROWSER)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=PAGES)
def visit(request: pytest.FixtureRequest, browser: Browser, server: str) -> Iterator[Visit]:
    """Open one page, every request beyond this machine refused and noted."""
    with browser.new_context(viewport=DESKTOP) as context:
        context.set_default_timeout(20_000)
        seen = Visit(context.new_page())

        def local_only(route: Route) -> None:
            if route.request.url.startswith((server, "data:", "blob:")):
                route.continue_()
            else:
                seen.failed.append(f"outside the book: {route.request.url}")
                route.abort()

        def note_answer(answer: Response) -> None:
            if answer.status >= 400:
                seen.failed.append(f"{answer.status}: {answer.url}")

        def note_message(message: ConsoleMessage) -> None:
            if message.type == "error":
                seen.complaints.append(message.text)

        context.route("**/*", local_only)
        seen.page.on("response", note_answer)
        seen.page.on("requestfailed", lambda failed: seen.failed.append(f"failed: {failed.url}"))
        seen.page.on("console", note_message)
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.goto(server + request.param, wait_until="networkidle")
        if seen.page.query_selector(".math"):
            seen.page.wait_for_function(
                "() => window.MathJax?.startup?.promise !== undefined", timeout=20_000
            )
            seen.page.evaluate("() => MathJax.startup.promise")
        if seen.page.query_selector(".vega-chart"):
            seen.page.wait_for_selector(".vega-chart svg", state="attached")
        yield seen


def test_book_has_pages(built: None) -> None:
    """A page for every entry of _toc.yml, and the search page."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    expected = {f"{name}.html" for name in (contents["root"], *chapters)}
    assert expected | {"search.html"} <= set(PAGES)


def test_nothing_is_missing_or_fetched_from_elsewhere(visit: Visit) -> None:
    assert visit.failed == []


def test_console_is_silent(visit: Visit) -> None:
    assert visit.complaints == []


def test_every_equation_is_typeset(visit: Visit) -> None:
    result = visit.page.evaluate(TYPESET)
    assert result["errors"] == []
    assert result["typeset"] == result["found"]


def test_every_picture_loads_and_is_described(visit: Visit) -> None:
    pictures = visit.page.evaluate(PICTURES)
    assert [p["src"] for p in pictures if not p["alt"]] == [], "pictures without alt text"
    assert [p["src"] for p in pictures if p["width"] == 0] == [], "pictures that do not load"


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_page_does_not_scroll_sideways(visit: Visit, viewport: dict) -> None:
    visit.page.set_viewport_size(viewport)
    visit.page.wait_for_timeout(100)
    width = visit.page.evaluate(WIDTH)
    assert width <= viewport["width"], visit.page.evaluate(WIDEST)


@pytest.mark.parametrize("name", CHART_PAGES)
def test_charts_draw_and_controls_change_them(browser: Browser, server: str, name: str) -> None:
    """Every chart has marks and a description; any slider, list or box changes its picture.

    Each is put back before the next one moves: with f at 0, Dfast rightly does nothing.
    """
    with browser.new_context(viewport=DESKTOP) as context:
        page = context.new_page()
        page.goto(server + name, wait_until="networkidle")
        charts = page.query_selector_all("div.vega-chart")
        assert charts
        for chart in charts:
            chart.wait_for_selector("svg")
            picture = chart.query_selector("svg")
            described = chart.query_selector("[role=graphics-document]")
            assert (described.get_attribute("aria-label") or "").strip()
            assert picture.query_selector("path, circle, text, image")
            for control in chart.query_selector_all("input, select"):
                before, value = picture.evaluate(MARKS), control.evaluate(STATE)
                label = control.evaluate("(c) => c.closest('label')?.textContent || c.name")
                move(page, control, control.evaluate(OTHER_STATE))
                assert picture.evaluate(MARKS) != before, f"{label!r} changes nothing"
                move(page, control, value)
                assert picture.evaluate(MARKS) == before, f"{label!r} does not come back"


# All that a picture shows, whatever the order in which it was drawn.
MARKS = """(picture) => [...picture.querySelectorAll('path, text, line, rect, image')].map((mark) =>
  [mark.tagName, mark.tagName === 'text' ? mark.textContent : '', ...['d', 'transform', 'opacity',
    'stroke', 'fill', 'x', 'y', 'x2', 'y2'].map((name) => mark.getAttribute(name))].join('|'),
).sort().join()"""
# What a slider, a list or a box says now, and something else that it could say.
STATE = "(c) => c.type === 'checkbox' ? c.checked : c.value"
OTHER_STATE = """(c) => {
  if (c.type === 'checkbox') return !c.checked;
  if (c.type === 'range') return +c.value > (+c.min + +c.max) / 2 ? c.min : c.max;
  return [...c.options].map((option) => option.value).filter((v) => v !== c.value).pop();
}"""


def move(page: Page, control: ElementHandle, state: str | bool) -> None:
    """Set a slider, a list or a box and let the chart follow."""
    control.evaluate(
        """(c, state) => {
          if (c.type === 'checkbox') c.checked = state;
          else c.value = state;
          for (const name of ['input', 'change'])
            c.dispatchEvent(new Event(name, {bubbles: true}));
        }""",
        state,
    )
    page.wait_for_timeout(300)


class PageLinks(HTMLParser):
    """Collects where a page links to and which anchors it offers."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Take up one opening tag."""
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])


@functools.cache
def parsed(page: str) -> PageLinks:
    """Return the links and anchors of one built page."""
    parser = PageLinks()
    parser.feed((HTML / page).read_text(encoding="utf-8"))
    return parser


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_book_lead_somewhere(page: str) -> None:
    broken = []
    for link in sorted(parsed(page).links):
        if urlsplit(link).scheme or link.startswith("//"):
            continue
        path, anchor = urldefrag(urljoin(page, link) if not link.startswith("#") else page + link)
        target = HTML / unquote(urlsplit(path).path)
        if target.is_dir():
            target /= "index.html"
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".html":
            offered = parsed(target.relative_to(HTML).as_posix()).anchors
            if unquote(anchor) not in offered:
                broken.append(link)
    assert broken == []


def test_search_finds_a_word_of_the_book(browser: Browser, server: str) -> None:
    with browser.new_context(viewport=DESKTOP) as context:
        page = context.new_page()
        page.goto(server + "search.html?q=signal")
        page.wait_for_selector("#search-results li a")
        links = page.eval_on_selector_all("#search-results li a", "a => a.map(x => x.href)")
        assert any("/book/" in link for link in links)


def test_search_works_from_the_disk(browser: Browser) -> None:
    """A reader who opens the files without a server can search them, too."""
    with browser.new_context(viewport=DESKTOP) as context:
        page = context.new_page()
        page.goto((HTML / "search.html").as_uri() + "?q=signal")
        page.wait_for_selector("#search-results li a")
        assert page.query_selector_all("#search-results li a")
