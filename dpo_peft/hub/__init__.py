"""Publishes an adapter on the Hub, from the trainer (`HubPublisher`) or from its folder (`publishing.publish`)."""

from .publisher import HubPublisher

__all__ = ["HubPublisher"]
