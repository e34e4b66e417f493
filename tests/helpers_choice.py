"""Random logits and rules of token choice, and what the plain torch reference makes of them."""

from __future__ import annotations

import random
from typing import Any

import torch

from crosspool.core.batch import TokenChoice
from crosspool.core.sampling import SamplingParams
from crosspool.kernels.reference.sampling import Choice, TokenHistory, choose_tokens

PENALTIES = ("repetition", "presence", "frequency")


def expected(fields: dict[str, Any], logits: torch.Tensor) -> int:
    """The reference's token, or -1 if it refuses."""
    how = {name: value for name, value in fields.items() if name in Choice.__slots__}
    renamed = {
        f"{name}_penalty": fields.get(name, 1.0 if name == "repetition" else 0.0) for name in PENALTIES
    }
    early = fields["index"] < fields.get("min_tokens", 0)
    history = TokenHistory(fields.get("prompt", ()), fields.get("output", ()))
    suppressed = tuple(fields.get("stop_token_ids", ())) if early else ()
    try:
        choice = Choice(**how, **renamed, suppressed=suppressed, history=history)
        return choose_tokens(logits[None], [choice])[0].token
    except FloatingPointError:
        return -1


def random_logits(rng: random.Random, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(vocab, generator=generator) * rng.choice((0.01, 1, 4, 1000))
    if rng.random() < 0.4:
        logits = logits.round(decimals=rng.choice((0, 1)))  # equals, and both zeros
    if rng.random() < 0.3:
        logits[torch.rand(vocab, generator=generator) < rng.choice((0.1, 0.9))] = -torch.inf
    return logits


def random_rules(rng: random.Random, vocab: int) -> dict[str, Any]:
    def ids(most: int, limit: int = vocab) -> list[int]:
        return [rng.randrange(limit) for _ in range(rng.randrange(most))]

    rules: dict[str, Any] = {
        "seed": rng.choice((0, -1, 2**63 - 1, -(2**63), rng.randrange(2**40))),
        "index": rng.randrange(300),
        "temperature": rng.choice((0, 1e-3, 0.3, 0.7, 1.0, 1.0, 2.5, 100, 5e-324)),
        "top_k": rng.choice((-1, 0, 1, 2, 5, vocab // 2, vocab, vocab + 7)),
        "top_p": rng.choice((1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-12, 1.0, 1.0)),
        "min_p": rng.choice((0, 0, 1e-6, 0.05, 0.5, 1)),
    }
    if rng.random() < 0.5:
        rules |= {
            "repetition": rng.choice((1.0, 1.3, 0.5)),
            "presence": rng.choice((0.0, 0.7, -2.0)),
            "frequency": rng.choice((0.0, 0.31, -0.5)),
            "prompt": ids(20),
            "output": ids(20),
        }
    if rng.random() < 0.4:
        stops = frozenset(ids(6, 2 * vocab))
        rules |= {"min_tokens": rng.choice((0, rules["index"], rules["index"] + 1)), "stop_token_ids": stops}
    return rules


def random_choice(rng: random.Random, vocab: int, steps: int) -> TokenChoice:
    rules = random_rules(rng, vocab)
    params = SamplingParams(
        temperature=rules["temperature"],
        top_k=rules["top_k"],
        top_p=rules["top_p"],
        min_p=rules["min_p"],
        repetition_penalty=rules.get("repetition", 1.0),
        presence_penalty=rules.get("presence", 0.0),
        frequency_penalty=rules.get("frequency", 0.0),
        min_tokens=rules["index"] + rng.randrange(steps),
        max_tokens=2000,
        logprobs=rng.choice((None, 0, 3, 20)),
    )
    stops = frozenset(rng.randrange(2 * vocab) for _ in range(3))
    prompt, output = (tuple(rules.get(name, ())) for name in ("prompt", "output"))
    return TokenChoice(params, rules["seed"], rules["index"], 1000, stops, prompt, output)
