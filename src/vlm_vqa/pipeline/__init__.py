"""A stage as a process under DVC: how it starts and ends, what is left of a killed `dvc`, damaged outputs.

Nothing here decides a byte of an output; what a stage computes stands in the room of its name.
"""
