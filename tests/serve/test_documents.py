"""Indexes of the server's own: changed and searched over HTTP, each by its tenant alone."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from support.llm import QUESTION, TEXTS, wrapped
from support.server import MODEL, served

from chunkcache.kv import hashed_label
from chunkcache.serve.protocol import ChatRequest
from chunkcache.serve.rag import IndexLimits
from chunkcache.serve.tenants import Tenant, Tenants, digest
from chunkcache.store import EntryFilter, open_store

ONE, TWO = "key-of-the-first-tenant", "key-of-the-second-one"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}
DOCUMENTS = [
    {"id": f"{name}.md", "title": name.title(), "text": text}
    for name, text in zip(("bridge", "ferry", "keeper"), TEXTS, strict=True)
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with two tenants over two tiers."""
    store = open_store(f"tiered:memory://|disk://{tmp_path_factory.mktemp('kv')}")
    tenants = Tenants({digest(ONE): Tenant("one"), digest(TWO): Tenant("two")})
    with served(wrapped(store=store), tenants=tenants) as (url, service):
        yield url, service
    store.close()


@pytest.fixture
def http(keyed):
    """Clients of both tenants."""
    with _client(keyed[0], ONE) as one, _client(keyed[0], TWO) as two:
        yield one, two


def pdf(text):
    """Return a PDF of one page."""
    writer, stream = PdfWriter(), DecodedStreamObject()
    page = writer.add_blank_page(300, 300)
    stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    named = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    fonts = DictionaryObject({NameObject("/F1"): named})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    writer.write(out := io.BytesIO())
    return out.getvalue()


def _client(url, key):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def put(client, index="harbour", documents=DOCUMENTS, **more):
    return client.post("/v1/documents", json={"index": index, "documents": documents, **more})


def ask(client, index="harbour", k=2, **more):
    return client.post("/v1/chat/completions", json={**ASK, "rag": {"index": index, "k": k}, **more})


def stored(service, tenant, document):
    """Return in how many entries of each tier KV of a document are."""
    wanted = EntryFilter(document=hashed_label("document", document), tenant=hashed_label("tenant", tenant))
    return [len(list(tier.entries(wanted))) for tier in service.llm.store.tiers().values()]


def test_documents_are_added_searched_and_cited_in_the_answer(http, keyed):
    one, _ = http
    added = put(one).json()
    assert [each["id"] for each in added["data"]] == [each["id"] for each in DOCUMENTS]
    assert added["computed"] == 3
    assert put(one).json()["computed"] == 0  # the same again
    body = ask(one).json()
    found = body["chunkcache"]["documents"]
    assert found[0]["id"] == "bridge.md"
    assert found[0].keys() == {"id", "title", "chunk", "score"}
    assert found[0]["title"] == "Bridge"
    used = body["usage"]["prompt_tokens_details"]["chunkcache"][0]
    assert (used["chunks"], used["hits"], used["misses"]) == (2, 2, 0)
    chunks = [next(d["text"] for d in DOCUMENTS if d["id"] == each["id"]) for each in found]
    same = one.post("/v1/chat/completions", json={**ASK, "documents": chunks}).json()
    assert same["choices"][0]["message"]["content"] == body["choices"][0]["message"]["content"]


def test_a_stream_names_its_documents_in_its_last_chunk(http, keyed):
    put(http[0])
    with openai.OpenAI(base_url=f"{keyed[0]}/v1", api_key=ONE) as client:
        for usage in (False, True):
            parts = list(
                client.chat.completions.create(
                    **ASK,
                    stream=True,
                    stream_options={"include_usage": usage},
                    extra_body={"rag": {"index": "harbour", "k": 1}},
                )
            )
            assert parts[-1].model_extra["chunkcache"]["documents"][0]["id"] == "bridge.md"
            assert "chunkcache" not in (parts[0].model_extra or {})


def test_a_tenant_sees_no_other_tenants_documents(http):
    one, two = http
    put(one)
    for response in (
        ask(two),
        two.get("/v1/documents", params={"index": "harbour"}),
        two.delete("/v1/documents/bridge.md", params={"index": "harbour"}),
        ask(one, cache_salt="s"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "index_not_found"
    assert two.get("/v1/documents").json()["data"] == []
    assert put(one, cache_salt="s", documents=DOCUMENTS[:1]).json()["computed"] == 1  # not even by its KV
    salted = one.get("/v1/documents", params={"index": "harbour", "cache_salt": "s"}).json()
    assert [each["id"] for each in salted["data"]] == ["bridge.md"]


def test_an_update_and_a_deletion_leave_nothing_of_the_old_in_any_tier(http, keyed):
    one, service = http[0], keyed[1]
    put(one, "changing")
    assert min(stored(service, "one", "changing/ferry.md")) > 0
    new = {**DOCUMENTS[1], "text": "The ferry was sold, and nobody knows to whom it was sold in the end."}
    assert put(one, "changing", [new]).json()["computed"] == 1
    before = one.delete("/v1/documents/ferry.md", params={"index": "changing"})
    assert before.json() == {"id": "ferry.md", "object": "document.deleted", "deleted": True}
    again = one.delete("/v1/documents/ferry.md", params={"index": "changing"})
    assert (again.status_code, again.json()["error"]["code"]) == (404, "document_not_found")
    found = ask(one, "changing", k=9).json()["chunkcache"]["documents"]
    assert sorted(each["id"] for each in found) == ["bridge.md", "keeper.md"]
    for name in ("bridge.md", "keeper.md"):
        one.delete(f"/v1/documents/{name}", params={"index": "changing"})
    assert ask(one, "changing").status_code == 404  # it went with its last document


def test_kv_of_a_deleted_document_go_from_every_tier(keyed):
    url, service = keyed
    with _client(url, TWO) as two:
        put(two, "gone", DOCUMENTS[:1])
        assert min(stored(service, "two", "gone/bridge.md")) > 0
        two.delete("/v1/documents/bridge.md", params={"index": "gone"})
        assert stored(service, "two", "gone/bridge.md") == [0, 0]


def test_what_another_index_has_too_keeps_its_kv(http):
    one, _ = http
    put(one, "first", DOCUMENTS[:1])
    assert put(one, "second", DOCUMENTS[:1]).json()["computed"] == 0
    one.delete("/v1/documents/bridge.md", params={"index": "first"})
    used = ask(one, "second").json()["usage"]["prompt_tokens_details"]["chunkcache"][0]
    assert (used["hits"], used["misses"]) == (1, 0)


def test_what_a_request_computes_of_a_document_that_went_meanwhile_is_not_kept(keyed):
    url, service = keyed
    with _client(url, TWO) as two:
        put(two, "racing", DOCUMENTS[2:])
        asked = {**ASK, "rag": {"index": "racing"}}
        [choice] = service.chat(ChatRequest.model_validate(asked), Tenant("two"))
        two.delete("/v1/documents/keeper.md", params={"index": "racing"})
        choice.llm.engine.prefill(choice.request)  # it was prepared before
        assert max(stored_chunks(service, TEXTS[2])) > 0
        choice.found.ended()
        assert max(stored_chunks(service, TEXTS[2])) == 0


def test_an_answer_does_not_wait_for_what_is_deleted_behind_it(keyed, monkeypatch, caplog):
    url, service = keyed
    answered, threads = threading.Event(), []

    def ended():
        threads.append(threading.current_thread().name)
        answered.wait(60)
        raise OSError("the disk is away")

    search = service.indexes.search
    monkeypatch.setattr(service.indexes, "search", lambda *asked: replace(search(*asked), ended=ended))
    with _client(url, ONE) as one:
        put(one, "slow", DOCUMENTS[:1])
        assert ask(one, "slow").json()["chunkcache"]["documents"]
        answered.set()
        while not caplog.records:
            time.sleep(0.01)
    assert [each.startswith("chunkcache-") for each in threads] == [False]  # it is none of the scheduler's
    [said] = caplog.messages
    assert "could not be deleted" in said


def stored_chunks(service, text):
    """Return in how many entries of each tier a text is for the second tenant."""
    llm = service.view(Tenant("two"))
    key = llm.keys([text])[0]
    return [int(key in tier) for tier in llm.store.tiers().values()]


def test_documents_are_listed_by_pages_and_by_how_they_begin(http):
    one, _ = http
    put(one, "listed")
    params = {"index": "listed", "limit": 2}
    page = one.get("/v1/documents", params=params).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (["bridge.md", "ferry.md"], True)
    page = one.get("/v1/documents", params={**params, "after": "ferry.md"}).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (["keeper.md"], False)
    [ferry] = one.get("/v1/documents", params={**params, "q": "FER"}).json()["data"]
    assert ferry == {
        "object": "document", "id": "ferry.md", "title": "Ferry", "characters": len(TEXTS[1]), "chunks": 1,
        "tokens": ferry["tokens"],
    }  # fmt: skip
    names = one.get("/v1/documents").json()["data"]
    assert {"object": "index", "id": "listed", "documents": 3} in names


def test_files_are_read_and_their_names_are_labels(http, tmp_path):
    one, _ = http
    (tmp_path / "secret.txt").write_text("nobody may read this")
    files = [
        ("file", (f"../../{tmp_path}/secret.txt", b"A text about the mill by the lake.")),
        ("file", ("mill.md", b"# The mill\n\nIt grinds in spring.")),
        ("file", ("page.html", b"<title>Harbour</title><body><p>Boats lie in the harbour.</p></body>")),
        ("file", ("tower.pdf", pdf("The tower is open to visitors."))),
    ]
    added = one.post("/v1/documents", data={"index": "files"}, files=files)
    assert added.status_code == 200, added.text
    told = {each["id"]: each["title"] for each in added.json()["data"]}
    assert told.keys() == {f"../../{tmp_path}/secret.txt", "mill.md", "page.html", "tower.pdf"}
    assert (told["mill.md"], told["page.html"], told["tower.pdf"]) == ("The mill", "Harbour", "tower")
    said = {"messages": [{"role": "user", "content": "Is the tower open to visitors?"}]}
    found = ask(one, "files", k=1, **said).json()["chunkcache"]["documents"]
    assert [each["id"] for each in found] == ["tower.pdf"]
    gone = one.delete(f"/v1/documents/../../{tmp_path}/secret.txt".replace("..", "%2E%2E"), params={"index": "files"})
    assert gone.status_code == 200, gone.text
    assert (tmp_path / "secret.txt").exists()


@pytest.mark.parametrize(
    ("data", "files", "status", "says"),
    [
        ({"index": "x"}, [("file", ("a.exe", b"MZ"))], 400, "no known kind"),
        ({"index": "x"}, [("file", ("rows.jsonl", b'{"text": "t"}'))], 400, "no known kind"),
        ({"index": "x"}, [("file", ("a.pdf", b"no PDF"))], 400, "file-1.pdf"),
        ({"index": "x"}, [("file", ("a.txt", b"\xff\xfe"))], 400, "UTF-8"),
        ({"index": "x"}, [("file", ("a.txt", b"  "))], 400, "no text"),
        ({"index": "x"}, [("file", ("a.txt", b"1")), ("file", ("a.txt", b"2"))], 400, "same id"),
        ({"index": "x"}, [("file", (f"{number}.txt", b"t")) for number in range(33)], 400, "Too many files"),
        (
            {"index": "x", **{f"f{number}": "v" for number in range(9)}},
            [("file", ("a.txt", b"t"))],
            400,
            "Too many f",
        ),
        ({"index": "x" * 5000}, [("file", ("a.txt", b"t"))], 400, "maximum size"),
        ({"index": "../x"}, [("file", ("a.txt", b"t"))], 400, "index"),
        ({"index": "x", "path": "/etc"}, [("file", ("a.txt", b"t"))], 400, "fields"),
        ({}, [("file", ("a.txt", b"t"))], 400, "index"),
        ({"index": "x"}, [("other", ("a.txt", b"t"))], 400, "fields"),
    ],
)
def test_forms_are_bounded(http, data, files, status, says):
    response = http[0].post("/v1/documents", data=data, files=files)
    assert response.status_code == status, response.text
    assert says in response.json()["error"]["message"]
    assert ask(http[0], "x").status_code == 404  # nothing was made


@pytest.mark.parametrize("charset", ["undefined", "punycode", "no-such-charset", "zlib", '"'])
def test_a_form_in_a_charset_that_is_none_is_refused(http, charset):
    field = b'--x\r\nContent-Disposition: form-data; name="index"\r\n\r\n\\\xff\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nt\r\n--x--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    response = http[0].post("/v1/documents", content=field + file, headers=headers)
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "dictionary"),
        (b'{"index": "x"}', "documents"),
        (b'{"index": "a/b", "documents": [{"id": "1", "text": "t"}]}', "index"),
        (b'{"index": "x", "documents": [{"id": "1", "text": " "}]}', "white space"),
        (b'{"index": "x", "documents": [{"id": "1", "text": "t", "path": "/etc/passwd"}]}', "path"),
        (b'{"index": "x", "documents": [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}]}', "same id"),
    ],
)
def test_bad_documents_are_refused(http, body, says):
    response = http[0].post("/v1/documents", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]


def test_an_index_that_there_is_not_and_a_question_that_there_is_not(http):
    response = ask(http[0], "nothing")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "index_not_found", "rag.index")
    put(http[0])
    silent = ask(http[0], messages=[{"role": "system", "content": "Be brief."}])
    assert silent.status_code == 400
    assert "last" in silent.json()["error"]["message"]


def test_a_tenant_keeps_no_more_than_it_may(keyed, monkeypatch):
    url, service = keyed
    monkeypatch.setattr(service.indexes, "limits", IndexLimits(indexes=1, documents=2, characters=200))
    with _client(url, TWO) as two:
        for number in (1, 2):
            assert put(two, "small", [{"id": str(number), "text": "Some text. " * 5}]).status_code == 200
        refused = [
            put(two, "other", [{"id": "1", "text": "t"}]),
            put(two, "small", [{"id": "3", "text": "t"}]),
            put(two, "small", [{"id": "2", "text": "Longer text. " * 20}]),
        ]
        for response, what in zip(refused, ("indexes", "documents", "characters"), strict=True):
            assert (response.status_code, response.json()["error"]["code"]) == (413, "index_full")
            assert what in response.json()["error"]["message"]
        assert put(two, "small", [{"id": "2", "text": "t"}]).status_code == 200  # an update has room
