"""The commands on finished folders: patch, apply, unmerge, extract, gguf, push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmerge.cli.options import Device, Json, Quiet, flag
from qmerge.cli.output import print_json
from qmerge.wording import size_text

if TYPE_CHECKING:
    from qmerge.patch.restore import Restored

BaseRevision = Annotated[str | None, typer.Option(help="use this revision of the base on the Hub", metavar="REV")]
PatchFile = Annotated[Path, typer.Argument(help="a file that qmerge patch wrote")]
NewFolder = Annotated[Path, typer.Option(help="write to this folder, which must be new or empty", metavar="DIR")]


def patch_command(
    base: Annotated[str, typer.Argument(help="the base: folder or Hub id")],
    merged: Annotated[Path, typer.Argument(help="a merged folder that was made from it")],
    out: Annotated[Path, typer.Option(help="write the patch to this file", metavar="FILE")],
    revision: BaseRevision = None,
    one_way: Annotated[bool, flag("--one-way", help="leave out what only unmerge needs")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a merged model's difference to its base as a small file."""
    from qmerge import hub, patch
    from qmerge.errors import CheckpointError
    from qmerge.report.terminal.progress import TerminalProgress

    source = hub.resolve(base, revision, CheckpointError)
    summary = patch.make_patch(
        source.folder, merged, out, reversible=not one_way, base_name=source.id, progress=TerminalProgress(quiet)
    )
    if json:
        print_json(vars(summary))
    else:
        typer.echo("\n".join(summary.lines()))


def apply_command(
    base: Annotated[str, typer.Argument(help="the base: folder or Hub id")],
    patch: PatchFile,
    out: NewFolder,
    revision: BaseRevision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Restore the merged model from base and patch, byte for byte."""
    from qmerge.patch import apply_patch
    from qmerge.report.terminal.progress import TerminalProgress

    restored = apply_patch(base, patch, out, revision=revision, progress=TerminalProgress(quiet))
    _print_restored(restored, json)


def unmerge_command(
    merged: Annotated[str, typer.Argument(help="the merged model: folder or Hub id")],
    patch: PatchFile,
    out: NewFolder,
    revision: Annotated[
        str | None, typer.Option(help="use this revision of the merged model on the Hub", metavar="REV")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Restore the base from merged model and patch, byte for byte."""
    from qmerge.patch import unmerge
    from qmerge.report.terminal.progress import TerminalProgress

    restored = unmerge(merged, patch, out, revision=revision, progress=TerminalProgress(quiet))
    _print_restored(restored, json)


def _print_restored(restored: Restored, json: bool) -> None:
    if json:
        print_json(vars(restored))
    else:
        typer.echo(f"Written to {restored.out}: {restored.files} files, {size_text(restored.nbytes)}, byte for byte.")


def extract_command(
    merged: Annotated[str, typer.Argument(help="the fine-tuned model: folder or Hub id", metavar="MERGED")],
    base: Annotated[str, typer.Argument(help="the model that it was trained from: folder or Hub id", metavar="BASE")],
    out: NewFolder,
    rank: Annotated[int | None, typer.Option(help="give every LoRA this rank", metavar="RANK")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="instead of --rank: use the smallest rank that keeps this share of each ‖delta‖²", metavar="SHARE"
        ),
    ] = None,
    save_modules: Annotated[
        bool,
        flag("--save-modules", help="also store differences outside linear layers (norms, embeddings, …)"),
    ] = False,
    device: Device = "auto",
    revision: Annotated[str | None, typer.Option(help="use this revision of BASE on the Hub", metavar="REV")] = None,
    merged_revision: Annotated[
        str | None, typer.Option(help="use this revision of MERGED on the Hub", metavar="REV")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Extract a LoRA from a full fine-tune: MERGED − BASE, decomposed."""
    from qmerge import extract
    from qmerge.report.terminal.console import print_warning
    from qmerge.report.terminal.progress import TerminalProgress

    extraction = extract.extract(
        merged,
        base,
        out,
        rank=rank,
        energy=energy,
        save_modules=save_modules,
        device=device,
        revision=revision,
        merged_revision=merged_revision,
        progress=TerminalProgress(quiet),
    )
    if json:
        print_json(extraction.to_json())
        return
    extract.show(extraction)
    for line in extraction.warnings:
        print_warning(line)


def gguf_command(
    model: Annotated[Path, typer.Argument(help="a dense model folder, as --target bf16 writes it")],
    out: Annotated[Path, typer.Option(help="write to this file", metavar="FILE")],
    type: Annotated[str, typer.Option(help="store matrices as this: f16, bf16, f32 or q8_0", metavar="TYPE")],
    pre: Annotated[
        str | None,
        typer.Option(help="name the tokenizer's way to split text as llama.cpp does, if unknown", metavar="NAME"),
    ] = None,
    json: Json = False,
) -> None:
    """Convert a dense model folder into one GGUF file, for llama.cpp."""
    from qmerge.gguf.export import export
    from qmerge.report.terminal.console import print_warning

    exported = export(model, out, type, pre)
    if json:
        print_json(vars(exported))
        return
    tensors = ", ".join(f"{count} {name}" for name, count in exported.tensors.items())
    typer.echo(
        f"Written to {out}: {size_text(exported.nbytes)}, {exported.arch}, {tensors}; tokenizer {exported.tokenizer}"
    )
    for line in exported.notes:
        print_warning(line)


def push_command(
    out: Annotated[Path, typer.Argument(help="a folder that qmerge wrote", metavar="OUT")],
    id: Annotated[
        str, typer.Argument(help="the model's id on the Hub: owner/name, or name for your own", metavar="ID")
    ],
    private: Annotated[bool, flag("--private", help="make the model private, if it is new there")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a finished model to the Hub; if interrupted, repeat it.

    The token comes from HF_TOKEN or from `hf auth login`.
    """
    from qmerge import publish
    from qmerge.report.terminal.progress import TerminalProgress

    pushed = publish.push(out, id, private=private or None, quiet=quiet, progress=TerminalProgress(quiet))
    if json:
        print_json(vars(pushed))
    else:
        typer.echo("\n".join(pushed.lines()))
