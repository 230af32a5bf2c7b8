"""A GPT and its AdamW state, made once and then changed in place: memory that is touched first is slow.

Needs torch alone, so that every peer's environment can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

NUDGE = 1.0 + 2.0**-10
"""A factor that changes nearly every element of a float tensor, and little."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a GPT."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    context: int


FULL = Shape(width=768, layers=8, heads=12, vocabulary=50257, context=128)
"""96 million parameters: 1.15 GB with both moments, in fp32."""

QUICK = Shape(width=64, layers=8, heads=2, vocabulary=512, context=32)
MEGABYTE = Shape(width=32, layers=6, heads=2, vocabulary=256, context=16)


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, of the shape of ``x``: (batch, context, width)."""
        batch, context, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, context, width))
        result: torch.Tensor = x + self.mlp(self.norm_mlp(x))
        return result


class GPT(nn.Module):
    """A decoder whose head shares the embedding's weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of each token given those before it; ``tokens`` is (batch, context + 1)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.token.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class State:
    """A model and an optimizer that has moments for every parameter.

    Args:
        shape: the model's size.
        lifelike: give every tensor the distribution of a trained one; else one constant each, which is quicker, for
            whoever neither encodes nor compares.
    """

    def __init__(self, shape: Shape, *, lifelike: bool = True) -> None:
        torch.manual_seed(0)
        self.shape = shape
        with torch.device("meta"):
            model = GPT(shape)
        self.model = model.to_empty(device="cpu")
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        with torch.no_grad():
            for index, parameter in enumerate(self.model.parameters()):
                first, second = torch.empty_like(parameter), torch.empty_like(parameter)
                if lifelike:
                    parameter.normal_(0, 0.02)
                    first.normal_(0, 1e-3)
                    torch.square(first, out=second)
                    parameter.add_(1.0 if parameter.ndim == 1 else 0.0)
                else:
                    for tensor in (parameter, first, second):
                        tensor.fill_(index)
                self.optim.state[parameter] = {
                    "step": torch.tensor(100.0),
                    "exp_avg": first.detach(),
                    "exp_avg_sq": second.detach(),
                }

    @property
    def app_state(self) -> dict[str, Any]:
        """As ``Snapshot.take`` wants it."""
        return {"model": self.model, "optim": self.optim}

    def nested(self) -> dict[str, Any]:
        """As ``torch.save`` wants it."""
        return {"model": self.model.state_dict(), "optim": self.optim.state_dict()}

    def flat(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name, as safetensors wants it."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optim.state_dict()["state"].items():
            tensors.update({f"optim.{index}.{name}": tensor for name, tensor in values.items()})
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.flat().values())

    def block(self) -> list[torch.Tensor]:
        """The first block's weights and moments."""
        return [tensor for weight in self.model.blocks[0].parameters() for tensor in self._with_moments(weight)]

    def everything(self) -> list[torch.Tensor]:
        """All weights and moments."""
        return [tensor for weight in self.model.parameters() for tensor in self._with_moments(weight)]

    def change(self, what: str) -> None:
        """Change ``"nothing"``, ``"block"`` or ``"all"``, in place."""
        tensors = {"nothing": list[torch.Tensor], "block": self.block, "all": self.everything}[what]()
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(NUDGE)

    def _with_moments(self, weight: nn.Parameter) -> list[torch.Tensor]:
        moments = self.optim.state[weight]
        return [weight, moments["exp_avg"], moments["exp_avg_sq"]]
