"""Stage fetch-vqav2: how data arrive. Sources, the contract that records keep, the page that shows them.

The format that later stages read stands in `vlm_vqa.data`.
"""
