"""Each request has an id, one line in the log and one trace; nothing that it said is in them."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from support.llm import QUESTION, TEXTS, wrapped
from support.server import MODEL, served

from chunkcache.serve.logs import Lines
from chunkcache.serve.record import Recorder
from chunkcache.serve.tenants import Tenant, Tenants, digest
from chunkcache.serve.tracing import Tracer, tracer

KEY = "the-key-of-this-test"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}
DOCUMENTS = {"documents": list(TEXTS)}
SECRET = "the launch code is swordfish"
STAGES = {"tokenise", "queue", "lookup", "rerotate", "recompute", "decode"}


class Kept(logging.Handler):
    """Keeps lines in the form of the server's log."""

    def __init__(self, form):
        super().__init__()
        self.setFormatter(Lines(form))
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def traces():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(traces):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traces))
    tenants = Tenants({digest(KEY): Tenant("one")})
    with served(wrapped(policy="query:ratio=0.2,lead=0"), tenants=tenants, observers=[Tracer(provider)]) as running:
        yield running


@pytest.fixture
def log():
    """Return what is logged, a JSON object per line."""
    kept = Kept("json")
    logger = logging.getLogger("chunkcache")
    before = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept.lines
    logger.removeHandler(kept)
    logger.setLevel(before)


def ask(server, path="chat/completions", headers=None, **asked):
    headers = {"Authorization": f"Bearer {KEY}", **(headers or {})}
    return httpx.post(f"{server[0]}/v1/{path}", json={**ASK, **asked}, headers=headers, timeout=60)


def waited_for(lines, count=1):
    """Return the first lines, once they are there: a request is over when its answer has been sent."""
    end = time.monotonic() + 30
    while len(lines) < count and time.monotonic() < end:
        time.sleep(0.01)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("given", ["abc-1.2_3", "a" * 128])
def test_the_id_of_a_request_comes_back(server, given):
    assert ask(server, headers={"X-Request-ID": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "with space", "new\tline", "a" * 129, '"quoted"'])
def test_one_that_is_none_is_made(server, given):
    made = [
        ask(server, headers={} if given is None else {"X-Request-ID": given}).headers["x-request-id"] for _ in "ab"
    ]
    assert len(set(made)) == 2
    assert all(len(each) == 32 and each.isalnum() for each in made)


def test_errors_have_an_id_too(server):
    for response in (
        httpx.get(f"{server[0]}/nothing"),
        httpx.post(f"{server[0]}/v1/chat/completions", json=ASK),
        ask(server, max_tokens=10**6),
    ):
        assert response.status_code >= 400
        assert response.headers["x-request-id"]


def test_a_request_is_one_line_that_says_what_was_done(server, log):
    usage = ask(server, headers={"x-request-id": "mine"}, **DOCUMENTS).json()["usage"]
    [line] = waited_for(log)
    assert line["event"] == "request"
    assert (line["id"], line["tenant"], line["status"]) == ("mine", "one", 200)
    assert (line["route"], line["level"], line["model"]) == ("/v1/chat/completions", "info", MODEL)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert line["policy"].startswith("query")
    assert line["hits"] + line["misses"] == line["chunks"] == 3
    assert sum(line["stages_s"].values()) == pytest.approx(line["ttft_s"], abs=1e-4)
    assert line["finish"][0] in ("length", "stop")
    assert line["duration_s"] >= line["ttft_s"]


def test_nothing_that_was_said_is_in_it(server, log, traces):
    traces.clear()
    said = [{"role": "user", "content": SECRET}]
    for asked in (
        {"messages": said},
        {"documents": [SECRET]},
        {"documents": [{"id": SECRET, "title": SECRET, "text": SECRET}]},
        {"messages": said, "stop": SECRET},
        {"cache_salt": SECRET},
        {"messages": said, "reuse": SECRET},
        {"model": SECRET},
        {"messages": [{"role": SECRET, "content": SECRET}]},
    ):
        ask(server, **asked)
    httpx.get(f"{server[0]}/v1/models/{SECRET}", headers={"Authorization": f"Bearer {KEY}"})
    httpx.get(f"{server[0]}/{SECRET}?{SECRET}")
    waited_for(log, 10)
    assert len(log) == 10
    told = "\n".join([*log, *(span.to_json() for span in traces.get_finished_spans())])
    assert "swordfish" not in told
    assert KEY not in told


def test_a_line_of_text_says_the_same():
    record = logging.LogRecord("chunkcache.serve", logging.INFO, "", 0, "request", (), None)
    record.fields = {"id": "a b", "status": 200, "stages_s": {"queue": 0.5}, "finish": ["stop", "length"], "x": ""}
    line = Lines("text").format(record)
    assert line.endswith(' INFO request id="a b" status=200 stages_s.queue=0.5 finish=stop,length x=""')


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_logged_once_and_without_its_text(monkeypatch, log, stream, caplog):
    with served() as running:
        engine = running[1].llm.engine
        monkeypatch.setattr(engine, "prefilled", lambda *_: [][_fail()])
        response = ask(running, stream=stream)
        lines = waited_for(log, 2)
    assert response.headers["x-request-id"]
    assert "swordfish" not in response.text
    assert "swordfish" not in "".join(log)
    faults = [line for line in lines if line["event"] != "request"]
    [fault] = faults
    assert fault["error"] == "ValueError"
    assert "test_record.py" in fault["traceback"]
    assert "KeyError" in fault["traceback"]  # what it came from
    [line] = [line for line in lines if line["event"] == "request"]
    assert (line["error"], line["status"]) == ("ValueError", 200 if stream else 500)
    assert not [record for record in caplog.records if record.exc_info]


def test_an_error_outside_of_answers_is_told_as_one(monkeypatch, log, caplog):
    with served() as running:
        monkeypatch.setattr(running[1], "about", _fail)
        response = httpx.get(f"{running[0]}/v1/models")
        lines = waited_for(log, 2)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert sorted(line["event"] for line in lines) == ["a request failed: ValueError", "request"]
    assert "swordfish" not in "".join(log) + response.text + caplog.text


def _fail(*_):
    try:
        {}[SECRET]
    except KeyError as error:
        raise ValueError(SECRET) from error


def test_a_client_that_goes_away_is_seen_as_such(server, log):
    asked = {**ASK, "max_tokens": 380, "logit_bias": {"2": -100}, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server[0]}/v1/chat/completions", json=asked, headers=headers) as response:
        next(response.iter_lines())
    [line] = waited_for(log)
    assert line["client_gone"]


def test_a_trace_has_the_stages_below_the_request(server, traces):
    ask(server, **DOCUMENTS)  # now they are stored
    traces.clear()
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    usage = ask(server, headers={"traceparent": parent, "x-request-id": "traced"}, **DOCUMENTS).json()["usage"]
    end = time.monotonic() + 30
    while not any(span.parent and span.kind.name == "SERVER" for span in traces.get_finished_spans()):
        assert time.monotonic() < end
        time.sleep(0.01)
    *children, request = traces.get_finished_spans()
    assert request.name == f"chat {MODEL}"
    assert f"{request.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{request.parent.span_id:016x}" == parent.split("-")[2]
    told = request.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == MODEL
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert told["gen_ai.usage.cache_read.input_tokens"] > 0
    assert told["gen_ai.response.finish_reasons"][0] in ("stop", "length")
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/chat/completions", 200)
    assert told["chunkcache.request_id"] == "traced"
    assert request.status.status_code == StatusCode.UNSET
    assert {span.name for span in children} >= STAGES | {"select"}
    assert all(span.parent.span_id == request.context.span_id for span in children)
    assert all(request.start_time <= span.start_time <= span.end_time <= request.end_time for span in children)


def test_an_error_is_one_in_its_trace(server, traces, monkeypatch):
    monkeypatch.setattr(server[1], "about", _fail)
    traces.clear()
    httpx.get(f"{server[0]}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    end = time.monotonic() + 30
    while not traces.get_finished_spans() and time.monotonic() < end:
        time.sleep(0.01)
    [span] = traces.get_finished_spans()
    assert (span.name, span.attributes["error.type"]) == ("GET /v1/models", "ValueError")
    assert span.status.status_code == StatusCode.ERROR
    assert not span.status.description
    assert not span.events


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
def test_traces_go_to_the_endpoint_by_otlp(path):
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    collector.got = []
    thread = threading.Thread(target=collector.serve_forever, daemon=True)
    thread.start()
    send = tracer(f"http://127.0.0.1:{collector.server_port}{path}")
    recorder = Recorder([send])
    recorder.end(recorder.begin("GET", {}))
    send.provider.shutdown()
    collector.shutdown()
    collector.server_close()
    thread.join()
    [(asked, body)] = collector.got
    assert asked == "/v1/traces"
    assert b"chunkcache" in body


def test_what_is_counted_has_vllms_names(server):
    ask(server, **DOCUMENTS)
    ask(server, **DOCUMENTS)
    text = httpx.get(f"{server[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    counts = {name.removeprefix("chunkcache_"): float(value) for name, value in counts.items()}
    assert counts['prompt_tokens_cached_by_source_total{source="host"}'] == counts["prompt_tokens_cached_total"] > 0
    by_source = [value for name, value in counts.items() if name.startswith("prompt_tokens_by_source_total")]
    assert sum(by_source) == counts["prompt_tokens_total"]
    assert counts['chunk_hits_total{tier="memory"}'] >= 3
    assert counts['kv_bytes{tier="memory"}'] > counts['kv_entries{tier="memory"}'] > 0
    assert counts["request_queue_time_seconds_count"] == counts["request_prefill_time_seconds_count"] >= 2
    assert counts['prefill_stage_seconds_count{stage="queue"}'] == counts["request_queue_time_seconds_count"]
    assert counts["request_prefill_kv_computed_tokens_count"] >= 2


def test_the_log_goes_where_it_is_told_to():
    from chunkcache.serve import logs

    names = ("chunkcache", "uvicorn")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    levels = {name: logging.getLogger(name).level for name in names}
    stream = io.StringIO()
    try:
        logs.configure("json", stream)
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("uvicorn.error").exception("it broke")
    finally:
        for name in names:
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = before[name]
            logger.setLevel(levels[name])
    [line] = map(json.loads, stream.getvalue().splitlines())
    assert (line["event"], line["error"], line["level"]) == ("it broke", "ValueError", "error")
    assert "swordfish" not in stream.getvalue()
