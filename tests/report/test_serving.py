"""`qmerge plan --for PROGRAM`: the target that it is given, the command, and what to know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmerge.errors import RecipeError
from qmerge.forecast.targets import Candidate
from qmerge.formats import all_targets
from qmerge.formats.serving import PROGRAMS
from qmerge.report.describe.serving import COLAB, OTHER_NAMES, describe_serving, find_program, first_choice
from qmerge.report.terminal.plan import bitsandbytes_lines, serve_lines

from ..conftest import Cli

BITS = {
    "nf4": 4.1,
    "w4a16": 4.1,
    "gptq": 4.2,
    "int8": 8.1,
    "fp8": 8.0,
    "w8a8": 8.1,
    "bf16": 16.0,
    "q4_k_m": 4.8,
    "mlx": 4.5,
    "q6_k": 6.6,
    "q8_0": 8.5,
    "gguf_f16": 16.0,
}


def candidates(keeps_grid: str = "", impossible: str = "") -> list[Candidate]:
    return [
        Candidate(
            target=target, loaders="", bits=bits, keeps_grid=target == keeps_grid,
            impossible="a reason" if target == impossible else None,
        )
        for target, bits in BITS.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "target"),
    [("vllm", "w4a16"), ("sglang", "w4a16"), ("ollama", "q4_k_m"), ("llama.cpp", "q4_k_m"), ("mlx", "mlx"), ("colab", "nf4"),
     ("transformers", "nf4"), ("vLLM", "w4a16"), ("llamacpp", "q4_k_m")],
)  # fmt: skip
def test_each_program_has_a_target(program: str, target: str) -> None:
    assert describe_serving(program, candidates(), None)["recommended"] == target == first_choice(program)


def test_the_table_in_the_docs() -> None:
    """docs/choosing-a-target.md says what the command says."""
    page = (Path(__file__).parents[2] / "docs/choosing-a-target.md").read_text()
    lines = page.partition("| `--for` |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    told = {name: row[1:] for row in rows for name in row[0].split(", ")}
    assert set(told) == (set(PROGRAMS) - {"gptqmodel"}) | {COLAB}
    for name, targets in told.items():
        found = describe_serving(name, candidates(), None)
        assert targets == [found[key] or "" for key in ("recommended", "8 bits", "16 bits")], name


def test_the_base_decides_where_the_program_keeps_loading_its_format() -> None:
    """A GPTQ base stays one, because its scales are kept; an NF4 base does not in vLLM, which may drop the format."""
    assert describe_serving("vllm", candidates("gptq"), None)["recommended"] == "gptq"
    assert describe_serving("vllm", candidates("nf4"), None)["recommended"] == "w4a16"
    assert describe_serving("transformers", candidates("nf4"), None)["recommended"] == "nf4"
    assert describe_serving("vllm", candidates(impossible="w4a16"), None)["recommended"] == "gptq"


def test_what_vllm_plans_is_said_beside_nf4() -> None:
    told = "nf4, int8: vLLM discusses dropping bitsandbytes (vllm-project/vllm#39583)"
    described = describe_serving("vllm", candidates(), None)
    lines = serve_lines(described)
    assert lines[:2] == [
        "serve    with vLLM: --target w4a16 (8 bits: fp8; 16 bits: bf16); it needs a GPU",
        "         then: vllm serve OUT",
    ]
    assert any(line.strip().startswith(told) for line in lines) and "`" not in "".join(lines)
    assert bitsandbytes_lines(["nf4", "gptq", "int8"]) == [told] and bitsandbytes_lines(["gptq"]) == []
    assert not any("discusses" in line for line in serve_lines(describe_serving("colab", candidates(), None)))


def test_a_target_that_the_program_does_not_load() -> None:
    assert describe_serving("sglang", candidates(), "nf4")["remarks"][0] == "nf4: SGLang does not load it"
    only = [Candidate(target="mlx", loaders="", bits=4.5)]
    assert serve_lines(describe_serving("vllm", only, None)) == [
        "serve    with vLLM: none of the targets that it loads is possible here."
    ]


def test_names_of_programs() -> None:
    assert find_program(COLAB) is PROGRAMS["transformers"] and set(OTHER_NAMES.values()) <= set(PROGRAMS)
    assert "a T4 of Colab" in describe_serving(COLAB, candidates(), None)["remarks"][-1]
    with pytest.raises(RecipeError, match=r"no program is called 'vlm'\. Did you mean 'vllm'"):
        find_program("vlm")


def test_plan_compares_what_the_program_loads(cli: Cli, dense: Path, lora: Path) -> None:
    asked = ("plan", "--base", dense, "--adapter", lora, "--for")
    found = json.loads(cli(*asked, "mlx", "--json").out)
    targets = {target["target"] for target in found["targets"]}
    assert found["serve"]["recommended"] == "mlx" and "mlx" in targets
    assert targets <= set(PROGRAMS["mlx"].targets) and targets < set(all_targets())
    ran = cli(*asked, "vlm")
    assert ran.code == 2 and "Did you mean 'vllm'" in ran.err
