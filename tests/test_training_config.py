"""The training configuration: what it accepts, and what it says when it does not."""

from pathlib import Path

import pytest

from training.config import AdaptConfig, Config, ConfigError, load, load_as

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_is_valid(path: Path) -> None:
    schema = AdaptConfig if path.stem == "adapt" else Config
    assert isinstance(load_as(schema, path), schema)


def test_override_replaces_one_key() -> None:
    config = load(CONFIGS / "smoke.yaml", ["training.learning_rate=3e-5", "name=other"])
    assert config.training.learning_rate == pytest.approx(3e-5)
    assert config.name == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("training.learning_rat=1e-4", "did you mean 'training.learning_rate'", id="misspelt key"),
        pytest.param("tokns.max_length=128", "did you mean 'tokens'", id="misspelt section"),
        pytest.param("training.batch_size=many", "'training.batch_size'.*got 'many' \\(str\\)", id="wrong type"),
        pytest.param("training.batch_size=2.5", "'training.batch_size'.*got 2.5", id="fraction of a review"),
        pytest.param("tokens.truncation_side=middle", "'tokens.truncation_side'.*'left' or 'right'", id="no such side"),
        pytest.param("tokens.max_length=4096", "less than or equal to 512", id="out of range"),
        pytest.param(
            "training.kept_percent=[50,75]", "do not come back.*got \\[50, 75\\]", id="more tokens than before"
        ),
        pytest.param("training.kept_percent=[0]", "greater than or equal to 1", id="no token left"),
        pytest.param("training.learning_rate", "has no '='", id="no value"),
        pytest.param("name=../elsewhere", "'name'", id="name that leaves the folder"),
    ],
)
def test_wrong_override_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(CONFIGS / "smoke.yaml", [override])


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("name: x\nbase: {sauce: random}\ndata: {source: [1]}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    for part in ("base.sauce", "base.source", "data.source", str(path)):
        assert part in str(caught.value)


def test_missing_file_lists_the_shipped_configurations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*smoke\.yaml"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a_folder", "a_folder.*directory"),
        ("list.yaml", r"list\.yaml: a list came, expected keys"),
    ],
)
def test_what_is_no_file_of_keys_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "list.yaml").write_text("- name: x\n")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / name, ["name=other"])


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load(path)
