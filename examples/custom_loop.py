"""A training loop of one's own: jllama's model, adapters and loss, and a rule of optax."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jllama
from jllama.lora import attach, split
from jllama.loss import cross_entropy

model = jllama.load_model("models/sample", "fp32")
tokenizer = jllama.load_tokenizer("models/sample")
rows = json.loads((jllama.SAMPLE / "train.json").read_text())
prompts = [jllama.prompt_ids("plain", row, tokenizer) for row in rows]
answers = [[*tokenizer.encode(row["output"]), tokenizer.eos_id] for row in rows]
ids = np.zeros((len(rows), 64), np.int32)  # padded; what is learned is in the mask
learned = np.zeros((len(rows), 64), bool)
for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    ids[row, : len(prompt) + len(answer)] = prompt + answer
    learned[row, len(prompt) : len(prompt) + len(answer)] = True

attach(model, jllama.LoraConfig(rank=16, alpha=32.0, targets=("wq", "wv")), jax.random.key(0))
graphdef, adapters, base = split(model)
optimizer = optax.adamw(3e-3)
moments = optimizer.init(adapters)


@jax.jit
def step(adapters, moments, base, ids, learned):
    def loss(adapters):
        model = nnx.merge(graphdef, adapters, base)
        x, head = model.hidden(ids[:, :-1]), model.head_weight.matrix(jnp.float32)
        return cross_entropy(x, head, ids[:, 1:], learned[:, 1:], False) / learned.sum()

    value, slope = jax.value_and_grad(loss)(adapters)
    updates, moments = optimizer.update(slope, moments, adapters)
    return optax.apply_updates(adapters, updates), moments, value


for number, chosen in enumerate(np.random.default_rng(0).integers(len(rows), size=(60, 16))):
    adapters, moments, loss = step(adapters, moments, base, ids[chosen], learned[chosen])
    if number % 10 == 9:
        print(f"step {number + 1}: loss {loss:.3f}")

nnx.update(model, adapters)
question = jllama.prompt_ids("plain", {"prompt": "What is the capital of Canada?"}, tokenizer)
greedy = jllama.Sampling(temperature=0.0)
(answer,) = jllama.generate(model, [question], 32, greedy, stop_ids=tokenizer.stop_ids)
print(tokenizer.decode(answer))
