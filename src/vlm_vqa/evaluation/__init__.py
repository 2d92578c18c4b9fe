"""How good a model is: VQA or answer accuracy, BLEU-1, the baselines to compare with, and HELM's own run."""
