"""The commands that look at what is there: inspect, verify, report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmerge.cli.options import Device, Json, MergedFolder, Quiet, flag
from qmerge.cli.output import print_json
from qmerge.errors import OK, InputError, RecipeError
from qmerge.recipe import JUDGED_TOKENS


def inspect_command(
    adapter: Annotated[str, typer.Argument(help="a PEFT adapter, or a model: folder or Hub id")],
    revision: Annotated[str | None, typer.Option(help="use this revision of it on the Hub", metavar="REV")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="check whether the adapter was trained on this model: folder or Hub id", metavar="ID|DIR"),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="use this revision of the base on the Hub", metavar="REV")
    ] = None,
    json: Json = False,
) -> None:
    """Describe a model, or an adapter and how it fits its base.

    For an adapter: kind, ranks, scales, sizes, what it was trained on, and what looks wrong. For a model: how it is stored,
    its fingerprint, and what it was merged from.
    """
    from qmerge.report.describe.inspect import inspect
    from qmerge.report.terminal.adapter import show_adapter
    from qmerge.report.terminal.model import show_model

    described = inspect(adapter, revision, base, base_revision)
    if json:
        print_json(described)
    elif "architectures" in described:  # only a model has them
        show_model(described)
    else:
        show_adapter(described)
    raise typer.Exit(InputError.exit_code if described.get("problem") else OK)


def verify_command(
    out: MergedFolder,
    reload: Annotated[bool, flag("--reload/--no-reload", help="also load it with a stock loader")] = True,
    loader: Annotated[
        str | None,
        typer.Option(
            help="load with this: transformers, llama.cpp, gptqmodel, auto-gptq or mlx (default: by format)",
            metavar="NAME",
        ),
    ] = None,
    against_inputs: Annotated[
        bool,
        flag("--against-inputs", help="compute all weights again from base and adapter (default: one of each file)"),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="compare it with the unmerged model on this held-out text: txt, jsonl or json (images, speech: a folder)",
            metavar="FILE",
        ),
    ] = None,
    against: Annotated[
        tuple[str, str] | None,
        typer.Option(help="compare it with these (default: those of its recipe)", metavar="BASE ADAPTER"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="use this many tokens of the text", min=2, metavar="N")] = JUDGED_TOKENS,
    sequence_length: Annotated[
        int, typer.Option(help="cut the text into sequences of this many tokens", min=2, metavar="N")
    ] = 512,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a merged folder: hashes, headers, and whether it loads.

    A stock loader must load it with nothing missing and nothing left over. With --text, the whole model is compared with the
    unmerged one: losses, gain kept, KL ratio.
    """
    from qmerge.evaluation.fidelity import fidelity_of_folder, llama_cpp_fidelity
    from qmerge.evaluation.llama_cpp import has_llama_cpp
    from qmerge.evaluation.merged import task_of_folder
    from qmerge.evaluation.verify import verify
    from qmerge.evaluation.whole_fidelity import check_text
    from qmerge.gguf.base import gguf_file
    from qmerge.report.headline import measuring_command
    from qmerge.report.result import Check
    from qmerge.report.terminal.checks import check_line, llama_cpp_line
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.progress import TerminalProgress
    from qmerge.report.terminal.tables import fidelity_table

    if against and text is None:
        raise RecipeError("--against needs --text FILE: the held-out text to compare on")
    out = out.parent if out.is_file() else out
    if text:
        # A text that cannot be used is refused before gigabytes are hashed and loaded.
        check_text(text, task_of_folder(out))
    checks = verify(out, reload, loader, against_inputs=against_inputs)
    fidelity = None
    if text:
        try:
            fidelity = fidelity_of_folder(
                out,
                text,
                against=against,
                tokens=tokens,
                length=sequence_length,
                device=device,
                progress=TerminalProgress(quiet),
            )
            file = gguf_file(out)
            if file and has_llama_cpp():
                record = llama_cpp_fidelity(file, text, against)
                checks.append(Check("llama.cpp", True, llama_cpp_line(record)))
        except InputError as error:  # the results of the other checks are shown all the same
            checks.append(Check("text", False, str(error)))
    all_ok = all(check.ok for check in checks)
    if json:
        described = {"checks": [vars(check) for check in checks]}
        if fidelity:
            described["fidelity"] = fidelity.model_dump()  # type: ignore[assignment]
        print_json(described)
    else:
        for check in checks:
            typer.echo(check_line(check))
        if fidelity:
            stdout().print(fidelity_table(fidelity, measuring_command(str(out), against)))
    raise typer.Exit(OK if all_ok else InputError.exit_code)


def report_command(
    out: MergedFolder,
    html: Annotated[
        Path | None, typer.Option(help="write the page to this file (default: OUT/qmerge.html)", metavar="FILE")
    ] = None,
) -> None:
    """Write the HTML report again, from qmerge.json."""
    from qmerge.report.html import NAME, html_report
    from qmerge.report.output_record import rewrite_file
    from qmerge.safetensors_io.disk import write_file
    from qmerge.schema import read_report

    page = html_report(read_report(out)).encode()
    if html is None:
        rewrite_file(out, NAME, page)
    else:
        write_file(html, page)
    typer.echo(str(html or out / NAME))


def compare_command(
    outs: Annotated[list[Path], typer.Argument(help="folders that qmerge wrote, two or more", metavar="DIR...")],
    html: Annotated[Path, typer.Option(help="write the page to this file", metavar="FILE")] = Path(
        "qmerge-compare.html"
    ),
    json: Json = False,
) -> None:
    """Show several merges side by side: a table, and a page.

    The page has the whole models, the kinds of modules and every weight of all merges. With --json, no page is written.
    """
    from qmerge.report.html import comparison_page
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.tables import measured_table
    from qmerge.safetensors_io.disk import write_file
    from qmerge.schema import distinct_names, read_report

    if len(outs) < 2:
        raise RecipeError(f"compare needs two or more folders, found one: qmerge report {outs[0]} shows one merge")
    reports = [read_report(out) for out in outs]
    names = distinct_names([out.resolve().name for out in outs])
    if json:
        print_json({name: report.model_dump() for name, report in zip(names, reports, strict=True)})
        return
    stdout().print(measured_table(reports, names))
    write_file(html, comparison_page(reports, names).encode())
    typer.echo(f"Page written to {html}")
