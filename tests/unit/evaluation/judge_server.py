"""A small OpenAI-compatible server that answers as it is told, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answer = Callable[[Body], "Response | str"]


@dataclass(frozen=True)
class Response:
    """A status, a body and headers."""

    text: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class JudgeServer:
    """``answer`` gets a request's body and gives its words, or a whole ``Response``. ``asked``: all bodies."""

    answer: Answer
    model: str = "tiny"
    url: str = ""
    asked: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """The last message of every request."""
        return [body["messages"][-1]["content"] for body in self.asked]


def completion(text: str | None, **further: Any) -> str:
    """A chat completion's body."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **further}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})


@contextmanager
def serving(answer: Answer, model: str = "tiny") -> Iterator[JudgeServer]:
    """The server, while it runs."""
    judge = JudgeServer(answer, model)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                return self._send(Response('{"detail": "Not Found"}', 404))
            self._send(Response(json.dumps({"object": "list", "data": [{"id": judge.model, "object": "model"}]})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self._send(Response('{"detail": "Not Found"}', 404))
            with lock:
                judge.asked.append(body)
                judge.headers.append({name.lower(): value for name, value in self.headers.items()})
            said = judge.answer(body)
            self._send(said if isinstance(said, Response) else Response(completion(said)))

        def _send(self, response: Response) -> None:
            data = response.text.encode()
            self.send_response(response.status)
            for name, value in {"Content-Type": "application/json", **response.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    judge.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    try:
        yield judge
    finally:
        running.shutdown()
        running.server_close()
