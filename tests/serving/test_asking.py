"""How servers are asked: a busy one again, another never; and where the key goes."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from dpo_peft.errors import OptionError
from dpo_peft.serving import asking
from dpo_peft.serving.asking import Endpoint

KEY = "abc-123"


@pytest.fixture
def server(monkeypatch: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers with the `next` statuses in turn, 200 then; what it was asked, and how long was waited."""
    seen: dict[str, Any] = {"next": [], "asked": [], "waited": [], "told": {"a": [1]}}
    monkeypatch.setattr(asking.time, "sleep", seen["waited"].append)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen["asked"].append((self.path, self.headers["Authorization"], json.loads(body)))
            self.answer()

        def do_GET(self) -> None:
            seen["asked"].append((self.path, self.headers["Authorization"], None))
            self.answer()

        def answer(self) -> None:
            status = seen["next"].pop(0) if seen["next"] else 200
            if status is None:
                return  # the connection ends without an answer
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://localhost:{self.server.server_port}/other")  # type: ignore[attr-defined]
            self.end_headers()
            told = seen["told"] if status < 400 else {"error": f"no, {self.headers['Authorization']}"}
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1/", seen
        listening.shutdown()


def test_a_busy_server_is_asked_again(server: Any) -> None:
    url, seen = server
    seen["next"] = [429, 503, None]
    assert Endpoint(url, key=KEY).ask("/x", {"b": 2}, lambda told: told["a"][0]) == 1
    assert seen["asked"] == 4 * [("/v1/x", f"Bearer {KEY}", {"b": 2})] and seen["waited"] == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("statuses", "times", "said"),
    [
        ([400], 1, "Error 400: .* See that it runs there, that at ends where /x begins"),
        ([401], 1, "Error 401: .* Give its key by api_key or OPENAI_API_KEY"),
        ([500] * 9, asking.TRIES, "Error 500"),
        ([], 1, "KeyError: 'choices'"),
    ],
)
def test_a_refusal_is_said_without_the_key(server: Any, statuses: list[int], times: int, said: str) -> None:
    url, seen = server
    seen["next"] = [*statuses]
    with pytest.raises(OptionError, match=f"(?s)^at: {url}x gave no answer.*{said}") as error:
        Endpoint(url, "at", KEY).ask("/x", {}, lambda told: told["choices"])
    assert len(seen["asked"]) == times and KEY not in str(error.value)
    assert ("Bearer <key>" in str(error.value)) == bool(statuses)


def test_the_key_goes_to_no_other_server(server: Any, monkeypatch: Any) -> None:
    """A redirect is followed without it; an empty one is none."""
    url, seen = server
    seen["next"] = [302]
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert Endpoint(url).ask("/x", {}) == {"a": [1]}
    assert seen["asked"] == [("/v1/x", f"Bearer {KEY}", {}), ("/other", None, None)]
    monkeypatch.setenv("OPENAI_API_KEY", "")
    Endpoint(url).ask("/x", {})
    assert seen["asked"][-1][1] is None and KEY not in repr(Endpoint(url, key=KEY))


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [("localhost:8000", None, "at='localhost:8000' must begin with"), ("http://a", "a\nb", "no key has")],
)
def test_what_can_not_be_asked_is_refused(url: str, key: str | None, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Endpoint(url, "at", key)


def test_a_server_that_is_not_there_is_asked_once(server: Any) -> None:
    with pytest.raises(OptionError, match="Connection refused"):
        Endpoint("http://127.0.0.1:9").ask("/x", {})
    assert server[1]["waited"] == [0]
