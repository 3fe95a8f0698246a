"""`python -m tests.faults`"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # random_models.py and this package
    os.environ |= {  # before JAX is imported
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # programs this small
        "OMP_NUM_THREADS": "1",
    }
    from faults.campaign import main

    main()
