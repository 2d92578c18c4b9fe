"""Pictures that stand in both splits under two ids: by their bytes, and by how they look: by `imagehash.phash` and, since
it knows no colours, by the mean colours of 8 x 8 fields."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

# Copies of photos, encoded again or in another size, mostly stay within both (tests/fetch/test_lookalikes.py). Drawings
# such as easy-VQA's differ in few bits of the first; by both, none of its val pictures looks like one of train.
_BITS, _COLOUR = 6, 10
_FIELDS = 8


class Look(NamedTuple):
    bits: bytes  # its perceptual hash, 64 bits
    colours: bytes  # mean colours, `_FIELDS` x `_FIELDS` x RGB


def look(image: Image.Image) -> Look:
    """Return how an RGB picture looks, from 256 x 256 of its pixels: all of them take five times as long."""
    small = image.resize((256, 256), Image.Resampling.NEAREST).reduce(4)
    fields = small.resize((_FIELDS, _FIELDS), Image.Resampling.BOX)
    return Look(np.packbits(imagehash.phash(small).hash).tobytes(), fields.tobytes())


class Lookalikes:
    """Compares the pictures of two splits; 0.3 kB a picture."""

    def __init__(self, splits: Sequence[Collection[int]]):
        """Take the ids of the images of each."""
        self.splits = splits
        self.twins = [0, 0]  # images of each split whose bytes are those of an earlier one of it, under another id
        self._first: tuple[dict[str, int], dict[str, int]] = {}, {}  # by split and hash the first image's id
        self._looks: list[tuple[int, Look]] = []

    def add(self, image_id: int, sha256: str, look: Look) -> None:
        """Take one picture; each comes once."""
        for split, ids in enumerate(self.splits):
            if image_id in ids:
                self.twins[split] += self._first[split].setdefault(sha256, image_id) != image_id
        self._looks.append((image_id, look))

    def equal(self) -> list[tuple[int, int]]:
        """Return pairs of ids, of the first split and the second, whose pictures have the same bytes."""
        train, val = self._first
        pairs = ((train.get(sha256), image_id) for sha256, image_id in val.items())
        return [(first, second) for first, second in pairs if first is not None and first != second]

    def near(self) -> list[tuple[int, int]]:
        """Return pairs as `equal` does whose pictures look alike, the nearest for each of the second split, nearest
        first. Takes seconds for VQAv2's 82,783 x 40,504."""
        known = {second for _, second in self.equal()}
        first: dict[Look, int] = {}
        second: dict[Look, list[int]] = defaultdict(list)
        for image_id, seen in self._looks:
            if image_id in self.splits[0]:
                first.setdefault(seen, image_id)
            elif image_id not in known:
                second[seen].append(image_id)
        ids = list(first.values())
        bits = np.array([seen.bits for seen in first], "V8").view(np.uint64)
        colours = np.frombuffer(b"".join(seen.colours for seen in first), np.uint8).reshape(len(ids), 3 * _FIELDS**2)
        found = []
        for seen, images in second.items():
            alike = np.flatnonzero(np.bitwise_count(bits ^ np.frombuffer(seen.bits, np.uint64)) <= _BITS)
            differing = colours[alike].astype(np.int16) - np.frombuffer(seen.colours, np.uint8)
            worst = np.abs(differing).max(axis=1, initial=0)
            if len(alike) and worst.min() <= _COLOUR:
                found += [(int(worst.min()), ids[alike[worst.argmin()]], image_id) for image_id in images]
        return [(one, other) for _, one, other in sorted(found)]
