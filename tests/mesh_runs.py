"""The same training run on several meshes, one after the other: run as a program of its own.

    python tests/mesh_runs.py FOLDER MESH ... < settings.json

with XLA_FLAGS=--xla_force_host_platform_device_count=8, which must be set before JAX is imported.
Each MESH, as `--mesh` takes it, makes FOLDER/MESH, where shards.json says what each device holds.
"""

import json
import sys
from pathlib import Path

import jax
from flax import nnx

from jllama.folders.load import load_model
from jllama.sharding import mesh_shape, path_name
from train import trainer
from train.config import TrainConfig

ROWS = 8  # in a micro-batch, whatever the mesh


def shards(model):
    """{"layers.0.attention.wq.weight": {"shape": [64, 64], "parts": [[32, 64], ...]}, ...}"""
    return {
        path_name(path): {
            "shape": leaf.shape,
            "parts": [part.data.shape for part in leaf.addressable_shards],
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
    }


def train(run, mesh, settings):
    config = TrainConfig(
        **settings, mesh=mesh, output_dir=str(run),
        micro_batch_size=ROWS // mesh_shape(mesh).rows,
    )  # fmt: skip

    def noted(*args, **more):
        model = load_model(*args, **more)
        run.mkdir(exist_ok=True)
        run.with_name(run.name + ".json").write_text(json.dumps(shards(model)))
        return model

    trainer.load_model = noted
    trainer.Trainer(config=config).train()


if __name__ == "__main__":
    folder, *meshes = sys.argv[1:]
    settings = json.load(sys.stdin)
    for mesh in meshes:
        train(Path(folder) / (mesh or "one"), mesh, settings)
