"""How good a model is: VQA accuracy, BLEU-1, the baselines to compare with, and HELM's own run."""
