"""`python -m train.sample`: makes the bundled sample, from its text to Meta's files.

    seed -> world -> plain text -> tokenizer.model
                  -> windows of text -> a LLaMA, pre-trained -> consolidated.00.pth, params.json
                  -> instructions -> train.json, heldout.json

The same seed and versions give the same bytes on the same machine.
"""
