"""Records, images and stored features: what the pipeline knows about the data."""
