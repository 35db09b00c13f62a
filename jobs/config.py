"""`lakesight config`: print a resolved run config, or list the models of conf/model/."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.common import JsonOption, PlatformOption, RunOption, SetOption, open_output, refuse_options
from jobs.output import CommandOutput, number
from pipelines.config import available, load_model, load_run
from vlm.config import Config, ModelConfig


class ModelSize(Config):
    """Parameter counts, FLOPs and picture size of a model in conf/model/.

    Attributes:
        name: name of the config file in conf/model/, without `.yml`.
        parameters: total number of parameters.
        active: number of parameters used for one token; a mixture of experts uses only part of its parameters.
        encoder: number of parameters of the encoder.
        decoder: number of parameters of the decoder.
        image_size: height and width of the input picture, in pixels.
        image_slots: number of sequence positions for one picture; 0 for a text-only model.
        flops: FLOPs of a forward pass with one picture (none for a text-only model) and a text of
            `generation.max_new_tokens` tokens (see `vlm.config.size`).
    """

    name: str
    parameters: int
    active: int
    encoder: int
    decoder: int
    image_size: int
    image_slots: int
    flops: int


def config(
    what: Annotated[
        Literal["run", "models"],
        typer.Argument(
            help="run: print the config of the run. models: list the models in conf/model/.", metavar="WHAT"
        ),
    ] = "run",
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a resolved run config, or list the models.

    A resolved run config contains every setting of the run after defaults and overrides are applied.

    \b
    Examples:
      lakesight config --run seemore --set train.steps=500
      lakesight config models
    """
    with open_output(as_json=as_json) as output:
        if what == "models":
            given = {"--run": run != "demo", "--platform": platform != "local", "--set": overrides}
            refuse_options(given, "the list has the models of conf/model/, which belong to no run")
            _print_models(output)
        else:
            _print_run(output, run, platform, overrides or [])


def _print_run(output: CommandOutput, run: str, platform: str, overrides: list[str]) -> None:
    import yaml

    resolved = load_run(run, platform=platform, overrides=overrides)
    output.text(yaml.safe_dump(resolved.model_dump(mode="json", by_alias=True), sort_keys=False, width=100), end="")
    output.report(resolved)


def _print_models(output: CommandOutput) -> None:
    models = [measure_model(name, load_model(name)) for name in available("model")]
    output.text(
        f"{'model':<15} {'parameters':>10} {'active':>8} {'encoder':>8} {'decoder':>8} {'GFLOP/sample':>12}  px, slots"
    )
    for model in models:
        total, *parts = map(_short, (model.parameters, model.active, model.encoder, model.decoder))
        counts = f"{total:>10} " + " ".join(f"{part:>8}" for part in parts)
        picture = f"{model.image_size}, {model.image_slots}" if model.image_slots else "text alone"
        output.text(f"{model.name:<15} {counts} {model.flops / 1e9:>12,.3f}  {picture}")
    output.report({"models": models})


def _short(count: int) -> str:
    """Format a number of parameters with at most three significant digits, such as `1.02 M`."""
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= size or unit == "K"
    )
    return f"{number(count / size)} {unit}"


def measure_model(name: str, model: ModelConfig) -> ModelSize:
    """Count the parameters and FLOPs of a model without building the model."""
    from vlm.config.parameters import count_parameters
    from vlm.config.size import flops_per_sample, inactive_parameters
    from vlm.text import learn

    vocab_size = learn(model.text, ()).vocab_size if model.text.kind == "chars" else model.text.vocab_size
    counts = count_parameters(model, vocab_size)
    return ModelSize(
        name=name,
        parameters=sum(counts),
        active=sum(counts) - inactive_parameters(model),
        encoder=counts.encoder,
        decoder=counts.decoder,
        image_size=model.image.size,
        image_slots=model.num_slots,
        flops=flops_per_sample(model, vocab_size),
    )
