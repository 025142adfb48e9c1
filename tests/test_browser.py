"""The pages in a real browser: by pointer, keyboard and touch, at every width, in both themes, on paper."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr.compare import compare_runs, write_page
from simclr.data import ImageData
from simclr.eval.predictions import packed
from simclr.report import write_report
from simclr.report.sections import _cell
from test_compare import evaluated, hand_made
from test_report_page import make_run, result_of

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
CLASSES = ["<script>document.title='1'", "a & b", "plain"]
FILE = "<img src=x onerror=document.title='2'>"  # within a name; no file system takes a closing tag
TEXT = """() => [...document.querySelectorAll("body *")].filter((element) => element.offsetParent
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
    && parseFloat(getComputedStyle(element).fontSize) < 12).map((element) => element.outerHTML.slice(0, 80))"""

# Text whose colour has less contrast to what lies below it than WCAG 2 asks for (AA); not that of buttons at rest.
PALE = """() => {
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((part, i) => part * a + below[i] * (1 - a));
  const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const part = colour[i] / 255;
    return sum + share * (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const under = (element) => {
    if (!element) return [255, 255, 255];
    return over(parts(getComputedStyle(element).backgroundColor), under(element.parentElement));
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const written = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!element.offsetParent || !written || element.disabled) continue;
    const style = getComputedStyle(element), below = under(element), text = over(parts(style.color), below);
    const [low, high] = [light(text), light(below)].sort((a, b) => a - b), size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if ((high + 0.05) / (low + 0.05) < needed) found.push(element.outerHTML.slice(0, 80));
  }
  return found;
}"""
CUT = """() => [...document.querySelectorAll("th[scope=col], th[scope=col] span, .runs td")].filter((element) =>
    element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1)
    .filter((element) => getComputedStyle(element).overflowX !== "visible").map((element) => element.textContent)"""


@pytest.fixture(scope="session")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Watched:
    """A context of the browser, with all that its pages complain of and ask for."""

    def __init__(self, browser, **settings):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        self.complaints, self.asked = [], []
        self.context.on("console", lambda message: self.complaints.append(message.text))
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.context.on("request", lambda request: self.asked.append(request.url))


@pytest.fixture(scope="session")
def desk(browser):
    """The usual context and its one page: a new one costs as much as most tests."""
    watched = Watched(browser)
    return watched, watched.context.new_page()


@pytest.fixture
def opened(browser, desk):
    """Opens a page; at the end of the test it must have complained of nothing and asked nobody."""
    contexts, files = [], set()
    usual, page_of_usual = desk

    def open_page(path: Path, address: str = "", **settings):
        contexts.append(Watched(browser, **settings) if settings else usual)
        page = contexts[-1].context.new_page() if settings else page_of_usual
        files.add(path.as_uri())
        page.goto("about:blank")  # another place in the page that is open would not load it anew
        page.goto(path.as_uri() + address)
        return page

    yield open_page
    if usual in contexts:
        page_of_usual.evaluate("localStorage.clear()")
        page_of_usual.mouse.move(0, 0)
    for watched in contexts:
        if watched is not usual:
            watched.context.close()
    complaints = [text for watched in contexts for text in watched.complaints]
    asked = {url.split("#")[0] for watched in contexts for url in watched.asked}
    usual.complaints.clear(), usual.asked.clear()
    assert complaints == []
    assert {url for url in asked if not url.startswith(("data:", "blob:", "about:"))} <= files


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The page of a run on three classes with hostile names."""
    root = tmp_path_factory.mktemp("pages")
    for part, seed in (("train", 0), ("test", 1)):
        generator = np.random.default_rng(seed)
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(14):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{FILE}{i}.png")
    data = ImageData(train_dir=str(root / "train"), test_dir=str(root / "test"), image_size=8, batch_size=4)
    run_dir = make_run(root / "run", data)
    (run_dir / "metrics.csv").write_text(
        "epoch,heldout_loss,knn_top1,lr,rankme,retrieval_top1,retrieval_top1_before,step,train_loss,train_loss_epoch\n"
        "0,,,0.1,,,,4,2.5,\n0,2.4,,,7,0.25,0.125,9,,2.25\n1,,,0.2,,,,14,2.0,\n1,1.875,0.4375,,8,0.5,0.125,19,,1.75\n"
    )
    labels = torch.arange(42) // 14
    said = torch.where(torch.arange(42) % 14 < 4, (labels + 1) % 3, labels)  # four mistakes of each class
    matrix = [[10, 4, 0], [0, 10, 4], [4, 0, 10]]
    settings = {name: data.hparams[name] for name in data.hparams}
    kept = {"linear": packed(said), "labels": packed(labels), "images_sha256": ""}
    record = result_of(run_dir, confusion_matrix=matrix, predictions=kept)
    record["data"] |= {"classes": CLASSES, "settings": settings, "test_images": 42}
    (run_dir / "linear_eval.json").write_text(json.dumps(record))
    return write_report(run_dir)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """The page of three runs of 40 epochs, one with a hostile name."""
    root = tmp_path_factory.mktemp("compared")
    for number, name in enumerate((FILE, "second", "third")):
        rows = [f"{n},{0.01 * n},{10 * n + 9},{5 - 0.1 * n + number}" for n in range(40)]
        metrics = "epoch,knn_top1,step,train_loss_epoch\n" + "\n".join(rows) + "\n"
        result = evaluated(0.5 + 0.1 * number)
        hand_made(root / "runs" / name, temperature=0.1 * (number + 1), metrics=metrics, result=result)
    return write_page(compare_runs([root / "runs"]), root / "out.html")


def until(page, condition: str, argument: object = None) -> None:
    """Wait for an expression to hold: the page's own policy forbids Playwright's way to look again and again."""
    for _ in range(400):
        if page.evaluate(condition, argument):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"not in ten seconds: {condition}")


def atlas(page):
    """The canvas of the atlas, in view and drawn; its box."""
    canvas = page.locator("canvas.map")
    canvas.scroll_into_view_if_needed()
    until(page, "document.getElementById('atlas').atlas.order().length > 0")
    return canvas, canvas.bounding_box()


def places(page):
    """Where each image lies on the screen, by its number."""
    return page.evaluate(
        """() => {
        const { atlas } = document.getElementById("atlas");
        const { left, top } = document.querySelector("canvas.map").getBoundingClientRect();
        return atlas.order().map((i) => [i, atlas.toX(i) + left, atlas.toY(i) + top]);
    }"""
    )


def data_of(page, name="atlas-data"):
    return json.loads(page.locator(f"#{name}").text_content())


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_page_fits_every_width_in_both_themes_with_text_that_can_be_read(opened, request, which):
    page = opened(request.getfixturevalue(which), color_scheme="dark", viewport={"width": 360, "height": 900})
    for width in (360, 768, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        for theme in ("dark", "light"):
            page.emulate_media(color_scheme=theme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(TEXT) == []
            background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
            assert (int(background) < 128) == (theme == "dark")


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_text_stands_out_from_its_ground_in_both_themes(opened, request, which):
    page = opened(request.getfixturevalue(which))
    for theme in ("dark", "light"):
        page.emulate_media(color_scheme=theme)
        assert page.evaluate(PALE) == []
    page.emulate_media(color_scheme="light")


def test_a_number_can_be_read_on_a_cell_of_any_strength(opened, report):
    page = opened(report)
    styles = page.locator(".confusion td").evaluate_all("(cells) => cells.map((cell) => cell.getAttribute('style'))")
    strengths = [int(found[1]) for style in styles if style and (found := re.search(r"\) (\d+)%", style))]
    strongest = _cell(is_right=True, share=1.0)["strength"]
    assert max(strengths) <= strongest == _cell(is_right=False, share=0.5)["strength"]
    for theme in ("dark", "light"):
        page.emulate_media(color_scheme=theme)
        for kind in ("accent", "wrong"):
            for strength in range(0, strongest + 1, 6):
                colour = f"color-mix(in srgb, var(--{kind}) {strength}%, transparent)"
                paint = "(cells, colour) => cells.forEach((cell) => { cell.style.background = colour; })"
                page.locator(".confusion td").evaluate_all(paint, colour)
                assert page.evaluate(PALE) == [], (theme, kind, strength)
    page.emulate_media(color_scheme="light")


def test_no_heading_of_a_table_is_cut_on_a_telephone(opened, report, comparison):
    for path in (report, comparison):
        page = opened(path, viewport={"width": 360, "height": 900})
        page.evaluate("""() => {
            document.querySelector(".confusion")?.style.setProperty("--classes", 10);
            for (const row of document.querySelectorAll(".confusion tr")) {  // of three classes there is room
                for (let i = 3; i < 10; i++) row.append(row.lastElementChild.cloneNode(true));
            }
            for (const name of document.querySelectorAll(".confusion th span")) name.textContent = "crescent";
        }""")
        assert page.evaluate(CUT) == []


def test_the_result_is_the_first_thing_on_a_telephone(opened, comparison):
    page = opened(comparison, viewport={"width": 360, "height": 900})
    assert page.locator("h1").inner_text().startswith("third reaches 70.0")
    for cell in page.locator(".runs[data-sortable] tbody td:nth-child(2)").all():
        box = cell.bounding_box()
        assert box["x"] + box["width"] <= 361


def test_two_fingers_zoom_all_curves(opened, comparison):
    page = opened(comparison, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    until(page, "document.getElementById('curves').charts.panels[0].frame")
    assert page.get_by_text("Pinch to zoom.").is_visible()
    canvas = page.locator("#curves canvas").first
    canvas.scroll_into_view_if_needed()
    box, send = canvas.bounding_box(), page.context.new_cdp_session(page).send
    middle = box["x"] + box["width"] / 2
    for kind, gap in (("touchStart", 30), *(("touchMove", gap) for gap in (45, 60, 75, 90)), ("touchEnd", None)):
        fingers = (
            [] if gap is None else [{"x": middle - gap, "y": box["y"] + 90}, {"x": middle + gap, "y": box["y"] + 90}]
        )
        send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    until(page, "document.getElementById('curves').charts.panels[1].frame.from > 5")
    start, end = page.evaluate("document.getElementById('curves').charts.range()")
    assert end - start == pytest.approx(40 / 3, rel=0.05)
    page.get_by_role("button", name="Whole range").tap()
    until(page, "document.getElementById('curves').charts.panels[1].frame.from === 0")


def test_names_are_text_wherever_they_stand(opened, report, comparison):
    for path, title in ((report, "run: resnet8"), (comparison, "3 runs compared")):
        page = opened(path)
        page.locator("section").last.scroll_into_view_if_needed()
        assert page.title() == title
        if path is report:
            assert FILE in page.locator(".mistakes img").first.get_attribute("alt")
            assert all(name in page.locator(".confusion").inner_text() for name in CLASSES)
        else:
            assert FILE in page.locator("tbody").first.inner_text()
            assert FILE in page.locator("#curves canvas").first.get_attribute("aria-label")
    page = opened(report)
    atlas(page)
    page.locator(".chip").first.click()
    until(page, "document.getElementById('atlas').atlas.order().length === 14")
    _, x, y = places(page)[0]
    page.mouse.move(x, y)
    page.locator(".card").wait_for()
    assert CLASSES[0] in page.locator(".card").inner_text()
    assert page.locator(".card img, .card script").count() == 0
    assert page.title() == "run: resnet8"


def test_the_pointer_shows_an_image_with_its_class_and_its_file(opened, report):
    page = opened(report)
    atlas(page)
    data = data_of(page)
    labels = np.frombuffer(base64.b64decode(data["labels"]), "<u2")
    for _number, x, y in places(page)[:5]:
        page.mouse.move(x, y)
        shown = page.evaluate("document.getElementById('atlas').atlas.current()")
        assert shown is not None
        text = page.locator(".card").inner_text()
        assert data["names"][shown] in text
        assert CLASSES[labels[shown]] in text
        assert page.locator(".card .nearest canvas").count() == 5
        assert ("taken for" in text) == (shown % 14 < 4)


def test_the_wheel_zooms_where_the_pointer_is_and_a_drag_moves(opened, report):
    page = opened(report)
    atlas(page)
    number, x, y = places(page)[0]
    page.mouse.move(x, y)
    for _ in range(3):
        page.mouse.wheel(0, -200)
    until(page, "document.getElementById('atlas').atlas.view.scale > 2")
    after = {i: (a, b) for i, a, b in places(page)}
    assert after[number] == pytest.approx((x, y), abs=3)  # a wheel's place is in whole pixels
    page.mouse.down()
    page.mouse.move(x + 40, y + 25, steps=4)
    page.mouse.up()
    moved = {i: (a, b) for i, a, b in places(page)}
    assert moved[number] == pytest.approx((after[number][0] + 40, after[number][1] + 25), abs=1)
    page.locator("[data-do=fit]").click()
    assert page.evaluate("document.getElementById('atlas').atlas.view") == {"scale": 1, "x": 0, "y": 0}


def test_a_lasso_gives_the_files_inside_it_to_copy_and_to_save(opened, report, tmp_path):
    page = opened(report, permissions=["clipboard-read", "clipboard-write"])
    _, box = atlas(page)
    assert page.locator("[data-do=save]").is_disabled()
    left, right = box["x"] + 4, box["x"] + box["width"] / 2
    top, bottom = box["y"] + 4, box["y"] + box["height"] - 4
    inside = sorted(i for i, x, y in places(page) if left < x < right and top < y < bottom)
    assert 3 < len(inside) < 40
    page.locator("[data-do=lasso]").click()
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    data = data_of(page)
    expected = [f"{data['root']}/{data['names'][i]}" for i in inside]
    assert all(Path(path).is_file() for path in expected)
    assert page.locator("textarea").input_value().split("\n") == expected
    assert page.locator(".chosen-count").inner_text() == f"{len(inside)} chosen"
    with page.expect_download() as download:
        page.locator("[data-do=save]").click()
    assert download.value.suggested_filename == "run-chosen.txt"
    download.value.save_as(tmp_path / "chosen.txt")
    assert (tmp_path / "chosen.txt").read_text().splitlines() == expected
    page.locator("[data-do=copy]").click()
    until(page, "document.querySelector('[data-do=copy]').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()").splitlines() == expected
    page.locator("[data-do=clear]").click()
    assert page.locator("textarea").is_hidden()


def test_classes_and_mistakes_filter_what_is_shown(opened, report):
    page = opened(report)
    atlas(page)
    page.locator(".chip").nth(1).click()
    until(page, "document.getElementById('atlas').atlas.order().length === 14")
    assert {i // 14 for i, _, _ in places(page)} == {1}
    assert page.locator(".shown-count").inner_text() == "14 of 42 shown"
    page.locator("[name=mistakes]").check()
    until(page, "document.getElementById('atlas').atlas.order().length === 4")
    assert sorted(i for i, _, _ in places(page)) == [14, 15, 16, 17]
    page.locator("[data-do=all]").click()
    until(page, "document.getElementById('atlas').atlas.order().length === 42")


def test_the_atlas_is_used_by_the_keyboard_alone(opened, report):
    page = opened(report)
    _canvas, _ = atlas(page)
    for _ in range(60):  # from the top of the page, as someone without a pointer comes
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "map":
            break
    assert page.evaluate("document.activeElement === document.querySelector('canvas.map')")
    page.keyboard.press("ArrowRight")
    first = page.evaluate("document.getElementById('atlas').atlas.current()")
    before = {i: (x, y) for i, x, y in places(page)}
    page.keyboard.press("ArrowLeft")
    second = page.evaluate("document.getElementById('atlas').atlas.current()")
    assert before[second][0] < before[first][0]
    page.keyboard.press("Enter")
    data = data_of(page)
    assert page.locator("textarea").input_value() == f"{data['root']}/{data['names'][second]}"
    assert data["names"][second] in page.locator("#atlas .spoken").inner_text()
    page.keyboard.press("+")
    assert page.evaluate("document.getElementById('atlas').atlas.view.scale") > 1.3
    page.keyboard.press("0")
    page.keyboard.press("Escape")
    assert page.evaluate("document.getElementById('atlas').atlas.view.scale") == 1
    assert page.locator(".card").is_hidden()


def test_a_tap_looks_and_a_second_one_chooses(opened, report):
    page = opened(report, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    atlas(page)
    _number, x, y = places(page)[-1]
    page.touchscreen.tap(x, y)
    page.locator(".card").wait_for()
    assert page.locator("textarea").is_hidden()
    page.touchscreen.tap(x, y)
    until(page, "document.getElementById('atlas').atlas.chosen.size === 1")


def test_curves_tell_their_values_and_zoom_together(opened, report):
    page = opened(report)
    until(page, "document.getElementById('curves').charts.panels[0].frame")
    canvas = page.locator("#curves canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x = page.evaluate("document.getElementById('curves').charts.panels[0].frame.x(2)")
    page.mouse.move(box["x"] + x, box["y"] + 60)
    said = page.locator("#curves .readout:visible").inner_text().split("\n")
    assert said[0] == "epoch 2"
    assert [said[said.index(name) + 1] for name in ("training", "held-out")] == ["1.75", "1.88"]
    left = page.evaluate("document.getElementById('curves').charts.panels[0].frame.x(1)")
    page.mouse.move(box["x"] + left, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + x, box["y"] + 60, steps=4)
    page.mouse.up()
    until(page, "document.getElementById('curves').charts.panels[1].frame.from > 0.9")
    ranges = page.evaluate("document.getElementById('curves').charts.panels.map(({ frame }) => [frame.from, frame.to])")
    assert ranges == [pytest.approx([1, 2], abs=0.02)] * len(ranges)
    page.mouse.dblclick(box["x"] + left, box["y"] + 60)
    until(page, "document.getElementById('curves').charts.panels[1].frame.from === 0")
    canvas.focus()
    page.keyboard.press("End")
    assert "training 1.75" in page.locator("#curves .spoken").inner_text()
    page.keyboard.press("+")
    until(page, "document.getElementById('curves').charts.panels[2].frame.from > 0")


def test_the_switch_changes_page_and_charts_and_is_remembered(opened, report):
    page = opened(report)
    until(page, "document.getElementById('curves').charts.panels[0].frame")
    canvas = page.locator("#curves canvas").first
    light = canvas.evaluate("(canvas) => canvas.toDataURL()")
    page.get_by_role("button", name="change to the dark theme").click()
    until(page, "(light) => document.querySelector('#curves canvas').toDataURL() !== light", light)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"


def test_paper_is_light_and_has_nothing_to_press(opened, report, tmp_path):
    page = opened(report, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(254, 254, 254)"
    assert not [button for button in page.locator("button, select, nav, textarea").all() if button.is_visible()]
    assert page.locator("canvas.map").is_visible()
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000


def test_the_address_of_a_comparison_brings_its_view_back(opened, comparison):
    page = opened(comparison)
    until(page, "document.getElementById('curves').charts.panels[0].frame")
    page.locator("[aria-label='horizontal axis']").select_option("steps")
    page.evaluate("document.getElementById('curves').charts.zoom(100, 200)")
    page.locator("tbody input").nth(1).uncheck()
    page.locator("thead button", has_text="loss").click()
    page.locator("thead button", has_text="loss").click()
    until(page, "/zoom=.*sort=\\d+%2C-1/.test(location.hash)")
    address = page.evaluate("location.hash")
    other = opened(comparison, address=address)
    until(other, "document.getElementById('curves').charts.panels[0].frame?.from === 100")
    state = other.evaluate("document.getElementById('curves').charts.state")
    assert (state["axis"], state["from"], state["to"]) == ("steps", 100, 200)
    ranges = other.evaluate(
        "document.getElementById('curves').charts.panels.map(({ frame }) => [frame.from, frame.to])"
    )
    assert ranges == [[100, 200]] * len(ranges)
    assert [box.is_checked() for box in other.locator("tbody input").all()].count(False) == 1
    losses = [float(text) for text in other.locator("tbody tr td:last-child").all_inner_texts()]
    assert losses == sorted(losses, reverse=True)


def test_a_hidden_row_is_in_no_chart_and_an_axis_places_each_run_by_its_own_steps(opened, comparison):
    page = opened(comparison)
    until(page, "document.getElementById('curves').charts.panels[0].frame")
    ends = "document.getElementById('curves').charts.panels[0].series.map(({ times }) => times[times.length - 1])"
    assert page.evaluate(ends) == [40, 40, 40]
    page.locator("[aria-label='horizontal axis']").select_option("images")
    assert page.evaluate(ends) == [6400, 6400, 6400]
    points = "document.getElementById('scatter').scatter.points().map(({ row }) => row.settings['model.temperature'])"
    until(page, f"{points}.length === 3")
    page.locator("tbody input").first.uncheck()
    until(page, f"{points}.length === 2")
    page.get_by_role("button", name="Show none").click()
    until(page, f"{points}.length === 0")
    page.get_by_role("button", name="Show all").click()
    until(page, f"{points}.length === 3")


def test_a_point_of_a_setting_against_a_result_tells_its_run(opened, comparison):
    page = opened(comparison)
    canvas = page.locator("#scatter canvas")
    canvas.scroll_into_view_if_needed()
    until(page, "document.getElementById('scatter').scatter.points().length === 3")
    box = canvas.bounding_box()
    for number, top1 in ((1, "60.0 %"), (2, "70.0 %")):
        x, y = page.evaluate(f"(({{ x, y }}) => [x, y])(document.getElementById('scatter').scatter.points()[{number}])")
        page.mouse.move(box["x"] + x, box["y"] + y)
        said = page.locator("#scatter .readout").inner_text()
        assert ("second", "third")[number - 1] in said
        assert top1 in said
    page.locator("[aria-label='figure, vertical']").select_option(label="loss")
    until(page, "location.hash.includes('y=loss')")


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """The page of fifty runs of 2 000 points."""
    root = tmp_path_factory.mktemp("many")
    for i in range(50):
        noise = np.random.default_rng(i).normal(size=(2000, 2))
        rows = [f"{n},{0.3 + 0.01 * b},{n},{5 - 0.001 * n + 0.1 * a}" for n, (a, b) in enumerate(noise)]
        metrics = "epoch,knn_top1,step,train_loss_epoch\n" + "\n".join(rows) + "\n"
        hand_made(root / "runs" / f"r{i}", temperature=0.01 * (i + 1), metrics=metrics)
    return write_page(compare_runs([root / "runs"]), root / "out.html")


def test_fifty_runs_of_2000_points_are_painted_within_a_second_and_zoom_at_30_frames_a_second(opened, many):
    paints, work = [], []
    for _ in range(3):  # the best of three: what other work of the machine has not held up
        page = opened(many)
        until(page, "performance.getEntriesByName('first-contentful-paint').length")
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        until(page, "document.getElementById('curves').charts.panels[0].frame")
        page.locator("#curves canvas").first.scroll_into_view_if_needed()
        send = page.context.new_cdp_session(page).send
        send("Performance.enable", {"timeDomain": "threadTicks"})  # time of this thread, not of the wall
        before = {metric["name"]: metric["value"] for metric in send("Performance.getMetrics")["metrics"]}
        drawn = page.evaluate("""() => new Promise((done) => {
            const { charts } = document.getElementById("curves"), before = charts.drawn;
            let frames = 0;
            const next = () => {
                if (frames === 45) { done(charts.drawn - before); return; }
                frames++;
                charts.zoom(10 * frames, 2000 - 10 * frames);
                requestAnimationFrame(next);
            };
            requestAnimationFrame(next);
        })""")
        after = {metric["name"]: metric["value"] for metric in send("Performance.getMetrics")["metrics"]}
        assert drawn >= 2 * 40  # both charts in every frame, but for one that comes late where others work
        work.append(1000 * (after["TaskDuration"] - before["TaskDuration"]) / 45)
    assert min(paints) < 1000, paints
    assert min(work) <= 1000 / 30, work  # ms of a frame
