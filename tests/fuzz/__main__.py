"""Search for inputs that crash a reader, guided by the lines that they reach: ``python -m tests.fuzz READER [SECONDS]``.

It needs atheris (``pip install atheris``), which no test does. New inputs are kept in a temporary folder, whose name is
printed; copy those that crashed, and the smallest of the others, to ``tests/fuzz/corpus/READER``.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path


def main(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["qmerge"]):
        from qmerge.errors import QmergeError

        from .readers import READERS

    reader = READERS[name]
    found = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for number, seed in enumerate(reader.seeds()):
        (found / f"seed-{number}").write_bytes(seed)

    def run(content: bytes) -> None:
        with contextlib.suppress(QmergeError):
            reader.run(content)

    corpus = Path(__file__).parent / "corpus" / name
    print(f"inputs are kept in {found}")
    limits = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-max_len=20000",
        f"-artifact_prefix={found}/",
    ]
    atheris.Setup([sys.argv[0], *limits, str(found), *([str(corpus)] if corpus.is_dir() else [])], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60)
