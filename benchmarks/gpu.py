"""Correctness, speed and memory of qmerge on a GPU, in under 4 minutes, without a network.

    python benchmarks/gpu.py [--small] [--only tests,kernels,layers,decoder,merges,repeat]
    python benchmarks/gpu.py --only model     # an 8B Llama of 32 layers, by the command: some minutes, 12 GB of disk

Needs Python 3.10 or later with torch (a CUDA build), triton, transformers, peft, accelerate and safetensors. If the machine
has no network, bring wheels of: bitsandbytes, pydantic, pydantic_core, annotated_types, typing_inspection, typing_extensions,
optimum; and, where they are missing, typer, rich, psutil, pyyaml, jinja2, filelock and pytest.

tests      the kernels against torch (tests/rounding/test_gpu.py)
kernels    one pass of feedback: products alone, with the kernels in several shapes, with torch's loops
layers     the weights of an 8B Llama (4096 and 14336 wide), NF4 to NF4 and to GPTQ, nearest and preserve
decoder    a merge of one whole decoder layer of that size, calibrated on 16,384 tokens; extrapolated to 32 layers
merges     the demo model, merged on CUDA and on the CPU: how many bytes differ
repeat     one layer, merged on CUDA again, with other limits of memory: how many bytes differ
model      a whole model of that size, by the command, from disk to disk: time, memory of the process and of the GPU

Each section prints Markdown. One that fails prints its traceback, and the next one begins. With --small, sizes are tiny and
the CPU is used where there is no GPU: it tests this script. Statistics, weights and the adapter are random: times and memory
are those of a real model, survival is not.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "qmerge" / "demo"
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

import qmerge
from qmerge.formats import get_target
from qmerge.grids import Grid
from qmerge.rounding import _loops, nearest, preserve
from qmerge.rounding._loops import TorchLoops
from qmerge.rounding.base import EFFORTS, InputStatistics, Objective, RoundingContext, make_objective
from qmerge.types import Rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANK = 16
LAYERS = 32
LLAMA_VOCABULARY = 128256
BUDGET = 225.0

# Grid → rows of a program and its warps, to be compared.
VARIANTS = {"nf4": ((16, 1), (8, 1), (32, 1), (32, 2), (64, 4)), "gptq": ((16, 1),)}
STARTED = time.monotonic()

# Rated speeds by the makers (of the SXM modules): float32 without tensor cores in TFLOP/s, memory in GB/s.
GPUS = {"T4": (8.1, 320), "L4": (30.3, 300), "A100 40GB": (19.5, 1555), "H100": (67.0, 3350), "H200": (67.0, 4800)}


@dataclass(frozen=True)
class Sizes:
    """A Llama: width, inner width, heads, heads of keys and values; tokens to calibrate on and their sequence length."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    tokens: int
    sequence: int

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Module → [O, I]."""
        keys = self.hidden // self.heads * self.key_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


LARGE = Sizes(4096, 14336, heads=32, key_heads=8, vocabulary=8192, tokens=16384, sequence=512)
SMALL = Sizes(128, 448, heads=4, key_heads=2, vocabulary=768, tokens=512, sequence=64)


# --- measuring -------------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """A line at once: a run that is stopped has printed what it did."""
    print(text, flush=True)


def elapsed() -> float:
    """Seconds since the script began."""
    return time.monotonic() - STARTED


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of a call, the GPU's work included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def start_of_memory() -> None:
    """Count peak memory from here."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """GB that torch had allocated on the GPU at most; NaN on a CPU."""
    if DEVICE.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_allocated() / 1e9


@contextmanager
def torch_loops(wanted: bool = True) -> Iterator[None]:
    """Torch goes column by column, as without Triton."""
    before = os.environ.get(_loops.TORCH_LOOPS, "")
    os.environ[_loops.TORCH_LOOPS] = "1" if wanted else "0"
    try:
        yield
    finally:
        os.environ[_loops.TORCH_LOOPS] = before


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Rates:
    """Of this machine, measured: products in GFLOP/s, copies in GB/s (read and written)."""

    float32: float
    tf32: float
    copy: float


def measure_rates(size: int) -> Rates:
    """The best of three."""
    left = torch.randn(size, size, device=DEVICE)
    right = torch.randn(size, size, device=DEVICE)

    def product() -> object:
        return left @ right

    def best(work: Callable[[], object]) -> float:
        work()
        return min(seconds_of(work) for _ in range(3))

    float32 = 2 * size**3 / best(product) / 1e9
    with tensor_cores():
        tf32 = 2 * size**3 / best(product) / 1e9
    source = torch.empty(size * size * 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9
    return Rates(float32, tf32, copy)


# --- one weight ------------------------------------------------------------------------------------------------------


class Example:
    """A random weight on the grid of NF4, a delta of rank 16, and statistics of inputs whose strength falls over the columns.

    Args:
        target: ``nf4`` keeps the base's grid; ``gptq`` has a fresh one, groups of 128 (of 64 where they do not fit).
    """

    def __init__(self, shape: tuple[int, int], target: str) -> None:
        outputs, inputs = shape
        self.shape = shape
        self.target = target
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        x = torch.randn(2 * inputs, inputs, device=DEVICE, generator=generator)
        x *= torch.logspace(0, -1.5, inputs, device=DEVICE)
        self.statistics = InputStatistics(x.T @ x / len(x), None, len(x))
        del x
        values_OI = torch.randn(shape, device=DEVICE, generator=generator)
        u_OR = torch.linalg.qr(torch.randn(outputs, RANK, device=DEVICE, generator=generator)).Q
        v_IR = torch.linalg.qr(torch.randn(inputs, RANK, device=DEVICE, generator=generator)).Q
        s_R = 0.01 * (outputs * inputs) ** 0.5 / 4 * torch.linspace(1, 0.3, RANK, device=DEVICE)
        self.directions = (u_OR, s_R, v_IR)
        self.delta_OI = (u_OR * s_R) @ v_IR.T
        nf4 = make_grid("nf4", values_OI)
        base_codes_OI = nf4.nearest(values_OI)
        self.merged_OI = nf4.decode(base_codes_OI) + self.delta_OI
        self.grid = nf4
        self.base_codes_OI: Tensor | None = base_codes_OI
        if target != "nf4":
            self.grid = make_grid(target, self.merged_OI)
            self.base_codes_OI = None

    def objective(self) -> Objective:
        """Which errors matter."""
        return make_objective(self.statistics, self.directions, self.shape[1], DEVICE)

    def context(self, objective: Objective | None) -> RoundingContext:
        """Everything a rounding gets besides the values and the grid."""
        return RoundingContext(
            name="example",
            rows=Rows(0, self.shape[0]),
            base_codes_OI=self.base_codes_OI,
            objective=objective,
            delta_OI=self.delta_OI,
        )

    def problem(self, objective: Objective) -> preserve.Problem:
        """The problem with the columns at random."""
        columns = torch.randperm(self.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
        return preserve.in_order(columns, self.merged_OI.T.contiguous(), objective, self.grid)

    def gflop(self, swept_rows: int) -> float:
        """Of the products in one rounding with preserve, as often as they were done."""
        outputs, inputs = self.shape
        product = 2 * outputs * inputs**2
        # For every order: feedback is half a product, as the factor of K is triangular, and factoring K takes inputs³ / 3.
        orders = EFFORTS["default"].orders * (product / 2 + inputs**3 / 3)
        # Then sweeps, one squared error (half a product), and the product of K with the delta.
        return (orders + swept_rows / outputs * product + 1.5 * product) / 1e9

    def gigabytes(self, swept_rows: int) -> float:
        """Least traffic of that rounding: every pass reads the aim and K, and writes levels and errors."""
        outputs, inputs = self.shape
        passes = EFFORTS["default"].orders + swept_rows / outputs + 2
        return passes * (3 * outputs * inputs + inputs**2) * 4 / 1e9


class SweptRows:
    """Counts the rows that sweeps work on: fewer in every sweep, as rows that no longer change drop out."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        sweep = preserve.sweep

        def counted(levels_IO: Tensor, rows: Tensor, problem: preserve.Problem) -> tuple[Tensor, Tensor, Tensor]:
            self.count += len(rows)
            return sweep(levels_IO, rows, problem)

        preserve.sweep = counted
        try:
            yield
        finally:
            preserve.sweep = sweep


def make_grid(target: str, values_OI: Tensor) -> Grid:
    """A fresh grid with the format's defaults."""
    shape = (values_OI.shape[0], values_OI.shape[1])
    found = get_target(target)
    options = found.options(found.options_for_model({}, [shape]), None, "BF16")
    return found.grid(found.scales(values_OI, options, None), shape, options, None)


def error_of(codes_OI: Tensor, example: Example, objective: Objective) -> float:
    """The squared error in the objective, summed over rows, in float32."""
    error_OI = example.grid.decode(codes_OI) - objective.aim(example.merged_OI, Rows(0, example.shape[0]))
    return float(((error_OI @ objective.K_II) * error_OI).sum(dtype=torch.float64))


# --- sections --------------------------------------------------------------------------------------------------------


def show_machine(rates: Rates) -> None:
    """What this is measured on."""
    say("\n## Machine\n")
    name = platform.processor() or platform.machine()
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    say(f"{name}; Python {platform.python_version()}, torch {torch.__version__}; {os.cpu_count()} CPUs")
    say(f"float32 products {rates.float32:.0f} GFLOP/s, TF32 {rates.tf32:.0f} GFLOP/s, copies {rates.copy:.0f} GB/s")


def tests(sizes: Sizes, rates: Rates) -> None:
    """The kernels against torch, and a control that must differ."""
    options = ["-q", "-rA", "--no-header", "--durations=3", "-p", "no:cacheprovider", "-k", "kernels or comparison"]
    command = [sys.executable, "-m", "pytest", "tests/rounding/test_gpu.py", *options]
    environment = {**os.environ, "QMERGE_TEST_GPU": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    say(f"```\n{(done.stdout + done.stderr)[-6000:]}\n```")


def merges(sizes: Sizes, rates: Rates) -> None:
    """CUDA against the CPU."""
    say("| demo model | differing bytes of tensors | of bytes | share | kept: CPU, GPU | seconds: CPU, GPU |")
    say("|---|---|---|---|---|---|")
    for target, rounding in (
        ("nf4", "nearest"), ("nf4", "stochastic"), ("nf4", "preserve"), ("gptq", "preserve"), ("int8", "nearest"),
        ("bf16", "nearest"),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            seconds, kept = [], []
            for device in ("cpu", DEVICE.type):
                settings: dict[str, Any] = {"rounding": rounding, "device": device, "target": target, "quiet": True}
                if rounding == "preserve":
                    settings.update(calibration=str(DEMO / "calibration.txt"), calibration_tokens=1024)
                out = Path(folder) / f"{device}-{len(seconds)}"
                started = time.perf_counter()
                report = qmerge.merge(base=DEMO / "base-nf4", adapter=DEMO / "adapter", out=out, **settings)
                seconds.append(time.perf_counter() - started)
                kept.append(report.kept or float("nan"))
            differing, total = count_differences(Path(folder) / "cpu-0", Path(folder) / f"{DEVICE.type}-1")
            say(
                f"| {target} {rounding} | {differing} | {total} | {differing / total:.2e} | {kept[0]:.4f}, {kept[1]:.4f} "
                f"| {seconds[0]:.1f}, {seconds[1]:.1f} |"
            )


def repeat(sizes: Sizes, rates: Rates) -> None:
    """CUDA against CUDA: the same merge again, and with the least memory that it takes."""
    say("| one layer | then | differing bytes of tensors | of bytes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        write_checkpoint(base, sizes)
        write_adapter(adapter, sizes)
        for target, rounding in (("nf4", "stochastic"), ("nf4", "preserve"), ("gptq", "preserve")):
            outs = []
            for memory in ("32GB", "32GB", "12GB"):
                outs.append(Path(folder) / f"{target}-{rounding}-{len(outs)}")
                merge_layer(base, adapter, outs[-1], target, rounding, sizes, memory)
            for out, label in zip(outs[1:], ("again", "with 12 GB"), strict=True):
                differing, total = count_differences(outs[0], out)
                say(f"| {target} {rounding} | {label} | {differing} | {total} |")


def count_differences(left: Path, right: Path) -> tuple[int, int]:
    """(bytes that differ, all bytes) of the tensors of two merged models."""
    from safetensors import safe_open

    differing, total = 0, 0
    for file in sorted(left.glob("*.safetensors")):
        with safe_open(file, "pt") as one, safe_open(right / file.name, "pt") as other:
            for name in one.keys():  # noqa: SIM118
                a = one.get_tensor(name).contiguous().flatten().view(torch.uint8)
                b = other.get_tensor(name).contiguous().flatten().view(torch.uint8)
                differing += int((a != b).sum())
                total += a.numel()
    return differing, total


def kernels(sizes: Sizes, rates: Rates) -> None:
    """One pass of feedback and one sweep, by shape of the kernels."""
    kernels_run = DEVICE.type == "cuda" and _loops.is_compiled_for(DEVICE)
    say("| weight [O, I] | grid | variant | feedback, ms | sweep, ms |\n|---|---|---|---|---|")
    for target in ("nf4", "gptq"):
        example = Example((sizes.hidden, sizes.hidden), target)
        problem = example.problem(example.objective())
        start_IO = example.grid.decode(example.grid.nearest(example.merged_OI)).T.contiguous()[problem.columns]
        label = f"| {list(example.shape)} | {target} |"
        say(
            f"{label} products alone | {1e3 * products_of_feedback(problem):.1f} | {1e3 * products_of_sweep(problem):.1f} |"
        )
        by_torch = replace(problem, loops=TorchLoops(problem.grid, problem.columns))
        say(f"{label} torch's loops | {pass_times(by_torch, start_IO)} |")
        table = problem.grid.scale_table(len(problem.columns))
        if not kernels_run or table is None:
            say(f"{label} as on this device (Triton needs CUDA) | {pass_times(problem, start_IO)} |")
            continue
        from qmerge.rounding._block_kernels import make_block_kernels

        made = make_block_kernels(table, problem.columns)
        for tile, warps in VARIANTS[target]:
            chosen = replace(problem, loops=replace(made, tile=tile, warps=warps))
            compile_seconds = seconds_of(partial(preserve.feedback, chosen))
            times = pass_times(chosen, start_IO)
            say(f"{label} tiles of {tile} rows, {warps} warps (first call {compile_seconds:.1f} s) | {times} |")

    show_kernels(Example((sizes.hidden, sizes.hidden), "nf4"))


def show_kernels(example: Example) -> None:
    """Where the GPU's time goes in one rounding with preserve, and how many kernels it launches."""
    context = example.context(example.objective())
    activity = torch.profiler.ProfilerActivity.CPU
    if DEVICE.type == "cuda":
        activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        preserve.ROUNDING.choose(example.merged_OI, example.grid, context)
        synchronize()
    events = profile.key_averages()
    say(
        f"\nOne rounding of {list(example.shape)} to NF4 with preserve, {sum(event.count for event in events)} launches:\n"
    )
    say(f"```\n{events.table(sort_by='self_device_time_total', row_limit=25, max_name_column_width=60)}\n```")


def products_of_feedback(problem: preserve.Problem) -> float:
    """Seconds of the products between the blocks of feedback."""
    aim_IO, F_II = problem.aim_IO, problem.factor_II

    def products() -> None:
        for start, stop in preserve.blocks(len(aim_IO), _loops.BLOCK):
            _ = F_II[:start, start:stop].T @ aim_IO[:start]

    products()
    return seconds_of(products)


def products_of_sweep(problem: preserve.Problem) -> float:
    """Seconds of the products between the blocks of a sweep."""
    aim_IO, K_II = problem.aim_IO, problem.K_II

    def products() -> None:
        for start, stop in preserve.blocks(len(aim_IO), _loops.BLOCK):
            _ = K_II[start:stop] @ aim_IO

    products()
    return seconds_of(products)


def pass_times(problem: preserve.Problem, start_IO: Tensor) -> str:
    """Milliseconds of feedback and of a sweep; the second call of each with kernels, the first with torch."""

    def feedback() -> object:
        return preserve.feedback(problem)

    def sweep() -> object:
        return preserve.descend(start_IO, problem, 1)

    if not isinstance(problem.loops, TorchLoops):
        sweep()
    return f"{1e3 * seconds_of(feedback):.1f} | {1e3 * seconds_of(sweep):.1f}"


def layers(sizes: Sizes, rates: Rates) -> None:
    """Weights of a large Llama, alone."""
    say(
        "| weight [O, I] | to | rounding | seconds | objective, s | peak, GB | GFLOP | GFLOP/s | floor: float32 products, s "
        "| floor: TF32, s | floor: memory, s | squared error |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    shapes = ((sizes.hidden, sizes.hidden), (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner))
    for shape in shapes:
        for target in ("nf4", "gptq"):
            example = Example(shape, target)
            show_nearest(example, rates)
            show_preserve(example, rates)
            if shape == shapes[0] and target == "nf4":
                with tensor_cores():
                    show_preserve(example, rates, "preserve, products in TF32")
                with torch_loops():
                    show_preserve(example, rates, "preserve, torch's loops")
            del example


def show_nearest(example: Example, rates: Rates) -> None:
    """A row of the table."""
    context = example.context(None)
    start_of_memory()

    def work() -> Tensor:
        return nearest.ROUNDING.choose(example.merged_OI, example.grid, context)

    work()
    seconds = seconds_of(work)
    outputs, inputs = example.shape
    floor = outputs * inputs * 5 / 1e9 / rates.copy
    say(
        f"| {list(example.shape)} | {example.target} | nearest | {seconds:.4f} | | {peak_memory():.2f} | | | | | {floor:.4f} | |"
    )


def show_preserve(example: Example, rates: Rates, label: str = "preserve") -> None:
    """A row of the table."""
    objectives: list[Objective] = []
    start_of_memory()
    objective_seconds = seconds_of(lambda: objectives.append(example.objective()))
    objective = objectives[0]
    context = example.context(objective)
    swept = SweptRows()
    codes: list[Tensor] = []
    with swept.counting():
        seconds = seconds_of(lambda: codes.append(preserve.ROUNDING.choose(example.merged_OI, example.grid, context)))
    peak = peak_memory()
    gflop = example.gflop(swept.count)
    say(
        f"| {list(example.shape)} | {example.target} | {label} | {seconds:.3f} | {objective_seconds:.3f} | {peak:.2f} "
        f"| {gflop:.0f} | {gflop / seconds:.0f} | {gflop / rates.float32:.3f} | {gflop / rates.tf32:.3f} "
        f"| {example.gigabytes(swept.count) / rates.copy:.3f} | {error_of(codes[0], example, objective):.6g} |"
    )


def decoder(sizes: Sizes, rates: Rates) -> None:
    """One decoder layer, calibrated, as a whole merge."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        write_checkpoint(base, sizes)
        write_adapter(adapter, sizes)
        say(
            f"One layer of width {sizes.hidden} and {sizes.inner}, {sizes.tokens} random tokens, NF4 to NF4 and to GPTQ\n"
        )
        say("| to | rounding | seconds | peak on the GPU, GB | tokens/s |\n|---|---|---|---|---|")
        times = {}
        for number, (target, rounding) in enumerate((("nf4", "nearest"), ("nf4", "preserve"), ("gptq", "preserve"))):
            start_of_memory()
            out = Path(folder) / f"out-{number}"
            seconds = seconds_of(partial(merge_layer, base, adapter, out, target, rounding, sizes))
            times[target, rounding] = seconds
            tokens = f"{sizes.tokens / seconds:.0f}" if rounding == "preserve" else ""
            say(f"| {target} | {rounding} | {seconds:.1f} | {peak_memory():.2f} | {tokens} |")
        extrapolate(times["nf4", "preserve"])
        if elapsed() < BUDGET:
            show_profile(lambda: merge_layer(base, adapter, Path(folder) / "profiled", "nf4", "preserve", sizes))


def merge_layer(
    base: Path, adapter: Path, out: Path, target: str, rounding: str, sizes: Sizes, max_memory: str = "32GB"
) -> None:
    """The merge."""
    settings: dict[str, Any] = {}
    if rounding == "preserve":
        settings = {"calibration": "random", "calibration_tokens": sizes.tokens, "sequence_length": sizes.sequence}
    qmerge.merge(
        base=base, adapter=adapter, out=out, target=target, rounding=rounding, device=DEVICE.type, quiet=True,
        max_memory=max_memory, **settings,
    )  # fmt: skip


def extrapolate(seconds: float) -> None:
    """To 32 layers, and to other GPUs by their rated speeds."""
    say(f"\n{LAYERS} layers, at the same rate (an estimate; it includes reading and writing): {LAYERS * seconds:.0f} s")
    if DEVICE.type != "cuda":
        return
    say(
        "\nOther GPUs, estimates by rated speeds: from the ratio of float32 products to that of memory, and whichever is larger\n"
    )
    say(f"| GPU | seconds for {LAYERS} layers |\n|---|---|")
    here = next((name for name in GPUS if name in torch.cuda.get_device_name()), None)
    if here is None:
        say("(unknown for this GPU)")
        return
    flops, bandwidth = GPUS[here]
    for name, (their_flops, their_bandwidth) in GPUS.items():
        ratios = sorted((flops / their_flops, bandwidth / their_bandwidth))
        say(f"| {name} | {LAYERS * seconds * ratios[0]:.0f} to {LAYERS * seconds * ratios[1]:.0f} |")


# Prints, after the command: most memory of the process and of torch on the GPU, in GB.
MEASURED = """
import resource, sys, torch
from qmerge.cli import main
try:
    main()
finally:
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")
    print(f"measured {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} {gpu / 1e9:.2f}", flush=True)
"""


def model(sizes: Sizes, rates: Rates) -> None:
    """A whole model by the command, as a user runs it: plan, merge, hashes, report."""
    sizes = replace(sizes, vocabulary=LLAMA_VOCABULARY if sizes is LARGE else sizes.vocabulary)
    layers = LAYERS if sizes.hidden == LARGE.hidden else 2
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, out = Path(folder) / "base", Path(folder) / "adapter", Path(folder) / "out"
        seconds = seconds_of(partial(write_checkpoint, base, sizes, layers))
        write_adapter(adapter, sizes, layers)
        torch.cuda.empty_cache()
        written = sum(file.stat().st_size for file in base.iterdir())
        say(f"{layers} layers, {written / 1e9:.1f} GB, made in {seconds:.0f} s\n")
        say("| --target nf4 and | seconds | memory, GB | on the GPU, GB |\n|---|---|---|---|")
        random = ["--rounding", "preserve", "--calibration", "random", "--calibration-tokens", str(sizes.tokens)]
        for options in (["--rounding", "nearest"], [], random, ["--rounding", "nearest", "--device", "cpu"]):
            command = [sys.executable, "-c", MEASURED, "--base", base, "--adapter", adapter, "--target", "nf4"]
            started = time.perf_counter()
            done = subprocess.run([*command, "--out", out, *options], cwd=ROOT, capture_output=True, text=True)
            seconds = time.perf_counter() - started
            memory = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured ")]
            if done.returncode or not memory:
                say(f"\n```\n{(done.stdout + done.stderr)[-3000:]}\n```\n")
                continue
            say(f"| {' '.join(options) or 'none: the default'} | {seconds:.1f} | {memory[0][0]} | {memory[0][1]} |")
            shutil.rmtree(out)


def show_profile(work: Callable[[], object]) -> None:
    """Where the time of the CPU's side goes. (The GPU's own time shows where it is waited for.)"""
    profile = cProfile.Profile()
    profile.enable()
    work()
    synchronize()
    profile.disable()
    say("\nProfile of the calls, preserve:\n\n```")
    sys.stdout.flush()
    pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(
        "qmerge|torch|safetensors|built-in", 45
    )
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    say("```")


# --- a synthetic checkpoint ------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, sizes: Sizes, layers: int = 1) -> None:
    """A Llama, random, its linear layers in NF4 as transformers saves them; a file for the dense weights and one per layer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir()
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for number in range(layers + 1):
        tensors = dense_weights(sizes) if number == layers else layer_weights(sizes, number)
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads, vocab_size=sizes.vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    quantization = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    settings = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": quantization}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "base-nf4" / name, folder / name)


def dense_weights(sizes: Sizes) -> dict[str, Tensor]:
    """Embedding, head and the last norm."""
    shape = (sizes.vocabulary, sizes.hidden)
    return {
        "model.embed_tokens.weight": torch.randn(shape, device=DEVICE).bfloat16().cpu(),
        "lm_head.weight": (torch.randn(shape, device=DEVICE) * 0.02).bfloat16().cpu(),
        "model.norm.weight": torch.ones(sizes.hidden).bfloat16(),
    }


def layer_weights(sizes: Sizes, number: int) -> dict[str, Tensor]:
    """One decoder layer, under the names of its files."""
    from bitsandbytes import functional as bnb

    layer = f"model.layers.{number}"
    tensors = {
        f"{layer}.input_layernorm.weight": torch.ones(sizes.hidden).bfloat16(),
        f"{layer}.post_attention_layernorm.weight": torch.ones(sizes.hidden).bfloat16(),
    }
    for module, shape in sizes.weights.items():
        values_OI = torch.randn(shape, device=DEVICE) * 0.02
        packed, state = bnb.quantize_4bit(values_OI.bfloat16(), blocksize=64, quant_type="nf4")
        name = f"{layer}.{module}.weight"
        tensors[name] = packed.cpu()
        for part, tensor in state.as_dict(packed=True).items():
            tensors[f"{name}.{part}"] = tensor.cpu().contiguous()
    return tensors


def write_adapter(folder: Path, sizes: Sizes, layers: int = 1) -> None:
    """A LoRA of rank 16 on all of them, as peft saves it."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for number in range(layers):
        for module, (outputs, inputs) in sizes.weights.items():
            name = f"base_model.model.model.layers.{number}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.002
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = [module.rpartition(".")[2] for module in sizes.weights]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


SECTIONS: dict[str, Callable[[Sizes, Rates], None]] = {
    "tests": tests,
    "kernels": kernels,
    "layers": layers,
    "decoder": decoder,
    "merges": merges,
    "repeat": repeat,
    "model": model,
}
LEFT_OUT = ("model",)
"""Sections that run only when they are named."""


def main() -> None:
    """Every section that is asked for; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: a test of this script")
    parser.add_argument(
        "--only",
        default=",".join(name for name in SECTIONS if name not in LEFT_OUT),
        help="sections to run, with commas between",
    )
    given = parser.parse_args()
    sizes = SMALL if given.small else LARGE
    rates = measure_rates(256 if given.small else 8192)
    show_machine(rates)
    for name in given.only.split(","):
        if elapsed() > BUDGET and name not in LEFT_OUT:
            say(f"\n## {name}: left out, {elapsed():.0f} s are over")
            continue
        say(f"\n## {name}\n")
        try:
            SECTIONS[name](sizes, rates)
        except Exception:
            say(f"\n```\n{traceback.format_exc()}```")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        say(f"\n({elapsed():.0f} s since the start)")


if __name__ == "__main__":
    main()
