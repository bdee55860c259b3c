"""Pictures of the web page: `python -m tests.e2e.screenshots RUN_DIR docs [QUESTION…]`.

Serves the run and holds one chat with it, in a real Chromium, on a screen and on a phone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from nanochat.chat.server import Limits, Server
from nanochat.load import load_trained
from nanochat.rundir import find_run
from tests.e2e.test_browser import CHROMIUM, greedy, say
from tests.unit.serving import serving

QUESTIONS = ("Who are you?", "What is 27 + 45?")
SIZES = {"1280": (1280, 800), "390": (390, 844)}


def hold_chat(page: Page, url: str, questions: Sequence[str] = QUESTIONS) -> None:
    page.goto(url)
    greedy(page)
    for i, question in enumerate(questions):
        say(page, question)
        expect(page.locator("article.assistant .facts")).to_have_count(i + 1, timeout=60_000)
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)


def main(run_dir: str, to: Path, questions: Sequence[str]) -> None:
    server = Server(load_trained(find_run(run_dir)), 2, Limits(max_tokens=80))
    with serving(server) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            context = browser.new_context(viewport={"width": width, "height": height})
            page = context.new_page()
            hold_chat(page, url, questions)
            page.screenshot(path=to / f"chat_{name}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or QUESTIONS)
