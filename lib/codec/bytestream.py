"""Reading and writing bytes within bounds."""


def write_int(value: int) -> bytes:
    """Unsigned integer as a varint: seven bits a byte, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Reader:
    """Cursor over bytes; reading past their end raises ValueError."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.data) - self.position:
            raise ValueError("a stated size exceeds the file")
        self.position += count
        return self.data[self.position - count : self.position]

    def byte(self) -> int:
        """The next byte as an integer."""
        return self.take(1)[0]

    def varint(self) -> int:
        """The next unsigned integer, as :func:`write_int` writes it."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an integer is longer than 63 bits")

    def rest(self) -> bytes:
        """All bytes not yet read."""
        return self.take(len(self.data) - self.position)

    def text(self) -> str:
        """The next string: its length in bytes, then UTF-8."""
        return self.take(self.varint()).decode()


def write_text(text: str) -> bytes:
    """A string, read back by :meth:`Reader.text`."""
    data = text.encode()
    return write_int(len(data)) + data
