"""Seals what a test has written or changed by hand, as the stage that writes it does."""

from pathlib import Path
from typing import Any

from vlm_vqa.data import records
from vlm_vqa.sealed import fingerprint, write_sealed


def seal_records(folder: Path, **facts: Any) -> None:
    """Write the manifest of records whose Parquet files are there."""
    files = {path.name: fingerprint(path) for path in folder.glob("*.parquet")}
    write_sealed(folder / records.MANIFEST, {"schema_version": records.SCHEMA_VERSION, "files": files, **facts})
