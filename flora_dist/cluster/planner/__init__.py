# SPDX-License-Identifier: Apache-2.0
"""`flora-dist plan`: bytes per rank and on the wire of a training run, without torch.

What each number means, and its source, stands where it is computed: memory.py, activations.py,
methods.py, wire.py. tests/planner compares all of them with real runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flora_dist.cluster.planner.config_file import FAMILIES, read_model
from flora_dist.cluster.planner.estimate import GIB, estimate
from flora_dist.cluster.planner.methods import (
    DEFAULT_GALORE_SHARE,
    DEFAULT_LORA_RANK,
    compared,
)
from flora_dist.cluster.planner.model import Model
from flora_dist.cluster.planner.picture import check_picture, draw
from flora_dist.cluster.planner.request import (
    BACKENDS,
    BITS,
    DEVICES,
    PRECISIONS,
    PURE,
    WIRE_DTYPES,
    Request,
    check_positive,
    check_whole,
)
from flora_dist.cluster.planner.search import LIMIT, SmallestCluster, largest_micro_batch, search
from flora_dist.cluster.planner.table import search_table, table
from flora_dist.cluster.planner.verdict import verdict
from flora_dist.core.state.settings import MOMENTA, STATE_BITS, STATE_DTYPES, FloraConfig
from flora_dist.core.state.spec import LEVELS

__all__ = ["add_arguments", "start"]

_USER_ERROR = 2
SEQUENCE = 2048
"""Tokens of a sequence, unless told."""
BACKEND_ALIASES = {"fsdp": "fsdp2"}
PRECISION_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "bf16-pure": PURE}
"""Short name -> its value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The planner's command line."""
    _add_run(parser)
    _add_flora(parser)
    answer = parser.add_argument_group("the answer")
    answer.add_argument(
        "--memory", type=float, default=80.0, metavar="GIB", help="of one rank (default: 80)"
    )
    answer.add_argument(
        "--bandwidth",
        type=float,
        default=100.0,
        metavar="GBIT",
        help="per second of a link, one way: a node's, or a rank's on one node (default: 100)",
    )
    answer.add_argument(
        "--search",
        action="store_true",
        help=f"the fewest ranks on which each method fits, up to {LIMIT}, --gpus a node",
    )
    answer.add_argument("--json", action="store_true", help="exact integers instead of tables")
    answer.add_argument("--picture", type=Path, metavar="FILE.png", help="bars of bytes per rank")
    answer.add_argument("--galore-rank", type=int, metavar="R", help="default: hidden size / 4")
    answer.add_argument("--lora-rank", type=int, default=DEFAULT_LORA_RANK, metavar="R")


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--model",
        type=Path,
        required=True,
        help=f"a transformers config, or the folder of one: {', '.join(FAMILIES)}",
    )
    run.add_argument("--vocabulary", type=int, metavar="N", help="tokens, instead of the file's")
    run.add_argument("--nodes", type=int, default=1)
    run.add_argument("--gpus", type=int, default=1, help="per node, a rank each")
    run.add_argument(
        "--backend",
        type=lambda name: BACKEND_ALIASES.get(name, name),
        choices=BACKENDS,
        required=True,
    )
    run.add_argument("--micro-batch", type=int, default=1, help="sequences of a rank's forward")
    run.add_argument(
        "--sequence-length",
        type=int,
        help=f"tokens (default: {SEQUENCE}, or the model's positions if fewer)",
    )
    run.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="micro-batches per optimizer step"
    )
    run.add_argument(
        "--precision",
        type=lambda name: PRECISION_ALIASES.get(name, name),
        choices=PRECISIONS,
        default="bfloat16",
        help=f"default: bfloat16, with float32 weights besides; {PURE}: without them",
    )
    run.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of activations, layer by layer (default: yes)",
    )
    run.add_argument(
        "--loss-chunk",
        type=int,
        metavar="TOKENS",
        help="whose logits exist at once (default: those of a micro-batch)",
    )
    run.add_argument(
        "--step-in-backward",
        action="store_true",
        help="Flora steps each weight when its gradient is there, which is freed",
    )
    run.add_argument(
        "--cpu-offload",
        action="store_true",
        help="fsdp2, hsdp: weights, gradients and state rest in the host's memory",
    )
    run.add_argument(
        "--device",
        choices=DEVICES,
        default=DEVICES[0],
        help="cpu: gloo's copies, and gradients sketched in smaller pieces (default: cuda)",
    )
    run.add_argument(
        "--bucket",
        type=int,
        default=Request.__dataclass_fields__["bucket"].default,
        metavar="ELEMENTS",
        help="ZeRO's reduce_bucket_size and allgather_bucket_size (default: DeepSpeed's 5e8)",
    )


def _add_flora(parser: argparse.ArgumentParser) -> None:
    flora = parser.add_argument_group("Flora")
    defaults = FloraConfig()
    flora.add_argument("--rank", type=int, default=defaults.rank, help="numbers per block")
    flora.add_argument("--block", type=int, default=defaults.block)
    flora.add_argument("--momentum", choices=MOMENTA, default=defaults.momentum)
    flora.add_argument(
        "--momentum-dtype",
        choices=STATE_DTYPES,
        help="of the momentum (default: float32, but --state-bits of sketches)",
    )
    flora.add_argument(
        "--state-bits",
        type=int,
        choices=STATE_BITS,
        help="of each number of a sketched momentum (default: --momentum-dtype's; without one 8, "
        "or 32 for rules of two moments)",
    )
    flora.add_argument("--gradients", choices=LEVELS, default=LEVELS[0], help="their level")
    flora.add_argument(
        "--gradient-rank",
        type=int,
        metavar="R",
        help="numbers per block (default: --rank, or all below 16 bits)",
    )
    for option, default in (
        ("--gradient-bits", "4 for compressed where nothing else is said, or 32"),
        ("--wire-bits", "--gradient-bits"),
    ):
        help_ = f"of each number (default: {default})"
        flora.add_argument(option, type=int, choices=BITS, help=help_)
    flora.add_argument("--wire-dtype", choices=WIRE_DTYPES, default="float32", help="of sketches")


def start(parsed: argparse.Namespace) -> int:
    """Answer a command line: 0, or 2 for a mistake in what was asked."""
    try:
        sys.stdout.write(_answer(parsed))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USER_ERROR
    return 0


def _answer(parsed: argparse.Namespace) -> str:
    check_positive("memory", parsed.memory)
    check_positive("bandwidth", parsed.bandwidth)
    if parsed.picture is not None:
        check_picture(parsed.picture)
    request, memory = _request(parsed), round(parsed.memory * GIB)
    plans = [estimate(request, method) for method in compared(request)]
    found = search(request, compared, memory) if parsed.search else []
    if parsed.picture is not None:
        draw(request, plans, memory=memory, path=parsed.picture)
    if parsed.json:
        told = {
            "model": request.model.name,
            "parameters": request.model.numel,
            "nodes": request.nodes,
            "gpus": request.gpus,
            "memory_bytes": memory,
            "plans": [each.as_json(parsed.bandwidth) for each in plans],
            "verdict": verdict(plans),
            **({"search": [_told(each) for each in found]} if found else {}),
        }
        return json.dumps(told, indent=2) + "\n"
    most = largest_micro_batch(request, compared, memory)
    text = table(request, plans, memory=memory, micro_batch=most, gigabits=parsed.bandwidth)
    return text + (search_table(request, found, memory=memory) if found else "")


def _told(found: SmallestCluster) -> dict[str, object]:
    fits = {"nodes": found.nodes, "gpus": found.gpus} if found.fits else None
    return {"method": found.estimate.label, "fits": fits, "total_bytes": found.estimate.total}


def _request(parsed: argparse.Namespace) -> Request:
    if parsed.vocabulary is not None:
        check_whole("vocabulary", parsed.vocabulary)
    model: Model = read_model(parsed.model, vocabulary=parsed.vocabulary)
    length, galore = parsed.sequence_length, parsed.galore_rank
    return Request(
        model=model,
        nodes=parsed.nodes,
        gpus=parsed.gpus,
        backend=BACKENDS[parsed.backend],
        flora=FloraConfig(
            rank=parsed.rank,
            block=parsed.block,
            momentum=parsed.momentum,
            state_dtype=parsed.momentum_dtype,
            state_bits=parsed.state_bits,
        ),
        gradients=parsed.gradients,
        gradient_rank=parsed.gradient_rank,
        gradient_bits=parsed.gradient_bits,
        wire_bits=parsed.wire_bits,
        wire_dtype=parsed.wire_dtype,
        micro_batch=parsed.micro_batch,
        sequence_length=min(SEQUENCE, model.sizes.positions) if length is None else length,
        accumulate=parsed.accumulate,
        precision=parsed.precision,
        checkpointing=parsed.checkpointing,
        loss_chunk=parsed.loss_chunk,
        step_in_backward=parsed.step_in_backward,
        device=parsed.device,
        cpu_offload=parsed.cpu_offload,
        bucket=parsed.bucket,
        galore_rank=(
            max(1, model.sizes.hidden // DEFAULT_GALORE_SHARE) if galore is None else galore
        ),
        lora_rank=parsed.lora_rank,
    )
