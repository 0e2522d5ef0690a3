"""A real browser opens `marimo run explainer.py`: what a reader sees, and what answers to the keys.

Skipped where playwright or chromium is missing. One server and one page for the whole file.
"""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

FLAGS = "--no-sandbox --disable-background-networking --disable-component-update --disable-sync"
FLAGS = [*FLAGS.split(), "--no-first-run", "--disable-quic"]
PICTURES = "world shrink gate naive tied norms gamma frontier language recovered jump"
SECONDS = 30_000  # of patience, in milliseconds


@pytest.fixture(scope="module")
def address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "run", "explainer.py", "--headless", "--no-token"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    server = subprocess.Popen(command, cwd=Path(__file__).parent.parent, text=True, **pipes)
    next(line for line in server.stdout if "URL" in line)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.communicate(timeout=20)


@pytest.fixture(scope="module")
def page(address):
    """The notebook, run to its end; `page.complaints` are what no reader should ever meet."""
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.complaints = []
        said, known = page.complaints.append, (address, "data:", "blob:")
        page.on("console", lambda m: m.type == "error" and said(m.text))
        page.on("pageerror", lambda error: said(str(error)))
        page.on("request", lambda r: r.url.startswith(known) or said(f"asked for {r.url}"))
        page.goto(address)
        for last in ("real_splice", "jump_picture", "next_gist"):  # those that run last
            playwright.expect(cell(page, last)).to_be_visible(timeout=2 * SECONDS)
        yield page
        browser.close()


def cell(page, name):
    return page.locator(f"[data-cell-name={name}]")


def marks(page, name):
    """The picture in a cell; its screenshot is what it looks like now."""
    return cell(page, name).locator("svg.marks, canvas.marks").first


def shown(page, name, text):
    playwright.expect(cell(page, name)).to_contain_text(text, timeout=SECONDS)


def choose(page, section, option):
    cell(page, f"{section}_gist").get_by_role("radio").nth(option).click()


def test_a_wrong_answer_gets_its_own_feedback_and_then_the_picture_comes(page):
    """Before, there is none; and another answer has another feedback."""
    headings = [text for text in page.locator("h2").all_inner_texts() if "·" in text]
    assert [int(text.split("·")[0]) for text in headings] == list(range(1, 13))
    for section in [*PICTURES.split(), "aux"]:
        shown(page, f"{section}_gist", "Predict first.")
        shown(page, f"{section}_picture", "A picture comes with your answer.")
    assert marks(page, "shrink_picture").count() == 0
    for option, says in ((0, "That has no error"), (3, "That saves the whole penalty")):
        choose(page, "shrink", option)
        shown(page, "shrink_picture", "No: 1.6.")
        shown(page, "shrink_picture", says)
    choose(page, "shrink", 1)
    shown(page, "shrink_picture", "Right. At 2 - δ")
    playwright.expect(marks(page, "shrink_picture")).to_be_visible()
    shown(page, "shrink_picture", "Keep:")
    choose(page, "gate", 3)
    shown(page, "gate_picture", "The answer is: about 100%.")


def test_everything_can_be_shown_and_every_picture_is_described(page):
    cell(page, "title").get_by_role("switch").click()
    for name in PICTURES.split():
        playwright.expect(marks(page, f"{name}_picture")).to_be_visible(timeout=SECONDS)
        described = cell(page, f"{name}_picture").locator("[aria-label]")  # for those who can't see
        said = described.evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
        caption = cell(page, f"{name}_picture").locator("em").first.inner_text()
        assert min(max(map(len, said)), len(caption)) > 60, name
        shown(page, f"{name}_picture", "The answer is:")
    shown(page, "aux_picture", "a balance")


def test_no_formula_is_broken_and_nothing_failed(page):
    assert page.locator(".katex").count() > 40
    assert page.locator(".katex-error").count() == 0
    text = page.locator("body").inner_text()
    assert "Traceback" not in text
    assert "$" not in text


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ("world", "End", "After 200 training"),
        ("shrink", "ArrowRight", "With λ = 1.0"),
        ("gate", "ArrowRight", "At λ = 1.0"),
        ("tied", "ArrowRight", "opens at z = 0.65"),
        ("gamma", "ArrowLeft", "squared cosine of 55°"),
        ("jump", "ArrowRight", "θ = 0.55"),
    ],
)
def test_a_slider_moved_by_a_key_changes_its_picture(page, section, key, says):
    before = marks(page, f"{section}_picture").screenshot()
    slider = cell(page, f"{section}_picture").get_by_role("slider").first
    slider.press(key)
    shown(page, f"{section}_picture", says)
    page.wait_for_timeout(200)
    assert marks(page, f"{section}_picture").screenshot() != before


def test_a_fold_stays_open_while_a_slider_moves(page):
    fold = cell(page, "shrink_picture").get_by_role("button", name="Derivation")
    fold.click()
    shown(page, "shrink_picture", "For one coefficient, with a unit direction")
    cell(page, "shrink_picture").get_by_role("slider").first.press("ArrowLeft")
    shown(page, "shrink_picture", "With λ = 0.8")
    assert fold.get_attribute("aria-expanded") == "true"
    cell(page, "shrink_picture").get_by_role("button", name="The code").click()
    shown(page, "shrink_picture", "def shrink(a: Tensor, l1: float) -> Tensor:")


def test_an_edit_of_the_forty_lines_is_shown_and_run(page):
    edits = cell(page, "forty_gist").locator("select")
    edits.select_option(label="drop L_aux")
    shown(page, "forty_picture", "loss = reconstruct + l1 * sparsity")
    shown(page, "forty_picture", "nothing is left")
    rows = cell(page, "forty_picture").locator("tbody tr")
    playwright.expect(rows).to_have_count(2, timeout=SECONDS)
    assert rows.nth(1).inner_text().split()[-4] == "0.00"
    edits.select_option(label="as it is")
    playwright.expect(rows).to_have_count(1, timeout=SECONDS)


def test_a_text_is_read_as_it_is_typed(page):
    cell(page, "real_gist").locator("textarea").fill("zip(range(3), <b>)")
    for name, count in (("real_picture", 2 + 2 * 8), ("real_splice", 4)):
        texts = cell(page, name).locator("code.bytes")
        playwright.expect(texts.first).to_have_text("zip(range(3), <b>)", timeout=SECONDS)
        assert texts.count() == count
    shown(page, "real_splice", "nats per byte")
    before = marks(page, "real_picture").screenshot()
    cell(page, "real_reading").locator("select").select_option(index=3)
    page.wait_for_timeout(1500)
    assert marks(page, "real_picture").screenshot() != before


def test_the_form_trains_and_bad_input_is_told(page):
    shown(page, "live_picture", "At equal FVU")
    seed = cell(page, "live_form").locator("input").last
    for value, says in (("2.7", "seed is 2.7"), ("", "seed is None"), ("3", "At equal FVU")):
        seed.fill(value)
        seed.press("Tab")
        cell(page, "live_form").get_by_role("button", name="Train").click()
        shown(page, "live_picture", says)


def test_nothing_sticks_out_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(1000)
    wide = page.evaluate(
        """() => [...document.querySelectorAll('[data-cell-name] *')].filter(e => {
             const box = e.getBoundingClientRect();
             return box.width > 0 && box.right > innerWidth + 1 && !e.closest('code')
           }).map(e => e.closest('[data-cell-name]').dataset.cellName)"""
    )
    assert not wide


def test_no_complaint_and_no_request_to_the_outside(page):
    assert page.complaints == []
