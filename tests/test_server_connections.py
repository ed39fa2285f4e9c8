"""Connections that dawdle, pile up, stop reading, or are not HTTP: each is ended, and nobody else notices."""

from __future__ import annotations

import json
import logging
import socket
import time

import pytest

from serving import ASK, Served, served
from threads import once_in_time

GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = "x" * 900


def connected(server: Served) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.http.base_url.port or 0))
    client.settimeout(20)
    return client


def all_of(client: socket.socket) -> bytes:
    """Until the server closes."""
    found = b""
    while data := client.recv(65_536):
        found += data
    return found


def said_by_now(client: socket.socket) -> bytes | None:
    try:
        return client.recv(65_536)
    except BlockingIOError:
        return None


def chat(**fields: object) -> bytes:
    body = json.dumps({**ASK, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HT", id="a head that ends"),
        pytest.param(GET + GET[:20], id="a second head that ends"),
        pytest.param(GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\n1"), id="a body that nobody reads"),
    ],
)
def test_a_request_that_does_not_come_ends_its_connection(sent: bytes) -> None:
    def ends_in_time() -> bool:
        with connected(server) as client:
            client.sendall(sent)
            began = time.monotonic()
            said = all_of(client)
            if not sent.startswith(GET[:10]):
                assert b"408" in said.splitlines()[0]
                assert b"did not arrive in time" in said
            return time.monotonic() - began < 4

    with served(body_seconds=0.3) as server:
        assert once_in_time(ends_in_time)
        assert server.chat().status_code == 200


def test_a_head_byte_by_byte_is_too_slow() -> None:
    with served(body_seconds=0.4) as server, connected(server) as client:
        client.setblocking(False)
        for byte in GET[:-1]:
            client.send(bytes([byte]))
            time.sleep(0.05)
            if (said := said_by_now(client)) is not None:
                break
        assert said is not None
        assert said.startswith(b"HTTP/1.1 408")


def test_a_connection_that_keeps_asking_stays() -> None:
    with served(body_seconds=0.4) as server, connected(server) as client:
        for _ in range(15):
            client.sendall(GET)
            said = b""
            while not said.endswith(b"]}"):
                said += client.recv(65_536)
            assert said.startswith(b"HTTP/1.1 200")
            time.sleep(0.1)


def test_more_connections_than_may_be_are_told_so() -> None:
    with served(max_connections=4) as server:
        server.http.close()  # its own
        kept = [connected(server) for _ in range(4)]
        server.until(lambda: len(server.running._server.server_state.connections) == 4)
        with connected(server) as client:
            said = all_of(client)
            assert said.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in said
            assert b"more connections are open than may be" in said
        kept[0].sendall(GET)
        assert kept[0].recv(100).startswith(b"HTTP/1.1 200")
        for client in kept:
            client.close()
        server.until(lambda: not server.running._server.server_state.connections)


def test_an_answer_that_nobody_reads_ends_its_connection() -> None:
    with served(LONG, unread_seconds=0.5, max_texts=200) as server, connected(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(chat(n=16, stream=True, logprobs=True, top_logprobs=20) * 5)
        server.until(lambda: bool(server.service.n_requests))
        server.until(lambda: not server.service.n_requests)
        server.until_empty()


@pytest.mark.parametrize("more", [GET[:9], GET, GET * 3])
def test_a_client_that_sends_more_and_hangs_up_frees_its_slot(more: bytes) -> None:
    with served(LONG) as server:
        server.engine.seconds = 0.05
        with connected(server) as client:
            client.sendall(chat())
            before = server.service.worker.stats.tokens_generated
            server.until(lambda: server.service.worker.stats.tokens_generated > before + 3)
            client.sendall(more)
            time.sleep(0.1)  # a packet of its own
            steps = server.service.worker.stats.steps
        server.until_empty()
        assert server.service.worker.stats.steps - steps < 20  # of 900


def test_requests_behind_each_other_are_answered_in_turn() -> None:
    with served() as server, connected(server) as client:
        client.sendall(GET + chat() + GET + chat(n=0) + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert [reply[:3] for reply in all_of(client).split(b"HTTP/1.1 ")[1:]] == [b"200"] * 3 + [b"400", b"200"]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\r\n\r\n", id="TLS"),
        pytest.param(GET.replace(b"Host: x", b"X-Long: " + b"x" * 100_000), id="a long header"),
        pytest.param(GET.replace(b"Host: x", b"X-Request-Id: a\rSet-Cookie: b"), id="two headers in one"),
        pytest.param(chat().replace(b"Host: x", b"Host: x\r\nContent-Length: 3"), id="two lengths"),
        pytest.param(chat().replace(b"Host: x", b"Transfer-Encoding : chunked"), id="a name with a space"),
        pytest.param(GET.replace(b"Host: x", b"Host: x\r\nTransfer-Encoding: gzip, chunked"), id="another coding"),
    ],
)
def test_what_is_no_http_is_a_400_in_json_and_no_line_in_the_log(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with served() as server, connected(server) as client, caplog.at_level(logging.ERROR):
        client.sendall(sent)
        head, body = all_of(client).split(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501"))
        assert b"Set-Cookie" not in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not caplog.records


@pytest.mark.parametrize("keys", [(), ("k" * 32,)])
def test_bad_chunks_amid_a_body_end_the_connection_alone(
    keys: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Where a request is refused before its body is read, that answer and the parser's got into each other's way."""
    with served(keys=keys) as server, connected(server) as client, caplog.at_level(logging.INFO):
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n"
        )
        assert all_of(client).startswith(b"HTTP/1.1 400")
        server.until(lambda: not server.service.n_requests)
        server.until(lambda: "POST /v1/completions" in caplog.messages)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_length_and_chunks_at_once_are_one_request() -> None:
    """Where two readers differ on where a request ends, a proxy can be made to pass on what it never saw."""
    with served() as server, connected(server) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\n{}\r\n0\r\n\r\n"
        )
        client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        said = all_of(client)
        assert said.count(b"HTTP/1.1 ") <= 2
        assert said.startswith(b"HTTP/1.1 400")
