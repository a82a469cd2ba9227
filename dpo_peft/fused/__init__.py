"""Optional speed: decoder layers and attention written out in fewer passes over memory.

The core finds this package by name (`dpo_peft.wings`) and does without it where it is not there.
"""

from . import elementwise
from .recognition import fused_decoder, recognize

__all__ = ["elementwise", "fused_decoder", "recognize"]
