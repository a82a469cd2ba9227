"""Publishing an adapter on the Hub."""

from .publisher import HubPublisher

__all__ = ["HubPublisher"]
