"""What a run will need, by formula, before anything is downloaded: `vlm-vqa preflight`.

Here belongs what is predicted from params.yaml, launch files and the records' counts: bytes, FLOPs, hours, price. What runs,
measures or downloads does not: no weights, no tokenizer, and nothing that takes seconds to import beside torch. `predict` is
the command, `render` its text; `stage_costs` calls the rest. The presets' figures are golden texts (tests/estimate/golden).
"""
