"""Stage extract-features: every image is encoded once, by a group of worker processes, into a store of shards."""
