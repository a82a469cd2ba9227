"""Publishing an adapter on the Hub. Names are loaded on first use."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "HubPublisher":
        from .publisher import HubPublisher

        return HubPublisher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
