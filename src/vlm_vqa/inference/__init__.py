"""The trained model in use: generation, the predictor that an export becomes, the export itself, `vlm-vqa ask`.

Training imports nothing of it.
"""
