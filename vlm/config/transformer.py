"""Configs of a transformer's norm, position, attention and MLP. Encoder and decoder use the same config classes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vlm.config.base import ADDED_LATER, Config, Probability


class LayerNormConfig(Config):
    """LayerNorm (Ba et al., 2016).

    Attributes:
        eps: number added to the variance, which prevents a division by zero.
    """

    kind: Literal["layer"] = "layer"
    eps: float = 1e-5


class RmsNormConfig(Config):
    """RMSNorm (Zhang and Sennrich, 2019).

    Attributes:
        eps: number added to the mean square, which prevents a division by zero.
        offset: whether the norm multiplies by 1 + weight instead of by weight.
    """

    kind: Literal["rms"]
    eps: float = 1e-6
    offset: bool = False


NormConfig = Annotated[LayerNormConfig | RmsNormConfig, Field(discriminator="kind")]


class LearnedPositionConfig(Config):
    """Learned position encoding: a learned vector for each position is added to the input of the first block."""

    kind: Literal["learned"] = "learned"


class RotaryPositionConfig(Config):
    """Position encoding by rotation of queries and keys (Su et al., 2021).

    Attributes:
        base: base of the rotation frequencies. With a larger base, the angles change more slowly along the sequence,
            except the angles of the first pair of channels.
    """

    kind: Literal["rotary"]
    base: float = 10_000.0


class AxialPositionConfig(Config):
    """Position encoding of patches by rotation of queries and keys, by row and column of the patch (Heo et al., 2024).

    One half of the rotated pairs of channels encodes the row of a patch, and the other half encodes the column. Class
    token and registers are not rotated.

    Attributes:
        base: base of the rotation frequencies.
        coordinates: how the position of a patch is counted. `index` counts rows and columns from 0. `centred` uses
            coordinates from -1 at one edge of the picture to 1 at the opposite edge. A pair of channels with frequency
            1 makes a full turn over a distance of 1 (Simeoni et al., 2025).
        offset: number that is added to the row number and the column number of each patch.
        grid: number of patches per side of the grid to which row and column numbers are scaled, or null for no scaling.
            If the weights were trained at another resolution, set `grid` to the number of patches per side at that
            resolution. With `coordinates: centred`, `grid` has no effect.
        first: whether the first half of the rotated pairs of channels encodes the `row` or the `column` of a patch.
        learned: whether learned position vectors are also added to the input.
    """

    kind: Literal["axial"]
    base: float = 100.0
    coordinates: Literal["index", "centred"] = "index"
    offset: float = 0.0
    grid: PositiveInt | None = None
    first: Literal["row", "column"] = "row"
    learned: bool = False


class MixedPositionConfig(Config):
    """Position encoding of patches by rotation of queries and keys, with learned frequencies (Heo et al., 2024).

    Each head of each block learns a frequency along the rows and a frequency along the columns for each rotated pair of
    channels. Class token and registers are not rotated.

    Attributes:
        learned: whether learned position vectors are also added to the input.
    """

    kind: Literal["mixed"]
    learned: bool = False


class RelativePositionConfig(Config):
    """Position encoding of patches by a learned bias of the attention scores (Liu et al., 2022).

    For two patches, an MLP computes the bias of each head. The inputs of the MLP are the logarithms of the distance in
    rows and of the distance in columns. The attention scores of the class token and of registers get no bias.

    Attributes:
        mlp_width: number of channels between the two linear layers of the MLP.
        shared: whether all blocks use the same MLP, instead of one MLP per block.
    """

    kind: Literal["relative"]
    mlp_width: PositiveInt = 128
    shared: bool = False


PositionConfig = Annotated[
    LearnedPositionConfig | RotaryPositionConfig | AxialPositionConfig | MixedPositionConfig | RelativePositionConfig,
    Field(discriminator="kind"),
]


def adds_position_vectors(position: PositionConfig) -> bool:
    """Return whether learned position vectors are added to the input of the first block."""
    match position.kind:
        case "axial" | "mixed":
            return position.learned
        case _:
            return position.kind == "learned"


class AttentionConfig(Config):
    """Multi-head attention, or grouped-query attention if `num_kv_heads` is less than `num_heads`.

    Attributes:
        num_heads: number of query heads.
        num_kv_heads: number of key-value heads.
        head_dim: number of channels of a head.
        bias: whether the projections of queries, keys and values have a bias.
        out_bias: whether the output projection has a bias, or null for the same value as `bias`.
        windows: window size of each layer, in positions. A window of n positions contains a position itself and n - 1
            positions before it; null means no limit. If `windows` has fewer entries than the transformer has layers,
            `windows` is repeated.
        soft_cap: bound of the absolute attention scores, which become soft_cap * tanh(score / soft_cap) (Gemma Team,
            2024), or null for no bound.
        scale: factor by which attention scores are multiplied, or null for head_dim ** -0.5.
        qk_norm: whether the queries and the keys of each head are normalised, by norms with the settings of `norm`
            (Dehghani et al., 2023).
    """

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    bias: bool = False
    out_bias: Annotated[bool | None, ADDED_LATER] = None
    windows: Annotated[tuple[PositiveInt | None, ...], Field(min_length=1)] = (None,)
    soft_cap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    qk_norm: Annotated[bool, ADDED_LATER] = False

    @property
    def has_out_bias(self) -> bool:
        """True if the projection of the output has a bias."""
        return self.bias if self.out_bias is None else self.out_bias

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


class PlainMlpConfig(Config):
    """MLP of two linear layers with an activation function in between.

    Attributes:
        mlp_width: number of channels between the two linear layers.
        activation: activation function between the two linear layers.
        bias: whether the linear layers have a bias.
    """

    kind: Literal["plain"] = "plain"
    mlp_width: PositiveInt
    activation: Activation = "gelu"
    bias: bool = True


class GatedMlpConfig(Config):
    """MLP with a gated linear unit (Shazeer, 2020). With silu, this MLP is SwiGLU, and with gelu_tanh, it is GeGLU.

    Attributes:
        mlp_width: number of channels of the gate, and of the values that the gate multiplies.
        activation: activation function of the gate.
        bias: whether the linear layers have a bias.
    """

    kind: Literal["gated"]
    mlp_width: PositiveInt
    activation: Activation = "silu"
    bias: bool = False


DenseMlpConfig = Annotated[PlainMlpConfig | GatedMlpConfig, Field(discriminator="kind")]


class MoeMlpConfig(Config):
    """Sparse mixture of experts (Shazeer et al., 2017): a router sends each token to `top_k` of `num_experts` MLPs.

    Attributes:
        num_experts: number of experts (MLPs) per layer.
        top_k: number of experts per token. The experts' outputs are weighted by a softmax over the chosen experts.
            `top_k` must be at least 2, because the softmax over one expert is constant and gives the router no
            gradient.
        expert: config of the MLP of each expert.
        noisy: whether noise is added to the router's logits during training. The scale of the noise is learned.
        balance_weight: weight of the load-balance loss (Fedus et al., 2021). The load-balance loss of a layer is 1 if
            all experts receive the same number of tokens.
        z_weight: weight of the router z-loss (Zoph et al., 2022).
    """

    kind: Literal["moe"]
    num_experts: Annotated[int, Field(ge=2)]
    top_k: Annotated[int, Field(ge=2)] = 2
    expert: DenseMlpConfig
    noisy: bool = False
    balance_weight: NonNegativeFloat = 0.01
    z_weight: NonNegativeFloat = 0.001

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self


MlpConfig = Annotated[PlainMlpConfig | GatedMlpConfig | MoeMlpConfig, Field(discriminator="kind")]


class TransformerConfig(Config):
    """Config of a stack of transformer blocks. The encoder and the decoder each have one stack.

    Attributes:
        width: number of channels of the residual stream.
        depth: number of transformer blocks.
        attention: config of the attention layer in each block.
        mlp: config of the MLP in each block.
        norm: config of the norms. By default, the transformer has a norm before each attention layer, before each MLP
            and after the last block.
        sandwich: whether the outputs of attention layer and MLP are also normalised before they are added to the
            residual stream (Gemma Team, 2024).
        input_norms: whether a norm comes before each attention layer and each MLP. If false, `sandwich` must be true,
            and each attention layer and each MLP has only a norm of its outputs (Liu et al., 2022).
        parallel: whether attention layer and MLP read the same normalised input, and both outputs are added to the
            residual stream together (Dehghani et al., 2023).
        layer_scale: initial value of layer scale, or null for no layer scale. Layer scale multiplies each channel of
            the outputs of attention layers and MLPs by a learned factor (Touvron et al., 2021).
        position: config of the position encoding.
        dropout: dropout probability of the embeddings, the attention weights and the outputs of attention layers and
            MLPs.
        stochastic_depth: probability that the last block skips a branch (attention layer or MLP) for a row of the batch
            in training (Huang et al., 2016). From the first block to the last block, the probability rises linearly.
    """

    width: PositiveInt
    depth: PositiveInt
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = LayerNormConfig()
    sandwich: bool = False
    input_norms: Annotated[bool, ADDED_LATER] = True
    parallel: Annotated[bool, ADDED_LATER] = False
    layer_scale: PositiveFloat | None = None
    position: PositionConfig = LearnedPositionConfig()
    dropout: Probability = 0.0
    stochastic_depth: Annotated[Probability, ADDED_LATER] = 0.0

    @model_validator(mode="after")
    def _check_rotary_head_dim(self) -> Self:
        kind, head_dim = self.position.kind, self.attention.head_dim
        if kind == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")
        if kind in ("axial", "mixed") and head_dim % 4:
            raise ValueError(f"{kind} positions need a head_dim that is a multiple of 4, got {head_dim}")
        return self

    @model_validator(mode="after")
    def _check_norms(self) -> Self:
        if not self.input_norms and not self.sandwich:
            raise ValueError("input_norms: false needs sandwich: true, because each branch needs a norm")
        if not self.input_norms and self.parallel:
            raise ValueError("parallel: true needs input_norms: true, because both branches read one normalised input")
        return self
