"""What the compiled functions ask of XLA, beside its defaults, and why."""

from collections.abc import Mapping
from types import MappingProxyType

Options = Mapping[str, bool | int | str]

# Frozen weights in codes are made into numbers inside the kernel that multiplies with them.
_FUSED = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
# Products of one input would become one, of copies of their weights side by side.
_APART = {"xla_gpu_dot_merger_threshold_mb": 0}
# With few rows a product would be cut into parts that another kernel sums; of weights in codes,
# copies would be cut.
_WHOLE = {"xla_disable_hlo_passes": "splitk-rewriter"}

TRAINING: Options = MappingProxyType(
    {
        # It keeps the inputs of all adapters' gradients to the end: 3.1 GiB for 7B at 8 x 1024.
        "xla_gpu_enable_latency_hiding_scheduler": False,
        **_APART,
        **_FUSED,
    }
)
READING: Options = MappingProxyType({**_APART, **_FUSED})  # prompts and held-out rows
# With few rows the number of kernels counts: products of one input become one, whatever their size.
DECODING: Options = MappingProxyType({"xla_gpu_dot_merger_threshold_mb": 1024, **_WHOLE})

# Beside the above, where weights are in codes: a card's autotuner may not choose cuBLAS, which
# multiplies with a copy of the weight that no plan has counted.
CODES: Options = MappingProxyType({"xla_gpu_cublas_fallback": False})
DECODING_CODES: Options = MappingProxyType({**_APART, **_FUSED, **_WHOLE, **CODES})
