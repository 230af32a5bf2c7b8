"""How few bytes the snapshots of a real training run take: the fractions of raw bytes that ``encoding`` brings them to.

    python benchmarks/trajectory.py [--json] [--vocabulary 256] [--encoding smallest] [--snapshots 20] [--quick]

A small GPT (that of ``examples/train_gpt.py``) is trained on Python's own source with AdamW at a learning rate of
3e-4, and its state is taken every 10 steps, once as weights and moments in fp32, once as weights in bf16:

- *without deltas*: each snapshot in a store of its own;
- *with deltas*: each snapshot beside the one 10 steps before it, which stands alone;
- *run*: all snapshots in one store, in their order; bases included, so this is what a run really costs a snapshot;

and beside them a snapshot of a state that has not changed, and of one in which 1 % of an embedding's rows have.

Tokens are bytes, or, with ``--vocabulary``, the most frequent words: then the embedding has rows that few steps touch,
as that of a large model has. The trained model is what a laptop trains in some minutes; fractions hardly depend on its
size, as long as its matrices are larger than 1 MiB: smaller ones share packs, and packs have no deltas.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.chunks.writer import Encoding

LEARNING_RATE = 3e-4
STEPS_BETWEEN = 10
WORD = re.compile(rb"\w+|\s+|[^\w\s]")
TARGETS = {
    "fp32 weights + moments": {"with deltas": 0.76, "without deltas": 0.82},
    "bf16 weights": {"with deltas": 0.37, "without deltas": 0.665},
    "1 % of embedding rows changed": {"with deltas": 0.03},
    "unchanged": {"with deltas": 0.0005},
}
"""What the project aims at."""

State = dict[str, torch.Tensor]


def load_example() -> ModuleType:
    """``examples/train_gpt.py`` as a module."""
    path = Path(__file__).parent.parent / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


def as_words(text: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The text as tokens: the most frequent words have one each, all others are spelled in bytes."""
    words = WORD.findall(bytes(text.tolist()))
    frequent = [word for word, _ in Counter(words).most_common(vocabulary - 256)]
    tokens = {word: 256 + index for index, word in enumerate(frequent)}
    numbers = chain.from_iterable((tokens[word],) if word in tokens else word for word in words)
    return torch.tensor(list(numbers))


@dataclass
class Row:
    """One kind of state: the stored fraction of each snapshot, measured in several ways."""

    with_deltas: list[float] = field(default_factory=list)
    without_deltas: list[float] = field(default_factory=list)
    run: list[float] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """The mean of each way that was measured."""
        ways = {"with deltas": self.with_deltas, "without deltas": self.without_deltas, "run": self.run}
        return {way: sum(values) / len(values) for way, values in ways.items() if values}


def take(path: Path, state: Mapping[str, Any], encoding: Encoding) -> float:
    """Take a snapshot; the bytes put, manifest included, as a fraction of the state's."""
    stats = Snapshot.take(str(path), {"state": StateDict(**state)}, encoding=encoding).stats
    assert stats is not None
    return (stats.stored_nbytes + stats.manifest_nbytes) / stats.state_nbytes


def check(path: Path, state: State) -> None:
    """Compare a snapshot with what was taken, bit for bit."""
    target = StateDict(**{name: torch.zeros_like(tensor) for name, tensor in state.items()})
    Snapshot(str(path)).restore({"state": target})
    for name, tensor in state.items():
        if not torch.equal(target[name], tensor):
            raise AssertionError(f"{path}: {name} did not come back")


class Measurement:
    """Takes the states of one kind as they come, in each of the ways."""

    def __init__(self, folder: Path, encoding: Encoding) -> None:
        self.row = Row()
        self._folder = folder
        self._encoding = encoding
        self._before: State | None = None
        self._count = 0

    def add(self, state: State) -> None:
        """One more snapshot of the run."""
        pair = self._folder / "pair"
        if self._before is not None:
            take(pair / "before", self._before, self._encoding)
            self.row.with_deltas.append(take(pair / "after", state, self._encoding))
            check(pair / "after", state)
            shutil.rmtree(pair)
            self.row.without_deltas.append(take(pair / "alone", state, self._encoding))
            shutil.rmtree(pair)
        run = self._folder / "run"
        self.row.run.append(take(run / f"step_{self._count}", state, self._encoding))
        check(run / f"step_{self._count}", state)
        self._before = {name: tensor.clone() for name, tensor in state.items()}
        self._count += 1


def train(vocabulary: int, num_snapshots: int, quick: bool, observe: Callable[[nn.Module, Any], None]) -> None:
    """Train the GPT and show it every few steps."""
    example = load_example()
    config = example.Config(width=768, layers=2, heads=12, context=128, batch=4)
    if quick:
        config = example.Config(width=512, layers=1, heads=2, context=16, batch=2)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):
        text = example.read_text([example.PRETRAIN]).long()
    model = example.GPT(config)
    if vocabulary > 256:
        text = as_words(text, vocabulary)
        model.token, model.head = nn.Embedding(vocabulary, config.width), nn.Linear(config.width, vocabulary, False)
        model.loss = _loss_of(model, vocabulary)
        nn.init.normal_(model.token.weight, std=0.02)
        nn.init.normal_(model.head.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", file=sys.stderr)
    for step in range(1, (num_snapshots + 1) * STEPS_BETWEEN + 1):
        starts = torch.randint(len(text) - config.context - 1, (config.batch,)).tolist()
        loss = model.loss(torch.stack([text[at : at + config.context + 1] for at in starts]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % STEPS_BETWEEN == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
            observe(model, optimizer)


def _loss_of(model: Any, vocabulary: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The example's loss for another number of tokens."""

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = model.token(inputs) + model.position(torch.arange(inputs.shape[1]))
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.norm(x)).view(-1, vocabulary)
        return nn.functional.cross_entropy(logits, targets.flatten())

    return loss


def measure_sparse(folder: Path, state: State, encoding: Encoding, num_snapshots: int) -> tuple[Row, Row]:
    """An embedding of which 1 % of the rows change from take to take, and the last state once more, unchanged."""
    sparse, unchanged = Measurement(folder / "rows", encoding), Row()
    rows = next(tensor for name, tensor in state.items() if name.endswith("mlp.0.weight")).repeat(8, 1)
    for _ in range(num_snapshots):
        sparse.add({"embedding": rows})
        touched = torch.randperm(len(rows))[: len(rows) // 100]
        rows[touched] += LEARNING_RATE * torch.randn_like(rows[touched])
    take(folder / "state", state, encoding)
    unchanged.with_deltas.append(take(folder / "again", state, encoding))
    return sparse.row, unchanged


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Row]:
    """All rows of the table."""
    fp32, bf16 = (Measurement(folder / kind, options.encoding) for kind in ("fp32", "bf16"))
    last: State = {}

    def observe(model: nn.Module, optimizer: Any) -> None:
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        moments = {
            f"optimizer.{index}.{name}": tensor
            for index, values in optimizer.state_dict()["state"].items()
            for name, tensor in values.items()
        }
        last.update({**weights, **moments})
        fp32.add(last)
        bf16.add({name: tensor.bfloat16() for name, tensor in weights.items()})

    train(options.vocabulary, options.snapshots, options.quick, observe)
    sparse, unchanged = measure_sparse(folder / "sparse", last, options.encoding, 3 if options.quick else 6)
    return {
        "fp32 weights + moments": fp32.row,
        "bf16 weights": bf16.row,
        "1 % of embedding rows changed": sparse,
        "unchanged": unchanged,
    }


def table(rows: Mapping[str, Row]) -> str:
    """The means as a table for a page, targets beside them."""
    lines = ["| state | with deltas | target | without deltas | target | run |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        means, targets = row.means(), TARGETS[name]
        cells = [
            text
            for way in ("with deltas", "without deltas")
            for text in (_number(means.get(way)), f"≤ {targets[way]}" if way in targets else "")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {_number(means.get('run'))} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main() -> None:
    """Measure, and print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where snapshots go meanwhile (default: a temporary folder)")
    parser.add_argument("--encoding", choices=["auto", "smallest"], default="smallest")
    parser.add_argument("--snapshots", type=int, default=20, help="snapshots of the run")
    parser.add_argument("--vocabulary", type=int, default=256, help="tokens: 256 means bytes, more means words")
    parser.add_argument("--quick", action="store_true", help="a smaller model, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="trajectory-", dir=options.folder))
    try:
        rows = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    if options.json:
        result = {name: {**row.means(), "each": row.__dict__, "targets": TARGETS[name]} for name, row in rows.items()}
        print(json.dumps({"vocabulary": options.vocabulary, "encoding": options.encoding, "rows": result}, indent=1))
    else:
        print(table(rows))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
