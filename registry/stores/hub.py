"""An adapter from a Hugging Face repository, at a commit that cannot move.

Only the files that are asked for are fetched, into a private folder that is removed afterwards; no code of the
repository is looked at. A revision is resolved to its commit once, and that commit is what is downloaded. The hub's
listing tells sizes: what is too large is refused before a byte of it is fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ..domain.errors import InvalidAdapter, InvalidInput, NotAllowed, NotFound, Unavailable
from ..domain.refs import Source

_CONFIG_FILE = "adapter_config.json"


@contextmanager
def hub_folder(source: Source, wanted: Mapping[str, int]) -> Iterator[tuple[Path, Source]]:
    """The adapter's files at `source` while the context lasts, and the source at its commit.

    `source` is `hf://ORG/REPO[/FOLDER]@REVISION`. `wanted` has the names, and the bytes that each may have; a listing
    without sizes leaves that to who reads them. Raises `InvalidInput` (no name of a repository), `NotFound` (also where
    no adapter is listed), `NotAllowed` (a gated repository), `InvalidAdapter` (a file is too large) or `Unavailable`
    (offline, or no client is installed).
    """
    if find_spec("huggingface_hub") is None:
        raise Unavailable(
            f"{source} cannot be fetched: huggingface_hub is not installed",
            hint="pip install 'adapterctl[eval]', or download the files and register their folder",
        )
    # deferred: half a second, and only this source needs it
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    owner, name, *inside = source.location.split("/")
    repository, prefix = f"{owner}/{name}", "".join(f"{part}/" for part in inside)
    with TemporaryDirectory(prefix="adapterctl-hub-") as folder:
        try:
            # asked for a commit too: it answers at once where the hub cannot be reached, a download retries for long
            info = api.model_info(repository, revision=source.revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            _check_listing(source, repository, prefix, sizes)
            for name, most in wanted.items():
                if sizes.get(prefix + name, 0) > most:
                    raise InvalidAdapter(
                        f"{name} of {source} has {sizes[prefix + name]:,} bytes, at most {most:,} are accepted",
                        hint="nothing was fetched; is that an adapter?",
                    )
            for name in wanted:
                if prefix + name in sizes:
                    api.hf_hub_download(repository, prefix + name, revision=info.sha, local_dir=folder)
        except HFValidationError as error:
            raise InvalidInput(
                f"{source} cannot be a repository: {error}", hint="write hf://ORG/REPO@REVISION"
            ) from error
        except GatedRepoError as error:
            raise NotAllowed(
                f"{source} is gated", hint="accept its terms on the hub and run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise NotFound(f"{source} has no such revision", hint="give a commit, a tag or a branch") from error
        except RepositoryNotFoundError as error:
            raise NotFound(
                f"there is no repository {repository} on the hub, or it is private",
                hint="check the name; for a private one run `hf auth login`",
            ) from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError) as error:
            raise Unavailable(
                f"{source} cannot be fetched: {str(error).splitlines()[0]}",
                hint="download the three files by other means and register their folder",
            ) from error
        yield Path(folder, prefix), replace(source, revision=info.sha)


def _check_listing(source: Source, repository: str, prefix: str, names: Collection[str]) -> None:
    """Raises `NotFound` where no adapter is there, and says in which folders there are some."""
    if prefix + _CONFIG_FILE in names:
        return
    folders = sorted(name.removesuffix(f"/{_CONFIG_FILE}") for name in names if name.endswith(f"/{_CONFIG_FILE}"))
    others = " or ".join(f"hf://{repository}/{folder}@{source.revision}" for folder in folders[:4])
    raise NotFound(
        f"{source} holds no {_CONFIG_FILE}",
        hint=f"write {others}" if others else "is that an adapter? look at its files on the hub",
    )
