"""Vision transformers of timm whose blocks differ from the usual block.

- `timm_relative`: relative positions instead of position vectors, if the name contains `relpos`. In `vit_srelpos_*`,
  all blocks share the positions; in `vit_relpos_*`, each block has its own positions. If the name contains `rpn`, the
  norms come after attention and MLP instead of before (Liu et al., 2022).
- `timm_parallel`: attention and MLP in parallel (Dehghani et al., 2023). One matrix computes the inputs of both layers.
- `timm_branches`: two parallel attention layers, followed by two parallel MLPs (`18x2` in the name, Touvron et al.,
  2022). Two parallel attention layers equal one layer with twice as many heads, and two parallel MLPs equal one MLP of
  twice the width. Each parallel layer has its own norm and layer scale, so an import multiplies the norm and the layer
  scale into the weights of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vlm.config import ModelConfig
from vlm.weights.config_fields import UNKNOWN, ConfigField, Settings, constant, required, value_at, write_only
from vlm.weights.family import Family
from vlm.weights.rules import Rule, WeightTable, rename, split
from vlm.weights.tables import timm
from vlm.weights.tables.gemma import qkv_sizes

TRANSFORMER, HEADS = timm.TRANSFORMER, timm.HEADS
POSITION = f"{TRANSFORMER}.position"
BLOCK = "encoder.blocks.{i}."


def _family(
    name: str, pattern: str, fields: Iterable[ConfigField], table: Callable[[ModelConfig], WeightTable]
) -> Family:
    return Family(
        name,
        "encoder",
        timm.selector(pattern),
        tuple(fields),
        table,
        fixed_settings={},
        without_effect=timm.WITHOUT_EFFECT,
        image_processor=None,
        exportable=False,
    )


# ------------------------------------------------------------------------------------------------ relative positions


def _is_relative(name: str) -> bool:
    return "relpos" in name


RELATIVE_FIELDS = (
    *timm.fields_except(f"{POSITION}.kind", f"{TRANSFORMER}.sandwich", f"{TRANSFORMER}.input_norms"),
    timm.by_name(f"{POSITION}.kind", lambda name: "relative" if _is_relative(name) else "learned"),
    timm.by_name(f"{POSITION}.shared", lambda name: "_srelpos_" in name if _is_relative(name) else None),
    timm.by_name(f"{TRANSFORMER}.sandwich", lambda name: "_rpn_" in name),
    timm.by_name(f"{TRANSFORMER}.input_norms", lambda name: "_rpn_" not in name),
    required("rel_pos_type", "mlp"),
    write_only("rel_pos_dim", value_at(f"{POSITION}.mlp_width")),
)


def _relative_table(config: ModelConfig) -> WeightTable:
    transformer = config.vision.transformer
    own = []
    if transformer.position.kind == "relative":
        shared = transformer.position.shared
        theirs = "shared_rel_pos" if shared else "blocks.{i}.attn.rel_pos"
        ours = f"encoder.relative.{0 if shared else '{i}'}.mlp"
        own += [rename(f"{theirs}.mlp.fc1.*", f"{ours}.up.*"), rename(f"{theirs}.mlp.fc2.*", f"{ours}.out.*")]
    if not transformer.input_norms:
        own += [
            rename("blocks.{i}.norm1.*", f"{BLOCK}attention_post_norm.*"),
            rename("blocks.{i}.norm2.*", f"{BLOCK}mlp_post_norm.*"),
        ]
    return timm.with_rules(timm.table(config), own)


# ------------------------------------------------------------------------------------------------ parallel blocks


def _qk_norm(settings: Settings) -> object:
    return settings.get("qk_norm", "_xp_" in settings["architecture"])


PARALLEL_FIELDS = (
    *timm.fields_except(f"{TRANSFORMER}.parallel", f"{TRANSFORMER}.norm.kind", f"{HEADS}.qk_norm", "qk_norm"),
    constant(f"{TRANSFORMER}.parallel", True),
    timm.by_name(f"{TRANSFORMER}.norm.kind", lambda name: "rms" if "_xp_" in name else "layer"),
    timm.by_name(f"{TRANSFORMER}.norm.offset", lambda name: False if "_xp_" in name else None),
    ConfigField(f"{HEADS}.qk_norm", "qk_norm", value_at(f"{HEADS}.qk_norm"), _qk_norm),
)


def _to_both(theirs: str, ours: Sequence[str]) -> Rule:
    """Return a rule that copies one tensor of the file to several parameters, so that these parameters are equal."""
    return Rule((theirs,), tuple(ours), lambda tensors: [tensors[0]] * len(ours), lambda tensors: [tensors[0]])


def _parallel_table(config: ModelConfig) -> WeightTable:
    attention, mlp = config.vision.transformer.attention, config.vision.transformer.mlp
    assert mlp.kind == "plain", "config fields are compared before a table is built"
    sizes = (mlp.mlp_width, sum(qkv_sizes(attention)))
    inputs = [f"{BLOCK}mlp.up.", f"{BLOCK}attention.qkv."]
    own = [
        rename("blocks.{i}.in_norm.*", f"{BLOCK}attention_norm.*"),
        split("blocks.{i}.in_proj.weight", [f"{each}weight" for each in inputs], sizes),
        split("blocks.{i}.in_proj.bias", [f"{each}bias" for each in inputs], sizes)
        if attention.bias
        else rename("blocks.{i}.mlp_bias", f"{inputs[0]}bias"),
        rename("blocks.{i}.q_norm.*", f"{BLOCK}attention.q_norm.*"),
        rename("blocks.{i}.k_norm.*", f"{BLOCK}attention.k_norm.*"),
        rename("blocks.{i}.attn_out_proj.*", f"{BLOCK}attention.out.*"),
        rename("blocks.{i}.mlp_out_proj.*", f"{BLOCK}mlp.out.*"),
        _to_both("blocks.{i}.ls.gamma", [f"{BLOCK}attention_scale", f"{BLOCK}mlp_scale"]),
    ]
    return timm.with_rules(timm.table(config), own)


# ------------------------------------------------------------------------------------------------ parallel branches

NUM_BRANCHES = 2


def _num_heads(settings: Settings) -> object:
    found = timm.num_heads(settings)
    return found if found is UNKNOWN else NUM_BRANCHES * found


BRANCH_FIELDS = (
    *timm.fields_except(f"{HEADS}.num_heads", f"{HEADS}.num_kv_heads"),
    *(
        ConfigField(f"{HEADS}.{key}", "num_heads", value_at(f"{HEADS}.{key}"), _num_heads)
        for key in ("num_heads", "num_kv_heads")
    ),
)


def _join_branches(theirs: Sequence[str], ours: Sequence[str], parts: int) -> Rule:
    """Return a rule that joins parallel layers into one layer, and multiplies their norms and scales into its weights.

    Args:
        theirs: for each branch, the names of seven tensors (weight and bias of the norm, of the first linear layer and
            of the second linear layer, and the layer scale).
        ours: names of weight and bias of our norm, first linear layer and second linear layer.
        parts: number of equal parts of the first linear layer's outputs; 3 for queries, keys and values.
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        branches = [tensors[start : start + 7] for start in range(0, len(tensors), 7)]
        weights, biases, outputs, output_bias = [], [], [], torch.zeros(len(branches[0][6]))
        for norm, norm_bias, weight, bias, output, bias_of_output, scale in (map(_double, each) for each in branches):
            weights.append(torch.unflatten(weight * norm, 0, (parts, -1)))
            biases.append(torch.unflatten(bias + weight @ norm_bias, 0, (parts, -1)))
            outputs.append(output * scale[:, None])
            output_bias = output_bias + bias_of_output * scale
        width = len(branches[0][0])
        joined = [torch.cat(each, dim=1).flatten(0, 1) for each in (weights, biases)]
        return [torch.ones(width), torch.zeros(width), *joined, torch.cat(outputs, dim=1), output_bias]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        """Divide a layer into branches, and return branches without norms and scales. An import uses only the shapes of
        the returned tensors.
        """
        norm, norm_bias, weight, bias, output, output_bias = tensors
        first, first_bias, second = weight.chunk(NUM_BRANCHES), bias.chunk(NUM_BRANCHES), output.chunk(NUM_BRANCHES, 1)
        return [
            tensor
            for branch in range(NUM_BRANCHES)
            for tensor in (
                norm, norm_bias, first[branch], first_bias[branch], second[branch], output_bias, torch.ones_like(norm)
            )
        ]  # fmt: skip

    return Rule(tuple(theirs), tuple(ours), read, write)


def _double(tensor: Tensor) -> Tensor:
    """Convert a tensor to fp64, so that the products of norms, scales and weights are rounded only once."""
    return tensor.double()


def _branch_names(branch: str, linear: Sequence[str]) -> list[str]:
    """Return name templates of the seven tensors of each branch."""
    modules = ("norm", *linear)
    return [
        f"blocks.{{i}}.{branch}.{index}.{name}"
        for index in range(NUM_BRANCHES)
        for name in (*(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")), "ls.gamma")
    ]


def _branch_table(config: ModelConfig) -> WeightTable:
    def ours(*modules: str) -> list[str]:
        return [f"{BLOCK}{module}.{kind}" for module in modules for kind in ("weight", "bias")]

    attention = _branch_names("attns", ("attn.qkv", "attn.proj"))
    mlp = _branch_names("ffns", ("mlp.fc1", "mlp.fc2"))
    own = [
        _join_branches(attention, ours("attention_norm", "attention.qkv", "attention.out"), parts=3),
        _join_branches(mlp, ours("mlp_norm", "mlp.up", "mlp.out"), parts=1),
    ]
    return timm.with_rules(timm.table(config), own)


FAMILIES = (
    _family("timm_relative", timm.RELATIVE, RELATIVE_FIELDS, _relative_table),
    _family("timm_parallel", timm.PARALLEL, PARALLEL_FIELDS, _parallel_table),
    _family("timm_branches", timm.BRANCHES, BRANCH_FIELDS, _branch_table),
)
