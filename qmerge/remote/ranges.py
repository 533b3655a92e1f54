"""Ranges of a file on the Hub, each read once."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from qmerge.errors import CheckpointError, first_line

TRIES = 4
SECONDS_BETWEEN_TRIES = 1.0
"""After the first failure; doubled after each further one."""

TEMPORARY = (408, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer the next time."""

CONTENT_RANGE = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+)")
"""Header of an answer with a part of a file."""


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
        if start == stop:  # HTTP has no empty range
            return b""
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
        from huggingface_hub import constants, get_session
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        # Without it, a proxy may compress the answer, and a range of compressed bytes is of no use.
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        # The library's session waits for ever by default.
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", self._url, headers=headers, timeout=seconds) as response:
                if response.status_code in TEMPORARY:
                    raise _TemporaryError(f"status {response.status_code}")
                if response.is_error:
                    response.read()  # what the Hub says is in the body, too
                hf_raise_for_status(response)
                return self._content(response, start, stop)
        except HfHubHTTPError as cause:
            raise CheckpointError(f"{self.name}: cannot be read from the Hub: {first_line(cause)}") from cause
        except (_TemporaryError, CheckpointError):
            raise
        except Exception as cause:  # the class depends on the HTTP library that the Hub library uses
            raise _TemporaryError(str(cause) or type(cause).__name__) from cause

    def _content(self, response: Any, start: int, stop: int) -> bytes:
        """The content of an answer, read only where it is the range that was asked for.

        Raises:
            CheckpointError: it is not. A server that does not know ranges answers with the whole file and status 200.
        """
        part = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if part is None or response.status_code != 206 or (int(part["first"]), int(part["last"])) != (start, stop - 1):
            raise self._other_answer(f"status {response.status_code}", start, stop)
        content: bytes = response.read()
        if len(content) != stop - start:
            raise self._other_answer(f"{len(content)} bytes", start, stop)
        self.size = int(part["total"])
        return content

    def _other_answer(self, answer: str, start: int, stop: int) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: the Hub answered with {answer}, expected the {stop - start} bytes from {start} on. Download the "
            f"model first (hf download), and give its folder"
        )


class _TemporaryError(Exception):
    """Another try may succeed."""
