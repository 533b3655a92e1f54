"""``QmergeCallback``: merge, check and push when a training ends.

Everything that can be wrong with the settings is an error before the training begins. What goes wrong after it does not end
the user's script: the adapter is saved first, and the merge can be repeated.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qmerge import api, publish
from qmerge.base_check.from_training import with_named_base
from qmerge.checkpoint import folder
from qmerge.errors import NumbersError, QmergeError, RecipeError
from qmerge.hub import SAVED_BY_CALLBACK
from qmerge.patch import direct
from qmerge.recipe import Recipe, make_recipe
from qmerge.report.environment import check_environment
from qmerge.report.headline import measuring_command_of
from qmerge.report.limits import past_limits
from qmerge.report.result import Report
from qmerge.report.terminal.console import stdout
from qmerge.report.terminal.progress import TerminalProgress
from qmerge.report.terminal.tables import report_tables
from qmerge.safetensors_io.disk import failure_of_machine
from qmerge.training.trained_model import TrainedModel, adapter_folder, save_adapter, trained_model

REFUSED = {
    "adapter": "the adapter that was trained is merged",
    "resume": "every training makes another adapter, so there is no merge to go on with",
}
"""Arguments of ``qmerge.merge`` that make no sense here, and why."""


class QmergeCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Merges the adapter into its base when the training ends, checks the model, and pushes it to the Hub.

        trainer = SFTTrainer(…, callbacks=[qmerge.QmergeCallback(target="nf4", out="merged")])

    The base is the one that the model was loaded from. Where it was quantized while it was loaded (``load_in_4bit=True`` on a
    16-bit model), the merge quantizes it in the same way (``trained_on``).

    Args:
        target: format to store the model in, as for ``qmerge.merge``.
        out: folder to write the model to; new or empty.
        verify: held-out text to compare the merged model with the unmerged one: a txt or jsonl file.
        push_to_hub: id of a model on the Hub to upload to, if all checks pass and the model is past no limit.
        private: make the model on the Hub private, if it is new there.
        min_kept, max_kl_ratio: limits, as for ``qmerge.merge``.
        quiet: show neither progress nor the result; warnings are still shown.
        settings: all other arguments of ``qmerge.merge``, except ``adapter`` and ``resume``.

    Attributes:
        report: what survived, after the training; None if the merge failed.
        error: why it failed, or why the model was not pushed; None if all went well.

    Raises:
        qmerge.errors.QmergeError: when the training begins: wrong settings, a model without adapter or with several active ones,
            a token that may not write.
    """

    def __init__(
        self,
        *,
        target: str,
        out: str | Path,
        verify: str | Path | None = None,
        push_to_hub: str | None = None,
        private: bool | None = None,
        min_kept: float | None = None,
        max_kl_ratio: float | None = None,
        quiet: bool = False,
        **settings: Any,
    ) -> None:
        self.quiet = quiet
        self.settings: dict[str, Any] = {
            "target": target,
            "out": str(out),
            "verify": verify,
            "push_to_hub": push_to_hub,
            "private": private,
            "min_kept": min_kept,
            "max_kl_ratio": max_kl_ratio,
            **settings,
        }
        self.report: Report | None = None
        self.error: QmergeError | None = None

    # --- before the training ---

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check everything that would fail after hours of training."""
        # Of an earlier training with the same callback.
        self.report = self.error = None
        check_environment()
        if args.deepspeed or args.fsdp:
            raise RecipeError(
                "QmergeCallback: with DeepSpeed or FSDP no process has the whole adapter; save it, then merge with the qmerge "
                "command"
            )
        for name in REFUSED.keys() & self.settings.keys():
            raise RecipeError(f"QmergeCallback: {name}: {REFUSED[name]}; leave it out")
        # In every process, so that none of them begins to train.
        trained = trained_model(model)
        if not state.is_world_process_zero:
            return
        recipe = make_recipe(self._arguments(trained, Path(args.output_dir)))
        out = Path(recipe.out or "").expanduser()
        folder.check_content(out, resume=False)
        if recipe.verify and not Path(recipe.verify).expanduser().is_file():
            raise RecipeError(f"verify: {recipe.verify}: no such file")
        if recipe.push_to_hub:
            publish.check_destination(recipe.push_to_hub, recipe.private)

    def _arguments(self, trained: TrainedModel, output_dir: Path) -> dict[str, Any]:
        """The arguments of the merge. Those that the user gave go before those that the model says."""
        known = {"base": trained.base, "revision": trained.revision, "trained_on": trained.trained_on}
        return {**known, **self.settings, "adapter": str(adapter_folder(trained, output_dir / SAVED_BY_CALLBACK))}

    # --- after it ---

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Save the adapter, merge it, check the result, push it."""
        if not state.is_world_process_zero:
            return
        place = "the adapter could not be saved"
        # The script that trains goes on, whatever happens: it may have more to save.
        try:
            trained = trained_model(model)
            save_adapter(trained, Path(args.output_dir) / SAVED_BY_CALLBACK, processing_class)
            arguments = self._arguments(trained, Path(args.output_dir))
            place = _where_the_adapter_is(arguments)
            _free_gpu_memory()
            self._merge_and_push(arguments)
        except QmergeError as error:
            self._failed(error, place)
        except Exception as cause:
            self._failed(_as_qmerge_error(cause), place)

    def _failed(self, error: QmergeError, place: str) -> None:
        self.error = error
        print(f"qmerge: {error} ({place})", file=sys.stderr)

    def _show(self, recipe: Recipe, progress: TerminalProgress) -> None:
        """What became of the whole model, as the command prints it, and the warnings that the merge has found."""
        assert self.report is not None
        if not self.quiet:
            # Layer by layer is a diagnosis: the report in the folder has it.
            stdout().print(report_tables(self.report.data, measuring_command_of(recipe))[0])
        progress.warn_again(self.report.data.warnings)

    def _merge_and_push(self, arguments: dict[str, Any]) -> None:
        """Merge and check; push only what passes.

        Raises:
            QmergeError: the merge failed. A report is kept all the same where only the push was refused.
        """
        progress = TerminalProgress(self.quiet)
        recipe = with_named_base(make_recipe(arguments), progress.note)
        # The push comes after the checks. That there will be one decides whether the report quotes the held-out text.
        later = {"push_to_hub": None, "private": None, "continuations": recipe.quoted_beginnings}
        data, _ = direct.merge(recipe.model_copy(update=later), False, progress)
        self.report = Report(data)
        self._show(recipe, progress)
        out = Path(recipe.out or "").expanduser()
        # The files alone: to load the model a second time, next to the one that was trained, may take too much memory.
        # Only whole files are published.
        failed = [check for check in api.verify(out, reload=False) if not check.ok]
        problems = [f"{check.name}: {check.found}" for check in failed]
        problems += past_limits([data], min_kept=recipe.min_kept, max_kl_ratio=recipe.max_kl_ratio)
        if problems:
            raise NumbersError(f"{out}: {'; '.join(problems)}")
        progress.note(f"Written to {out}, and its files checked; the adapter is in {arguments['adapter']}")
        publish.push_merged(data, recipe, quiet=self.quiet, progress=progress)


def _where_the_adapter_is(arguments: dict[str, Any]) -> str:
    """For messages; with what a repeated merge must be told, because no file says it."""
    place = f"the adapter is in {arguments['adapter']}"
    if arguments["trained_on"] is None:
        return place
    return f"{place}; to merge it, give --trained-on {arguments['trained_on']}"


def _as_qmerge_error(cause: Exception) -> QmergeError:
    """Any other error in one line; what may be a bug is also shown in full, so that it can be reported."""
    error = failure_of_machine(cause)
    if error is None:
        traceback.print_exception(cause)
        error = QmergeError(f"{type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _free_gpu_memory() -> None:
    """Give back what the training has cached: the merge needs a little."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
