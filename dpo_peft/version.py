"""The version, from this one place: of the package's metadata, the command line and what runs write."""

__version__ = "0.2.0"
