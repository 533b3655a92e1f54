"""Ranges of a file on the Hub, each read once."""

from __future__ import annotations

import re
import threading
import time

from qmerge.errors import CheckpointError

TRIES = 4
SECONDS_BETWEEN_TRIES = 1.0
"""After the first failure; doubled after each further one."""

TEMPORARY = (408, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer the next time."""

TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
"""``Content-Range`` of a part of a file."""


class RemoteFile:
    """A file on the Hub. What was read stays in memory: the same scales are needed for every target. Threads may share one.

    Args:
        hub_id: of the model.
        name: the file's path in it.
        commit: which version.
    """

    def __init__(self, hub_id: str, name: str, commit: str) -> None:
        from huggingface_hub import hf_hub_url

        self.name = name
        self.size = 0
        """Bytes of the whole file; known after the first read."""
        self._url = hf_hub_url(hub_id, name, revision=commit)
        self._parts: dict[tuple[int, int], bytes] = {}
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` … ``stop``.

        Raises:
            CheckpointError: the Hub does not answer with them.
        """
        known = self._known(start, stop)
        if known is not None:
            return known
        # Without the lock: other threads read other ranges meanwhile.
        content = self._request(start, stop)
        with self._lock:
            self._parts[start, stop] = content
        return content

    def _known(self, start: int, stop: int) -> bytes | None:
        """A range that was read before, by itself or in a larger one."""
        with self._lock:
            if (start, stop) in self._parts:
                return self._parts[start, stop]
            for (first, end), content in self._parts.items():
                if first <= start and stop <= end:
                    return content[start - first : stop - first]
        return None

    def _request(self, start: int, stop: int) -> bytes:
        """One range over the network. A server that is busy is asked again."""
        seconds = SECONDS_BETWEEN_TRIES
        for number in range(1, TRIES + 1):
            try:
                return self._ask(start, stop)
            except _TemporaryError as problem:
                if number == TRIES:
                    raise CheckpointError(f"{self.name}: cannot be read from the Hub: {problem}") from problem
                time.sleep(seconds)
                seconds *= 2
        raise AssertionError("the loop above returns or raises")

    def _ask(self, start: int, stop: int) -> bytes:
        from huggingface_hub import get_session
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        # Without it, a proxy may compress the answer, and a range of compressed bytes is of no use.
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = get_session().get(self._url, headers=headers)
            if response.status_code in TEMPORARY:
                raise _TemporaryError(f"status {response.status_code}")
            hf_raise_for_status(response)
        except HfHubHTTPError as cause:
            raise CheckpointError(f"{self.name}: cannot be read from the Hub: {str(cause).splitlines()[0]}") from cause
        except (_TemporaryError, CheckpointError):
            raise
        except Exception as cause:  # the class depends on the HTTP library that the Hub library uses
            raise _TemporaryError(str(cause) or type(cause).__name__) from cause
        # A server that does not know ranges answers with the whole file and status 200.
        total = TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        content: bytes = response.content
        if response.status_code != 206 or total is None or len(content) != stop - start:
            raise CheckpointError(
                f"{self.name}: the Hub answered with {len(content)} bytes and status {response.status_code}, expected the "
                f"{stop - start} bytes from {start} on. Download the model first (hf download), and give its folder"
            )
        self.size = int(total[1])
        return content


class _TemporaryError(Exception):
    """Another try may succeed."""
