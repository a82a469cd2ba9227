"""Calls of the Hub with patience: what fails for a moment is tried again, what fails for good is explained.

A failure's message says what failed, what is there by now, and how to go on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import OptionError, PublishError

logger = logging.getLogger(__name__)

TRANSIENT = (408, 429, 500, 502, 503, 504)
LOGIN = "Make one with write access at https://huggingface.co/settings/tokens, then `hf auth login` or set HF_TOKEN."

T = TypeVar("T")


@dataclass
class Hub:
    """One repository of the Hub.

    Attributes:
        api: the client, with its token.
        repo_id: the repository; without an owner until the token's is known.
        attempts: how often a call that fails for a moment is made.
        wait: seconds before the second attempt; each further one waits four times as long.
        repeat: how to repeat the whole, for messages.
        created: the repository was made by these calls.
    """

    api: HfApi
    repo_id: str
    attempts: int = 4
    wait: float = 2.0
    repeat: str = "call it again with the same arguments"
    created: bool = False

    def call(self, what: str, action: Callable[[], T], repeatable: bool = True, may_lack: bool = False) -> T:
        """Do it.

        Args:
            what: what is done, for messages: "creating the repository".
            action: the call.
            repeatable: whether it may be done again when it isn't known if it was done.
            may_lack: let RepositoryNotFoundError and RevisionNotFoundError through.

        Raises:
            PublishError: it failed for good, or too often.
            OptionError: there is no valid token, or the client is told to be offline.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except OptionError:
                raise
            except LocalTokenNotFoundError as error:
                raise OptionError(f"There is no token of the Hub. {LOGIN}") from error
            except OfflineModeIsEnabled as error:
                raise OptionError(
                    "HF_HUB_OFFLINE is set, so the Hub can't be reached: unset it to publish."
                ) from error
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                if may_lack and isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
                    raise
                if status_of(error) == 401:
                    raise OptionError(f"The token is not valid, or was revoked. {LOGIN}") from error
                if attempt == self.attempts or not repeatable or not passes(error):
                    raise PublishError(self._failure(what, error, attempt)) from error
                pause = self.wait * 4 ** (attempt - 1)
                logger.warning("%s failed (%s); again in %g s.", what, reason(error), pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _failure(self, what: str, error: BaseException, attempts: int) -> str:
        tries = f", {attempts} times" if attempts > 1 else ""
        state = "was made and is empty" if self.created else "is as it was"
        nothing = "nothing was published"
        if what == "committing" and passes(error) and status_of(error) is None:
            nothing = "nothing was published, unless only the answer was lost: then all of it was"
        kept = "; what was sent of large files is kept, invisible, and not sent again" if what in SENDING else ""
        return (
            f"{what} failed{tries}: {reason(error)}. The repository {self.repo_id} {state}: {nothing}{kept}. "
            f"{_remedy(error)}To go on, {self.repeat}"
        )


SENDING = ("sending the files", "committing")  # what is done once anything was sent


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer; None if there was none."""
    answers: list[Any] = [e.response for e in _chain(error) if isinstance(e, HfHubHTTPError)]
    return answers[0].status_code if answers and answers[0] is not None else None


def passes(error: BaseException) -> bool:
    """Whether it may be over in a moment: the network, or a server that is busy."""
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return not isinstance(error, ValueError | PermissionError | FileNotFoundError)


def reason(error: BaseException) -> str:
    """What went wrong, in one line; the innermost error knows it."""
    of_hub = [e for e in _chain(error) if isinstance(e, HfHubHTTPError)]
    told = of_hub[0] if of_hub else _chain(error)[-1]
    status = status_of(error)
    text = getattr(told, "server_message", None) or str(told)
    text = " ".join(text.split()).rstrip(".")[:300] or type(told).__name__
    return text if status is None or str(status) in text else f"{text} (HTTP {status})"


def _remedy(error: BaseException) -> str:
    return {
        None: "Check the connection. " if passes(error) else "",
        403: "The token may not write there: use one that may, or open a pull request (create_pr). ",
        404: "There is no such repository, or the token may not see it. ",
        409: "Someone else changed it meanwhile: look at it first. ",
        412: "Someone else changed it meanwhile: look at it first. ",
        413: "It is larger than the Hub takes. ",
        429: "The Hub asks for a pause: wait some minutes. ",
    }.get(status_of(error), "")
