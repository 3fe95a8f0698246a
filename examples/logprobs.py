"""Answers with the log-probability of every token, and several samples of one prompt."""

import math

import jllama

model = jllama.load_model("models/sample", "fp32")
tokenizer = jllama.load_tokenizer("models/sample")
prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("Berlin is", "One and one")]

greedy = jllama.Sampling(temperature=0.0)
for answer in jllama.generate_with_logprobs(model, prompts, 8, greedy):
    for token, logprob in zip(answer.ids, answer.logprobs, strict=True):
        print(f"{tokenizer.piece(token)!r:12} {math.exp(logprob):6.1%}")
    print(f"the whole: {sum(answer.logprobs):.2f} nats\n")

warm = jllama.Sampling(temperature=1.0, top_p=1.0)
found = jllama.generate_with_logprobs(model, prompts[:1], 8, warm, seed=0, samples=4)
for answer in sorted(found, key=lambda answer: -sum(answer.logprobs)):
    print(f"{sum(answer.logprobs):7.2f} nats  {tokenizer.decode(answer.ids)!r}")
