"""Commands on finished folders: patch, apply, unmerge, extract, gguf. ``cli.py`` gives them their names."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qmerge.errors import StoppedError

Json = Annotated[bool, typer.Option("--json", help="results as JSON on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def gguf_command(
    model: Annotated[Path, typer.Argument(help="a dense model folder, as --target bf16 writes it")],
    out: Annotated[Path, typer.Option(help="the file to write", metavar="FILE")],
    type: Annotated[str, typer.Option(help="what matrices become: f16, bf16, f32 or q8_0", metavar="TYPE")],
    pre: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="llama.cpp's name for how the tokenizer splits text, where it is not known", metavar="NAME"),
    ] = None,
    json: Json = False,
) -> None:
    """One GGUF file from a dense model folder, for llama.cpp and what is built on it."""
    from qmerge.gguf.export import export

    with nothing_left():
        written = export(model, out, type, pre)
    if json:
        typer.echo(jsonlib.dumps(vars(written), indent=1, default=str))
        return
    counts = ", ".join(f"{count} {name}" for name, count in written.tensors.items())
    typer.echo(
        f"Written to {out}: {written.nbytes / 1e6:.1f} MB, {written.arch}, {counts}; tokenizer {written.tokenizer}"
    )
    show_warnings(list(written.notes))


def patch_command(
    base: Annotated[str, typer.Argument(help="the base: folder or Hub id")],
    merged: Annotated[Path, typer.Argument(help="a finished folder that was made of it")],
    out: Annotated[Path, typer.Option(help="the file to write", metavar="FILE")],
    revision: Annotated[Optional[str], typer.Option(help="revision of the base on the Hub")] = None,  # noqa: UP045
    one_way: Annotated[bool, typer.Option("--one-way", help="leave out what only unmerge needs")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a merged folder has that its base has not, as one small file; apply and unmerge take it."""
    from qmerge import hub, patch
    from qmerge.errors import CheckpointError
    from qmerge.report.terminal.progress import TerminalProgress

    source = hub.resolve(base, revision, CheckpointError)
    with nothing_left():
        made = patch.make_patch(
            source.folder, merged, out, reversible=not one_way, base_name=source.id, progress=TerminalProgress(quiet)
        )
    typer.echo(jsonlib.dumps(vars(made), indent=1, default=str) if json else "\n".join(made.lines()))


def apply_command(
    base: Annotated[str, typer.Argument(help="the base: folder or Hub id")],
    patch: Annotated[Path, typer.Argument(help="what `qmerge patch` wrote")],
    out: Annotated[Path, typer.Option(help="folder to write to; new or empty", metavar="DIR")],
    revision: Annotated[Optional[str], typer.Option(help="revision of the base on the Hub")] = None,  # noqa: UP045
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Base and patch → the merged folder, byte for byte."""
    from qmerge.patch import apply_patch
    from qmerge.report.terminal.progress import TerminalProgress

    with nothing_left():
        restored = apply_patch(base, patch, out, revision=revision, progress=TerminalProgress(quiet))
    show_restored(restored, json)


def unmerge_command(
    merged: Annotated[str, typer.Argument(help="the merged model: folder or Hub id")],
    patch: Annotated[Path, typer.Argument(help="what `qmerge patch` wrote")],
    out: Annotated[Path, typer.Option(help="folder to write to; new or empty", metavar="DIR")],
    revision: Annotated[Optional[str], typer.Option(help="revision of the model on the Hub")] = None,  # noqa: UP045
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merged folder and patch → the base's files, byte for byte."""
    from qmerge.patch import unmerge
    from qmerge.report.terminal.progress import TerminalProgress

    with nothing_left():
        restored = unmerge(merged, patch, out, revision=revision, progress=TerminalProgress(quiet))
    show_restored(restored, json)


def show_restored(restored: Any, json: bool) -> None:
    if json:
        typer.echo(jsonlib.dumps(vars(restored), indent=1, default=str))
    else:
        typer.echo(f"Written to {restored.out}: {restored.files} files, {restored.nbytes / 1e6:.1f} MB, as they were")


@contextmanager
def nothing_left() -> Iterator[None]:
    """Ctrl-C, said in a line, where there is nothing to go on from."""
    try:
        yield
    except KeyboardInterrupt as cause:
        raise StoppedError("interrupted. Nothing was left behind; the same command starts again.") from cause


def extract_command(
    merged: Annotated[str, typer.Argument(help="the fine-tuned model: folder or Hub id", metavar="MERGED")],
    base: Annotated[str, typer.Argument(help="the model that it was made from: folder or Hub id", metavar="BASE")],
    out: Annotated[Path, typer.Option(help="folder to write to; must not exist, or be empty", metavar="DIR")],
    rank: Annotated[Optional[int], typer.Option(help="rank of every LoRA", metavar="R")] = None,  # noqa: UP045
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="instead: per weight, the smallest rank that keeps this share of the delta's square", metavar="SHARE"
        ),
    ] = None,
    save_modules: Annotated[
        bool,
        typer.Option("--save-modules", help="also store what differs and is no linear layer (norms, embeddings, …)"),
    ] = False,
    device: Annotated[str, typer.Option(help="where to compute: auto, cpu or cuda")] = "auto",
    revision: Annotated[Optional[str], typer.Option(help="revision of BASE on the Hub", metavar="REV")] = None,  # noqa: UP045
    merged_revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="revision of MERGED on the Hub", metavar="REV"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A LoRA back from a full checkpoint: MERGED − BASE, decomposed; and what that loses."""
    from qmerge import extract
    from qmerge.report.terminal.progress import TerminalProgress

    request = (merged, base, out, rank, energy, save_modules, device, revision, merged_revision)
    with nothing_left():
        found = extract.extract(*request, TerminalProgress(quiet))
    if json:
        typer.echo(jsonlib.dumps(found.to_json(), indent=1))
    else:
        extract.show(found)
        show_warnings(list(found.warnings))


def show_warnings(lines: list[str], prefix: str = "") -> None:
    from qmerge.report.terminal.progress import TerminalProgress

    for line in lines:
        TerminalProgress().warn(prefix + line)


COMMANDS: dict[str, Callable[..., None]] = {
    "gguf": gguf_command,
    "patch": patch_command,
    "apply": apply_command,
    "unmerge": unmerge_command,
    "extract": extract_command,
}
