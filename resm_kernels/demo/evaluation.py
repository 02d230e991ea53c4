"""Evaluation: exact match and answer-token loss on held-out prompts, and the choice of lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from resm_kernels import merge_state_dicts
from resm_kernels.demo.models import IGNORED, encode
from resm_kernels.demo.tasks import Example

LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)


class Score(NamedTuple):
    """Share of prompts answered exactly, and mean loss per answer token in nats."""

    exact_match: float
    answer_loss: float


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, prompts: Mapping[str, Sequence[Example]]
) -> dict[str, Score]:
    """Score a model on examples by skill name.

    One forward pass gives the exact match of greedy decoding: it reproduces the answer if and
    only if each answer token, the end token included, is the likeliest after the ones before it.
    """
    scores = {}
    for skill, examples in prompts.items():
        ids, labels = encode(tokenizer, examples)
        logits, targets = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        right = (logits.argmax(-1) == targets) | (targets == IGNORED)
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED
        )
        scores[skill] = Score(right.all(dim=1).float().mean().item(), loss.item())
    return scores


def generate(model: Any, tokenizer: Any, prompt: str) -> str:
    """The text that the model adds to a prompt by greedy decoding."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def try_lambdas(
    model: Any,
    tokenizer: Any,
    weights: Sequence[Mapping[str, torch.Tensor]],
    method: str,
    prompts: Mapping[str, Sequence[Example]],
) -> list[dict[str, float]]:
    """Merge in memory with every lambda and score the merges, mean over skills, best first.

    Best is the highest exact match; the lower loss decides between equals.

    Parameters
    ----------
    model, tokenizer
        The model is a vessel: its weights are overwritten.
    weights : sequence of state dict
        The base's, then the experts'.
    method : str
    prompts : mapping
        Examples by skill name.
    """
    tried = []
    for value in LAMBDAS:
        parameters = {"lambda": value}
        model.load_state_dict(
            merge_state_dicts(weights[0], weights[1:], method, parameters=parameters)
        )
        exact, loss = map(fmean, zip(*evaluate(model, tokenizer, prompts).values(), strict=True))
        tried.append({"lambda": value, "exact_match": exact, "answer_loss": loss})
    return sorted(tried, key=lambda scores: (-scores["exact_match"], scores["answer_loss"]))
