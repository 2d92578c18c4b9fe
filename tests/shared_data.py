"""Where the real samples of VQAv2 lie that are shared beside the project, if they do."""

import os
from pathlib import Path

SHARED = Path(os.environ.get("VLM_VQA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
