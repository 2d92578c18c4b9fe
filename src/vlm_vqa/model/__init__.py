"""The model: frozen vision tower, linear projector, Gemma 2; masks, token layout, loading and saving.

No data set, no training loop and no inference loop belong here.
"""
