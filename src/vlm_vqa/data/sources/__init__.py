"""Where data come from. Every source ends as files in VQAv2's official layout, which `directory` reads.

A new source (the official download, a data set on the hub) is a value of `params.Source`, a module here that brings
its files into a folder, and a case in `open_source`.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_vqa import params
from vlm_vqa.data.sources.directory import Source, directory_source
from vlm_vqa.data.sources.easy_vqa import easy_vqa_source


@contextmanager
def open_source(data: params.DataParams) -> Iterator[Source]:
    """Yield the source that `data.source` names; files that it had to write are gone afterwards.

    Raises:
        UserError: the source is not there or not the one expected.
    """
    match data.source:
        case params.Source.DIRECTORY:
            yield directory_source(data)
        case params.Source.EASY_VQA:
            with tempfile.TemporaryDirectory(prefix="vlm-vqa-easy-vqa-") as folder:
                yield easy_vqa_source(Path(folder))
