"""What a merge of a very large model costs: bytes moved, time at given rates, memory, and ``preserve`` scaled from a measured
layer. Arithmetic only: no model is read, nothing is run. docs/scale.md shows what it prints.

    python benchmarks/scale.py [--tokens 16384] [--weights-per-second 91e6] [--processes 8]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qmerge.planning.memory import MATRICES

BITS_NF4 = 4 + 32 / 64  # a code per weight, and a float32 scale per block of 64
BITS_BF16 = 16
FLOAT32 = 4

# `python benchmarks/gpu.py` on one H200 (benchmarks/RESULTS.md): a whole 8B Llama to nearest, and one decoder layer of it with
# preserve and 16,384 tokens, divided as its profile says.
MEASURED_TOKENS = 16384
NEAREST_SECONDS = 53.3 / 32
PRESERVE_SECONDS = {"rounding": 4.3, "reading": 1.4, "passes, sums, judging": 8.0 - 4.3 - 1.4}

RATES = {"network drive": 0.1e9, "cloud disk": 0.5e9, "10 Gbit/s": 1.25e9, "NVMe": 3e9}
"""Bytes per second that one process reads or writes."""

Shape = tuple[int, int, int]
"""Outputs, inputs, and how many weights of this shape a layer has."""


@dataclass(frozen=True)
class Model:
    """Kinds of decoder layers: how many there are, and the linear layers of each."""

    name: str
    layers: list[tuple[int, list[Shape]]]
    hidden: int
    vocabulary: int

    @property
    def linear(self) -> int:
        return sum(count * weights(shapes) for count, shapes in self.layers)

    @property
    def dense(self) -> int:
        return 2 * self.vocabulary * self.hidden  # embedding and head


def weights(shapes: list[Shape]) -> int:
    return sum(outputs * inputs * count for outputs, inputs, count in shapes)


def llama(hidden: int, inner: int, key_values: int) -> list[Shape]:
    return [(hidden, hidden, 2), (key_values, hidden, 2), (inner, hidden, 2), (hidden, inner, 1)]


MLA: list[Shape] = [
    (1536, 7168, 1),
    (24576, 1536, 1),
    (576, 7168, 1),
    (32768, 512, 1),
    (7168, 16384, 1),
]  # DeepSeek-V3's attention
REFERENCE = llama(4096, 14336, 1024)
MODELS = [
    Model("Llama 8B", [(32, REFERENCE)], 4096, 128256),
    Model("Llama 70B", [(80, llama(8192, 28672, 1024))], 8192, 128256),
    Model("Llama 405B", [(126, llama(16384, 53248, 1024))], 16384, 128256),
    Model(
        "DeepSeek 671B",
        [
            (3, [*MLA, (18432, 7168, 2), (7168, 18432, 1)]),
            (58, [*MLA, (2048, 7168, 2 * 257), (7168, 2048, 257)]),
        ],
        7168,
        129280,
    ),
]


def nbytes(model: Model, bits: float) -> float:
    return model.linear * bits / 8 + model.dense * BITS_BF16 / 8


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def products(shapes: list[Shape]) -> int:
    """Multiplications of error feedback and descent grow as outputs × inputs²."""
    return sum(outputs * inputs**2 * count for outputs, inputs, count in shapes)


def preserve_seconds(shapes: list[Shape], tokens: int) -> dict[str, float]:
    """Of one decoder layer, part by part, scaled from the measured one."""
    size = weights(shapes) / weights(REFERENCE)
    of_tokens = tokens / MEASURED_TOKENS
    return {
        "rounding": PRESERVE_SECONDS["rounding"] * products(shapes) / products(REFERENCE),
        "reading": PRESERVE_SECONDS["reading"] * size,
        "passes, sums, judging": PRESERVE_SECONDS["passes, sums, judging"] * size * of_tokens,
    }


def show_bytes() -> None:
    print("\n| model | weights | NF4 | bf16 | moved, NF4 → NF4 | moved, NF4 → bf16 |\n|---|---|---|---|---|---|")
    for model in MODELS:
        nf4, bf16 = nbytes(model, BITS_NF4), nbytes(model, BITS_BF16)
        cells = [f"{(model.linear + model.dense) / 1e9:.0f} billion"]
        cells += [f"{count / 1e9:,.0f} GB" for count in (nf4, bf16, 4 * nf4, 2 * nf4 + 2 * bf16)]
        print(f"| {model.name} | {' | '.join(cells)} |")


def show_times(rate: float, processes: int) -> None:
    print(
        f"\n| NF4 → NF4, 1 process (and {processes}) | {' | '.join(RATES)} | computing |\n|---|{'---|' * (len(RATES) + 1)}"
    )
    for model in MODELS:
        seconds = [4 * nbytes(model, BITS_NF4) / bytes_per_second for bytes_per_second in RATES.values()]
        seconds.append(model.linear / rate)
        cells = [f"{duration(each)} ({duration(each / processes)})" for each in seconds]
        print(f"| {model.name} | {' | '.join(cells)} |")


def show_preserve(tokens: int) -> None:
    columns = "layer | rounding | all layers | widest matrix of inputs"
    columns += f" | {MATRICES} of them | layer, float32 | hidden states"
    print(f"\n| preserve, {tokens:,} tokens | {columns} |")
    print("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        per_layer = [sum(preserve_seconds(shapes, tokens).values()) for _, shapes in model.layers]
        total = sum(count * seconds for (count, _), seconds in zip(model.layers, per_layer, strict=True))
        shapes = model.layers[-1][1]
        widest = max(inputs for _, layer in model.layers for _, inputs, _ in layer)
        matrix = FLOAT32 * widest**2
        states = 2 * FLOAT32 * tokens * model.hidden
        sizes = [matrix, MATRICES * matrix, FLOAT32 * weights(shapes), states]
        rounding = preserve_seconds(shapes, tokens)["rounding"] / per_layer[-1]
        cells = [
            duration(per_layer[-1]),
            f"{rounding:.0%}",
            duration(total),
            *(f"{size / 1e9:.1f} GB" for size in sizes),
        ]
        print(f"| {model.name} | {' | '.join(cells)} |")


def show_split(tokens: int, nodes: int) -> None:
    """A run of layers per node, each started from hidden states of the unmerged model."""
    print(
        f"\n| layers split over {nodes} nodes | one node | first pass | then, in parallel | together | handed on per node |"
    )
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        one = first = 0.0
        for count, shapes in model.layers:
            parts = preserve_seconds(shapes, tokens)
            one += count * sum(parts.values())
            # The first pass reads every layer, and runs one stream of two, without sums.
            first += count * (parts["reading"] + parts["passes, sums, judging"] / 2)
        states = FLOAT32 * tokens * model.hidden
        cells = [duration(each) for each in (one, first, one / nodes, first + one / nodes)]
        print(f"| {model.name} | {' | '.join(cells)} | {states / 1e9:.2f} GB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=MEASURED_TOKENS, help="calibration tokens")
    parser.add_argument(
        "--weights-per-second",
        type=float,
        default=weights(REFERENCE) / NEAREST_SECONDS,
        help="weights that one process merges per second (default: nearest on an H200, benchmarks/RESULTS.md)",
    )
    parser.add_argument("--processes", type=int, default=8, help="processes, or nodes that share the layers")
    arguments = parser.parse_args()
    show_bytes()
    show_times(arguments.weights_per_second, arguments.processes)
    show_preserve(arguments.tokens)
    show_split(arguments.tokens, arguments.processes)


if __name__ == "__main__":
    main()
