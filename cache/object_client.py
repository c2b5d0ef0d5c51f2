"""Talks to one object store through obstore: addresses, credentials from the environment, errors in one line, and puts that
succeed for exactly one of several writers.

obstore, because zarr has a store over it (so one client serves rows and ledger), its wheel needs nothing else, and it offers
conditional puts on S3, Google and Azure alike; s3fs has no put that depends on an object's version.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from cache.errors import StoreError

TOKEN = "token"
"""Name of the metadata entry by which a writer knows an object as its own."""
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN where they are temporary) and AWS_REGION",
    "gs": "GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Scheme of an address -> the environment variables that open it."""
STORES: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# A shard of 50 MB takes longer than the client's 30 seconds on a slow line.
_CLIENT = {"connect_timeout": "10s", "timeout": "10min", "read_timeout": "1min"}
# Five to fifteen seconds of tries: an endpoint that stumbles is waited for, one that is down is told of soon.
_RETRIES = {
    "max_retries": 7,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 2},
    "retry_timeout": timedelta(minutes=5),
}

Version = dict[str, str]
"""What names one version of an object: `e_tag`, on Google also `version`."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a store says of an object."""

    version: Version
    token: str | None
    size: int
    last_modified: datetime
    """By the store's clock; S3 gives whole seconds."""


class ObjectClient:
    """The objects under one address. Names are relative to it."""

    def __init__(self, url: str) -> None:
        """Take an address such as `s3://bucket/prefix/S.zarr`; nothing is sent yet."""
        self.url = url.rstrip("/")
        self._scheme, _, rest = self.url.partition("://")
        self.bucket, _, prefix = rest.partition("/")
        if self._scheme not in STORES:
            raise StoreError(f"store {url}: addresses begin with {', '.join(f'{name}://' for name in STORES)}")
        if "@" in self.bucket:
            raise StoreError(
                f"a store's address holds no credentials; set {CREDENTIALS[self._scheme]} in the environment"
            )
        if not self.bucket or not prefix:
            raise StoreError(f"store {url}: give a bucket and a name in it, such as {self._scheme}://bucket/S.zarr")
        # Our client options replace the ones that obstore takes from the environment.
        options = {**_CLIENT, "allow_http": self._allows_http()}
        with self._told():
            self.store = STORES[self._scheme](self.bucket, prefix=prefix, client_options=options, retry_config=_RETRIES)

    def _allows_http(self) -> bool:
        """Whether plain http was asked for; an endpoint that would need it without that is refused."""
        is_allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on", "y")
        endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
        if self._scheme == "s3" and urlsplit(endpoint).scheme == "http" and not is_allowed:
            raise StoreError(
                f"the endpoint {endpoint} is plain http, which anyone on the way can read and change; use https, "
                "or set AWS_ALLOW_HTTP=true where the network is trusted"
            )
        return is_allowed

    def get(self, name: str, start: int = 0) -> bytes:
        """The bytes of an object from `start` on; raises FileNotFoundError."""
        with self._told():
            if start:
                return bytes(obstore.get(self.store, name, options={"range": {"offset": start}}).bytes())
            return bytes(obstore.get(self.store, name).bytes())

    def head(self, name: str) -> Head:
        """What is known of an object; raises FileNotFoundError."""
        with self._told():
            result = obstore.get(self.store, name, options={"head": True})
            meta = result.meta
            return Head(_version(meta), result.attributes.get(TOKEN), meta["size"], meta["last_modified"])

    def put(self, name: str, data: bytes) -> Version:
        """Write a whole object in one request, which is atomic."""
        with self._written():
            return _version(obstore.put(self.store, name, data, use_multipart=False))

    def swap(self, name: str, data: bytes, version: Version | None) -> Version:
        """Write a whole object if it still is `version`, or is absent for None; exactly one of several writers succeeds.

        Raises:
            FileExistsError: somebody else has written or removed it.
        """
        token = secrets.token_hex(8)
        try:
            with self._written():
                # mypy: the mode's type is a TypedDict that exists only for type checkers.
                mode: Any = version or "create"
                result = obstore.put(self.store, name, data, mode=mode, attributes={TOKEN: token}, use_multipart=False)
                return _version(result)
        except FileExistsError:
            # The client tries again after a lost answer, and then meets its own first try.
            with contextlib.suppress(FileNotFoundError):
                head = self.head(name)
                if head.token == token:
                    return head.version
            raise

    def delete(self, name: str) -> None:
        """Remove an object; none is no error."""
        with contextlib.suppress(FileNotFoundError), self._told():
            obstore.delete(self.store, name)

    def sizes(self, folder: str) -> dict[str, int]:
        """Names of the objects directly in a folder -> bytes."""
        with self._told():
            return {
                entry["path"]: entry["size"]
                for entry in obstore.list_with_delimiter(self.store, folder or None)["objects"]
            }

    def top_names(self) -> set[str]:
        """Names of the objects and folders at the top."""
        with self._told():
            listed = obstore.list_with_delimiter(self.store)
            return {*listed["common_prefixes"], *(entry["path"] for entry in listed["objects"])}

    def total_bytes(self) -> int:
        """What all objects take."""
        with self._told():
            return sum(entry["size"] for chunk in obstore.list(self.store) for entry in chunk)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Make an error of the client one line that names the address and says what to do."""
        try:
            yield
        except exceptions.BaseError as error:
            raise StoreError(self._in_words(error)) from error

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """As `_told`, for puts."""
        try:
            with self._told():
                try:
                    yield
                except (
                    exceptions.AlreadyExistsError,
                    exceptions.PreconditionError,
                    exceptions.NotModifiedError,
                ) as error:
                    raise FileExistsError(str(error).splitlines()[0]) from error
        except FileNotFoundError as error:
            # An object can always be put where there is a bucket.
            raise StoreError(self._no_bucket()) from error

    def _no_bucket(self) -> str:
        return f"{self.url}: there is no bucket {self.bucket!r}; make it, or check the address and AWS_ENDPOINT_URL"

    def _in_words(self, error: Exception) -> str:
        text, variables = str(error), CREDENTIALS[self._scheme]
        if "NoSuchBucket" in text:
            return self._no_bucket()
        if "169.254." in text or "metadata.google" in text:
            return f"{self.url}: no credentials were found; set {variables} in the environment"
        denied = ("403 Forbidden", "401 Unauthorized", "AccessDenied", "ExpiredToken")
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError) or any(
            word in text for word in denied
        ):
            return f"{self.url}: access denied; check {variables}, and that they may list, get, put and delete objects"
        # Without the query of an address: Azure keeps a secret there.
        first_line = re.sub(r"\?\S*", "", text.split("\n", 1)[0])[:300].strip()
        return (
            f"{self.url} could not be reached: {first_line}. What was committed before is kept; check the network, the "
            f"address of the endpoint and {variables}, and run the same command again"
        )


def _version(result: Any) -> Version:
    """The part of a put's or head's answer that names the version."""
    return {name: result[name] for name in ("e_tag", "version") if result[name] is not None}
