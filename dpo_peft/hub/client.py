"""Calls the Hub with patience: what fails for a moment is tried again, what fails for good is explained.

The client library retries the parts of a large file on its own, but neither the commit nor the questions before it. A
failure's message says what failed, what is there by now, and how to go on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo, errors

from ..errors import OptionError, PublishError
from ..model.gguf import gguf_place

logger = logging.getLogger(__name__)

TRANSIENT = (408, 429, 500, 502, 503, 504)
LOGIN = "Make one with write access at https://huggingface.co/settings/tokens, then `hf auth login` or set HF_TOKEN."
SENDING = ("sending the files", "committing")  # what is done once anything was sent
_REMEDIES = {
    403: "The token may not write there: use one that may, or open a pull request (create_pr). ",
    404: "There is no such repository, or the token may not see it. ",
    409: "Someone else changed it meanwhile: look at it first. ",
    412: "Someone else changed it meanwhile: look at it first. ",
    413: "It is larger than the Hub takes. ",
    429: "The Hub asks for a pause: wait some minutes. ",
}

T = TypeVar("T")


@dataclass
class Hub:
    """A repository of the Hub, and where in it is written."""

    api: HfApi  # with its token
    repo_id: str  # without an owner until the token's is known
    revision: str | None = None  # branch to write to; None: main
    create_pr: bool = False  # open a pull request instead
    attempts: int = 4  # how often a call that fails for a moment is made
    wait: float = 2.0  # seconds before the second attempt; each further one waits four times as long
    repeat: str = "call it again with the same arguments."  # how to repeat the whole, for messages
    created: bool = False  # the repository was made by these calls
    has_branch: bool = False  # there was one to write to when it was looked at

    def call(self, what: str, action: Callable[[], T], repeatable: bool = True) -> T:
        """Makes a call, and makes it again if it failed for a moment.

        Args:
            what: names it in messages: "creating the repository".
            action: makes it.
            repeatable: whether it may be made again when it isn't known if it took effect.

        Raises:
            PublishError: it failed for good, or too often.
            OptionError: there is no valid token, or the client is told to be offline.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except OptionError:
                raise
            except errors.LocalTokenNotFoundError as error:
                raise OptionError(f"There is no token of the Hub. {LOGIN}") from error
            except errors.OfflineModeIsEnabled as error:
                raise OptionError(
                    "HF_HUB_OFFLINE is set, so the Hub can't be reached: unset it to publish."
                ) from error
            except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
                status, reason, passes = explain(error)
                if status == 401:
                    raise OptionError(f"The token is not valid, or was revoked. {LOGIN}") from error
                if attempt == self.attempts or not repeatable or not passes:
                    raise PublishError(self._failure(what, attempt, status, reason, passes)) from error
                pause = self.wait * 4 ** (attempt - 1)
                logger.info("%s failed (%s); again in %g s.", what, reason, pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _failure(self, what: str, attempts: int, status: int | None, reason: str, passes: bool) -> str:
        tries = f", {attempts} times" if attempts > 1 else ""
        state = "was made and is empty" if self.created else "is as it was"
        lost = ", unless only the answer was lost: then all of it was"
        unknown = lost if what == "committing" and passes and status is None else ""
        kept = "; what was sent of large files is kept, invisible, and not sent again" if what in SENDING else ""
        remedy = "Check the connection. " if status is None and passes else _REMEDIES.get(status or 0, "")
        return (
            f"{what} failed{tries}: {reason}. The repository {self.repo_id} {state}: nothing was published{unknown}"
            f"{kept}. {remedy}To go on, {self.repeat}"
        )

    def own_repository(self) -> str:
        """Returns the repository's full name, which the token may write to, as far as its account says.

        Raises:
            OptionError: there is no valid token, it is read-only, or the repository is not its account's.
            PublishError: the Hub can't be reached.
        """
        account = self.call("asking whose token it is", self.api.whoami)
        roles = {account["name"]: None, **{org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])}}
        repo_id = self.repo_id if "/" in self.repo_id else f"{account['name']}/{self.repo_id}"
        owner = repo_id.split("/")[0]
        access = account.get("auth", {}).get("accessToken", {})
        token = f"The token {access.get('displayName', '')!r}"
        if access.get("role") == "read":
            raise OptionError(f"{token} is read-only. {LOGIN}")
        if self.create_pr:
            return repo_id
        if owner not in roles:
            raise OptionError(
                f"{repo_id}: {owner} is neither your account nor an organization of yours ({', '.join(roles)}). "
                "Choose another repo_id, or open a pull request (create_pr)."
            )
        if roles[owner] == "read":
            raise OptionError(f"{repo_id}: you may only read in {owner}. Ask for the role of a contributor.")
        scopes = access.get("fineGrained", {}).get("scoped")  # None: a token that does not say is left to the Hub
        here = [scope for scope in scopes or [] if scope.get("entity", {}).get("name") in (owner, repo_id)]
        rights = [right for scope in here for right in scope["permissions"]]
        if scopes is not None and not any(right.startswith("repo") and right.endswith("write") for right in rights):
            raise OptionError(f"{token} may not write to {repo_id}. {LOGIN}")
        return repo_id

    def check_base(self, base: str) -> None:
        """Raises an OptionError if others can't load the base: it is not on the Hub, or not for everybody."""
        place, file = gguf_place(base)

        def there() -> bool:
            return self.api.file_exists(place, file["gguf_file"]) if file else self.api.repo_exists(base)

        if not self.call("looking for the base model", there):
            raise OptionError(
                f"The base {base} is not on the Hub, or the token may not see it. Give its Hub id by base_model, or "
                "publish it first."
            )

    def look(self) -> ModelInfo | None:
        """Returns the repository as it is, on its main branch if it lacks the one to write to; None if there is
        none."""

        def look() -> ModelInfo | None:
            try:
                info = self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True)
            except errors.RepositoryNotFoundError:
                return None
            except errors.RevisionNotFoundError:
                return self.api.model_info(self.repo_id, files_metadata=True)
            self.has_branch = True
            return info

        return self.call("looking at the repository", look)


def explain(error: BaseException) -> tuple[int | None, str, bool]:
    """Returns the HTTP status of the Hub's answer (None if there was none), what went wrong in one line, and whether
    it may be over in a moment: the network, or a server that is busy."""
    chain: list[BaseException] = [error]  # the client wraps what the Hub answered, and what broke the connection
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    answered = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    status = None if answered is None else answered.response.status_code
    text = (answered and answered.server_message) or str(answered or chain[-1])
    reason = " ".join(text.split()).rstrip(".")[:300] or type(chain[-1]).__name__
    if status is None:
        return None, reason, not isinstance(error, ValueError | PermissionError | FileNotFoundError)
    return status, reason if str(status) in reason else f"{reason} (HTTP {status})", status in TRANSIENT
