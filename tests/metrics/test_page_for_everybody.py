"""The page at any width, in light and dark, by keyboard and by screen reader, with 500 devices on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from metrics.fleet_page.server import PageServer, serve_page
from metrics.fleet_page.troubles import TITLES
from metrics.help_page import help_page, slug
from sidestream.contract.messages import Status
from tests.metrics.browser import Browser, browser
from tests.metrics.chromium import needs_chromium
from tests.metrics.test_board import Crowd

pytestmark = pytest.mark.slow

FILES = Path(__file__).parents[2] / "metrics" / "fleet_page" / "page"
OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")


@pytest.fixture(scope="module")
def page() -> Iterator[PageServer]:
    crowd = Crowd(0, most=600)
    for number in range(500):
        crowd.status(number, "online")
        crowd.tell(number)
    crowd.tell(4, samples_read=12, samples_forwarded=2, skipped_label=10)
    crowd.tell(6, samples_read=9, temperature_celsius=91.0)
    for number in (3, 5):
        gone = Status(state="offline", birth=1, stream=f"{number:032x}", reason="lost")
        crowd.fleet.on_status("big", f"d{number}", gone, 0.0)
    for second in range(5):
        crowd.now = float(second)
        crowd.tell(1, accuracy=0.5 + second / 10, weights_version=second + 1)
        crowd.update()
    with serve_page(crowd.board, 0) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@needs_chromium
@pytest.mark.parametrize("width", [400, 768, 1440])
def test_nothing_stands_out_at_the_side_at_any_width(chromium: Browser, page: PageServer, width: int) -> None:
    for path in ("", "help.html", "#device=big/d3"):
        chromium.open(page.url + path, width=width)
        wide = chromium.run("document.documentElement.scrollWidth")
        assert wide <= width, (path, wide)
    assert chromium.console == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_it_is_on(chromium: Browser, page: PageServer, dark: bool) -> None:
    chromium.open(page.url, dark=dark)
    faint = chromium.run(_FAINT)
    assert faint == []


@needs_chromium
def test_troubles_are_listed_with_devices_reasons_and_help_and_the_table_begins_with_them(
    chromium: Browser, page: PageServer
) -> None:
    chromium.open(page.url)
    told = chromium.run(
        "[...document.querySelectorAll('.trouble')].map((one) => [one.querySelector('h3').textContent, "
        "[...one.querySelectorAll('.link')].map((link) => link.textContent), "
        "one.querySelector('.help-link').getAttribute('href')])"
    )
    assert told == [
        ["Absent · 2", ["d3", "d5"], "help.html#absent"],
        ["Labels unknown to the job", ["d4"], "help.html#labels-unknown-to-the-job"],
        ["Too hot", ["d6"], "help.html#too-hot"],
    ]
    assert chromium.run("document.getElementById('trouble-count').textContent") == "4 of 500 devices"
    first = chromium.run(
        "[...document.querySelectorAll('#table tbody .link')].slice(0, 4).map((a) => a.textContent)"
    )
    assert first == ["d3", "d5", "d4", "d6"]


@needs_chromium
def test_a_device_is_opened_and_closed_by_keyboard_alone(chromium: Browser, page: PageServer) -> None:
    chromium.open(page.url)
    for _ in range(30):
        chromium.press("Tab")
        if chromium.run("document.activeElement.textContent") == "d4":
            break
    chromium.press("Enter")
    chromium.wait("document.getElementById('device').open")
    assert "device=small%2Fd4" in chromium.run("location.hash")
    chromium.wait("document.getElementById('d-troubles').textContent.includes('10 of the 12 samples')")
    samples = chromium.run("document.getElementById('d-samples').innerText").split()
    assert samples[:4] == ["Read", "12", "Forwarded", "2"]
    assert chromium.run("document.getElementById('device').contains(document.activeElement)")
    events = chromium.run("document.getElementById('d-events').innerText")
    assert "Labels unknown to the job" in events and "is online" in events
    chromium.press("Escape")
    chromium.wait("!document.getElementById('device').open")
    assert chromium.run("location.hash") == ""
    assert chromium.run("document.activeElement.textContent") == "d4", "back where one was"


@needs_chromium
def test_a_screen_reader_is_told_of_everything_by_name(chromium: Browser, page: PageServer) -> None:
    chromium.open(page.url)
    spoken = chromium.spoken()
    nameless = [role for role, name in spoken if not name and role in _NAMED]
    assert nameless == []
    names = {name for role, name in spoken if role == "heading"}
    assert {"Who is stuck, and why", "Is it learning", "Devices", "Events"} <= names
    images = [name for role, name in spoken if role == "image"]
    assert any(name.startswith("Accuracy on the devices, by tier: big") for name in images)


@needs_chromium
def test_accuracy_is_drawn_over_versions_or_over_time_in_the_range_that_is_chosen(
    chromium: Browser, page: PageServer
) -> None:
    chromium.open(page.url)
    titles = "[...document.querySelectorAll('#c-quality .title')].map((one) => one.textContent)"
    assert chromium.run(titles) == ["version in use", "accuracy"]
    points = "document.querySelectorAll('#c-quality .mark.s0').length"
    assert chromium.run(points) == 5, "one for each version that the tier used"
    chromium.run("document.getElementById('f-axis').value = 'time'")
    chromium.run("document.getElementById('f-axis').dispatchEvent(new Event('input'))")
    assert chromium.run(titles) == ["time", "accuracy"] and "axis=time" in chromium.run("location.hash")
    chromium.open(f"{page.url}#range=2&axis=time")
    assert chromium.run(points) == 3
    lines = "[...document.querySelectorAll('#c-quality .line')]"
    dashes = f"{lines}.map((one) => one.getAttribute('stroke-dasharray'))"
    assert len(set(chromium.run(dashes))) == 2, "lines are told apart without their colours"


def test_the_page_knows_every_kind_of_trouble_and_each_has_its_line_of_help() -> None:
    found = re.search(r"KINDS = \[(.*?)\]", (FILES / "trouble.js").read_text("utf-8"))
    assert found and re.findall(r'"([\w-]+)"', found[1]) == list(TITLES)
    for title in TITLES.values():
        section = re.search(
            rf"^### {re.escape(title)}\n\n(.*?)(?=^##|\Z)", OPERATIONS, re.MULTILINE | re.DOTALL
        )
        assert section and len(section[1]) > 40, title
        assert f'id="{slug(title)}"' in (FILES / "help.html").read_text("utf-8")


def test_the_help_is_what_the_handbook_says_and_its_links_lead_somewhere() -> None:
    text = (FILES / "help.html").read_text("utf-8")
    assert text == help_page(OPERATIONS), "run python -m metrics.help_page docs/operations.md"
    anchors = set(re.findall(r'id="([\w-]+)"', text))
    assert set(re.findall(r'href="#([\w-]+)"', text)) <= anchors


def test_markdown_becomes_text_and_never_markup_of_its_own() -> None:
    made = help_page(
        "## Troubles\n\n### A `b` <i>\n\n- **x** [there](#a-b-i)\n- <b>\n\n"
        "## Alerts\n\n| a | b |\n|---|---|\n| `1` | *2* |\n"
    )
    assert '<h3 id="a-b-i">A <code>b</code> &lt;i&gt;</h3>' in made
    assert "<li><b>x</b> there</li>" in made or '<a href="#a-b-i">there</a>' in made
    assert "<li>&lt;b&gt;</li>" in made and "<td><code>1</code></td><td><i>2</i></td>" in made


_NAMED = {
    "button",
    "link",
    "textbox",
    "searchbox",
    "combobox",
    "image",
    "table",
    "region",
    "dialog",
    "heading",
}
_FAINT = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map((v) => linear(v / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = new Set();
  for (const element of document.querySelectorAll("main *, header *, footer")) {
    const own = [...element.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !element.checkVisibility() || element.closest("svg")) continue;
    if (element.matches("button:disabled, option")) continue;
    const both = [parse(getComputedStyle(element).color), ground(element)];
    const [a, b] = both.map(light).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.add(`${element.tagName}.${element.className}: ${ratio.toFixed(2)}`);
  }
  return [...found];
})()
"""
