"""Stage fetch-vqav2: questions, answers and images from `data.source`, checked, as Parquet in data/records."""

import vlm_vqa  # noqa: F401 - first: from here on Ctrl-C ends without a traceback

# isort: split
import logging

from vlm_vqa.checks import check_machine
from vlm_vqa.data.records import REPORT
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import load_params
from vlm_vqa.pipeline.entrypoint import run

RECORDS = "data/records"


def main() -> None:
    """Read `params.yaml`, write `data/records`."""
    params = load_params("params.yaml")
    check_machine(params)
    manifest = fetch(params.data, RECORDS)
    for split, counts in manifest["splits"].items():
        logging.info("%s: %d questions on %d images", split, counts["questions"], counts["images"])
    logging.info("%d images in %s, data hash %s", manifest["images"], RECORDS, manifest["data_hash"])
    # What later stages could not use of them extract-features refuses: refused here, records that took hours to download
    # would be removed for a parameter that this stage does not read.
    logging.info("what they look like: %s/%s", RECORDS, REPORT)


if __name__ == "__main__":
    run("fetch-vqav2", main)
