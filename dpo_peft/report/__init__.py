"""Runs as one HTML page."""

from .page import save_report

__all__ = ["save_report"]
