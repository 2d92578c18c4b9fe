"""What a run will need, by formula, before anything is downloaded: `vlm-vqa preflight`.

shapes   the towers' shapes and every trained parameter
texts    how many questions and images there are, and how long the texts are
passes   the forward passes that training will make of them: its own sampler, on a sample
memory   bytes of every part of an optimizer step, a rank
stages   each stage's disk, memory, FLOPs and hours
devices  memory and rate of named devices
advice   which keys of params.yaml make it fit, each tried by the same formulas
report   all of it as text and as JSON
"""
