"""Preference rows looked at before they are trained on."""

from .looking import Look, look
from .render import render_row

__all__ = ["Look", "look", "render_row"]
