"""A real browser opens `marimo run explainer.py`: what a reader sees, and what answers to the keys.

Skipped where playwright or chromium is missing. One server and one page for the whole file.
"""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

FLAGS = "--no-sandbox --disable-background-networking --disable-component-update --disable-sync"
FLAGS = [*FLAGS.split(), "--no-first-run", "--disable-quic"]
PICTURES = "world shrink gate naive aux tied norms gamma frontier jump recovered"
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
        for last in ("live_latents", "jump_picture", "claims_table"):  # those that run last
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


def words(page, name):
    """What a cell says; callouts keep their text in a shadow tree."""
    return page.evaluate(
        """name => {
             const text = node => node.nodeType === 3 ? node.data
               : [...(node.shadowRoot ?? node).childNodes].map(text).join('')
             return text(document.querySelector(`[data-cell-name=${name}]`))
           }""",
        name,
    )


def test_every_section_and_picture_is_there(page):
    headings = [text for text in page.locator("h2").all_inner_texts() if "·" in text]
    assert [int(text.split("·")[0]) for text in headings] == list(range(1, 13))
    for name in PICTURES.split():
        playwright.expect(marks(page, f"{name}_picture")).to_be_visible()
        caption = cell(page, f"{name}_picture").locator("em").first.inner_text()
        assert len(caption) > 60, f"{name} has no caption"
        described = cell(page, f"{name}_picture").locator("[aria-label]")  # for those who can't see
        lengths = described.evaluate_all("all => all.map(e => e.getAttribute('aria-label').length)")
        assert max(lengths) > 60, f"{name} is not described"
        shown(page, f"{name}_gist", "Predict first.")
        shown(page, f"{name}_feedback", "Choose an answer")
        shown(page, f"{name}_end", "Keep:")


def test_no_formula_is_broken_and_nothing_failed(page):
    assert page.locator(".katex").count() > 40
    assert page.locator(".katex-error").count() == 0
    text = page.locator("body").inner_text()
    assert "Traceback" not in text
    assert "$" not in text


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ("world", "End", "After 200 steps"),
        ("shrink", "ArrowRight", "With λ = 1.0"),
        ("gate", "ArrowRight", "At λ = 1.0"),
        ("tied", "ArrowRight", "opens at z = 0.65"),
        ("gamma", "ArrowLeft", "squared cosine of 55°"),
        ("jump", "ArrowRight", "θ = 0.55"),
    ],
)
def test_a_slider_moved_by_a_key_changes_its_picture(page, section, key, says):
    before = marks(page, f"{section}_picture").screenshot()
    slider = cell(page, f"{section}_controls").get_by_role("slider").first
    slider.press(key)
    shown(page, f"{section}_picture", says)
    page.wait_for_timeout(200)
    assert marks(page, f"{section}_picture").screenshot() != before


def test_the_language_model_is_there_and_its_baseline_can_be_changed(page):
    playwright.expect(marks(page, "language_picture")).to_be_visible()
    shown(page, "language_gist", "Predict first.")
    before = marks(page, "recovered_picture").screenshot()
    cell(page, "recovered_controls").get_by_role("radio").nth(1).click()
    page.wait_for_timeout(1500)
    assert marks(page, "recovered_picture").screenshot() != before


@pytest.mark.parametrize(
    ("section", "wrong", "right", "says", "why"),
    [("shrink", 0, 1, "1.6", "λ/2 = 0.4"), ("language", 1, 0, "about half", "The lead holds")],
)
def test_answers_get_their_feedback(page, section, wrong, right, says, why):
    options = cell(page, f"{section}_gist").get_by_role("radio")
    options.nth(wrong).click()
    shown(page, f"{section}_feedback", f"No: {says}.")
    options.nth(right).click()
    shown(page, f"{section}_feedback", "Right.")
    shown(page, f"{section}_feedback", why)


def test_the_form_trains_and_an_sae_can_be_inspected(page):
    shown(page, "live_latents", "Standard, λ = 0.71")
    before, said = marks(page, "live_frontier").screenshot(), words(page, "live_latents")
    assert "latents fire on a row" in said
    cell(page, "live_form").get_by_role("button", name="Train").click()
    until = time.monotonic() + 60
    while words(page, "live_latents") == said and time.monotonic() < until:
        page.wait_for_timeout(200)
    assert words(page, "live_latents") != said
    page.wait_for_timeout(300)
    assert marks(page, "live_frontier").screenshot() != before
    cell(page, "live_choice").locator("select").select_option(label="Gated, λ = 1.43")
    shown(page, "live_latents", "Gated, λ = 1.43")


def test_a_click_on_a_point_inspects_its_sae(page):
    chart = marks(page, "live_frontier")
    box = chart.bounding_box()
    chart.click(position={"x": 0.1 * box["width"], "y": 0.15 * box["height"]})
    shown(page, "live_latents", "Gated, λ = 2.40")
    cell(page, "live_choice").locator("select").select_option(label="JumpReLU, λ = 0.17")
    shown(page, "live_latents", "JumpReLU, λ = 0.17")


def test_folded_code_is_that_of_the_module(page):
    cell(page, "shrink_end").get_by_role("button", name="The code").click()
    shown(page, "shrink_end", "def shrink(a: Tensor, l1: float) -> Tensor:")


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
