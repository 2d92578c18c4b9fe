"""VLM-VQA: fine-tune, track and evaluate a visual language model (DINOv2, linear projector, Gemma 2) on VQAv2."""
