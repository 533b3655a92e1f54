"""The table of programs that serve models: it and the formats' own lists of loaders say the same."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from qmerge.formats import MIXES, all_targets, get_target
from qmerge.formats.serving import PACKAGES, PROGRAMS, programs_for

TITLES = {program.title.lower(): program.name for program in PROGRAMS.values()}


@pytest.mark.parametrize("target", [*all_targets(), *MIXES])
def test_programs_are_the_loaders_of_the_format(target: str) -> None:
    loaders = get_target(target).info.loaders
    if get_target(target).info.is_dense:
        assert loaders == "everything"  # everything that loads folders; MIXES has the dense files
        expected = {"vllm", "sglang", "transformers", "mlx"}
    else:
        names = [re.sub(r" \(.*?\)", "", name).lower() for name in loaders.split(", ")]
        expected = {TITLES[name] for name in names}
    assert {program.name for program in programs_for(target)} == expected


def test_every_name_in_the_table_is_a_target() -> None:
    known = {*all_targets(), *MIXES}
    for program in PROGRAMS.values():
        assert set(program.targets) <= known and len(set(program.targets)) == len(program.targets)
        assert set(program.remarks) <= set(program.targets)
    assert set(PACKAGES) <= set(PROGRAMS["transformers"].targets)


def test_python_code_compiles_and_shell_commands_name_the_model() -> None:
    for program in PROGRAMS.values():
        for on_hub in (True, False):
            command = program.command("someone/FILE", file="m.gguf", on_hub=on_hub)
            assert "someone/FILE" in command and "MODEL" not in command
            if program.language == "python":
                compile(command, program.name, "exec")
    assert PROGRAMS["llama.cpp"].command("out", file="m.gguf", on_hub=False) == "llama-server -m out/m.gguf"


def test_the_table_imports_no_library() -> None:
    code = "import sys, qmerge.formats.serving; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
