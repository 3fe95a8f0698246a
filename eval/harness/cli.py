"""`python -m eval.harness.cli --model jllama ...`: lm_eval's own command line, which knows jllama.

lm_eval 0.4 looks a model up among those that were registered, and imports no package to find more.
"""

from eval.harness.command import need_lm_eval
from jllama.cli.command import ending
from jllama.cli.terminal import complain


def main() -> None:
    try:
        need_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import eval.harness.backend  # noqa: F401  # registers the model

        cli_evaluate()
    except Exception as error:
        known = ending(error)
        if known is None:
            raise
        complain(f"lm_eval: {known[1]}")
        raise SystemExit(known[0]) from None


if __name__ == "__main__":
    main()
