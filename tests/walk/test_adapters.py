"""The walk over adapters has every type and option of peft; a sample of it, and the cases that once failed."""

from __future__ import annotations

import random

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .adapters import outcome
from .adapters_cases import REFUSED_WHOLE, Case, cases, is_not_varied, options_of, values
from .adapters_models import ARCHITECTURES

CASES = {case.name: case for case in cases()}
SAMPLE = 400
SEED = 14

MERGED = [
    "HIRA · convolutions · conv1d · basic",
    "HIRA · convolutions · conv2d · rank_pattern=last",
    "HIRA · convolutions · conv3d · basic",
    "HIRA · convolutions · point1d · basic",
    "HIRA · bloom · embedding · basic",
    "HIRA · t5 · positions · basic",
    "HIRA · embedded Conv1D · embedding · basic",
    "IA3 · convolutions · conv2d · basic",
    "IA3 · convolutions · grouped2d · basic",
    "IA3 · convolutions · conv3d · basic",
    "IA3 · convolutions · conv2d · feedforward_modules=all",
    "IA3 · convolutions · grouped2d · feedforward_modules=all",
    "IA3 · gpt2 · Conv1D · feedforward_modules=all",
    "LOHA · convolutions · conv1d · basic",
    "LOHA · convolutions · grouped2d · basic",
    "LOHA · convolutions · conv2d · use_effective_conv2d=True",
    "LOKR · convolutions · conv1d · basic",
    "LOKR · convolutions · wide2d · basic",
    "LOKR · convolutions · conv2d · use_effective_conv2d=True",
    "BOFT · convolutions · strided2d · basic",
    "HRA · convolutions · conv2d · basic",
    "ADALORA · convolutions · conv2d · basic",
    "ADALORA · llama · linear · trainable_token_indices=named",
    "ADALORA · llama · linear · lora_bias=True",
    "OFT · bloom · embedding · basic",
    "HIRA · attention · MultiheadAttention · target_modules=all-linear",
    "ADALORA · embedded Conv1D · Conv1D · trainable_token_indices=named",
    "LORA · embedded Conv1D · Conv1D · trainable_token_indices=named",
    "DEFT · embedded Conv1D · Conv1D · target_modules=all-linear",
    "FOURIERFT · embedded Conv1D · Conv1D · target_modules=all-linear",
    "TINYLORA · embedded Conv1D · both · basic",
    "OFT · convolutions · point2d · basic",
    "LN_TUNING · llama · embedding · basic",
    "UNILORA · llama · linear · basic",
    "UNILORA · mixtral · linear · basic",
    "WAVEFT · llama · linear · proportional_parameters=True",
    "VERA · llama · linear · save_projection=False",
]
"""Cases that were refused without need, or ended in a traceback."""

REFUSED = {
    "OFT · convolutions · conv2d · basic": ("averages the patches where they overlap", "Load it with peft"),
    "FOURIERFT · attention · MultiheadAttention · target_modules=all-linear": (
        "never calls",
        "Train without this layer",
    ),
    "BEFT · llama · linear · basic": ("which has none in this base", "train layers with a bias only"),
    "PVERA · llama · linear · sample_at_inference=True": ("another delta for every input", "Set it to false"),
    "TRAINABLE_TOKENS · llama · linear · basic": ("which peft leaves out", "Train rows of embeddings only"),
    "UNILORA · layers · linear · basic": ("save_indices=False", "Train with save_indices=True"),
    "ADALORA · llama · linear · layer_replication=once": ("layer_replication", "load it with peft"),
}
"""Case → words of its refusal."""


def test_every_type_of_peft_is_walked() -> None:
    assert {case.peft_type for case in CASES.values()} == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert len(CASES) == sum(1 for _ in cases()), "two cases have one name"


@pytest.mark.parametrize("peft_type", [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_option_of_peft_is_walked(peft_type: str) -> None:
    """A new option of peft fails here: it needs values, or a reason why it has none."""
    if peft_type in REFUSED_WHOLE:
        return
    unvaried = []
    for option, hint in options_of(peft_type).items():
        if not is_not_varied(peft_type, option) and not any(
            varies(peft_type, option, hint, name) for name in ARCHITECTURES
        ):
            unvaried.append(option)
    assert unvaried == []


def varies(peft_type: str, option: str, hint: object, architecture: str) -> bool:
    model = ARCHITECTURES[architecture]
    return any(values(peft_type, option, hint, model=model, targets=next(iter(model.targets.values()))))


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_merged(name: str) -> None:
    result = outcome(CASES[name])
    assert result.kind == "merged", result


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_cause(name: str) -> None:
    result = outcome(CASES[name])
    assert result.kind in ("refused", "peft cannot")
    assert all(word in result.reason for word in REFUSED[name]), result


@pytest.mark.slow
def test_a_sample_of_the_walk() -> None:
    """Nothing is merged wrongly, and nothing ends in a traceback; what peft merges is merged, but for a few."""
    merged = 0
    refused: list[str] = []
    for case in random.Random(SEED).sample(sorted(CASES.values(), key=lambda case: case.name), SAMPLE):
        result = outcome(case)
        assert result.kind not in ("WRONG", "CRASH"), (case.name, result)
        merged += result.kind == "merged"
        if result.kind == "refused":
            refused.append(case.name)
    assert merged > SAMPLE / 3, "the control: many cases are merged"
    assert len(refused) <= 0.05 * merged, refused


@pytest.mark.slow
def test_a_wrong_merge_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the walk: with other values in the output, a case is wrong."""
    from qmerge.adapters.updates.peft_layer import PeftLayerUpdate

    right = PeftLayerUpdate.apply
    monkeypatch.setattr(PeftLayerUpdate, "apply", lambda self, base_OI, rows: right(self, base_OI, rows) * 1.001)
    case: Case = CASES["LOHA · llama · linear · basic"]
    assert outcome(case).kind == "WRONG"
