"""Where data come from. Every source ends as rows: `contract.Row`s by split, and places of images.

A new source is a value of `params.Source`, a module here that yields its rows, and a case in `open_source`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vlm_vqa import params
from vlm_vqa.fetch.contract import Source
from vlm_vqa.fetch.sources.easy_vqa import easy_vqa_source
from vlm_vqa.fetch.sources.hf_dataset import hub_source
from vlm_vqa.fetch.sources.official_archives import official_source, remove_archives
from vlm_vqa.fetch.sources.official_layout import directory_source
from vlm_vqa.fetch.sources.table import table_source
from vlm_vqa.sealed import scratch


@contextmanager
def open_source(data: params.DataParams, records: Path) -> Generator[Source]:
    """Yield the source that `data.source` names, or raise UserError; what it had to write beside `records` is gone
    afterwards, but for downloaded archives, unless all went well and `data.official.keep_archives` is false."""
    with scratch(records.with_name(f"{records.name}.pictures")) as folder:
        match data.source:
            case params.Source.DIRECTORY:
                yield directory_source(data)
            case params.Source.TABLE:
                yield table_source(data, folder)
            case params.Source.EASY_VQA:
                yield easy_vqa_source(folder)
            case params.Source.OFFICIAL:
                assert data.official is not None, "load_params asks for it"
                yield official_source(data.official, records)
                if not data.official.keep_archives:
                    remove_archives(records)
            case params.Source.HUB:
                assert data.hub and not isinstance(data.table, params.TableParams), "load_params asks for it"
                yield hub_source(data.hub, data.table, folder)
