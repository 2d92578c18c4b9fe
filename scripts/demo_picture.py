"""Ask the small run's model in the demo's page, compare with its predictions, and draw the page for the README.

    python -m scripts.demo_picture [--out docs/images/demo.png]

Needs Chromium, `models/export`, `data/records` and `reports/predictions.parquet`. It clicks the page's examples and asks
other validation questions about their pictures, 20 in all; an answer that is not the predictions' ends it.
"""

import argparse
import asyncio
import tempfile
from json import dumps
from pathlib import Path

from tests import chromium
from vlm_vqa.data.records import load_questions
from vlm_vqa.demo import served
from vlm_vqa.evaluation.helm.files import read_table
from vlm_vqa.inference.predictor import Predictor

COUNT = 20


async def click_example(tab: chromium.Tab, number: int) -> tuple[str, str]:
    """Click an example, counted from 0; return its question and the answer. It may not be the one shown already."""
    row = f"document.querySelectorAll('#examples tbody tr')[{number}]"
    question = await tab.until(f"{row}?.querySelector('td:last-child').textContent.trim()")
    return question, await _answer(tab, row, question)


async def ask(tab: chromium.Tab, question: str, picture: Path | None = None) -> str:
    """Type another question than the last, or about another picture; return the answer or the message."""
    if picture is not None:
        if await tab.value("document.querySelector('#picture img') !== null"):
            await tab.click("document.querySelector('#picture button[aria-label=\"Remove Image\"]')")
        await tab.give_file("#picture input[type=file]", picture)
        await tab.until("document.querySelector('#picture .image-frame img') !== null")
    await tab.write("#question input, #question textarea", question)
    return await _answer(tab, "document.querySelector('#ask')", question)


async def _answer(tab: chromium.Tab, button: str, question: str) -> str:
    # What is shown now is marked, so that the next is known from it.
    await tab.value("document.querySelector('#answer .asked')?.classList.add('old')")
    await tab.click(button)
    await tab.until(f"document.querySelector('#answer .asked:not(.old)')?.textContent === {dumps(question)}")
    return await tab.value("document.querySelector('#answer .first, #answer .problem').textContent")


async def _draw(address: str, out: Path, scratch: Path) -> dict[tuple[int, str], str]:
    """Ask `COUNT` questions, write the picture, and return the answers by picture's id and question."""
    val = load_questions("data/records", "val", ["image_id", "question"]).to_list()
    given: dict[tuple[int, str], str] = {}
    async with chromium.opened(address, scratch) as tab:
        shown = "[...document.querySelectorAll('#examples tbody img')].map(one => one.src)"
        await tab.until(f"{shown}.length")
        ids = [int(Path(source).stem) for source in await tab.value(shown)]
        for number, image_id in enumerate(ids):
            first, answer = await click_example(tab, number)
            given[image_id, first] = answer
            for question in {
                row["question"]: 0 for row in val if row["image_id"] == image_id and row["question"] != first
            }:
                if len(given) < COUNT - len(ids) + number + 1:
                    given[image_id, question] = await ask(tab, question)
        await click_example(tab, 2)
        await tab.picture(out, 1280)
    others = [url for url in chromium.requests_in(scratch / "net-log.json") if not url.startswith(address)]
    assert not others, f"the page asked other machines: {others}"
    return given


def main() -> None:
    """Ask, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.png"))
    out = parser.parse_args().out
    predictor = Predictor.from_export(device="cpu")
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(predictor, "models/export", "data/records", 2**26, 0) as address,
    ):
        given = asyncio.run(_draw(address, out, Path(scratch)))
    rows = read_table(Path("reports/predictions.parquet")).to_pylist()
    predicted = {(row["image_id"], row["question"]): row["prediction"] for row in rows}
    wrong = {asked: answer for asked, answer in given.items() if predicted[asked] != answer}
    assert not wrong, f"not the predictions' answers: {wrong}"
    print(f"{len(given)} answers as predicted; wrote {out}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
