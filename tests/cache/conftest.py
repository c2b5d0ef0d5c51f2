"""Stores on an S3 server of our own, and writers to attack."""

import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cache import object_client
from contracts.attacks import Nursery
from contracts.object_server import ObjectServer

SECRET = "never-to-be-shown"


@pytest.fixture(scope="session")
def running_server() -> Iterator[ObjectServer]:
    server = ObjectServer()
    yield server
    server.stop()


@pytest.fixture
def server(running_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": running_server.url,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    # No test waits for a server that is down for longer than it must.
    monkeypatch.setattr(object_client, "_RETRIES", {"max_retries": 2, "retry_timeout": timedelta(seconds=20)})
    yield running_server
    running_server.behave()


@pytest.fixture
def url(server: ObjectServer) -> str:
    """Of a store that is still to be made, in a bucket of its own."""
    bucket = f"bucket-{secrets.token_hex(6)}"
    server.make_bucket(bucket)
    # A name that has to be escaped on its way.
    return f"s3://{bucket}/our däta/S.zarr"


@pytest.fixture(scope="module")
def nursery(scratch: Path) -> Iterator[Nursery]:
    with Nursery(scratch / "said") as nursery:
        yield nursery
