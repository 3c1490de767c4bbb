"""The dashboard: what its JSON says, to whom, and what the page makes of it in Chromium."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager

import httpx
import pytest
from support.browser import CONTRASTS, LOOKS
from support.llm import QUESTION, TEXTS, chat_tokenizer, wrapped
from support.server import MODEL, served

from chunkcache.engine.stats import RequestStats
from chunkcache.serve.dashboard import KEPT, Ring, pieces
from chunkcache.serve.record import Recorder
from chunkcache.serve.tenants import Tenant, Tenants, digest

ONE, TWO = "key-of-the-first-tenant", "key-of-the-second-one"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}
DOCUMENTS = [{"id": f"doc-{number}", "data": {"text": text}} for number, text in enumerate(TEXTS)]
POLICY = "query:ratio=0.2,lead=0"
TENANTS = Tenants({digest(ONE): Tenant("one"), digest(TWO): Tenant("two")})


@pytest.fixture(scope="module")
def server():
    with served(wrapped(policy=POLICY), tenants=TENANTS, dashboard=True) as (url, service):
        headers = {"Authorization": f"Bearer {ONE}"}
        chunks = {"texts": list(TEXTS), "documents": ["doc-0", "doc-1", "doc-2"]}
        httpx.post(f"{url}/v1/chunks", json=chunks, headers=headers).raise_for_status()
        for asked in ({}, {"documents": DOCUMENTS[::-1]}, {"reuse": "off"}):
            asked = {**ASK, "documents": DOCUMENTS, **asked}
            httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers).raise_for_status()
        yield url, service


def get(server, path, key=ONE, **options):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{server[0]}/dashboard/api/{path}", headers=headers, **options)


def requests(server, count=3):
    """Return what is told of the last requests, once they are over."""
    end = time.monotonic() + 30
    while True:
        found = [each for each in get(server, "state").json()["requests"] if "text" in each]
        if len(found) >= count:
            return found
        assert time.monotonic() < end
        time.sleep(0.01)


# --- the JSON


def test_requests_are_told_with_their_stages(server):
    full, reversed_, first = requests(server)[:3]
    assert (full["policy"], first["policy"]) == ("full", str(server[1].llm.engine.policy))
    assert first["hits"] == reversed_["hits"] == 3
    assert first["stages_s"]["queue"] >= 0
    assert first["state"] == "done"
    state = get(server, "state").json()
    assert (state["model"], state["tenant"]) == (MODEL, "one")
    assert {each["source"]: each["chunks"] for each in state["sources"]} == {"memory": 6, "computed": 3}


def test_a_prompt_is_told_token_by_token(server):
    shown = get(server, f"requests/{requests(server)[1]['number']}").json()
    assert len(shown["tokens"]) == shown["prompt_tokens"] == sum(length for _, length in shown["states"])
    assert TEXTS[0] in "".join(shown["tokens"])
    assert {state for state, _ in shown["states"]} == {"exact", "reused", "recomputed", "computed"}
    assert [chunk["document"] for chunk in shown["chunks"]] == ["doc-2", "doc-1", "doc-0"]
    assert len(shown["attention"]) == len(shown["tokens"])
    assert sum(shown["attention"]) == pytest.approx(1, abs=1e-3)


def test_a_policy_that_does_not_look_has_no_attention(server):
    shown = get(server, f"requests/{requests(server)[0]['number']}").json()
    assert shown["attention"] is None
    assert shown["states"] == [["computed", shown["prompt_tokens"]]]


def test_tenants_see_nothing_of_one_another(server):
    state = get(server, "state", TWO).json()
    assert (state["requests"], state["sources"], state["tenant"]) == ([], [], "two")
    number = requests(server)[0]["number"]
    for other in (number, 10**6):  # there or not, it looks alike
        response = get(server, f"requests/{other}", TWO)
        assert (response.status_code, "bridge" in response.text) == (404, False)
        assert response.json() == get(server, f"requests/{number}", TWO).json()
    store = get(server, "store", TWO).json()
    assert (store["total"], store["entries"], [tier["entries"] for tier in store["tiers"]]) == (0, [], [0])
    assert get(server, "store", TWO, params={"document": "doc-0"}).json()["total"] == 0


@pytest.mark.parametrize("path", ["state", "requests/1", "store"])
def test_nothing_is_told_without_a_key(server, path):
    for key in ("", "another-key-that-is-none"):
        assert get(server, path, key).status_code == 401
    assert httpx.delete(f"{server[0]}/dashboard/api/store", params={"document": "doc-0"}).status_code == 401


def test_what_is_stored_is_found_and_deleted_by_document(monkeypatch):
    with served(wrapped(policy=POLICY), dashboard=True) as running:
        chunks = {"texts": list(TEXTS), "documents": ["a", "a", "b"]}
        httpx.post(f"{running[0]}/v1/chunks", json={**chunks, "cache_salt": "salted"})
        httpx.post(f"{running[0]}/v1/chunks", json=chunks)
        [tier] = running[1].llm.store.tiers().values()
        entries, listed = tier.entries, []
        with monkeypatch.context() as patch:
            patch.setattr(type(tier), "entries", lambda _, wanted: listed.append(wanted) or entries(wanted))
            everything = get(running, "store").json()["total"]
        assert len(listed) == 1  # for both salts
        assert get(running, "store", params={"document": "a"}).json()["total"] == 4
        assert get(running, "store", params={"document": "none"}).json()["total"] == 0
        address = f"{running[0]}/dashboard/api/store"
        assert httpx.delete(address, params={"document": ""}).status_code == 400
        assert httpx.delete(address).status_code == 400
        assert httpx.delete(address, params={"document": "a"}).json() == {"deleted": 4}
        left = get(running, "store").json()
        assert (left["total"], left["tiers"][0]["entries"]) == (everything - 4, everything - 4)
        assert {"key", "tokens", "nbytes", "tiers"} <= left["entries"][0].keys()


def test_without_keys_it_is_for_this_machine_alone():
    with served(dashboard=True) as (url, _):
        assert httpx.get(f"{url}/dashboard/api/state").status_code == 200
        for path in ("/", "/dashboard/api/state", "/dashboard/page.js"):
            response = httpx.get(url + path, headers={"Host": "rebound.example"})
            assert response.status_code == 403


def test_there_is_none_unless_it_is_asked_for(server):
    with served() as (url, service):
        for path in ("/", "/dashboard/page.js", "/dashboard/api/state", "/dashboard/api/store"):
            assert httpx.get(url + path).status_code == 404
        assert not service.watched


def test_files_of_the_page_and_no_others(server):
    policies = set()
    for path, kind in (("/", "html"), ("/dashboard/page.css", "css"), ("/dashboard/page.js", "javascript")):
        response = httpx.get(server[0] + path)
        assert response.status_code == 200
        assert kind in response.headers["content-type"]
        policies.add(response.headers["content-security-policy"])
    [policy] = policies
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    for path in ("/dashboard/index.html", "/dashboard/..%2fapp.py", "/dashboard/dashboard.py", "/dashboard/"):
        assert httpx.get(server[0] + path).status_code in (404, 405)


def test_only_the_last_prompts_are_kept():
    with served(dashboard=True) as (url, service):
        for _ in range(3):
            httpx.post(f"{url}/v1/chat/completions", json={**ASK, "max_tokens": 1})
        state = httpx.get(f"{url}/dashboard/api/state").json()
        answers = [each for each in state["requests"] if each.get("text")]
        assert len(answers) >= 2
        llm = service.llm
    ring, recorder = Ring(), Recorder()
    record = recorder.begin("POST", {})
    ring(record)  # which asked for nothing
    assert ring.of(Tenant()) == []
    request = llm.engine.prepare(lambda: llm.prompts.build(QUESTION, TEXTS), "reuse")
    stats: RequestStats = llm.engine.prefill(request).stats
    record.answers = _Answers(request, stats)
    for _ in range(KEPT + 5):
        ring(record)
    assert len(ring.of(Tenant())) == KEPT
    assert ring.sources(Tenant())[0]["chunks"] == 3 * (KEPT + 5)


class _Answers:
    """As much of answers as a record looks at."""

    prompt_tokens = completion_tokens = cached_tokens = 0

    def __init__(self, request, stats):
        self.choices = [_Named(request=request, documents={})]
        self.tickets = [_Named(stats=stats, began=1.0)]


class _Named:
    def __init__(self, **named):
        vars(self).update(named)


@pytest.mark.parametrize("text", ["The bridge.", " two  spaces\n\nand lines", "naïve café – 日本語 🙂", ""])
def test_pieces_of_tokens_are_the_text(text):
    tokenizer = chat_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_request_that_runs_is_told_without_its_text():
    asked = {**ASK, "max_tokens": 300, "logit_bias": {"2": -100}, "stream": True}
    with served(tenants=TENANTS, dashboard=True) as running:
        address, headers = f"{running[0]}/v1/chat/completions", {"Authorization": f"Bearer {ONE}"}
        with httpx.stream("POST", address, json=asked, headers=headers) as response:
            lines = response.iter_lines()
            for _ in range(3):
                next(lines)
            [told] = get(running, "state").json()["requests"]
            assert get(running, "state", TWO).json()["requests"] == []
            assert get(running, f"requests/{told['number']}").status_code == 404
        assert told["state"] == "decoding"
        assert "text" not in told
        assert told["ttft_s"] > 0


# --- the page


@pytest.fixture(params=LOOKS)
def page(request, browser, server):
    """Open the page with a key; at the end see that it complained of nothing and asked nobody else."""
    (width, height), theme = request.param
    requests(server)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    opened = context.new_page()
    complaints, asked = [], set()
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda each: asked.add(each.url.split("/")[2]))
    opened.goto(f"{server[0]}/")
    opened.locator("#key").fill(ONE)
    opened.keyboard.press("Enter")
    opened.locator("#requests li").first.wait_for()
    yield opened
    assert [each for each in complaints if "401" not in each] == []  # as long as there was no key
    assert asked == {server[0].split("/")[2]}
    context.close()


def shown(page, index):
    """Open the prompt of a request."""
    page.locator("#requests button:not([disabled])").nth(index).click()
    page.locator("#text span").first.wait_for()


def fits(page):
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return width <= window


def test_what_it_shows_can_be_read(page):
    assert page.locator("#requests li").count() >= 3
    assert page.locator("#login").is_hidden()
    bars = page.locator(".ttft")
    assert "recompute" in bars.first.get_attribute("aria-label")
    for bar in bars.all():
        assert bar.evaluate("(bar) => bar.childElementCount") > 3
        assert bar.evaluate("(bar) => bar.scrollWidth <= bar.clientWidth")
    assert page.locator("#sources tr").first.inner_text().split()[:4] == ["memory", "6", "67", "%"]
    assert fits(page)
    assert page.evaluate(CONTRASTS) == []
    page.get_by_role("button", name="theme").click()
    assert page.evaluate(CONTRASTS) == []


def test_a_prompt_is_shown_by_what_happened_to_its_tokens(page):
    shown(page, 1)
    text = page.locator("#text")
    assert all(sentence in text.inner_text() for sentence in TEXTS)
    for state in ("exact", "reused", "recomputed", "computed"):
        assert text.locator(f"span.{state}").count() > 0
        assert page.locator("#states").get_by_text(state, exact=True).is_visible()
    line = "(token) => getComputedStyle(token).borderBottomStyle"
    marked = [text.locator(f"span.{state}").first.evaluate(line) for state in ("exact", "reused", "recomputed")]
    assert len(set(marked)) == 3  # colour is not the only sign
    assert "Chunk 1 (doc-2)" in text.inner_text()
    text.locator("span.recomputed").first.hover()
    assert "recomputed" in page.locator("#token").inner_text()
    assert "of the question’s attention" in page.locator("#token").inner_text()
    assert fits(page)
    assert page.evaluate(CONTRASTS) == []


@pytest.mark.parametrize("page", LOOKS[1:3], indirect=True)
def test_attention_shows_on_hover_and_by_a_button(page):
    shown(page, 1)
    looked = page.locator("#text.attention")
    page.locator(".piece").last.hover()
    assert looked.count() == 1
    page.locator("#h-prompt").hover()
    assert looked.count() == 0
    page.locator("#attend").focus()
    page.keyboard.press("Space")
    assert page.locator("#attend").get_attribute("aria-pressed") == "true"
    assert looked.count() == 1
    colours = "[...document.querySelectorAll('#text span')].map((s) => getComputedStyle(s).backgroundColor)"
    assert len(set(page.evaluate(colours))) > 5
    assert page.evaluate(CONTRASTS) == []
    shown(page, 0)  # of a policy that does not look
    page.locator("#attend:disabled").wait_for()
    assert looked.count() == 0


@pytest.mark.parametrize("page", LOOKS[:1], indirect=True)
def test_it_can_be_used_by_keyboard_alone(page):
    page.locator("#requests button:not([disabled])").nth(1).focus()
    page.keyboard.press("Enter")
    page.locator("#text span").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "h-prompt"
    page.locator("#text").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#token").inner_text().startswith("Token 1:")
    page.keyboard.press("ArrowDown")
    assert page.locator("#token").inner_text().startswith("Token 11:")
    assert page.locator("#text .at").count() == 1
    page.locator("#close").focus()
    page.keyboard.press("Enter")
    assert page.locator("#prompt").is_hidden()
    assert page.evaluate("document.activeElement.closest('#requests') !== null")


def test_a_wrong_key_is_told_and_the_right_one_is_kept_for_the_tab(browser, server):
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{server[0]}/")
    page.locator("#key").fill("a-key-that-nobody-has")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("not known to the server").wait_for()
    assert page.locator("#main").is_hidden()
    page.locator("#key").fill(ONE)
    page.get_by_role("button", name="Show").click()
    page.locator("#requests li").first.wait_for()
    assert page.evaluate("getComputedStyle(document.querySelector('.ttft i')).transitionDuration") == "0s"
    page.reload()
    page.locator("#requests li").first.wait_for()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    other = context.new_page()
    other.goto(f"{server[0]}/")
    other.locator("#key").wait_for()
    context.close()


@contextmanager
def page_over(browser, documents):
    """Yield a new page and the URL of a server that holds chunks of these documents."""
    with served(wrapped(policy=POLICY), dashboard=True) as (url, _):
        chunks = {"texts": list(TEXTS), "documents": documents}
        httpx.post(f"{url}/v1/chunks", json=chunks).raise_for_status()
        context = browser.new_context()
        yield context.new_page(), url
        context.close()


def test_the_answer_to_an_older_search_is_not_shown_as_that_to_a_newer_one(browser):
    with page_over(browser, ["hills", "hills", "sea"]) as (page, url):
        held = []
        first = re.compile(r"/store\?document=$")  # the page's own, before anything is searched
        page.route(first, lambda route: held.append(route))
        with page.expect_request(first):
            page.goto(f"{url}/")
        page.locator("#document").fill("hills")
        page.keyboard.press("Enter")
        page.get_by_text("2 entries of document hills").wait_for()
        with page.expect_response(first) as answered:
            held[0].continue_()
        answered.value.finished()
        page.evaluate("() => new Promise((done) => setTimeout(done, 100))")  # what is done with it is done by then
        assert page.locator("#found").inner_text() == "2 entries of document hills"


def test_a_document_is_searched_and_deleted_after_a_question(browser):
    with page_over(browser, ["hills", "hills", "<b>sea</b>"]) as (page, url):
        page.goto(f"{url}/")
        page.locator("#document").fill("hills")
        page.keyboard.press("Enter")
        page.get_by_text("2 entries of document hills").wait_for()
        page.get_by_role("button", name="Delete…").click()
        page.get_by_role("button", name="Keep").click()
        assert page.locator("#found").inner_text() == "2 entries of document hills"
        page.get_by_role("button", name="Delete…").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_text("2 entries of document hills deleted").wait_for()
        assert page.locator("#delete").is_disabled()
        page.locator("#document").fill("<b>sea</b>")
        page.keyboard.press("Enter")
        page.get_by_text("1 entry of document <b>sea</b>").wait_for()
        assert page.locator("#found b").count() == 0
        page.locator("summary").click()
        assert page.locator("#entries tr").count() == 1
