"""The report's page, CSV and JSON: the same figures under the same names, hostile names as text, and how the page behaves in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ingest.report import html, tables
from ingest.report.model import Figure, Report, ResourceKey
from tests.browser import Tab, needs_chromium, tab
from tests.report_example import empty_example, example

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;'\"=1+1"


def hostile() -> Report:
    """The example with every text of AWS's and of people's replaced by an attack."""
    key = ResourceKey(EVIL, EVIL, EVIL, EVIL)
    found = example()
    return replace(
        found,
        accounts=(EVIL,),
        assumptions=(EVIL,),
        inventory=replace(found.inventory, source=EVIL, remedy=EVIL),
        movers=tuple(replace(m, account=EVIL, service=EVIL, what=EVIL) for m in found.movers),
        idle=replace(
            found.idle,
            findings=tuple(replace(f, key=key, owner=EVIL) for f in found.idle.findings),
            total=Figure(None, EVIL, unknown=EVIL),
        ),
        heat=tuple(replace(h, title=EVIL) for h in found.heat),
        filling=replace(
            found.filling, fillings=tuple(replace(f, key=key, method=EVIL) for f in found.filling.fillings)
        ),
        coverage=tuple(replace(c, account=EVIL, alias=EVIL, reasons=((EVIL, 1),)) for c in found.coverage),
        groups=tuple(replace(g, account=EVIL, name=EVIL) for g in found.groups),
        resources=tuple(
            replace(r, key=replace(key, id=EVIL + str(i)), owner=EVIL, state=EVIL)
            for i, r in enumerate(found.resources)
        ),
    )


def many(count: int) -> Report:
    """The example with so many resources more, and an idle one that comes last of all."""
    found = example()
    one = found.resources[2]
    more = tuple(replace(one, key=replace(one.key, id=f"i-{i:05d}")) for i in range(count))
    return replace(found, resources=(*more, *found.resources))


class Figures(HTMLParser):
    """What on a page says which figure it is: (path, value, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self._open: tuple[str, str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "data-f" in given:
            self._open = (given["data-f"] or "", given["value" if tag == "data" else "data-v"] or "")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found.append((*self._open, data))
            self._open = None


def as_json(document: Any) -> Any:
    return json.loads(b"".join(tables.to_json(document)))


def at(document: Any, path: str) -> Any:
    """What a document has under a path, as `idle.findings[0].coverage`."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        document = document[int(index)] if index else document[name]
    return document


# --- the same figures -----------------------------------------------------------------------------------------------


def test_every_figure_on_the_page_is_in_the_json_under_its_path() -> None:
    document = tables.document(example())
    read = as_json(document)
    figures = Figures(html.page(document)).found
    assert len(figures) > 3 * 167 + 250
    assert [(path, float(value)) for path, value, _ in figures] == [
        (path, float(at(read, path))) for path, _, _ in figures
    ]


def test_numbers_between_the_tags_of_the_first_page_are_figures_of_the_document() -> None:
    page = html.page(tables.document(example()))
    cards = page[page.index('<main class="cards">') : page.index('<div class="details">')]
    cards = re.sub(r"<svg.*?</svg>|<title>.*?</title>|<data .*?</data>", "", cards, flags=re.DOTALL)
    left = unescape(re.sub(r"<[^>]*>", " ", cards))
    for words in ("i-0a1b2c3d4e5f60718", "i-0b7", "i-0gone", "ec2", "m7g.", "db.r7g", *example().accounts):
        left = left.replace(words, "")
    # What is left are the shares in brackets, counts of rows that links name, and what titles say.
    left = re.sub(r"\([+−]\d+ %\)|all \d+|p95|●.*logarithmic|eu-west-1|within 30 days", "", left)
    assert re.findall(r"[^\s]*\d[^\s]*", left) == []


def test_csv_has_each_figure_of_the_json_once_with_whose_it_is() -> None:
    document = tables.document(example())
    out = io.StringIO()
    tables.write_csv(document, out)
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert tuple(rows[0]) == tables.COLUMNS
    [total] = [r for r in rows if r["name"] == "idle.total"]
    figure = example().idle.total
    assert (float(total["value"]), total["unit"], float(total["before"])) == (
        figure.value,
        "usd/month",
        figure.before,
    )
    [p95] = [
        r for r in rows if r["name"] == "resources.metrics.p95" and r["id"] == "i-0c8" and r["of"] == "cpu"
    ]
    assert (p95["account"], p95["service"], float(p95["value"])) == ("111122223333", "ec2", 88.4)
    assert len({(r["name"], r["index"]) for r in rows}) == len(rows)
    # No figure is left out: each number and word of the document is in a cell.
    cells = {cell for row in rows for cell in row.values()}
    assert [
        leaf for leaf in leaves(as_json(document)) if str(leaf) not in cells and f"'{leaf}" not in cells
    ] == []


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)] if any(
            isinstance(inner, dict) for inner in value
        ) else []  # fmt: skip
    return [] if value is None else [value]


def test_what_is_not_known_is_null_with_its_reason_and_never_zero() -> None:
    document = as_json(tables.document(empty_example()))
    assert document["idle"]["total"]["value"] is None
    assert "inventory.source" in document["idle"]["total"]["unknown"]
    bad = replace(example(), coverage_all=Figure(float("nan"), "share", float("inf")))
    read = as_json(tables.document(bad))["coverage_all"]
    assert (read["value"], read["before"]) == (None, None)


def test_csv_holds_no_formulas() -> None:
    out = io.StringIO()
    report = replace(example(), assumptions=('=HYPERLINK("http://x")', "@SUM(A1)", "fine"))
    key = replace(report.resources[0].key, id='=cmd|" /C calc"!A0')
    tables.write_csv(
        tables.document(replace(report, resources=(replace(report.resources[0], key=key, owner="+1"),))), out
    )
    rows = list(csv.reader(io.StringIO(out.getvalue())))
    cells = [cell for row in rows for cell in row if cell[:1] in ("=", "+", "@")]
    assert cells == []
    assert any(cell.startswith("'=cmd") for row in rows for cell in row)


# --- numbers for people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (1234.5, "usd", "$1,234"),
        (171.554, "usd/month", "$171.55 a month"),
        (-12.3, "usd", "−$12.30"),
        (0.0, "usd", "$0.00"),
        (0.00123, "usd", "$0.0012"),
        (0.9999, "share", "99.9 %"),
        (1.0, "share", "100 %"),
        (0.064, "share", "6.4 %"),
        (37.6, "percent", "38 %"),
        (9.24, "percent", "9.2 %"),
        (500 * 1024**3, "bytes", "500 GiB"),
        (1024**4 * 1.5, "bytes/s", "1.5 TiB/s"),
        (0, "bytes", "0 B"),
        (121_400.0, "1/s", "121,400/s"),
        (3.25, "1/s", "3.25/s"),
        (648, "hours", "648 h"),
        (1, "days", "1 day"),
        (12.345, "count", "12.3"),
        (7.0, "requests/min", "7 requests/min"),
    ],
)
def test_numbers_have_their_unit_and_no_more_digits_than_a_reader_needs(
    value: float, unit: str, expected: str
) -> None:
    assert html.words(value, unit) == expected


def test_a_change_tells_its_direction_by_a_sign_and_a_share_in_points() -> None:
    def told(figure: Figure) -> str:
        document = html.At({"f": tables._plain(figure)})
        return unescape(re.sub(r"<[^>]*>", "", html.change(document["f"])))

    assert told(Figure(110.0, "usd", 100.0)) == "▲ $10.00 (+10 %)"
    assert told(Figure(90.0, "usd", 100.0)) == "▼ $10.00 (−10 %)"
    assert told(Figure(5.0, "usd", 5.0)) == "= as the week before"
    assert told(Figure(5.0, "usd", 0.0)) == "▲ $5.00"
    assert told(Figure(0.95, "share", 0.99)) == "▼ 4 points"
    assert told(Figure(5.0, "usd")) == "no week before to compare"
    assert told(Figure(None, "usd", 3.0)) == ""


def test_sparklines_break_where_there_are_no_samples() -> None:
    assert html.spark([1, 2, None, 4]) == ["0.0,17.5 33.3,12.0", "100.0,1.0 100.0,1.0"]
    assert html.spark([None, None]) == []
    assert html.spark([0.0, 0.0]) == ["0.0,23.0 100.0,23.0"]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_text_of_others_is_escaped_everywhere() -> None:
    page = html.page(tables.document(hostile()))
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert page.count("&lt;img src=x") > 50


def test_tables_are_bounded_and_say_so_and_keep_what_is_linked_to() -> None:
    found = many(html.ROWS_MAX + 500)
    page = html.page(tables.document(found))
    idle = len(found.resources) - 7
    assert found.resources[idle].key == found.idle.findings[0].key
    assert f'<tr id="r{idle}">' in page
    assert page.count('<tr id="r') == html.ROWS_MAX
    assert "Here are 1,000 of 1,507" in page
    assert len(page) < 5_000_000


def test_each_section_says_why_it_is_empty_and_what_would_fill_it() -> None:
    page = html.page(tables.document(empty_example()))
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    assert len(sections) == 13
    empty = [name for name, text in sections if 'class="empty"' in text]
    assert empty == [name for name, _ in sections if name != "assumptions"]
    for name in ("idle", "oversized", "savings", "full", "changes"):
        assert "set inventory.source" in dict(sections)[name]


def test_links_within_the_page_lead_somewhere() -> None:
    page = html.page(tables.document(example()))
    targets = set(re.findall(r' id="([^"]+)"', page))
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) > 25
    assert set(links) <= targets


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Tab]:
    async with tab() as found:
        yield found


async def show(browser: Tab, tmp_path: Path, report: Report, **how: Any) -> None:
    file = tmp_path / "report.html"
    file.write_text(html.page(tables.document(report)))
    await browser.open(file.as_uri(), **how)


def outside(browser: Tab) -> list[str]:
    return [url for url in browser.asked if not url.startswith(("data:", "file:"))]


async def column(browser: Tab, table: str, number: int) -> list[str]:
    script = f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[{number}].innerText.split('\\n')[0])"
    found: list[str] = await browser.run(script)
    return found


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, True), (800, False), (1280, False), (1280, True)])
async def test_it_renders_without_complaints_or_requests_and_nothing_is_wider_than_the_screen(
    browser: Tab, tmp_path: Path, width: int, dark: bool
) -> None:
    await show(browser, tmp_path, example(), width=width, dark=dark)
    assert await browser.run("document.querySelectorAll('.card').length") == 10
    assert await browser.run("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('.card, .card p')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert await browser.run(cut) == 0
    ink, paper = await browser.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == dark
    assert abs(bright[0] - bright[1]) > 500
    assert (browser.complaints, outside(browser)) == ([], [])


@needs_chromium
async def test_heat_map_and_text_on_it_can_be_told_apart(browser: Tab, tmp_path: Path) -> None:
    for dark in (False, True):
        await show(browser, tmp_path, example(), dark=dark)
        contrasts = await browser.run(
            """[...document.querySelectorAll('.heat g')].filter(g => g.querySelector('.v')).map(g => {
              const light = (e) => { const c = getComputedStyle(e).fill.match(/\\d+/g).slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
              const [a, b] = [light(g.querySelector('rect')), light(g.querySelector('.v'))].sort((x, y) => y - x);
              return (a + 0.05) / (b + 0.05); })"""
        )
        assert len(contrasts) == 3 * 167
        assert min(contrasts) > 3


@needs_chromium
async def test_tables_sort_by_value_and_what_is_not_known_stays_last(browser: Tab, tmp_path: Path) -> None:
    await show(browser, tmp_path, example())
    assert await column(browser, "#movers", 5) == [
        "▲ $35.71 (+34 %)", "▼ $5.77 (−12 %)", "–",
    ]  # fmt: skip
    head = "document.querySelectorAll('#movers th button')"
    await browser.run(f"{head}[4].click()")
    assert await column(browser, "#movers", 4) == ["$104.31", "$46.87", "–"]
    assert await browser.run(f"{head}[4].parentElement.ariaSort") == "descending"
    await browser.run(f"{head}[4].click()")
    assert await column(browser, "#movers", 4) == ["$46.87", "$104.31", "–"]
    await browser.run(f"{head}[1].click()")
    assert await column(browser, "#movers", 1) == ["ec2", "msk", "rds"]
    assert await browser.run("document.querySelectorAll('#movers [aria-sort]').length") == 1


@needs_chromium
async def test_a_long_table_is_folded_searched_and_unfolded_by_a_link_into_it(
    browser: Tab, tmp_path: Path
) -> None:
    await show(browser, tmp_path, many(60))
    seen = "[...document.querySelectorAll('#resources tbody tr')].filter(r => r.offsetHeight).length"
    assert await browser.run(seen) == 15
    await browser.run(
        "(i => { i.value = 'I-0001'; i.dispatchEvent(new Event('input')); })(document.querySelector('#resources input'))"
    )
    assert await browser.run(seen) == 10
    await browser.run(
        "(i => { i.value = ''; i.dispatchEvent(new Event('input')); })(document.querySelector('#resources input'))"
    )
    await browser.run("document.querySelector('#resources .tools button').click()")
    assert await browser.run(seen) == 15
    await browser.run("document.querySelector('#changes td a').click()")
    await browser.until(f"{seen} === 67")
    await browser.send("Emulation.setEmulatedMedia", media="print")
    assert await browser.run(seen) == 67
    await browser.send("Emulation.setEmulatedMedia", media="")


@needs_chromium
async def test_hostile_names_stay_text_in_the_browser(browser: Tab, tmp_path: Path) -> None:
    await show(browser, tmp_path, hostile())
    assert "owned" not in await browser.run("document.title")
    assert await browser.run("document.querySelectorAll('img, iframe, script').length") == 1
    assert (await browser.text()).count("<img src=x") > 30
    assert (browser.complaints, outside(browser)) == ([], [])


@needs_chromium
async def test_a_script_that_is_not_its_own_does_not_run(browser: Tab, tmp_path: Path) -> None:
    await show(browser, tmp_path, example())
    await browser.run(
        "(s => { s.textContent = 'document.title = \"owned\"'; document.body.append(s); })(document.createElement('script'))"
    )
    assert await browser.run("document.title") != "owned"
    assert any("Content Security Policy" in said for said in browser.complaints)


@needs_chromium
async def test_on_paper_neither_cards_nor_rows_are_cut_and_everything_is_there(
    browser: Tab, tmp_path: Path
) -> None:
    await show(browser, tmp_path, many(60))
    await browser.send("Emulation.setEmulatedMedia", media="print")
    styles = await browser.run(
        "['tr', '.card', '.heatbox'].map(s => getComputedStyle(document.querySelector(s))).map(c => c.breakInside)"
    )
    assert styles == ["avoid", "avoid", "avoid"]
    assert await browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    await browser.send("Emulation.setEmulatedMedia", media="")
    pdf = await browser.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
    assert len(pdf["data"]) > 50_000


def crowded() -> Report:
    """The example with more in each of the ten things than the first page shows, and with data that are thin."""
    found = example()

    def times(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rows * 30)[:30]

    return replace(
        found,
        movers=times(found.movers),
        idle=replace(found.idle, findings=times(found.idle.findings)),
        oversized=replace(found.oversized, findings=times(found.oversized.findings)),
        realised=replace(found.realised, realised=times(found.realised.realised)),
        quotas=times(found.quotas),
        filling=replace(found.filling, fillings=times(found.filling.fillings)),
        coverage=times(found.coverage),
    )


@needs_chromium
@pytest.mark.parametrize(("width_mm", "height_mm"), [(210.0, 297.0), (215.9, 279.4)], ids=["A4", "Letter"])
async def test_the_ten_things_fit_the_first_sheet_and_the_tables_begin_on_the_next(
    browser: Tab, tmp_path: Path, width_mm: float, height_mm: float
) -> None:
    margin_mm, pixels = 8.0, 96 / 25.4
    thin = replace(crowded(), coverage_all=replace(crowded().coverage_all, value=0.5))
    for report in (crowded(), thin, example(), empty_example()):
        await show(browser, tmp_path, report)
        await browser.resize(int((width_mm - 2 * margin_mm) * pixels), 900)
        await browser.send("Emulation.setEmulatedMedia", media="print")
        bottom = await browser.run("document.querySelector('main').getBoundingClientRect().bottom")
        assert bottom <= (height_mm - 2 * margin_mm) * pixels
        assert await browser.run("document.querySelectorAll('main .card').length") == 10
        assert await browser.run("getComputedStyle(document.querySelector('.details')).breakBefore") == "page"
        assert await browser.run("document.body.scrollWidth <= innerWidth")
        await browser.send("Emulation.setEmulatedMedia", media="")
