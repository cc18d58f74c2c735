# SPDX-License-Identifier: Apache-2.0
"""Measures Flora under ZeRO: state per rank, and bytes of a step's own messages as the world grows.

    python -m tests.bench.zero_bytes            both; --state or --messages for one

State: llama-60m at ratio 16 on real ZeRO-2 engines of two ranks, bytes of the state tensors after
one step. Messages: one rank of a simulated world takes a real step over its ZeRO-3 shards, with a
reducer that counts; tests/zero/test_messages.py finds the same numbers on real ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora_dist import Flora
from flora_dist.core.layouts.flat import FlatLayout, cut_each
from tests.bench.state_bytes import BLOCK, RANK, llama_60m
from tests.conftest import launched_pool_of

Shapes = Mapping[str, tuple[int, ...]]

WORLDS = (2, 3, 4, 7, 8, 16, 32, 63, 64)
RULES = ("flora", "flora_strict", "blend", "none")
WORLD_OF_STATE = 2


# ---- state


def state_on_a_rank(state_dtype: str) -> tuple[int, int, int]:
    """(state bytes of this rank, bytes it reports, parameters of the model), after one step."""
    import flora_dist.deepspeed

    model = llama_60m()
    params = {"rank": RANK, "block": BLOCK, "state_dtype": state_dtype}
    engine, *_ = flora_dist.deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "Flora", "params": params},
            "zero_optimization": {"stage": 2},
            "steps_per_print": 10**9,
        },
    )
    tokens = torch.randint(0, model.config.vocab_size, (1, 16))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    flora = flora_dist.deepspeed.attach(engine)
    kept = sum(
        value.numel() * value.element_size()
        for state in flora.state.values()
        for own in state.values()
        for value in own.values()
        if isinstance(value, Tensor)
    )
    return kept, flora.report().state_bytes, sum(p.numel() for p in model.parameters())


def print_state() -> None:
    """Prints the bytes of the rank that keeps most, per parameter of the whole model."""
    pool = launched_pool_of(WORLD_OF_STATE)
    print(f"state under ZeRO-2, {WORLD_OF_STATE} ranks, of the rank that keeps most")
    print(f"{'optimizer':34} {'state bytes':>13} {'reported':>13} {'bytes per parameter':>20}")
    try:
        for state_dtype in ("float32", "bfloat16"):
            results = pool(state_on_a_rank, state_dtype, timeout=600.0)
            kept, reported, elements = max(results)
            name = f"Flora, rank {RANK} of {BLOCK}, {state_dtype}"
            print(f"{name:34} {kept:13,} {reported:13,} {kept / elements:20.4f}")
    finally:
        pool.close()
    # Two fp32 moments per element. flora-opt sees a flat 1-D shard, for which it silently keeps
    # both moments: 8.0 bytes per element against 0.07 as a matrix (measured with flora-opt 0.0.3).
    share = 8 * math.ceil(elements / WORLD_OF_STATE)
    for name in ("AdamW, fp32 moments", "flora-opt on a flat shard: dense"):
        print(f"{name:34} {share:13,} {'by formula':>13} {share / elements:20.4f}")


# ---- messages


@dataclass(frozen=True)
class CountingReducer:
    """One rank of a world that is not there: counts what it would send."""

    rank: int
    sums: list[int] = field(default_factory=list, compare=False)
    """Bytes of each all-reduce."""
    exchanges: list[int] = field(default_factory=list, compare=False)
    """Bytes sent in each exchange with the ranks that share cut rows."""

    def sum_(self, message_S: Tensor) -> None:
        """Leave the message as it is."""
        self.sums.append(message_S.numel() * message_S.element_size())

    def exchange(self, sent_S: Tensor, sizes: Mapping[int, int]) -> Tensor:
        """Hear nothing from the peers."""
        assert sent_S.numel() == sum(sizes.values())
        self.exchanges.append(sent_S.numel() * sent_S.element_size())
        return torch.zeros_like(sent_S)


def counted(
    shapes: Shapes, *, world_size: int, rank: int, settings: dict[str, object]
) -> CountingReducer:
    """The messages of one step of ``rank``, its shards cut as ZeRO-3 cuts them."""
    sizes = [math.ceil(math.prod(shape) / world_size) for shape in shapes.values()]
    spans = cut_each(list(shapes.items()), sizes=sizes, world_size=world_size)
    flat = torch.zeros(sum(sizes), requires_grad=True)
    flat.grad = torch.randn_like(flat)
    reducer = CountingReducer(rank)
    layout = FlatLayout()
    layout.add(flat, spans, rank=rank, reducer=reducer)
    optimizer = Flora([flat], **settings)
    optimizer.attach_layout(layout, [[flat]])
    with contextlib.redirect_stderr(io.StringIO()):  # the report
        optimizer.step()
    return reducer


def probed(world_size: int) -> Iterator[int]:
    """Ranks at the ends and in the middle; neighbours cut rows in other places."""
    yield from sorted({0, 1, world_size // 2, world_size - 1} & set(range(world_size)))


def print_messages(title: str, shapes: Shapes) -> None:
    """Prints bytes per rank and step by world size and rule: sums, then exchanges."""
    elements = sum(math.prod(shape) for shape in shapes.values())
    print(f"\nmessages of a step under ZeRO-3, {title}: {elements:,} parameters; gradient in fp32")
    print(f"{4 * elements:,} bytes. All-reduces (equal on all ranks) + what the busiest of the")
    print("probed ranks sends to those that share its cut rows")
    print(f"{'ranks':>5} " + " ".join(f"{rule:>27}" for rule in RULES))
    for world_size in WORLDS:
        cells = []
        for rule in RULES:
            settings = {"rank": RANK, "block": BLOCK, "momentum": rule}
            found = [
                counted(shapes, world_size=world_size, rank=rank, settings=settings)
                for rank in probed(world_size)
            ]
            sums = {tuple(reducer.sums) for reducer in found}
            assert len(sums) == 1, sums
            busiest = max((reducer.exchanges for reducer in found), key=sum)
            cells.append(f"{_listed(sums.pop())} + {_listed(busiest)}")
        print(f"{world_size:5} " + " ".join(f"{cell:>27}" for cell in cells), flush=True)


def _listed(sizes: tuple[int, ...] | list[int]) -> str:
    return ",".join(f"{size}" for size in sizes) or "0"


def one_layer(width: int, inner: int, words: int) -> Shapes:
    """An embedding and a transformer layer."""
    return {
        "embed": (words, width),
        **dict.fromkeys(("q", "k", "v", "o"), (width, width)),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
        "norm": (width,),
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", action="store_true")
    parser.add_argument("--messages", action="store_true")
    asked = parser.parse_args()
    both = asked.state == asked.messages
    if asked.state or both:
        print_state()
    if asked.messages or both:
        print_messages("a layer that divides", one_layer(512, 1024, 2048))
        print_messages("a layer that does not", one_layer(500, 1333, 2047))


if __name__ == "__main__":
    # Ranks find a body by the name of its module, which must not be __main__.
    from tests.bench import zero_bytes

    zero_bytes.main()
