"""MLflow: the one room that knows it.

A training run is one row in MLflow: parameters, curves, throughput, memory, then BLEU and accuracy from the later
stages. Runs and weights find each other by content (tags `weights_hash` and `params_hash`), so no run id has to be
stored in any output. Neither the model nor the data import this room.
"""

from vlm_vqa.tracking.recreate import recreate_run
from vlm_vqa.tracking.run import log_results, training_run
from vlm_vqa.tracking.store import checkout_root, tracking_uri

__all__ = ["checkout_root", "log_results", "recreate_run", "tracking_uri", "training_run"]
