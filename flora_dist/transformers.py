# SPDX-License-Identifier: Apache-2.0
"""Flora in the Hugging Face Trainer, by one argument, on one process, DDP, FSDP2 and ZeRO.

    import flora_dist.transformers
    Trainer(..., optimizer_cls_and_kwargs=flora_dist.transformers.flora(lr=1e-3, rank=16))

Importing this makes ``TrainingArguments(optim="flora", optim_args="rank=16")`` known too, and every
Trainer made afterwards checks before its first step that it trains with the Flora it was given.
``FloraTrainer``, or ``SketchedGradients`` before another Trainer's class, keeps gradients as
sketches.
"""

from flora_dist.frameworks.transformers.check import watch_all
from flora_dist.frameworks.transformers.optimizer import flora
from flora_dist.frameworks.transformers.trainer import FloraTrainer, SketchedGradients
from flora_dist.frameworks.transformers.word import add_word

__all__ = ["FloraTrainer", "SketchedGradients", "flora"]

add_word()
watch_all()
