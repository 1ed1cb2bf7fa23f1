import pytest

from scheduler.config import Config, ConfigError, load, read_password


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
        ({"broker.url": "mqtt//host"}, "broker.url: the broker's URL must look like"),
        ({"broker.password": "hunter2"}, "unknown field `password`"),
        ({"broker.url": "mqtt://host", "broker.ca_file": "ca.crt"}, "broker.url: .* must begin with mqtts://"),
        ({"broker.cert_file": "a.crt"}, "broker.url: .* must begin with mqtts://"),
        ({"broker.url": "mqtts://host", "broker.key_file": "a.key"}, "needs its certificate file"),
    ],
)
def test_errors_name_the_setting(flags, message):
    with pytest.raises(ConfigError, match=message):
        load(flags=flags)


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://svc:hunter2@host",
        "mqtts://svc:hunter2@host:8883",
        "mqtt://svc:hunter2#@host",
        "mqtt://svc:1#hunter2@host",
        "mqtt://svc:1?hunter2@host",
        "mqtt://svc:1/hunter2@host",
        "mqtt://svc:hunter2]@host",
        "mqtt://host?password=hunter2",
        "mqtt://svc:hunter2\u2100@host",
    ],
)
def test_a_password_in_the_url_is_refused_and_never_shown(url):
    with pytest.raises(ConfigError, match=r"broker\.url") as refused:
        load(environ={"TOKENBUS_BROKER_URL": url})
    assert "hunter2" not in str(refused.value)
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff", "must be UTF-8")],
)
def test_password_files_that_hold_none_are_named(tmp_path, content, problem):
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file}: {problem}"):
        read_password(file)


def test_a_password_ends_before_the_line_does(tmp_path):
    file = tmp_path / "password"
    file.write_text("two words\n")
    assert read_password(file) == "two words"


def test_unreadable_files_are_named(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("[engine")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(file)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(tmp_path / "none.toml")


def test_tenants_have_weights(tmp_path):
    file = tmp_path / "tokenbus.toml"
    file.write_text("[tenants.alice]\nweight = 2\n")
    assert load(file).tenants["alice"].weight == 2
    file.write_text("[tenants.alice]\nweight = 0\n")
    with pytest.raises(ConfigError, match="weight"):
        load(file)
