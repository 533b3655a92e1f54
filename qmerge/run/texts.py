"""The user's texts, checked before the work: calibration reads them after the predictions, and verify after the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmerge.calibration.documents import Document, read_texts
from qmerge.calibration.tasks import CAUSAL_LM, task_of
from qmerge.calibration.texts import check_source, is_of_user, load_tokenizer, tokenize_with
from qmerge.errors import RecipeError
from qmerge.evaluation.whole_fidelity import check_text
from qmerge.formats import get_target
from qmerge.planning.plan import Plan
from qmerge.recipe import Recipe


def check_files(recipe: Recipe) -> None:
    """Refuse a text that is not there, before the inputs are read.

    Raises:
        RecipeError: a file does not exist.
    """
    if recipe.verify and not Path(recipe.verify).expanduser().exists():
        raise RecipeError(f"verify: {recipe.verify}: no such file; give its path with --verify FILE")
    if _calibrates_on_text(recipe):
        check_source(str(recipe.calibration))


def check_texts(plan: Plan) -> None:
    """Refuse texts of another form, and a model without the tokenizer that they need.

    Raises:
        RecipeError: a text cannot be read, has another form, or holds chats that the tokenizer has no template for.
        TokenizerError: the tokenizer cannot be loaded.
    """
    task = task_of(plan.config)
    recipe = plan.recipe
    documents_in: dict[str, list[Document]] = {}
    if recipe.verify:
        text = Path(recipe.verify).expanduser()
        check_text(text, task)
        if task is CAUSAL_LM:
            documents_in[recipe.verify] = read_texts(text)
    if _calibrates_on_text(recipe):
        file = Path(str(recipe.calibration)).expanduser()
        if file.is_file():  # a dataset is downloaded when it is needed
            documents_in[str(recipe.calibration)] = read_texts(file)
    if _calibrates_on_text(recipe) or (recipe.verify and task.text):
        tokenizer = load_tokenizer(plan.inputs.tokenizer_folder)
        for name, documents in documents_in.items():
            _check_documents(documents, tokenizer, name)


def _check_documents(documents: list[Document], tokenizer: Any, file: str) -> None:
    """Refuse a file without text, or with chats that the tokenizer cannot take."""
    if all(isinstance(document, str) and not document.strip() for document in documents):
        raise RecipeError(f"{file}: holds no text; expected at least 2 tokens")
    # One chat shows whether there is a template that takes it; to tokenize all texts would take too long.
    chats = [document for document in documents if isinstance(document, list)]
    try:
        tokenize_with(tokenizer, chats[:1])
    except RecipeError as cause:
        raise RecipeError(f"{file}: {cause}") from cause


def _calibrates_on_text(recipe: Recipe) -> bool:
    """Whether the recipe asks for calibration on a text of the user, and the target may need it."""
    # A dense target is rounded to nearest, and recipes of finished models keep a text that was not needed.
    may_calibrate = recipe.target == "auto" or not get_target(recipe.target).info.is_dense
    return may_calibrate and is_of_user(recipe.calibration)
