"""Files of the coders that are written here: arrays, and integers by a range coder.

Integers are coded with their own frequencies, which needs no more bytes than the Huffman codes of
the papers; floats are kept as float16.
"""

import io

import constriction
import numpy as np

FLOAT = np.float16


class Writer:
    """Arrays one after the other, without names: the reader asks for them in the same order."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def plain(self, values: np.ndarray) -> None:
        """As they are; shape and type are the reader's to know."""
        self.parts.append(np.ascontiguousarray(values).tobytes())

    def symbols(self, values: np.ndarray) -> None:
        """Integers from 0 to 255, by a range coder with their own frequencies."""
        values = values.astype(np.int32).ravel()
        counts = np.bincount(values, minlength=1).astype(np.uint32)
        coder = constriction.stream.stack.AnsCoder()
        if len(counts) > 1 and len(values):
            coder.encode_reverse(values, _model(counts))
        words = coder.get_compressed()
        self.plain(np.array([len(values), len(words)], np.uint32))
        self.plain(np.array([len(counts)], np.uint16))
        self.plain(counts)
        self.plain(words)

    def content(self) -> bytes:
        """All that was written."""
        return b"".join(self.parts)


class Reader:
    """What ``Writer`` wrote."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)

    def plain(self, count: int, kind: type) -> np.ndarray:
        """``count`` numbers of a type."""
        return np.frombuffer(self.stream.read(count * np.dtype(kind).itemsize), kind)

    def symbols(self) -> np.ndarray:
        """Integers, int32."""
        count, words = self.plain(2, np.uint32)
        counts = self.plain(int(self.plain(1, np.uint16)[0]), np.uint32)
        coder = constriction.stream.stack.AnsCoder(self.plain(int(words), np.uint32))
        if len(counts) > 1 and count:
            return coder.decode(_model(counts), int(count))
        return np.zeros(count, np.int32)


def _model(counts: np.ndarray):
    shares = counts / counts.sum()
    return constriction.stream.model.Categorical(shares.astype(np.float32), perfect=False)
