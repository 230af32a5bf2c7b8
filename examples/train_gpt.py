"""Train a small GPT on Python's own source, with a snapshot every few steps; then go back in time, retain, gc, verify.

    python examples/train_gpt.py                   # about two minutes on two cores
    python examples/train_gpt.py --quick           # a few seconds

The text is the standard library of the Python that runs this: real source, found on any machine. The model is trained
from scratch, then fine-tuned on the library's packages with its lower half frozen. Every snapshot holds the model, the
optimizer, the random state and the progress, so any of them is a point from which the run repeats itself exactly.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import shutil
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import torchsnapshot
from torchsnapshot import RNGState, Snapshot, StateDict

PRETRAIN = "*.py"
FINETUNE = ("asyncio/*.py", "concurrent/futures/*.py", "multiprocessing/*.py", "unittest/*.py")
MIN_SNAPSHOTS = 16
"""What both phases, the way back and the cleaning up need to show something."""

HEADER = f"{'phase':<9} {'step':>5} {'loss':>7} {'state':>10} {'new':>10} {'stored':>10} {'stalled':>9} {'took':>8}"


@dataclass(frozen=True)
class Config:
    """The model's size and the run's length."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 320
    every: int = 16
    warmup: int = 30

    @property
    def pretrain_steps(self) -> int:
        """Steps from scratch; the rest fine-tunes. A multiple of ``every``, so that the phase ends with a snapshot."""
        return max(self.steps * 5 // 8 // self.every, 1) * self.every


class Block(nn.Module):
    """One transformer block: attention and an MLP, each behind a layer norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(0.05)  # makes the random state matter: without it a restored run would not repeat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, of the shape of ``x``: (batch, context, width)."""
        batch, context, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(batch, context, width)))
        result: torch.Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return result


class GPT(nn.Module):
    """A decoder over bytes: 256 tokens, learned positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token = nn.Embedding(256, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of each byte given those before it; ``tokens`` is (batch, context + 1)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    def freeze_lower_half(self) -> None:
        """Embeddings and the lower half of the blocks are no longer trained."""
        lower: list[nn.Module] = [self.token, self.position, *list(self.blocks)[: len(self.blocks) // 2]]
        for module in lower:
            module.requires_grad_(False)


@dataclass
class Run:
    """A model in training: what a snapshot of it holds, and what it trains on."""

    config: Config
    phase: str
    text: torch.Tensor
    model: GPT
    optim: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    progress: StateDict = field(default_factory=lambda: StateDict(step=0))

    @classmethod
    def start(cls, config: Config, phase: str, text: torch.Tensor, model: GPT) -> Run:
        """A run with a fresh optimizer over the parameters that are to be trained."""
        if phase == "finetune":
            model.freeze_lower_half()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optim = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optim, start_factor=1 / config.warmup, total_iters=config.warmup)
        return cls(config, phase, text, model, optim, schedule)

    @property
    def step(self) -> int:
        """How many steps the model has been trained for."""
        return int(self.progress["step"])

    def app_state(self) -> dict[str, torchsnapshot.Stateful]:
        """Everything that the next step depends on."""
        return {
            "model": self.model,
            "optim": self.optim,
            "schedule": self.schedule,
            "rng": RNGState(),
            "progress": self.progress,
        }

    def train_step(self) -> float:
        """One step on a batch drawn with the global random state; returns its loss."""
        starts = torch.randint(len(self.text) - self.config.context - 1, (self.config.batch,)).tolist()
        loss = self.model.loss(torch.stack([self.text[at : at + self.config.context + 1] for at in starts]).long())
        self.optim.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.optim.step()
        self.schedule.step()
        self.progress["step"] = self.step + 1
        return loss.item()

    def fingerprint(self) -> str:
        """A SHA-256 over the bytes of all weights, computed without the library that is on show."""
        digest = hashlib.sha256()
        for weight in self.model.state_dict().values():
            dense = weight.contiguous()
            digest.update(ctypes.string_at(dense.data_ptr(), dense.nbytes))
        return digest.hexdigest()


def read_text(patterns: Iterable[str]) -> torch.Tensor:
    """The bytes of all standard library files that match, in an order that does not depend on the filesystem."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = sorted({path for pattern in patterns for path in stdlib.glob(pattern)})
    data = b"".join(path.read_bytes() for path in files)
    print(f"  {len(data) / 1e6:.1f} MB of text from {len(files)} files: {', '.join(patterns)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def readable(nbytes: int) -> str:
    """``nbytes`` as people write it."""
    return f"{nbytes / 1e6:,.2f} MB" if nbytes >= 10_000 else f"{nbytes:,} B"


@dataclass
class History:
    """What happened at each step, written down while it happened, to compare with later."""

    losses: dict[int, float] = field(default_factory=dict)
    fingerprints: dict[int, str] = field(default_factory=dict)


def train(run: Run, steps: int, root: Path, history: History) -> None:
    """Train for ``steps`` steps; every few of them a snapshot is taken in the background.

    The loss in the table is the mean since the last snapshot.
    """
    pending: tuple[int, float, float, torchsnapshot.PendingSnapshot] | None = None
    recent: deque[float] = deque(maxlen=run.config.every)
    for _ in range(steps):
        loss = run.train_step()
        history.losses[run.step] = loss
        recent.append(loss)
        if run.step % run.config.every:
            continue
        history.fingerprints[run.step] = run.fingerprint()
        if pending is not None:
            report(run.phase, *pending)
        began = time.perf_counter()
        taken = Snapshot.async_take(str(root / f"step_{run.step:04d}"), run.app_state())
        pending = (run.step, sum(recent) / len(recent), time.perf_counter() - began, taken)
    if pending is not None:
        report(run.phase, *pending)


def report(phase: str, step: int, loss: float, stalled: float, taken: torchsnapshot.PendingSnapshot) -> None:
    """Wait for the snapshot and print its row: ``stalled`` is how long training stood still for it."""
    taken.wait()
    stats = taken.stats
    print(
        f"{phase:<9} {step:>5} {loss:>7.4f} {readable(stats.state_nbytes):>10} {readable(stats.new_nbytes):>10}"
        f" {readable(stats.stored_nbytes):>10} {stalled * 1e3:>6.0f} ms {sum(stats.seconds.values()):>6.2f} s",
        flush=True,
    )


def go_back(run: Run, step: int, steps: int, root: Path, history: History) -> None:
    """Restore a historical step into ``run``, compare it with what was, train on and compare every step."""
    began = time.perf_counter()
    Snapshot(str(root / f"step_{step:04d}")).restore(run.app_state())
    seconds = time.perf_counter() - began
    check(run.step == step, f"step {step} restored in {seconds:.2f} s")
    check(run.fingerprint() == history.fingerprints[step], f"weights are bit for bit those of step {step}")
    repeated = [run.train_step() for _ in range(steps)]
    then = [history.losses[step + 1 + i] for i in range(steps)]
    check(repeated == then, f"the {steps} losses after it repeat exactly: {then[0]:.6f} ... {then[-1]:.6f}")
    last = step + steps
    check(run.fingerprint() == history.fingerprints[last], f"and so do the weights of step {last}")


def check(claim: bool, text: str) -> None:
    """Print a claim that holds; stop at one that doesn't."""
    if not claim:
        raise SystemExit(f"  NOT TRUE: {text}")
    print(f"  ok: {text}", flush=True)


def clean_up(config: Config, root: Path) -> list[int]:
    """Retain a few snapshots by policy, sweep what nothing refers to any more, verify the rest; the steps kept."""
    plan = torchsnapshot.retain(str(root), last=2, every=4 * config.every)
    print(f"  retained {len(plan.keep)} snapshots, dropped {len(plan.drop)}")
    freed = torchsnapshot.collect(str(root))
    print(
        f"  gc kept {freed.kept_blobs:,} blobs ({readable(freed.kept_nbytes)}),"
        f" freed {freed.freed_blobs:,} ({readable(freed.freed_nbytes)})"
    )
    kept = Snapshot.list(str(root))
    for snapshot in kept:
        problems = list(snapshot.verify())
        check(not problems, f"{snapshot.name} verified, every byte" + "".join(f"; {problem}" for problem in problems))
    return [int(snapshot.name.rpartition("_")[2]) for snapshot in kept]


def phases(config: Config) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The two phases: name, steps, text."""
    yield "scratch", config.pretrain_steps, read_text([PRETRAIN])
    yield "finetune", config.steps - config.pretrain_steps, read_text(FINETUNE)


def main(arguments: list[str] | None = None) -> None:
    """Run the whole story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where the snapshots go (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=Config.steps, help="training steps of both phases together")
    parser.add_argument("--every", type=int, default=Config.every, help="steps between snapshots")
    parser.add_argument("--quick", action="store_true", help="a tiny model and its own few steps, to see that it runs")
    options = parser.parse_args(arguments)
    if options.every < 1 or options.steps < MIN_SNAPSHOTS * options.every:
        parser.error(f"--every must be at least 1, and --steps at least {MIN_SNAPSHOTS} times as much")
    config = Config(steps=options.steps, every=options.every)
    if options.quick:
        config = Config(width=32, layers=2, heads=2, context=32, batch=4, steps=32, every=2, warmup=4)
    began = time.perf_counter()
    if options.root is None:
        temporary = Path(tempfile.mkdtemp(prefix="train_gpt-"))
        try:
            tell(config, temporary)
        finally:
            shutil.rmtree(temporary)
    else:
        tell(config, options.root)
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")


def tell(config: Config, root: Path) -> None:
    """Train, go back, clean up; each part prints what it shows."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)  # sums split over another number of threads round otherwise
    torch.manual_seed(0)
    model = GPT(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"A GPT of {size:,} parameters; a snapshot every {config.every} steps below {root}")
    texts: dict[str, torch.Tensor] = {}
    history = History()
    step = 0
    for phase, steps, text in phases(config):
        texts[phase] = text
        run = Run.start(config, phase, text, model)
        run.progress["step"] = step
        print(HEADER)
        train(run, steps, root, history)
        step = run.step

    back = config.pretrain_steps // 2 // config.every * config.every or config.every
    again = min(2 * config.every, config.pretrain_steps - back)
    print(f"\nBack to step {back}, into a model that never saw it:")
    torch.manual_seed(1)
    go_back(Run.start(config, "scratch", texts["scratch"], GPT(config)), back, again, root, history)

    print("\nKeep the last two and every fourth, free the rest:")
    kept = clean_up(config, root)

    print(f"\nAnd step {kept[0]}, once more, from what is left:")
    phase = "scratch" if kept[0] <= config.pretrain_steps else "finetune"
    go_back(Run.start(config, phase, texts[phase], GPT(config)), kept[0], config.every, root, history)


if __name__ == "__main__":
    main()
