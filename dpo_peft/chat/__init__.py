"""A trained adapter to talk to, and its completions beside those without it. See `dpo-peft chat` and `compare`."""

from .comparing import Compared, Comparison, compare_completions
from .session import Reply, Session, Settings

__all__ = ["Compared", "Comparison", "Reply", "Session", "Settings", "compare_completions"]
