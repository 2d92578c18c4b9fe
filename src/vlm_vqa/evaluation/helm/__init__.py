"""HELM's side of the evaluation: its run, its client for an exported model, its files. Only this room knows HELM."""
