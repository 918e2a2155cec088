"""The pages for people: what is served to whom, and what a real browser makes of it."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.page_files import FILES, FOLDER, PAGES, PATHS
from hybrid_cache.api.server.routes.pages import MOST_LIVE
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.browser import PROGRAM, Page, browsing
from tests.api.servers import in_process, new_app, new_engine, over_the_wire

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
TEXT = "The box holds a lamp, and the lamp is lit. " * 8


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def complete(url: str, prompt: str = TEXT, key: str = "", **more: str) -> None:
    body = {"prompt": prompt, "max_tokens": 2, **more}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=bearer(key), timeout=30)
    assert answer.status_code == 200, answer.text


def samples(url: str, count: int, key: str = "") -> list[dict[str, Any]]:
    """The first events of the stream that the page follows."""
    found = []
    with httpx.stream("GET", f"{url}/cache/live", headers=bearer(key), timeout=30) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
    return found


def test_every_file_is_served_and_each_is_one_that_is_there(url: str) -> None:
    assert {*PAGES.values(), *FILES} == {path.name for path in FOLDER.iterdir()}
    for path in PATHS:
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["content-type"].split(";")[0] in ("text/html", "text/css", "text/javascript")


def test_nothing_is_loaded_from_elsewhere_or_written_into_a_page() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|innerHTML|eval\(", text), path


def test_pages_have_names_languages_and_labels() -> None:
    for name in PAGES.values():
        text = (FOLDER / name).read_text()
        assert '<html lang="en">' in text
        assert "<title>" in text
        assert text.count("<h1") == 1
        known = set(re.findall(r'id="([\w-]+)"', text))
        assert set(re.findall(r'(?:aria-labelledby|href)="#?(t\d|main)"', text)) <= known
        for href in re.findall(r'href="(/[^"]*)"', text):
            assert href in {*PATHS, "/metrics", "/health", "/openapi.json"}


def test_without_pages_there_are_none(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, pages=False)) as client:
            for path in (*PATHS, "/cache/live", "/cache/outline"):
                assert (await client.get(path)).status_code == 404

    asyncio.run(test())


def test_with_keys_a_page_is_open_and_what_it_shows_is_not(sum_text: TextModel) -> None:
    app = new_app(new_engine(), sum_text, api_keys=("alice", "bob"))
    with over_the_wire(app) as url:
        complete(url, key="alice")
        assert all(httpx.get(url + path).status_code == 200 for path in PATHS)
        for path in ("/cache/live", "/cache/outline", "/openapi.json"):
            assert httpx.get(url + path).status_code == 401
        assert len(httpx.get(f"{url}/cache/outline", headers=bearer("alice")).json()["data"]) == 1
        assert httpx.get(f"{url}/cache/outline", headers=bearer("bob")).json()["data"] == []
        assert samples(url, 1, "bob")[0]["tokens"]["miss"] > 0


def test_where_keys_share_a_cache_only_an_operator_sees_conversations(sum_text: TextModel) -> None:
    app = new_app(new_engine(), sum_text, api_keys=("a", "root"), operator_keys=("root",), shared_cache=True)
    with over_the_wire(app) as url:
        complete(url, key="a")
        assert httpx.get(f"{url}/cache/outline", headers=bearer("a")).status_code == 403
        assert httpx.get(f"{url}/cache/outline", headers=bearer("root")).json()["total"] == 1


def test_the_outline_has_states_by_name_and_no_text(sum_text: TextModel) -> None:
    engine = new_engine(budget_bytes=64 << 10)
    with over_the_wire(new_app(engine, sum_text)) as url:
        for number in range(12):
            complete(url, f"{TEXT}And this is the story of number {number}. " * 2)
        found = httpx.get(f"{url}/cache/outline", params={"limit": 3}).json()
        listed = httpx.get(f"{url}/cache/conversations").json()
        assert found["total"] == listed["total"]
        assert [each["name"] for each in found["data"]] == [each["name"] for each in listed["data"][:3]]
        for each in found["data"]:
            assert each["states"][-1]["name"] == each["name"]
            assert [s["tokens"] for s in each["states"]] == sorted(s["tokens"] for s in each["states"])
        assert found["gone"]
        assert {each["end"] for each in found["gone"]} <= {"evicted", "declined", "dropped"}
        assert "lamp" not in json.dumps(found)
        assert httpx.get(f"{url}/cache/outline", params={"limit": 0}).status_code == 400


def test_counts_come_each_second_and_are_those_of_the_metrics(url: str) -> None:
    first, second = samples(url, 2)
    assert 0.5 < second["time"] - first["time"] < 20
    assert sum(second["bytes"].values()) <= second["budget"]
    metrics = httpx.get(f"{url}/metrics").text
    assert set(re.findall(r'hybrid_cache_cache_bytes\{kind="(\w+)"', metrics)) == second["bytes"].keys()
    budget = re.search(r"^hybrid_cache_cache_budget_bytes (\S+)$", metrics, re.MULTILINE)
    assert budget is not None
    assert float(budget[1]) == second["budget"]


def test_so_many_pages_are_followed_and_no_more(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text)) as url, ExitStack() as followed:
        client = followed.enter_context(httpx.Client(base_url=url, timeout=30))
        lines = []
        for _ in range(MOST_LIVE):
            lines.append(followed.enter_context(client.stream("GET", "/cache/live")).iter_lines())
            assert next(lines[-1]).startswith("data: ")
        assert client.get("/cache/live").status_code == 503


def test_a_page_that_is_followed_does_not_keep_the_server_from_ending(sum_text: TextModel) -> None:
    engine = new_engine()

    async def test() -> None:
        app = new_app(engine, sum_text)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                followed = asyncio.ensure_future(client.get("/cache/live"))
                await asyncio.sleep(0.2)
                await engine.stop(0)
                assert (await asyncio.wait_for(followed, 5)).status_code == 200

    asyncio.run(test())


# In a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def quiet(page: Page) -> Iterator[Page]:
    """A page that complains of nothing, and asks nobody but the server."""
    page.complaints.clear()
    page.asked.clear()
    yield page
    page.value("1")  # what has come until now
    assert page.complaints == []
    assert {re.match(r"(\w+:(?://[^/:]*)?)", url)[1] for url in page.asked} <= {"http://127.0.0.1", "data:"}  # type: ignore[index]


@needs_browser
def test_the_cache_page_opens_and_follows(quiet: Page, url: str, engine: AsyncEngine) -> None:
    quiet.open(f"{url}/cache")
    quiet.until("document.querySelector('#state').textContent.startsWith('live')")
    complete(url, "a page that is looked at. " * 12)
    before = quiet.value("document.querySelector('#misses').innerText")
    complete(url, "Something that nobody has said. " * 12)
    quiet.until(f"document.querySelector('#misses').innerText !== {json.dumps(before)}")
    quiet.until("document.querySelectorAll('#tree details').length > 0")
    assert quiet.value("document.querySelectorAll('#budget polygon').length") == 7
    assert "KV pages" in quiet.value("document.querySelector('#budget').getAttribute('aria-label')")
    assert quiet.value("document.querySelector('#share').textContent").endswith("%")


@needs_browser
def test_text_is_shown_only_on_demand_and_all_by_the_keyboard(quiet: Page, url: str) -> None:
    complete(url, "The lamp of the keyboard. <b id='planted'>" * 12)
    quiet.open(f"{url}/cache")
    quiet.until("document.querySelectorAll('#tree summary').length > 0")
    assert "lamp" not in quiet.value("document.body.innerText")

    def walk_to(place: str) -> None:
        for _ in range(60):
            quiet.press("Tab")
            if quiet.value(f"document.activeElement?.matches({json.dumps(place)})"):
                return
        raise AssertionError(f"{place} cannot be reached")

    walk_to("#texts")
    quiet.press(" ")
    quiet.until("document.querySelectorAll('#tree summary').length > 0")
    walk_to("#tree summary")
    for _ in range(30):  # down to a conversation that ends here
        if not quiet.value("document.activeElement.parentElement.open"):
            quiet.press("Enter")
        if quiet.value("document.activeElement.parentElement.querySelector(':scope > div') !== null"):
            break
        walk_to("#tree summary")
    quiet.until("document.querySelectorAll('#tree pre').length > 0")
    assert "planted" in quiet.value("document.querySelector('#tree').innerText")
    assert quiet.value("document.querySelector('#planted')") is None


@needs_browser
def test_it_is_dark_where_people_want_that(quiet: Page, url: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    found = {}
    for scheme in ("light", "dark"):
        quiet.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        quiet.open(f"{url}/cache")
        found[scheme] = sum(map(int, re.findall(r"\d+", quiet.value(ground))))
    quiet.send("Emulation.setEmulatedMedia", features=[])
    assert found["dark"] < 150 < 600 < found["light"]


@needs_browser
def test_the_other_pages_say_what_is_here(quiet: Page, url: str) -> None:
    quiet.open(f"{url}/")
    quiet.until("document.querySelector('#facts').innerText.includes('sum')")
    assert quiet.value("document.querySelector('#state').textContent") == "ok"
    quiet.open(f"{url}/docs")
    quiet.until("document.querySelector('#routes').innerText.includes('POST /v1/chat/completions')")


@needs_browser
def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=("secret-key",))) as url:
        complete(url, key="secret-key")
        page.open(f"{url}/cache")
        page.until("document.activeElement?.matches('#key input')")
        page.write("secret-key")
        page.press("Enter")
        page.until("document.querySelector('#state').textContent.startsWith('live')")
        page.until("document.querySelectorAll('#tree details').length > 0")
        page.open(f"{url}/docs")
        page.until("document.querySelector('#routes').innerText.includes('POST /v1/messages')")
        page.open("about:blank")
