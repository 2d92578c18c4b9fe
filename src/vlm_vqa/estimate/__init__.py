"""What a run will need, by formula, before anything is downloaded: `vlm-vqa preflight`.

Here belongs what is predicted from params.yaml, launch files and the records' counts: bytes, FLOPs, hours, price. What runs,
measures or downloads does not: no weights, no tokenizer, and no library that takes seconds to import beside torch. The
figures of the presets are golden texts (tests/estimate/golden).

predict       the command: a prediction, and whether it fits
advice        a handful of changes of params.yaml, tried by the same formulas
stage_costs   each stage's disk, memory, FLOPs and hours
memory        bytes of every part of an optimizer step, a rank
shapes        the towers' shapes and every trained parameter
dataset_size  how many questions and images there are, and how long the texts are
batches       the forward passes that training will make of them: its own sampler, on a sample
devices       memory and rate of named devices
render        all of it as text and as JSON
"""
