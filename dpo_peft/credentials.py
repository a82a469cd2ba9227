"""Tokens, keys and passwords, told by their form or by the name of what holds them: no file of a run has one.

The forms are those that their issuers document, so that few other texts look like them.
"""

import re
from collections.abc import Mapping
from typing import Any

REMOVED = "<removed>"
# Names of options and arguments whose value is secret, wherever they stand.
SECRET = re.compile(
    r"(^|[_-])(token|password|passwd|secret|(api|access|secret|private|account)[_-]?key|credentials?|authorization)$",
    re.IGNORECASE,
)
# What it is -> its forms. Each begins with fixed letters, so that a long file is searched in little time.
_KINDS = {
    "a token of the Hub": r"hf_[A-Za-z0-9]{20,} api_org_[A-Za-z0-9]{20,}",
    "an API key (OpenAI, Anthropic, ...)": r"sk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}",
    "a key of Groq, xAI or Replicate": r"gsk_[A-Za-z0-9]{40,} xai-[A-Za-z0-9]{40,} r8_[A-Za-z0-9]{30,}",
    "a key of Weights & Biases": r"wandb_v1_\w{20,}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{30,} github_pat_\w{22,}",
    "a token of GitLab": r"gl(?:pat|dt|rt|ptt|soat|cbt)-[\w-]{20,}",
    "a key of AWS": r"AKIA[A-Z0-9]{16}\b ASIA[A-Z0-9]{16}\b",
    "a key of Google": r"AIza[\w-]{35} ya29\.[\w-]{20,} GOCSPX-[\w-]{20,}",
    "a key of Azure": r"AccountKey=[A-Za-z0-9/+]{40,}",
    "a token of Databricks": r"dapi[0-9a-f]{32}",
    "a token of DigitalOcean": r"do[opr]_v1_[0-9a-f]{64}",
    "a token of Slack": r"xox[abeoprs]-[\w-]{10,} hooks\.slack\.com/services/T\w+/B\w+/\w+",
    "a token of Telegram": r":AA[\w-]{33}(?<=\d{8}:AA.{33})",
    "a key of Stripe": r"sk_(?:live|test)_[A-Za-z0-9]{16,} rk_(?:live|test)_[A-Za-z0-9]{16,}",
    "a key of SendGrid": r"SG\.[\w-]{16,}\.[\w-]{16,}",
    "a key of Twilio": r"SK[0-9a-f]{32}\b",
    "a token of npm": r"npm_[A-Za-z0-9]{36}",
    "a token of PyPI": r"pypi-AgE[\w-]{50,}",
    "a JSON web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a private key": r"-----BEGIN\ (?:[A-Z0-9]+\ )*PRIVATE\ KEY(?:\ BLOCK)?-----",
    "a URL with a password": r"""://[^\s/:@"'\\]+:[^\s/:@"'\\]{3,}@[\w.-]+""",
    "a secret variable": " ".join(
        rf"""{name}[\\"']*\s*[=:]\s*[\\"']*[\w/+.-]{{16,}}""" for name in ("TOKEN", "_KEY", "SECRET", "PASSWORD")
    ),
}
_FORMS = [(kind, re.compile(form)) for kind, forms in _KINDS.items() for form in re.split(r"(?<!\\) ", forms)]


def _is_whole(found: re.Match[str]) -> bool:
    """Says whether a find doesn't begin in the middle of a word."""
    before = found.string[max(found.start() - 1, 0) : found.start()]
    return not (before.isalnum() and found[0][0].isalnum())


def find_secret(text: str) -> tuple[str, int] | None:
    """Returns what kind of secret a text seems to hold, and in which line (from 1); None if it holds none."""
    for kind, form in _FORMS:
        for found in filter(_is_whole, form.finditer(text)):
            return kind, text.count("\n", 0, found.start()) + 1
    return None


def without_secrets(value: Any) -> Any:
    """Returns plain values without the entries that are named like a secret, and texts without what looks like one."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        for _, form in _FORMS:
            value = form.sub(lambda found: REMOVED if _is_whole(found) else found[0], value)
    return value
