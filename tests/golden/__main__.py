"""Make the golden hashes, or compare those of other processors: see ``tests/golden/__init__.py``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .merges import HASHES, ROUNDINGS, TARGETS, golden_hashes, known_hashes, name_of

VARIANTS: dict[str, Mapping[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "four threads": {"OMP_NUM_THREADS": "4"},
    "other hash seed": {"PYTHONHASHSEED": "1"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "no AVX, no FMA": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
    },
}
"""Environment variables with which torch, MKL and numba compute as on other machines."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", action="store_true", help="merge as other processors would, and compare")
    parser.add_argument("--print", action="store_true", help="print the hashes as JSON instead of writing the file")
    options = parser.parse_args()
    if options.variants:
        sys.exit(max(map(differing, VARIANTS)))
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        hashes: dict[str, dict[str, str]] = {}
        for target in TARGETS:
            for rounding in ROUNDINGS:
                folder = Path(place) / "out"
                hashes[name_of(target, rounding)] = golden_hashes(folder, target, rounding)
                shutil.rmtree(folder)
    if options.print:
        print(json.dumps(hashes))
    else:
        HASHES.write_text(json.dumps(hashes, indent=2) + "\n")


def differing(variant: str) -> int:
    """Print which files differ; 1 if one does."""
    with tempfile.TemporaryDirectory(prefix="golden-") as cache:  # compiled code is for one kind of processor
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, **VARIANTS[variant]}
        command = [sys.executable, "-m", "tests.golden", "--print"]
        printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    found = json.loads(printed)
    different = [
        f"{merge}: {file}"
        for merge, files in known_hashes().items()
        for file, sha256 in files.items()
        if found[merge].get(file) != sha256
    ]
    print(f"{variant}: {len(found)} merges, {len(different)} files differ", *different, sep="\n  ", flush=True)
    return bool(different)


if __name__ == "__main__":
    main()
