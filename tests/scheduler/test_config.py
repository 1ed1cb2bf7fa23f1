import pytest

from scheduler.config import Config, ConfigError, load


def test_defaults_serve_the_demo_model_on_an_embedded_broker():
    config = load()
    assert config == Config()
    assert (config.broker.url, config.model.path) == ("embedded", "smollm2")


def test_flags_over_environment_over_file(tmp_path):
    file = tmp_path / "tokenbus.toml"
    file.write_text("[engine]\nmax_running = 3\nblock_size = 8\nkv_memory_mb = 64\n")
    environ = {"TOKENBUS_ENGINE_MAX_RUNNING": "4", "TOKENBUS_ENGINE_KV_MEMORY_MB": "128", "HOME": "/"}
    config = load(file, environ, {"engine.max_running": "5"})
    assert (config.engine.max_running, config.engine.kv_memory_mb, config.engine.block_size) == (5, 128, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"engine.max_runing": "5"}, "unknown field `max_runing`"),
        ({"motor.size": "5"}, "unknown field `motor`"),
        ({"engine.max_running": "0"}, "max_running"),
        ({"engine.max_running": "many"}, "max_running"),
        ({"engine.max_running": "512"}, "max_batch_tokens"),
        ({"model.alias": "a/b"}, "model.alias: must be 1 to 64"),
        ({"model.dtype": "int3"}, "dtype"),
    ],
)
def test_errors_name_the_setting(flags, message):
    with pytest.raises(ConfigError, match=message):
        load(flags=flags)


def test_unreadable_files_are_named(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("[engine")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(file)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(tmp_path / "none.toml")
