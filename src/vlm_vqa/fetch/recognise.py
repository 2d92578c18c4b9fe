"""What a file is that stands where another layout is wanted."""

from pathlib import Path


def refusal(path: Path) -> str | None:
    """Return what a file is, and the block of params.yaml that reads it; None where it is nothing known."""
    return None
