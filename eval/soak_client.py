"""A process of soak clients: run as a file, it imports nothing of chunkcache and little else.

It reads one JSON object from stdin, and writes one to stdout:

    {url, seconds, clients, seed, model, requests: [{body, texts: [...]}]}
    {counts: {...}, examples: [...]}

Each client is a thread that asks, one request after the other, until time is up. Most answers are read whole and
compared with the texts that are right, streamed or not; some are left in the middle; and some requests are bad ones,
which have to be refused with a status below 500.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
VANISH, BAD = 0.15, 0.15  # shares of requests
WAIT_S = 600  # for each read: an answer that takes longer is taken for lost
EXAMPLES = 5  # of what went wrong, without its text


def bad_requests(model: str) -> list[tuple[str, str, bytes]]:
    """Return requests that are wrong, each as method, path and body."""
    good: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
    wrong = [
        {**good, "model": "another"}, {**good, "nope": 1}, {**good, "messages": []}, {**good, "n": 10_000},
        {**good, "temperature": -1}, {**good, "messages": [{"role": "user", "content": "long " * 60_000}]},
        {**good, "response_format": {"type": "json_schema"}}, {**good, "logit_bias": {"99999999": 1}}, [], 7,
    ]  # fmt: skip
    bodies = [json.dumps(each).encode() for each in wrong] + [b"", b"{", b"\xff\xfe", b'{"model": NaN}']
    return [("POST", CHAT, body) for body in bodies] + [("POST", "/v1/nothing", b"{}"), ("DELETE", CHAT, b"")]


class Client(threading.Thread):
    """One client.

    Args:
        plan: as it is read from stdin.
        number: of this client.
    """

    def __init__(self, plan: dict[str, Any], number: int) -> None:
        super().__init__()
        self._plan, self._draw = plan, random.Random(f"{plan['seed']} {number}")
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def run(self) -> None:
        """Ask until time is up."""
        end = time.monotonic() + self._plan["seconds"]
        bad = bad_requests(self._plan["model"])
        with httpx.Client(base_url=self._plan["url"], timeout=WAIT_S) as client:
            while time.monotonic() < end:
                kind, number = self._draw.random(), self._draw.randrange(len(self._plan["requests"]))
                try:
                    if kind < BAD:
                        self._misbehave(client, *self._draw.choice(bad))
                    else:
                        self._ask(client, number, vanish=kind < BAD + VANISH)
                except httpx.HTTPError as error:
                    self._count("transport_errors", f"{type(error).__name__} at request {number}")

    def _ask(self, client: httpx.Client, number: int, vanish: bool) -> None:
        request = self._plan["requests"][number]
        stream = vanish or self._draw.random() < 0.5
        body = {**request["body"], "stream": stream}
        if not stream:
            response = client.post(CHAT, json=body)
            if self._refused(response.status_code, number):
                return
            found = response.json()
            self._compare(number, found["choices"][0]["message"]["content"], found["usage"])
            return
        body["stream_options"] = {"include_usage": True}
        leave = self._draw.randrange(1, 12) if vanish else None
        text, usage = "", None
        with client.stream("POST", CHAT, json=body) as response:
            if self._refused(response.status_code, number):
                response.read()
                return
            lines = response.iter_lines()  # held: a response ends with its iterator
            for count, line in enumerate(line for line in lines if line.startswith("data: {")):
                if count == leave:
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    self._count("error_events", f"{event['error'].get('code')} at request {number}")
                    return
                usage = event.get("usage") or usage
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if vanish:
            self._count("vanished")
        elif usage is None:
            self._count("cut_short", f"no usage at request {number}")
        else:
            self._compare(number, text, usage)

    def _compare(self, number: int, text: str, usage: dict[str, Any]) -> None:
        told = usage["prompt_tokens_details"]["chunkcache"][0]
        for name in ("hits", "misses", "lost"):
            self.counts[name] += told[name]
        self.counts["answers"] += 1
        if text in self._plan["requests"][number]["texts"]:
            return
        if told[
            "lost"
        ]:  # a chunk that went while it was loaded is computed with the prompt, so nearer to full prefill
            self._count("answers_after_loss")
        else:
            self._count("wrong_answers", f"request {number}, {told['hits']} hits and {told['misses']} misses")

    def _misbehave(self, client: httpx.Client, method: str, path: str, body: bytes) -> None:
        response = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        if 400 <= response.status_code < 500:
            self._count("refused")
        else:
            self._count("bad_requests_answered_otherwise", f"{response.status_code} to {method} {path} {body[:40]!r}")
            self.counts["status_5xx"] += response.status_code >= 500

    def _refused(self, status: int, number: int) -> bool:
        if status >= 500:
            self._count("status_5xx", f"{status} at request {number}")
        elif status == 429:
            self._count("told_to_come_back")
            time.sleep(1)
        elif status != 200:
            self._count("good_requests_refused", f"{status} at request {number}")
        return status != 200

    def _count(self, name: str, example: str | None = None) -> None:
        self.counts[name] += 1
        if example is not None and len(self.examples) < EXAMPLES:
            self.examples.append(f"{name}: {example}")


def main() -> None:
    """Run the clients of one process."""
    plan = json.load(sys.stdin)
    clients = [Client(plan, number) for number in range(plan["clients"])]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    counts: Counter[str] = Counter()
    for client in clients:
        counts.update(client.counts)
    json.dump({"counts": counts, "examples": [text for client in clients for text in client.examples]}, sys.stdout)


if __name__ == "__main__":
    main()
