"""What the codec makes of realistic bytes, and how fast: ratio and GB/s of one core, encoding and decoding.

    python benchmarks/codec.py [--chunk-mib 4] [--seconds 0.3]

Each row is one kind of data: one chunk, encoded again and again into memory that is reused, as a take does. Throughput
is in raw bytes, the best of the repetitions (the machine may be busy). "choose" is the share of the time that goes
into looking at the sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from torchsnapshot.chunks.codecs import WORTHWHILE, Effort, borrow_scratch, choose, decode_into, encode
from torchsnapshot.engine.buffers import map_pages


def kinds(nbytes: int) -> dict[str, tuple[torch.Tensor, int]]:
    """Chunks of ``nbytes`` bytes by name, each with its element width."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(nbytes // 2, generator=generator)
    spread = torch.randn(nbytes // 2, generator=generator)
    weights = 0.02 * noise
    first_moment = noise * torch.exp(spread) * 1e-3
    second_moment = first_moment.square()
    tokens = (50_000 * torch.rand(nbytes // 8, generator=generator) ** 3).long()
    fp32 = nbytes // 4
    return {
        "bf16 weights": (weights.bfloat16(), 2),
        "fp16 weights": (weights.half(), 2),
        "fp32 weights": (weights[:fp32], 4),
        "fp32 first moment": (first_moment[:fp32], 4),
        "fp32 second moment": (second_moment[:fp32], 4),
        "fp64 weights": (weights[: nbytes // 8].double(), 8),
        "int64 token ids": (tokens, 8),
        "int64 range": (torch.arange(nbytes // 8), 8),
        "fp32 zeros": (torch.zeros(fp32), 4),
        "random bytes": (torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator), 1),
    }


def best_seconds(work: Callable[[], object], seconds: float) -> float:
    """The shortest of repetitions that take at least ``seconds`` together."""
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return best


def measure(tensor: torch.Tensor, width: int, effort: Effort, seconds: float) -> str:
    """One row's figures."""
    data = tensor.contiguous().view(torch.uint8)
    nbytes = data.numel()
    raw, out, back = map_pages(nbytes)[:nbytes], map_pages(nbytes)[:nbytes], map_pages(nbytes)[:nbytes]
    torch.frombuffer(raw, dtype=torch.uint8).copy_(data)
    with borrow_scratch() as scratch:
        scheme = choose(raw, width, effort, scratch)
        choosing = best_seconds(lambda: choose(raw, width, effort, scratch), seconds / 4)
        if scheme.fraction > WORTHWHILE:
            return f"{'raw':>7} {'':>8} {'':>8} {choosing * 1e6:6.0f} us"
        size = encode(raw, scheme, out, scratch)
        if size is None:
            return f"{'raw':>7}"
        encoding = best_seconds(lambda: encode(raw, scheme, out, scratch), seconds) + choosing
        stored = out[:size]
        decoding = best_seconds(lambda: decode_into(stored, back, scratch=scratch), seconds)
        if back != raw:
            raise AssertionError("decoded bytes differ")
    ratio, rates = size / nbytes, (nbytes / encoding / 1e9, nbytes / decoding / 1e9)
    plan = f"{'rotated ' if scheme.rotated else ''}{sum(lane.method for lane in scheme.lanes)} of {width} coded"
    return f"{ratio:7.4f} {rates[0]:8.2f} {rates[1]:8.2f} {choosing * 1e6:6.0f} us  {plan}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()
    for effort in Effort:
        print(f"\nencoding={effort.value!r}, chunks of {options.chunk_mib} MiB, one core")
        print(f"{'':20} {'ratio':>7} {'enc GB/s':>8} {'dec GB/s':>8} {'choose':>9}")
        for name, (tensor, width) in kinds(options.chunk_mib << 20).items():
            print(f"{name:20} {measure(tensor, width, effort, options.seconds)}", flush=True)


if __name__ == "__main__":
    main()
