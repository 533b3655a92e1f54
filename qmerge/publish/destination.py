"""The repository to write to: does it exist, and may the user's token write there?

The token comes from the environment (``HF_TOKEN``) or from ``hf auth login``, never from an option: options are seen in the
shell's history and in the list of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmerge import hub
from qmerge.errors import HubError, QmergeError, RecipeError, first_line, listed
from qmerge.schema import NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Ends of the names of files that make a repository a model."""

LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"
)


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a model is uploaded to.

    id       ``owner/name``
    private  whether a new repository is made private; None: as the owner's settings say
    files    names of the files that are there already; None where there is no repository
    """

    id: str
    private: bool | None
    files: frozenset[str] | None


def check_destination(reference: str, private: bool | None) -> Destination:
    """Look whether the user's token may write a model there. Nothing is created.

    Args:
        reference: ``owner/name``, or ``name`` for the user's own.
        private: True: the model must not be public; None: as the owner's settings say.

    Raises:
        RecipeError: the name is not valid, or a model is there that qmerge did not write, or that is public.
        HubError: no token, a wrong one, one that may not write there, or no connection.
    """
    from huggingface_hub import HfApi

    # A bare name is completed with the user's own, which only the token tells.
    owner_given = "/" in reference
    if not hub.HUB_ID.fullmatch(reference if owner_given else f"owner/{reference}"):
        raise RecipeError(f"push_to_hub {reference!r}: expected owner/name, the id of the model on the Hub")
    api = HfApi()
    user = _whoami(api)
    hub_id = reference if owner_given else f"{user['name']}/{reference}"
    files = _files(api, hub_id)
    if files is None:
        _check_may_create(user, hub_id)
    else:
        _check_files(hub_id, files)
        _check_visibility(api, hub_id, private)
    return Destination(id=hub_id, private=private, files=files)


def _whoami(api: HfApi) -> dict[str, Any]:
    """Who the token belongs to.

    Raises:
        HubError: there is no token, it is not valid, it may only read, or the Hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise HubError("the Hub cannot be reached: offline mode is on (HF_HUB_OFFLINE); unset it to upload a model")
    if not get_token():
        raise HubError(f"the Hub needs a token to write: {LOG_IN}")
    with hub_errors("the Hub cannot be asked about the token"):
        user = api.whoami()
    # Other roles may write somewhere; where, is asked next.
    if _access_token(user).get("role") == "read":
        raise HubError(f"the token of {user['name']} may only read: {LOG_IN}")
    return user


def _access_token(user: dict[str, Any]) -> dict[str, Any]:
    """What the Hub says about the token: its role and its rights."""
    return (user.get("auth") or {}).get("accessToken") or {}


def _files(api: HfApi, hub_id: str) -> frozenset[str] | None:
    """Names of the files of a repository that the token may write; None where there is none that it can see.

    Raises:
        HubError: it exists, but the token may not write there.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with hub_errors(f"{hub_id} cannot be written"):
        try:
            api.auth_check(hub_id, write=True)
            return frozenset(api.list_repo_files(hub_id))
        except GatedRepoError:  # a kind of RepositoryNotFoundError, but the repository exists
            raise
        except RepositoryNotFoundError:
            # Also the private model of somebody else: then its owner's name is not the user's, which is checked.
            return None


def _check_may_create(user: dict[str, Any], hub_id: str) -> None:
    """Whether the owner of a new repository is the user or one of the user's organizations.

    Raises:
        HubError: it is neither, or the token is limited to other owners.
    """
    owner = hub_id.partition("/")[0]
    organizations = [str(item.get("name")) for item in user.get("orgs") or []]
    if owner not in (user["name"], *organizations):
        others = f" and {listed(organizations)}" if organizations else ""
        raise HubError(f"{hub_id}: the token may not write there; it belongs to {user['name']}{others}")
    token = _access_token(user)
    if token.get("role") == "fineGrained" and not _may_write(token.get("fineGrained") or {}, owner):
        raise HubError(f"{hub_id}: the token may not create models of {owner}: {LOG_IN}")


def _may_write(rights: dict[str, Any], owner: str) -> bool:
    """Whether a fine-grained token has the right to write the repositories of an owner."""
    for scope in rights.get("scoped") or []:
        if (scope.get("entity") or {}).get("name") == owner and "repo.write" in (scope.get("permissions") or []):
            return True
    return False


def _check_files(hub_id: str, files: frozenset[str]) -> None:
    """A model of somebody else must not be mixed with this one, and not be replaced by mistake."""
    # A repository with a card or a licence alone was made for this model.
    weights = sorted(name for name in files if name.endswith(WEIGHT_FILES))
    if weights and NAME not in files:
        raise RecipeError(
            f"{hub_id} already has a model that qmerge did not write ({listed(weights)}): choose another name, or delete it there"
        )


def _check_visibility(api: HfApi, hub_id: str, private: bool | None) -> None:
    """Whoever wants a private model must not publish it because the repository exists."""
    with hub_errors(f"{hub_id} cannot be read"):
        is_private = api.repo_info(hub_id).private
    if private and not is_private:
        raise RecipeError(
            f"{hub_id} exists and is public: --private is for new repositories; change it in its settings on the Hub, or choose "
            f"another name"
        )


@contextmanager
def hub_errors(problem: str, advice: str = "") -> Iterator[None]:
    """Inside, errors of the Hub's library become one line.

    Args:
        problem: what is not possible.
        advice: what to do then.

    Raises:
        HubError: with the first line of the cause.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except QmergeError:
        raise
    except Exception as cause:  # no connection: the class depends on the HTTP library that the Hub library uses
        # Parallel uploads wrap the Hub's answer in an error of their own.
        answer = next((error for error in _causes(cause) if isinstance(error, HfHubHTTPError)), None)
        reason = _innermost_line(cause) if answer is None else _reason(answer)
        raise HubError(f"{problem}: {reason}{advice}") from cause


def _reason(error: Any) -> str:
    """An error of the Hub in words: its status, and what the server says."""
    status = error.response.status_code if error.response is not None else None
    meanings = {
        401: f"the token is not valid: {LOG_IN}",
        403: f"the token may not do this: {LOG_IN}",
    }
    meaning = meanings.get(status or 0, "the Hub refused it")
    said = str(error.server_message or "").strip()
    if not said and status not in meanings:
        said = _innermost_line(error)
    return f"{meaning} (status {status}{', ' if said else ''}{said})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, the innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _innermost_line(error: BaseException) -> str:
    """The innermost cause in one line."""
    *_, innermost = _causes(error)
    return first_line(innermost)
