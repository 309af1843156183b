"""Opening a model in the order of its price: files, tokenizer and mesh first, weights last."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jax.sharding import Mesh

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.model.adapter import check_adapter, fingerprint, load_adapter
from gemma2_grpo.model.architecture import Architecture, read_architecture
from gemma2_grpo.model.chat_template import makes_other_prompts
from gemma2_grpo.model.hub.find import find_model
from gemma2_grpo.model.load import load_weights, random_weights
from gemma2_grpo.model.lora import add_lora, check_patterns
from gemma2_grpo.model.mesh import check_mesh, make_mesh, mesh_shape_at_hand
from gemma2_grpo.model.tokenizer import Tokenizer, load_tokenizer
from gemma2_grpo.model.weights import Model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """A model on the disk that is known to suit its configuration and the devices."""

    config: ModelConfig
    directory: Path
    architecture: Architecture
    tokenizer: Tokenizer
    mesh: Mesh

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the weights."""
        return fingerprint(self.directory)

    def check_adapters(self, saved: Path | None) -> None:
        """Checks, before any weights load, that adapters fit: new ones, or those of a folder.

        Raises:
            UserError: if they do not.
        """
        check_patterns(self.architecture, self.config.lora_modules)
        if saved:
            check_adapter(saved, self.config, self.sha256)

    def load_base(self) -> Model:
        """Loads the weights onto the mesh."""
        return load_weights(self.directory, self.config.dtype, self.mesh)

    def draw_base(self, seed: int) -> Model:
        """Draws random weights in place of those on the disk."""
        return random_weights(self.architecture, self.config.dtype, self.mesh, seed)

    def make_policy(self, base: Model, seed: int, saved: Path | None = None) -> Model:
        """Adds adapters to the base, which the policy shares: new ones, or those of a folder."""
        policy = add_lora(base, self.config, self.mesh, seed)
        if saved:
            load_adapter(policy, saved)
        return policy


def open_files(
    config: ModelConfig, *, adapts_mesh: bool = False, needs_weights: bool = True
) -> ModelFiles:
    """Finds a model and its tokenizer, and lays its mesh out; no weights are read.

    Args:
        config: Which model, and on what mesh.
        adapts_mesh: Use all present devices where there are too few for `mesh_shape`.
        needs_weights: False for a model that is to be trained from random weights.

    Raises:
        UserError: for a model that is not whole, or a mesh that does not suit it or the devices.
    """
    if not adapts_mesh:
        make_mesh(config.mesh_shape)  # Before a model is downloaded in vain.
    directory = find_model(config.model, needs_weights=needs_weights)
    if makes_other_prompts(directory):
        _log.warning(
            "warning: %s: its chat template makes other prompts than Gemma's turns, which are used "
            "here; take a model that was trained on those",
            directory,
        )
    architecture = read_architecture(directory)
    if adapts_mesh:
        shape = mesh_shape_at_hand(config.mesh_shape, architecture)
        config = replace(config, mesh_shape=shape)
    mesh = make_mesh(config.mesh_shape)
    check_mesh(architecture, mesh)
    return ModelFiles(config, directory, architecture, load_tokenizer(directory), mesh)
