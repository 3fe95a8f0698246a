"""Steps of a tiny model on random windows."""

import jax
import numpy as np
import optax
from random_models import BASE, VOCABULARY

from jllama.config import LoraConfig
from jllama.folders.load import load_model
from jllama.lora import attach, split
from train.optimizer import learning_rate_schedule, make_optimizer, split_learned
from train.step import Window, initial_state, train_step

PARAMS = BASE | {"n_kv_heads": 2}
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, targets=("wq", "wv"))
LENGTH = 24


def build(
    folder, *, precision="fp32", lora=LORA, rate=1e-2, k=1, clip=0.0, remat="none", b_ratio=1.0
):
    model = load_model(folder, precision, remat=remat)
    attach(model, lora, jax.random.key(3))
    graphdef, adapters, base = split(model)
    optimizer = make_optimizer(
        {"learned": adapters, "frozen": base},
        learning_rate_schedule("constant", rate, 0, 1000),
        weight_decay=0.01,
        max_grad_norm=clip,
        accumulation=k,
        b_rate_ratio=b_ratio,
    )
    return model, graphdef, base, optimizer, initial_state(adapters, base, optimizer)


def windows(n, k, batch, seed=0, supervised=0.5):
    """Random rows whose numbers of supervised tokens differ widely."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        tokens = rng.integers(0, VOCABULARY, (k, batch, LENGTH + 1)).astype(np.int32)
        share = rng.random((k, batch, 1)) ** 2 * 2 * supervised
        mask = rng.random((k, batch, LENGTH)) < share
        mask[0, 0, 0] = True
        yield Window(tokens[..., :-1], tokens[..., 1:], mask)


def run(graphdef, base, optimizer, state, rows, key=0):
    losses = []
    for window in rows:
        state, metrics = train_step(
            state, base, window, jax.random.key(key), graphdef=graphdef, optimizer=optimizer
        )
        losses.append(float(metrics.loss_sum) / int(metrics.tokens))
    return state, losses


def build_full(folder, *, precision="fp32", k=1):
    graphdef, learned, frozen = split_learned(load_model(folder, precision), "full")
    optimizer = make_optimizer(
        {"learned": learned, "frozen": frozen}, optax.constant_schedule(1e-3), weight_decay=0.01,
        max_grad_norm=0.0, accumulation=k,
    )  # fmt: skip
    return graphdef, frozen, optimizer, initial_state(learned, frozen, optimizer)
