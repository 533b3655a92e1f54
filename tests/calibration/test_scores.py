"""Scores of three models, with the head run on a few positions at a time: equal to those of all logits at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qmerge.calibration import scores as module
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.scores import FinishedRun, Scores, finish_run, score_runs
from qmerge.calibration.tasks import next_ids

from .test_layered import ARCHITECTURES, CPU, IDS, saved


def test_generated_text_has_no_gain() -> None:
    """On text that the unmerged model wrote, gain kept is 1 − KL ratio: it says nothing about the task."""
    logits = torch.randn(3, 40, 7, generator=torch.Generator().manual_seed(0))
    scores = Scores()
    scores.add(logits[1].argmax(-1), base=logits[0], unmerged=logits[1], merged=logits[1] + 0.1 * logits[2])
    assert scores.record("a.txt", tokens=40, length=40).gain_kept is not None
    generated = scores.record("generate", tokens=40, length=40, text_kind="generated")
    assert generated.gain_kept is None and generated.kl_ratio is not None and generated.verdict == "kept"


def finished(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FinishedRun:
    run = LayerwiseRun(LayeredModel(config, tensors, CPU), tensors.__getitem__, IDS)
    last = len(run.model) - 1
    with stopping([run]):
        run.start()
        for index in range(last):
            run.run_layer(index)
        with run.model.loaded(last, run.values):
            return finish_run(run)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_in_blocks_are_those_of_the_whole_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with what a model does after the output matrix (Gemma 2 limits its logits)."""
    config, tensors, logits = saved(name, tmp_path)
    asked: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self: Scores, next_P: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        asked.append((next_P, base, unmerged, merged))

    monkeypatch.setattr(Scores, "add", add)
    monkeypatch.setattr(module, "POSITIONS", 10)
    # Only vectors (norms, biases): with other embeddings, the runs would have other inputs, too.
    shifted = {key: value + 0.5 if value.ndim == 1 else value for key, value in tensors.items()}
    run = finished(config, tensors)
    score_runs(run, finished(config, tensors), finished(config, shifted), IDS)
    # 2 sequences: 5, 5 and 2 of the 12 positions at once.
    assert [len(next_P) for next_P, *_ in asked] == [10, 10, 4] * 2
    for number, whole in enumerate(logits):
        blocks = asked[3 * number : 3 * number + 3]
        expected = [part.flatten(0, 1) for part in whole.split(5, dim=1)]
        following = [part.flatten() for part in next_ids(IDS[number]).split(5, dim=1)]
        for block, values, ids in zip(blocks, expected, following, strict=True):
            next_P, base, unmerged, merged = block
            torch.testing.assert_close(base, values, rtol=1e-5, atol=1e-6)
            assert torch.equal(base, unmerged)
            assert not torch.allclose(base, merged, rtol=1e-3)
            assert torch.equal(next_P, ids)


def test_equal_heads_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, _ = saved("Llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 0.1}
    runs = [finished(config, tensors), finished(config, tensors), finished(config, changed)]
    held: list[int] = []

    def add(self: Scores, next_P: Tensor, **_: Tensor) -> None:
        held.append(sum(not run.model.model.get_parameter("lm_head.weight").is_meta for run in runs))

    monkeypatch.setattr(Scores, "add", add)
    score_runs(*runs, IDS)
    assert set(held) == {2}
    for run in runs:
        assert all(parameter.is_meta for parameter in run.model.model.parameters())


def test_scores_by_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 70, 300, generator=generator) for _ in range(3)]
    ids = torch.randint(0, 300, (5, 70), generator=generator)
    scores = Scores()
    for positions in torch.arange(70).split(32):
        base, unmerged, merged = (x[:, positions].flatten(0, 1) for x in logits)
        scores.add(next_ids(ids)[:, positions].flatten(), base=base, unmerged=unmerged, merged=merged)
    record = scores.record("x", tokens=350, length=70)
    logs = [torch.log_softmax(x.double(), -1) for x in logits]
    loss = float(-logs[0][:, :-1].gather(-1, ids[:, 1:, None]).mean())
    divergence = float((logs[1].exp() * (logs[1] - logs[2])).sum(-1).mean())
    assert record.loss_base == pytest.approx(loss, rel=1e-6) and record.kl_merged == pytest.approx(divergence, rel=1e-5)


def test_no_gain_to_keep() -> None:
    scores = Scores()
    logits = torch.zeros(4, 8)
    scores.add(torch.tensor([0, 0, 0, -1]), base=logits, unmerged=logits, merged=logits)
    record = scores.record("x", tokens=4, length=4)
    assert record.gain_kept is None and record.loss_base == pytest.approx(math.log(8))
