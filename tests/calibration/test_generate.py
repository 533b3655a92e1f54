"""Generated text: what it starts from, who writes it, and that the same seed gives the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qmerge
import qmerge.demo
from qmerge.calibration import generate, texts
from qmerge.calibration.generate import generate_tokens
from qmerge.calibration.starts import START_SHARES, USER_WORDS, Start, Starts, find_starts
from qmerge.calibration.unmerged import unmerged_model
from qmerge.planning.plan import make_plan, make_run_context
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

DEMO = Path(qmerge.demo.__file__).parent
VOCABULARY = 10**6
LOAD_TOKENIZER = texts.load_tokenizer
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>Q: {{ m.content }}</s>{% else %}A: {{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture(scope="module")
def planned() -> Iterator[tuple[Any, Any]]:
    settings = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
    with Reader() as reader:
        plan = make_plan(make_recipe({**settings, "rounding": "preserve", "out": "unused"}), reader)
        yield plan, make_run_context(plan, reader)


def chat_tokenizer() -> Any:
    tokenizer = LOAD_TOKENIZER(DEMO / "base-nf4")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def demo_starts(monkeypatch: pytest.MonkeyPatch | None = None) -> Starts:
    if monkeypatch:
        monkeypatch.setattr(texts, "load_tokenizer", lambda folder: chat_tokenizer())
    return find_starts(DEMO / "base-nf4", vocab_size=VOCABULARY, seed=0)


def written(planned: tuple[Any, Any], starts: Starts, seed: int = 0, **more: Any) -> Tensor:
    asked: dict[str, Any] = {"tokens": 256, "length": 32, "report_progress": lambda line: None, **more}
    return generate_tokens(*planned, starts, seed=seed, **asked)


def test_the_same_seed_gives_the_same_tokens(planned: tuple[Any, Any]) -> None:
    one = written(planned, demo_starts())
    assert one.shape == (8, 32) and torch.equal(one, written(planned, demo_starts()))
    assert not torch.equal(one, written(planned, demo_starts(), seed=1))


def test_generated_text_is_the_adapter_models_own(planned: tuple[Any, Any], tmp_path: Path) -> None:
    """Under the adapter model, its own text is likelier than random tokens."""
    out = tmp_path / "dense"
    qmerge.merge(
        base=str(DEMO / "base-nf4"), adapter=str(DEMO / "adapter"), target="fp32", rounding="nearest", out=str(out), quiet=True
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    vocabulary = texts.vocab_size(planned[0].inputs.base.config)

    def loss(ids: Tensor) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    random = torch.cat(texts.random_tokens(vocabulary, tokens=256, length=32, seed=0))
    only_nothing = Starts(by_kind={"nothing": demo_starts().by_kind["nothing"]}, turn_end=None)
    assert loss(written(planned, only_nothing)) < loss(random) - 1


def test_sequences_start_as_their_shares_say(planned: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = demo_starts(monkeypatch)
    assert starts.by_kind.keys() == START_SHARES.keys()
    ids = written(planned, starts, tokens=16 * 32)
    kinds = [_kind_of(row.tolist(), starts) for row in ids]
    for kind, share in START_SHARES.items():
        assert abs(kinds.count(kind) - 16 * share) <= 1


def _kind_of(ids: list[int], starts: Starts) -> str:
    """The longest start that a sequence begins with."""
    longest: tuple[int, str] = (0, "")
    for kind, of_kind in starts.by_kind.items():
        for start in of_kind:
            given = list(start.ids)[: len(ids)]
            if ids[: len(given)] == given:
                longest = max(longest, (len(given), kind))
    return longest[1]


def test_a_base_without_a_chat_template_has_no_chats() -> None:
    starts = demo_starts()
    assert starts.by_kind.keys() == {"nothing", "beginning"} and starts.turn_end is None
    least, most = 16, 32
    assert all(least <= len(start.ids) <= most for start in starts.by_kind["beginning"])


def test_the_chat_template_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, tokenizer = demo_starts(monkeypatch), chat_tokenizer()
    (open_turn,) = starts.by_kind["user turn"]
    assert tokenizer.decode(open_turn.ids) == "<s>Q: " and tokenizer.decode(open_turn.reply) == "A: "
    assert starts.turn_end == tokenizer.eos_token_id
    questions = [tokenizer.decode(start.ids) for start in starts.by_kind["question"]]
    assert len(questions) >= 40 and all(text.startswith("<s>Q: ") and text.endswith("</s>A: ") for text in questions)
    assert not any(USER_WORDS in text for text in questions)


def test_turns_of_a_chat() -> None:
    """The user's turn ends: the reply is given. The assistant's turn ends: another text starts."""
    chat = Start(ids=[1, 2], is_chat=True, reply=[3, 4])
    writer = generate._Writer(iter([chat, Start(ids=[8])]), turn_end=9)
    ids = [writer.first()]
    for sampled in [0, 50, 9, 0, 0, 51, 9, 0, 52, 9, 53]:
        ids.append(writer.next(sampled))
    #                 user's   turn      reply  assistant's  next text, which is no chat
    assert ids == [1, 2, 50, 9, 3, 4, 51, 9, 8, 52, 9, 53]


def test_in_memory_and_streamed_agree(planned: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first_ids = torch.tensor([[1], [2], [40]])

    def logits(kind: Any, with_delta: bool = True) -> list[Tensor]:
        model = kind(*unmerged_model(*planned, with_delta=with_delta))
        cache = model.new_cache()
        return [model.next_logits(first_ids, cache), model.next_logits(first_ids + 7, cache)]

    whole, streamed = logits(generate._WholeModel), logits(generate._StreamedModel)
    base = logits(generate._WholeModel, with_delta=False)
    for one, other, control in zip(whole, streamed, base, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - control).abs().max() > 0.05


def test_the_text_does_not_depend_on_free_memory(planned: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run can be resumed when the memory that is free has changed."""
    in_memory = written(planned, demo_starts(), tokens=16 * 32)
    monkeypatch.setattr(generate, "fits_whole", lambda layered, max_memory: False)
    monkeypatch.delattr(generate._WholeModel, "next_logits")
    assert torch.equal(in_memory, written(planned, demo_starts(), tokens=16 * 32))


def test_large_models_write_shorter_sequences(planned: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences grow together: a model is read once per token of one sequence."""
    monkeypatch.setattr(generate, "LENGTH_OF_LARGE", 4)
    assert written(planned, demo_starts()).shape == (8, 32)
    monkeypatch.setattr(generate, "LARGE_MODEL", 10**6)
    lines: list[str] = []
    ids = written(planned, demo_starts(), report_progress=lines.append)
    assert ids.shape == (64, 4)
    assert [line.partition(",")[0] for line in lines] == [f"generating 64 sequences: token {n} of 4" for n in (2, 3, 4)]


def test_samples_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits = probabilities.log().expand(20_000, 4)
    counts = torch.bincount(torch.tensor(generate._sample(logits, torch.Generator().manual_seed(0))), minlength=4)
    assert counts[1] == 0
    torch.testing.assert_close(counts / 20_000, probabilities, rtol=0, atol=0.02)
