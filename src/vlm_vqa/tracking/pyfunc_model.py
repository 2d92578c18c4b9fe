"""What MLflow runs for a registered export ("models from code"): it copies this file beside the model, nothing is pickled.

Where it runs, this project must be installed, as `--env-manager local` finds it.
"""

import base64
from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.tracking.registry import COPIED, sealed_folder

MAX_IMAGE_PIXELS = 50_000_000  # as `vlm-vqa ask` has it by default
AT_ONCE = 16  # questions of one batch: a request may bring any number


class ExportedModel(PythonModel):
    """Rows of `image` and `question`; a frame with the column `answer`, in the rows' order.

    An image is the bytes of a picture's file, or base64 text of them, as JSON has it. A path is not read: a server would
    open to strangers what is on its disk.
    """

    def load_context(self, context) -> None:
        config = dict(context.model_config)
        place = config.pop("folder", None) or context.artifacts[COPIED]
        self.predictor = Predictor.from_export(sealed_folder(Path(place), **config))

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        answers = []
        try:
            for start in range(0, len(model_input), AT_ONCE):
                rows = model_input.iloc[start : start + AT_ONCE]
                pictures = [_picture(data, f"row {start + row}") for row, data in enumerate(rows["image"])]
                answers += self.predictor.answer(list(rows["question"]), pictures)
        except UserError as error:
            # A server answers 400 to it, and 500 to what is not the asker's.
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame({"answer": answers}, index=model_input.index)


def _picture(data: bytes | str, name: str) -> Image.Image:
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError:
            raise UserError(
                f"{name}: image is a text but not base64. Give a picture's bytes: paths are not read."
            ) from None
    return open_image(data, name, MAX_IMAGE_PIXELS, bound="what is accepted")


set_model(ExportedModel())
