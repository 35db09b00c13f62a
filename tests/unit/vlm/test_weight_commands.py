"""Tests that `import-weights` converts a published folder to a checkpoint, and `export-weights` converts it back."""

from __future__ import annotations

import errno
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import ALPHABET, tiny_config
from typer.testing import CliRunner, Result

import vlm
from jobs.cli import app
from jobs.import_record import describe_import
from jobs.import_weights import _next_command
from pipelines.config import load_run
from vlm import text
from vlm.checkpoint import load_model, save_model
from vlm.config import ModelConfig
from vlm.errors import UserError
from vlm.factory import build_model
from vlm.weights.family import Part
from vlm.weights.load import ImportReport

ENCODER, DECODER = ("--part", "encoder", "--as", "vit"), ("--part", "decoder", "--as", "gpt2")


@pytest.fixture(autouse=True)
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Create a working directory with a model config in `conf/model/mine.yml` and a checkpoint in `trained`."""
    monkeypatch.chdir(tmp_path)
    raw = tiny_config("plain").model_dump(mode="json")
    raw["decoder"]["tie_embeddings"] = True
    raw["vision"]["transformer"]["attention"]["out_bias"] = True  # every ViT of transformers has this bias
    config = ModelConfig.model_validate(raw)
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/mine.yml").write_text(yaml.safe_dump(raw))
    torch.manual_seed(1)
    tokenizer = text.learn(config.text, ())
    save_model(Path("trained"), build_model(config, tokenizer.vocab_size), tokenizer)
    return config


def lakesight(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def report(*arguments: str) -> Any:
    done = lakesight(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    done = lakesight(*arguments)
    assert isinstance(done.exception, UserError), done.exception
    assert done.exception.fix
    return str(done.exception)


def test_exported_parts_can_be_imported_and_all_other_parameters_are_initialised() -> None:
    report("export-weights", "trained", *ENCODER, "--out", "vit")
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    done = lakesight(
        "import-weights", "--model", "mine", "--encoder", "vit", "--decoder", "gpt2", "--seed", "7", "--out", "again"
    )
    assert done.exit_code == 0, done.output
    assert "fresh       projector.bias, projector.weight" in done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("next "))
    words = shlex.split(line)[1:]
    assert words[:4] == ["lakesight", "train", "--run", "RUN"]
    train = load_run("seemore_vit_gpt2", overrides=words[5::2]).train
    assert (train.start_from, [[*stage.rates] for stage in train.stages]) == ("again", [["projector.*"]])
    before, after = (dict(load_model(Path(folder))[0].named_parameters()) for folder in ("trained", "again"))
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    assert differ == ["projector.weight"]


def test_the_next_command_after_an_import_trains_random_parameters_or_asks_a_complete_model(tmp_path: Path) -> None:
    def pattern(*fresh: str) -> str:
        words = _next_command(Path("out"), ImportReport(parameters=1, parts=(), fresh=fresh))
        train = load_run("seemore_vit_gpt2", overrides=words[5::2]).train
        (name,) = train.stages[0].rates
        return name

    assert _next_command(Path("out"), ImportReport(parameters=1, parts=(), fresh=()))[:2] == ["lakesight", "ask"]
    assert pattern("encoder.blocks.{0..3}.mlp.up.weight", "projector.bias") == "encoder.*|projector.*"
    blocks = "decoder.cross_blocks.{0..2}.attention_gate"
    found = pattern(blocks, "projector.latents")
    assert found == "decoder.cross_blocks..*.attention_gate|projector.*"
    assert re.fullmatch(found, "decoder.cross_blocks.2.attention_gate")


def test_a_repeated_import_prints_the_same_report_and_writes_nothing() -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    command = ["import-weights", "--model", "mine", "--decoder", "gpt2", "--out", "out"]
    first = report(*command)
    written = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert report(*command) == first
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()} == written
    assert "is not empty" in refused(*command, "--seed", "1")
    config = Path("gpt2/config.json")
    config.write_text(config.read_text().replace("{", '{"name_or_path": "other",', 1))
    assert "is not empty" in refused(*command)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_repeated_import_writes_a_missing_file_again_and_refuses_a_changed_file(name: str) -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    command = ["import-weights", "--model", "mine", "--decoder", "gpt2", "--out", "out"]
    first = report(*command)
    written = (Path("out") / name).read_bytes()
    (Path("out") / name).unlink()
    assert report(*command) == first
    assert (Path("out") / name).read_bytes() == written
    (Path("out") / name).write_bytes(written[:-1])
    assert f"has changed since it was imported. Where: out. Got: {name}." in refused(*command)
    record = json.loads(Path("out/import.json").read_text())
    Path("out/import.json").write_text(json.dumps({key: record[key] for key in ("request", "tokens", "report")}))
    (Path("out") / name).unlink()
    assert report(*command) == first, "a record of an earlier release has no SHA-256"
    assert (Path("out") / name).read_bytes() == written


def test_own_weights_that_replace_an_imported_checkpoint_are_not_reported_as_imported() -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    command = ["import-weights", "--model", "mine", "--decoder", "gpt2", "--out", "out"]
    report(*command)
    vlm.load("trained", device="cpu").save("out")
    assert "is not empty" in refused(*command)


def test_an_import_with_a_changed_tokenizer_file_outside_the_imported_folders_is_another_import(
    trained: ModelConfig,
) -> None:
    Path("vit").mkdir()
    Path("vit/config.json").write_text("{}")
    published = {"kind": "json", "path": "tokenizer.json", "vocab_size": 290, "bos": "a", "eos": "b", "pad": "c"}
    config = ModelConfig.model_validate(trained.model_dump() | {"text": published})
    Path("tokenizer.json").write_text("first")
    folders: dict[Part, Path] = {"encoder": Path("vit")}
    first = describe_import(config, folders, seed=0)
    assert describe_import(config, folders, seed=0).is_recorded_as(first)
    Path("tokenizer.json").write_text("second")
    second = describe_import(config, folders, seed=0)
    assert not second.is_recorded_as(first)
    # Earlier releases recorded no tokenizer file outside of the folders.
    earlier = first.model_copy(update={"sources": {"encoder": first.sources["encoder"]}})
    assert second.is_recorded_as(earlier)
    assert not describe_import(config, folders, seed=1).is_recorded_as(earlier)


def test_a_symbolic_link_to_a_missing_file_is_an_error_that_names_the_link() -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    Path("gpt2/model.safetensors").rename("gpt2/moved")
    Path("gpt2/model.safetensors").symlink_to("nowhere")
    command = ["import-weights", "--model", "mine", "--decoder", "gpt2", "--out", "out"]
    assert "Where: gpt2/model.safetensors. Got: No such file or directory" in refused(*command)
    assert not Path("out").exists()


def test_an_import_that_a_full_disk_interrupted_succeeds_when_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    command = ["import-weights", "--model", "mine", "--decoder", "gpt2", "--out", "out"]

    def fill_disk(folder: Path, *_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.checkpoint.save_model", fill_disk)
        assert lakesight(*command).exit_code != 0
    assert Path("out/model.safetensors").read_bytes() == b"half"
    imported = report(*command)
    assert imported["parameters"] == sum(p.numel() for p in load_model(Path("out"))[0].parameters())


def test_the_values_of_parameters_that_an_import_initialises_depend_only_on_the_seed() -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    weights = {}
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        torch.manual_seed(len(out) + ord(out))
        report("import-weights", "--model", "mine", "--decoder", "gpt2", "--seed", str(seed), "--out", out)
        weights[out] = load_model(Path(out))[0].get_parameter("encoder.stem.weight")
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


def test_the_import_report_names_resampled_position_embeddings() -> None:
    report("export-weights", "trained", *ENCODER, "--out", "vit")
    imported = report(
        "import-weights", "--model", "mine", "--set", "model.image.size=32", "--encoder", "vit", "--out", "larger"
    )
    assert imported["parts"][0]["resampled"] == ["encoder.position from 5 rows"]
    assert load_model(Path("larger"))[0].get_parameter("encoder.position").shape == (1, 17, 16)


def test_parameters_that_an_import_initialises_have_the_same_distribution_as_in_a_new_model(
    trained: ModelConfig,
) -> None:
    """Check mean and standard deviation, which would differ for a parameter with uninitialised memory."""
    report("export-weights", "trained", *ENCODER, "--out", "vit")
    report("import-weights", "--model", "mine", "--encoder", "vit", "--seed", "3", "--out", "out")
    torch.manual_seed(3)
    new = dict(build_model(trained, text.learn(trained.text, ()).vocab_size).named_parameters())
    for name, parameter in load_model(Path("out"))[0].named_parameters():
        if name.startswith("decoder."):
            assert abs(float(parameter.mean() - new[name].mean())) < 0.1, name
            assert abs(float(parameter.std() - new[name].std())) < 0.1, name


MISTAKES = {
    "no folder": (["--model", "mine"], "no folder"),
    "whole model and part": (
        ["vit", "--model", "mine", "--encoder", "vit"],
        "a folder with the whole model and a folder with a part",
    ),
    "no such model": (["vit", "--model", "mime"], "did you mean 'mine'?"),
    "a value of the wrong type": (
        ["--encoder", "vit", "--model", "mine", "--set", "model.image.size=big"],
        "image.size",
    ),
    "no such folder": (["--encoder", "nowhere", "--model", "mine"], "the folder does not exist. Where: --encoder"),
    "another family": (["--decoder", "vit", "--model", "mine"], "which is a family for the encoder"),
    "other sizes": (
        ["--encoder", "vit", "--model", "mine", "--set", "model.vision.transformer.depth=3"],
        "num_hidden_layers in config.json gives 2, the model has 3",
    ),
    "tokenizer to be learned": (
        ["--encoder", "vit", "--model", "mine", "--set", "model.text={kind: bpe}"],
        "text.kind",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_arguments_of_import_weights_are_an_error_and_write_no_file(mistake: str) -> None:
    report("export-weights", "trained", *ENCODER, "--out", "vit")
    arguments, message = MISTAKES[mistake]
    assert message in refused("import-weights", *arguments, "--out", "out")
    assert not Path("out").exists()


def test_weight_commands_do_not_overwrite_existing_files() -> None:
    assert "is not empty" in refused("export-weights", "trained", *ENCODER, "--out", "trained")
    assert "is not empty" in refused("import-weights", "trained", "--model", "mine", "--out", "trained")
    assert "gemma, gemma2, gpt2" in refused(
        "export-weights", "trained", "--part", "decoder", "--as", "vit", "--out", "x"
    )
    assert "config.json. Got: no such file or directory. Fix:" in refused(
        "export-weights", "conf", *ENCODER, "--out", "x"
    )
    Path("conf/config.json").write_text("{}")
    assert "Got: image: missing; text: missing; vision: missing; and 1 more. Fix:" in refused(
        "export-weights", "conf", *ENCODER, "--out", "x"
    )


def test_only_the_decoder_of_a_text_only_model_can_be_exported(trained: ModelConfig) -> None:
    config = trained.model_copy(update={"text_only": True})
    tokenizer = text.learn(config.text, ())
    save_model(Path("spoken"), build_model(config, tokenizer.vocab_size), tokenizer)
    assert "only a decoder to export" in refused("export-weights", "spoken", *ENCODER, "--out", "vit")
    assert not Path("vit").exists()
    assert report("export-weights", "spoken", *DECODER, "--out", "gpt2")["left_out"] == 0


def test_import_builds_the_tokenizer_from_the_alphabet_of_the_model() -> None:
    report("export-weights", "trained", *DECODER, "--out", "gpt2")
    report("import-weights", "--model", "mine", "--decoder", "gpt2", "--out", "out")
    assert load_model(Path("out"))[1].encode(ALPHABET)
