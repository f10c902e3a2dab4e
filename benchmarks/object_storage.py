"""An object storage (S3) on this machine, whose requests are counted, delayed and refused as asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}

REFUSALS = {"403 Forbidden": "InvalidAccessKeyId", "503 Slow Down": "SlowDown"}
"""Statuses with the code that S3 gives for them."""


class ObjectStorage:
    """Answers requests on the loopback interface.

    Attributes:
        environment: what makes clients use it.
        delay: seconds of a request before it is answered.
        refusal: of a request, by method and path: a status, a row of ``REFUSALS``; None where it is answered.
        requests: method and path of what was asked for.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.refusal: Callable[[str, str], str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._storage = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}"}
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = request["REQUEST_METHOD"], request["PATH_INFO"]
        self.requests.append((method, path))
        time.sleep(self.delay)
        status = self.refusal(method, path)
        if status is not None:
            request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
            start(status, [("Content-Type", "application/xml")])
            said = f"<Error><Code>{REFUSALS[status]}</Code><Message>Refused.</Message></Error>"
            return [] if method == "HEAD" else [said.encode()]
        answer: Iterable[bytes] = self._storage(request, start)
        return answer

    def make_bucket(self, name: str) -> None:
        client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)

    def stop(self) -> None:
        """No more requests are answered."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def object_storage() -> Iterator[ObjectStorage]:
    """One that is stopped at the end."""
    storage = ObjectStorage()
    try:
        yield storage
    finally:
        storage.stop()
