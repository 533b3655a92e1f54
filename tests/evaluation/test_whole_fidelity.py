"""Fidelity of models that are no causal language models, against transformers + peft on whole float32 models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig

import qmerge
import qmerge.demo
from qmerge.errors import CheckpointError, RecipeError, TokenizerError
from qmerge.schema import FidelityRecord

from .. import kinds
from ..conftest import Cli
from .test_fidelity import close

DEMO = Path(qmerge.demo.__file__).parent
TEXTS = [line for line in (DEMO / "heldout.txt").read_text().splitlines() if len(line) > 30][:12]
TARGETS = {
    "t5": ["q", "v", "wo"],
    "bart": ["q_proj", "v_proj", "fc2"],
    "llama-classes": ["q_proj", "v_proj", "down_proj"],
}

Outputs = tuple[Tensor, Tensor]
"""Log-probabilities [P, V] of one example, and the right answers [P], −1 where there is none."""


@dataclass(frozen=True)
class Made:
    base: Path
    adapter: Path
    out: Path

    def models(self) -> list[Any]:
        """Base, unmerged and merged model, whole and in float32, by the stock libraries."""
        return [dense(self.base), PeftModel.from_pretrained(dense(self.base), self.adapter).eval(), dense(self.out)]


def dense(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return model.dequantize().float().eval()  # by bitsandbytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = Made(folder / "base", folder / "lora", folder / "out")
            merge(name, folder, known[name])
        return known[name]

    return make


def merge(name: str, folder: Path, made: Made) -> None:
    model = kinds.build(name)
    model.save_pretrained(folder / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": settings, "dtype": torch.float32, "device_map": "cpu"}
    type(model).from_pretrained(folder / "dense", **options).save_pretrained(made.base)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base-nf4")
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(made.base)
    targets = TARGETS.get(name, ["query", "value", "output.dense"])
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    wrapped.save_pretrained(made.adapter)
    asked = {"base": str(made.base), "adapter": str(made.adapter), "target": "nf4", "out": str(made.out)}
    qmerge.merge(**asked, rounding="stochastic", quiet=True)


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def judged(made: Made, text: Path) -> FidelityRecord:
    return qmerge.fidelity(out=str(made.out), text=str(text), device="cpu", quiet=True)


# --- the oracles: one example through one model -----------------------------------------------------------------------


def classes(model: Any, tokenizer: Any, record: dict[str, Any]) -> list[Outputs]:
    parts = [record[field] for field in ("text", "text_pair") if field in record]
    logits = model(**tokenizer(*parts, return_tensors="pt")).logits
    return [(logits, torch.tensor([record.get("label", -1)]))]


def classes_of_tokens(model: Any, tokenizer: Any, record: dict[str, Any]) -> list[Outputs]:
    logits = model(**tokenizer(record["text"], return_tensors="pt")).logits[0]
    return [(logits, torch.full((len(logits),), -1))]


def answer_spans(model: Any, tokenizer: Any, record: dict[str, Any]) -> list[Outputs]:
    result = model(**tokenizer(record["question"], record["context"], return_tensors="pt"))
    return [(result.start_logits, torch.tensor([-1])), (result.end_logits, torch.tensor([-1]))]


def masked_tokens(model: Any, tokenizer: Any, record: dict[str, Any]) -> list[Outputs]:
    ids = tokenizer(record["text"], return_tensors="pt")["input_ids"]
    inside = [place for place, token in enumerate(ids[0].tolist()) if token not in tokenizer.all_special_ids]
    at = inside[3::7]
    masked = ids.clone()
    masked[0, at] = tokenizer.mask_token_id
    return [(model(input_ids=masked).logits[0, at], ids[0, at])]


def target_tokens(model: Any, tokenizer: Any, record: dict[str, Any]) -> list[Outputs]:
    labels = tokenizer(text_target=record["target"], return_tensors="pt")["input_ids"]
    result = model(**tokenizer(record["source"], return_tensors="pt"), labels=labels)
    loss = torch.nn.functional.cross_entropy(result.logits[0], labels[0])
    assert torch.allclose(loss, result.loss), "the positions are those of transformers' own loss"
    return [(result.logits[0], labels[0])]


RECORDS: dict[Any, list[dict[str, Any]]] = {
    classes: [{"text": text, "label": number % 3} for number, text in enumerate(TEXTS)],
    classes_of_tokens: [{"text": text} for text in TEXTS],
    answer_spans: [{"question": one[:20], "context": other} for one, other in pairwise(TEXTS)],
    masked_tokens: [{"text": text} for text in TEXTS],
    target_tokens: [{"source": one, "target": other} for one, other in pairwise(TEXTS)],
}


@torch.no_grad()
def expected(models: list[Any], tokenizer: Any, oracle: Any, records: list[dict[str, Any]]) -> dict[str, float | None]:
    """By the definitions, in float64."""
    losses = torch.zeros(3, dtype=torch.float64)
    known = 0
    to_base: list[Tensor] = []
    to_merged: list[Tensor] = []
    agreed: list[Tensor] = []
    for record in records:
        for (b, answers), (u, _), (m, _) in zip(*(oracle(model, tokenizer, record) for model in models), strict=True):
            logs = [torch.log_softmax(logits.double(), -1) for logits in (b, u, m)]
            has_answer = answers >= 0
            known += int(has_answer.sum())
            for number, log in enumerate(logs):
                losses[number] -= log[has_answer].gather(1, answers[has_answer, None]).sum()
            to_base.append((logs[1].exp() * (logs[1] - logs[0])).sum(-1))
            to_merged.append((logs[1].exp() * (logs[1] - logs[2])).sum(-1))
            agreed.append((logs[1].argmax(-1) == logs[2].argmax(-1)).double())
    base, unmerged, merged = (losses / known).tolist() if known else (None, None, None)
    gain = None
    if known and unmerged < base:
        gain = (base - merged) / (base - unmerged)
    return {
        "loss_base": base, "loss_unmerged": unmerged, "loss_merged": merged, "gain_kept": gain,
        "kl_base": float(torch.cat(to_base).mean()), "kl_merged": float(torch.cat(to_merged).mean()),
        "kl_ratio": float(torch.cat(to_merged).mean() / torch.cat(to_base).mean()),
        "top1_agreement": float(torch.cat(agreed).mean()), "kl_p99": float(torch.cat(to_merged).quantile(0.99)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "oracle", "words"),
    [
        ("bert-classes", classes, "classes"),
        ("llama-classes", classes, "classes"),
        ("bert-tokens", classes_of_tokens, "classes of tokens"),
        ("bert-answers", answer_spans, "answer spans"),
        ("bert-masked", masked_tokens, "masked tokens"),
        ("t5", target_tokens, "target tokens"),
        ("bart", target_tokens, "target tokens"),
    ],
)
def test_equals_transformers_and_peft(
    made: Callable[[str], Made], tmp_path: Path, name: str, oracle: Any, words: str
) -> None:  # fmt: skip
    records = RECORDS[oracle]
    found = judged(made(name), written(tmp_path / "heldout.jsonl", records))
    models = made(name).models()
    numbers = expected(models, AutoTokenizer.from_pretrained(made(name).base), oracle, records)
    if found.loss_base is None:
        assert numbers["loss_base"] is None and found.gain_kept is None
        numbers = {key: value for key, value in numbers.items() if value is not None}
    elif numbers["gain_kept"] is None:
        assert found.gain_kept is None
        del numbers["gain_kept"]
    close_whole(found, numbers)
    assert found.judged == words and found.measured_on == f"{words} of {len(records)} examples of heldout.jsonl"
    assert found.kl_base > 100 * 5e-6, "far above what is allowed, so that a swapped model would show"


def close_whole(found: FidelityRecord, numbers: dict[str, float | None]) -> None:
    """As ``close``, whose bound for gain kept needs losses."""
    if found.loss_base is None:
        found = found.model_copy(update={"loss_base": 0.0, "loss_unmerged": 0.0})
        numbers.pop("gain_kept", None)
        assert not any(key.startswith("loss") for key in numbers)
        found = found.model_copy(update={"loss_base": 1.0})
    close(found, numbers)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_embeddings_as_sentence_transformers_pools_them(
    made: Callable[[str], Made], tmp_path: Path, pooling: str
) -> None:  # fmt: skip
    """1 − cosine of the embeddings, as the settings in the base's folder say."""
    found_in = made("bert")
    folder = found_in.base / "1_Pooling"
    folder.mkdir(exist_ok=True)
    settings = {f"pooling_mode_{kind}": kind.startswith(pooling) for kind in ("cls_token", "mean_tokens", "lasttoken")}
    (folder / "config.json").write_text(json.dumps(settings))
    text = tmp_path / "heldout.txt"
    text.write_text("\n".join(TEXTS))
    found = judged(found_in, text)
    tokenizer = AutoTokenizer.from_pretrained(found_in.base)

    @torch.no_grad()
    def embeddings(model: Any) -> Tensor:
        hidden = [model(**tokenizer(one, return_tensors="pt")).last_hidden_state[0] for one in TEXTS]
        pool = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "lasttoken": lambda h: h[-1]}[pooling]
        return torch.stack([pool(one) for one in hidden]).double()

    base, unmerged, merged = map(embeddings, found_in.models())
    to_base, to_merged = (1 - torch.cosine_similarity(unmerged, other).mean() for other in (base, merged))
    assert found.judged == "embeddings" and found.measured_on == f"embeddings of {len(TEXTS)} examples of heldout.txt"
    # float32 embeddings of length 1, through two layers: their squared distance is off by about 1e-6 of itself.
    assert found.kl_base == pytest.approx(float(to_base), rel=1e-3) and found.kl_base > 1e-3
    assert found.kl_ratio == pytest.approx(float(to_merged / to_base), rel=1e-3)
    assert found.loss_base is found.gain_kept is found.top1_agreement is None


def test_one_class_is_a_number(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Regression: distances, and no loss."""
    text = written(tmp_path / "heldout.jsonl", RECORDS[classes_of_tokens])
    found = judged(made("bert-score"), text)
    tokenizer = AutoTokenizer.from_pretrained(made("bert-score").base)
    with torch.no_grad():
        base, unmerged, merged = (
            torch.cat([model(**tokenizer(one, return_tensors="pt")).logits[0] for one in TEXTS]).double()
            for model in made("bert-score").models()
        )
    ratio = (unmerged - merged).square().sum() / (unmerged - base).square().sum()
    assert found.judged == "scores" and found.kl_ratio == pytest.approx(float(ratio), rel=1e-3)


def test_on_the_command_line(made: Callable[[str], Made], tmp_path: Path, cli: Cli) -> None:
    text = written(tmp_path / "heldout.jsonl", RECORDS[classes])
    ran = cli("verify", made("bert-classes").out, "--text", text, "--no-reload", "--device", "cpu")
    assert ran.code == 0 and "same class" in ran.out and "KL ratio" in ran.out and not ran.err
    text = tmp_path / "heldout.txt"
    text.write_text("\n".join(TEXTS))
    ran = cli("verify", made("bert").out, "--text", text, "--device", "cpu")
    assert ran.code == 0 and "distance ratio" in ran.out and "gain kept" not in ran.out
    assert "BertModel with transformers" in ran.out and "within 0.0 %" in ran.out


def test_texts_of_another_form(made: Callable[[str], Made], tmp_path: Path, cli: Cli) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(TEXTS))
    lines = written(tmp_path / "lines.jsonl", RECORDS[classes_of_tokens])
    label = written(tmp_path / "label.jsonl", [{"text": "a", "label": 7}])
    ran = cli("verify", made("t5").out, "--text", plain, "--no-reload")
    assert (
        ran.code == 2 and 'expected a .jsonl file with lines like {"source": …, "target": …}' in ran.err and not ran.out
    )
    ran = cli("verify", made("t5").out, "--text", lines, "--no-reload")
    assert ran.code == 2 and "lines.jsonl, line 1: for text to text, expected" in ran.err and "found text" in ran.err
    with pytest.raises(RecipeError, match=r"label 7: the model has the classes 0 to 2 \(LABEL_0, LABEL_1, LABEL_2\)"):
        judged(made("bert-classes"), label)


def test_no_memory_for_three_models(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from qmerge.evaluation import stored

    text = written(tmp_path / "heldout.jsonl", RECORDS[classes])
    monkeypatch.setattr(stored, "memory_limit", lambda *_: 1000)
    with pytest.raises(CheckpointError, match=r"float32 values of whole models take .* GB here, and 0\.0 GB"):
        judged(made("bert-classes"), text)


def test_a_tokenizer_that_does_not_fit(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Without a mask, no token can be masked."""
    text = written(tmp_path / "heldout.jsonl", RECORDS[masked_tokens])
    base = made("bert-masked").base
    AutoTokenizer.from_pretrained(DEMO / "base-nf4").save_pretrained(base)
    with pytest.raises(TokenizerError, match="has no mask token"):
        judged(made("bert-masked"), text)
