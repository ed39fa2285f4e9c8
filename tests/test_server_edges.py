"""Keys, limits, queues that are full, clients that leave, ends and failures: what an administrator relies on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from fourfold.errors import RuntimeFailure
from fourfold.scheduler import Limits as StepLimits
from fourfold.server.hosts import LOCAL
from serving import ASK, MODEL, Served, messages, served

KEY = "k" * 32
LONG = "x" * 900


@contextmanager
def hanging(server: Served, **fields: Any) -> Iterator[socket.socket]:
    """A chat request whose reply nobody reads; the client hangs up at the end."""
    body = json.dumps({**ASK, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.http.base_url.port or 0)) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        yield client


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(stream: bool) -> None:
    with served(LONG) as server:
        server.engine.seconds = 0.02
        with hanging(server, stream=stream):
            server.until(lambda: bool(server.engine.live))
            steps = server.service.worker.stats.steps
        server.until_empty()
        server.until(lambda: server.service.worker.stats.running == 0)
        assert server.service.worker.stats.steps - steps < 20  # of 900
        server.engine.seconds = 0
        assert server.chat(max_tokens=2).status_code == 200


def test_a_client_that_hangs_up_in_the_queue_leaves_it() -> None:
    with served(LONG) as server:  # two slots
        server.engine.seconds = 0.02
        with hanging(server), hanging(server):
            server.until(lambda: len(server.engine.live) == 2)
            with hanging(server):
                server.until(lambda: server.service.worker.stats.waiting == 1)
            server.until(lambda: server.service.worker.stats.waiting == 0)
            assert len(server.engine.live) == 2
        server.until_empty()


def test_a_full_queue_is_a_429_and_takes_nothing() -> None:
    with served(LONG, steps=StepLimits(max_running=2, max_waiting=1)) as server:
        server.engine.seconds = 0.02
        with hanging(server), hanging(server), hanging(server):
            server.until(lambda: server.service.worker.stats.waiting == 1)
            reply = server.chat(n=2)
            status, sentence, _ = messages(reply)
            assert (status, reply.headers["retry-after"]) == (429, "1")
            assert "try again later" in sentence
            assert server.service.worker.stats.waiting == 1
        server.until_empty()


def test_too_many_requests_are_a_429() -> None:
    with served(LONG, max_requests=1) as server:
        server.engine.seconds = 0.02
        with hanging(server):
            server.until(lambda: server.service.n_requests == 1)
            reply = server.chat()
            assert messages(reply)[0] == 429
            assert server.http.get("/health").status_code == 200
        server.until(lambda: not server.service.n_requests)
        server.engine.seconds = 0
        assert server.chat(max_tokens=1).status_code == 200


def test_keys() -> None:
    with served(keys=(KEY, "j" * 20)) as server:
        for path in ("/health", "/ready", "/", "/static/index.html"):
            assert server.http.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/stats", "/openapi.json", "/nothing"):
            assert server.http.get(path).status_code == 401
        reply = server.chat()
        status, sentence, _ = messages(reply)
        assert (status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert "Authorization: Bearer" in sentence
        for header in ("Bearer wrong", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x"):
            assert server.http.get("/v1/models", headers={"Authorization": header}).status_code == 401
        for header in (f"Bearer {KEY}", f"bearer {'j' * 20}"):
            assert server.http.get("/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize("root", ["/static", "/llm"])
def test_no_path_below_which_it_is_mounted_leads_past_the_keys(root: str) -> None:
    with served(keys=(KEY,), root_path=root) as server:
        for path in ("/v1/models", "/metrics", f"{root}/v1/models", f"{root}/metrics", f"{root}/stats"):
            assert server.http.get(path).status_code == 401
        for path in ("/health", f"{root}/static/index.html", f"{root}/health", f"{root}/ready", f"{root}/"):
            assert server.http.get(path).status_code == 200


def test_a_body_that_cannot_be_read_is_told_what_would_be_right() -> None:
    ask = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    with served() as server:

        def post(body: bytes, kind: str = "application/json") -> tuple[int, str, str | None]:
            return messages(server.http.post("/v1/completions", content=body, headers={"Content-Type": kind}))

        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            right = "the body must be JSON and say so: send the header Content-Type: application/json"
            assert post(ask, kind) == (400, right, None)
        for body in (b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": "\xff"}'):
            status, sentence, _ = post(body)
            assert (status, sentence.split(":")[0]) == (400, "the body is no JSON that can be read")


def test_without_a_key_a_body_is_not_read() -> None:
    with served(keys=(KEY,)) as server, hanging_body(server, declared=3_000_000) as client:
        assert b" 401 " in client.recv(100)


@contextmanager
def hanging_body(server: Served, declared: int | None) -> Iterator[socket.socket]:
    """A request whose body does not come."""
    length = "Transfer-Encoding: chunked" if declared is None else f"Content-Length: {declared}"
    with socket.create_connection(("127.0.0.1", server.http.base_url.port or 0)) as client:
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        client.settimeout(5)
        yield client


def test_a_body_that_is_too_large_is_refused_while_it_is_read() -> None:
    with served(max_body_bytes=10_000, body_seconds=0.3) as server:
        with hanging_body(server, declared=10_001) as client:
            assert b" 413 " in client.recv(100)
        with hanging_body(server, declared=None) as client:
            for _ in range(11):
                client.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            assert b" 413 " in client.recv(100)
        with hanging_body(server, declared=100) as client:  # and one that does not come
            assert b" 408 " in client.recv(100)
        with hanging_body(server, declared=100):
            pass
        assert messages(server.complete(prompt="x" * 20_000))[0] == 413
        assert server.chat().status_code == 200


def test_limits_of_schemas_and_messages() -> None:
    with served(max_schema_bytes=200, max_schema_depth=5, max_messages=2, max_tools=1, max_biases=1) as server:

        def refusal(**fields: Any) -> str:
            status, sentence, _ = messages(server.chat(**fields))
            assert status == 400
            return sentence

        def form(schema: dict[str, Any]) -> dict[str, Any]:
            return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

        deep: dict[str, Any] = {}
        for _ in range(7):
            deep = {"a": deep}
        assert "nested more than 5 deep" in refusal(response_format=form(deep))
        assert "bytes of JSON schema" in refusal(response_format=form({"description": "x" * 300}))
        assert "3 messages are more than the 2" in refusal(messages=[{"role": "user", "content": "x"}] * 3)
        tools = [{"type": "function", "function": {"name": n}} for n in "ab"]
        assert "2 tools are more than the 1" in refusal(tools=tools)
        assert "2 biases are more than the 1" in refusal(logit_bias={"1": 1, "2": 1})


def test_request_ids_come_back_where_they_are_sane() -> None:
    with served() as server:
        for sent, sane in (("abc-1.2:3", True), ("a b", False), ("x" * 129, False), ("<script>", False)):
            back = server.http.get("/v1/models", headers={"X-Request-Id": sent}).headers["x-request-id"]
            assert (back == sent) is sane
        assert server.http.get("/nothing").headers["x-request-id"].startswith("req-")


def test_paths_and_methods_that_are_not_there() -> None:
    with served() as server:
        assert messages(server.http.get("/v1/nothing"))[0] == 404
        assert messages(server.http.get("/v1/completions"))[0] == 405
        assert messages(server.http.get("/v1/models/other"))[0] == 404
        assert server.http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
        assert [m["id"] for m in server.http.get("/v1/models").json()["data"]] == [MODEL]


def test_pages_elsewhere_may_not_ask_unless_named() -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with served() as server:
        assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=asked).headers
        assert server.http.options("/v1/chat/completions", headers=asked).status_code == 405
    with served(origins=("https://a.example",), keys=(KEY,)) as server:
        theirs = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        reply = server.http.options("/v1/chat/completions", headers=asked | theirs)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        other = server.http.options("/v1/chat/completions", headers={**asked, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_another_name_that_leads_here_is_refused() -> None:
    """Of a page whose owner has its name lead to 127.0.0.1: to the browser they are one origin."""
    with served(hosts=LOCAL | {"chat.example"}) as server:
        for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "localhost.evil"):
            reply = server.http.post("/v1/chat/completions", json=ASK, headers={"Host": name})
            status, sentence, _ = messages(reply)
            assert (status, "--allowed-host NAME" in sentence) == (403, True)
            assert server.http.get("/health", headers={"Host": name}).status_code == 200
        for name in ("localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1", "chat.example:443", "localhost."):
            assert server.http.get("/v1/models", headers={"Host": name}).status_code == 200


def test_the_page_and_its_policy() -> None:
    with served() as server:
        reply = server.http.get("/")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        for name in ("..%2fapp.py", "nothing.js", "../app.py"):
            assert server.http.get(f"/static/{name}").status_code == 404


def test_figures() -> None:
    with served() as server:
        assert server.chat().status_code == 200
        assert server.chat(n=0).status_code == 400
        text = server.http.get("/metrics").text
        for line in (
            'fourfold_requests_total{route="/v1/chat/completions",status="200"} 1.0',
            'fourfold_requests_total{route="/v1/chat/completions",status="400"} 1.0',
            "fourfold_time_to_first_token_seconds_count 2.0",  # with the warm-up's
            "fourfold_running 0.0",
            'fourfold_kv_pages{state="total"} 32.0',
        ):
            assert line in text.splitlines()
        server.running._service.metrics.sample()
        stats = server.http.get("/stats").json()
        assert stats["tokens_per_second"] > 0
        assert stats["memory_share"] == stats["read_gb_s"]  # of 1 GB/s
        assert (stats["running"], stats["waiting"], stats["generated_tokens"]) == (0, 0, 11)


def test_before_it_is_warm_it_lives_but_is_not_ready() -> None:
    with served(wait=False) as server:
        server.engine.seconds = 0.2
        assert server.http.get("/health").status_code == 200
        if not server.service.is_ready:
            assert server.http.get("/ready").json() == {"status": "starting", "reason": "the model is warming up"}
            assert messages(server.chat())[0] == 503
        server.engine.seconds = 0
        server.until(lambda: server.service.is_ready)
        assert server.http.get("/ready").status_code == 200


def test_an_end_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    with served("x" * 60 + "<eos>") as server:
        server.engine.seconds = 0.02
        thread, found = in_background(server.chat)
        server.until(lambda: bool(server.engine.live))
        server.call(server.running.end)
        server.until(lambda: server.service.is_draining)
        with httpx.Client(base_url=server.address) as other:
            reply = other.post("/v1/chat/completions", json=ASK)
            assert messages(reply)[0] == 503
            assert reply.headers["retry-after"] == "1"
            assert other.get("/ready").json() == {"status": "draining", "reason": "the server is ending"}
        thread.join()
        assert found[0].json()["choices"][0]["message"]["content"] == "x" * 60
        server.thread.join(100)
        assert not server.thread.is_alive()


def test_an_end_does_not_wait_forever() -> None:
    with served(LONG, drain_seconds=0.2) as server:
        server.engine.seconds = 0.05
        thread, found = in_background(lambda: server.chat(stream=True))
        server.until(lambda: bool(server.engine.live))
        began = time.monotonic()
        server.call(server.running.end)
        thread.join()
        assert time.monotonic() - began < 30  # all of it takes 45 s
        *_, error, rest = found[0].text.split("\n\n")
        assert rest == ""
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server has ended"


@pytest.mark.parametrize("failure", [RuntimeFailure("rank 1 did not arrive"), ZeroDivisionError("oh")])
def test_a_model_that_fails_ends_every_request_and_the_server(failure: Exception) -> None:
    with served(LONG) as server:
        server.engine.seconds = 0.02
        requests = [in_background(lambda: server.chat()), in_background(lambda: server.chat(stream=True))]
        requests.append(in_background(lambda: server.chat(n=2)))  # which waits
        server.until(lambda: server.service.worker.stats.waiting == 2)
        server.engine.failure = failure
        for thread, _ in requests:
            thread.join(100)
            assert not thread.is_alive(), "a request hangs"
        whole, stream, waited = (found[0] for _, found in requests)
        for reply in (whole, waited):
            status, sentence, _ = messages(reply)
            assert status == 500
            assert str(failure) in sentence
        *_, error, rest = stream.text.split("\n\n")
        assert rest == ""
        assert str(failure) in json.loads(error.removeprefix("data: "))["error"]["message"]
        server.thread.join(100)
        assert not server.thread.is_alive()
        assert str(failure) in (server.service.worker.failure or "")
        server.service.is_draining = True


@pytest.mark.parametrize("context", [1, 3, 4, 5])
def test_a_context_of_a_few_positions_is_served(context: int) -> None:
    with served("x" * 9, context=context) as server:
        choice = server.complete(prompt=[65], max_tokens=4).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("x" * min(4, context), "length")
