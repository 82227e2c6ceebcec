import dataclasses
import logging
import pickle
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import (
    LOG_LEVELS,
    AppConfig,
    DeploymentConfig,
    EngineSettings,
    HttpConfig,
    IsqConfig,
    ModelConfig,
    Section,
    SettingError,
    SpeculationConfig,
    apply_log_level,
    build_config,
    resolve_reference,
)
from serve_app.errors import LaunchError
from serve_app.options import EngineConfig, IsqOptions, ModelSource, SpeculationOptions


@pytest.mark.parametrize(
    ("section", "target", "more"),
    [
        (ModelConfig, ModelSource, set()),
        (EngineSettings, EngineConfig, set()),
        (IsqConfig, IsqOptions, set()),
        # The draft model is a source of its own.
        (SpeculationConfig, SpeculationOptions, {"draft"}),
    ],
)
def test_sections_repeat_the_engine_options_field_for_field(
    section: type[Section], target: type, more: set[str]
) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(target)}
    defaults = {name: field.default for name, field in section.model_fields.items()}
    assert {name: default for name, default in defaults.items() if name not in more} == fields
    assert more <= set(defaults)


def test_sections_convert_to_the_engine_options() -> None:
    source = ModelConfig(model="m", kind="gguf", files=("a", "b"), dtype="f32", max_seq_len=77).to_source()
    assert source == ModelSource(model="m", kind="gguf", files=("a", "b"), dtype="f32", max_seq_len=77)
    assert EngineSettings(pool_mb=5, seed=3).to_config() == EngineConfig(pool_mb=5, seed=3)
    speculation = SpeculationConfig(use="auto", max_tokens=7, is_fixed=True, draft=ModelConfig(model="d"))
    assert speculation.to_options() == SpeculationOptions(use="auto", max_tokens=7, is_fixed=True)


def test_the_two_names_of_the_cache_type() -> None:
    assert EngineSettings().to_config().kv_type == "auto"
    assert EngineSettings(kv_cache_dtype="q8").to_config().kv_type == "q8"
    assert EngineSettings(pa_cache_type="f8e4m3").to_config().kv_type == "f8e4m3"
    assert EngineSettings(pa_cache_type="f8e4m3", kv_cache_dtype="f8e4m3").to_config().kv_type == "f8e4m3"
    with pytest.raises(ValidationError, match="--pa-cache-type f8e4m3 and --kv-cache-dtype q8 contradict"):
        EngineSettings(pa_cache_type="f8e4m3", kv_cache_dtype="q8")


def test_plain_data_without_defaults_builds_the_same_configuration() -> None:
    config = AppConfig(
        model=ModelConfig(model="m", files=("x.gguf",), kind="gguf"),
        engine=EngineSettings(max_seqs=3, pool_fraction=0.5),
        http=HttpConfig(port=80, api_keys=("env:KEY",)),
        deployment=DeploymentConfig(target_replicas=2, max_target_replicas=4),
        log="warn",
    )
    args = config.to_args()
    assert args["engine"] == {"max_seqs": 3, "pool_fraction": 0.5}
    assert args["model"]["files"] == ["x.gguf"]
    assert AppConfig.model_validate(args) == config
    assert AppConfig().to_args() == {}


def test_a_draft_model_is_described_like_the_target() -> None:
    data = {
        "speculation": {
            "use": "draft",
            "max_tokens": 3,
            "deadline_ms": 20.0,
            "maps_text": True,
            "draft": {"model": "d", "kind": "gguf", "files": ["d.gguf"], "isq": {"type": "Q4K"}},
        }
    }
    config = AppConfig.model_validate(yaml.safe_load(yaml.safe_dump(data)))
    assert config.to_args() == data
    assert AppConfig.model_validate(config.to_args()) == config
    draft = config.speculation.draft
    assert draft is not None
    assert draft.to_source() == ModelSource(model="d", kind="gguf", files=("d.gguf",), isq=IsqOptions(type="Q4K"))


@pytest.mark.parametrize(
    ("draft", "section", "name", "words"),
    [
        ({"model": "d", "dtype": "f8"}, "draft", "dtype", "should be"),
        ({"model": "d", "isq": {"type": "Q9"}}, "draft.isq", "type", "names no type"),
        ({"model": "d", "isq": {}}, None, None, "The draft model: in-situ quantization needs a type"),
        ({"model": "d", "kind": "plain", "files": ["x"]}, None, None, "The draft model: file names"),
    ],
)
def test_a_fault_of_the_draft_model_is_told_from_the_targets(
    draft: dict[str, object], section: str | None, name: str | None, words: str
) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        build_config({"speculation": {"use": "auto", "draft": draft}})
    assert (caught.value.section, caught.value.name) == (section, name)


def test_a_configuration_cannot_be_changed_and_crosses_processes() -> None:
    config = AppConfig(log="debug")
    with pytest.raises(ValidationError):
        config.log = "info"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.http.port = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "data",
    [
        {"modle": {}},
        {"http": {"prot": 1}},
        {"http": {"port": 0}},
        {"http": {"idle_stream_timeout_s": float("nan")}},
        {"engine": {"block_size": 24}},
        {"engine": {"pool_mb": 1, "pool_tokens": 1}},
        {"engine": {"pa_cache_type": "f8e4m3", "kv_cache_dtype": "f16"}},
        {"engine": {"pa_cache_type": "q8"}},
        {"engine": {"pool_fraction": 1.5}},
        {"model": {"isq": {}}},
        {"model": {"isq": {"type": "Q9"}}},
        {"model": {"isq": {"type": 7}}},
        {"model": {"isq": {"type": "Q4K", "kind": 1}}},
        {"engine": {"max_seqs": 0}},
        {"engine": {"max_seqs": 64, "max_batched_tokens": 32}},
        {"model": {"token_source": "secret"}},
        {"model": {"kind": "gguf"}},
        {"model": {"files": ["a.gguf"]}},
        {"model": {"kind": "plain", "model": "m", "files": ["a.gguf"]}},
        {"deployment": {"target_replicas": 3, "max_target_replicas": 2}},
        {"speculation": {"max_tokens": 0}},
        {"speculation": {"max_tokens": 17}},
        {"speculation": {"deadline_ms": 0}},
        {"speculation": {"use": "mtp"}},
        {"speculation": {"use": "draft"}},
        {"speculation": {"use": "ngram", "maps_text": True}},
        {"speculation": {"use": "ngram", "draft_sampling": "sampled"}},
        {"speculation": {"use": "auto", "draft": {"model": "d"}, "draft_sampling": "best"}},
        {"speculation": {"use": "auto", "draft": {"model": "d"}, "draft_sampling": "sampled", "maps_text": True}},
        {"speculation": {"use": "auto", "draft": {"model": "d"}, "draft_sampling": "sampled"}, "engine": {"seed": 0}},
        {"speculation": {"draft": {"model": "d"}}},
        {"speculation": {"use": "ngram", "draft": {"model": "d"}}},
        {"speculation": {"use": "auto", "draft": {}}},
        {"speculation": {"use": "auto", "draft": {"model": "d", "kind": "plain", "files": ["a.gguf"]}}},
        {"speculation": {"use": "auto", "draft": {"model": "d", "isq": {"type": "Q9"}}}},
        {"log": "loud"},
    ],
)
def test_bad_settings_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AppConfig.model_validate(data)


def test_secrets_do_not_show_when_printed() -> None:
    config = AppConfig(http=HttpConfig(api_keys=("s3cret",)), model=ModelConfig(token_source="literal:t0ken"))
    assert "s3cret" not in repr(config)
    assert "t0ken" not in repr(config)


def test_api_keys_come_from_where_they_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_KEY", " one ")
    (tmp_path / "keys").write_text("two\n\n three \n")
    config = HttpConfig(api_keys=("plain", "env:A_KEY", f"path:{tmp_path / 'keys'}", "literal:env:x"))
    assert config.resolve_api_keys() == ("plain", "one", "two", "three", "env:x")


@pytest.mark.parametrize("reference", ["env:NOT_SET_ANYWHERE", "path:/does/not/exist", "path:/"])
def test_a_reference_that_leads_nowhere_is_one_sentence(reference: str) -> None:
    with pytest.raises(LaunchError, match=r"^The .*\.$"):
        resolve_reference(reference)


def test_an_empty_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMPTY_KEY", "  ")
    (tmp_path / "keys").write_text("\n")
    for reference in ("env:EMPTY_KEY", f"path:{tmp_path / 'keys'}"):
        with pytest.raises(LaunchError, match="empty"):
            resolve_reference(reference)


def test_log_level_is_set_for_our_packages_only() -> None:
    before = logging.getLogger().level
    try:
        apply_log_level("trace")
        assert logging.getLogger("serve_app.engine").isEnabledFor(LOG_LEVELS["trace"])
        apply_log_level("off")
        assert not logging.getLogger("deployments").isEnabledFor(logging.CRITICAL)
        assert logging.getLogger().level == before
    finally:
        apply_log_level("info")


def test_a_config_file_may_give_the_type_as_a_number_of_bits() -> None:
    config = AppConfig.model_validate({"model": {"model": "m", "isq": {"type": 4, "cache": "/c"}}})
    assert config.model.to_source().isq == IsqOptions(type="4", cache="/c")
    assert AppConfig.model_validate(config.to_args()) == config
