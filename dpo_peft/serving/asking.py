"""Asks servers by JSON over HTTP, as OpenAI's clients do: with a key, and again where a server is busy."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from ..errors import OptionError

TRIES, TIMEOUT = 6, 600  # 31 s of waiting between them; s


class Endpoint:
    """Where a server is asked.

    Args:
        url: begins with http:// or https://.
        option: names the URL in messages.
        key: goes into the header `Authorization`, and nowhere else; that of `OPENAI_API_KEY` if None.

    Raises:
        OptionError: the URL or the key can't be one.
    """

    def __init__(self, url: str, option: str = "url", key: str | None = None):
        if not url.startswith(("http://", "https://")):
            raise OptionError(f"{option}={url!r} must begin with http:// or https://.")
        self.url, self.option = url.rstrip("/"), option
        self._key = (key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise OptionError("api_key or OPENAI_API_KEY holds characters that no key has: copy it again.")

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Any] = lambda told: told) -> Any:
        """Returns what `read` takes out of a server's answer.

        Raises:
            OptionError: there is no server, it refuses, is busy after `TRIES` tries, or answers in another form.
        """
        url = f"{self.url}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        remedy = f"See that it runs there, that {self.option} ends where {path} begins, and that it has such a model."
        for attempt in range(TRIES):
            time.sleep(2**attempt // 2)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
                    return read(json.load(answer))
            except urllib.error.HTTPError as error:
                why = f"it refuses: {error} {error.read(300).decode(errors='replace')}"
                if error.code in (401, 403):
                    remedy = "Give its key by api_key or OPENAI_API_KEY."
                if error.code < 500 and error.code != 429:
                    break
            except (urllib.error.URLError, ValueError, LookupError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
                break
            except (OSError, HTTPException) as error:  # the connection broke off
                why = f"{type(error).__name__}: {error}"
        if self._key:
            why = why.replace(self._key, "<key>")
        raise OptionError(f"{self.option}: {url} gave no answer ({why}). {remedy}")
