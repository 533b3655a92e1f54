"""NF4 and FP4 on the CPU: the compiled codes are those of torch's arithmetic, which a GPU uses, and of bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import BitsAndBytesConfig

from qmerge.formats import get_target
from qmerge.formats._bnb4bit_find import Bnb4bitOptions
from qmerge.formats._bnb4bit_grid import Bnb4bitGrid, code_table, scale_blocks, standard_quant_map
from qmerge.formats.base import ModuleLayout, NoOptions

NAMES = ["nf4", "fp4"]


@pytest.mark.parametrize("name", NAMES)
def test_standard_quant_map(name: str) -> None:
    assert torch.equal(standard_quant_map(name), bnb.get_4bit_type(name, device="cpu"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
def test_config_is_that_of_transformers(name: str, dtype: str, skipped: list[str] | None) -> None:
    options = Bnb4bitOptions(double_quant=dtype == "float16", quant_storage=dtype)
    expected = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_quant_storage=dtype,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
        llm_int8_threshold=5.0,
    )
    base = {"llm_int8_skip_modules": skipped, "llm_int8_threshold": 5.0, "bnb_4bit_compute_dtype": f"torch.{dtype}"}
    written = get_target(name).quantization_config(options, base, "bfloat16", ModuleLayout())
    assert written == expected.to_dict()


def test_int8_config_is_that_of_transformers() -> None:
    written = get_target("int8").quantization_config(NoOptions(), {}, "bfloat16", ModuleLayout())
    assert written == BitsAndBytesConfig(load_in_8bit=True).to_dict()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [64, 4096])
def test_codes_of_every_kind_of_value(name: str, block_size: int) -> None:
    """Two million values: Gaussian, on and next to midpoints, zeros, denormal, with absmax of zero, tiny and negative."""
    torch.manual_seed(block_size)
    rows, columns = 1999, 1001  # the last block is short
    values_OI = torch.randn(rows, columns)
    table = code_table(name, torch.device("cpu"))
    absmax_B = torch.rand(-(-rows * columns // block_size)) + 0.5
    absmax_B[::7] = torch.tensor([0.0, 1e-45, 1e-38, -1e-3]).repeat(len(absmax_B))[: len(absmax_B[::7])]
    absmax_OI = absmax_B.repeat_interleave(block_size)[: rows * columns].view(rows, columns)
    values_OI[500:1000] = (table.midpoints[torch.randint(15, values_OI.shape)] * absmax_OI)[500:1000]
    values_OI[700:800] = torch.nextafter(values_OI[700:800], torch.tensor(torch.inf))
    values_OI[1000:1100] = 0.0
    values_OI[1050:1100] *= -1
    values_OI[1100:1200] *= 1e-39
    grid = Bnb4bitGrid(
        quant_type=name,
        block_size=block_size,
        columns=columns,
        absmax_B=absmax_B,
        rounding_absmax_B=absmax_B,
    )
    scaled = scale_blocks(values_OI, absmax_B, block_size)
    expected_OI = torch.bucketize(scaled, table.midpoints).to(torch.uint8).view(rows, columns)
    codes_OI = grid.nearest(values_OI)
    assert torch.equal(codes_OI, expected_OI)
    assert torch.equal(grid.decode(codes_OI), table.levels_L[codes_OI.int()] * absmax_OI)
