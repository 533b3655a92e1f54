"""Help for the notebooks: the demo model where a form is empty, the machine, the output folder, the report, a model's answers."""

from __future__ import annotations

import gc
import html
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

from qmerge.base_check.from_training import with_named_base
from qmerge.calibration.documents import Document, Exchange, read_texts
from qmerge.calibration.room import memory_limit
from qmerge.calibration.texts import find_text
from qmerge.checkpoint.folder import free_bytes
from qmerge.demo.texts import telegram, text_of
from qmerge.demo.training import Training
from qmerge.errors import QmergeError, RecipeError, RoomError
from qmerge.evaluation import llama_cpp
from qmerge.recipe import TrainedOn, make_recipe
from qmerge.report.html import NAME as PAGE_NAME
from qmerge.report.html import comparison_page
from qmerge.report.result import Report
from qmerge.report.terminal.console import NotedTable, make_table, with_notes
from qmerge.weights.context import compute_device
from qmerge.wording import DASH, size_text

DRIVE = "Google Drive"
SESSION = "this session"

DEMO_TRAINING = Training(steps=20, rate=5e-4, rank=8, sequences=8, sequence_length=128)
"""A few seconds on a CPU."""

SECOND_TASK_CHARACTERS = 60_000

JOINED_CHARACTERS = 40_000
"""Of each text; the last chat is whole."""

JUDGED_CHARACTERS = 12_000
"""Of the demo's held-out text, to be quick: 5,000 tokens."""

DEMO_CALIBRATION = {"calibration_tokens": 1024, "sequence_length": 128}
"""Settings of a merge that only make the demo quick."""

PAGE_HEIGHT = 900
"""Pixels of a page within a notebook."""

GPU_HINT = "No GPU. The demo model needs none; for a model of yours: Runtime > Change runtime type > T4 GPU."


@dataclass(frozen=True)
class Inputs:
    """What a notebook merges."""

    base: str
    adapter: str
    """Empty where one is to be trained."""
    text: str
    """To train and to calibrate on."""
    heldout: str
    """To judge the result; empty where there is none."""
    trained_on: TrainedOn | None
    is_demo: bool


def inputs(
    *,
    base: str = "",
    adapter: str = "",
    text: str = "",
    heldout: str = "",
    trained_on: str = "",
    trains: bool = False,
) -> Inputs:
    """What a form says. An empty form means the demo model, its adapter and its texts; an empty base, the one that the adapter
    names.

    Args:
        trains: the notebook trains an adapter where none is given.

    Raises:
        RecipeError: a form that is filled in half.
        AdapterError: the adapter names no base.
    """
    if not (base or adapter or text):
        return _demo_inputs()
    if not adapter and not (trains and base):
        raise RecipeError(
            "ADAPTER is empty, but other fields are not: fill it in, or empty the whole form for the demo"
        )
    if not text:
        raise RecipeError("TEXT is empty: give a .txt or .jsonl file, or a dataset on the Hub, of the adapter's task")
    return Inputs(
        base=base or _named_base(adapter), adapter=adapter, text=text, heldout=heldout,
        trained_on=trained_on or None, is_demo=False,  # type: ignore[arg-type]  # the recipe checks it
    )  # fmt: skip


def _demo_inputs() -> Inputs:
    demo = Path(str(files("qmerge.demo")))
    heldout_part = Path.cwd() / "demo-heldout.txt"
    heldout_part.write_text((demo / "heldout.txt").read_text(encoding="utf-8")[:JUDGED_CHARACTERS], encoding="utf-8")
    return Inputs(
        base=str(demo / "base-nf4"),
        adapter=str(demo / "adapter"),
        text=str(demo / "calibration.txt"),
        heldout=str(heldout_part),
        trained_on=None,
        is_demo=True,
    )


def _named_base(adapter: str) -> str:
    recipe = with_named_base(make_recipe({"adapter": adapter, "target": "nf4"}), print)
    return f"{recipe.base}@{recipe.revision}" if recipe.revision else recipe.base


def output_folder(name: str, place: str = SESSION) -> Path:
    """A folder for results: on Google Drive, which outlives the session, or in the working directory.

    Raises:
        RecipeError: Google Drive, outside Colab.
    """
    if place != DRIVE:
        return Path.cwd() / name
    if "COLAB_RELEASE_TAG" not in os.environ:
        raise RecipeError(f"{DRIVE} can be mounted in Colab only: choose {SESSION!r}")
    from google.colab import drive

    drive.mount("/content/drive")
    return Path("/content/drive/MyDrive") / name


def machine(folder: Path) -> NotedTable:
    """GPU, memory and disk that are free now."""
    table = make_table("This machine", ("", "free"))
    line = GPU_HINT
    if torch.cuda.is_available():
        table.add_row(torch.cuda.get_device_name(), size_text(torch.cuda.mem_get_info()[0]))
        line = "The GPU computes; weights pass through the memory of the process."
    table.add_row("memory", size_text(psutil.virtual_memory().available))
    table.add_row("disk", size_text(free_bytes(folder)))
    return NotedTable(table, (line,))


def room(plan: Mapping[str, Any], folder: Path) -> NotedTable:
    """What a merge needs of it, by the plan of a target.

    Raises:
        RoomError: the disk is too small; the merge would stop before it begins.
    """
    free = free_bytes(folder)
    if plan["disk_needed"] > free:
        raise RoomError(
            f"{folder}: {size_text(plan['disk_needed'])} are needed on the disk, {size_text(free)} are free: choose a smaller "
            f"target or another place"
        )
    free_memory = memory_limit(None, compute_device("auto"))
    table = make_table("What the merge needs", ("", "needed", "free"))
    table.add_row("disk", size_text(plan["disk_needed"]), size_text(free))
    table.add_row("memory for weights", size_text(plan["peak_memory"]), size_text(free_memory))
    calibration = plan["calibration_memory"]
    table.add_row("memory for calibration", size_text(calibration) if calibration else DASH, size_text(free_memory))
    return with_notes(table, [("memory", "of the GPU, if there is one; if less is free, parts take turns")])


@dataclass(frozen=True)
class Page:
    """An HTML page within a notebook, apart from the notebook's own styles and scripts."""

    text: str

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {PAGE_HEIGHT}px; border: 1px solid #8888"
        return f'<iframe srcdoc="{html.escape(self.text)}" style="{style}" title="qmerge report"></iframe>'


def page(out: str | Path) -> Page:
    """The report that a merge wrote, with its pictures."""
    return Page((Path(out) / PAGE_NAME).read_text(encoding="utf-8"))


def comparison(reports: Mapping[str, Report]) -> Page:
    """Several merges on one page, as ``qmerge compare`` writes it."""
    return Page(comparison_page([report.data for report in reports.values()], list(reports)))


def second_task(folder: Path) -> tuple[Path, Path]:
    """A second task for the demo model, telegrams: texts to train on and to judge with, written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "telegrams.txt", folder / "telegrams-heldout.txt"
    for path in paths:
        path.write_text(text_of(telegram, path.stem, SECOND_TASK_CHARACTERS), encoding="utf-8")
    return paths


def joined_texts(sources: Sequence[str | Path], file: Path) -> Path:
    """Some text of each source (a file, or a dataset on the Hub), as JSON lines to calibrate on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as joined:
        for source in sources:
            left = JOINED_CHARACTERS
            for document in read_texts(find_text(str(source))):
                left -= joined.write(json.dumps(_row(document, left)) + "\n")
                if left <= 0:
                    break
    return file


def _row(document: Document, left: int) -> dict[str, Any]:
    """A document as a row of JSON lines; of a text, the first characters."""
    if isinstance(document, str):
        return {"text": document[:left]}
    if isinstance(document, Exchange):
        return {"instruction": document.question, "output": document.answer}
    return {"messages": document}


def answer(model: str | Path, prompt: str, adapter: str | Path | None = None, tokens: int = 40) -> str:
    """The most likely continuation of a prompt, with what stock libraries load.

    Args:
        model: folder or Hub id.
        adapter: to put on top of the model, unmerged.
    """
    tokenizer, loaded = _load(model)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    ids = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    written = loaded.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    del loaded
    _free()
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def speeds(folders: Mapping[str, Path], prompt: str) -> NotedTable:
    """Tokens per second that each model writes, one at a time: GGUF in llama.cpp, all others in transformers."""
    table = make_table("Speed", ("target", "size", "tokens per second", "loaded by"))
    for target, folder in folders.items():
        size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
        gguf = folder / "model.gguf"
        loader = "llama.cpp" if gguf.exists() else "transformers"
        try:
            speed = f"{_llama_cpp_speed(gguf, prompt) if gguf.exists() else _transformers_speed(folder, prompt):.1f}"
        except (ImportError, QmergeError) as missing:
            speed, loader = DASH, str(missing).splitlines()[0][:60]
        table.add_row(target, size_text(size), speed, loader)
    return NotedTable(table, ("One sequence at a time, without a server: only models in one program compare.",))


def _transformers_speed(folder: Path, prompt: str) -> float:
    tokenizer, model = _load(folder)
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    settings = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**ids, max_new_tokens=2, **settings)  # kernels are loaded and compiled by the first call
    started = time.perf_counter()
    tokens = llama_cpp.TIMED_TOKENS
    model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
    seconds = time.perf_counter() - started
    del model
    _free()
    return tokens / seconds


def _llama_cpp_speed(file: Path, prompt: str) -> float:
    # The bytes of the prompt are token ids that every vocabulary has; which ones makes no difference to the speed.
    return llama_cpp.tokens_per_second(file, list(prompt.encode()))


def _load(model: str | Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = "auto" if torch.cuda.is_available() else "cpu"
    return AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, device_map=place)


def _free() -> None:
    """Return the memory of a deleted model to the system and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
