"""Folders and Hub ids → local folders. A revision is resolved to a commit once, and every file comes from that commit."""

from qmerge.hub.download import MODEL_FILES, UNUSED_FILES, Source, cache_folder, one_commit_each
from qmerge.hub.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CHECKPOINT,
    SAVED_BY_CALLBACK,
    Listing,
    is_state_of_run,
    list_files,
    needed_weights,
)
from qmerge.hub.find import find_local, resolve
from qmerge.hub.names import (
    GGUF,
    HUB_ID,
    find_named,
    is_found_again,
    local_path,
    may_exist,
    published_name,
    split_revision,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILES",
    "CHECKPOINT",
    "GGUF",
    "HUB_ID",
    "MODEL_FILES",
    "SAVED_BY_CALLBACK",
    "UNUSED_FILES",
    "Listing",
    "Source",
    "cache_folder",
    "find_local",
    "find_named",
    "is_found_again",
    "is_state_of_run",
    "list_files",
    "local_path",
    "may_exist",
    "needed_weights",
    "one_commit_each",
    "published_name",
    "resolve",
    "split_revision",
]
