"""`bayesvlm fit` as a script, for launchers that take one.

    accelerate launch --num_processes 8 scripts/estimate_posterior.py MODEL DATASET --out DIR

The arguments are those of `bayesvlm fit`; see `--help`.
"""

from __future__ import annotations

import typer

from hf_bayesvlm.cli_fit import fit

if __name__ == "__main__":
    typer.run(fit)
