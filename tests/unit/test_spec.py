"""The spec: what it accepts, and what it says when it does not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.spec import (
    LENGTHS,
    RunSpec,
    SpecError,
    describe_fields,
    differing_fields,
    load_spec,
    spec_from_json,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINIMAL = """
name = "x"
[model]
depth = 4
seq_len = 64
[base_train]
num_steps = 3
total_batch_size = 1024
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(MINIMAL)
    return path


def test_presence_of_a_section_switches_its_stage_on(config: Path) -> None:
    assert load_spec(config).stages == ("base_train",)
    config.write_text(MINIMAL + "[report]\n")
    assert load_spec(config).stages == ("base_train", "report")


def test_overrides_are_toml_literals(config: Path) -> None:
    spec = load_spec(config, ["model.depth=6", 'name="y"', "seed=7", "base_train.grad_clip=inf"])
    assert (spec.model.depth, spec.name, spec.seed) == (6, "y", 7)


@pytest.mark.parametrize(
    ("config_name", "override"),
    [
        ("smoke", "base_train.tokens_per_param=20.0"),
        ("d64_1000usd", "base_train.num_steps=300"),
        ("d20", "mid_train.num_steps=7"),
    ],
)
def test_a_length_of_the_command_line_replaces_the_files(config_name: str, override: str) -> None:
    spec = load_spec(CONFIGS / f"{config_name}.toml", [override])
    stage, _, value = override.removesuffix(".0").partition(".")
    field, _, number = value.partition("=")
    lengths = {name: getattr(getattr(spec, stage), name, None) for name in LENGTHS}
    assert {name: given for name, given in lengths.items() if given} == {field: int(number)}


def test_two_lengths_for_one_stage_are_refused(config: Path) -> None:
    two = ["base_train.num_steps=5", "base_train.tokens_per_param=20.0"]
    for overrides in (two, two[::-1]):
        with pytest.raises(SpecError, match=r"exactly one.*given: num_steps, tokens_per_param"):
            load_spec(config, overrides)


@pytest.mark.parametrize(
    ("override", "wants"),
    [
        ("model.dept=3", ["model", "'dept'", "did you mean 'depth'", "seq_len"]),
        ("modle.depth=3", ["'modle'", "did you mean 'model'"]),
        ('model.depth="3"', ["model.depth", '"3"', "integer"]),
        ("model.depth=0", ["model.depth", "0", "greater than or equal to 1"]),
        ("model.depth=2.5", ["model.depth", "2.5", "integer"]),
        ("chat_rl.num_steps=3", ["chat_rl", "cannot create", "model, base_train"]),
        ("base_train.matrix_lr=fast", ["'fast'", "TOML literal", '"fast"']),
        ('base_train.horizon="budget"', ["needs budget.max_hours or budget.max_usd"]),
        ("model=3", ["model.FIELD=value"]),
        ('name="a/b"', ["name", '"a/b"', "[A-Za-z0-9]"]),
        ("name.x=3", ["name", "not a section"]),
        ("base_train.total_batch_size=100", ["100", "no multiple", "64"]),
        ("depth", ["section.field=value"]),
        ("stop_grace=3", ["'stop_grace'", "did you mean 'stop_grace_s'"]),
        ('base_train.device_batch_size="all"', ["device_batch_size", "all", "auto"]),
        ('name="a b"', ["name", "a b"]),
    ],
)
def test_a_wrong_override_is_one_message_that_names_place_value_and_fix(
    config: Path, override: str, wants: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(config, [override])
    for want in wants:
        assert want in str(caught.value)


def test_a_missing_file_names_the_nearest(config: Path) -> None:
    with pytest.raises(SpecError, match=r"did you mean .*x\.toml"):
        load_spec(config.with_name("xx.toml"))


def test_unreadable_toml_names_the_line(config: Path) -> None:
    config.write_text("name = \n")
    with pytest.raises(SpecError, match="not valid TOML.*line 1"):
        load_spec(config)
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(config)


def test_a_missing_required_field_says_what_it_is(config: Path) -> None:
    config.write_text('name = "x"\n[model]\n')
    with pytest.raises(SpecError, match=r"model\.depth: missing.*Number of layers"):
        load_spec(config)


def test_a_value_in_place_of_a_section_says_how_one_is_written(config: Path) -> None:
    config.write_text('name = "x"\nmodel = 4\n')
    with pytest.raises(SpecError, match=r"model = 4: give a section: \[model\]"):
        load_spec(config)


def test_budget_horizon_needs_a_budget(config: Path) -> None:
    config.write_text(MINIMAL.replace("num_steps = 3", 'horizon = "budget"'))
    with pytest.raises(SpecError, match=r"budget\.max_hours or budget\.max_usd"):
        load_spec(config)
    config.write_text(config.read_text() + "[budget]\nmax_hours = 2\n")
    assert load_spec(config).budget.max_hours == 2.0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("[mid_train]\nnum_epochs = 1\nmixture = { smoltalk = 9 }", "mid_train reads smoltalk"),
        ("[chat_rl]\nnum_steps = 1", "chat_rl reads gsm8k"),
        ('[evaluate]\ntasks = ["kinds", "core", "mmlu"]', "evaluate reads core, mmlu"),
    ],
)
def test_published_tasks_and_an_alphabet_need_an_unknown_char(
    config: Path, section: str, said: str
) -> None:
    text = MINIMAL.replace("1024", "524288") + section + '\n[data]\ntokenizer = "char"\n'
    config.write_text(text)
    with pytest.raises(SpecError, match=said + r'.*data\.unknown_char="\?"'):
        load_spec(config)
    config.write_text(text + 'unknown_char = "?"\n')
    assert load_spec(config).data.unknown_char == "?"
    config.write_text(text.replace('"char"', '"bpe"'))
    assert load_spec(config).data.unknown_char is None


def test_json_round_trip_and_differences(config: Path) -> None:
    spec = load_spec(config)
    assert spec_from_json(spec.model_dump_json()) == spec
    other = load_spec(config, ["model.depth=8", "seed=1"])
    assert differing_fields(spec, other) == ["seed: 42 -> 1", "model.depth: 4 -> 8"]
    assert differing_fields(spec, spec) == []
    with pytest.raises(SpecError, match=r"spec\.json: .*depth"):
        spec_from_json(json.dumps({"name": "x", "model": {}}))


def test_every_field_has_a_help_text() -> None:
    without = [name for name, _, text in describe_fields() if not text]
    assert without == []


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_override_text_ends_in_another_error(tmp_path_factory, name: str, value: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    if not path.exists():
        path.write_text(MINIMAL)
    try:
        spec = load_spec(path, [f"{name}={value}"])
    except SpecError as e:
        assert str(e)
    else:
        assert isinstance(spec, RunSpec)
