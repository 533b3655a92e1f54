"""`qmerge inspect`: an adapter or a model, whichever the folder or Hub repository holds."""

from __future__ import annotations

from typing import Any

from qmerge import hub
from qmerge.adapters.reading.mistakes import folder_of_file
from qmerge.adapters.reading.named import choose_adapter, split_reference
from qmerge.errors import AdapterError, RecipeError
from qmerge.report.describe.adapter import describe_adapter
from qmerge.report.describe.model import describe_model, is_model


def inspect(
    reference: str, revision: str | None = None, base: str | None = None, base_revision: str | None = None
) -> dict[str, Any]:
    """The JSON of ``qmerge inspect``.

    Args:
        reference: folder or Hub id; ``ID#NAME`` where it holds several adapters.
        revision: its revision on the Hub.
        base: a model to compare an adapter with: folder or Hub id.
        base_revision: revision of that model on the Hub.

    Raises:
        RecipeError: ``base`` does not go with a model, or ``base_revision`` was given without ``base``.
        AdapterError, CheckpointError: the folder holds neither an adapter nor a model.
    """
    if base_revision and not base:
        raise RecipeError("--base-revision needs --base: the model to compare the adapter with")
    reference, named_revision = hub.split_revision(reference)
    location, name = split_reference(reference)
    source = hub.resolve(folder_of_file(location), revision or named_revision, AdapterError, name)
    if source.file is None and not is_model(source.folder):
        if not any(source.folder.rglob(hub.ADAPTER_CONFIG)) and not any(source.folder.rglob("*.safetensors")):
            raise AdapterError(
                f"{reference} holds neither an adapter (adapter_config.json) nor a model (config.json and *.safetensors)"
            )
        return describe_adapter(choose_adapter(source, location, name), base, base_revision)
    if base:
        raise RecipeError(f"--base compares an adapter with its base, but {reference} is a model: leave --base out")
    return describe_model(source)
