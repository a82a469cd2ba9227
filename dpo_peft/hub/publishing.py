"""Publishes an adapter on the Hub: `publish(folder, "me/my-adapter")`.

Everything is checked here first, then who the token belongs to, then what the repository holds. Large files are sent
before anything is visible; one commit at the end makes all of it visible, or nothing.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelInfo
from huggingface_hub.utils.sha import git_hash

from ..artifacts.card import license_fields
from ..artifacts.card_rules import is_repo_id, read_head
from ..errors import OptionError, PublishError
from .client import Hub
from .upload_files import CARD, CONFIG, Upload, collect

logger = logging.getLogger(__name__)

GATES: dict[str, str | bool] = {"auto": "auto", "manual": "manual", "off": False}
# What a new repository may hold without being anybody's work.
_HARMLESS = {".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt"}


@dataclass(frozen=True)
class PublishResult:
    """Says what was published."""

    repo_id: str
    url: str
    commit: str | None  # the repository's newest; the pull request's with `create_pr`. None in a dry run
    pr_url: str | None  # the pull request, if one was made
    created: bool  # the repository was made
    uploaded: dict[str, int]  # files of this commit, and their bytes
    unchanged: list[str]  # files that were there already, the same
    left_out: dict[str, str]  # files and folders that were not published, and why
    checks: list[str]  # what was checked
    notes: list[str]  # what is allowed and should be known


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    gated: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Publish the adapter",
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = (),
    include: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    attempts: int = 4,
    wait: float = 2.0,
    repeat: str = "call it again with the same arguments.",
    licence: str | None = None,
) -> PublishResult:
    """Publishes a trained adapter with its tokenizer, card, recipe, metrics, curves and samples.

    Args:
        folder: of the adapter.
        repo_id: "NAME/REPO", or "REPO" of the token's own account. Made if it isn't there.
        private: whether only you (or the organization) see it. None: as it is, or as the account makes new ones.
        gated: "auto" or "manual": who wants it must ask, and is let in at once or by hand. "off" opens it. None: as
            it is.
        token: with write access; that of `hf auth login` or HF_TOKEN if None.
        revision: branch to write to; made if it isn't there.
        commit_message: one line.
        create_pr: open a pull request instead of writing to the repository.
        base_model: Hub id of the base, for an adapter that was trained on a model in a local folder.
        license, datasets, languages: of the card.
        include: further files of the folder, as names or patterns.
        overwrite: replace files of a repository that holds something else.
        dry_run: check what can be checked here, and stop.
        attempts: how often a step that fails for a moment (network, server) is tried.
        wait: seconds before the second attempt; each further one waits four times as long.
        repeat: how to repeat it, for messages.
        licence: another spelling of `license`.

    Raises:
        OptionError: the adapter, the card, an option or the token is wrong; nothing was written.
        PublishError: the Hub refused or could not be reached. The message says what is there by now.
    """
    _check_options(repo_id, private, gated, revision, create_pr, attempts)
    labels = {"datasets": list(datasets), "language": list(languages), **license_fields(license or licence or "")}
    contents = (base_model, include, labels)
    upload = collect(Path(folder), repo_id, *contents)
    hub = Hub(HfApi(token=token), repo_id, revision, create_pr, attempts, wait, repeat)
    changed, commit, pr_url = set(upload.files), None, None
    if not dry_run:
        hub.repo_id = hub.own_repository()
        if hub.repo_id != repo_id:
            upload = collect(Path(folder), hub.repo_id, *contents)  # the card names the repository
        hub.check_base(upload.base_model)
        remote = hub.look()
        if remote is not None and not overwrite:
            _check_ours(hub, remote, upload)
        hub.call("checking the card", lambda: _validate(upload))
        sizes = "".join(f"\n  {name}  {upload.size(name):,} bytes" for name in sorted(upload.files))
        logger.info("To be published as %s/%s:%s", hub.api.endpoint, hub.repo_id, sizes)
        remote = _prepare(hub, remote, private, gated)
        commit, changed = remote.sha, _changed(upload, remote)
        if changed:
            sent = _send(hub, upload, changed, remote.sha, commit_message)
            commit, pr_url = sent.oid, sent.pr_url
    return PublishResult(
        repo_id=hub.repo_id,
        url=f"{hub.api.endpoint}/{hub.repo_id}",
        commit=commit,
        pr_url=pr_url,
        created=hub.created,
        uploaded={name: upload.size(name) for name in sorted(changed)},
        unchanged=sorted(set(upload.files) - changed),
        left_out=upload.left_out,
        checks=upload.checks,
        notes=upload.notes,
    )


def _check_options(
    repo_id: str, private: bool | None, gated: str | None, revision: str | None, create_pr: bool, attempts: int
) -> None:
    if not is_repo_id(repo_id):
        raise OptionError(f"repo_id={repo_id!r} is not a name of the Hub: give NAME/REPO.")
    if gated is not None and gated not in GATES:
        raise OptionError(f"gated={gated!r} must be one of {', '.join(GATES)}.")
    if attempts < 1:
        raise OptionError(f"attempts={attempts} must be at least 1.")
    given = {"private": private, "gated": gated, "revision": revision}
    if create_pr and (useless := [name for name, value in given.items() if value is not None]):
        raise OptionError(f"{', '.join(useless)}: no effect on a pull request (create_pr). Leave it out.")


# ---- What is there --------------------------------------------------------------------------------------------------


def _check_ours(hub: Hub, remote: ModelInfo, upload: Upload) -> None:
    """Refuses to overwrite other work; an update of the same adapter passes."""

    def content(name: str) -> str:
        path = hub.call(f"reading its {name}", lambda: hub.api.hf_hub_download(hub.repo_id, name, revision=remote.sha))
        return Path(path).read_text("utf-8")

    names = {file.rfilename for file in remote.siblings or []} - _HARMLESS
    if not names:
        return
    remedy = "Choose another repo_id, or replace its files with overwrite."
    if CONFIG not in names:
        some = ", ".join(sorted(names)[:3])
        raise OptionError(f"{hub.repo_id} holds other files ({some}) and no adapter. {remedy}")
    base = json.loads(content(CONFIG)).get("base_model_name_or_path")
    if base != upload.base_model:
        raise OptionError(
            f"{hub.repo_id} holds an adapter of another base ({base}, not {upload.base_model}). {remedy}"
        )
    if CARD in names:
        try:
            tags = read_head(content(CARD)).get("tags") or []
        except ValueError:
            tags = []
        if "dpo-peft" not in tags:
            raise OptionError(f"{hub.repo_id} has a card that is not from here, which would be lost. {remedy}")


# ---- Writing --------------------------------------------------------------------------------------------------------


def _validate(upload: Upload) -> None:
    """Has the Hub check the card's metadata itself."""
    try:
        ModelCard(upload.content(CARD).decode()).validate()
    except ValueError as error:
        raise OptionError(f"{CARD}: the Hub refuses its metadata: {' '.join(str(error).split())}") from error


def _prepare(hub: Hub, remote: ModelInfo | None, private: bool | None, gated: str | None) -> ModelInfo:
    """Makes the repository and its branch, and closes it as asked for, before anything is sent; returns it as it is
    then."""
    api, repo_id, branch = hub.api, hub.repo_id, hub.revision
    if remote is None:
        if hub.create_pr:
            raise OptionError(f"{repo_id} is not there: a pull request needs a repository. Leave create_pr out.")
        hub.call("creating the repository", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        hub.created = True
    settings: dict[str, Any] = {}
    if gated is not None and GATES[gated] != (remote is not None and remote.gated):
        settings["gated"] = GATES[gated]
    if private is not None and remote is not None and private != remote.private:
        settings["private"] = private
    if settings:
        hub.call("setting who may see it", lambda: api.update_repo_settings(repo_id, **settings))
    if branch is not None and not hub.has_branch:
        hub.call("creating the branch", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        remote = None
    if (now := remote or hub.look()) is None:
        raise PublishError(f"{repo_id} was made, but the Hub does not show it. To go on, {hub.repeat}")
    return now


def _send(hub: Hub, upload: Upload, names: set[str], parent: str | None, message: str) -> CommitInfo:
    """Sends the large files, then commits all of them.

    A second commit makes its operations anew: if the answer to the first was lost, all is then seen to be there
    already. That can't be seen of a pull request, so one is asked for once.
    """
    where: dict[str, Any] = {"revision": hub.revision, "create_pr": hub.create_pr}

    def operations() -> list[CommitOperationAdd]:
        return [CommitOperationAdd(name, upload.files[name]) for name in sorted(names)]

    def commit() -> CommitInfo:
        files = sent.pop() if sent else operations()
        return hub.api.create_commit(hub.repo_id, files, commit_message=message, parent_commit=parent, **where)

    sent = [operations()]  # they know which of them have arrived
    send = hub.api.preupload_lfs_files
    hub.call("sending the files", lambda: send(hub.repo_id, sent[0], free_memory=False, **where))
    return hub.call("committing", commit, repeatable=not hub.create_pr)


def _changed(upload: Upload, remote: ModelInfo) -> set[str]:
    """Returns the files that the repository has not, or with another content."""
    there = {file.rfilename: file for file in remote.siblings or []}

    def same(name: str) -> bool:
        if (file := there.get(name)) is None:
            return False
        content = upload.content(name)
        if file.lfs is not None:
            return file.lfs.sha256 == hashlib.sha256(content).hexdigest()
        return file.blob_id == git_hash(content)

    return {name for name in upload.files if not same(name)}
