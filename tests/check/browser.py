"""A page as a person sees it: a screenshot from a headless Chromium."""

import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def screenshot(
    page: Path, picture: Path, width: int = 1000, height: int = 1000, dark: bool = False
) -> None:
    """Writes a PNG of the page; raises if the browser does not."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                CHROMIUM,
                *FLAGS,
                *scheme,
                f"--user-data-dir={profile}",
                f"--screenshot={picture}",
                f"--window-size={width},{height}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    if not picture.is_file():
        raise RuntimeError(f"Chromium wrote no picture of {page}")


def pixels(picture: Path) -> np.ndarray:
    """A screenshot as [height, width, channels] of bytes: PNG, eight bits, not interlaced."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, header = 8, b"", b""
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        header = body if kind == b"IHDR" else header
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    channels = {2: 3, 6: 4}[header[9]]
    raw, step = zlib.decompress(packed), width * channels
    above, rows = bytes(step), []
    for y in range(height):
        start = y * (step + 1)
        above = _unfiltered(raw[start], raw[start + 1 : start + 1 + step], above, channels)
        rows.append(above)
    return np.frombuffer(b"".join(rows), np.uint8).reshape(height, width, channels)


def _unfiltered(kind: int, line: bytes, above: bytes, channels: int) -> bytes:
    """One row: each byte was stored less a guess from those to its left and above."""
    out = bytearray(channels)
    corners = bytes(channels) + above
    for x, byte in enumerate(line):
        left, up, corner = out[x], above[x], corners[x]
        if kind == 4:
            p = left + up - corner
            a, b, c = abs(p - left), abs(p - up), abs(p - corner)
            guess = left if a <= b and a <= c else up if b <= c else corner
        else:
            guess = (0, left, up, (left + up) // 2)[kind]
        out.append((byte + guess) & 255)
    return bytes(out[channels:])
