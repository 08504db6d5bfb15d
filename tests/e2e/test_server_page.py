"""The page at /, in a browser: an answer denoises, can be stopped, and stays text.

    python tests/e2e/test_server_page.py docs/pictures/serve-page.png

takes the picture of the documentation with the embedded model.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import elastic_cache
import pytest
from elastic_cache.server import ServerOptions, create_app
from elastic_cache.service import Service
from fake_service import TEXT, FakeService
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import Error as BrowserError
from serving import running, wait_until

# Chromium as root has no sandbox, and must not look for its maker's hosts.
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


expect.set_options(timeout=20_000)


@contextmanager
def browser_or_reason() -> Iterator[Browser | str]:
    """A headless Chromium, the system's or playwright's; else why there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except BrowserError as error:
            yield f"no Chromium can be started: {str(error).splitlines()[0]}"
            return
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browser_or_reason() as found:
        if isinstance(found, str):
            pytest.skip(found)
        yield found


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService(elastic_cache.load("tiny").model.tokenizer)


@pytest.fixture(scope="module")
def url(service: FakeService) -> Iterator[str]:
    with running(create_app(service, elastic_cache.load("tiny").model, ServerOptions())) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str, service: FakeService) -> Iterator[Page]:
    """The loaded page; at the end it must not have failed or asked anybody else."""
    service.reset()
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not _own(request.url, url)
            else None)  # fmt: skip
    open_page(page, url)
    yield page
    page.close()
    assert problems == []


def _own(address: str, url: str) -> bool:
    return address.startswith((url, "data:"))


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("tiny")


def ask(page: Page, prompt: str = "How many?") -> None:
    page.fill("#prompt", prompt)
    page.click("#go")


def ended(page: Page) -> None:
    expect(page.locator("body[data-state=idle]")).to_have_count(1)


def test_an_answer_denoises(page: Page, service: FakeService) -> None:
    service.holds_at = 2
    page.select_option("#policy", "rolling")
    page.fill("#gen_length", "40")
    ask(page)
    expect(page.locator("#answer .token")).to_have_text(["Ava", " has"])
    expect(page.locator("#answer .mask")).to_have_count(38)
    token = page.locator("#answer .token").first
    assert "confidence 50.0 %" in (token.get_attribute("title") or "")
    service.goes_on.set()
    ended(page)
    expect(page.locator("#answer")).to_have_text(TEXT)
    expect(page.locator("#steps")).to_have_text("5")
    expect(page.locator("#status")).to_have_text("The answer: " + TEXT)
    expect(page.locator("#refreshed")).to_have_text("97 %")
    asked = service.tickets[-1].settings
    assert (asked["policy"], asked["gen_length"]) == ("rolling", 40)


def test_keys_send_stop_and_walk(page: Page, service: FakeService) -> None:
    service.holds_at = 1
    page.fill("#prompt", "How many?")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#answer .token").first).to_be_visible()
    page.keyboard.press("Escape")
    ended(page)
    expect(page.locator("#detail")).to_have_text("Stopped.")
    assert service.tickets[-1].is_cancelled.wait(5)
    page.focus("#answer")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#detail")).to_contain_text('"Ava" · place 0')


def test_stop_button_ends_the_request(page: Page, service: FakeService) -> None:
    service.holds_at = 0
    ask(page)
    wait_until(lambda: service.tickets)
    expect(page.locator("#go")).to_have_text("Stop")
    page.click("#go")
    assert service.tickets[-1].is_cancelled.wait(5)
    ended(page)


def test_what_the_model_writes_stays_text(page: Page, service: FakeService) -> None:
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    service.words = (evil,)
    ask(page)
    ended(page)
    expect(page.locator("#answer")).to_have_text(evil)
    assert page.locator("#answer img, #answer script").count() == 0
    assert page.title() == "elastic-cache"


def test_refusals_are_shown(page: Page, service: FakeService) -> None:
    page.fill("#gen_length", "9999")
    ask(page)
    expect(page.locator("#alert")).to_contain_text("at most 4096 are answered")
    page.fill("#gen_length", "")
    service.fails_at = 1
    ask(page)
    expect(page.locator("#alert")).to_contain_text("the server failed on this request")


def test_a_server_with_a_key_asks_for_it(browser: Browser, service: FakeService) -> None:
    service.reset()
    model = elastic_cache.load("tiny").model
    page = browser.new_page()
    with running(create_app(service, model, ServerOptions(api_key="secret"))) as url:
        page.goto(url)
        expect(page.locator("#key")).to_be_visible()
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_contain_text("tiny")
        ask(page)
        expect(page.locator("#answer")).to_have_text(TEXT)
        page.close()


def test_a_phone_does_not_scroll_sideways(browser: Browser, url: str, service: FakeService) -> None:
    service.reset()
    page = browser.new_page(viewport={"width": 340, "height": 700})
    open_page(page, url)
    page.click("summary")
    ask(page, "A long word: " + "x" * 200)
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    page.close()


def take_picture(path: Path) -> None:
    """The page with half an answer of the embedded model, which has refreshed now and then."""
    engine = elastic_cache.load("tiny")
    with browser_or_reason() as browser, Service(engine) as service:
        if isinstance(browser, str):
            sys.exit(browser)
        with running(create_app(service, engine.model, ServerOptions())) as url:
            page = browser.new_page(
                viewport={"width": 1000, "height": 820},
                device_scale_factor=1.5,
                reduced_motion="reduce",
            )
            open_page(page, url)
            page.fill("#gen_length", "128")
            page.click("summary")
            page.fill("#gamma", "0.99")
            page.fill("#max_steps", "34")  # an answer that stays as it stands half-way
            page.click("summary")
            page.click("#go")
            page.wait_for_selector("#answer .token")
            ended(page)
            page.screenshot(path=path)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
