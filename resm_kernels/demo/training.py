"""Training: the same loop makes the base from a mixture of skills and an expert from one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from resm_kernels.demo.models import encode
from resm_kernels.demo.tasks import Skill, draw

WARMUP = 20


def train(
    model: Any,
    tokenizer: Any,
    skills: Sequence[Skill],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: str,
) -> float:
    """Train all weights in place on answers to fresh training prompts.

    Parameters
    ----------
    model, tokenizer
        As `load_model` or `new_model` and `new_tokenizer` give them.
    skills : sequence of Skill
        Drawn from by their shares.
    steps, batch : int
        Optimizer steps, and examples in each.
    learning_rate : float
        AdamW's peak: reached after a short warm-up, then falling linearly to a tenth.
    seed : str
        Fixes the batches.

    Returns
    -------
    float
        Answer-token loss of the last batch, in nats.
    """
    rng = random.Random(seed)
    shares = [skill.share for skill in skills]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    loss = torch.tensor(torch.nan)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARMUP, 1.0 - 0.9 * step / steps)
        drawn = rng.choices(skills, shares, k=batch)
        ids, labels = encode(tokenizer, [draw(skill, "train", rng) for skill in drawn])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return loss.item()
