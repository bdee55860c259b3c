"""The web page in a real Chromium, against a real server."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from nanochat.chat.server import Limits, Server
from nanochat.load import load_trained
from nanochat.rundir import RunDir
from tests.unit.serving import serving
from tests.unit.tiny_run import make_run

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STEP_S = 0.05
"""A tiny model answers at once; a person, and these tests, must be able to stop it."""

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"),
        reason="no Chromium: apt-get install chromium",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(str(tmp_path_factory.mktemp("browser") / "run"))


def make_server(run: RunDir, stage: str = "sft", step_s: float = 0.0) -> Server:
    server = Server(load_trained(run, stage), 2, Limits(max_tokens=80))
    if step_s:
        step = server.engine.step

        def slow_step() -> list:
            time.sleep(step_s)
            return step()

        server.engine.step = slow_step  # type: ignore[method-assign]
    return server


@pytest.fixture(scope="module")
def url(run: RunDir) -> Iterator[str]:
    with serving(make_server(run)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        assert CHROMIUM is not None, "no Chromium: apt-get install chromium"
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh profile; a script error or a blocked resource fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: errors.append(message.text) if "Content Security" in message.text else None,
    )
    yield page
    context.close()
    assert errors == []


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant .text")


def greedy(page: Page) -> None:
    """Settings under which the model says what it knows by heart."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()


def test_a_chat_is_held_and_kept(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny-sft")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    greedy(page)
    say(page, "Who are you?")
    expect(answers(page)).to_have_text("A tiny model, très petit.")
    expect(page.locator("article.assistant .facts")).to_contain_text("tokens/s")
    say(page, "Say hi.")
    expect(answers(page)).to_have_count(2)
    page.reload()
    expect(answers(page).first).to_have_text("A tiny model, très petit.")
    expect(page.locator("article.user")).to_have_count(2)
    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator("article")).to_have_count(0)
    say(page, "Say hi.")
    expect(answers(page)).to_have_text("hi")
    say(page, "Again?")
    expect(answers(page).last).to_have_text("hi hi")  # the conversation is sent as a whole
    page.get_by_role("button", name="Who are you?", exact=True).click()
    expect(answers(page).first).to_have_text("A tiny model, très petit.")
    page.get_by_role("button", name="Delete chat: Who are you?").click()
    expect(page.locator("#chats li")).to_have_count(1)
    page.reload()
    expect(page.locator("#chats li")).to_have_count(1)


def test_two_tabs_keep_each_others_chats(page: Page, url: str) -> None:
    other = page.context.new_page()
    for tab in (page, other):
        tab.goto(url)
    greedy(page)
    say(page, "Who are you?")
    expect(answers(page)).to_have_text("A tiny model, très petit.")
    expect(other.locator("#chats li")).to_have_count(2)  # theirs, and the empty one shown here
    expect(other.locator("article")).to_have_count(0)
    say(other, "Say hi.")  # under the other tab's settings
    expect(answers(other)).to_have_text("hi")
    expect(page.locator("#chats li")).to_have_count(2)
    expect(answers(page)).to_have_text("A tiny model, très petit.")
    page.get_by_role("button", name="Delete chat: Say hi.").click()
    expect(other.locator("article")).to_have_count(0)
    for tab in (page, other):
        tab.reload()
        expect(tab.get_by_role("button", name="Who are you?", exact=True)).to_be_visible()


def test_markup_in_an_answer_stays_text(page: Page, url: str) -> None:
    page.goto(url)
    greedy(page)
    say(page, "Show an image.")
    expect(answers(page)).to_have_text("<img src=x onerror=boom()> b")
    assert answers(page).locator("img").count() == 0
    assert answers(page).locator("strong").inner_text() == "b"


HOSTILE = [
    "<script>boom()</script>",
    "[x](javascript:boom())",
    '[x](https://a.example/" onmouseover="boom())',
    "![x](https://a.example/pixel.png)",
    "<iframe srcdoc='<script>boom()</script>'>",
    "```html\n<img src=x onerror=boom()>\n```",
    "# <svg onload=boom()>\n> <b>\n- <i>\n1. <u>",
    "`<img src=x onerror=boom()>` **<b>** *<i>*",
]


def test_no_answer_can_run_a_script(page: Page, url: str) -> None:
    page.goto(url)
    for text in HOSTILE:
        kinds = page.evaluate(
            """text => {
                const box = document.createElement("div");
                box.append(...markdown(text));
                document.getElementById("log").append(box);
                return [...box.querySelectorAll("*")].map((e) =>
                    [e.tagName, ...e.getAttributeNames().map((n) => `${n}=${e.getAttribute(n)}`)]);
            }""",
            text,
        )
        for tag, *attributes in kinds:
            assert tag in {"P", "PRE", "CODE", "STRONG", "EM", "A", "BLOCKQUOTE", "UL", "OL", "LI",
                           "BR", "H3", "H4", "H5"}  # fmt: skip
            for attribute in attributes:
                assert not attribute.startswith("on")
                assert not attribute.startswith("href=") or attribute.startswith("href=https://a")
    assert page.evaluate("typeof boom") == "undefined"


def test_markdown(page: Page, url: str) -> None:
    page.goto(url)
    html = page.evaluate(
        """text => { const box = document.createElement("div"); box.append(...markdown(text));
                     return box.innerHTML; }""",
        "# A\nb **c** *d* `e < f`\ng\n\n- h\n- i\n\n1. j\n\n> k\n\n"
        '```py\nl = "<m>"\n\nn\n```\n2 * 3 * 4',
    )
    assert html == (
        "<h3>A</h3><p>b <strong>c</strong> <em>d</em> <code>e &lt; f</code><br>g</p>"
        "<ul><li>h</li><li>i</li></ul><ol><li>j</li></ol><blockquote>k</blockquote>"
        '<pre tabindex="0"><code>l = "&lt;m&gt;"\n\nn</code></pre><p>2 * 3 * 4</p>'
    )


def test_stop_regenerate_and_edit(page: Page, run: RunDir) -> None:
    server = make_server(run, step_s=STEP_S)
    with serving(server) as url:
        page.goto(url)
        greedy(page)
        say(page, "Who are you?")
        expect(answers(page)).to_contain_text("A tiny")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("article.assistant .facts")).to_have_text("stopped")
        partial = answers(page).inner_text()
        assert partial != "A tiny model, très petit." and partial.startswith("A")
        page.get_by_role("button", name="Regenerate").click()
        expect(answers(page)).to_have_text("A tiny model, très petit.")
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Edit message").fill("Say hi.")
        page.keyboard.press("Enter")
        expect(answers(page)).to_have_text("hi")
        expect(page.locator("article.user .text")).to_have_text("Say hi.")
        say(page, "Who are you?")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        deadline = time.monotonic() + 10
        while server.num_rows():
            assert time.monotonic() < deadline, "the stopped answer still occupies a row"
            time.sleep(0.01)


def test_the_server_goes_and_comes_back(page: Page, run: RunDir) -> None:
    with serving(make_server(run)) as url:
        port = int(url.rpartition(":")[2])
        page.goto(url)
        greedy(page)
        expect(page.locator("#model")).to_have_text("tiny-sft")
    banner = page.get_by_role("alert")
    expect(banner).to_contain_text("cannot be reached", timeout=15_000)
    say(page, "Say hi.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    expect(banner).to_contain_text("cannot be reached")
    with serving(make_server(run), port):
        expect(banner).to_be_hidden(timeout=15_000)
        page.get_by_role("button", name="Try again").click()
        expect(answers(page)).to_have_text("hi")


def test_a_full_context_leaves_out_the_oldest_messages(page: Page, url: str) -> None:
    page.goto(url)
    greedy(page)
    page.get_by_label("Message", exact=True).fill("x" * 300)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("leaves room for 0")
    page.get_by_role("button", name="New chat").first.click()
    for i in range(7):
        say(page, "Say hi.")
        expect(page.locator("article.assistant .facts")).to_have_count(i + 1)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("article.assistant .facts").last).to_contain_text("oldest messages")


def test_a_key_is_asked_for(page: Page, run: RunDir) -> None:
    server = Server(load_trained(run), 1, Limits(), api_key="secret")
    with serving(server) as url:
        page.goto(url)
        say(page, "Say hi.")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Try again").click()
        expect(answers(page)).to_have_text("hi")


def test_by_keyboard_alone(page: Page, url: str) -> None:
    page.goto(url)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Message", exact=True)).to_have_value("one\ntwo")
    for name in ("Settings", "New chat"):
        button = page.get_by_role("button", name=name).first
        for _ in range(12):
            page.keyboard.press("Shift+Tab")
            if button.evaluate("e => e === document.activeElement"):
                break
        expect(button).to_be_focused()
    page.keyboard.press("Enter")


def test_a_phone(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = context.new_page()
    page.goto(url)
    greedy(page)
    say(page, "Who are you?")
    expect(answers(page)).to_have_text("A tiny model, très petit.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#composer").bounding_box()
    assert box is not None and box["height"] < 80 and box["y"] > 700  # one line, at the bottom
    expect(page.get_by_role("navigation", name="Chats")).to_be_hidden()
    page.get_by_role("button", name="Chats").tap()
    expect(page.get_by_role("navigation", name="Chats")).to_be_visible()
    page.get_by_role("button", name="New chat").first.tap()
    expect(page.get_by_role("navigation", name="Chats")).to_be_hidden()
    expect(page.locator("article")).to_have_count(0)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_serious_accessibility_fault(
    browser: Browser, url: str, scheme: Literal["light", "dark"], width: int
) -> None:
    """Of the empty page, a chat and the settings, on a screen and on a phone."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    faults: list[str] = []

    def look(where: str) -> None:
        found = Axe().run(page).response["violations"]
        faults.extend(
            f"{where}: {v['id']}: {v['nodes'][0]['html']}"
            for v in found
            if v["impact"] in ("serious", "critical")
        )

    page.goto(url)
    look("empty")
    greedy(page)
    say(page, "Who are you?")
    expect(answers(page)).to_have_text("A tiny model, très petit.")
    look("chat")
    page.get_by_role("button", name="Settings").click()
    look("settings")
    context.close()
    assert faults == []
