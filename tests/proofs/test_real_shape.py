"""The proof of the real shape without its training: what preflight says before it, and what becomes of figures after it."""

import json

from benchmarks import measure
from proofs import real_shape
from vlm_vqa.model.layout import QuestionTokens


class Questions(list):
    """Tokens of questions, as the data set gives them."""

    image_ids = [0, 0, 1, 1]

    def tokens(self, place, epoch):
        return self[place]


def test_what_stands_before_and_after_the_training_works(tmp_path):
    params = real_shape.settings(layers=26, questions=4, steps=2)
    predicted = real_shape.prediction(params, Questions([QuestionTokens([0] * 9, [0] * 2)] * 4))
    found = {**real_shape.predicted_peaks(predicted), "export": 12.0}
    claims = real_shape.claims_of(params, found, predicted, [5.0, 4.0])
    details = real_shape.details_of(params, found, predicted, [5.0, 4.0], {"train": 1.0})
    measure.write("real_shape", claims, details, {}, tmp_path, quiet=True)
    written = json.loads((tmp_path / "real_shape.json").read_text())
    assert len(claims) == 7 and all(one["met"] for one in written["claims"]), written["claims"]
    assert written["details"]["predicted_step_seconds"] > 0
