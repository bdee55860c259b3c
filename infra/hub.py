"""Questions to the Hugging Face hub, or a mirror of it (HF_ENDPOINT): revisions, sizes, hashes."""

import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session

from infra.download import TRY_AGAIN, DownloadError, Remote
from nanochat.spec import SpecError

PATHS_PER_QUESTION = 100
NUM_ATTEMPTS = 4
WAIT = tenacity.wait_random_exponential(multiplier=0.5, max=20)
T = TypeVar("T")

# huggingface_hub 1 speaks through httpx, 2 through httpx2, whose exceptions have no common base
_TRANSPORT = importlib.import_module(type(get_session()).__module__.partition(".")[0])
NO_ANSWER: type[Exception] = _TRANSPORT.TransportError
"""What the hub's client raises when no answer comes."""


def endpoint() -> str:
    """The hub's address, or its mirror's."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def headers() -> dict[str, str]:
    """What every request carries: the token, where there is one, which redirects to other hosts
    do not get."""
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def describe(
    repository: str, revision: str | None, files: dict[str, dict[str, Any]]
) -> dict[str, Remote]:
    """Where the files of a dataset lie, and their size and sha256.

    revision: a commit, or None for the newest. files: name -> what is known already (`size`,
    `sha256`, None where it is not known); for files of which all is known nothing is asked. Raises
    SpecError where the repository has no such file, or another one than is known, DownloadError
    where no answer comes.
    """
    api = HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or False)
    if revision is None:
        revision = _asked(lambda: api.dataset_info(repository, revision="main").sha, repository)
        assert revision is not None
    unknown = [n for n, facts in files.items() if not (facts["size"] and facts["sha256"])]
    infos: dict[str, RepoFile] = {}
    for start in range(0, len(unknown), PATHS_PER_QUESTION):
        paths = unknown[start : start + PATHS_PER_QUESTION]
        for info in _asked(
            lambda paths=paths: api.get_paths_info(  # type: ignore[misc]
                repository, paths, revision=revision, repo_type="dataset"
            ),
            repository,
        ):
            if isinstance(info, RepoFile):
                infos[info.path] = info
    remotes = {}
    for name, facts in files.items():
        url = f"{endpoint()}/datasets/{repository}/resolve/{revision}/{name}"
        if name in unknown:
            facts = _merged(f"{repository}/{name}", facts, infos.get(name))
        remotes[name] = Remote(url, facts["size"], facts["sha256"])
    return remotes


def revision_in(url: str) -> str:
    """The revision that an address made by `describe` names."""
    return url.partition("/resolve/")[2].partition("/")[0]


def _merged(path: str, known: dict[str, Any], info: RepoFile | None) -> dict[str, Any]:
    """What is known and what the hub says."""
    if info is None:
        raise SpecError(f"{path} is not on {endpoint()}; its publisher has moved or removed it")
    said = {"size": info.size, "sha256": info.lfs.sha256 if info.lfs else None}
    for key, value in said.items():
        if known[key] is not None and value is not None and known[key] != value:
            raise SpecError(
                f"{path} on {endpoint()} has {key} {value}, the lock says {known[key]}: it is "
                "another file than the one that the lock knows"
            )
    return {key: known[key] if known[key] is not None else value for key, value in said.items()}


def _asked(ask: Callable[[], T], repository: str) -> T:
    """The answer of the hub; passing faults are waited out. Raises DownloadError where they do not
    pass, SpecError for others."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passes),
        stop=tenacity.stop_after_attempt(NUM_ATTEMPTS),
        wait=WAIT,
        reraise=True,
    )
    try:
        return retry(ask)
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        raise SpecError(
            f"{endpoint()} has no dataset {repository}, or not to this user: {e}"
        ) from None
    except (HfHubHTTPError, NO_ANSWER) as e:
        problem = f"{endpoint()} does not say what {repository} has ({e})"
        if _passes(e):
            raise DownloadError(
                f"{problem}. Is there a network here? A mirror is named by HF_ENDPOINT; run the "
                "same command again to continue"
            ) from None
        raise SpecError(f"{problem}; HF_TOKEN names who asks") from None


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRY_AGAIN
    return isinstance(error, NO_ANSWER)
