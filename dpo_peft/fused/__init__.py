"""Optional speed: decoder layers and attention written out in fewer passes over memory."""

from .. import forward  # noqa: F401  forward and fused need each other; it goes first
